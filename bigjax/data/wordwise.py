"""Text to numbers word by word: a vocabulary that merges pairs within words needs to see each word once.

Python's `re` cuts the words, since one pass over the text and a look into a dictionary take a fifth of the time that
the `tokenizers` library takes to make its objects of them. What it gets are words that were not there before, and
texts with characters other than `KNOWN`, whose classes depend on the version of Unicode.
"""

import functools
import itertools
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

# What Latin letters and their punctuation are made of; assigned long ago.
KNOWN = (*range(0x250), *range(0x2010, 0x2028))
_SPACES = {*range(9, 14), 32, 0x85, 0xA0}
_LONGEST = 2**13  # Characters of a text that is cut here: longer ones hold no words.
_MOST = 2**18  # Words that are remembered.


class Words(dict):
  """Numbers words in the order of their coming."""

  def __missing__(self, word):
    self[word] = number = len(self)
    return number


class Encoder:
  """Remembers the tokens of words.

  The result is that of `encode` for whole texts, if that cuts them by `pattern` first and then sees each word alone.
  """

  def __init__(self, pattern: str, encode: Callable[[Sequence[str]], list[np.ndarray]]):
    """`pattern` is in the notation of the `tokenizers` library."""
    self._encode = encode
    self._find = compiled(pattern).findall
    self._known = re.compile(f"[{_members(KNOWN)}]{{,{_LONGEST}}}").fullmatch
    self._lock = threading.Lock()
    self._forget()

  def _forget(self):
    self._words, self._tokens, self._ends = Words(), np.zeros(0, np.int32), np.zeros(1, np.int64)

  def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the tokens of each text, int32."""
    known = [self._known(text) is not None for text in texts]
    others = iter(self._encode([text for text, here in zip(texts, known, strict=True) if not here]))
    with self._lock:
      try:
        found = iter(self._looked_up([self._find(text) for text, here in zip(texts, known, strict=True) if here]))
      except BaseException:
        self._forget()  # Or words that have a number might have no tokens, or another's.
        raise
    return [next(found if here else others) for here in known]

  def _looked_up(self, texts: list[list[str]]) -> list[np.ndarray]:
    if len(self._words) > _MOST:
      self._forget()
    before, counts = len(self._words), np.fromiter(map(len, texts), np.int64, len(texts))
    numbers = map(self._words.__getitem__, itertools.chain.from_iterable(texts))
    numbers = np.fromiter(numbers, np.int32, counts.sum())
    if len(self._words) > before:
      new = self._encode(list(itertools.islice(self._words, before, None)))
      self._tokens = np.concatenate([self._tokens, *new])
      self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum([len(tokens) for tokens in new])])
    starts = self._ends[numbers]
    sizes = self._ends[numbers + 1] - starts
    ends = np.concatenate([[0], sizes.cumsum()])  # In the result, of each word.
    tokens = self._tokens[np.arange(ends[-1]) + np.repeat(starts - ends[:-1], sizes)]
    ends = ends[np.concatenate([[0], counts.cumsum()])].tolist()
    return [tokens[start:end] for start, end in itertools.pairwise(ends)]


@functools.cache
def compiled(pattern: str) -> re.Pattern:
  """Returns what cuts a text of `KNOWN` characters as the library does."""

  def spelt(found):
    part = found[0]
    if part[0] == "[":
      return re.sub(r"\\p\{\w+\}|\\s", lambda found: _of_class(found[0]), part)
    return "[^" + _of_class(r"\s") + "]" if part == r"\S" else f"[{_of_class(part)}]"

  return re.compile(re.sub(r"\[[^]]*\]|\\p\{\w+\}|\\[sS]", spelt, pattern))


def _of_class(name: str) -> str:
  r"""Returns the members of \s or of a category such as \p{Lu}, as they stand in brackets."""
  if name == r"\s":
    return _members(_SPACES)
  return _members(c for c in KNOWN if unicodedata.category(chr(c)).startswith(name[3:-1]))


def _members(codes) -> str:
  """Ranges of characters."""
  groups = itertools.groupby(enumerate(sorted(codes)), lambda pair: pair[1] - pair[0])
  runs = [[code for _, code in run] for _, run in groups]
  return "".join(rf"\u{run[0]:04x}-\u{run[-1]:04x}" for run in runs)
