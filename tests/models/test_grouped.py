"""Products by group against a loop, and rows picked with a backward pass that picks too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.models import grouped

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
  "sizes",
  [
    (3, 0, 5, 4),
    (12, 0, 0, 0),
    (0, 0, 0, 12),
    (0, 0, 0, 0),
    (3, 3, 3, 3),
    (1, 2, 3, 0),
    pytest.param((90, 1, 70, 300), marks=pytest.mark.slow),
  ],
)
def test_each_group_is_multiplied_by_its_own_kernel_forward_and_backward(sizes):
  rows, real = sum(sizes) + 5, sum(sizes)
  x = jnp.asarray(RNG.normal(size=(rows, 6)), jnp.float32)
  kernels = jnp.asarray(RNG.normal(size=(4, 6, 7)), jnp.float32)
  weight = jnp.where(jnp.arange(rows)[:, None] < real, jnp.asarray(RNG.normal(size=(rows, 7)), jnp.float32), 0)
  group = np.repeat(np.arange(4), sizes)

  def ours(x, kernels):
    return grouped.grouped_dot(x, kernels, jnp.asarray(sizes, jnp.int32))

  def loop(x, kernels):
    return jnp.stack([x[i] @ kernels[g] for i, g in enumerate(group)]) if real else jnp.zeros((0, 7))

  def gradient(f):
    return jax.grad(lambda x, k: (f(x, k) * weight[: len(f(x, k))]).sum(), (0, 1))(x, kernels)

  np.testing.assert_allclose(jax.jit(ours)(x, kernels)[:real], loop(x, kernels), rtol=1e-5, atol=1e-5)
  (to_rows, to_kernels), (rows_expected, kernels_expected) = gradient(ours), gradient(loop)
  np.testing.assert_allclose(to_rows[:real], rows_expected[:real], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(to_kernels, kernels_expected, rtol=1e-4, atol=1e-4)


def test_the_loop_of_cpus_and_the_ragged_product_of_accelerators_agree():
  sizes = jnp.asarray([9, 0, 14, 1], jnp.int32)
  x, g = (jnp.asarray(RNG.normal(size=(24, n)), jnp.float32) for n in (5, 3))
  kernels = jnp.asarray(RNG.normal(size=(4, 5, 3)), jnp.float32)
  np.testing.assert_allclose(
    grouped._dot(x, kernels, sizes), jax.lax.ragged_dot(x, kernels, sizes), rtol=1e-5, atol=1e-5
  )
  ours, theirs = grouped._outer_in_blocks(x, g, sizes), grouped._ragged_outer(x, g, sizes)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_groups_work_under_vmap_and_in_half_precision():
  sizes = jnp.asarray([[3, 1], [0, 4]], jnp.int32)
  x = jnp.asarray(RNG.normal(size=(2, 4, 8)), jnp.bfloat16)
  kernels = jnp.asarray(RNG.normal(size=(2, 2, 8, 8)), jnp.bfloat16)
  found = jax.jit(jax.vmap(grouped.grouped_dot))(x, kernels, sizes)
  assert found.dtype == jnp.bfloat16
  for i in range(2):
    expected = grouped.grouped_dot(*(a[i].astype(jnp.float32) for a in (x, kernels)), sizes[i])
    np.testing.assert_allclose(found[i].astype(jnp.float32), expected, rtol=0.02, atol=0.02)


def test_picked_rows_have_the_gradient_of_plain_indexing():
  x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
  index = jnp.asarray([2, 0, 3, 2])  # 3 is past the end: zeros.
  inverse = jnp.asarray([[1, 4], [4, 4], [0, 3]])  # 4 likewise.
  weight = jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)
  plain = lambda x: (jnp.concatenate([x, jnp.zeros((1, 4))])[index] * weight).sum()
  ours = lambda x: (grouped.pick(x, index, inverse) * weight).sum()
  np.testing.assert_allclose(ours(x), plain(x), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-6)
