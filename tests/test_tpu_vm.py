"""scripts/tpu_vm.py against a gcloud whose TPUs are folders, and whose workers really do what they are sent."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NASTY = [
  '--config.name=it\'s "quoted"',
  "--config.text=$HOME `id`; exit 1 # *",
  "--config.empty=",
  "two  spaces\nand a line",
]
TRAIN = ["--", "train", "--config=a.py", "--workdir=/runs/a"]
V5E = ["--zone=us-west4-a", "--accelerator_type=v5litepod-8", "--poll=0.05"]

needs_flock = pytest.mark.skipif(not (shutil.which("flock") and shutil.which("setsid")), reason="as a TPU VM has them")

# Notes what it was called with; ends with the code for its start number N, or waits to be stopped and ends with 75.
BIGJAX = """#!/bin/sh
echo start >>../starts
printf '%s\\0' "$FLAVOUR" "$@" >../arguments
echo "step 1 of $#"
set -- $(cat "$CLOUD/codes")
[ $# = 1 ] || [ "$(wc -l <../starts)" = 1 ] || shift
[ "$1" != wait ] || { trap 'exit 75' TERM; i=0; while [ $i -lt 300 ]; do sleep 0.1; i=$((i + 1)); done; }
exit "$1"
"""


class Cloud:
  """A clone of a small repository, a folder of TPUs, and the commands given."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.clone = folder / "cloud", folder / "clone"
    (self.folder / "bin").mkdir(parents=True)
    program = self.folder / "bin" / "gcloud"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "stand_in_gcloud.py"} "$@"\n')
    program.chmod(0o755)
    self.scenario()
    self.codes("0")
    (self.clone / "scripts" / "launch").mkdir(parents=True)
    for file in ["tpu_vm.py", *(f"launch/{n}" for n in ("__init__.py", "chips.py", "pack.py", "tpu_worker.sh"))]:
      shutil.copy(ROOT / "scripts" / file, self.clone / "scripts" / file)
    (self.clone / ".gitignore").write_text(".cache/\n.venv/\n__pycache__/\n")
    (self.clone / "constraints.txt").write_text("numpy==2\n")
    (self.clone / "old.py").write_text("committed\n")
    (self.clone / "bigjax.sh").write_text(BIGJAX)
    (self.clone / "scripts" / "bootstrap.sh").write_text(
      'mkdir -p .venv/bin; echo "$@" >.venv/extras; cp bigjax.sh .venv/bin/bigjax; chmod +x .venv/bin/bigjax\n'
    )
    git = ["git", "-C", str(self.clone), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
      subprocess.run([*git, *command], check=True)

  def scenario(self, **what):
    (self.folder / "scenario.json").write_text(json.dumps(what))

  def codes(self, *codes):
    (self.folder / "codes").write_text(" ".join(codes))

  def __call__(self, *argv, path=None, **env):
    command = [sys.executable, str(self.clone / "scripts" / "tpu_vm.py"), *argv]
    path = path or f"{self.folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "CLOUD": str(self.folder), "PATH": path, "FLAVOUR": "", "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)

  def calls(self):
    """The calls of gcloud, a look repeated at once counted once."""
    file = self.folder / "calls.jsonl"
    calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [call for i, call in enumerate(calls) if i == 0 or call != calls[i - 1]]

  def verbs(self):
    return [call[call.index("tpus") + 2] for call in self.calls()]

  def home(self, node="a", worker=0):
    return self.folder / "tpu-vm" / node / f"w{worker}"

  def starts(self, worker=0):
    return len((self.home(worker=worker) / "starts").read_text().split())


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path)
  yield cloud
  for pid in cloud.folder.glob("tpu-vm/*/*/bigjax_run/pid"):
    try:
      os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
      continue


def of_gcloud(text):
  commands = map(shlex.split, re.split(r"\n(?=gcloud |/)", text))  # an argument may have lines of its own
  return [words[1:] for words in commands if words[:1] == ["gcloud"]]


