"""The same bits on any number of devices, processes and parts; and without the mode, others."""

import copy
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bigjax import checkpoint, experiment, sharding, topology, train
from bigjax import config as configs
from bigjax.errors import UserError
from bigjax.evaluation import Evaluation
from bigjax.sums import Sums

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = dict(
  data=dict(source=dict(name="synthetic", kind="images", num_examples=64, shape=(8, 8, 3), num_classes=5)),
  task=dict(name="classification", class_weights=(1.0, 5.0, 0.25, 1.0, 3.0)),
)
# A token counts as much as its number: every example, and so every group, has another weight.
TOKENS = dict(
  data=dict(
    source=dict(name="synthetic", kind="tokens", num_examples=64, vocab_size=32, length=8),
    preprocess="copy('tokens', 'token_mask')|cast('token_mask', 'float32')",
  ),
  task=dict(name="language_modeling"),
)
MLP = dict(model=dict(name="mlp", in_features=192, widths=(32,), num_outputs=5, dropout=0.2), **IMAGES)
SMALL = dict(width=16, depth=2, heads=2, dropout=0.1, scan=True)
VIT = dict(model=dict(name="vit", num_classes=5, image_size=8, patch_size=4, mlp_dim=32, **SMALL), **IMAGES)
GPT = dict(model=dict(name="gpt", vocab_size=32, context=8, **SMALL), **TOKENS)
COMMON = dict(
  total_steps=20,
  batch_size=32,
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2, warmup=2),
  decay=[(".*kernel", 0.1)],
  clip=dict(norm=0.1),
  ema=0.9,
  determinism="topology",
)
LAYOUTS = {
  "replicated": dict(mesh=[("data", -1)]),
  "fsdp": dict(mesh=[("data", -1)], sharding=[(".*", "fsdp(data,64)")]),
  "hsdp": dict(mesh=[("replica", 2), ("data", -1)], sharding=[(".*", "fsdp(data,64)")]),
}
EVERYWHERE = [(n, layout) for layout in LAYOUTS for n in (1, 2, 4, 8) if n >= 4 or layout != "hsdp"]
SOME = [(1, "replicated"), (2, "fsdp"), (8, "hsdp")]


def build(case, devices=8, layout="replicated", **changes):
  described = copy.deepcopy(COMMON | case | LAYOUTS[layout] | changes)
  return experiment.build(configs.resolve(described, experiment.TrainConfig), jax.devices()[:devices])


def go_on(run, state, first, last):
  """Returns the metrics of the steps up to `last`, and the state after it, as bytes."""
  measured = []
  with jax.set_mesh(run.mesh), train.train_batches(run, first) as batches:
    step = train.compile_step(run)
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    for _ in range(first, last):
      state, metrics = step(state, next(batches), key)
      measured.append(jax.device_get(metrics))
  return state, measured


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


def trained(case, devices=8, layout="replicated", **changes):
  run = build(case, devices, layout, **changes)
  state, measured = go_on(run, run.init(jax.random.key(0)), 0, 20)
  return bits(state), bits(measured)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "case", [MLP, pytest.param(VIT, marks=SLOW), pytest.param(GPT, marks=SLOW)], ids=["mlp", "vit", "gpt"]
)
def test_the_same_bits_on_any_number_of_devices_however_the_state_lies(case):
  found = [trained(case, *place) for place in (EVERYWHERE if case is MLP else SOME)]
  assert all(f == found[0] for f in found[1:])


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_a_batch_is_computed_in_do_not_matter(parts):
  assert trained(MLP, 2, "fsdp", accumulate=parts) == trained(MLP, 8, "replicated")


@pytest.mark.parametrize("optimizer", ["lamb", "adafactor", "muon", "sam"], ids=lambda name: name)
def test_what_looks_at_whole_leaves_or_asks_for_another_gradient_is_the_same_too(optimizer):
  options = dict(min_dim_size_to_factor=16) if optimizer == "adafactor" else {}
  changes = dict(optimizer=dict(name=optimizer, **options), decay=[])
  one = trained(MLP, 1, **changes)
  assert one == trained(MLP, 8, "fsdp", **changes)


@pytest.mark.slow
def test_mixed_precision_is_the_same_too():
  assert trained(GPT, 1, precision="mixed") == trained(GPT, 8, "fsdp", precision="mixed")


def test_without_the_mode_the_bits_differ():
  assert trained(MLP, 1, determinism="run") != trained(MLP, 8, determinism="run")


def in_turn(fn, count, turns):
  add = lambda i, total: jax.tree.map(jnp.add, total, fn(i))
  return jax.lax.fori_loop(1, turns, add, fn(jnp.int32(0)))


def all_reduced(tree, axes, devices):
  return jax.lax.psum(tree, axes)


@pytest.mark.parametrize(("devices", "part", "fault"), [(1, "_over", in_turn), (8, "_across", all_reduced)])
def test_a_sum_in_another_order_has_other_bits(monkeypatch, devices, part, fault):
  monkeypatch.setattr(topology, part, fault)
  wrong = trained(MLP, devices)
  monkeypatch.undo()
  assert wrong != trained(MLP, devices)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_groups_are_added_as_numpy_adds_them_along_the_tree(devices):
  mesh = sharding.make_mesh([("data", devices)], jax.devices()[:devices])
  values = np.random.default_rng(0).normal(size=(16, 2, 3)).astype(np.float32) * 10.0 ** np.arange(-8, 8)[:, None, None]
  values = values.astype(np.float32)
  tree = list(values[:, 0])
  while len(tree) > 1:
    tree = [a + b for a, b in zip(tree[::2], tree[1::2], strict=True)]

  def first_of_group(params, extras, batch, key):
    return params * batch["x"][0], (Sums({"loss": batch["x"][0, 0]}, {"loss": batch["x"].size * jnp.ones(())}), extras)

  division = topology.Alone(mesh, 16)
  summed = division.summed(first_of_group, lambda grad_fn: grad_fn)
  step = division.jit(lambda state, batch, key: summed(state, {}, batch, key))
  # A step returns what it got: here the parameters are as large as the sum.
  total, (sums, _) = step(np.ones(3, np.float32), {"x": values.reshape(32, 3)}, jax.random.key(0))
  np.testing.assert_array_equal(total, tree[0])
  assert sums.sums["loss"] == tree[0][0] and sums.weights["loss"] == 96


