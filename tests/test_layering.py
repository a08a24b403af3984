"""Components know outside libraries and their own kind; the package's core stays free of TensorFlow at import."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "bigjax"
KINDS = ("models", "tasks", "data", "optimizers", "evaluators")
SHARED = ("bigjax.errors", "bigjax.paths", "bigjax.schedules", "bigjax.sharding", "bigjax.sums")
HEAVY = ("tensorflow", "tensorflow_datasets", "clu", "matplotlib", "pandas", "pyarrow", "sklearn")


def imports(file, top_level_only=False):
  tree = ast.parse(file.read_text())
  nodes = tree.body if top_level_only else ast.walk(tree)
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{a.name}" for a in node.names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_imports_its_own_kind_and_outside_libraries_only(kind):
  files = sorted((PACKAGE / kind).rglob("*.py"))
  assert files
  wrong = [
    f"{file.relative_to(PACKAGE)} imports {name}"
    for file in files
    for name in imports(file)
    if name.startswith("bigjax.") and not name.startswith((*SHARED, f"bigjax.{kind}"))
  ]
  assert not wrong


def test_heavy_libraries_are_imported_where_they_are_used():
  wrong = [
    f"{file.relative_to(PACKAGE)} imports {name}"
    for file in sorted(PACKAGE.rglob("*.py"))
    for name in imports(file, top_level_only=True)
    if name.split(".")[0] in HEAVY
  ]
  assert not wrong


def test_no_file_is_longer_than_500_lines():
  assert [f.name for f in PACKAGE.rglob("*.py") if len(f.read_text().splitlines()) > 500] == []


def test_the_step_does_not_go_through_nnx_jit():
  for file in PACKAGE.rglob("*.py"):
    assert not any(w in file.read_text() for w in ("nnx.jit", "nnx.Optimizer", "nnx.value_and_grad")), file
