"""What of a checkpoint may differ is asked for, everything else is refused, and what is the same stays to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import changes, experiment, sharding, train
from bigjax import config as configs
from bigjax import state as states
from bigjax.changes import Changes
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError

MESH = [("data", 8)]


def laid_out(abstract):
  return sharding.shard_tree(abstract, "fsdp", sharding.make_mesh(MESH))


def draw(shape, seed, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def state_of(words=40, classes=10, dtype=jnp.float32, ema=False, layers="list", seed=0):
  block = lambda i: {"w": draw((16, 32), seed + i, dtype)}
  blocks = [block(i) for i in range(4)]
  params = {
    "embed": {"table": draw((words, 16), seed + 10, dtype)},
    "blocks": {str(i): b for i, b in enumerate(blocks)}
    if layers == "list"
    else {"w": jnp.stack([b["w"] for b in blocks])},
    "head": {"kernel": draw((16, classes), seed + 11, dtype), "bias": draw((classes,), seed + 12, dtype)},
  }
  moments = {"adam": {"mu": jax.tree.map(lambda x: x * 2, params)}} | ({"ema": params} if ema else {})
  return states.TrainState(jnp.asarray(7, jnp.int32), params, {}, moments)


def taken(tmp_path, old, new, **allowed):
  """Returns what of `old` comes into a state like `new`, and the report."""
  if not (tmp_path / "checkpoints").exists():
    with Checkpoints(str(tmp_path)) as checkpoints:
      checkpoints.save(7, old, {})
  abstract = jax.eval_shape(lambda: new)
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    fresh = lambda: jax.device_put(new, laid_out(abstract))
    state, report = changes.take(checkpoints, 7, abstract, laid_out(abstract), Changes(**allowed), fresh)
  for leaf, like, where in zip(*map(jax.tree.leaves, (state, new, laid_out(abstract))), strict=True):
    assert leaf.shape == like.shape and leaf.dtype == like.dtype and leaf.sharding == where
  return state, report


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_the_same_is_taken_to_the_bit_without_a_word(tmp_path):
  state, report = taken(tmp_path, state_of(), state_of(seed=50))
  assert_equal(state, state_of())
  assert report == []


def test_layers_in_another_form_need_no_asking(tmp_path):
  state, report = taken(tmp_path, state_of(), state_of(layers="stack", seed=50))
  assert_equal(state, state_of(layers="stack"))
  assert report == ["2 leaves are the same layers in another form"]


def test_a_vocabulary_that_grows_keeps_every_old_row_and_the_new_ones_are_fresh(tmp_path):
  new = state_of(words=48, seed=50)
  state, report = taken(tmp_path, state_of(), new, resize=[".*embed/table"])
  for path in (lambda s: s.params, lambda s: s.opt_state["adam"]["mu"]):
    table = path(state)["embed"]["table"]
    np.testing.assert_array_equal(table[:40], path(state_of())["embed"]["table"])
    np.testing.assert_array_equal(table[40:], path(new)["embed"]["table"][40:])
  assert_equal(state.params["blocks"], state_of().params["blocks"])
  assert "params/embed/table: [40, 16] -> [48, 16]: 640 values are the checkpoint's, 128 are fresh" in report
  assert not any("LOST" in line for line in report)


def test_a_head_that_shrinks_says_what_is_lost(tmp_path):
  state, report = taken(tmp_path, state_of(), state_of(classes=6, seed=50), resize=[".*head/.*"])
  np.testing.assert_array_equal(state.params["head"]["kernel"], state_of().params["head"]["kernel"][:, :6])
  assert (
    "params/head/kernel: [16, 10] -> [16, 6]: 96 values are the checkpoint's, 64 of the checkpoint's are LOST" in report
  )


def test_an_average_comes_and_goes_on_request(tmp_path):
  new = state_of(ema=True, seed=50)
  state, report = taken(tmp_path, state_of(), new, rules=[("opt_state/ema/.*", None), (".*", r"\g<0>")])
  assert_equal(state.params, state_of().params)
  assert_equal(state.opt_state["ema"], new.opt_state["ema"])
  assert "opt_state/ema/head/bias: fresh" in report
  from_params = [("opt_state/ema/(.*)", r"params/\1"), (".*", r"\g<0>")]
  state, report = taken(tmp_path, state_of(), new, rules=from_params)
  assert_equal(state.opt_state["ema"], state_of().params)
  state, report = taken(tmp_path / "back", state_of(ema=True), state_of(seed=50), drop=["opt_state/ema/.*"])
  assert_equal(state, state_of())
  assert "opt_state/ema/head/bias: left behind" in report


@pytest.mark.parametrize("layers", ["list", "stack"])
def test_wider_numbers_lose_nothing_and_narrower_ones_say_how_much(tmp_path, layers):
  half = state_of(dtype=jnp.bfloat16)
  state, report = taken(tmp_path / "wider", half, state_of(seed=50, layers=layers), cast=True)
  assert_equal(state.params["head"], jax.tree.map(lambda x: x.astype(jnp.float32), half.params["head"]))
  assert report[-1].endswith("bfloat16 -> float32: loses nothing")
  narrow = state_of(dtype=jnp.bfloat16, seed=50, layers=layers)
  state, report = taken(tmp_path / "narrower", state_of(), narrow, cast=True)
  assert_equal(state.params, state_of(dtype=jnp.bfloat16, layers=layers).params)
  assert "float32 -> bfloat16: changes values by up to 0.00" in report[-1]


REFUSED = {
  "a leaf more": (dict(ema=True), r"\+ opt_state/ema/.* in this config only; rules="),
  "other sizes": (dict(words=48), r"! params/embed/table .*float32\[40, 16\].*float32\[48, 16\]; resize="),
  "other precision": (dict(dtype=jnp.bfloat16), r"! params/head/bias .*; cast=True"),
  "other precision of layers in another form": (
    dict(dtype=jnp.bfloat16, layers="stack"),
    r"params/blocks/w.*cast=True",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_not_asked_for_is_refused_with_the_words_that_allow_it(tmp_path, case):
  how, said = REFUSED[case]
  with pytest.raises(UserError, match=said):
    taken(tmp_path, state_of(), state_of(**how))


def test_a_leaf_over_and_another_number_of_layers_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"- opt_state/ema/.* in the checkpoint only; drop="):
    taken(tmp_path, state_of(ema=True), state_of())
  new = state_of(layers="stack")
  new.params["blocks"]["w"] = new.params["blocks"]["w"][:3]
  with pytest.raises(UserError, match=r"(?s)\+ params/blocks/w.*- params/blocks/0/w"):
    taken(tmp_path / "fewer", state_of(), new)


def tiny(**changed):
  images = lambda n: dict(name="synthetic", kind="images", num_examples=n, shape=(4, 4, 1), num_classes=3)
  config = dict(
    total_steps=8,
    batch_size=16,
    data=dict(source=images(40)),
    model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3),
    task=dict(name="classification"),
    optimizer=dict(name="adamw", weight_decay=0.0),
    schedule=dict(name="cosine", peak=1e-2),
    checkpoint_every=4,
    writers=("jsonl",),
    keep=dict(last=2),
  )
  return configs.resolve(config | changed, experiment.TrainConfig)


def final(workdir, config):
  run = experiment.build(config)
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(run.abstract, run.shardings)[0])


def test_a_run_goes_on_with_another_runs_whole_state_and_ends_as_that_one_does(tmp_path, capsys):
  train.train(tiny(), str(tmp_path / "a"))
  init = dict(workdir=str(tmp_path / "a"), step=4, whole=True)
  train.train(tiny(init_from=init), str(tmp_path / "b"))
  assert_equal(final(tmp_path / "a", tiny()), final(tmp_path / "b", tiny()))
  assert "going on from step 4" in capsys.readouterr().out
  rules = [("opt_state/.*ema.*", None), (".*", r"\g<0>")]
  train.train(tiny(init_from=init | dict(rules=rules), ema=0.9), str(tmp_path / "c"))
  assert_equal(final(tmp_path / "a", tiny()).params, final(tmp_path / "c", tiny(ema=0.9)).params)


def test_the_words_for_a_whole_state_are_refused_without_it(tmp_path):
  with pytest.raises(UserError, match="whole=True"):
    tiny(init_from=dict(workdir="a", cast=True))
  with pytest.raises(UserError, match="name a workdir"):
    tiny(init_from=dict(weights="a", whole=True))
