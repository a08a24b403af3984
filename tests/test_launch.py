"""Jobs for Slurm and GKE: rendered, read as those would read them, and the Slurm script really run."""

import ast
import math
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest

from bigjax import peers

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).parents[1]
RENDER = ROOT / "scripts" / "launch" / "render.py"
NASTY = [
  '--config.name=it\'s "quoted"',
  "--config.text=$HOME `id`; exit 1 # *",
  "--config.empty=",
  "two  spaces\nand a line",
]
TRAIN = ["--", "train", "--config=a.py", "--workdir=/runs/a"]


@pytest.mark.parametrize("name", ["tpu_vm.py", "launch/chips.py", "launch/pack.py", "launch/render.py"])
def test_a_laptop_needs_python_39_and_no_package(name):
  text = (ROOT / "scripts" / name).read_text()
  tree = ast.parse(text, feature_version=(3, 9))
  imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
  imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
  assert imported <= set(sys.stdlib_module_names) | {"launch", "chips"}
  # Annotations such as `str | None` are evaluated by 3.9 unless they are put off.
  assert "from __future__ import annotations" in text and not any(isinstance(n, ast.Match) for n in ast.walk(tree))


@pytest.mark.parametrize("name", ["tpu_worker.sh", "slurm.sh"])
def test_a_shell_reads_the_scripts(name):
  shell = "bash" if name == "slurm.sh" else "sh"
  read = subprocess.run([shell, "-n", ROOT / "scripts" / "launch" / name], capture_output=True, text=True)
  assert read.returncode == 0 and not read.stderr, read.stderr


# Slurm


def render(*argv):
  return subprocess.run([sys.executable, RENDER, *argv], capture_output=True, text=True, timeout=60)


def rendered(*argv):
  result = render(*argv)
  assert result.returncode == 0, result.stderr
  assert "{{" not in result.stdout or any("{{" in a for a in argv)
  return result.stdout


class Cluster:
  """srun, scontrol and squeue on the PATH, which note their arguments; srun really runs the step, once."""

  def __init__(self, folder: pathlib.Path, state: str = "RUNNING"):
    self.folder = folder
    (folder / "bin").mkdir()
    (folder / "scripts").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    self.program("bin/srun", 'while [ "${1#--}" != "$1" ]; do shift; done; echo ready; exec "$@"')
    self.program("bin/scontrol", f'echo "$*" >>{folder}/scontrol')
    self.program("bin/squeue", f"echo {state}")
    self.program("scripts/bootstrap.sh", f'echo "$*" >{folder}/extras')

  def program(self, name, body):
    (self.folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (self.folder / name).chmod(0o755)

  def start(self, script, **env):
    (self.folder / "job.sh").write_text(script)
    path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(self.folder), **env}
    command = ["bash", str(self.folder / "job.sh")]
    return subprocess.Popen(command, env=env, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  def requeued(self):
    return (self.folder / "scontrol").read_text() if (self.folder / "scontrol").exists() else ""


@pytest.mark.parametrize(
  ("code", "state", "restarts", "requeued"),
  [(0, "RUNNING", 0, ""), (1, "RUNNING", 0, ""), (2, "RUNNING", 0, ""), (75, "RUNNING", 0, "requeue 17\n")]
  + [(76, "RUNNING", 0, "requeue 17\n")]
  + [(75, "RUNNING", 3, ""), (75, "COMPLETING", 0, ""), (75, "", 2, "requeue 17\n")],
)
def test_a_slurm_job_goes_back_to_the_queue_after_75_and_76_alone(tmp_path, code, state, restarts, requeued):
  cluster = Cluster(tmp_path, state)
  cluster.program(".venv/bin/bigjax", f"exit {code}")
  job = cluster.start(rendered("slurm", "--max_restarts=3", *TRAIN), SLURM_RESTART_COUNT=str(restarts))
  out = job.communicate(timeout=30)
  assert (job.returncode, cluster.requeued()) == (code, requeued), out


def test_slurms_signal_reaches_the_run_which_saves_before_the_job_is_requeued(tmp_path):
  cluster = Cluster(tmp_path)
  cluster.program(
    ".venv/bin/bigjax",
    f"trap 'sleep 1; echo saved >{tmp_path}/saved; exit 75' TERM; echo on; while :; do sleep 0.05; done",
  )
  job = cluster.start(rendered("slurm", *TRAIN))
  while job.stdout.readline() != "on\n":
    assert job.poll() is None
  time.sleep(0.2)
  job.send_signal(signal.SIGTERM)
  job.communicate(timeout=30)
  assert (tmp_path / "saved").read_text() == "saved\n"
  assert job.returncode == 75 and cluster.requeued() == "requeue 17\n"


def test_a_slurm_job_passes_arguments_on_as_they_were_given(tmp_path):
  cluster = Cluster(tmp_path)
  cluster.program(".venv/bin/bigjax", f'printf "%s\\0" "$FLAVOUR" "$@" >{tmp_path}/arguments')
  argv = ["--gpus_per_node=8", "--env=FLAVOUR=hot 'milk'", *TRAIN, *NASTY, "--config.b={{name}}"]
  job = cluster.start(rendered("slurm", *argv))
  out = job.communicate(timeout=30)
  assert job.returncode == 0, out
  told = (tmp_path / "arguments").read_text().split("\0")[:-1]
  assert told == ["hot 'milk'", *TRAIN[1:], *NASTY, "--config.b={{name}}"]
  assert (tmp_path / "extras").read_text() == "cuda\n"


def test_what_slurm_is_asked_for():
  argv = ["--name=vit", "--nodes=4", "--gpus_per_node=8", "--time=12:00:00", "--partition=gpu", "--cpus_per_task=16"]
  directives = [line[8:] for line in rendered("slurm", *argv, *TRAIN).splitlines() if line.startswith("#SBATCH ")]
  assert (
    directives
    == (
      "--job-name=vit --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=16 --time=12:00:00 "
      "--partition=gpu --requeue --signal=B:TERM@120 --output=%x-%j.log --open-mode=append"
    ).split()
  )
  assert "#SBATCH --ntasks-per-node=8\n" in rendered("slurm", "--gpus_per_node=8", "--per=gpu", *TRAIN)
  assert "gpus-per-node" not in rendered("slurm", *TRAIN)


# GKE


def expanded(word, env):
  """What Kubernetes makes of an argument: https://kubernetes.io/docs/tasks/inject-data-application"""
  return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), word)


