"""A pipeline computes what a scan over the layers does, whatever the stages, microbatches, repeats and other axes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import pipeline

DEPTH, BATCH, SEQ, WIDTH, HIDDEN = 8, 16, 6, 16, 32
SWAPPED = (1, 0, *range(2, DEPTH))


def layout(microbatches, repeats=1, **axes):
  count = int(np.prod(list(axes.values())))
  mesh = sharding.make_mesh(sorted(axes.items(), key=lambda a: sharding.AXES.index(a[0])), jax.devices()[:count])
  return sharding.Layout(mesh=mesh, microbatches=microbatches, repeats=repeats)


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
  blocks = {"up": normal(DEPTH, WIDTH, HIDDEN) / 2, "down": normal(DEPTH, HIDDEN, WIDTH) / 2}
  return blocks, 4 * normal(BATCH, SEQ, WIDTH), rng.integers(0, 3, (BATCH, SEQ)).astype(np.float32)


def layer(x, block, key, rate, *, kind):
  """Without an epsilon in its norm: activations of zeros would have no derivative."""
  h = x / jnp.sqrt((x * x).mean(-1, keepdims=True)) * (1 + kind[..., None])
  h = jnp.tanh(sharding.constrain(h @ block["up"], "batch", "seq", "hidden")) @ block["down"]
  return x + h, {"square": (h * h).sum(), "load": h.sum((0, 1))[:4]}


def scanned(layer, blocks, x, kind):
  return jax.lax.scan(lambda x, block: layer(x, block, None, None, kind=kind), x, blocks)


def grouped(blocks, repeats):
  return jax.tree.map(lambda a: a.reshape(repeats, -1, *a.shape[1:]) if repeats > 1 else a, blocks)


def piped(layout, layer, blocks, x, kind, **options):
  with sharding.use(layout):
    return pipeline.run(layer, grouped(blocks, layout.repeats), x, arrays={"kind": kind}, **options)


def evaluate(run, layer=layer):
  """Returns (value, (x, aux), gradients of blocks and x)."""

  def loss(blocks, x, kind):
    x, aux = run(layer, blocks, x, kind)
    return (x**2).mean() + 0.01 * aux["square"].sum() + 0.001 * (aux["load"] ** 2).sum(), (x, aux)

  (value, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*inputs())
  return jax.device_get((value, out, grads))


def assert_same(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


plain = functools.cache(lambda layer=layer: evaluate(scanned, layer))

LAYOUTS = {
  "PP2": layout(2, pipe=2),
  "PP2, twice the microbatches": layout(4, pipe=2),
  "PP4": layout(4, pipe=4),
  "PP4, twice the microbatches": layout(8, pipe=4),
  "PP8": layout(8, pipe=8),
  "PP2, 2 repeats": layout(2, 2, pipe=2),
  "PP2, 4 repeats, 4 times the microbatches": layout(8, 4, pipe=2),
  "PP4, 2 repeats": layout(4, 2, pipe=4),
  "PP4, 2 repeats, twice the microbatches": layout(8, 2, pipe=4),
  "PP2 x data 2 x tensor 2": layout(2, data=2, pipe=2, tensor=2),
  "PP2 x data 2 x tensor 2, 2 repeats, twice the microbatches": layout(4, 2, data=2, pipe=2, tensor=2),
  "PP2 x expert 2 x seq 2, 2 repeats": layout(2, 2, pipe=2, expert=2, seq=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pipeline_is_the_scan_over_layers_in_values_and_gradients(name):
  assert_same(evaluate(functools.partial(piped, LAYOUTS[name])), plain())


def test_two_layers_in_each_others_place_are_noticed():
  swapped = lambda layer, blocks, *rest: scanned(layer, jax.tree.map(lambda a: a[jnp.array(SWAPPED)], blocks), *rest)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    assert_same(evaluate(swapped), plain())


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(
  "options",
  [
    dict(policy=jax.checkpoint_policies.nothing_saveable),
    dict(policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    dict(remat_stages=True),
  ],
)
def test_what_is_computed_again_changes_nothing(repeats, options):
  options = dict(options)
  here = dataclasses.replace(layout(4, repeats, pipe=2), remat_stages=options.pop("remat_stages", False))
  assert_same(evaluate(functools.partial(piped, here, **options)), plain())


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("stages_only", [False, True])
def test_for_the_backward_pass_an_iteration_keeps_inputs_and_no_weights(repeats, stages_only):
  here = dataclasses.replace(layout(4, repeats, pipe=2), remat_stages=stages_only)
  options = dict(policy=jax.checkpoint_policies.nothing_saveable)
  run = lambda blocks, x, kind: piped(here, layer, blocks, x, kind, **options)[0]
  kept = jax.eval_shape(lambda blocks, x, kind: jax.vjp(lambda *a: run(*a, kind), blocks, x)[1], *inputs())
  iterations, inputs_a_stage = 4 * repeats + 1, 1 if stages_only else DEPTH // 2 // repeats
  each = [k.size // iterations for k in jax.tree.leaves(kept) if k.ndim > 3 and k.shape[0] == iterations]
  side = 2 * BATCH // 4 * SEQ  # What a stage sees of `kind`.
  assert sum(size for size in each if size > side) == 2 * inputs_a_stage * BATCH // 4 * SEQ * WIDTH


def test_explicit_communication_works_inside_a_stage():
  """As ring attention or the exchange between experts: a `shard_map` over all axes of the mesh, under the `vmap`."""

  def communicating(x, block, key, rate, *, kind):
    here = sharding.current()

    def mean(h):
      return h - jax.lax.pmean(h.mean(1, keepdims=True), here.axes("seq")) if here.size("seq") > 1 else h - h.mean(1)

    if here.size("seq") > 1:
      spec = here.spec("batch", "seq", None)
      x = jax.shard_map(mean, mesh=here.mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)
    else:
      x = x - x.mean(1, keepdims=True)
    return layer(x, block, key, rate, kind=kind)

  got = evaluate(functools.partial(piped, layout(4, 2, data=2, pipe=2, seq=2)), communicating)
  assert_same(got, plain(communicating))


def test_modules_are_blocks_too():
  make = nnx.vmap(lambda key: nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(key)))
  blocks, x = make(jax.random.split(jax.random.key(0), 4)), inputs()[1]
  step = lambda x, block, key, rate: (x + jnp.tanh(block(x)), {})
  want, _ = jax.lax.scan(lambda x, block: step(x, block, None, None), x, blocks)
  with sharding.use(layout(2, pipe=2)):
    got, aux = jax.jit(functools.partial(pipeline.run, step))(blocks, x)
  assert_same(got, want)
  assert aux == {}


def keep_rates(layout):
  """Which values each layer's dropout keeps, and the rate each layer is given, by what the layers add up to."""

  def step(x, block, key, rate):
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    return x + block * kept, {"rate": rate}

  # One bit a layer: layer l adds 2^l where it keeps.
  blocks = grouped(2.0 ** jnp.arange(DEPTH)[:, None, None, None], layout.repeats)
  keys = jax.random.split(jax.random.key(0), DEPTH)
  with sharding.use(layout):
    run = jax.jit(lambda blocks, x: pipeline.run(step, blocks, x, keys=keys, rates=jnp.arange(float(DEPTH))))
    x, aux = run(blocks, jnp.zeros((BATCH, SEQ, WIDTH)))
  bits = np.asarray(x, np.int64)[..., None] >> np.arange(DEPTH) & 1
  return np.moveaxis(bits, -1, 0), aux["rate"] / layout.microbatches


