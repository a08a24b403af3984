"""Who the processes of a run are, and whether all have come.

Who they are comes from flags, from variables such as `BIGJAX_COORDINATOR`, or from what started the processes: Cloud
TPU, Slurm, Open MPI or Kubernetes. `jax.distributed` ends a process by SIGABRT when a peer does not come, and does not
say which; so they call the roll first, at the address that JAX's own service listens at next.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from bigjax.errors import UserError

PORT = 8476  # Where nothing else says; JAX's own choice.


@dataclasses.dataclass(frozen=True)
class Peers:
  """The processes of a run, as one of them sees it."""

  coordinator: str  # HOST:PORT at which process 0 answers.
  processes: int
  process: int
  local_devices: tuple[int, ...] | None = None  # The host's accelerators that are this process's, where it shares them.
  by: str = "flags"  # What said so.


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of a command that runs on several hosts."""
  group = parser.add_argument_group(
    "several hosts", "found by themselves on Cloud TPU, Slurm and Open MPI; elsewhere give all three"
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 answers; or BIGJAX_COORDINATOR")
  group.add_argument("--processes", type=int, metavar="N", help="how many processes there are; or BIGJAX_PROCESSES")
  group.add_argument("--process", type=int, metavar="I", help="which this one is, from 0; or BIGJAX_PROCESS")
  group.add_argument(
    "--peer_timeout", type=float, default=300.0, metavar="SECONDS", help="how long to wait for those that don't come"
  )


def find(
  env: Mapping[str, str],
  *,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  attribute: Callable[[str], str | None] | None = None,
  hostname: str = "localhost",
) -> Peers | None:
  """Returns who the peers are, from flags, else from the environment; None where this process is alone.

  Args:
    env: The environment variables.
    coordinator: HOST:PORT of process 0, from a flag.
    processes: How many there are, from a flag.
    process: Which this one is, from a flag.
    attribute: Reads a Cloud TPU VM's metadata attribute; None where this is none.
    hostname: This host's full name.

  Raises:
    UserError: Something is said, and it can't be so.
  """
  coordinator = coordinator or env.get("BIGJAX_COORDINATOR") or env.get("JAX_COORDINATOR_ADDRESS")
  processes = _number(env, "BIGJAX_PROCESSES") if processes is None else processes
  process = _number(env, "BIGJAX_PROCESS") if process is None else process
  found = (
    _tpu(env, attribute) or _slurm(env) or _open_mpi(env, coordinator) or _kubernetes(env, processes, hostname)
  )  # Each (coordinator, processes, process, local devices, its name) or None.
  if found is None:
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 or processes == 1:
      return None
    if missing:
      raise UserError(f"{', '.join(missing)}: not given, and no cluster was found that says; give all three.")
    found = (coordinator, processes, process, None, "flags")
  # What is said by hand goes before what is found.
  named = (coordinator, processes, process)
  peers = Peers(*(f if n is None else n for n, f in zip(named, found[:3], strict=True)), *found[3:])
  if peers.processes < 1 or not 0 <= peers.process < peers.processes:
    raise UserError(
      f"--process={peers.process} with --processes={peers.processes} ({peers.by}): count the processes from 0 to "
      f"{max(peers.processes, 1) - 1}."
    )
  if not re.fullmatch(r".+:\d+", peers.coordinator) or not 0 < int(peers.coordinator.rpartition(":")[2]) < 65536:
    raise UserError(f"--coordinator={peers.coordinator}: give HOST:PORT, such as {hostname}:{PORT}.")
  return None if peers.processes == 1 else peers


def _number(env, name):
  value = env.get(name)
  if value is not None and not value.strip().isdigit():
    raise UserError(f"{name}={value}: a whole number is meant.")
  return None if value is None else int(value)


def _tpu(env, attribute):
  """Cloud TPU: on GKE from variables, on a TPU VM from its metadata; several slices after each other.

  https://cloud.google.com/tpu/docs/jax-pods; the names are those that jax/_src/clusters/cloud_tpu_cluster.py reads.
  """
  if "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
    return None
  of_slices = env
  if names := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):
    workers, worker = [n.strip() for n in names.split(",")], _number(env, "TPU_WORKER_ID") or 0
  elif attribute is not None and (names := attribute("worker-network-endpoints")):
    workers = [(w.split(":") * 3)[2] for w in names.split(",")]  # A name, or name:id:address.
    worker = int(attribute("agent-worker-number") or 0)
    of_slices = dict(re.findall(r"^\s*(\w+)\s*:\s*'?([^'\n]*)'?", attribute("tpu-env") or "", re.M)) | dict(env)
  else:
    return None
  first = of_slices.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
  slices, here = _number(of_slices, "MEGASCALE_NUM_SLICES") or 1, _number(of_slices, "MEGASCALE_SLICE_ID") or 0
  process = here * len(workers) + worker
  return f"{first.split(':')[0]}:{_port(env, 8482)}", slices * len(workers), process, None, "Cloud TPU"