TPU = ["gke-tpu", "--name=vit", "--image=repo/bigjax:1", "--claim=runs"]
GPU = ["gke-gpu", "--name=vit", "--image=repo/bigjax:1", "--claim=runs", "--accelerator=nvidia-h100-80gb"]
DOLLARS = ["--config.a=$(NAME) $$(NAME) $5 $", "--config.b={{name}}", *NASTY]


@pytest.mark.parametrize(
  ("flags", "slices", "hosts", "chips", "accelerator", "topology"),
  [
    ("--topology=v5e:4x4", 1, 4, 4, "tpu-v5-lite-podslice", "4x4"),
    ("--topology=v5e:2x4", 1, 1, 8, "tpu-v5-lite-podslice", "2x4"),
    ("--topology=v5e:2x4 --chips_per_host=4", 1, 2, 4, "tpu-v5-lite-podslice", "2x4"),
    ("--topology=v5e:2x4 --num_slices=3", 3, 2, 4, "tpu-v5-lite-podslice", "2x4"),
    ("--topology=v5e:1x1", 1, 1, 1, "tpu-v5-lite-podslice", "1x1"),
    ("--topology=v4:2x2x4", 1, 4, 4, "tpu-v4-podslice", "2x2x4"),
    ("--topology=v5p:2x2x1", 1, 1, 4, "tpu-v5p-slice", "2x2x1"),
    ("--topology=v5p:8x8x8 --num_slices=2", 2, 128, 4, "tpu-v5p-slice", "8x8x8"),
    ("--topology=v6e:16x16", 1, 64, 4, "tpu-v6e-slice", "16x16"),
    ("--topology=tpu7x:2x2x4", 1, 4, 4, "tpu7x", "2x2x4"),
  ],
)
def test_a_tpu_job_has_a_pod_for_each_host_and_all_chips(flags, slices, hosts, chips, accelerator, topology):
  jobset = yaml.safe_load(rendered(*TPU, *flags.split(), *TRAIN))
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert replicated["replicas"] == slices
  assert (job["completionMode"], job["parallelism"], job["completions"]) == ("Indexed", hosts, hosts)
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  assert hosts * chips == math.prod(int(n) for n in topology.split("x"))
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": accelerator,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  assert all(value == str(value) for value in pod["nodeSelector"].values())


def job_of(text):
  *_, last = yaml.safe_load_all(text)
  return last["spec"]["replicatedJobs"][0]["template"]["spec"] if last["kind"] == "JobSet" else last["spec"]


def outcome(job, code):
  """What a job's pod failure policy does about an exit code; the first rule that matches does it."""
  for rule in job["podFailurePolicy"]["rules"]:
    codes = rule.get("onExitCodes")
    if codes and codes["operator"] == "In" and codes["containerName"] == "bigjax" and code in codes["values"]:
      return rule["action"]
  return "Count"


