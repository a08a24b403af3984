"""Vectors of texts: means of an encoder's last layer, whatever else is in the batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as lib

from bigjax import main, weights
from bigjax import state as states
from bigjax.data import tokenizers
from bigjax.errors import UserError
from bigjax.infer.embed import Embedder
from bigjax.models import bert, gpt

NAMES = ["[PAD]", "[CLS]", "[SEP]", "a", "man", "is", "eating", "food", "bread", "."]
OPTIONS = dict(vocab_size=10, context=12, width=16, depth=2, heads=2, mlp_dim=24)
TEXTS = ["a man", "a man is eating food .", "bread", "a man is eating a man ."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Published weights of a small encoder, with its tokenizer."""
  path = str(tmp_path_factory.mktemp("published") / "bert")
  model = states.Model(lambda rngs: bert.make(**OPTIONS, rngs=rngs))
  rng = np.random.default_rng(0)
  params, extras = model.abstract
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), params)
  weights.save(path, bert.Options(**OPTIONS), params, extras)
  tokenizer = lib.Tokenizer(lib.models.WordPiece({name: i for i, name in enumerate(NAMES)}, unk_token="[PAD]"))
  tokenizer.pre_tokenizer = lib.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(NAMES[:3])
  tokenizer.save(f"{path}/tokenizer.json")
  return path, model, params, extras


@pytest.fixture(scope="module")
def embedder(folder):
  path, model, params, extras = folder
  return Embedder(model.bind, (params, extras), tokenizers.load(path), batch_size=2)


def test_a_vector_is_the_mean_over_the_tokens_of_its_text_alone(embedder):
  found = embedder.embed(TEXTS)
  hidden = jax.jit(lambda tokens: embedder.bind(*embedder.weights).hidden(tokens)[0][0])
  for text, vector in zip(TEXTS, found, strict=True):
    tokens = [NAMES.index(word) for word in ("[CLS]", *text.split(), "[SEP]")]
    mean = np.asarray(hidden(jnp.asarray([tokens]))).mean(axis=0)
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_the_command_prints_cosines_or_vectors(folder, embedder, capsys):
  flags = ["embed", f"--weights={folder[0]}", "--compile_cache=none", f"--text={TEXTS[1]}", f"--text={TEXTS[3]}"]
  assert main.main([*flags, "--json"]) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  np.testing.assert_allclose([row["vector"] for row in rows], embedder.embed([TEXTS[1], TEXTS[3]]), atol=1e-5)
  assert main.main(flags) == 0
  cosine = np.dot(*[row["vector"] for row in rows])
  assert f"{cosine:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_what_has_no_vector_is_refused(folder, embedder):
  with pytest.raises(UserError, match="text 1 has 14 tokens, and the model's context is 12"):
    embedder.embed(["a", "a " * 12])
  with pytest.raises(UserError, match="no numbers"):
    Embedder(embedder.bind, jax.tree.map(lambda x: x * np.nan, embedder.weights), embedder.tokenizer).embed(["a"])
  model = states.Model(lambda rngs: gpt.make(vocab_size=10, context=8, width=8, depth=1, heads=1, rngs=rngs))
  with pytest.raises(UserError, match="GPT has no vectors of texts. Take bert"):
    Embedder(model.bind, model.abstract, embedder.tokenizer).embed(["a"])
  other = tokenizers.load("byte")
  with pytest.raises(UserError, match="the model has 10 tokens and the tokenizer"):
    Embedder(embedder.bind, embedder.weights, other).embed(["a"])
