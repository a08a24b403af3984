"""Generating gives what going through the whole sequence for each token gives, in any batch, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.infer import decode
from bigjax.infer.decode import Generator
from bigjax.infer.sampling import Sampling
from bigjax.models import decoder

OPTIONS = dict(vocab_size=14, context=48, width=16, depth=2, heads=4, kv_heads=2, mlp_dim=24, window=9, pattern="LG")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 1, 2], [3, 3]]
WARM = Sampling(temperature=0.9, top_k=6, top_p=0.95)


@pytest.fixture(scope="module")
def generator():
  graphdef, params, rest = nnx.split(decoder.make(**OPTIONS, rngs=nnx.Rngs(0)), nnx.Param, ...)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape), jnp.float32), nnx.to_pure_dict(params))
  return Generator(lambda params: nnx.merge(graphdef, params, rest), (params,))


def one_by_one(generator, prompt, count):
  """The likeliest token, and its log-probability, from all before it, again and again."""
  run = jax.jit(lambda tokens: jax.nn.log_softmax(generator.bind(*generator.weights)(tokens)))
  tokens, found = list(prompt), []
  for _ in range(count):
    padded = np.zeros((1, OPTIONS["context"]), np.int32)
    padded[0, : len(tokens)] = tokens
    log_p = run(padded)[0, len(tokens) - 1]
    tokens.append(int(log_p.argmax()))
    found.append(float(log_p.max()))
  return tokens[len(prompt) :], found


def test_a_batch_of_prompts_gets_what_each_alone_gets_without_a_cache(generator):
  found = generator.generate(PROMPTS, max_tokens=20, log_probabilities=True, flush=7)
  for prompt, row in zip(PROMPTS, found):
    tokens, log_p = one_by_one(generator, prompt, 20)
    assert row.tokens == tokens
    np.testing.assert_allclose(row.log_probabilities, log_p, atol=1e-5)


def test_a_sample_is_a_function_of_seed_and_row(generator):
  how = dict(max_tokens=12, sampling=WARM, flush=12)
  together = generator.generate(PROMPTS, seed=3, **how)
  alone = generator.generate(PROMPTS[2:3], seed=3, rows=[2], **how)[0]
  assert alone == together[2]
  assert generator.generate(PROMPTS, seed=3, **how) == together
  assert generator.generate(PROMPTS, seed=4, **how) != together
  same = generator.generate([PROMPTS[2]] * 3, seed=3, **how)
  assert same[2].tokens == together[2].tokens != same[1].tokens


def test_pieces_are_no_longer_than_asked_for_and_make_up_the_whole(generator):
  pieces = list(generator.stream(PROMPTS, max_tokens=11, flush=4))
  assert [len(piece.tokens[0]) for piece in pieces] == [4, 4, 3]
  whole = generator.generate(PROMPTS, max_tokens=11)
  assert [[token for piece in pieces for token in piece.tokens[i]] for i in range(4)] == [row.tokens for row in whole]


def test_a_row_ends_at_a_stop_token_and_the_others_go_on(generator):
  whole = generator.generate(PROMPTS, max_tokens=20, flush=20)
  stop = whole[0].tokens[4]
  for row, full in zip(generator.generate(PROMPTS, max_tokens=20, flush=20, stop_tokens=[stop]), whole):
    end = full.tokens.index(stop) + 1 if stop in full.tokens else 20
    assert row.tokens == full.tokens[:end]


def test_a_row_ends_when_told(generator):
  seen = []
  found = generator.generate(PROMPTS, max_tokens=12, flush=4, stopped=lambda row, new: seen.append(new) or row == 1)
  assert [len(row.tokens) for row in found] == [12, 4, 12, 12]


def test_a_row_ends_with_the_context(generator):
  found = generator.generate(PROMPTS)
  assert [len(row.tokens) for row in found] == [48 - len(prompt) for prompt in PROMPTS]


def test_a_cache_that_grows_gives_the_same(generator, monkeypatch):
  fixed = generator.generate(PROMPTS, max_tokens=30, flush=5)
  monkeypatch.setattr(decode, "SMALLEST", 1)
  assert generator.generate(PROMPTS, max_tokens=30, flush=5) == fixed


def test_a_penalty_keeps_tokens_from_coming_again(generator):
  prompt = [PROMPTS[2]]
  plain = generator.generate(prompt, max_tokens=8)[0].tokens
  found = generator.generate(prompt, max_tokens=4, sampling=Sampling(temperature=0.0, repetition_penalty=1e6))[0].tokens
  assert plain != found
  assert len(set(found + PROMPTS[2])) == 4 + 10 or set(found) | set(PROMPTS[2]) >= set(range(14)) - {0, 13}


def test_tokens_that_stand_for_nothing_are_not_drawn(generator):
  """A model may have more rows than its vocabulary, so that their number divides well."""
  for sampling in (decode.GREEDY, Sampling(temperature=3.0, repetition_penalty=1.3, top_k=5)):
    how = dict(max_tokens=16, sampling=sampling, log_probabilities=True)
    found = generator.generate(PROMPTS, vocabulary=6, **how)
    assert {token for row in found for token in row.tokens} <= set(range(6))
    assert max(token for row in generator.generate(PROMPTS, **how) for token in row.tokens) >= 6
  first = generator.generate(PROMPTS[:1], max_tokens=1, vocabulary=6, log_probabilities=True)[0]
  log_p = jax.nn.log_softmax(generator.bind(*generator.weights)(jnp.asarray(PROMPTS[:1])))[0, -1]
  assert first.tokens == [int(log_p[:6].argmax())]
  np.testing.assert_allclose(first.log_probabilities, [log_p[:6].max()], atol=1e-5)  # Of the model, all tokens in it.


def test_a_cache_in_int8_says_nearly_the_same(generator):
  how = dict(max_tokens=12, log_probabilities=True)
  exact, narrow = (generator.generate(PROMPTS[2:3], cache=cache, **how)[0] for cache in (None, "int8"))
  same = [a == b for a, b in zip(exact.tokens, narrow.tokens)]
  until = same.index(False) if False in same else len(same)
  assert until >= 4
  apart = np.abs(np.subtract(exact.log_probabilities, narrow.log_probabilities))[:until]
  assert 0 < apart.max() < 0.1


def test_a_mesh_gives_the_same(generator):
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  (params,) = generator.weights
  layout = sharding.shard_tree(params, "fsdp(data,4)+tensor", mesh, roles={"tensor": decoder.TENSOR})
  weights = (jax.device_put(params, layout),)
  split = dataclasses.replace(generator, weights=weights, layout=sharding.Layout(mesh=mesh))
  assert split.generate(PROMPTS[:3], max_tokens=9) == generator.generate(PROMPTS[:3], max_tokens=9)


def test_one_program_for_a_bucket(generator):
  fresh = dataclasses.replace(generator)
  for lengths in ((3, 9), (2, 16), (12, 5)):
    fresh.generate([[1] * n for n in lengths], max_tokens=4, flush=4)
  assert fresh._start._cache_size() == fresh._more._cache_size() == 1


@pytest.mark.parametrize(
  ("prompt", "said"),
  [([], "empty"), ([1] * 48, "context of 48"), ([1] * 49, "context is 48"), ([1, 14], "token 14, .* vocabulary 14")],
)
def test_prompts_that_can_not_be_taken_are_refused(generator, prompt, said):
  with pytest.raises(UserError, match=said):
    generator.generate([[1], prompt])


def test_numbers_of_tokens_are_positive(generator):
  with pytest.raises(UserError, match="max_tokens: 0"):
    generator.generate([[1]], max_tokens=0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_would_be_another_are_refused(generator, seed):
  with pytest.raises(UserError, match="seed"):
    generator.generate([[1]], seed=seed)


def test_logits_that_are_no_numbers_are_refused(generator):
  (params,) = generator.weights
  broken = dataclasses.replace(generator, weights=(params | {"norm": {"scale": params["norm"]["scale"] * jnp.nan}},))
  with pytest.raises(UserError, match="no numbers"):
    broken.generate([[1]], max_tokens=2)


def test_lengths_are_rounded_up_by_a_third_at_most():
  assert [decode.bucket(n) for n in (0, 1, 16, 17, 24, 25, 33, 48, 49, 1000)] == [
    0,
    16,
    16,
    24,
    24,
    32,
    48,
    48,
    64,
    1024,
  ]
  assert all(n <= decode.bucket(n) < 1.5 * n for n in range(16, 5000))
