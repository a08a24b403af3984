"""The mesh, remat, microbatches and batch a chip that take the least time a token, found without a chip.

Every combination is laid out and estimated first (`analytic`), which leaves out what can't work and what is far from
fitting. The rest is compiled, the most promising first, each in a process of its own, until time is up. What was
compiled is kept, so a search that was stopped goes on where it was.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from bigjax import config as configs
from bigjax.errors import UserError
from bigjax.experiment import TrainConfig
from bigjax.plan import analytic, changes, kept, prepare, work
from bigjax.plan import topology as slices

REMATS = ("none", "dots", "save(qkv,attention)", "full")
SURELY = 1.3  # An estimate this much above the limit is not compiled.
A_COMPILE = 8 * 2**30  # Bytes of this machine's memory that a large step takes.
SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A combination: what it changes, and what it is estimated to take."""

  changes: dict[str, Any]
  memory: int
  seconds_a_token: float  # Or an example.
  question: str = ""  # What its plan is kept by.


def run(
  config: TrainConfig,
  command: Sequence[str],
  where: tuple[str, int],
  keep: kept.Kept,
  budget: float,
  jobs: int | None = None,
) -> Iterator[str]:
  """Yields lines on how the search goes, and at the end the ranking with overrides to paste.

  Args:
    config: what to start from.
    command: the flags of `bigjax plan` that say the same config.
    where: topology and number of slices.
    keep: where what was compiled is kept.
    budget: seconds.
    jobs: compiles at a time; None: as many as memory and cores allow.
  """
  until = time.monotonic() + budget
  found, refused = candidates(config, combinations(config, where), where, until)
  limit = slices.profile(where[0]).hbm // slices.profile(where[0]).devices
  fits = [c for c in found if c.memory <= SURELY * limit]
  jobs = jobs or max(1, min((os.cpu_count() or 1) // 2, _free() // A_COMPILE))
  yield f"{len(found) + refused} combinations: {refused} can't be, {len(found) - len(fits)} are estimated not to fit"
  yield f"{len(fits)} to compile, {jobs} at a time, for {budget / 60:g} minutes"
  if not slices.compiles(where[0]):
    yield "no compiler for this chip: ranked by estimates alone"
    rows = [dict(changes=c.changes, seconds=c.seconds_a_token, memory=c.memory, about=True) for c in fits]
    yield from ranking([r for r in rows if r["memory"] <= limit], limit)
    return
  rows = []
  for candidate, plan in _compiled(fits, command, where, keep, until, jobs):
    flags = changes.flags(candidate.changes)
    if isinstance(plan, str) or not plan["fits"]:
      what = plan if isinstance(plan, str) else f"{plan['memory']['missing'] / 2**30:.2f} GiB too large"
      yield f"  {what}: {flags}"
      continue
    seconds = 1 / plan["time"]["pace_a_chip"] / plan["chips"]
    rows.append(dict(changes=candidate.changes, seconds=seconds, memory=plan["memory"]["total"], about=False))
    note = " (kept)" if plan["kept"] else ""
    yield f"  {plan['time']['pace_a_chip']:,.0f} {plan['time']['pace_unit']}/s a chip{note}: {flags}"
  left = len(fits) - len(rows)
  yield from ranking(rows, limit)
  if left:
    yield f"{left} of {len(fits)} are not compiled or don't fit; the same command goes on with them"


def candidates(
  config: TrainConfig, combinations: Iterable[dict[str, Any]], where: tuple[str, int], until: float
) -> tuple[list[Candidate], int]:
  """Returns what can be laid out, the most promising first, and how many combinations can't."""
  found, refused = [], 0
  flops = None
  for change in combinations:
    if time.monotonic() > until:
      break
    try:
      prepared = prepare.prepare(changes.apply(config, change), *where)
    except UserError:
      refused += 1
      continue
    tokens = prepared.run.pace[0]
    flops = flops or (work.of(prepared.run), tokens)
    scaled = dataclasses.replace(
      flops[0],
      **{n: getattr(flops[0], n) * tokens // flops[1] for n in ("forward", "backward", "attention", "unmasked")},
    )
    estimate = analytic.estimate(prepared, scaled)
    seconds = estimate["seconds"] / tokens
    found.append(Candidate(change, estimate["memory"]["total"], seconds, _question(prepared)))
  return sorted(found, key=lambda c: c.seconds_a_token), refused


def _question(prepared):
  run = prepared.run
  shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves((run.abstract, run.batch, run.outputs))]
  described = json.dumps(configs.describe(prepared.config), sort_keys=True)
  return kept.question(described, str(shapes), str(prepared.steps), str(prepared.where))


def combinations(config: TrainConfig, where: tuple[str, int]) -> Iterator[dict[str, Any]]:
  """Yields changes of a config: each mesh with each remat, each number of parts and each batch."""
  devices = len(slices.devices(*where))
  remats = REMATS if analytic.option(config.model, "remat") is not None else (None,)
  for mesh, remat in itertools.product(_meshes(config, devices, where[1]), remats):
    ways = math.prod(size for axis, size in mesh if axis in ("replica", "data", "expert"))
    names = {axis for axis, _ in mesh}
    rules = {} if not isinstance(config.sharding, str) else {"sharding": _strategy(config.sharding, names)}
    for batch, parts in itertools.product(_batches(config.batch_size, ways), (1, 2, 4)):
      if batch % (ways * parts) == 0:
        change = {"mesh": [list(axis) for axis in mesh]} | rules | {"batch_size": batch, "accumulate": parts}
        yield change | ({} if remat is None else {"model.remat": remat})


def _meshes(config, devices, count):
  """Data with tensor parallelism of up to 16, the config's own experts, sequences and stages; over slices, replicas."""
  given = dict(config.mesh)
  fixed = [(a, given[a]) for a in ("pipe", "expert", "seq") if given.get(a, 1) > 1]
  rest = devices // math.prod(size for _, size in fixed) if fixed else devices
  for tensor in (1, 2, 4, 8, 16):
    if rest % tensor or rest // tensor < count:
      continue
    inner = [*fixed, *([("tensor", tensor)] if tensor > 1 else [])]
    data = rest // tensor
    yield [("data", data), *inner]
    if count > 1 and data > count:
      yield [("replica", count), ("data", data // count), *inner]


def _strategy(given, names):
  words = [w for w in ("pipe", "expert", "tensor") if w in names]
  sharded = "hsdp" if "replica" in names else "fsdp"
  return "+".join([*words, sharded]) if "sdp" in given or given == "auto" or words else given


def _batches(batch, ways):
  """The config's own batch, and half and twice of it a chip; the same number of examples comes first."""
  return sorted({b for b in (batch, batch // 2, batch * 2) if b >= ways}, key=lambda b: b != batch)


def _compiled(fits, command, where, keep, until, jobs) -> Iterator[tuple[Candidate, dict[str, Any] | str]]:
  """Yields plans as they are done, or why there is none; what is under way when time is up is stopped."""
  waiting, lock, running = iter(fits), threading.Lock(), set()

  def one(candidate):
    if (found := keep.get(candidate.question)) is not None:
      return found | {"kept": True}
    flags = [f"--config.{path}={value}" for path, value in candidate.changes.items()]
    what = [*command, *flags, f"--topology={where[0]}", f"--num_slices={where[1]}", "--json"]
    what += [f"--keep={keep.folder}"] if keep.folder else []
    process = subprocess.Popen(
      [sys.executable, "-m", "bigjax", "plan", *what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with lock:
      running.add(process)
    try:
      out, said = process.communicate(timeout=max(0.1, until - time.monotonic()))
      if process.returncode:
        return f"failed, {(said.strip().splitlines() or ['without a word'])[-1][:200]}"
      found = json.loads(out)
      keep.put(candidate.question, found)
      return found
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      return "not done in time"
    finally:
      with lock:
        running.discard(process)

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    under_way = {}
    try:
      while True:
        for candidate in itertools.islice(waiting, jobs - len(under_way)):
          under_way[pool.submit(one, candidate)] = candidate
        if not under_way or time.monotonic() > until:
          break
        for done in concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED).done:
          candidate = under_way.pop(done)
          yield candidate, done.result()
    finally:
      with lock:
        for process in running:
          process.kill()


def ranking(rows: Sequence[dict[str, Any]], limit: int) -> Iterator[str]:
  """Yields the best, the first with the flags to paste."""
  if not rows:
    yield "nothing was found that fits"
    return
  best = sorted(rows, key=lambda row: row["seconds"])
  yield ""
  yield "time a token, over all chips; memory of a device"
  for row in best[:SHOWN]:
    share = f"{row['memory'] / 2**30:6.2f} GiB ({row['memory'] / limit:.0%})"
    yield f"  {row['seconds'] * 1e9:10.3f} ns  {share}  {changes.flags(row['changes'])}"
  yield ""
  yield changes.flags(best[0]["changes"])


def _free() -> int:
  """The memory of this machine that a process could get."""
  try:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (ValueError, OSError):
    return A_COMPILE
