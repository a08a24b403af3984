#!/usr/bin/env python3
"""Training on Cloud TPU VMs, from nothing to logs, and back again after a preemption.

  python3 scripts/tpu_vm.py up NAME --zone=us-west4-a --accelerator_type=v5litepod-16 --spot --watch \\
      --setup_command="sudo mkdir -p /mnt/runs && sudo mount FILESTORE_IP:/share /mnt/runs" \\
      -- train --config=configs/digits_vit.py --workdir=/mnt/runs/vit
  python3 scripts/tpu_vm.py logs NAME --follow
  python3 scripts/tpu_vm.py up NAME ... --dry_run     prints every command, runs none

Underneath is plain `gcloud`. It needs the standard library of Python 3.9 here, and there what the TPU's image has.
What a TPU was made and started with is kept in .cache/tpu_vm/NAME.json, so the later commands need only its name.
On a worker the code is in ~/bigjax, the run's log in ~/bigjax_run; scripts/launch/tpu_worker.sh is what is done there.
Exit codes are those of bigjax: 0 well, 2 a mistake of yours, 1 a fault, 75 try again (no capacity; restarts used up).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

from launch import chips

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAULT, MISTAKE, AGAIN = 1, 2, 75
LOST = (
  "PREEMPTED",
  "TERMINATED",
  "FAILED",
  "SUSPENDED",
)  # of nodes and of requests: they don't come back by themselves


class Failure(Exception):
  """One message for the person at the keyboard, and the exit code."""

  def __init__(self, message: str, code: int = MISTAKE):
    super().__init__(message)
    self.code = code


class Missing(Failure):
  """There is no TPU of that name."""


@dataclasses.dataclass(frozen=True)
class Tpu:
  """Where the TPU is, what it is, and what runs on it: the content of .cache/tpu_vm/NAME.json."""

  name: str
  zone: str | None = None
  project: str | None = None
  accelerator_type: str | None = None
  topology: str | None = None
  version: str | None = None
  spot: bool = False
  queued: bool = False
  valid_until_duration: str | None = None
  num_slices: int = 1
  create_flag: tuple[str, ...] = ()
  ssh_flag: tuple[str, ...] = ()
  extras: str = "tpu"
  setup_command: tuple[str, ...] = ()
  env: tuple[str, ...] = ()
  command: tuple[str, ...] = ()
  dry_run: bool = False
  poll: float = 30.0

  @property
  def nodes(self) -> list[str]:
    """Names of the slices: Google appends a number where there are several."""
    return [self.name] if self.num_slices == 1 else [f"{self.name}-{i}" for i in range(self.num_slices)]

  def prefix(self, node: str) -> str:
    return "" if self.num_slices == 1 else f"{node} "

  def file(self, ending: str) -> pathlib.Path:
    return ROOT / ".cache" / "tpu_vm" / (self.name + ending)


def main(argv: list[str]) -> int:
  words, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
  args = parser().parse_args(words)
  try:
    return ACTIONS[args.action](settings(args, command), args)
  except Failure as e:
    print(f"tpu_vm {args.action}: {e}", file=sys.stderr)
    return e.code
  except KeyboardInterrupt:
    return 130


def up(tpu: Tpu, args) -> int:
  """create, copy, setup and run"""
  check_command(tpu)
  begin(tpu)
  return watch(tpu, args) if args.watch else 0


def begin(tpu: Tpu, anew: bool = False) -> bool:
  for step in (*[delete] * anew, create, copy, setup, run):
    step(tpu)
  return True


def create(tpu: Tpu, args=None) -> int:
  """make the TPU VM, or queue for it and wait"""
  execute(tpu, create_command(tpu))
  save(tpu)
  if tpu.queued:
    wait_until_ready(tpu)
  return 0


def copy(tpu: Tpu, args=None) -> int:
  """copy the working tree to all workers: what git knows, with your changes, and new files that it does not ignore"""
  tarball = str(tpu.file(".tar.gz"))
  execute(tpu, [sys.executable, str(ROOT / "scripts" / "launch" / "pack.py"), tarball])
  to = lambda node: gcloud(tpu, "tpu-vm", "scp", tarball, f"{node}:bigjax.tar.gz", "--worker=all", *tpu.ssh_flag)
  on_slices(tpu, to)
  on_workers(tpu, UNPACK)
  return 0


# The tarball's first member lists its files: what an earlier copy brought and this one has not is removed.
UNPACK = (
  "mkdir -p bigjax bigjax_run && cd bigjax && "
  "{ flock -n ../bigjax_run/lock true || { echo 'a run goes on here: stop it first' >&2; exit 3; }; } && "
  "{ [ ! -e .copied ] || xargs -0 rm -f -- <.copied; } && tar -xzf ../bigjax.tar.gz"
)


def setup(tpu: Tpu, args=None) -> int:
  """install the pinned packages on all workers with scripts/bootstrap.sh"""
  save(tpu)
  also = [shlex.join(["sh", "-c", command]) for command in tpu.setup_command]
  on_workers(tpu, " && ".join([worker("setup", *filter(None, tpu.extras.split(","))), *also]))
  return 0


def run(tpu: Tpu, args=None) -> int:
  """start a command of bigjax on all workers, detached: NAME -- train --config=... --workdir=..."""
  check_command(tpu)
  save(tpu)
  job = ["env", *tpu.env, ".venv/bin/bigjax", *tpu.command]
  on_workers(tpu, worker("start", hashlib.sha256(shlex.join(job).encode()).hexdigest()[:12], *job))
  return 0


def logs(tpu: Tpu, args) -> int:
  """show what the run wrote, each line with its worker"""
  follow = ["-F"] if args.follow else []
  show = lambda node: ssh(tpu, node, worker("logs", tpu.prefix(node), str(args.lines), *follow), args.worker)
  on_slices(tpu, show)
  return 0


def status(tpu: Tpu, args=None) -> int:
  """show the state of the TPU, and what each worker does"""
  found = state(tpu)
  jobs = probe(tpu) if found == "READY" else {}
  if not tpu.dry_run:
    print(f"{tpu.name}: {found}", *(f"{name}: {doing}" for name, doing in jobs.items()), sep="\n")
  return 0


def stop(tpu: Tpu, args) -> int:
  """ask the run to save itself and end; the TPU stays, and costs"""
  on_workers(tpu, worker("stop", str(args.seconds)))
  return 0


def delete(tpu: Tpu, args=None) -> int:
  """delete the TPU"""
  words = ["queued-resources", "delete", tpu.name, "--force"] if tpu.queued else ["tpu-vm", "delete", tpu.name]
  execute(tpu, gcloud(tpu, *words))
  if args and not tpu.dry_run:
    for file in filter(pathlib.Path.exists, (tpu.file(".json"), tpu.file(".tar.gz"))):
      file.unlink()
  return 0


def watch(tpu: Tpu, args) -> int:
  """wait for the end; after a preemption make all of it anew, after exit code 75 or 76 run again"""
  check_command(tpu)
  if tpu.dry_run:
    return rehearse(tpu)
  restarts, failing, unreachable, rebuilding, last = 0, 0, 0, False, None
  while True:
    try:
      found, unreachable = state(tpu), 0
    except Failure:  # a network that is away for a while
      unreachable += 1
      if unreachable == 10:
        raise
      found = "no answer"
    jobs = (tolerate(probe, tpu) or {}) if found == "READY" and not rebuilding else {}
    doing = verdict(jobs)
    if (found, doing) != last:
      say(f"{time.strftime('%H:%M:%S')} {tpu.name}: {found} {doing}")
    last = (found, doing)
    if doing == "done":
      return 0
    failing = failing + 1 if doing == "failed" else 0
    if doing in ENDS and failing != 1:  # once, it may be a peer of a host that is just being preempted
      raise Failure(f"{ENDS[doing][0]} Workers: {jobs}", ENDS[doing][1])
    if found in ("MISSING", "STOPPED", "STOPPING") and not rebuilding:
      raise Failure(f"{tpu.name} is {found}, by somebody's will and no preemption: not made anew.", FAULT)
    lost = found in LOST or (rebuilding and found != "no answer")
    if lost or doing in ("again", "lost"):
      if restarts == args.max_restarts:
        raise Failure(f"given up after {restarts} restarts (--max_restarts); `watch` once more goes on.", AGAIN)
      restarts += 1
      say(f"restart {restarts} of at most {args.max_restarts}")
      if lost:
        rebuilding = not tolerate(begin, tpu, found != "MISSING")
      else:
        tolerate(run, tpu)
    time.sleep(tpu.poll * 2 ** min(4, restarts) if rebuilding else tpu.poll)


def rehearse(tpu: Tpu) -> int:
  say(f"# every {tpu.poll:g} s:")
  status(tpu)
  say("# when the TPU was preempted:")
  begin(tpu, anew=True)
  say("# when the run ended with exit code 75 or 76, or its VM was started anew:")
  return run(tpu)


def verdict(jobs: dict[str, str]) -> str:
  """Returns what all workers together are: running, stopped, lost, none, done, again, mistake, failed; '' unknown."""
  doing = set(jobs.values())
  for word in doing if len(doing) == 1 else ("running", "stopped", "lost", "ended 75", "ended 76", "ended 2"):
    if word in doing:
      return {"ended 0": "done", "ended 75": "again", "ended 76": "again", "ended 2": "mistake"}.get(
        word, "failed" if "ended" in word else word
      )
  return "failed" if doing else ""


ENDS = {
  "none": ("Nothing was started there: `run` first.", MISTAKE),
  "stopped": ("The run was stopped by `stop`; `run` goes on with it.", AGAIN),
  "mistake": ("bigjax was given something it can't use: see `logs`.", MISTAKE),
  "failed": ("The run failed: see `logs`.", FAULT),
}


def tolerate(action, *args):
  """Returns what the action returns; None, having told it, when it failed."""
  try:
    return action(*args)
  except Failure as e:
    say(f"tpu_vm: {e}")
    return None


# gcloud


def gcloud(tpu: Tpu, *words: str, track: str = "") -> list[str]:
  where = [f"--{key}={value}" for key, value in (("zone", tpu.zone), ("project", tpu.project)) if value]
  return ["gcloud", *track.split(), "compute", "tpus", *words, *where, "--quiet"]


def create_command(tpu: Tpu) -> list[str]:
  """Checks what the TPU is to be, and returns the command that makes it."""
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", tpu.name):
    raise Failure(f"{tpu.name!r} is no name for a TPU: lower-case letters, digits and hyphens, a letter first.")
  try:
    kind, track, runtime = chips.vm(tpu.accelerator_type, tpu.topology)
  except ValueError as e:
    raise Failure(str(e)) from None
  version = tpu.version or runtime
  rest = [*["--spot"] * tpu.spot, *tpu.create_flag]
  until = [f"--valid-until-duration={tpu.valid_until_duration}"] if tpu.valid_until_duration else []
  if not tpu.queued:
    if until:
      raise Failure("--valid_until_duration is how long a request may wait in the queue: add --queued.")
    return gcloud(tpu, "tpu-vm", "create", tpu.name, *kind, f"--version={version}", *rest, track=track)
  several = [f"--node-count={tpu.num_slices}", f"--node-prefix={tpu.name}"]
  nodes = several if tpu.num_slices > 1 else [f"--node-id={tpu.name}"]
  words = ["queued-resources", "create", tpu.name, *nodes, *kind, f"--runtime-version={version}"]
  return gcloud(tpu, *words, *until, *rest, track=track)


def worker(*words: str) -> str:
  return shlex.join(["sh", "bigjax/scripts/launch/tpu_worker.sh", *words])


def ssh(tpu: Tpu, node: str, command: str, workers: str = "all") -> list[str]:
  return gcloud(tpu, "tpu-vm", "ssh", node, f"--worker={workers}", f"--command={command}", *tpu.ssh_flag)


def on_workers(tpu: Tpu, command: str) -> None:
  on_slices(tpu, lambda node: ssh(tpu, node, command))


def on_slices(tpu: Tpu, command) -> None:
  """Executes `command(node)` for all slices side by side; raises the first failure when all have ended."""
  with concurrent.futures.ThreadPoolExecutor(1 if tpu.dry_run else tpu.num_slices) as pool:
    for done in [pool.submit(execute, tpu, command(node)) for node in tpu.nodes]:
      done.result()


def state(tpu: Tpu) -> str:
  """Returns READY when all slices are; else the state of the request for them or of the first that is not; MISSING."""
  try:
    if tpu.queued:
      request = describe(tpu, "queued-resources", tpu.name).get("state", {}).get("state", "ACTIVE")
      if request != "ACTIVE":
        return request
  except Missing:
    return "MISSING"
  try:
    nodes = [describe(tpu, "tpu-vm", node).get("state", "READY") for node in tpu.nodes]
  except Missing:
    return "WITHOUT ITS NODES" if tpu.queued else "MISSING"  # the former for a while after a preemption
  return next((s for s in nodes if s in LOST), next((s for s in nodes if s != "READY"), "READY"))


def describe(tpu: Tpu, kind: str, name: str) -> dict:
  return json.loads(execute(tpu, gcloud(tpu, kind, "describe", name, "--format=json"), keep=True) or "{}")


def probe(tpu: Tpu) -> dict[str, str]:
  """Returns what each worker does: none, running, stopped, lost (its VM was started anew) or `ended CODE`."""
  new = 'echo "bigjax-worker: $(hostname): none"'
  ask = lambda node: f"if [ -e bigjax ]; then {worker('probe', tpu.prefix(node))}; else {new}; fi"
  told = "".join(execute(tpu, ssh(tpu, node, ask(node)), keep=True) for node in tpu.nodes)
  lines = [line.split(": ") for line in told.splitlines() if line.startswith("bigjax-worker: ")]
  return {name: doing for _, name, doing in sorted(lines)}


def wait_until_ready(tpu: Tpu) -> None:
  last = ""
  while True:
    found = state(tpu)
    if tpu.dry_run or found == "READY":
      return
    if found in LOST:
      why = json.dumps(describe(tpu, "queued-resources", tpu.name).get("state", {}))
      raise Failure(f"the request ended as {found}: {why} `delete` it before you ask anew.", AGAIN)
    if found != last:
      say(f"{time.strftime('%H:%M:%S')} {tpu.name}: {found}")
    last = found
    time.sleep(tpu.poll)


def execute(tpu: Tpu, argv: list[str], keep: bool = False) -> str:
  """Runs a command, or in a dry run only prints it. Returns what it wrote to stdout if that is to be kept."""
  if tpu.dry_run:
    print(shlex.join(argv), flush=True)
    return ""
  if not keep:
    say(f"+ {shlex.join(argv)}")
  out = subprocess.PIPE if keep else None
  try:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True)
  except FileNotFoundError:
    raise Failure("there is no gcloud on the PATH; install it: https://cloud.google.com/sdk/docs/install") from None
  with process, concurrent.futures.ThreadPoolExecutor(1) as pool:
    errors = pool.submit(listen, process.stderr, echo=not keep)
    kept = process.stdout.read() if keep else ""
  if process.returncode:
    failure = explain(argv, process.returncode, errors.result())
    if keep and not isinstance(failure, Missing):
      sys.stderr.write(errors.result())
    raise failure
  return kept


def listen(stream, echo: bool) -> str:
  lines = []
  for line in stream:
    lines.append(line)
    sys.stderr.write(line if echo else "")
  return "".join(lines)


def explain(argv: list[str], code: int, errors: str) -> Failure:
  """Says what to do about an error of gcloud's, which has been shown as it is."""
  own = re.search(r"ERROR: \(gcloud\..*", errors, re.DOTALL)  # not what the command on the worker said
  for pattern, message, kind in REMEDIES:
    if own and re.search(pattern, own[0], re.IGNORECASE):
      return Missing(message) if kind is Missing else Failure(message, kind)
  if "ssh" in argv and code in (3, 4):
    return Failure("a run goes on there: `stop` first." if code == 3 else "nothing is installed there: `setup` first.")
  return Failure(f"failed with exit code {code}: {shlex.join(argv)[:200]}", FAULT)


