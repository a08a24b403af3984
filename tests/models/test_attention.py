"""Attention: every backend against NumPy, forward and backward, over the masks there are."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.errors import UserError
from bigjax.models import attention, blockwise, masks

BATCH, SEQ, HEADS, DIM = 2, 24, 4, 8
SEGMENTS = np.array([[1] * 9 + [2] * 11 + [0] * 4, [3] * 5 + [1] * 19])

# Words of `attend`, and what they mean.
MASKS = {
  "full": {},
  "causal": dict(causal=True),
  "window": dict(window=5),
  "causal window": dict(causal=True, window=5),
  "prefix": dict(causal=True, prefix=np.array([7, 0])),
  "prefix window": dict(causal=True, window=6, prefix=np.array([7, 20])),
  "packed": dict(causal=True, segments=SEGMENTS),
  "packed both ways": dict(segments=SEGMENTS),
  "padded keys": dict(key_segments=(SEGMENTS != 0).astype(int) * np.array([[1], [0]])),
  "positions": dict(causal=True, positions=np.arange(SEQ)[None] - 3, key_positions=np.arange(SEQ)[None]),
  "softcap": dict(causal=True, softcap=2.0),
  "scale": dict(scale=0.1),
}


def arrays(seq=SEQ, kv_heads=2, dtype=np.float32, batch=BATCH, heads=HEADS, dim=DIM):
  rng = np.random.default_rng(0)
  shapes = (batch, seq, heads, dim), (batch, seq, kv_heads, dim), (batch, seq, kv_heads, dim), (batch, seq, heads, dim)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def seen_by_hand(seq, *, causal=False, window=None, prefix=None, segments=None, key_segments=None, **places):
  """One example and one pair of positions after another."""
  key_segments = segments if key_segments is None else key_segments
  places = [np.broadcast_to(places.get(n, np.arange(seq)[None]), (BATCH, seq)) for n in ("positions", "key_positions")]
  seen = np.ones((BATCH, seq, seq), bool)
  for b, i, j in np.ndindex(seen.shape):
    q, k = places[0][b, i], places[1][b, j]
    seen[b, i, j] = (
      (not causal or k <= q or (prefix is not None and k < prefix[b]))
      and (window is None or abs(q - k) < window)
      and (key_segments is None or key_segments[b, j] != 0)
      and (segments is None or segments[b, i] == key_segments[b, j])
    )
  return seen


def by_hand(query, key, value, *, scale=None, softcap=None, **mask):
  """Softmax attention in float64, with keys and values repeated."""
  query, key, value = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (query, key, value))
  key, value = (x.repeat(query.shape[1] // x.shape[1], axis=1) for x in (key, value))
  scores = query @ key.swapaxes(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
  scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
  seen = seen_by_hand(query.shape[2], **mask)[:, None]
  weights = np.where(seen, np.exp(scores), 0)
  weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
  return (weights @ value).transpose(0, 2, 1, 3)


def outcome(query, key, value, out_gradient, **arguments):
  """The result and the three gradients."""

  @jax.jit
  def run(query, key, value, out_gradient):
    out, pull = jax.vjp(functools.partial(attention.attend, **arguments), query, key, value)
    return (out, *pull(out_gradient))

  return run(query, key, value, out_gradient)


def words(mask):
  return {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in mask.items()}


def assert_close(found, expected, at_most=1e-5):
  for a, b in zip(found, expected, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= at_most * max(np.abs(b).max(), 1e-3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_the_reference_is_softmax_attention(mask, kv_heads):
  *qkv, _ = arrays(kv_heads=kv_heads)
  found = attention.attend(*qkv, **words(MASKS[mask]), backend="reference")
  assert_close([found], [by_hand(*qkv, **MASKS[mask])])


@pytest.mark.parametrize("mask", MASKS)
def test_the_gradient_of_the_reference_is_that_of_the_softmax(mask):
  *qkv, out_gradient = arrays()
  query, key, value = qkv
  found = outcome(*qkv, out_gradient, **words(MASKS[mask]), backend="reference")[1:]
  rng = np.random.default_rng(1)
  for x, gradient in zip(qkv, found, strict=True):
    direction, size = rng.normal(size=x.shape), 1e-5
    moved = [
      [np.asarray(y, np.float64) + (sign * size * direction if y is x else 0) for y in (query, key, value)]
      for sign in (1, -1)
    ]
    difference = by_hand(*moved[0], **MASKS[mask]) - by_hand(*moved[1], **MASKS[mask])
    expected = (difference * np.asarray(out_gradient, np.float64)).sum() / (2 * size)
    np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_chunked_is_the_reference_forward_and_backward(mask, kv_heads, monkeypatch):
  monkeypatch.setattr(blockwise, "block_size", lambda batch, heads: 7)  # 24 tokens: four blocks of 6.
  given = arrays(kv_heads=kv_heads)
  mask = words(MASKS[mask])
  assert_close(outcome(*given, **mask, backend="chunked"), outcome(*given, **mask, backend="reference"))


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "positions"])
def test_unrolled_is_the_reference_forward_and_backward(mask, kv_heads, monkeypatch):
  monkeypatch.setattr(attention, "PART", 7)  # 24 tokens: 7, 7, 7 and 3.
  given = arrays(kv_heads=kv_heads)
  mask = words(MASKS[mask])
  assert_close(outcome(*given, **mask, backend="unrolled"), outcome(*given, **mask, backend="reference"))


def test_chunked_pads_a_length_that_nothing_divides(monkeypatch):
  monkeypatch.setattr(blockwise, "block_size", lambda batch, heads: 8)
  given = arrays(seq=23)
  for mask in ({}, dict(causal=True), dict(segments=jnp.asarray(SEGMENTS[:, :23]))):
    assert_close(outcome(*given, **mask, backend="chunked"), outcome(*given, **mask, backend="reference"))


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "softcap"])
def test_the_one_of_jax_is_the_reference(mask):
  given, mask = arrays(), words(MASKS[mask])
  assert_close(outcome(*given, **mask, backend="jax"), outcome(*given, **mask, backend="reference"))


LONG = np.repeat(SEGMENTS, 32, axis=1)[:, :256]


@pytest.mark.parametrize(
  "mask",
  [
    {},
    dict(causal=True),
    dict(window=40),
    dict(causal=True, window=200),
    dict(causal=True, segments=LONG),
    dict(key_segments=LONG),
    dict(causal=True, softcap=2.0),
  ],
  ids=lambda mask: " ".join(mask) or "full",
)
def test_splash_is_the_reference(mask):
  given = arrays(seq=256, heads=2, kv_heads=1)
  mask = words(mask)
  # Its exponentials are of bfloat16 products in no case, but its sums run in another order.
  assert_close(outcome(*given, **mask, backend="splash"), outcome(*given, **mask, backend="reference"), 2e-5)


@pytest.mark.parametrize("backend", ["reference", "unrolled", "chunked", "jax"])
def test_bfloat16_has_its_softmax_in_float32(backend):
  given = arrays(dtype=jnp.bfloat16)
  exact = outcome(*(x.astype(jnp.float32) for x in given), causal=True)
  found = outcome(*given, causal=True, backend=backend)
  assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
  assert_close(found, exact, 2e-2)


def test_values_may_have_another_size_than_keys(monkeypatch):
  monkeypatch.setattr(blockwise, "block_size", lambda batch, heads: 6)
  query, key, value, out_gradient = arrays()
  value, out_gradient = value[..., :5], out_gradient[..., :5]
  reference = outcome(query, key, value, out_gradient, causal=True, backend="reference")
  assert reference[0].shape == (BATCH, SEQ, HEADS, 5)
  assert_close(outcome(query, key, value, out_gradient, causal=True, backend="chunked"), reference)


@pytest.mark.parametrize("backend", ["reference", "unrolled", "chunked", "jax"])
def test_who_sees_nothing_gets_zero_and_so_do_its_gradients(backend):
  given = arrays()
  found = outcome(*given, key_segments=jnp.zeros((BATCH, SEQ), int), backend=backend)
  assert all((np.asarray(x) == 0).all() for x in found)


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
  query, key, _, _ = arrays(batch=1, seq=64, heads=1, kv_heads=1)
  value = jnp.eye(64)[None, :, None]  # The result is the weights.
  plain = np.asarray(attention.attend(0 * query, key, value))
  found = np.asarray(attention.attend(0 * query, key, value, dropout_rate=0.25, dropout_key=jax.random.key(0)))
  assert abs((found == 0).mean() - 0.25) < 0.02
  np.testing.assert_allclose(found[found != 0], plain[found != 0] / 0.75, rtol=1e-5)
  again = attention.attend(0 * query, key, value, dropout_rate=0.25, dropout_key=jax.random.key(1))
  assert ((found == 0) != (np.asarray(again) == 0)).mean() > 0.3


@pytest.mark.parametrize("backend", ["unrolled", "chunked"])
def test_dropout_drops_the_same_weights_in_every_backend(backend, monkeypatch):
  monkeypatch.setattr(blockwise, "block_size", lambda batch, heads: 7)
  monkeypatch.setattr(attention, "PART", 7)
  dropping = dict(causal=True, dropout_rate=0.5, dropout_key=jax.random.key(3))
  given = arrays()
  reference = outcome(*given, **dropping, backend="reference")
  assert np.abs(reference[0] - outcome(*given, causal=True)[0]).max() > 0.1
  assert_close(outcome(*given, **dropping, backend=backend), reference)


def test_memory_of_chunked_grows_with_the_sequence_and_that_of_the_reference_with_its_square():
  def peak(seq, backend):
    shapes = [jax.ShapeDtypeStruct((1, seq, 2, 16), jnp.float32)] * 4
    step = jax.jit(functools.partial(outcome, causal=True, backend=backend)).lower(*shapes).compile()
    return step.memory_analysis().temp_size_in_bytes

  sizes = (2048, 4096, 8192)
  chunked = [peak(seq, "chunked") for seq in sizes]
  reference = [peak(seq, "reference") for seq in sizes]
  assert chunked[2] - chunked[1] < 2.2 * (chunked[1] - chunked[0])
  assert reference[2] > 3.5 * reference[1]
  assert reference[2] > 15 * chunked[2]


def test_pairs_of_blocks_that_see_nothing_are_not_computed():
  starts = np.arange(4) * 6
  pairs = functools.partial(blockwise.pairs_in_order, query_starts=starts, key_starts=starts, sizes=(6, 6))
  assert len(pairs(masks.Rule())) == 16
  assert len(pairs(masks.Rule(causal=True))) == 10
  assert len(pairs(masks.Rule(causal=True), prefix=True)) == 16
  assert pairs(masks.Rule(causal=True, window=2)) == ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3))
  assert len(pairs(masks.Rule(window=7))) == 10


def products(qkv, **arguments):
  """Of the program, and whether some are in a loop."""
  program = str(jax.make_jaxpr(lambda *qkv: attention.attend(*qkv, **arguments))(*qkv))
  return program.count("dot_general["), "scan[" in program


def is_in_blocks(qkv, **arguments):
  return products(qkv, **arguments)[1]


def test_auto_is_the_reference_until_the_scores_are_too_many(monkeypatch):
  *qkv, _ = arrays()
  scores = BATCH * HEADS * SEQ * SEQ
  for limit, in_blocks in ((scores, False), (scores - 1, True)):
    monkeypatch.setattr(attention, "MOST_SCORES", limit)
    assert is_in_blocks(qkv) == in_blocks


def test_auto_on_a_cpu_takes_blocks_where_many_see_nothing(monkeypatch):
  *qkv, _ = arrays(seq=256)
  whole, unrolled, looped = (2, False), (8, False), (2, True)
  assert products(qkv, causal=True) == unrolled
  assert products(qkv, window=8) == unrolled
  assert products(qkv) == whole
  assert products(qkv, causal=True, prefix=jnp.array([1, 2])) == whole
  assert products([x[:, :100] for x in qkv], causal=True) == whole
  assert products(arrays(seq=1024)[:3], causal=True) == (16, False)
  monkeypatch.setattr(attention, "MOST_UNROLLED", BATCH * HEADS * 256**2 - 1)
  assert products(qkv, causal=True) == looped


def test_unrolled_computes_no_scores_that_nobody_sees():
  def sizes(**mask):
    *qkv, _ = arrays(seq=256)
    program = jax.make_jaxpr(lambda *qkv: attention.attend(*qkv, **mask, backend="unrolled"))(*qkv)
    return [int(x) for x in re.findall(r"f32\[2,2,128,(\d+)\] = dot_general", str(program))][::2]

  assert sizes(causal=True) == [64, 128, 192, 256]
  assert sizes(causal=True, window=10) == [64, 73, 73, 73]
  assert sizes(window=10) == [73, 82, 82, 73]
  assert sizes(causal=True, prefix=jnp.array([1, 2])) == [256] * 4


@pytest.mark.parametrize(
  ("batch", "heads", "on", "size"),
  [(16, 6, "cpu", 64), (4, 6, "cpu", 128), (1, 2, "cpu", 512), (16, 6, "tpu", 256), (1, 8, "gpu", 1024)],
)
def test_a_block_is_as_large_as_its_scores_may_be(batch, heads, on, size, monkeypatch):
  monkeypatch.setattr(blockwise, "platform", lambda: on)
  assert blockwise.block_size(batch, heads) == size


@pytest.mark.parametrize(
  ("mask", "kernel"),
  [
    (dict(causal=True), True),
    (dict(causal=True, window=300, softcap=30.0), True),
    (dict(), True),
    (dict(causal=True, dropout_rate=0.1, dropout_key=jax.random.key(0)), False),
  ],
  ids=lambda mask: " ".join(mask) if isinstance(mask, dict) else str(mask),
)
def test_auto_on_a_tpu_is_splash_where_it_can_and_its_kernel_compiles_to_one_call(mask, kernel, monkeypatch):
  monkeypatch.setattr(blockwise, "platform", lambda: "tpu")
  given = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays(seq=512, dim=64)]

  def run(query, key, value, out_gradient):
    out, pull = jax.vjp(functools.partial(attention.attend, **mask), query, key, value)
    return (out, *pull(out_gradient))

  program = jax.export.export(jax.jit(run), platforms=["tpu"])(*given).mlir_module()
  assert ("tpu_custom_call" in program) == kernel


def test_a_backend_says_what_it_cannot_do():
  *qkv, _ = arrays()
  dropping = dict(dropout_rate=0.1, dropout_key=jax.random.key(0))
  for backend, arguments, words in [
    ("jax", dict(softcap=2.0), "soft-capping"),
    ("jax", dropping, "dropout"),
    ("splash", dropping, "dropout"),
    ("splash", dict(causal=True, prefix=jnp.array([1, 2])), "prefix"),
    ("splash", dict(positions=jnp.arange(SEQ)[None]), "positions"),
    ("splash", {}, "a length of 24, which 128 does not divide"),
  ]:
    with pytest.raises(UserError, match=f"model.attention: '{backend}' can't do .*{words}"):
      attention.attend(*qkv, **arguments, backend=backend)


def test_wrong_arguments_are_told_with_the_nearest_that_work():
  query, key, value, _ = arrays()
  with pytest.raises(UserError, match="model.kv_heads: 2 does not divide 3 heads"):
    attention.attend(query[:, :, :3], key, value)
  with pytest.raises(UserError, match="Did you mean 'splash'"):
    attention.attend(query, key, value, backend="splas")
  with pytest.raises(UserError, match="model.window: 0"):
    attention.attend(query, key, value, window=0)
