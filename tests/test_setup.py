"""What a fresh machine relies on: light imports, declared and pinned packages, an interpreter that really runs."""

import ast
import importlib.metadata
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bigjax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [Requirement(r) for r in PROJECT["dependencies"]]
EXTRAS = [Requirement(r) for extra in PROJECT["optional-dependencies"].values() for r in extra]


def test_importing_bigjax_is_instant():
  def seconds(program):
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    return time.perf_counter() - began

  # Taken in turns, so that whatever else the machine does slows both.
  bare, package = zip(*[(seconds("pass"), seconds("import bigjax")) for _ in range(5)])
  assert statistics.median(package) - statistics.median(bare) < 0.3


def test_importing_bigjax_imports_no_framework():
  program = "import bigjax, sys; print(*sys.modules)"
  loaded = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True).stdout
  heavy = {"jax", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "clu", "matplotlib", "numpy"}
  assert not heavy & set(loaded.split())


def test_the_version_has_one_source():
  assert "version" not in PROJECT
  assert importlib.metadata.version("bigjax") == bigjax.__version__


@pytest.mark.parametrize("pattern", ["pyproject.toml", "constraints*", "Makefile", "scripts/*.sh", ".ci/*", "*.lock"])
def test_no_address_where_packages_are_pinned_or_installed(pattern):
  for file in ROOT.glob(pattern):
    assert not re.search(r"://|index-url|find-links|trusted-host", file.read_text()), file


def pinned():
  """The lines of constraints.txt, each with its hashes."""
  for lines in re.split(r"\n(?=[^ ])", (ROOT / "constraints.txt").read_text().strip()):
    requirement, *hashes = lines.split(" \\\n    ")
    yield Requirement(requirement), hashes


def test_every_pin_has_the_hashes_of_its_files():
  for requirement, hashes in pinned():
    assert len(requirement.specifier) == 1 and str(requirement.specifier).startswith("=="), requirement
    assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), requirement


def test_every_declared_package_is_pinned_and_installed_as_pinned():
  pins = [requirement for requirement, _ in pinned()]
  assert {canonicalize_name(r.name) for r in BASE + EXTRAS} <= {canonicalize_name(r.name) for r in pins}
  names = {canonicalize_name(r.name) for r in BASE}
  here = [r for r in pins if canonicalize_name(r.name) in names and (r.marker is None or r.marker.evaluate())]
  assert {r.name: f"=={importlib.metadata.version(r.name)}" for r in here} == {r.name: str(r.specifier) for r in here}


def imports(tree: ast.AST, within_function: bool = False):
  """Yields (top-level name, is it inside a function) for each absolute import."""
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name.split(".")[0], within_function) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      yield node.module.split(".")[0], within_function
    inside = within_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    yield from imports(node, inside)


@pytest.mark.parametrize("folder", ["bigjax", "configs", "scripts", "tests"])
def test_every_imported_package_is_declared(folder):
  base = {canonicalize_name(r.name) for r in BASE}
  declared = base | {canonicalize_name(r.name) for r in EXTRAS}
  distributions = importlib.metadata.packages_distributions()
  undeclared = []
  for file in sorted((ROOT / folder).rglob("*.py")):
    siblings = {p.stem for p in file.parent.iterdir()} if folder == "scripts" else set()
    ours = {"bigjax", "configs", "scripts", "tests"} | siblings
    for name, within_function in imports(ast.parse(file.read_text())):
      if name in ours or name in sys.stdlib_module_names:
        continue
      # Extras may be absent, so the package needs them only once a function that uses them is called.
      allowed = base if folder == "bigjax" and not within_function else declared
      if not allowed & {canonicalize_name(d) for d in distributions.get(name, [name])}:
        undeclared.append(f"{file.relative_to(ROOT)}: {name}")
  assert not undeclared


@pytest.fixture
def fresh(tmp_path):
  """A clone with nothing set up, on a machine whose PATH holds no Python."""
  (tmp_path / "bin").mkdir()
  for tool in "cat cksum date dirname grep kill mkdir rm sed sh sleep sort tail tr xargs".split():
    if path := shutil.which(tool):
      (tmp_path / "bin" / tool).symlink_to(path)
  for file in ["pyproject.toml", "constraints.txt", "scripts/bootstrap.sh", "bigjax/__init__.py"]:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / file, tmp_path / file)
  return tmp_path


def program(path: pathlib.Path, body: str):
  path.write_text(f"#!/bin/sh\n{body}\n")
  path.chmod(0o755)


def bootstrap(clone: pathlib.Path, **env: str):
  env = {"PATH": str(clone / "bin"), "HOME": str(clone)} | env
  return subprocess.run(["sh", "scripts/bootstrap.sh"], cwd=clone, env=env, capture_output=True, text=True, timeout=60)


def test_an_interpreter_that_does_not_run_is_passed_over(fresh):
  program(fresh / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
  # Real enough to be asked for its version; makes no environment, and says that it was to.
  program(fresh / "bin" / "python3", f'[ "$1" = -m ] && echo "chosen to run $*" && exit 9; exec {sys.executable} "$@"')
  result = bootstrap(fresh)
  assert "chosen to run -m venv --clear .venv" in result.stdout
  assert "(python3) makes .venv" in result.stderr
  assert not (fresh / ".cache" / "bootstrap.lock").exists()


def test_a_machine_without_a_usable_python_is_told_once_what_to_do(fresh):
  program(fresh / "bin" / "python3.13", "exit 127")
  program(fresh / "bin" / "python3", "echo 'is Python 3.9' >&2; exit 1")
  result = bootstrap(fresh)
  assert result.returncode == 2
  assert "Install one (3.12 is tested best), or name it: PYTHON=" in result.stderr
  assert result.stderr.splitlines()[1:] == ["  python3.13: does not run, exit code 127", "  python3: is Python 3.9"]


def test_a_named_python_that_will_not_do_is_said_so(fresh):
  result = bootstrap(fresh, PYTHON="no-such-python")
  assert result.returncode == 2
  assert "PYTHON=no-such-python: not found." in result.stderr


def test_a_finished_environment_is_left_alone(fresh):
  environment = fresh / ".venv"
  (environment / "bin").mkdir(parents=True)
  program(environment / "bin" / "python", "echo 'something was run' >&2; exit 1")
  inputs = [f"{fresh.resolve()}\n", *((fresh / f).read_text() for f in ["pyproject.toml", "constraints.txt"])]
  inputs = "".join(inputs) + f'__version__ = "{bigjax.__version__}"\n'
  key = subprocess.run(["cksum"], input=inputs.encode(), capture_output=True, check=True).stdout
  (environment / "bootstrap.stamp").write_bytes(key + b"dev examples\n")
  assert bootstrap(fresh, PWD=str(fresh)).stderr == ""
  # A change of the pins is seen.
  with open(fresh / "constraints.txt", "a") as f:
    f.write("no-such-package==1\n")
  assert "found no Python" in bootstrap(fresh).stderr