REMEDIES = (
  ("gcloud auth login|unauthenticated", "gcloud is not logged in: `gcloud auth login` first.", MISTAKE),
  ("already.exists", "one of that name exists: `delete` it, or go on with it by `copy`, `setup`, `run`.", MISTAKE),
  ("no more capacity|stockout", "none is free there now: try later, another zone, or wait with --queued.", AGAIN),
  ("quota", "the project's quota does not allow it: ask for more, or take another zone, size or --spot.", MISTAKE),
  ("permission.denied on|permission_denied", "your account may not do that in that project (--project).", MISTAKE),
  ("ssh-add", "several workers need the key in an agent: `ssh-add ~/.ssh/google_compute_engine` first.", MISTAKE),
  ("not_found|was not found", "there is no TPU of that name in that zone and project (--zone, --project).", Missing),
)


# What to do and with what


def settings(args: argparse.Namespace, command: list[str]) -> Tpu:
  """Returns what was recorded of the TPU, unless it is to be made now, and over it what was asked for."""
  fields = {f.name for f in dataclasses.fields(Tpu)}
  given = {k: v for k, v in vars(args).items() if k in fields and v is not None}
  if command:
    given["command"] = command[command[0] == "bigjax" :]
  record = Tpu(args.name).file(".json")
  known = json.loads(record.read_text()) if args.action not in ("create", "up") and record.exists() else {}
  merged = {k: tuple(v) if isinstance(v, list) else v for k, v in {**known, **given}.items()}
  tpu = Tpu(**merged)
  if tpu.num_slices < 1:
    raise Failure(f"--num_slices={tpu.num_slices}: there has to be one.")
  for item in tpu.env:
    if not re.match(r"[A-Za-z_]\w*=", item):
      raise Failure(f"--env={item}: it is written NAME=VALUE.")
  return dataclasses.replace(tpu, queued=tpu.queued or tpu.num_slices > 1)  # several come through the queue only


