"""The first state is made where it is to lie: a device has its share of it at any time, and never all of it."""

import functools
import math

import jax
import pytest

from bigjax import config as configs
from bigjax import experiment, sharding
from bigjax import state as states

GPT = dict(name="gpt", vocab_size=512, context=32, width=128, depth=4, heads=4)
RESNET = dict(name="resnet", stages=(2, 2), width=64, num_classes=8, stem="small", bottleneck=False)
MODELS = {"gpt": GPT, "gpt, scanned": GPT | dict(scan=True), "resnet": RESNET}


def built(model, devices):
  tokens = dict(name="synthetic", kind="tokens", num_examples=64, length=32, vocab_size=512)
  images = dict(name="synthetic", num_examples=64, shape=(8, 8, 3), num_classes=8)
  is_gpt = model["name"] == "gpt"
  config = dict(
    total_steps=2,
    batch_size=8,
    data=dict(source=tokens if is_gpt else images),
    model=model,
    task=dict(name="language_modeling" if is_gpt else "classification"),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=1e-3),
    ema=0.9,
    mesh=(("data", devices),),
    sharding="fsdp",
  )
  return experiment.build(configs.resolve(config, experiment.TrainConfig), jax.devices()[:devices])


def memory(run):
  create = functools.partial(states.create, model=run.model, tx=run.optimizer.tx)
  with sharding.use(run.division.inside):
    jitted = run.division.jit_init(create, out_shardings=run.shardings)
    return jitted.lower(jax.random.key(0)).compile().memory_analysis()


@pytest.mark.parametrize("model", MODELS)
def test_initialisation_takes_an_eighth_of_the_memory_on_each_of_eight_devices(model):
  alone, shared = built(MODELS[model], 1), built(MODELS[model], 8)
  one, eight = memory(alone), memory(shared)
  leaves = list(zip(jax.tree.leaves(shared.abstract), jax.tree.leaves(shared.shardings), strict=True))
  # What is not split: leaves of fewer than 1024 elements, and the tuple of pointers to all leaves.
  whole = sum(math.prod(x.shape) * x.dtype.itemsize for x, s in leaves if not any(s.spec)) + 16 * len(leaves)
  assert whole < 0.07 * one.output_size_in_bytes / 8
  assert eight.output_size_in_bytes <= one.output_size_in_bytes / 8 + whole
  assert eight.temp_size_in_bytes <= one.temp_size_in_bytes / 8 * 1.05
  # Temporaries are of the parameters alone: optimizer moments and averages are made in place.
  params = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shared.abstract.params))
  assert eight.temp_size_in_bytes < 4 * params / 8


def test_what_a_device_holds_of_the_first_state_is_what_its_layout_says():
  run = built(GPT, 8)
  state = run.init(jax.random.key(0))
  layouts = zip(jax.tree.leaves(run.abstract), jax.tree.leaves(run.shardings), strict=True)
  expected = sum(sharding.bytes_a_device(x, s) for x, s in layouts)
  for device in jax.devices():
    assert expected == sum(
      s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == device
    )
