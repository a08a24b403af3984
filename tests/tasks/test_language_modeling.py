"""Language modelling: sums over tokens, the shift, masks of tokens, padding that adds exactly nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.errors import UserError
from bigjax.tasks import language_modeling

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
TABLE = jnp.asarray(RNG.normal(size=(7, 7)), jnp.float32)


@dataclasses.dataclass
class Bigram:
  """Predicts the next token from this one alone."""

  table: jax.Array

  def __call__(self, tokens, *, key=None, train=False):
    return self.table[tokens]


def example_batch(n=6, time=5, padding=0):
  mask = np.ones(n, np.float32)
  mask[n - padding :] = 0
  return {"tokens": RNG.integers(0, 7, (n, time + 1)).astype(np.int32), "mask": mask}


def loss(task, batch, table=TABLE):
  return task.loss(Bigram(table), batch, key=KEY)


def log_likelihoods(tokens):
  log_p = np.asarray(TABLE) - np.log(np.exp(TABLE).sum(-1, keepdims=True))
  return log_p[tokens[:, :-1], tokens[:, 1:]]


def test_loss_is_the_mean_over_tokens_of_the_next_tokens_negative_log_likelihood():
  batch = example_batch()
  sums = loss(language_modeling.make(), batch)
  assert sums.weights["loss"] == 6 * 5
  np.testing.assert_allclose(sums.means()["loss"], -log_likelihoods(batch["tokens"]).mean(), rtol=1e-5)
  right = np.asarray(TABLE).argmax(-1)[batch["tokens"][:, :-1]] == batch["tokens"][:, 1:]
  np.testing.assert_allclose(sums.means()["accuracy"], right.mean(), rtol=1e-6)


def test_weights_are_numbers_of_unmasked_tokens():
  batch = example_batch(padding=2)
  batch["token_mask"] = RNG.integers(0, 2, (6, 6)).astype(np.float32)
  weight = batch["mask"][:, None] * batch["token_mask"][:, 1:]
  sums = loss(language_modeling.make(), batch)
  assert sums.weights["loss"] == weight.sum()
  np.testing.assert_allclose(sums.sums["loss"], -(weight * log_likelihoods(batch["tokens"])).sum(), rtol=1e-5)


def test_a_prompt_is_seen_and_not_predicted():
  tokens = np.asarray([[1, 2, 3, 4]], np.int32)
  batch = {"tokens": tokens, "mask": np.ones(1, np.float32), "token_mask": np.asarray([[0, 0, 0, 1]])}
  sums = loss(language_modeling.make(), batch)
  np.testing.assert_allclose(sums.sums["loss"], -log_likelihoods(tokens)[0, 2], rtol=1e-6)
  gradient = jax.grad(lambda table: loss(language_modeling.make(), batch, table).sums["loss"])(TABLE)
  assert np.flatnonzero(np.abs(gradient).sum(1)).tolist() == [3]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
@pytest.mark.parametrize("garbage", [-100, 7, 2**30])
def test_padding_adds_exactly_nothing_to_sums_and_gradients(options, garbage):
  task, batch = language_modeling.make(**options), example_batch(padding=2)
  batch["token_mask"] = np.ones((6, 6), np.float32)
  batch["token_mask"][0, 3] = 0
  spoilt = {k: v.copy() for k, v in batch.items()}
  spoilt["tokens"][4:] = garbage
  spoilt["token_mask"][4:] = np.nan
  gradient = lambda batch: jax.grad(lambda table: loss(task, batch, table).means()["loss"])(TABLE)
  jax.tree.map(np.testing.assert_array_equal, loss(task, batch), loss(task, spoilt))
  np.testing.assert_array_equal(gradient(batch), gradient(spoilt))
  short = {k: v[:4] for k, v in batch.items()}
  np.testing.assert_allclose(gradient(spoilt), gradient(short), rtol=1e-5, atol=1e-7)


def test_a_batch_in_parts_adds_up_although_the_parts_hold_unequal_numbers_of_tokens():
  batch = example_batch(padding=1)
  batch["token_mask"] = RNG.integers(0, 2, (6, 6))
  pieces = [loss(language_modeling.make(), {k: v[i::3] for k, v in batch.items()}) for i in range(3)]
  assert len({float(piece.weights["loss"]) for piece in pieces}) > 1
  whole = loss(language_modeling.make(), batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sum(pieces[1:], pieces[0]), whole)


def test_the_plain_likelihood_stands_beside_a_smoothed_loss():
  batch = example_batch()
  plain = loss(language_modeling.make(), batch).means()
  smooth = loss(language_modeling.make(label_smoothing=0.1, z_loss=1e-3), batch).means()
  assert smooth["nll"] == plain["loss"] != smooth["loss"]
  assert "nll" not in plain


def test_predict_tells_each_tokens_log_likelihood():
  batch = example_batch(padding=2)
  found = language_modeling.make().predict(Bigram(TABLE), batch)
  np.testing.assert_array_equal(found["target"][:4], batch["tokens"][:4, 1:])
  np.testing.assert_array_equal(found["weight"], np.repeat(batch["mask"][:, None], 5, 1))
  np.testing.assert_allclose(found["log_likelihood"][:4], log_likelihoods(batch["tokens"])[:4], rtol=1e-5)
  right = found["logits"].argmax(-1) == found["target"]
  np.testing.assert_array_equal(found["correct"], right)
  assert found["logits"].shape == (6, 5, 7)


def test_a_token_outside_the_vocabulary_shows_as_a_nan_loss():
  batch = example_batch()
  batch["tokens"][2, -1] = 7
  assert np.isnan(loss(language_modeling.make(), batch).means()["loss"])


@pytest.mark.parametrize(
  ("options", "batch", "message"),
  [
    ({"tokens": "token"}, {}, "no feature 'token'. Did you mean 'tokens'"),
    ({}, {"tokens": np.zeros((6, 1), np.int32)}, "two a row or more"),
    ({}, {"tokens": np.zeros((6, 5), np.float32)}, r"give integers"),
    ({}, {"token_mask": np.zeros((6, 5), np.int32)}, "mask of every token, the first too"),
  ],
)
def test_a_batch_that_does_not_fit_is_told_with_the_remedy(options, batch, message):
  with pytest.raises(UserError, match=r"^config\.task\.tokens") as error:
    loss(language_modeling.make(**options), example_batch() | batch)
  assert message in str(error.value)


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"z_loss": -1.0}])
def test_values_that_make_no_sense_are_refused_before_any_work(options):
  with pytest.raises(UserError, match=f"config.task.{next(iter(options))}"):
    language_modeling.make(**options)


@dataclasses.dataclass
class Embedded:
  """Hidden states from one table, logits from another."""

  table: jax.Array
  head: jax.Array

  def hidden(self, tokens, *, segments=None, key=None, train=False):
    penalties = {"surprise": 0.5 * self.table.sum()} if segments is not None else {}
    return self.table[tokens], penalties

  def unembed(self, hidden):
    return jnp.einsum("bsd,vd->bsv", hidden, self.head)

  def __call__(self, tokens, *, segments=None):
    return self.unembed(self.hidden(tokens)[0])


@pytest.mark.parametrize(
  "chunks", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(10, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "label_smoothing": 0.1}])
def test_a_loss_in_chunks_is_the_whole_one_with_its_gradient(chunks, options):
  batch = example_batch(time=10) | {"token_mask": RNG.integers(0, 2, (6, 11)).astype(np.float32)}
  tables = {"table": jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32), "head": TABLE[:, :4]}

  def value(tables, chunks):
    sums = language_modeling.make(loss_chunks=chunks, **options).loss(Embedded(**tables), batch, key=KEY)
    return 3.0 * sums.sums["loss"], sums

  whole, parts = (jax.jit(jax.grad(lambda t, c=c: value(t, c), has_aux=True))(tables) for c in (1, chunks))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), whole, parts)
  assert whole[1].sums.keys() == parts[1].sums.keys()
  np.testing.assert_allclose(value(tables, chunks)[0], value(tables, 1)[0], rtol=1e-6)  # Without a gradient too.


def test_logits_in_chunks_are_never_whole():
  batch = example_batch(time=10)
  tables = {"table": jnp.ones((7, 4)), "head": jnp.ones((7, 4))}

  def step(chunks):
    loss = lambda t: language_modeling.make(loss_chunks=chunks).loss(Embedded(**t), batch, key=KEY).sums["loss"]
    return str(jax.make_jaxpr(jax.grad(loss))(tables))

  assert "f32[6,10,7]" in step(1) and "f32[6,10,7]" not in step(5) and "f32[6,2,7]" in step(5)


def test_packed_documents_are_predicted_within_themselves_and_penalties_are_part_of_the_loss():
  batch = example_batch(n=1, time=6) | {"segments": np.array([[1, 1, 1, 2, 2, 0, 0]])}
  tables = {"table": jnp.ones((7, 4)), "head": TABLE[:, :4]}
  sums = language_modeling.make().loss(Embedded(**tables), batch, key=KEY)
  assert sums.weights["loss"] == 3  # 2 in the first, 1 in the second, none from padding.
  assert sums.sums["surprise"] == 14.0 and sums.weights["surprise"] == 3
  np.testing.assert_allclose(sums.sums["loss"], sums.sums["nll"] + 14, rtol=1e-6)
  predicted = language_modeling.make().predict(Embedded(**tables), batch)
  assert list(predicted["weight"][0]) == [1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
  ("module", "options", "extra", "words"),
  [
    (Embedded(jnp.ones((7, 4)), TABLE[:, :4]), {"loss_chunks": 3}, {}, "3 parts do not divide a sequence of 5; "),
    (Bigram(TABLE), {"loss_chunks": 5}, {}, "no hidden"),
    (Bigram(TABLE), {}, {"segments": np.ones((6, 6), int)}, "no hidden"),
  ],
)
def test_what_a_model_or_a_length_can_not_do_is_said(module, options, extra, words):
  with pytest.raises(UserError, match=words):
    language_modeling.make(**options).loss(module, example_batch() | extra, key=KEY)