def _slurm(env):
  """Slurm: the tasks of a step, as `srun` starts them (https://slurm.schedmd.com/srun.html)."""
  if not all(name in env for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")):
    return None
  tasks = _number(env, "SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS") or 1
  first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", env["SLURM_STEP_NODELIST"])  # node[001-015,17],other
  host = first[1] + (first[2] or "")
  # One task a node has the whole node, several share its accelerators.
  sharing = tasks > (_number(env, "SLURM_STEP_NUM_NODES") or 1) and "SLURM_LOCALID" in env
  local = (int(env["SLURM_LOCALID"]),) if sharing else None
  return f"{host}:{_port(env, _drawn(env['SLURM_JOB_ID']))}", tasks, int(env["SLURM_PROCID"]), local, "Slurm"


def _open_mpi(env, coordinator):
  """Open MPI: `mpirun` of version 4 says where it runs, which is taken for the host of process 0."""
  if not all(f"OMPI_COMM_WORLD_{name}" in env for name in ("SIZE", "RANK")):
    return None
  size, rank = int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
  here = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
  local = (_number(env, "OMPI_COMM_WORLD_LOCAL_RANK") or 0,) if here > 1 else None
  job = env.get("OMPI_MCA_orte_hnp_uri") or env.get("PMIX_NAMESPACE") or "0"
  uri = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
  host = "127.0.0.1" if here == size else uri and (uri[1] or uri[2])
  if not host and not coordinator and size > 1:
    raise UserError(
      f"--coordinator: this mpirun does not tell its {size} processes where the first of them is; add "
      f"-x BIGJAX_COORDINATOR=HOST:{PORT} to mpirun, with the host of rank 0."
    )
  return f"{host}:{_port(env, _drawn(job))}", size, rank, local, "Open MPI"


def _kubernetes(env, processes, hostname):
  """Kubernetes: the pods of an indexed job behind a headless service, told how many they are by BIGJAX_PROCESSES.

  Without that number such pods may as well be runs of their own. Their names end in their index
  (https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication).
  """
  index = _number(env, "JOB_COMPLETION_INDEX")
  if index is None or processes is None:
    return None
  pod, _, domain = hostname.partition(".")
  first = re.sub(rf"-{index}$", "-0", pod) + (f".{domain}" if domain else "")
  return f"{first}:{_port(env, PORT)}", processes, index, None, "Kubernetes"


def _port(env, otherwise):
  return _number(env, "JAX_COORDINATOR_PORT") or otherwise


def _drawn(job):
  """A port out of the range for short-lived ones, the same for all processes of a job, seldom that of another job."""
  return 61440 + int(re.sub(r"\D", "", job.split(";")[0])[:18] or 0) % 4096


def on_tpu_vm() -> bool:
  """Whether there is a server of metadata to ask: importing JAX sets the variable where the machine has no TPU."""
  return "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu") is not None


def notice() -> str | None:
  """Returns why this VM is about to be taken away, as its server of metadata has it; None while it is not.

  https://cloud.google.com/compute/docs/instances/create-use-preemptible,
  https://cloud.google.com/tpu/docs/view-maintenance-notifications; what is only planned, days ahead, is no reason yet.
  """
  if metadata("preempted", under="") == "TRUE":
    return "the VM is being preempted"
  if metadata("maintenance-event", under="") == "TERMINATE_ON_HOST_MAINTENANCE":
    return "the VM's host goes into maintenance"
  if re.search(r"maintenanceStatus\W+ONGOING", metadata("upcoming-maintenance", under="") or "", re.I):
    return "the VM's host is in maintenance"
  return None


def metadata(name: str, under: str = "attributes/") -> str | None:
  """Returns an attribute of this TPU VM (https://cloud.google.com/compute/docs/metadata/querying-metadata)."""
  host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  url = f"http://{host}/computeMetadata/v1/instance/{under}{name}"
  request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
  for _ in range(3):
    try:
      with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()
    except urllib.error.HTTPError as e:
      if e.code == 404:
        return None
    except OSError:
      time.sleep(1)
  return None