def check_command(tpu: Tpu) -> None:
  if not tpu.command:
    raise Failure("what is to be run goes after two dashes: -- train --config=configs/NAME.py --workdir=DIR")
  workdir = re.search(r"\0--workdir[=\0]([^\0]*)", "\0" + "\0".join(tpu.command))
  if workdir and "://" in workdir[1]:
    remedy = "mount shared storage on all workers with --setup_command, and name a folder there."
    raise Failure(f"--workdir={workdir[1]}: a workdir is a folder; {remedy}")
  if tpu.spot and workdir and not workdir[1].startswith("/"):
    say(f"note: --workdir={workdir[1]} is on the VM's own disk, and goes with it: a preempted run would start anew.")


def save(tpu: Tpu) -> None:
  if tpu.dry_run:
    return
  tpu.file("").parent.mkdir(parents=True, exist_ok=True)
  known = {k: v for k, v in dataclasses.asdict(tpu).items() if k not in ("dry_run", "poll")}
  with open(os.open(tpu.file(".json"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
    json.dump(known, file, indent=2)  # for your eyes only: --env may hold a key


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


ACTIONS = {f.__name__: f for f in (up, create, copy, setup, run, logs, status, watch, stop, delete)}


def parser() -> argparse.ArgumentParser:
  form = argparse.RawDescriptionHelpFormatter
  top = argparse.ArgumentParser("tpu_vm.py", description=__doc__, formatter_class=form, allow_abbrev=False)
  actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
  subs = {a: actions.add_parser(a, help=f.__doc__, allow_abbrev=False) for a, f in ACTIONS.items()}

  def flag(names, text, where="", **kwargs):
    for action in where.split() or ACTIONS:
      subs[action].add_argument(*names.split(), help=text, **kwargs)

  on = dict(action="store_true", default=None)
  flag("name", "the TPU's name", metavar="NAME")
  flag("--zone", "as in gcloud, and without it gcloud's default")
  flag("--project", "likewise")
  flag("--dry_run", "print every command, run none", **on)
  flag("--queued", "as a queued resource, which waits for its turn", **on)
  flag("--num_slices", "several slices, one job, joined by the network (implies --queued)", type=int)
  flag("--ssh_flag", "added to ssh and scp, such as --ssh_flag=--internal-ip", action="append")
  flag("--accelerator_type", "v5litepod-16, v6e-8, v5p-32, ...", "create up")
  flag("--topology", "instead of that, by shape: v5e:4x4, v4:2x2x4, v5p:4x4x8", "create up")
  flag("--version", "the runtime; by default the one for JAX on that chip", "create up")
  flag("--spot", "cheaper, and preempted at any time", "create up", **on)
  flag("--valid_until_duration", "leave the queue after 6h, 2d, ...", "create up")
  flag("--create_flag", "added to gcloud's create, such as --create_flag=--network=lab", "create up", action="append")
  flag("--extras", "extras of pyproject.toml: tpu (the default), or tpu,examples", "setup up")
  flag("--setup_command", "run on all workers after that, such as a mount; repeatable", "setup up", action="append")
  flag("--env", "in the environment of the run; repeatable", "run up", action="append", metavar="NAME=VALUE")
  flag("--poll", "seconds between two looks (30)", "create up watch", type=float)
  flag("--max_restarts", "after so many it gives up, with exit code 75 (20)", "up watch", type=int, default=20)
  flag("--watch", "and then watch", "up", action="store_true")
  flag("--worker", "0, 1, ... or all", "logs", default="all")
  flag("--lines", "of the past, on each worker (20)", "logs", type=int, default=20)
  flag("--follow", "go on as it is written", "logs", action="store_true")
  flag("--seconds", "how long to wait for its end (600)", "stop", type=int, default=600)
  return top


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
