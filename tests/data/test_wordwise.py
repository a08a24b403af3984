"""Words by a dictionary against the `tokenizers` library, whose every token they must be."""

import itertools
import json
import random

import numpy as np
import pytest
import tokenizers as lib

from bigjax.data import tokenizers, wordwise

KNOWN = "".join(map(chr, wordwise.KNOWN))
WORDS = [
  "it's",
  "'S",
  "'ll",
  "a",
  "Zo",
  "É",
  "ǅ",
  "ª",
  "7",
  "²",
  "1234",
  "½",
  " ",
  "  ",
  "\n",
  "\r\n",
  "\t",
  "\x1c",
  "\x85",
  "\xa0",
]
WORDS += ["!", "...", "/", "—", "“", "’s", "_", "\x00", "ſ", "'ſ", "ß"]


@pytest.mark.parametrize("name", tokenizers.PATTERNS)
def test_words_are_the_librarys(name):
  pattern = tokenizers.PATTERNS[name]
  find, cut = wordwise.compiled(pattern).findall, lib.pre_tokenizers.Split(lib.Regex(pattern), behavior="isolated")
  draw = random.Random(0)
  texts = [
    f"{a}{c}{b}" for c in KNOWN for a, b in [("", ""), ("a", "a"), ("A", "1"), (" ", " x"), ("'", "s"), ("! ", "\n")]
  ]
  texts += ["".join(parts) for parts in itertools.product(WORDS, repeat=2)]
  texts += ["".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(5000)]
  texts += ["".join(draw.choices(KNOWN, k=20)) for _ in range(1000)]
  for text in texts:
    assert find(text) == [word for word, _ in cut.pre_tokenize_str(text)], repr(text)


def test_words_are_those_of_the_librarys_own_spelling():
  """That has GPT-2's pattern built in."""
  spell = tokenizers._spelling()
  find, own = (
    wordwise.compiled(tokenizers.PATTERNS["gpt2"]).findall,
    lib.pre_tokenizers.ByteLevel(add_prefix_space=False),
  )
  draw = random.Random(1)
  texts = ["".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(3000)]
  for text in [*KNOWN, *(f"a {c}a" for c in KNOWN), *texts]:
    assert [spell(word.encode()) for word in find(text)] == [word for word, _ in own.pre_tokenize_str(text)], repr(text)


@pytest.mark.parametrize("pattern", tokenizers.PATTERNS)
def test_tokens_are_the_librarys_whatever_came_before(pattern, monkeypatch):
  monkeypatch.setattr(wordwise, "_MOST", 50)  # Forgets words again and again.
  monkeypatch.setattr(wordwise, "_LONGEST", 40)
  draw = random.Random(2)
  some = lambda: "".join(draw.choices([*WORDS, "the", " the", " cat", "中", "🎉", "e\u0301"], k=draw.randint(0, 30)))
  ours = tokenizers.train([some() for _ in range(200)], 400, pattern=pattern)
  theirs = lib.Tokenizer.from_str(ours.files()["tokenizer.json"].decode())
  for count in (1, 20, 0, 100, 3):
    texts = [some() for _ in range(count)]
    found = ours.encode(texts)
    assert [tokens.tolist() for tokens in found] == [theirs.encode(text).ids for text in texts]
    assert all(tokens.dtype == np.int32 for tokens in found)


def test_only_vocabularies_that_cut_words_first_and_by_a_known_pattern(monkeypatch):
  made = json.loads(tokenizers.train(["a cat, a hat"] * 3, 262).files()["tokenizer.json"])
  asked = []
  monkeypatch.setattr(wordwise, "Encoder", lambda pattern, encode: asked.append(pattern))
  tokenizers.hugging_face(made, {})
  assert asked == [tokenizers.PATTERNS["gpt2"]]
  level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
  other = {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated", "invert": False}
  plain = {"id": 262, "content": "cat", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  for changes in (
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {**level, "add_prefix_space": True}},
    {"pre_tokenizer": {**level, "use_regex": False}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [other, {**level, "use_regex": False}]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
    {"pre_tokenizer": None},
    {"added_tokens": [*made["added_tokens"], {**plain, "special": False}]},
  ):
    tokenizers.hugging_face({**made, **changes}, {}).encode(["a cat"])
    assert len(asked) == 1, changes


def test_a_failure_of_the_library_leaves_no_word_with_anothers_tokens():
  failing = True

  def encode(texts):
    if failing and texts:
      raise MemoryError
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

  encoder = wordwise.Encoder(tokenizers.PATTERNS["gpt2"], encode)
  with pytest.raises(MemoryError):
    encoder(["a cat"])
  failing = False
  assert bytes(encoder(["the cat", "a"])[0].astype(np.uint8)) == b"the cat"