def wait_for(condition):
  for _ in range(200):
    if condition():
      return True
    time.sleep(0.05)
  return False


@needs_flock
def test_up_logs_status_stop_delete(cloud):
  cloud.codes("wait")
  up = cloud(
    "up", "a", *V5E, "--env=FLAVOUR=hot milk", "--extras=tpu,examples", "--setup_command=echo on >mounted; true", *TRAIN
  )
  assert up.returncode == 0, up.stderr
  assert cloud.verbs() == ["create", "scp", "ssh", "ssh", "ssh"]
  for worker in (0, 1):
    home = cloud.home(worker=worker)
    assert (home / "bigjax" / "old.py").read_text() == "committed\n"
    assert (home / "bigjax" / ".venv" / "extras").read_text() == "tpu examples\n"
    assert (home / "mounted").read_text() == "on\n"
    assert (home / "arguments").read_text().split("\0")[:-1] == ["hot milk", *TRAIN[1:]]
  assert cloud("status", "a").stdout == "a: READY\nw0: running\nw1: running\n"
  assert re.fullmatch(r"(w0: ---.*\n)?w0: step 1 of 3\n(w1: ---.*\n)?w1: step 1 of 3\n", cloud("logs", "a").stdout)
  assert cloud("logs", "a", "--worker=1", "--lines=1").stdout == "w1: step 1 of 3\n"
  copied = cloud("copy", "a")
  assert copied.returncode == 2 and "`stop` first" in copied.stderr
  assert cloud("stop", "a").returncode == 0
  assert cloud("status", "a").stdout == "a: READY\nw0: stopped\nw1: stopped\n"
  watched = cloud("watch", "a", "--poll=0")
  assert watched.returncode == 75 and "`run` goes on with it" in watched.stderr
  assert cloud("delete", "a").returncode == 0
  assert cloud("status", "a").stdout == "a: MISSING\n"


@needs_flock
@pytest.mark.parametrize("queued", [(), ("--queued", "--valid_until_duration=6h"), ("--num_slices=2", "--spot")])
def test_a_dry_run_prints_what_is_executed_and_executes_nothing(cloud, queued):
  argv = ["up", "a", *V5E, *queued, "--project=p q", *TRAIN, *NASTY]
  printed = cloud(*argv, "--dry_run") if "--" not in argv else cloud("up", "a", "--dry_run", *argv[2:])
  assert printed.returncode == 0 and cloud.calls() == []
  assert not (cloud.clone / ".cache").exists()
  assert cloud(*argv).returncode == 0
  key = json.dumps if "--num_slices=2" in queued else None  # side by side
  assert sorted(of_gcloud(printed.stdout), key=key) == sorted(cloud.calls(), key=key)
  calls = len(cloud.calls())
  for action in ("status", "logs", "stop", "watch", "delete"):
    dry = cloud(action, "a", "--dry_run")
    assert dry.returncode == 0 and of_gcloud(dry.stdout), action
  assert len(cloud.calls()) == calls


@needs_flock
def test_what_a_dry_run_prints_can_be_pasted_into_a_shell(cloud):
  printed = cloud("up", "a", "--dry_run", *V5E, *TRAIN, *NASTY).stdout
  env = {
    **os.environ,
    "CLOUD": str(cloud.folder),
    "PATH": f"{cloud.folder / 'bin'}:{os.environ['PATH']}",
    "FLAVOUR": "",
  }
  subprocess.run(["sh", "-e"], input=printed, env=env, check=True, text=True, timeout=60)
  assert (cloud.home() / "arguments").read_text().split("\0")[1:-1] == [*TRAIN[1:], *NASTY]


