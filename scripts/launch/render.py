#!/usr/bin/env python3
"""Writes the job that trains on Slurm or on GKE, from the templates beside this file.

  python3 scripts/launch/render.py slurm --nodes=4 --gpus_per_node=8 --time=12:00:00 \\
      -- train --config=configs/digits_vit.py --workdir=runs/vit | sbatch
  python3 scripts/launch/render.py gke-tpu --name=vit --topology=v5e:4x4 --num_slices=2 --image=IMAGE --claim=runs \\
      -- train --config=configs/digits_vit.py --workdir=/runs/vit | kubectl apply -f -
  python3 scripts/launch/render.py gke-gpu --name=vit --nodes=2 --gpus_per_node=8 --accelerator=nvidia-h100-80gb ...

The image is that of scripts/launch/Dockerfile, or another with `bigjax` on its PATH; the claim, a volume that several
nodes can write to (Filestore), is mounted at /runs. It needs Python 3.9's standard library, and no package.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shlex
import sys

import chips

HERE = pathlib.Path(__file__).resolve().parent


class Mistake(Exception):
  """One message for the person at the keyboard."""


def main(argv: list[str]) -> int:
  words, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
  args = parser().parse_args(words)
  try:
    check(args, command)
    template, values = KINDS[args.kind](args, command[command[0] == "bigjax" :])
    text = fill((HERE / template).read_text(), values)
    if args.output:
      pathlib.Path(args.output).write_text(text)
    else:
      sys.stdout.write(text)
  except (Mistake, ValueError, OSError) as e:
    print(f"render {args.kind}: {e}", file=sys.stderr)
    return 2
  return 0


def fill(template: str, values: dict[str, object]) -> str:
  """Puts a value into each `{{name}}`; a line whose value is None goes."""
  wanted = set(re.findall(r"{{(.*?)}}", template))
  if wanted != set(values):
    raise ValueError(f"the template has no value for, or no use of: {', '.join(sorted(wanted ^ set(values)))}")
  name = re.compile(r"{{(.*?)}}")
  kept = (line for line in template.splitlines() if all(values[n] is not None for n in name.findall(line)))
  return "".join(name.sub(lambda match: str(values[match[1]]), line).rstrip() + "\n" for line in kept)


def slurm(args, command: list[str]) -> tuple[str, dict[str, object]]:
  if args.per == "gpu" and not args.gpus_per_node:
    raise Mistake("--per=gpu: a process for each GPU needs --gpus_per_node.")
  values = {
    key: getattr(args, key) for key in ("name", "nodes", "cpus_per_task", "time", "partition", "account", "log")
  }
  values["gpus_per_node"] = args.gpus_per_node or None
  values["tasks_per_node"] = args.gpus_per_node if args.per == "gpu" else 1
  for key, value in values.items():
    if not re.fullmatch(r"[^\s]*", str(value)):
      raise Mistake(f"--{key}={value}: a line of #SBATCH takes no space.")
  extras = args.extras if args.extras is not None else "cuda" if args.gpus_per_node else ""
  return "slurm.sh", {
    **values,
    "folder": shlex.quote(args.folder) if args.folder else '"$SLURM_SUBMIT_DIR"',
    "extras": shlex.join(filter(None, extras.split(","))),
    "env": shlex.join(args.env),
    "command": shlex.join(command),
    "max_restarts": args.max_restarts,
  }


def gke_tpu(args, command: list[str]) -> tuple[str, dict[str, object]]:
  name, sizes = chips.parse(args.topology)
  if not chips.CHIPS[name].gke:
    raise Mistake(f"--topology={args.topology}: GKE has no {name}; scripts/tpu_vm.py makes TPU VMs of it.")
  hosts, chips_per_host = chips.hosts(args.topology, args.chips_per_host, args.num_slices)
  return "gke_tpu.yaml", {
    **pod(args, command, {}),
    "num_slices": args.num_slices,
    "hosts": hosts,
    "chips_per_host": chips_per_host,
    "accelerator": json.dumps(chips.CHIPS[name].gke),
    "topology": json.dumps("x".join(map(str, sizes))),
    "max_restarts": args.max_restarts,
  }


def gke_gpu(args, command: list[str]) -> tuple[str, dict[str, object]]:
  peers = {"BIGJAX_COORDINATOR": f"{args.name}-0.{args.name}:8476", "BIGJAX_PROCESSES": str(args.nodes)}
  return "gke_gpu.yaml", {
    **pod(args, command, peers),
    "nodes": args.nodes,
    "gpus_per_node": args.gpus_per_node,
    "accelerator": json.dumps(args.accelerator) if args.accelerator else None,
    "backoff_limit": args.max_restarts * args.nodes,
  }


def pod(args, command: list[str], env: dict[str, str]) -> dict[str, object]:
  """What the pods of TPUs and GPUs have in common, as JSON, which is YAML."""
  variables = [{"name": key, "value": value} for key, value in env.items()]
  variables += [{"name": e.partition("=")[0], "value": literal(e.partition("=")[2])} for e in args.env]
  tolerations = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
  mounts, volumes = [], []
  if args.claim:
    mounts.append({"name": "runs", "mountPath": "/runs"})
    volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": args.claim}})
  if args.kind == "gke-gpu":  # NCCL shares memory beyond the 64 MB that a container has
    mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
  return {
    "name": json.dumps(args.name),
    "image": json.dumps(args.image),
    "args": json.dumps([literal(word) for word in command]),
    "env": json.dumps(variables),
    "spot": '"true"' if args.spot else None,
    "tolerations": json.dumps(tolerations * args.spot),
    "mounts": json.dumps(mounts),
    "volumes": json.dumps(volumes),
  }


def literal(word: str) -> str:
  """Kubernetes replaces `$(NAME)` in arguments and variables, and takes `$$` for a dollar."""
  return word.replace("$", "$$")


def check(args, command: list[str]) -> None:
  if not command:
    raise Mistake("what is to be run goes after two dashes: -- train --config=configs/NAME.py --workdir=DIR")
  least = {"gpus_per_node": 0, "max_restarts": 0}
  for key, value in vars(args).items():
    if type(value) is int and value < least.get(key, 1):
      raise Mistake(f"--{key}={value}: at least {least.get(key, 1)}.")
  for item in args.env:
    if not re.match(r"[A-Za-z_]\w*=", item):
      raise Mistake(f"--env={item}: it is written NAME=VALUE.")
  if args.kind == "slurm":
    return
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
    raise Mistake(f"--name={args.name}: lower-case letters, digits and hyphens, at most 40, a letter first.")
  workdir = re.search(r"\0--workdir[=\0]([^\0]*)", "\0" + "\0".join(command))
  if workdir and args.claim and not workdir[1].startswith("/runs/"):
    raise Mistake(f"--workdir={workdir[1]}: the claim {args.claim} is mounted at /runs: name a folder below it.")
  if workdir and not args.claim:
    print("note: without --claim the workdir goes with the pod, and a restart begins anew.", file=sys.stderr)


KINDS = {"slurm": slurm, "gke-tpu": gke_tpu, "gke-gpu": gke_gpu}


def parser() -> argparse.ArgumentParser:
  form = argparse.RawDescriptionHelpFormatter
  top = argparse.ArgumentParser("render.py", description=__doc__, formatter_class=form, allow_abbrev=False)
  kinds = top.add_subparsers(dest="kind", required=True, metavar="KIND")
  subs = {kind: kinds.add_parser(kind, help=f"on {kind}", allow_abbrev=False) for kind in KINDS}

  def flag(name, text, where="", **kwargs):
    for kind in where.split() or KINDS:
      subs[kind].add_argument(name, help=text, **kwargs)

  number = dict(type=int, metavar="N")
  flag("--output", "the file to write, instead of stdout")
  flag("--env", "in the environment of the run; repeatable", action="append", default=[], metavar="NAME=VALUE")
  flag("--max_restarts", "how often it may start again (100)", default=100, **number)
  flag("--name", "of the job", "slurm", default="bigjax")
  flag("--name", "of the job", "gke-tpu gke-gpu", required=True)
  flag("--nodes", "how many (1)", "slurm gke-gpu", default=1, **number)
  flag("--gpus_per_node", "how many; none by default", "slurm", default=0, **number)
  flag("--gpus_per_node", "how many (8)", "gke-gpu", default=8, **number)
  flag(
    "--per", "a process for each node (the default), or for each gpu", "slurm", default="node", choices=["node", "gpu"]
  )
  flag("--cpus_per_task", "for each process", "slurm", **number)
  flag("--time", "at most, as in sbatch: 12:00:00, 2-00", "slurm")
  flag("--partition", "as in sbatch", "slurm")
  flag("--account", "as in sbatch", "slurm")
  flag("--log", "the log file (%%x-%%j.log: name and number of the job)", "slurm", default="%x-%j.log")
  flag("--folder", "of the clone, on shared storage; by default where sbatch is called", "slurm")
  flag("--extras", "extras of pyproject.toml; cuda by default where there are GPUs", "slurm")
  flag("--image", "the container", "gke-tpu gke-gpu", required=True)
  flag("--claim", "a persistent volume claim, mounted at /runs", "gke-tpu gke-gpu")
  flag("--spot", "on spot nodes", "gke-tpu gke-gpu", action="store_true")
  flag("--topology", "of a slice: v5e:4x4, v6e:8x8, v5p:4x4x4, tpu7x:2x2x2", "gke-tpu", required=True)
  flag("--num_slices", "how many (1)", "gke-tpu", default=1, **number)
  flag("--chips_per_host", "of the node pool's machines, if not 4 (v5e:2x4 may be 8 or 4)", "gke-tpu", **number)
  flag("--accelerator", "the GPU, such as nvidia-h100-80gb", "gke-gpu")
  return top


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