@pytest.mark.parametrize("kind", [[*TPU, "--topology=v5e:4x4"], GPU])
def test_on_kubernetes_75_starts_again_and_a_mistake_does_not(kind):
  text = rendered(*kind, "--max_restarts=7", *TRAIN)
  job = job_of(text)
  assert [outcome(job, code) for code in (2, 75, 1, 137)] == ["FailJob", "Ignore", "Count", "Count"]
  assert job["template"]["spec"]["restartPolicy"] == "Never"  # what a pod failure policy requires
  if kind[0] == "gke-tpu":
    policy = yaml.safe_load(text)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and job["backoffLimit"] == 0
    assert policy["rules"] == [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
  else:
    assert job["backoffLimit"] == 7


@pytest.mark.parametrize("kind", [[*TPU, "--topology=v5e:4x4"], GPU])
def test_on_kubernetes_arguments_arrive_as_they_were_given(kind):
  pod = job_of(rendered(*kind, "--spot", "--env=FLAVOUR=$(NAME) 'hot'", *TRAIN, *DOLLARS))["template"]["spec"]
  (container,) = pod["containers"]
  env = {"NAME": "oh no"}
  assert container["command"] == ["bigjax"]
  assert [expanded(word, env) for word in container["args"]] == [*TRAIN[1:], *DOLLARS]
  assert {"FLAVOUR": "$(NAME) 'hot'"}.items() <= {
    e["name"]: expanded(e["value"], env) for e in container["env"]
  }.items()
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and pod["tolerations"][0]["value"] == "true"
  mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert mounted["runs"] == "/runs" and mounted.keys() == {volume["name"] for volume in pod["volumes"]}


def test_gpu_pods_find_each_other():
  service, job = yaml.safe_load_all(rendered(*GPU, "--nodes=3", *TRAIN))
  assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
  assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
  pod = job["spec"]["template"]["spec"]
  assert pod["subdomain"] == service["metadata"]["name"]
  assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 3, 3)
  env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
  for index in range(3):
    found = peers.find(
      {**env, "JOB_COMPLETION_INDEX": str(index)}, hostname=f"vit-{index}.vit.default.svc.cluster.local"
    )
    assert (found.coordinator, found.processes, found.process) == ("vit-0.vit:8476", 3, index)


def test_slurm_tasks_find_each_other():
  script = rendered("slurm", "--nodes=2", "--gpus_per_node=4", "--per=gpu", *TRAIN)
  nodes, tasks = (int(re.search(rf"#SBATCH --{key}=(\d+)", script)[1]) for key in ("nodes", "ntasks-per-node"))
  step = {"SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_STEP_NUM_NODES": str(nodes)}
  for rank in range(nodes * tasks):
    env = {
      **step,
      "SLURM_STEP_NUM_TASKS": str(nodes * tasks),
      "SLURM_PROCID": str(rank),
      "SLURM_LOCALID": str(rank % tasks),
    }
    found = peers.find(env)
    assert (found.processes, found.process, found.local_devices) == (8, rank, (rank % 4,))


UNRENDERED = [
  (["slurm"], "after two dashes"),
  (["slurm", "--nodes=0", *TRAIN], "--nodes=0: at least 1"),
  (["slurm", "--per=gpu", *TRAIN], "needs --gpus_per_node"),
  (["slurm", "--partition=a b", *TRAIN], "takes no space"),
  (["slurm", "--partiton=a", *TRAIN], "unrecognized arguments: --partiton=a"),
  (["pbs", *TRAIN], "invalid choice"),
  ([*TPU, "--topology=v5e:3x3", *TRAIN], "9 chips are not hosts of 4"),
  ([*TPU, "--topology=v5e:2x2", "--num_slices=2", *TRAIN], "slices of two or more"),
  ([*TPU, "--topology=v2:2x2", *TRAIN], "GKE has no v2"),
  ([*TPU, "--topology=v5p:4x4", *TRAIN], "v5p:2x2x4"),
  ([*TPU, "--topology=v5e:4x4", "--", "train", "--workdir=runs/a"], "mounted at /runs"),
  ([*GPU, "--nodes=-1", *TRAIN], "at least 1"),
  ([*GPU, "--env=1A=b", *TRAIN], "NAME=VALUE"),
  (["gke-gpu", "--name=Vit_1", "--image=a", *TRAIN], "lower-case"),
]


@pytest.mark.parametrize(("argv", "told"), UNRENDERED)
def test_what_cannot_be_rendered_is_refused_in_one_message(argv, told):
  result = render(*argv)
  assert result.returncode == 2 and told in result.stderr and result.stdout == "" and "Traceback" not in result.stderr


def test_a_template_and_its_values_have_the_same_names(monkeypatch):
  monkeypatch.syspath_prepend(RENDER.parent)
  fill = runpy.run_path(str(RENDER))["fill"]
  assert fill("a {{b}}\n{{c}}\nd\n", {"b": "{{c}}", "c": None}) == "a {{c}}\nd\n"
  for values in ({"b": 1}, {"b": 1, "c": 2, "d": 3}):
    with pytest.raises(ValueError, match="no value for, or no use of: [cd]"):
      fill("a {{b}}\n{{c}}\n", values)


def test_the_image_is_made_of_files_that_exist():
  lines = (ROOT / "scripts" / "launch" / "Dockerfile").read_text().splitlines()
  copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
  assert copied and all((ROOT / name).exists() for name in copied)
