"""Checkpoints damaged in thousands of ways: each is found and the one before taken, or it restores to the same bits.

Usage: python scripts/fuzz/checkpoints.py [--cases=4000] [--seed=0] [--unprotected]

Two small checkpoints are saved, with a model's parameters and moments. Then, case by case, one to three things happen
to files of the newer one: they are cut, grown, overwritten, emptied, zeroed, removed, swapped or linked elsewhere, bits
turn, or the manifest is rewritten as plausible nonsense. A run that starts there has to take the older one and say so,
or find the very same values; who asks for the damaged one gets an error in one line. With --unprotected the same files
are read without holding them against their digests first, for what that is worth.

Prints a table, and leaves with 1 if a case ended in other values, without a word, or in an error of another kind.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import damage
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from bigjax.checkpoint import Checkpoints, Damaged
from bigjax.commits import Keep

OLDER, NEWER = 10, 20


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", type=int, default=4000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--unprotected", action="store_true")
  args = parser.parse_args()
  start = time.perf_counter()
  counts, bad = run(args.cases, args.seed, args.unprotected)
  outcomes = sorted({outcome for _, outcome in counts})
  print(f"{'damage':<12}" + "".join(f"{o:>12}" for o in outcomes))
  for kind in sorted({kind for kind, _ in counts}):
    print(f"{kind:<12}" + "".join(f"{counts[kind, o]:>12,}" for o in outcomes))
  print(
    f"{'all':<12}" + "".join(f"{sum(counts[k, o] for k, o in counts if o == p):>12,}" for o in [0] for p in outcomes)
  )
  print("\n".join(bad[:20]))
  print(f"{args.cases:,} cases, seed {args.seed}, {time.perf_counter() - start:.0f} s")
  return 1 if bad else 0


def run(cases: int, seed: int, unprotected: bool = False) -> tuple[collections.Counter, list[str]]:
  """Returns how often which damage ended how, and a line for each case that ended badly."""
  counts, bad = collections.Counter(), []
  with tempfile.TemporaryDirectory() as directory:
    saved = pathlib.Path(directory) / "saved"
    with Checkpoints(str(saved), Keep(last=2)) as checkpoints:
      for step in (OLDER, NEWER):
        checkpoints.save(step, state_of(step), {"remembered": step})
        checkpoints.wait()
    for case in range(cases):
      draw = np.random.default_rng((seed, case))
      workdir = pathlib.Path(directory) / "case"
      shutil.copytree(saved, workdir, symlinks=True)
      kinds = damage.damaged(workdir / "checkpoints" / f"{NEWER:08d}", draw, KINDS)
      outcome = read_plainly(workdir) if unprotected else started(workdir, case)
      counts["+".join(kinds) if len(kinds) == 1 else "several", outcome.partition(":")[0]] += 1
      if outcome.partition(":")[0] not in ("found", "the same"):
        bad.append(f"case {case} ({', '.join(kinds)}): {outcome}")
      shutil.rmtree(workdir)
  return counts, bad


def state_of(step):
  """A small state of several types and shapes."""
  draw = np.random.default_rng(step)
  array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  params = {"embed": array(50, 8), "blocks": {"0": {"w": array(8, 8)}, "1": {"w": array(8, 8)}}, "bias": array(8)}
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  return {"step": jnp.asarray(step), "params": params, "opt_state": {"mu": half, "nu": jax.tree.map(abs, params)}}


ABSTRACT = jax.eval_shape(lambda: state_of(0))


def started(workdir, case):
  """What a run finds that starts there."""
  notes = []
  shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), ABSTRACT)
  try:
    with Checkpoints(str(workdir), Keep(last=2), note=notes.append) as checkpoints:
      if case % 2:  # Half of them are asked for by name first.
        try:
          checkpoints.verify(NEWER)
        except Damaged as e:
          if "is damaged" not in str(e) or "\n" in str(e):
            return f"bad message: {e}"
      step = checkpoints.latest()
      state, loop = checkpoints.restore(ABSTRACT, shardings, step)
  except Exception as e:
    return f"crash: {type(e).__name__}: {e}"
  if not same(state, step) or loop != {"remembered": step}:
    return f"changed: of step {step}"
  if step == NEWER:
    return "the same" if not notes else f"bad message: {notes}"
  return "found" if len(notes) == 1 and "damaged" in notes[0] else f"silent: {notes}"


def read_plainly(workdir):
  """What the array library makes of it by itself."""
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      state = reader.restore(workdir / "checkpoints" / f"{NEWER:08d}" / "state")
  except Exception as e:
    return f"found: {e}"
  return "the same" if same(state, NEWER) else "changed"


def same(state, step):
  leaves = [jax.tree.leaves(jax.device_get(tree)) for tree in (state, state_of(step))]
  return jax.tree.structure(state) == jax.tree.structure(ABSTRACT) and all(
    np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(*leaves, strict=True)
  )


def _older(file, draw, directory):
  """A file of the older checkpoint, as a copy that was interrupted leaves it."""
  other = directory.parent / f"{OLDER:08d}" / file.relative_to(directory)
  if other.is_file():
    shutil.copyfile(other, file)
  else:
    file.unlink()


def _manifest(file, draw, directory):
  """The manifest as JSON that is valid and wrong."""
  manifest = directory / "checkpoint.json"
  try:
    said = json.loads(manifest.read_text())
  except (OSError, ValueError):
    return
  nonsense = [None, [], {}, "", -1, 1e999, "x" * 1000, [[[]]], True, {"state/d": [0, "sha256:"]}]
  key = str(draw.choice([*said, "another"]))
  if draw.random() < 0.3:
    said.pop(key, None)
  else:
    said[key] = nonsense[draw.integers(len(nonsense))]
  manifest.write_text(json.dumps(said))


KINDS = {
  **{name: damage.CONTENT[name] for name in ("flip", "overwrite", "zero", "cut", "grow")},
  # Without all of it there is none, which is nothing to be said.
  "folder lost": lambda file, draw, directory: shutil.rmtree(
    file.parent if file.parent != directory else file.parent / "state", True
  ),
  **{name: damage.PLACE[name] for name in ("empty", "remove", "swap", "link", "folder")},
  "older": _older,
  "manifest": _manifest,
}


if __name__ == "__main__":
  sys.exit(main())
