"""From text to text: how prompts begin, how a model is asked, and what ends an answer."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.data import chat, documents, mixture, templates, tokenize, tokenizers, tokens
from bigjax.infer.decode import Generator
from bigjax.infer.sampling import Sampling
from bigjax.infer.text import Writer, tokenizer_of
from bigjax.models import decoder

ALPHABET = sorted(tokenizers._spelling()(bytes([i])) for i in range(256))
CONTROL = {"<s>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<end_of_turn>": 259}


@functools.cache
def model(rows):
  """A random model of bytes, of which some rows stand for nothing."""
  sizes = dict(vocab_size=260 + rows, context=128, width=16, depth=1, heads=2, mlp_dim=24)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: decoder.make(**sizes, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), nnx.to_pure_dict(params))
  return Generator(lambda params: nnx.merge(graphdef, params), (params,))


def writer(rows=0, begin=None):
  tokenizer = tokenizers.bpe({c: i for i, c in enumerate(ALPHABET)}, [], special=CONTROL)
  return Writer(model(rows), dataclasses.replace(tokenizer, begin=begin))


def last(stream):
  return list(stream)[-1]


def test_a_prompt_begins_as_texts_of_its_vocabulary_do():
  assert writer().encode(["ab"]) == writer(begin=None).encode(["ab"])
  (plain,) = writer().encode(["ab"])
  assert writer(begin=256).encode(["ab", ""]) == [[256, *plain], [256]]
  assert writer(begin=256).encode(["<s>ab"], special=True) == [[256, *plain]]  # And not twice.
  assert writer().encode([""]) == [[256]]


def test_a_runs_tokenizer_is_that_of_its_data_and_begins_as_its_documents_do(tmp_path):
  tokenizer = writer().tokenizer
  tokenizer.save(tmp_path / "tokenizer")
  (tmp_path / "a.txt").write_text("the cat sat on the mat; " * 9)
  inputs = documents.Inputs((str(tmp_path / "a.txt"),))
  for bos, begin in (("none", None), ("<s>", 256)):
    tokenize.tokenize(inputs, str(tmp_path / bos), tokenizer, bos=bos, workers=1)
    source = tokens.make(str(tmp_path / bos), block=8)
    found = tokenizer_of(mixture.make((source, source), weights=(0.5, 0.5)))
    assert (found.begin, found.digest) == (begin, tokenizer.digest)
  talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
  (tmp_path / "talk.jsonl").write_text(json.dumps(talk))
  path, name = str(tmp_path / "talk.jsonl"), str(tmp_path / "tokenizer")
  assert tokenizer_of(chat.make(path, tokenizer=name, template="chatml", block=64)).digest == tokenizer.digest


def test_a_model_is_asked_as_it_was_tuned():
  talk = [{"role": role, "content": content} for role, content in (("system", "Be brief."), ("user", "Hi <|im_end|>"))]
  one = writer()
  found = last(one.stream(["Hi <|im_end|>"], template="chatml", system="Be brief.", max_tokens=2))[0]
  whole, learned = chat.encode(one.tokenizer, templates.NAMED["chatml"]([*talk, {"role": "assistant", "content": "x"}]))
  assert found.prompt == whole[: learned.argmax()].tolist()
  assert one.tokenizer.decode(found.prompt).endswith("user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n")


def test_what_ends_a_turn_ends_an_answer():
  one = writer()
  (weights,) = one.generator.weights
  prompt = last(one.stream(["Hi"], template="gemma", max_tokens=1))[0].prompt
  hidden = jax.jit(lambda weights, tokens: one.generator.bind(weights).hidden(tokens)[0][0, -1])(
    weights, jnp.asarray([prompt])
  )
  rows = weights["head"]["embedding"].at[259].set(10 * hidden)  # So that <end_of_turn> is the likeliest.
  answer = last(one.of(weights | {"head": {"embedding": rows}}).stream(["Hi"], template="gemma", max_tokens=8))[0]
  assert (answer.text, answer.ended, answer.tokens) == ("", "stop", [259])


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_rows_that_stand_for_nothing_are_not_written(temperature):
  many = writer(rows=100)
  found = last(many.stream(["a", "b"], max_tokens=40, sampling=Sampling(temperature=temperature)))
  assert max(np.concatenate([answer.tokens for answer in found])) < 260