@needs_flock
def test_arguments_reach_bigjax_as_they_were_given(cloud):
  assert cloud("up", "a", *V5E, '--env=FLAVOUR=it\'s "$HOME" & `id`', *TRAIN, *NASTY).returncode == 0
  for worker in (0, 1):
    told = (cloud.home(worker=worker) / "arguments").read_text().split("\0")[:-1]
    assert told == ['it\'s "$HOME" & `id`', *TRAIN[1:], *NASTY]


@needs_flock
def test_a_copy_is_the_working_tree_as_it_is(cloud):
  (cloud.clone / "gone.py").write_text("new, not ignored\n")
  assert cloud("up", "a", *V5E, *TRAIN).returncode == 0
  assert (cloud.home() / "bigjax" / "gone.py").exists()
  (cloud.clone / "gone.py").unlink()
  (cloud.clone / "old.py").write_text("changed, not committed\n")
  (cloud.clone / ".venv").mkdir()
  (cloud.clone / ".venv" / "mine").write_text("ignored\n")
  (cloud.home() / "bigjax" / "theirs").write_text("written there\n")
  assert wait_for(lambda: cloud("status", "a").stdout.count(": ended 0") == 2)
  assert cloud("copy", "a").returncode == 0
  there = cloud.home() / "bigjax"
  assert (there / "old.py").read_text() == "changed, not committed\n"
  assert not (there / "gone.py").exists() and not (there / ".venv" / "mine").exists()
  assert (there / "theirs").exists() and (there / ".venv" / "bin" / "bigjax").exists()
  with tarfile.open(cloud.clone / ".cache" / "tpu_vm" / "a.tar.gz") as tar:
    assert {"constraints.txt", "scripts/bootstrap.sh"} <= set(tar.getnames())


