"""List, show, compare, verify, convert and remove checkpoints."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import time

from bigjax import config as configs
from bigjax import record, workdirs
from bigjax.errors import UserError


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax checkpoint", description=__doc__, allow_abbrev=False)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name, what, *sources):
    one = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    for source in sources:
      one.add_argument(
        source, metavar=f"{source.upper()}[@STEP]" if source != "workdir" else "WORKDIR", help="of a run"
      )
    return one

  command("ls", "the checkpoints of a run: size, age, why each is kept", "workdir")
  one = command("show", "every leaf: type, shape, bytes", "source")
  one.add_argument("--match", default=".*", metavar="REGEX", help="of a leaf's path; only those")
  one = command("diff", "what differs between two: leaves, and by how much; exit code 1 if anything does", "a", "b")
  one.add_argument("--match", default=".*", metavar="REGEX", help="of a leaf's path; only those")
  command("verify", "hold every file against its digest; exit code 1 if one is not what was written", "source")
  one = command("convert", "write a checkpoint as one of another config, into a workdir of its own", "source")
  one.epilog = "--config.KEY=VALUE says in what the new config differs, such as --config.model.scan=True."
  one.add_argument("directory", help="the new workdir; not there yet, or empty")
  one.add_argument("--fresh", action="append", default=[], metavar="REGEX", help="leaves that are made anew")
  one.add_argument("--drop", action="append", default=[], metavar="REGEX", help="leaves that are left behind")
  one.add_argument("--resize", action="append", default=[], metavar="REGEX", help="leaves that may have other sizes")
  one.add_argument("--cast", action="store_true", help="other precisions may lose digits")
  one = command("prune", "remove checkpoints, never the newest that is intact", "workdir")
  one.add_argument("--last", type=int, default=1, help="how many of the newest stay; %(default)s by default")
  one.add_argument("--every", type=int, metavar="STEPS", help="those of every so many steps stay, too")
  one.add_argument("--lose_best", action="store_true", help="also the best one, which stays otherwise")
  one.add_argument("--damaged", action="store_true", help="also those that were set aside as damaged")
  one.add_argument("--dry_run", action="store_true", help="only say which")
  args, overrides = parser.parse_known_args(argv)
  if overrides and args.command != "convert":
    parser.error(f"unrecognized arguments: {' '.join(overrides)}")
  if args.command == "convert":
    return _convert(args, overrides)
  return {"ls": _ls, "show": _show, "diff": _diff, "verify": _verify, "prune": _prune}[args.command](args)


def _ls(args) -> int:
  from bigjax import commits

  root = _root(args.workdir)
  found = {step: _manifest(root, step) for step in commits.steps(root)}
  why = _why([m for m in found.values() if not isinstance(m, str)], args.workdir)
  rows = []
  for step, said in found.items():
    if isinstance(said, str):
      rows.append((f"{step:,}", "", "", "", f"damaged: {said}"))
    else:
      state = "digests" if said.files is not None else "no digests"
      rows.append((f"{step:,}", _bytes(said.size), _age(said.time), ", ".join(why[step]) or "-", state))
  print(_table([("step", "size", "age", "kept as", ""), *rows]))
  for path in sorted(root.iterdir()):
    if ".damaged" in path.name:
      print(f"{path.name}: set aside as damaged; remove it, or see bigjax checkpoint prune --damaged")
  return 0


def _show(args) -> int:
  opened, step = _open(args.source)
  leaves = {n: x for n, x in opened.leaves(step).items() if re.fullmatch(args.match, n)}
  rows = [(n, str(x.dtype), str(list(x.shape)), _bytes(x.size * x.dtype.itemsize)) for n, x in leaves.items()]
  print(_table(rows))
  for part in dict.fromkeys(n.partition("/")[0] for n in leaves):
    sizes = [(x.size, x.size * x.dtype.itemsize) for n, x in leaves.items() if n.partition("/")[0] == part]
    count, size = map(sum, zip(*sizes))
    print(f"{part}: {len(sizes)} leaves, {count:,} values, {_bytes(size)}")
  loop = opened.loop(step)
  print(f"step {step:,}; the loop remembers {loop}" if loop else f"step {step:,}")
  return 0


def _diff(args) -> int:
  import numpy as np

  opened = [_open(source) for source in (args.a, args.b)]
  leaves = [{n: x for n, x in o.leaves(step).items() if re.fullmatch(args.match, n)} for o, step in opened]
  a, b = leaves
  rows, equal = [], 0
  for name in dict.fromkeys([*a, *b]):
    if name not in a or name not in b:
      x = a.get(name, b.get(name))
      rows.append(("-" if name in a else "+", name, f"{x.dtype}{list(x.shape)}", f"in {'AB'[name in b]} only"))
    elif a[name].shape != b[name].shape:
      rows.append(("!", name, f"{a[name].dtype}{list(a[name].shape)}", f"{b[name].dtype}{list(b[name].shape)}"))
    else:
      x, y = (o.values(step, name) for o, step in opened)
      kinds = "" if x.dtype == y.dtype else f"{x.dtype}, {y.dtype}; "
      if x.dtype == y.dtype and x.tobytes() == y.tobytes():
        equal += 1
      else:
        x, y = (v.astype(np.float64) for v in (x, y))
        with np.errstate(invalid="ignore", divide="ignore"):
          most, size = np.abs(x - y).max(initial=0), np.abs(x).max(initial=0)
        relative = f"{most / size:.3g}" if size else "-"
        rows.append(("~", name, f"{kinds}differs by {most:.3g}", f"{relative} of the largest"))
  if rows:
    print(_table(rows))
  print(f"{equal} of {len(set(a) | set(b))} leaves are the same to the bit")
  return 1 if rows else 0


def _verify(args) -> int:
  from bigjax import commits

  workdir, step = _parsed(args.source)
  root, bad = _root(workdir), 0
  steps = commits.steps(root)
  if step is not None and step not in steps:
    raise UserError(f"{args.source}: there are checkpoints of steps {', '.join(map(str, steps)) or 'none'}.")
  for one in steps if step is None else [step]:
    start = time.perf_counter()
    lines = commits.wrong(root, one)
    seconds = time.perf_counter() - start
    if lines:
      bad += 1
      print("\n".join([f"step {one:,}: DAMAGED", *(f"  {line}" for line in lines)]))
    elif (said := commits.read(root, one)).files is None:
      print(f"step {one:,}: has no digests; it was written before there were any")
    else:
      print(f"step {one:,}: intact, {len(said.files)} files, {_bytes(said.size)} in {seconds:.2f} s")
  return 1 if bad else 0


def _convert(args, overrides) -> int:
  workdir, step = _parsed(args.source)
  workdir = workdirs.fetched(workdir)
  record.read_config(workdir)
  if os.path.isdir(args.directory) and os.listdir(args.directory):
    raise UserError(f"{args.directory} is there already; name another.")
  described = configs.read(os.path.join(workdir, "config.json"), overrides)

  import jax

  from bigjax import changes, experiment
  from bigjax.checkpoint import Checkpoints

  config = configs.resolve(described, experiment.TrainConfig)
  run = experiment.build(config)
  if run.borrows:
    raise UserError(f"{args.source} holds adapters of another run's model, which are what they are.")
  rules = (*((regex, None) for regex in args.fresh), (".*", r"\g<0>"))
  allowed = changes.Changes(rules=rules, drop=args.drop, resize=args.resize, cast=args.cast, where="convert")
  with jax.set_mesh(run.mesh), Checkpoints(workdir, read_only=True, where="SOURCE") as checkpoints:
    step = checkpoints.newest() if step is None else step
    checkpoints.verify(step)
    fresh = lambda: run.init(jax.random.key(config.seed))
    state, report = changes.take(checkpoints, step, run.abstract, run.shardings, allowed, fresh)
    loop = checkpoints.loop(step)
  with Checkpoints(args.directory, run.keep()) as checkpoints:
    checkpoints.save(step, state, loop, insist=True)
  record.write_json(os.path.join(args.directory, "config.json"), configs.describe(config))
  print("\n".join([f"{args.directory}: step {step:,} of {workdir}", *(f"  {line}" for line in report)]))
  return 0


def _prune(args) -> int:
  from bigjax import bundles, commits

  if args.last < 1:
    raise UserError(f"--last={args.last}: one stays at least.")
  root = _root(args.workdir)
  steps = commits.steps(root)
  found = [m for m in (_manifest(root, s) for s in steps) if not isinstance(m, str)]
  saved_by = commits.Keep(**(found[-1].keep or {})) if found else commits.Keep()
  keep = commits.Keep(
    last=args.last, every=args.every, best=None if args.lose_best else saved_by.best, mode=saved_by.mode
  )
  why = commits.reasons(found, keep, bundles.needed(args.workdir))
  newest = next((s for s in reversed(steps) if not commits.wrong(root, s)), None)
  if newest is None and steps:
    raise UserError(f"{root}: no checkpoint is intact; nothing is removed. See bigjax checkpoint verify.")
  if newest is not None:
    why.setdefault(newest, []).append("newest that is intact")
  freed = 0
  for m in found:
    if not why[m.step]:
      freed += m.size or 0
      print(f"step {m.step:,}: {'would go' if args.dry_run else 'removed'}, {_bytes(m.size)}")
      if not args.dry_run:
        commits.remove(root, m.step)
  for path in sorted(root.iterdir()) if args.damaged else ():
    if ".damaged" in path.name:
      print(f"{path.name}: {'would go' if args.dry_run else 'removed'}")
      if not args.dry_run:
        path.rmtree()
  stay = [f"{s:,} ({', '.join(w)})" for s, w in sorted(why.items()) if w]
  print(f"{_bytes(freed)} {'would be freed' if args.dry_run else 'freed'}; there stay {', '.join(stay) or 'none'}")
  return 0


def _parsed(source) -> tuple[str, int | None]:
  """WORKDIR or WORKDIR@STEP."""
  workdir, at, step = source.rpartition("@")
  return (workdir, int(step)) if at and step.isdigit() else (source, None)


def _root(workdir):
  from bigjax import stores

  root = stores.place(workdir) / "checkpoints"
  if not root.is_dir():
    raise UserError(f"{workdir} holds no checkpoints.")
  return root


def _open(source):
  """Returns the checkpoints of a source and the step; verified."""
  from bigjax.checkpoint import Checkpoints

  workdir, step = _parsed(source)
  opened = Checkpoints(workdir, read_only=True, where=source)
  if step is None:
    step = opened.newest()
  if step is None or step not in opened.steps():
    raise UserError(f"{source}: there are checkpoints of steps {', '.join(map(str, opened.steps())) or 'none'}.")
  opened.verify(step)
  return opened, step


def _manifest(root, step):
  """What a checkpoint says of itself, or what is wrong with it."""
  from bigjax import commits

  try:
    return commits.read(root, step)
  except commits.Damaged as e:
    return str(e)


def _why(manifests, workdir):
  from bigjax import bundles, commits

  rules = manifests[-1].keep if manifests else None
  return commits.reasons(manifests, commits.Keep(**(rules or {})), bundles.needed(workdir))


def _age(time_said) -> str:
  if not time_said:
    return "?"
  seconds = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(time_said)).total_seconds()
  for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= length:
      return f"{seconds / length:.0f} {unit}"
  return f"{max(0, seconds):.0f} s"


def _bytes(size) -> str:
  if size is None:
    return "?"
  for unit in ("B", "KB", "MB", "GB"):
    if size < 1000 or unit == "GB":
      return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
    size /= 1000
  return ""


def _table(rows) -> str:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
  return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows)
