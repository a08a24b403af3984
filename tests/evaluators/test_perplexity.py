"""The perplexity evaluator on a bigram model whose likelihood NumPy tells."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bigjax.errors import UserError
from bigjax.evaluators import perplexity
from bigjax.tasks import language_modeling

RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(7, 7)), jnp.float32)
TOKENS = RNG.integers(0, 7, (20, 6)).astype(np.int32)
TOKEN_MASK = RNG.integers(0, 2, (20, 6)).astype(np.float32)


@dataclasses.dataclass
class Bigram:
  table: jax.Array

  def __call__(self, tokens, *, key=None, train=False):
    return self.table[tokens]


def predict(state, batch):
  return language_modeling.make().predict(Bigram(state), batch)


def filled(x, size, value):
  return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), value, x.dtype)])


def split(tokens=TOKENS, size=8, token_mask=None):
  def batches():
    for i in range(0, len(tokens), size):
      rows = tokens[i : i + size]
      batch = {"tokens": filled(rows, size, 99), "mask": filled(np.ones(len(rows), np.float32), size, 0)}
      if token_mask is not None:
        batch["token_mask"] = filled(token_mask[i : i + size], size, np.nan)
      yield batch

  return batches


def measure(batches, state=TABLE, **options):
  return dict(perplexity.make(predict, batches, **options).run(state))


def expected(tokens=TOKENS, weight=None, bytes_per_token=2.5):
  table = np.asarray(TABLE, np.float64)
  log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
  loss = -np.average(log_p[tokens[:, :-1], tokens[:, 1:]], weights=weight)
  right = np.average(table.argmax(-1)[tokens[:, :-1]] == tokens[:, 1:], weights=weight)
  bits = loss / math.log(2)
  return {
    "loss": loss,
    "perplexity": math.exp(loss),
    "bits_per_token": bits,
    "bits_per_byte": bits / bytes_per_token,
    "accuracy": right,
  }


@pytest.mark.parametrize("size", [1, 8, 20, 32])
def test_measures_equal_numpys_whatever_the_batches_and_the_padding(size):
  found = measure(split(size=size), bytes_per_token=2.5)
  assert found == pytest.approx(expected(), rel=1e-5)
  assert {type(v) for v in found.values()} == {float}


def test_tokens_count_and_not_rows_where_some_are_masked():
  found = measure(split(token_mask=TOKEN_MASK), bytes_per_token=2.5)
  assert found == pytest.approx(expected(weight=TOKEN_MASK[:, 1:]), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity():
  found = measure(split(), jnp.zeros((7, 7)), bytes_per_token=1.0)
  assert found["perplexity"] == pytest.approx(7, rel=1e-6)
  assert found["bits_per_byte"] == found["bits_per_token"] == pytest.approx(math.log2(7), rel=1e-6)


def test_bits_per_byte_are_not_told_where_nobody_knows_the_bytes():
  assert "bits_per_byte" not in measure(split())


def test_hopeless_and_diverged_models_have_numbers_too():
  certain_of_0 = jnp.zeros((7, 7)).at[:, 0].set(1e5)
  assert measure(split(), certain_of_0)["perplexity"] == math.inf
  assert math.isnan(measure(split(), jnp.full((7, 7), jnp.nan))["perplexity"])


def test_eight_devices_measure_what_one_does():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  found = measure(lambda: (put(batch, "data") for batch in split()()), put(TABLE))
  assert found == pytest.approx(measure(split()), rel=1e-6)


def test_tokens_outside_the_vocabulary_are_counted_and_told():
  tokens = TOKENS.copy()
  tokens[[1, 12], 3] = [7, -1]
  with pytest.raises(UserError, match="2 of the values of 'tokens' lie outside the model's vocabulary"):
    measure(split(tokens))


def test_what_makes_no_sense_is_refused():
  with pytest.raises(UserError, match="bytes_per_token"):
    measure(split(), bytes_per_token=0.0)
  with pytest.raises(UserError, match="holds no example"):
    measure(split(TOKENS[:0]))
  with pytest.raises(UserError, match="holds no example"):
    measure(split(token_mask=np.zeros_like(TOKEN_MASK)))
  only_logits = lambda state, batch: {"logits": state[batch["tokens"]]}
  with pytest.raises(UserError, match="'weight' is not there"):
    dict(perplexity.make(only_logits, split()).run(TABLE))


def test_runs_of_new_states_compile_once():
  traces = []
  counted = lambda state, batch: traces.append(1) or predict(state, batch)
  evaluator = perplexity.make(counted, split())
  assert len({dict(evaluator.run(TABLE * s))["loss"] for s in (1.0, 2.0, 3.0)}) == 3
  assert len(traces) == 1