@needs_flock
@pytest.mark.parametrize("queued", [False, True])
def test_after_a_preemption_everything_is_made_anew_and_the_run_goes_on(cloud, queued):
  cloud.codes("wait")
  assert cloud("up", "a", *V5E, "--spot", *["--queued"] * queued, "--env=FLAVOUR=hot", *TRAIN).returncode == 0
  first = cloud.calls()
  (cloud.folder / "calls.jsonl").unlink()
  cloud.codes("0")
  seen = ["SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
  cloud.scenario(**{"queue": ["ACTIVE", *seen]} if queued else {"happens": [None, None, "PREEMPTED"]})
  watched = cloud("watch", "a", "--poll=0.05")
  assert watched.returncode == 0, watched.stderr
  assert "restart 1 of at most 20" in watched.stderr and "restart 2" not in watched.stderr
  verbs = cloud.verbs()
  assert verbs.count("delete") == verbs.count("create") == 1
  made = lambda calls: [c for c in calls if "describe" not in c and not any("probe" in word for word in c)]
  assert made(cloud.calls())[1:] == made(first)
  assert (cloud.home() / "arguments").read_text().split("\0")[:-1] == ["hot", *TRAIN[1:]]


@needs_flock
@pytest.mark.parametrize("code", ["75", "76"])
def test_exit_codes_75_and_76_run_again_on_the_same_machines(cloud, code):
  cloud.codes(code, "0")
  done = cloud("up", "a", *V5E, "--watch", *TRAIN)
  assert done.returncode == 0, done.stderr
  assert cloud.starts(0) == cloud.starts(1) == 2
  assert cloud.verbs().count("create") == 1 and "delete" not in cloud.verbs()


@needs_flock
def test_a_vm_that_was_started_anew_gets_its_run_back(cloud):
  cloud.codes("wait")
  assert cloud("up", "a", *V5E, *TRAIN).returncode == 0
  cloud.scenario(happens=["READY"])  # a maintenance event: the disk stays, the processes are gone
  cloud.codes("0")
  assert cloud("watch", "a", "--poll=0.05").returncode == 0
  assert cloud.starts() == 2 and cloud.verbs().count("create") == 1


@needs_flock
def test_restarts_are_bounded(cloud):
  cloud.codes("75", "75")
  given_up = cloud("up", "a", *V5E, "--watch", "--max_restarts=3", *TRAIN)
  assert given_up.returncode == 75
  assert given_up.stderr.count("\ngiven up") + given_up.stderr.count("given up after 3 restarts") == 1
  assert cloud.starts() == 4


@needs_flock
def test_no_capacity_after_a_preemption_is_tried_again_and_bounded(cloud):
  cloud.codes("wait")
  assert cloud("up", "a", *V5E, "--spot", *TRAIN).returncode == 0
  cloud.scenario(happens=["PREEMPTED"], fail={"create": "There is no more capacity in the zone"})
  given_up = cloud("watch", "a", "--poll=0.01", "--max_restarts=2")
  assert given_up.returncode == 75
  assert cloud.verbs().count("create") == 1 + 2 and cloud.verbs().count("delete") == 1


@needs_flock
@pytest.mark.parametrize(("code", "left"), [("1", 1), ("2", 2)])
def test_a_run_that_fails_is_not_started_again(cloud, code, left):
  cloud.codes(code, code)
  failed = cloud("up", "a", *V5E, "--watch", *TRAIN)
  assert failed.returncode == left and "see `logs`" in failed.stderr
  assert cloud.starts() == 1


@needs_flock
def test_watch_brings_nothing_back_that_somebody_deleted(cloud):
  assert cloud("up", "a", *V5E, *TRAIN).returncode == 0
  shutil.rmtree(cloud.home().parent)
  watched = cloud("watch", "a", "--poll=0")
  assert watched.returncode == 1 and "MISSING" in watched.stderr
  assert cloud.verbs().count("create") == 1


@needs_flock
def test_a_command_that_gcloud_repeats_starts_one_run(cloud):
  cloud.codes("wait")
  assert cloud("up", "a", *V5E, *TRAIN).returncode == 0
  assert cloud("run", "a").returncode == 0
  assert cloud.starts() == 1
  other = cloud("run", "a", *TRAIN, "--config.other=1")
  assert other.returncode == 2 and "`stop` first" in other.stderr


@needs_flock
def test_slices_are_told_apart(cloud):
  cloud.codes("wait")
  assert cloud("up", "a", *V5E, "--num_slices=2", *TRAIN).returncode == 0
  assert cloud("status", "a").stdout.splitlines()[1:] == [f"a-{s} w{w}: running" for s in (0, 1) for w in (0, 1)]
  create = next(c for c in cloud.calls() if "create" in c)
  assert {"--node-count=2", "--node-prefix=a"} <= set(create) and create[2] == "queued-resources"
  assert cloud("delete", "a").returncode == 0
  assert not (cloud.folder / "tpu-vm" / "a-1").exists()


ERRORS = [
  ("You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login", 2, "not logged in"),
  ("ALREADY_EXISTS: Resource 'projects/p/locations/z/nodes/a' already exists", 2, "`delete` it, or go on"),
  ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPerProjectPerZone' has been exceeded. Limit: 0", 2, "quota does not allow"),
  ("There is no more capacity in the zone us-west4-a", 75, "try later"),
  ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p'", 2, "--project"),
  ("Cloud TPU got error: something unheard of", 1, "failed with exit code 1"),
]


@pytest.mark.parametrize(("text", "code", "remedy"), ERRORS)
def test_what_gcloud_says_is_shown_with_a_remedy(cloud, text, code, remedy):
  cloud.scenario(fail={"create": text})
  failed = cloud("up", "a", *V5E, *TRAIN)
  assert failed.returncode == code
  assert text in failed.stderr and remedy in failed.stderr.splitlines()[-1]
  assert cloud.verbs() == ["create"] and "Traceback" not in failed.stderr


@needs_flock
def test_an_error_on_a_worker_is_not_taken_for_one_of_gcloud(cloud):
  (cloud.clone / "scripts" / "bootstrap.sh").write_text("echo 'disk quota exceeded, already exists' >&2; exit 1\n")
  failed = cloud("up", "a", *V5E, *TRAIN)
  assert failed.returncode == 1 and "failed with exit code 1: gcloud compute tpus tpu-vm ssh" in failed.stderr


def test_without_gcloud_one_is_told_where_to_get_it(cloud):
  failed = cloud("create", "a", *V5E, path=str(cloud.clone))
  assert failed.returncode == 2 and "cloud.google.com/sdk" in failed.stderr


MISTAKES = [
  (["up", "a", *V5E], "after two dashes"),
  (["up", "a", "--zone=z", *TRAIN], "which TPU?"),
  (["up", "A_1", *V5E, *TRAIN], "no name for a TPU"),
  (["create", "a", "--accelerator_type=v5e-16"], "v5litepod-16"),
  (["create", "a", "--accelerator_type=v5litepod"], "none of v2-N"),
  (["create", "a", "--topology=v5p:4x4"], "v5p:2x2x4"),
  (["create", "a", "--topology=v9:4x4"], "none of v2, v3"),
  (["create", "a", "--topology=tpu7x:2x2x1"], "GKE only"),
  (["create", "a", *V5E, "--topology=v5e:4x4"], "which TPU?"),
  (["create", "a", *V5E, "--valid_until_duration=6h"], "add --queued"),
  (["create", "a", *V5E, "--num_slices=0"], "--num_slices=0"),
  (["up", "a", *V5E, "--env=A", *TRAIN], "NAME=VALUE"),
  (["up", "a", *V5E, "--", "train", "--workdir=gs://bucket/a"], "a workdir is a folder"),
  (["create", "a", "--acelerator_type=v5e"], "unrecognized arguments"),
  (["status", "a", "--spot"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("argv", "told"), MISTAKES)
def test_mistakes_are_told_before_anything_is_made(cloud, argv, told):
  failed = cloud(*argv)
  assert failed.returncode == 2 and told in failed.stderr and "Traceback" not in failed.stderr
  assert cloud.calls() == []


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ("--topology=v5e:4x4", "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"),
    ("--topology=v4:2x2x4", "--type=v4 --topology=2x2x4 --version=tpu-ubuntu2204-base"),
    ("--accelerator_type=v6e-8 --spot", "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot"),
    ("--accelerator_type=v5p-8 --version=mine", "--accelerator-type=v5p-8 --version=mine"),
    (
      "--accelerator_type=v3-8 --create_flag=--network=lab",
      "--accelerator-type=v3-8 --version=tpu-ubuntu2204-base --network=lab",
    ),
  ],
)
def test_what_a_tpu_is_called_for_gcloud(cloud, flags, words):
  printed = of_gcloud(cloud("create", "a", "--dry_run", *flags.split()).stdout)
  assert printed == [["compute", "tpus", "tpu-vm", "create", "a", *words.split(), "--quiet"]]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="the Google Cloud CLI is not installed")
def test_gclouds_own_parser_takes_the_commands(cloud, tmp_path):
  lines = set()
  for flags in (
    "--accelerator_type=v5litepod-16 --spot",
    "--topology=v5p:2x2x4 --num_slices=2 --valid_until_duration=6h",
  ):
    lines |= set(cloud("up", "a", "--zone=us-west4-a", "--dry_run", *flags.split(), *TRAIN).stdout.splitlines())
    for action in ("logs", "stop", "delete", "status"):
      more = ["--num_slices=2"] * ("num_slices" in flags)
      lines |= set(cloud(action, "a", "--zone=us-west4-a", "--dry_run", *more).stdout.splitlines())
  env = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"}
  for line in sorted(line for line in lines if line.startswith("gcloud ")):
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]  # parses, sends nothing
    found = subprocess.run(lint, env=env, capture_output=True, text=True, timeout=60)
    assert json.loads(found.stdout)[0]["success"], line