def test_every_group_draws_its_own_numbers_wherever_it_is():
  def drawn(devices):
    mesh = sharding.make_mesh([("data", devices)], jax.devices()[:devices])

    def draw(params, extras, batch, key):
      return batch["place"][0] * jax.random.uniform(key), (Sums({}, {}), extras)

    division = topology.Alone(mesh, 8)
    summed = division.summed(draw, lambda grad_fn: grad_fn)
    step = division.jit(lambda state, batch, key: summed(state, {}, batch, key))
    return np.asarray(step(np.zeros(8, np.float32), {"place": np.eye(8, dtype=np.float32)}, jax.random.key(0))[0])

  assert len(set(drawn(1))) == 8
  np.testing.assert_array_equal(drawn(1), drawn(4))


def test_a_run_goes_on_with_other_devices_and_ends_with_the_same_bits(tmp_path):
  whole = trained(MLP, 1)[0]
  first, second = build(MLP, 8, "hsdp"), build(MLP, 2, "fsdp", accumulate=4)
  state, _ = go_on(first, first.init(jax.random.key(0)), 0, 7)
  with checkpoint.Checkpoints(str(tmp_path), first.keep()) as checkpoints:
    checkpoints.save(7, state, {}, None)
    checkpoints.wait()
  with checkpoint.Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    state, _ = checkpoints.restore(second.abstract, second.shardings)
  state, _ = go_on(second, state, 7, 20)
  assert bits(state) == whole


EVALUATIONS = {
  "mlp": dict(evaluator=dict(name="classification", num_classes=5, top_k=(2,), confusion=True), data=IMAGES["data"]),
  "vit": dict(
    evaluator=dict(name="fewshot", shots=(1,)), data=IMAGES["data"], extra_data=dict(train_batches=IMAGES["data"])
  ),
  "gpt": dict(evaluator=dict(name="perplexity"), data=TOKENS["data"]),
}


def evaluated(case, devices, layout="replicated", steps=2, **changes):
  """All that is measured of a state after some steps, the last batch part padding."""
  described = EVALUATIONS[case["model"]["name"]]
  source = described["data"]["source"] | dict(num_examples=53, seed=1)
  described = described | dict(data=described["data"] | dict(source=source), batch_size=16)
  run = build(case, devices, layout, evals=dict(val=described), **changes)
  state, _ = go_on(run, run.init(jax.random.key(0)), 0, steps)
  with jax.set_mesh(run.mesh):
    return Evaluation.of(run, "val", run.config.evals["val"]).run(state)


@pytest.mark.parametrize(
  "case", [MLP, pytest.param(VIT, marks=SLOW), pytest.param(GPT, marks=SLOW)], ids=["mlp", "vit", "gpt"]
)
def test_evaluations_are_the_same_too(case):
  found = [evaluated(case, *place) for place in SOME]
  assert found[0] and found[0] == found[1] == found[2]


def test_without_the_mode_evaluations_differ_no_more_than_the_last_digits():
  one, other = (evaluated(MLP, n, steps=0, determinism="run") for n in (1, 8))
  assert one["val/loss"] != other["val/loss"]
  np.testing.assert_allclose(one["val/loss"], other["val/loss"], rtol=1e-5)
  np.testing.assert_allclose(evaluated(MLP, 8, steps=0)["val/loss"], one["val/loss"], rtol=1e-5)


def test_the_first_parameters_are_the_same_however_they_lie():
  first = [bits(build(VIT, *place).init(jax.random.key(0))) for place in SOME]
  assert first[0] == first[1] == first[2]


def test_at_rest_the_state_lies_as_the_config_says():
  run = build(MLP, 8, "fsdp")
  state, _ = go_on(run, run.init(jax.random.key(0)), 0, 1)
  assert state.params["first"]["dense"]["kernel"].sharding.spec == P("data", None)


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight_are_one_of_one():
  command = [sys.executable, "scripts/bench/topology.py", "--cases=mlp", "--places=1x1,1x8,2x4", "--steps=5"]
  done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "mlp, topology: 1 different of" in done.stdout and "mlp, run: 1 different" not in done.stdout


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(mesh=[("data", 4), ("tensor", 2)]), "data parallelism.*'tensor': 2"),
    (dict(model=MLP["model"] | dict(batch_norm=True)), "batch statistics"),
    (dict(groups=12), "config.groups, 12, must be a power of two.*such as 16"),
    (dict(groups=64), "divides config.batch_size=32.*such as 32"),
    (dict(groups=4), "4 groups of examples are too few for 8 devices; make it 8"),
    (dict(batch_size=24, groups=4), "too few for 8 devices"),
    (dict(determinism="topolgy"), "config.determinism"),
  ],
)
def test_what_can_not_be_the_same_everywhere_is_refused(changes, words):
  with pytest.raises(UserError, match=words):
    build(MLP, **changes)


def test_a_number_of_devices_that_is_no_power_of_two_is_refused():
  with pytest.raises(UserError, match="number of devices, 6, must be a power of two"):
    build(MLP, 6, batch_size=48)
