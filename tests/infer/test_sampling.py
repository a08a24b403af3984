"""Drawing tokens: what is left out is what a sort leaves out, and what is drawn is as likely as it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.errors import UserError
from bigjax.infer import sampling
from bigjax.infer.sampling import Sampling

LOGITS = np.random.default_rng(0).normal(0, 3, (5, 97)).astype(np.float32)


def left(how: Sampling) -> np.ndarray:
  return np.isfinite(jax.jit(sampling.kept, static_argnums=1)(jnp.asarray(LOGITS), how.on, how.numbers()))


def by_sorting(how: Sampling) -> np.ndarray:
  """What is left, as one would write it in NumPy."""
  found = np.zeros(LOGITS.shape, bool)
  for row, logits in zip(found, LOGITS.astype(np.float64)):
    order = np.argsort(-logits)[: how.top_k]
    share = np.exp(logits[order] - logits.max())
    share /= share.sum()
    if how.top_p is not None:
      order = order[: np.searchsorted(np.cumsum(share), how.top_p) + 1]
    if how.min_p is not None:
      order = order[share[: len(order)] >= how.min_p * share[0]]
    row[order] = True
  return found


@pytest.mark.parametrize(
  "how", [dict(top_k=1), dict(top_k=7), dict(top_p=0.3), dict(top_p=0.9), dict(min_p=0.1)]
  + [dict(top_k=9, top_p=0.8), dict(top_k=20, top_p=0.95, min_p=0.05), dict(top_k=1000)],
  ids=str,
)  # fmt: skip
@pytest.mark.parametrize("few", [sampling.FEW, 3])
def test_without_a_sort_the_same_tokens_are_left(how, few, monkeypatch):
  monkeypatch.setattr(sampling, "FEW", few)
  np.testing.assert_array_equal(left(Sampling(**how)), by_sorting(Sampling(**how)))


def test_what_is_left_of_a_row_does_not_depend_on_the_others(monkeypatch):
  monkeypatch.setattr(sampling, "FEW", 8)
  rows = np.random.default_rng(1).normal(0, 4, (300, 97)).astype(np.float32)
  for p in (0.5, 0.8, 0.95):
    how = Sampling(top_p=p)
    kept = jax.jit(lambda rows, how=how: sampling.kept(rows, how.on, how.numbers()))
    alone = np.concatenate([kept(row[None]) for row in rows])
    np.testing.assert_array_equal(kept(np.concatenate([rows, np.zeros((1, 97), np.float32)]))[:-1], alone)


def test_equally_likely_tokens_stay_together():
  logits = jnp.asarray([[0.0, 1.0, 1.0, 1.0]])
  how = Sampling(top_k=2)
  np.testing.assert_array_equal(np.isfinite(sampling.kept(logits, how.on, how.numbers())), [[False, True, True, True]])


def draw(logits, how, seed=0, seen=None):
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(logits)))
  return np.asarray(sampling.choose(jnp.asarray(logits), how.on, how.numbers(), keys, seen))


def test_temperature_0_takes_the_likeliest():
  np.testing.assert_array_equal(draw(LOGITS, sampling.GREEDY), LOGITS.argmax(axis=-1))
  odd = np.array([[1, 2, 2], [np.nan, 1, np.nan], [-np.inf] * 3, [0, np.inf, np.inf]], np.float32)
  np.testing.assert_array_equal(draw(odd, sampling.GREEDY), odd.argmax(axis=-1))


def test_tokens_are_drawn_as_often_as_they_are_likely():
  logits = np.tile(np.log([[0.5, 0.3, 0.15, 0.05]]).astype(np.float32), (20_000, 1))
  drawn = np.bincount(draw(logits, Sampling()), minlength=4) / 20_000
  np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.012)
  drawn = np.bincount(draw(logits, Sampling(temperature=0.5)), minlength=4) / 20_000
  np.testing.assert_allclose(drawn, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.012)
  assert set(draw(logits, Sampling(top_p=0.7))) == {0, 1}


def test_the_penalty_is_for_tokens_that_were_there():
  logits = np.array([[2.0, 1.9, -1.0], [-0.5, -0.6, -1.0]], np.float32)
  how = Sampling(temperature=0.0, repetition_penalty=1.5)
  seen = jnp.asarray([[True, False, False], [True, False, False]])
  np.testing.assert_array_equal(draw(logits, how, seen=seen), [1, 1])
  np.testing.assert_array_equal(draw(logits, how, seen=jnp.zeros((2, 3), bool)), [0, 0])


@pytest.mark.parametrize("how", [dict(), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.1), dict(temperature=0.0)])
def test_what_is_not_a_number_is_chosen(how):
  assert draw(np.array([[0.0, 1.0, np.nan, 3.0]], np.float32), Sampling(**how)) == 2


@pytest.mark.parametrize(
  "how", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=2.0)]
  + [dict(repetition_penalty=0.0)],
  ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(how):
  with pytest.raises(UserError, match=next(iter(how))):
    Sampling(**how)
