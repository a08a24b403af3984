"""Ops on tokens."""

import zlib
from typing import Literal

import numpy as np

from bigjax.data import tokenizers
from bigjax.data.ops import array_op, feature
from bigjax.data.order import uniform
from bigjax.errors import UserError


@array_op
def mask_tokens(
  tokenizer: str,
  probability: float = 0.15,
  unit: Literal["token", "word"] = "token",
  tokens: str = "tokens",
  target: str = "target",
):
  """Hides some tokens, to be guessed from those around them: `mask_tokens("stores/wiki", unit="word")`.

  Of the tokens chosen, 80% become the vocabulary's mask token, 10% a random token, 10% stay as they are; control
  tokens and padding (`segments` 0) are never chosen. Adds `token_mask`, float32, 1 where a token is to be guessed, and
  the tokens as they were. From BERT, https://arxiv.org/abs/1810.04805; another choice each epoch, as in RoBERTa.

  Args:
    tokenizer: as for `bigjax data tokenize`, or a token store.
    probability: part of the tokens to choose.
    unit: chooses tokens one by one, or all tokens of a word together (of WordPiece, SentencePiece or a byte-level BPE).
    tokens: the feature, int32 [batch, time].
    target: what the tokens as they were are called.
  """
  if not 0 < probability < 1:
    raise UserError("probability is the part of the tokens to choose, between 0 and 1.")
  vocabulary = tokenizers.load(tokenizer)
  if "mask" not in vocabulary.roles:
    raise UserError(f"the tokenizer {tokenizer!r} has no mask token, such as [MASK].")
  size, mask = vocabulary.vocab_size, vocabulary.roles["mask"]
  control = np.isin(np.arange(size), list(vocabulary.special.values()))
  begins = _begins_word(vocabulary) | control
  salt = zlib.crc32(b"mask_tokens")

  def apply(batch, keys):
    given = feature(batch, tokens)
    if given.ndim != 2 or given.dtype.kind not in "iu":
      raise UserError(f"{tokens!r} is {given.dtype}{list(given.shape[1:])}, not rows of tokens.")
    if given.size and not 0 <= given.min() <= given.max() < size:
      raise UserError(f"{tokens!r} goes up to {given.max()}, and the tokenizer {tokenizer!r} has {size:,} tokens.")
    length = given.shape[1]
    draw = uniform(keys, salt, length)
    if unit == "word":  # A word goes by the draw of its first token.
      first = begins[given]
      first[:, 0] = True
      draw = np.take_along_axis(draw, np.maximum.accumulate(np.where(first, np.arange(length), 0), axis=1), axis=1)
    chosen = (draw < probability) & ~control[given]
    if "segments" in batch:
      chosen &= batch["segments"] != 0
    fate = uniform(keys, salt + 1, length)
    random = (uniform(keys, salt + 2, length).astype(np.float64) * size).astype(given.dtype)
    seen = np.where(fate < 0.8, given.dtype.type(mask), np.where(fate < 0.9, random, given))
    hidden = np.where(chosen, seen, given)
    return {**batch, tokens: hidden, target: given, "token_mask": chosen.astype(np.float32)}

  return apply


def _begins_word(vocabulary: tokenizers.Tokenizer) -> np.ndarray:
  """Returns which tokens begin a word; what that looks like depends on the kind of vocabulary."""
  names = [""] * vocabulary.vocab_size
  for name, number in vocabulary.names().items():
    names[number] = name
  for mark in ("▁", "Ġ"):
    if sum(name.startswith(mark) for name in names) > len(names) / 20:  # One or two may be symbols of their own.
      return np.array([name.startswith((mark, "Ċ")) for name in names])
  return np.array([not name.startswith("##") for name in names])
