"""Every config in configs/ resolves and its step holds together; the small ones show their claim, or a proxy of it."""

import gzip
import json
import pathlib
import re
import struct

import jax
import numpy as np
import pytest

import bigjax
from bigjax import config as configs
from bigjax import experiment, metrics, train
from bigjax.plan import prepare

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = {
  "mnist_cnn": ["small", "deep"],
  "mnist1d": ["linear", "mlp", "cnn", "gru"],
  "binary_mlp": ["fold=1,folds=5"],
  "gutenberg": ["books", "python"],
}
# Batches of 12 or 100 examples can't be split over the tests' eight devices, so these hold copies.
OVERRIDES = [
  "--config.writers=('jsonl',)",
  "--config.mesh=(('data', 1), ('tensor', 8))",
  "--config.sharding=replicated",
]
OVERRIDES += [f"--config.activations.{word}=None" for word in ("heads", "hidden", "vocab")]
CASES = [(file, variant) for file in CONFIGS for variant in VARIANTS.get(file.stem, [""])]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Stand-ins of the same formats for data sets that no pip package holds."""
  import pyarrow
  import pyarrow.parquet

  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  for name, opened, suffix in [("mnist", open, ""), ("fashion", gzip.open, ".gz")]:
    (folder / name).mkdir()
    for part, count in [("train", 200), ("t10k", 50)]:
      images, labels = rng.integers(256, size=(count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
      with opened(folder / name / f"{part}-images-idx3-ubyte{suffix}", "wb") as f:
        f.write(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
      with opened(folder / name / f"{part}-labels-idx1-ubyte{suffix}", "wb") as f:
        f.write(struct.pack(">II", 0x801, count) + labels.tobytes())
  names = "MedInc HouseAge AveRooms AveBedrms Population AveOccup Latitude Longitude MedHouseVal".split()
  table = pyarrow.table({name: rng.normal(size=300) for name in names})
  pyarrow.parquet.write_table(table, folder / "california_housing.parquet", compression="brotli")
  stored(folder, rng)
  symbols = [chr(c) for c in range(33, 33 + 65)]
  (folder / "tinyshakespeare.txt").write_text("".join(rng.choice(symbols, size=5000)) + "".join(symbols))
  return folder


def stored(folder, rng):
  """A token store of documents of 1,100 bytes."""
  from bigjax.data import documents, tokenize, tokenizers

  lines = [json.dumps({"text": "".join(map(chr, rng.integers(97, 123, 1100)))}) for _ in range(100)]
  (folder / "documents.jsonl").write_text("\n".join(lines))
  inputs = documents.Inputs((str(folder / "documents.jsonl"),))
  tokenize.tokenize(inputs, str(folder / "store"), tokenizers.load("byte"), workers=1)
  for part in ("train", "val"):
    (folder / part).symlink_to(folder / "store")


def resolve(file, variant, data):
  source = file.read_text()
  arguments = [variant] if variant else []
  arguments += [f"data={data}"] if 'data="data"' in source else []
  arguments += [f"text={data / 'tinyshakespeare.txt'}"] if " text=" in source else []
  arguments += [f"tokens={data / 'store'}"] if "tokens=" in source else []
  arguments += [f"folder={data}"] if "folder=" in source else []
  spec = f"{file}:{','.join(arguments)}" if arguments else str(file)
  # What is too large for one device says itself how it's spread.
  overrides = OVERRIDES[:1] if "tokens=" in source else OVERRIDES
  config = configs.resolve(configs.read(spec, overrides), experiment.TrainConfig)
  return prepare.with_stand_in(config) if "images=" in source else config


@pytest.mark.parametrize(("file", "variant"), CASES, ids=lambda x: x.stem if isinstance(x, pathlib.Path) else x)
def test_a_config_resolves_and_its_step_keeps_the_shapes_of_the_state(file, variant, data):
  if file.stem == "mnist1d":
    pytest.importorskip("mnist1d", reason="the mnist1d package makes the data")
  run = experiment.build(resolve(file, variant, data))
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(run.mesh):
    state, measured = jax.eval_shape(train.make_step(run), run.abstract, dict(run.batch), key)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(state) == shapes(run.abstract)
  assert measured["loss"].shape == ()
  claim = run.config.claim
  assert claim is None or claim.metric.split("/")[0] in run.config.evals


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_config_tells_its_command_hardware_result_and_source(file):
  docstring = re.match(r'"""(.*?)"""', file.read_text(), re.DOTALL)[1]
  for word in ("Command ", "Hardware ", "Expected ", "Source "):
    assert f"\n{word}" in docstring, word
  assert f"configs/{file.name}" in docstring


def test_linear_regression_finds_the_least_squares_line(tmp_path):
  config = configs.read(str(ROOT / "configs/linear_regression.py"), OVERRIDES)
  loaded = bigjax.run(config, str(tmp_path))
  source = loaded.run.data.source
  points = source.fetch(np.arange(len(source)))
  x = points["x"].reshape(-1, 1)
  (w, b), *_ = np.linalg.lstsq(np.hstack([x, np.ones_like(x)]), points["target"].reshape(-1), rcond=None)
  kernel, bias = (np.asarray(loaded.state.params["head"][k]).item() for k in ("kernel", "bias"))
  assert abs(kernel - 3) < 0.1 and abs(bias - 2) < 0.3
  assert abs(kernel - w) < 1e-3 and abs(bias - b) < 1e-3


def test_a_tenth_of_the_digits_run_already_reaches_95_percent(tmp_path):
  overrides = [*OVERRIDES, "--config.total_steps=6 epochs", "--config.evals.test.every=6 epochs"]
  config = configs.read(str(ROOT / "configs/digits_cnn.py"), overrides)
  train.train(configs.resolve(config, experiment.TrainConfig), str(tmp_path))
  assert metrics.best_and_last(metrics.read_rows(tmp_path))["test/accuracy"]["last"] >= 0.95
