"""Log-likelihoods of continuations are those that the model's logits give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.errors import UserError
from bigjax.infer import scoring
from bigjax.infer.decode import Generator
from bigjax.infer.scoring import Scorer
from bigjax.models import decoder

PAIRS = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9, 10]), ([3] * 17, [1, 2]), ([2, 4], [4, 4, 4]), ([1, 2, 3], [5])]


@pytest.fixture(scope="module")
def generator():
  module = decoder.make(vocab_size=14, context=24, width=16, depth=2, heads=4, mlp_dim=24, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(module)
  return Generator(lambda params: nnx.merge(graphdef, params), (jax.tree.map(lambda p: p * 8, params),))


def test_continuations_are_as_likely_as_their_tokens(generator, monkeypatch):
  found = Scorer(generator, batch_size=2).score(PAIRS)
  module = generator.bind(*generator.weights)
  for (context, after), score in zip(PAIRS, found):
    log_p = np.asarray(jax.nn.log_softmax(module(jnp.asarray([[*context, *after]]))))[0, len(context) - 1 : -1]
    each = log_p[np.arange(len(after)), after]
    np.testing.assert_allclose(score.tokens, each, atol=1e-5)
    assert score.log_likelihood == pytest.approx(each.sum(), abs=1e-4)
    assert score.greedy == (log_p.argmax(-1) == after).all()
  monkeypatch.setattr(scoring, "MOST_LOGITS", 2 * 14 * 5)  # A few positions at a time.
  again = Scorer(generator, batch_size=2).score(PAIRS)
  np.testing.assert_allclose([s.log_likelihood for s in again], [s.log_likelihood for s in found], atol=1e-5)


@pytest.mark.parametrize(
  ("pair", "said"),
  [(([], [1]), "context 0 is empty"), (([1], []), "continuation 0 is empty"), (([1] * 20, [1] * 5), "context is 24")],
)
def test_pairs_that_can_not_be_scored_are_refused(generator, pair, said):
  with pytest.raises(UserError, match=said):
    Scorer(generator).score([pair])


def test_logits_that_are_no_numbers_are_refused(generator):
  broken = Generator(generator.bind, (jax.tree.map(lambda p: p * np.nan, generator.weights[0]),))
  with pytest.raises(UserError, match="no numbers"):
    Scorer(broken).score(PAIRS)