def call_roll(peers: Peers, timeout: float) -> dict[int, str]:
  """Waits until all processes have come; returns the hosts they are on.

  Process 0 listens at the coordinator's address, the others say who they are there. When all have come, or the time is
  up, it tells everyone, and the address is free again for JAX.

  Raises:
    UserError: Two have the same number, or they differ in how many they are.
    TimeoutError: Some did not come; says which.
  """
  verdict = _listen(peers, timeout) if peers.process == 0 else _report(peers, timeout)
  hosts = {int(i): host for i, host in verdict["hosts"].items()}
  if "refused" in verdict:
    raise UserError(verdict["refused"])
  if missing := [i for i in range(peers.processes) if i not in hosts]:
    came = ", ".join(f"{i} on {hosts[i]}" for i in sorted(hosts)[:8]) + (", ..." if len(hosts) > 8 else "")
    raise TimeoutError(
      f"{_numbered(missing)} of {peers.processes} did not come within {timeout:g} s (there are {came}). Start the same "
      f"command on every host, each with its own --process, within --peer_timeout; all must reach {peers.coordinator}."
    )
  return hosts


def _numbered(numbers):
  shown = ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
  return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def is_loopback(host: str) -> bool:
  """Whether a host's address is of this machine alone."""
  return host.startswith("127.")


def _listen(peers, timeout):
  """Process 0's side of the roll call."""
  host, _, port = peers.coordinator.rpartition(":")
  try:
    if is_loopback(host):
      server = socket.create_server((host, int(port)), backlog=1024)
    elif socket.has_dualstack_ipv6():
      server = socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
      server = socket.create_server(("", int(port)), backlog=1024)
  except OSError as e:
    raise UserError(
      f"--coordinator={peers.coordinator}: process 0 can't listen there: {e.strerror}. Choose another port."
    ) from e
  deadline = time.monotonic() + timeout
  hosts, links, refused = {0: socket.gethostname()}, {}, None
  with server, contextlib.ExitStack() as stack:
    while len(hosts) < peers.processes and refused is None and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # Whoever else knocks, and says no such line.
        link = stack.enter_context(server.accept()[0])
        link.settimeout(5)
        said = json.loads(_line(link))
        process, processes, its_host = int(said["process"]), int(said["processes"]), str(said["host"])
        if processes != peers.processes:
          refused = (
            f"--processes: process {process} on {its_host} was told {processes} and process 0 on {hosts[0]} "
            f"{peers.processes}; give every one the same."
          )
        elif process in hosts and not (process in links and _is_gone(links[process])):
          refused = (
            f"--process={process} was given twice, on {hosts[process]} and on {its_host}; give each its own, from 0 to "
            f"{peers.processes - 1}."
          )
        if refused:
          links["refused"] = link
        else:
          hosts[process], links[process] = its_host, link
    verdict = {"hosts": hosts} | ({"refused": refused} if refused else {})
    for link in links.values():
      with contextlib.suppress(OSError):
        link.sendall(json.dumps(verdict).encode() + b"\n")
    for link in links.values():  # They hang up first: then no half-closed connection occupies the port.
      with contextlib.suppress(OSError):
        link.recv(1)
  return verdict


def _report(peers, timeout):
  """The others' side."""
  host, _, port = peers.coordinator.rpartition(":")
  deadline, reason = time.monotonic() + timeout, "no answer"
  hello = {"process": peers.process, "processes": peers.processes, "host": socket.gethostname()}
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as link:
        link.settimeout(timeout + 10)  # Process 0 may have begun to wait just now.
        link.sendall(json.dumps(hello).encode() + b"\n")
        return json.loads(_line(link))
    except (OSError, ValueError) as e:  # Not there yet, or still the end of another run.
      reason = e.strerror if isinstance(e, OSError) and e.strerror else reason
      time.sleep(min(0.2, max(0.0, left)))
  raise TimeoutError(
    f"process 0 of {peers.processes} did not answer at {peers.coordinator} within {timeout:g} s ({reason}). Start it "
    f"there, and let this host ({socket.gethostname()}, process {peers.process}) reach that port; see --peer_timeout."
  )


def _line(link):
  received = b""
  while not received.endswith(b"\n"):
    if not (more := link.recv(65536)) or len(received) > 2**22:
      raise ValueError("The line ended early.")
    received += more
  return received


def _is_gone(link):
  """Whether the other side has hung up."""
  try:
    link.setblocking(False)
    return link.recv(1, socket.MSG_PEEK) == b""
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    link.settimeout(5)
