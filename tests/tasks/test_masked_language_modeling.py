"""Masked language modelling: what is hidden counts and nothing else, and a small BERT learns to fill it in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers as lib

import bigjax
from bigjax import state as states
from bigjax.data import documents, ops, order, tokenize, tokenizers, tokens
from bigjax.errors import UserError
from bigjax.evaluators import perplexity
from bigjax.models import bert
from bigjax.tasks import masked_language_modeling

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
TABLE = jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32)


@dataclasses.dataclass
class Embedded:
  """Hidden states from one table, logits from another; penalised where texts are packed."""

  table: jax.Array
  head: jax.Array

  def hidden(self, tokens, *, segments=None, key=None, train=False):
    return self.table[tokens], {} if segments is None else {"surprise": 0.5 * self.table.sum()}

  def unembed(self, hidden):
    return jnp.einsum("bsd,vd->bsv", hidden, self.head)

  def __call__(self, tokens, *, segments=None):
    return self.unembed(self.table[tokens])


MODULE = Embedded(TABLE, HEAD)


def example_batch(n=6, time=8, padding=0):
  mask = np.ones(n, np.float32)
  mask[n - padding :] = 0
  tokens, target = RNG.integers(0, 7, (2, n, time)).astype(np.int32)
  return {"tokens": tokens, "target": target, "token_mask": RNG.integers(0, 2, (n, time)).astype(np.float32)} | {
    "mask": mask
  }


def loss(batch, module=MODULE, **options):
  return masked_language_modeling.make(**options).loss(module, batch, key=KEY)


def log_likelihoods(batch):
  logits = np.asarray(TABLE)[batch["tokens"]] @ np.asarray(HEAD).T
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.take_along_axis(log_p, batch["target"][..., None], axis=-1)[..., 0], logits.argmax(-1) == batch["target"]


def test_loss_is_the_mean_over_what_is_hidden_at_its_own_position():
  batch = example_batch(padding=2)
  weight = batch["mask"][:, None] * batch["token_mask"]
  sums = loss(batch)
  likelihood, right = log_likelihoods(batch)
  assert sums.weights["loss"] == weight.sum()
  np.testing.assert_allclose(sums.sums["loss"], -(weight * likelihood).sum(), rtol=1e-5)
  np.testing.assert_allclose(sums.sums["accuracy"], (weight * right).sum())


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "label_smoothing": 0.1, "loss_chunks": 4}])
def test_what_is_not_hidden_adds_exactly_nothing(options):
  batch = example_batch(padding=2)
  spoilt = {name: values.copy() for name, values in batch.items()}
  spoilt["target"][batch["token_mask"] == 0] = -100
  spoilt["tokens"][4:], spoilt["target"][4:], spoilt["token_mask"][4:] = -100, 2**30, np.nan
  gradient = lambda batch: jax.grad(lambda t: loss(batch, Embedded(t, HEAD), **options).means()["loss"])(TABLE)
  jax.tree.map(np.testing.assert_array_equal, loss(batch, **options), loss(spoilt, **options))
  np.testing.assert_array_equal(gradient(batch), gradient(spoilt))


def test_a_loss_in_chunks_is_the_whole_one_and_the_likelihood_stands_beside_it():
  batch = example_batch()
  whole, parts = (loss(batch, z_loss=1e-2, loss_chunks=n) for n in (1, 4))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)
  np.testing.assert_allclose(whole.sums["nll"], loss(batch).sums["loss"], rtol=1e-6)


def test_padding_of_packed_texts_is_not_predicted_and_penalties_are_part_of_the_loss():
  batch = example_batch(n=1) | {"token_mask": np.ones((1, 8)), "segments": np.array([[1, 1, 1, 2, 2, 2, 0, 0]])}
  sums = loss(batch)
  assert sums.weights["loss"] == 6
  np.testing.assert_allclose(sums.sums["loss"], sums.sums["nll"] + 0.5 * TABLE.sum(), rtol=1e-5)


def test_the_perplexity_evaluator_measures_what_is_hidden():
  batch = example_batch(padding=1)
  predict = lambda state, batch: masked_language_modeling.make().predict(Embedded(state, HEAD), batch)
  found = dict(perplexity.make(predict, lambda: [batch]).run(TABLE))
  weight = batch["mask"][:, None] * batch["token_mask"]
  likelihood, right = log_likelihoods(batch)
  assert found["loss"] == pytest.approx(-np.average(likelihood, weights=weight), rel=1e-5)
  assert found["accuracy"] == pytest.approx(np.average(right, weights=weight), rel=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(token_mask=None), r"no feature 'token_mask', .* Put mask_tokens\(...\) into preprocess"),
    (dict(target=None), r"no feature 'target'"),
    (dict(tokens=np.zeros((6, 8), np.float32)), "give integers"),
    (dict(token_mask=np.zeros((6, 7), np.float32)), r"'token_mask' has shape \(6, 7\) and 'tokens' \(6, 8\)"),
  ],
)
def test_a_batch_that_does_not_fit_is_told_with_the_remedy(changes, message):
  batch = {name: values for name, values in (example_batch() | changes).items() if values is not None}
  with pytest.raises(UserError, match=message):
    loss(batch)


def test_hidden_tokens_outside_the_vocabulary_are_told():
  outputs = {"logits": jax.ShapeDtypeStruct((6, 8, 7), jnp.float32)}
  batch = example_batch()
  batch["target"][batch["token_mask"] == 0] = -100
  masked_language_modeling.make().check(batch, outputs)
  batch["target"][0, 0], batch["token_mask"][0, 0] = 7, 1
  with pytest.raises(UserError, match="'target' holds 7, but the model tells 7 classes apart"):
    masked_language_modeling.make().check(batch, outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tokenizer, and a store of sentences in which each word can be told from the others."""
  folder = tmp_path_factory.mktemp("masked")
  sentences = ["the cat sat on a mat .", "the dog lay by a rug .", "the hen ran to a barn ."]
  names = ["[PAD]", "[MASK]", *sorted({word for sentence in sentences for word in sentence.split()})]
  tokenizer = lib.Tokenizer(lib.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[PAD]"))
  tokenizer.pre_tokenizer = lib.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(["[PAD]", "[MASK]"])
  tokenizer.save(str(folder / "tokenizer.json"))
  lines = (json.dumps({"text": sentences[i]}) for i in RNG.integers(0, 3, 400))
  (folder / "text.jsonl").write_text("\n".join(lines))
  inputs = documents.Inputs((str(folder / "text.jsonl"),))
  tokenize.tokenize(inputs, str(folder / "store"), tokenizers.load(str(folder)), workers=1)
  return str(folder)


ENCODER = dict(vocab_size=17, context=21, width=32, depth=1, heads=2, mlp_dim=64)


@pytest.mark.slow
def test_a_small_bert_learns_to_fill_in(folder):
  source = tokens.make(f"{folder}/store", block=20, documents="packed")
  (op,) = ops.parse(f"mask_tokens({folder!r}, 0.2)")
  task, tx = masked_language_modeling.make(), optax.adam(1e-2)
  model = states.Model(lambda rngs: bert.make(**ENCODER, rngs=rngs))
  params, extras = jax.jit(model.init)(KEY)

  def batch(step):
    ids = np.arange(16 * step, 16 * step + 16) % len(source)
    keys = order.example_keys(0, np.full(16, step), ids)
    return op.apply(source.fetch(ids) | {"mask": np.ones(16, np.float32)}, keys)

  @jax.jit
  def update(params, opt_state, batch):
    loss = lambda params: task.loss(model.bind(params, extras), batch, key=KEY).means()
    gradient, found = jax.grad(lambda params: (loss(params)["loss"], loss(params)), has_aux=True)(params)
    updates, opt_state = tx.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, found["accuracy"]

  opt_state, accuracy = tx.init(params), []
  for step in range(100):
    params, opt_state, now = update(params, opt_state, batch(step))
    accuracy.append(float(now))
  assert np.mean(accuracy[-10:]) > 0.9  # The likeliest word, "the", is one in seven.


@pytest.mark.slow
def test_a_run_learns_to_fill_in(folder, tmp_path):
  data = lambda split: dict(
    source=dict(name="tokens", path=f"{folder}/store", block=20, documents="packed", split=split),
    preprocess=f"mask_tokens({folder!r}, 0.2)",
  )
  config = dict(
    total_steps=80,
    batch_size=16,
    data=data("[:80%]"),
    model=dict(name="bert", **ENCODER),
    task=dict(name="masked_language_modeling", loss_chunks=3),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=1e-2),
    evals=dict(test=dict(evaluator=dict(name="perplexity"), data=data("[80%:]"), every="100%")),
    writers=("jsonl",),
  )
  bigjax.run(config, str(tmp_path))
  assert bigjax.read_metrics(str(tmp_path))["test/accuracy"][-1][1] > 0.9
