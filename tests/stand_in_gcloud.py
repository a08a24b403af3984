"""A gcloud that keeps its TPUs in the folder $CLOUD: a node is a folder, a worker a home folder in it.

What comes by scp is copied there, what comes by ssh is run there; every call is noted in calls.jsonl. scenario.json has

  fail     {"create": "text", ...}: that word's calls say the text and fail
  queue    states that a queued resource goes through, one each time it is looked at, before it is ACTIVE
  happens  states that nodes take, one each time a node is looked at; null: it stays as it is
  workers  how many a node has
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["CLOUD"])


def main(argv):
  with open(CLOUD / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\n")
  words = [a for a in argv if not a.startswith("-") and a != "alpha"]
  flags = dict(a[2:].partition("=")[::2] for a in argv if a.startswith("--"))
  assert words[:2] == ["compute", "tpus"], argv
  kind, verb, *names = words[2:]
  scenario = json.loads((CLOUD / "scenario.json").read_text())
  if text := scenario.get("fail", {}).get(verb):
    error(kind, verb, text)
  {"create": create, "delete": delete, "describe": describe, "ssh": ssh, "scp": scp}[verb](kind, names, flags, scenario)


def error(kind, verb, text):
  sys.exit(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) {text}")


def create(kind, names, flags, scenario):
  place = CLOUD / kind / names[0]
  if place.exists():
    error(kind, "create", f"ALREADY_EXISTS: Resource '{names[0]}' already exists")
  place.mkdir(parents=True)
  if kind == "tpu-vm":
    boot(names[0], scenario)
  else:
    count = int(flags.get("node-count", 1))
    nodes = [flags["node-id"]] if "node-id" in flags else [f"{flags['node-prefix']}-{i}" for i in range(count)]
    (place / "nodes").write_text(" ".join(nodes))


def boot(name, scenario):
  for worker in range(scenario.get("workers", 2)):
    (CLOUD / "tpu-vm" / name / f"w{worker}").mkdir(parents=True)
  (CLOUD / "tpu-vm" / name / "state").write_text("READY")


def delete(kind, names, flags, scenario):
  place = CLOUD / kind / names[0]
  if not place.exists():
    error(kind, "delete", f"NOT_FOUND: Resource '{names[0]}' was not found")
  nodes = [names[0]]
  if kind == "queued-resources":
    assert "force" in flags
    nodes = (place / "nodes").read_text().split()
    shutil.rmtree(place)
  for node in nodes:
    power_off(node)
    shutil.rmtree(CLOUD / "tpu-vm" / node, ignore_errors=True)


def power_off(node):
  for file in (CLOUD / "tpu-vm" / node).glob("*/bigjax_run/pid"):
    try:
      os.killpg(os.getpgid(int(file.read_text())), signal.SIGKILL)
    except ProcessLookupError:
      continue


def take(scenario, key):
  """The next of a list of the scenario, which it leaves."""
  value, *rest = scenario.get(key) or [None]
  (CLOUD / "scenario.json").write_text(json.dumps({**scenario, key: rest}))
  return value


def describe(kind, names, flags, scenario):
  assert flags["format"] == "json"
  place = CLOUD / kind / names[0]
  if not place.exists():
    error(kind, "describe", f"NOT_FOUND: Resource '{names[0]}' was not found")
  if kind == "queued-resources":
    state = take(scenario, "queue") or "ACTIVE"
    for node in (place / "nodes").read_text().split():
      if state == "ACTIVE" and not (CLOUD / "tpu-vm" / node).exists():
        boot(node, scenario)
      if state == "SUSPENDED":
        power_off(node)
    print(json.dumps({"name": names[0], "state": {"state": state}}))
    return
  if state := take(scenario, "happens"):
    power_off(names[0])
    (place / "state").write_text(state)
  print(json.dumps({"name": names[0], "state": (place / "state").read_text()}))


def ssh(kind, names, flags, scenario):
  place = CLOUD / kind / names[0]
  if (place / "state").read_text() != "READY":
    error(kind, "ssh", "This TPU is in an unusable state")
  codes = []
  for home in workers(place, flags):
    print(f"SSH: Attempting to connect to worker {home.name[1:]}...", file=sys.stderr)
    bin_folder = CLOUD / "bin" / home.name  # a hostname for each worker
    bin_folder.mkdir(parents=True, exist_ok=True)
    (bin_folder / "hostname").write_text(f"#!/bin/sh\necho t1v-n-0abc-w-{home.name[1:]}\n")
    (bin_folder / "hostname").chmod(0o755)
    env = {**os.environ, "HOME": str(home), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    # gcloud splits at spaces, ssh joins with them: what arrives is one line for the shell.
    codes.append(subprocess.run(["sh", "-c", " ".join(flags["command"].split(" "))], cwd=home, env=env).returncode)
  sys.exit(max(codes))


def scp(kind, names, flags, scenario):
  source, (node, _, path) = names[0], names[1].partition(":")
  for home in workers(CLOUD / kind / node, flags):
    shutil.copy(source, home / path)


def workers(place, flags):
  homes = sorted(place.glob("w*"))
  return homes if flags["worker"] == "all" else [homes[int(flags["worker"])]]


if __name__ == "__main__":
  main(sys.argv[1:])
