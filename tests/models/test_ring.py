"""A split sequence: the ring and the all-to-all are the attention of one device, with the same work for everyone."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import attention, blockwise, masks, ring

BATCH, SEQ, HEADS, DIM = 4, 32, 4, 8
SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (BATCH, SEQ)), axis=1))
DROPPING = dict(dropout_rate=0.5, dropout_key=jax.random.key(0))
MASKS = {
  "full": {},
  "causal": dict(causal=True),
  "window": dict(window=5),
  "causal window": dict(causal=True, window=5),
  "packed": dict(causal=True, segments=SEGMENTS),
  "padded": dict(key_segments=SEGMENTS),
  "prefix": dict(causal=True, prefix=jnp.array([3, 20, 0, 32])),
  "positions": dict(causal=True, positions=jnp.arange(SEQ)[None] - 2),
  "softcap": dict(causal=True, softcap=2.0),
  "dropout": dict(causal=True, **DROPPING),
  "packed window": dict(causal=True, window=9, segments=SEGMENTS, softcap=3.0),
}


def layout(sequence="ring", **axes):
  devices = jax.devices()[: math.prod(axes.values())]
  return sharding.Layout(sharding.make_mesh(list(axes.items()), devices), sequence=sequence)


def arrays(kv_heads=2, seq=SEQ, batch=BATCH, dim=DIM):
  rng = np.random.default_rng(0)
  shapes = (batch, seq, HEADS, dim), (batch, seq, kv_heads, dim), (batch, seq, kv_heads, dim), (batch, seq, HEADS, dim)
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def outcome(given, where=None, attend=attention.attend, **arguments):
  """The result and the three gradients, compiled for a layout."""

  @jax.jit
  def run(*given):
    with sharding.use(where or sharding.Layout()):
      out, pull = jax.vjp(functools.partial(attend, **arguments), *given[:3])
      return (out, *pull(given[3]))

  return run(*given)


def errors(found, expected):
  """The largest difference of each array, relative to its largest value."""
  return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("mask", MASKS)
def test_the_ring_is_the_attention_of_one_device(mask):
  given = arrays()
  assert max(errors(outcome(given, layout(seq=4), **MASKS[mask]), outcome(given, **MASKS[mask]))) < 1e-5


@pytest.mark.parametrize(
  ("axes", "kv_heads", "mask"),
  [
    (dict(seq=2), 4, "packed window"),
    (dict(seq=8), 1, "causal"),
    (dict(data=2, seq=2, tensor=2), 2, "packed window"),
    (dict(data=2, seq=2, tensor=2), 2, "dropout"),
    (dict(replica=2, seq=2, tensor=2), 1, "causal"),
    (dict(seq=2, tensor=4), 2, "packed window"),
    (dict(data=2, expert=2, seq=2), 2, "packed"),
  ],
  ids=str,
)
def test_the_ring_composes_with_the_other_axes(axes, kv_heads, mask):
  given = arrays(kv_heads)
  assert max(errors(outcome(given, layout(**axes), **MASKS[mask]), outcome(given, **MASKS[mask]))) < 1e-5


@pytest.mark.parametrize(
  ("axes", "kv_heads", "mask"),
  [
    (dict(seq=4), 1, "causal window"),
    (dict(seq=4), 2, "packed"),
    (dict(seq=4), 2, "dropout"),
    (dict(seq=2), 4, "full"),
    (dict(data=2, seq=2, tensor=2), 2, "packed window"),
    (dict(data=2, seq=2, tensor=2), 1, "dropout"),
  ],
  ids=str,
)
def test_the_all_to_all_is_the_attention_of_one_device(axes, kv_heads, mask):
  given = arrays(kv_heads)
  found = outcome(given, layout("ulysses", **axes), **MASKS[mask])
  assert max(errors(found, outcome(given, **MASKS[mask]))) < 1e-5


@pytest.mark.parametrize("backend", ["chunked", "jax"])
def test_the_all_to_all_takes_any_backend(backend, monkeypatch):
  monkeypatch.setattr(blockwise, "block_size", lambda batch, heads: 8)
  given = arrays()
  found = outcome(given, layout("ulysses", data=2, seq=2), **MASKS["packed"], backend=backend)
  assert max(errors(found, outcome(given, **MASKS["packed"]))) < 1e-5


def test_blocks_within_a_chunk_change_nothing(monkeypatch):
  given = arrays()
  expected = outcome(given, **MASKS["packed window"])
  monkeypatch.setattr(blockwise, "block_size", lambda batch, heads: 2)  # Chunks of 8: four blocks each.
  assert max(errors(outcome(given, layout(seq=2), **MASKS["packed window"]), expected)) < 1e-5


def test_a_backend_over_a_mesh_without_a_split_sequence_is_that_of_one_device():
  given = arrays(kv_heads=1)
  where = layout(data=2, tensor=4)
  for mask in ("packed", "dropout"):
    expected = outcome(given, **MASKS[mask])
    assert max(errors(outcome(given, where, **MASKS[mask], backend="chunked"), expected)) < 1e-5
    assert max(errors(outcome(given, where, **MASKS[mask]), expected)) < 1e-5


@pytest.mark.parametrize("sequence", ["ring", "ulysses"])
def test_it_runs_within_a_pipeline_of_scanned_and_recomputed_layers(sequence):
  stages, layers = 2, 2
  given = arrays(kv_heads=2)
  rng = np.random.default_rng(2)
  scales = jnp.asarray(rng.uniform(0.5, 1.5, (stages, layers)), jnp.float32)
  batches = jnp.stack([given[0], given[3]])  # One microbatch in each stage.
  segments = jnp.stack([SEGMENTS, SEGMENTS[::-1]])

  def loss(scales, batches, over):
    @jax.checkpoint
    def layer(x, scale, segments):
      key = x[:, :, :2] * scale
      return x + attention.attend(x * scale, key, key, causal=True, segments=segments)

    def stage(x, scales, segments):
      return jax.lax.scan(lambda x, scale: (layer(x, scale, segments), None), x, scales)[0]

    return jnp.square(jax.vmap(stage, spmd_axis_name=over)(batches, scales, segments)).sum()

  def gradients(where, over):
    with sharding.use(where):
      return jax.jit(jax.value_and_grad(functools.partial(loss, over=over), argnums=(0, 1)))(scales, batches)

  value, found = gradients(layout(sequence, data=2, pipe=2, seq=2), "pipe")
  expected_value, expected = gradients(sharding.Layout(), None)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  assert max(errors(found, expected)) < 1e-5


def test_a_dropped_step_of_the_ring_is_noticed(monkeypatch):
  given = arrays()
  expected = outcome(given, causal=True)

  def without_the_last(tree, around):
    onward = [(d, (d + 1) % around.size) for d in range(around.size - 1)]  # The last device sends nothing.
    return jax.tree.map(lambda x: jax.lax.ppermute(x, around.axes, onward), tree)

  monkeypatch.setattr(ring, "rotate", without_the_last)
  assert min(errors(outcome(given, layout(seq=4), causal=True), expected)) > 1e-2


def test_balanced_order_gives_each_device_an_early_and_a_late_chunk():
  where = layout(data=2, seq=4)
  with sharding.use(where):
    positions = np.asarray(ring.positions(16))
    assert positions.reshape(4, 4).tolist() == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    x = jnp.arange(2 * 16 * 3).reshape(2, 16, 3)
    balanced = jax.jit(ring.balance)(x)
    assert (np.asarray(balanced) == np.asarray(x)[:, positions]).all()
    assert (np.asarray(jax.jit(ring.unbalance)(balanced)) == np.asarray(x)).all()
    late = jnp.swapaxes(x, 1, 2)
    assert (np.asarray(ring.balance(late, axis=2)) == np.asarray(late)[:, :, positions]).all()


@pytest.mark.parametrize("devices", [2, 3, 5, 8])
def test_unbalancing_undoes_balancing_on_any_number_of_devices(devices):
  x = jnp.arange(2 * devices)[None]
  with sharding.use(layout(seq=devices)):
    balanced = ring.balance(x)
    assert (np.asarray(balanced)[0] == np.asarray(ring.positions(2 * devices))).all()
    assert (np.asarray(ring.unbalance(balanced)) == np.asarray(x)).all()


@pytest.mark.parametrize("where", [sharding.Layout(), layout(data=2), layout("ulysses", seq=2)], ids=str)
def test_without_a_ring_the_order_is_the_natural_one(where):
  x = jnp.arange(12).reshape(2, 6)
  with sharding.use(where):
    assert ring.balance(x) is x
    assert ring.unbalance(x) is x
    assert np.asarray(ring.positions(6)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("mask", ["causal", "window", "packed window", "prefix"])
def test_a_model_in_balanced_order_gets_the_same(mask):
  def attend(query, key, value, *, segments=None, **arguments):
    query, key, value = map(ring.balance, (query, key, value))
    segments = None if segments is None else ring.balance(segments)
    return ring.unbalance(attention.attend(query, key, value, segments=segments, balanced=True, **arguments))

  given = arrays()
  found = outcome(given, layout(seq=4), attend, **MASKS[mask])
  assert max(errors(found, outcome(given, **MASKS[mask]))) < 1e-5


@pytest.mark.parametrize(("devices", "blocks"), [(2, 1), (4, 1), (4, 3), (8, 2)])
def test_causal_work_is_the_same_for_every_device_in_every_step_and_none_is_wasted(devices, blocks):
  """Pairs (block of queries, block of keys) by their place in the natural order, over all devices and steps."""
  plan = ring.Plan(masks.Rule(causal=True), ring.Ring(("seq",), devices), True, 2 * blocks, 2 * blocks)
  place = [np.asarray(ring._places(i, devices, 2 * blocks, np)) for i in range(devices)]
  visited, work = [], np.zeros((devices, devices), int)
  for device in range(devices):
    for step in range(devices):
      other = (device - step) % devices
      pairs = np.asarray(plan.pairs_away(other < device) if step else plan.pairs_at_home())
      work[device, step] = len(pairs)
      visited += [(place[device][i], place[other][j]) for i, j in pairs]
  count = 2 * blocks * devices
  assert sorted(visited) == [(i, j) for i in range(count) for j in range(i + 1)]
  assert (work == work[0]).all()
  assert (work[:, 1:] == 2 * blocks**2).all()  # Half of the 4 * blocks ** 2 pairs.


def test_the_compiled_causal_ring_takes_half_the_turns_of_the_full_one():
  given = arrays(seq=64, batch=1)

  def turns(**arguments):
    with sharding.use(layout(seq=8)):
      program = jax.make_jaxpr(functools.partial(attention.attend, **arguments))(*given[:3])
    return sorted(int(n) for n in re.findall(r"length=(\d+)", str(program)))

  # The six steps in the middle, and pairs at home, in each of those, and in the last. Causal pairs are a quarter as
  # large, so three of them at home are less than one, and two are half of one.
  assert turns(causal=True) == sorted([6, 3, 2, 2])
  assert turns() == sorted([6, 1, 1, 1])


def test_the_forward_pass_keeps_what_it_was_given_the_result_and_a_number_a_row():
  where = layout(seq=8)
  given = arrays(kv_heads=2, seq=64)

  def kept(*qkv):
    with sharding.use(where):
      return jax.vjp(functools.partial(attention.attend, causal=True, balanced=True), *qkv)[1]

  sizes = sum(x.size for x in jax.tree.leaves(jax.eval_shape(kept, *given[:3])))
  query, key, value, out = given
  rows = BATCH * 64 * HEADS
  tokens = 2 * 64
  assert sizes <= query.size + key.size + value.size + out.size + rows + tokens


def test_with_more_devices_the_memory_of_each_stays_the_same_where_gathering_keys_makes_it_grow():
  def gather_all(where, query, key, value):
    def local(query, key, value):
      key, value = (jax.lax.all_gather(x, "seq", axis=1, tiled=True) for x in (key, value))
      with sharding.use(sharding.Layout()):
        return attention.attend(query, key, value, backend="chunked")

    spec = where.spec(None, "seq", None, None)
    return jax.shard_map(local, mesh=where.mesh, in_specs=spec, out_specs=spec, check_vma=False)(query, key, value)

  def around(where, query, key, value):
    with sharding.use(where):
      return attention.attend(query, key, value)

  def peak(attend, devices):
    where = layout(seq=devices)
    split = jax.NamedSharding(where.mesh, where.spec(None, "seq", None, None))

    def run(*given):
      out, pull = jax.vjp(functools.partial(attend, where), *given[:3])
      return (out, *pull(given[3]))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(kv_heads=4, seq=64 * devices, batch=1, dim=64)]
    step = jax.jit(run, in_shardings=split, out_shardings=split).lower(*shapes).compile()
    return step.memory_analysis().temp_size_in_bytes

  assert peak(around, 8) < 1.05 * peak(around, 4)
  assert peak(gather_all, 8) > 1.5 * peak(gather_all, 4)


def test_one_query_is_left_to_the_compiler():
  query, key, value, out_gradient = arrays()
  given = (query[:, :1], key, value, out_gradient[:, :1])
  places = dict(causal=True, positions=jnp.full((1, 1), 20))
  assert max(errors(outcome(given, layout(seq=4), **places), outcome(given, **places))) < 1e-5


def test_key_heads_are_shared_by_the_parts_that_need_them():
  assert ring.shared_heads(8, 4, 2).tolist() == [[0, 1], [2, 3]]
  assert ring.shared_heads(8, 2, 4).tolist() == [[0], [0], [1], [1]]
  assert ring.shared_heads(12, 4, 6).tolist() == [[0, 0], [0, 1], [1, 1], [2, 2], [2, 3], [3, 3]]


@pytest.mark.parametrize(
  ("where", "seq", "arguments", "message"),
  [
    (layout(seq=4), 28, dict(causal=True), "sequence of 28 .*4 devices of axis seq hold 8 chunks.* 24 or 32"),
    (layout(seq=8), 28, {}, "sequence of 28 .*8 devices of axis seq. .*24 or 32"),
    (layout("ulysses", seq=8), SEQ, {}, "4 heads .* 8 of axis seq.* 8 heads could"),
    (layout(seq=2, tensor=3), SEQ, {}, "model.heads: 4 heads .*3 devices of tensor. 3 or 6 can"),
    (layout(data=3, seq=2), SEQ, {}, "config.batch_size: 4 examples .*3 devices of data. 3 or 6 can"),
    (layout(seq=2), SEQ, dict(backend="splash"), "'splash' does not go around a ring"),
  ],
)
def test_what_cannot_be_split_is_told_with_the_nearest_that_can(where, seq, arguments, message):
  *qkv, _ = arrays(seq=seq)
  with sharding.use(where), pytest.raises(UserError, match=message):
    attention.attend(*qkv, **arguments)