@pytest.mark.parametrize("repeats", [1, 2])
def test_masks_differ_by_layer_and_microbatch_and_rates_come_in_natural_order(repeats):
  bits, rates = keep_rates(layout(4, repeats, pipe=2))
  np.testing.assert_array_equal(rates, np.arange(DEPTH))
  by_microbatch = bits.reshape(DEPTH, BATCH // 4, 4, -1).swapaxes(1, 2).reshape(DEPTH * 4, -1)
  assert len(np.unique(by_microbatch, axis=0)) == DEPTH * 4
  assert abs(bits.mean() - 0.5) < 0.01


def test_masks_do_not_depend_on_stages_or_repeats():
  once, _ = keep_rates(layout(4, pipe=2))
  for other in (layout(4, pipe=4), layout(4, 2, pipe=2), layout(4, data=2, pipe=2)):
    np.testing.assert_array_equal(keep_rates(other)[0], once)


def compiled(layout):
  """The program for gradients of weights that are split into stages."""
  split = NamedSharding(layout.mesh, P(*[None] * (layout.repeats > 1), "pipe"))
  blocks, *rest = inputs()
  blocks = jax.device_put(grouped(blocks, layout.repeats), split)

  def loss(blocks, x, kind):
    with sharding.use(layout):
      x, _ = pipeline.run(layer, blocks, x, arrays={"kind": kind})
    return (x**2).mean()

  return jax.jit(jax.grad(loss), out_shardings=split).lower(blocks, *rest).compile().as_text()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  ("microbatches", "repeats"),
  [pytest.param(4, 1, marks=SLOW), pytest.param(8, 1, marks=SLOW), (4, 2), pytest.param(8, 2, marks=SLOW)],
)
def test_weights_stay_where_they_are_and_activations_go_to_the_next_stage_only(microbatches, repeats):
  text = compiled(layout(microbatches, repeats, pipe=4))
  found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
  shape = lambda dims: tuple(int(d) for d in dims.split(",") if d)
  moved = {shape(dims) for _, dims, kind in found if kind == "collective-permute"}
  assert moved == {(1, BATCH // microbatches, SEQ, WIDTH)}
  gathered = [int(np.prod(shape(dims))) for _, dims, kind in found if kind != "collective-permute"]
  # The result, and the gradient of `x` if it is asked for, are wanted by all; nothing else is, and not in the loop.
  assert [size for size in gathered if size > 1] in ([], [BATCH * SEQ * WIDTH])
  in_loop = [line for line in text.splitlines() if "while/body" in line and re.search(r" all-\w+\(", line)]
  assert in_loop == []


def test_the_program_does_not_grow_with_microbatches():
  def equations(microbatches):
    run = functools.partial(piped, layout(microbatches, pipe=2), layer)
    return len(str(jax.make_jaxpr(run)(*inputs())).splitlines())

  assert equations(4) == equations(16)


def test_a_bubble_is_the_idle_part_of_a_stages_time():
  assert pipeline.bubble(4, 4) == 3 / 7
  assert pipeline.bubble(4, 4, 4) == 3 / 19
  assert pipeline.bubble(1, 5) == 0


@pytest.mark.parametrize(
  ("depth", "batch", "where", "scanned", "words"),
  [
    (6, 16, layout(4, pipe=4), True, "6 layers can't be 4 stages x 1 repeats. Take 4 or 8 layers"),
    (8, 16, layout(2, 3, pipe=2), True, "Take 6 or 12 layers, or config.pipeline.repeats=1 or 2 or 4."),
    (8, 16, layout(6, pipe=4), True, "microbatches: 6 .* 4 stages .* Use 4 or 8"),
    (8, 16, layout(2, pipe=4), True, "microbatches: 2 .* Use 4"),
    (8, 10, layout(4, pipe=2), True, "10 examples in 4 microbatches .* Use 8 or 12"),
    (8, 4, layout(8, pipe=4), True, "are 0.5 each.* Use 8"),
    (8, 4, layout(4, data=2, pipe=4), True, "2 data-parallel devices .* Use 8"),
    (8, 16, layout(4, pipe=4), False, "Set scan=True"),
  ],
)
def test_what_can_not_be_split_is_refused_with_the_nearest_that_can(depth, batch, where, scanned, words):
  with pytest.raises(UserError, match=words):
    pipeline.check(depth, batch, where, scanned=scanned)
