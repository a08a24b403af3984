"""From a prompt to the text after it: tokens become text as they come, and strings end it.

Tokens may end within a symbol, or within what could be the start of a stop string; that part is held back until what
follows is there.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from bigjax.data import chat, templates, tokenizers
from bigjax.data.tokenizers import Tokenizer
from bigjax.errors import UserError
from bigjax.infer.decode import Generator

HALF = "\ufffd"  # What a tokenizer makes of bytes that are no symbol yet.
JOINT = 4  # Tokens of the prompt that are decoded with an answer: some vocabularies drop the space a text begins with.


@dataclasses.dataclass
class Answer:
  """What has come after a prompt so far."""

  prompt: list[int]
  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probabilities: list[float] = dataclasses.field(default_factory=list)
  text: str = ""  # As far as it can't change any more; without the string that ended it.
  ended: str | None = None  # "stop": by a string or a token; "length": by the number of tokens, or the context.


@dataclasses.dataclass(frozen=True, eq=False)
class Writer:
  """A generator that reads and writes text."""

  generator: Generator
  tokenizer: Tokenizer

  def __post_init__(self):
    self.tokenizer.check_model(self.generator.vocab_size)

  def of(self, *weights: Any) -> "Writer":
    """Returns the same with these weights, where shapes stood for them."""
    return dataclasses.replace(self, generator=dataclasses.replace(self.generator, weights=weights))

  def encode(self, prompts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Returns the tokens of prompts, after the one that the vocabulary begins a text with; an empty one has one."""
    roles, begin = self.tokenizer.roles, self.tokenizer.begin
    found = [tokens.tolist() for tokens in self.tokenizer.encode(prompts, special=special)]
    if begin is not None:
      return [tokens if tokens[:1] == [begin] else [begin, *tokens] for tokens in found]
    alone = roles.get("bos", roles.get("eos"))
    return [tokens if tokens or alone is None else [alone] for tokens in found]

  def stream(
    self,
    prompts: Sequence[str],
    *,
    stop: Sequence[str] = (),
    special: bool = False,
    template: str | None = None,
    system: str | None = None,
    **how: Any,
  ) -> Iterator[list[Answer]]:
    """Yields the answers as far as they are, again and again; they are the same objects.

    Args:
      prompts: text, one answer each.
      stop: strings that end an answer. The vocabulary's token for the end does in any case.
      special: takes names of control tokens in a prompt for the tokens.
      template: how the model reads a conversation, see `templates.load`; a prompt is then what its user says.
      system: what such a conversation begins with.
      **how: arguments of `Generator.stream`.
    """
    if "" in stop:
      raise UserError("stop: an empty string would end every answer before it begins.")
    end, room = self.tokenizer.roles.get("eos"), self.tokenizer.vocab_size
    if template is None:
      tokens = self.encode(prompts, special=special)
    else:
      tokens, over = self._asked(prompts, templates.load(template), system)
      stop = [*stop, over] if over else stop
    answers = [Answer(prompt) for prompt in tokens]
    how |= dict(stop_tokens=() if end is None else (end,), stopped=lambda row, _: answers[row].ended is not None)
    how |= dict(vocabulary=room if room < self.generator.vocab_size else None)
    for piece in self.generator.stream([answer.prompt for answer in answers], **how):
      for answer, tokens, log_p in zip(answers, *piece, strict=True):
        answer.log_probabilities += log_p
        if tokens:
          self._add(answer, tokens, stop, end)
        del answer.log_probabilities[len(answer.tokens) :]
      yield answers
    for answer in answers:
      if answer.ended is None:
        answer.text, answer.ended = self._decode(answer, answer.tokens), "length"
    yield answers

  def _asked(self, prompts, render, system):
    """Returns the tokens of conversations up to where the model answers, and the text that ends an answer."""
    first, found, over = [] if system is None else [{"role": "system", "content": system}], [], ""
    for prompt in prompts:
      pieces, over = templates.opened(render, [*first, {"role": "user", "content": prompt}])
      found.append(chat.encode(self.tokenizer, pieces)[0].tolist())
    return found, over

  def _add(self, answer, tokens, stop, end):
    before = len(answer.tokens)
    answer.tokens += tokens
    if tokens[-1] == end:
      answer.tokens.pop()
      answer.ended = "stop"
    text = self._decode(answer, answer.tokens)
    places = [(text.find(word), word) for word in stop if word in text]
    if places:
      place, word = min(places)
      # Tokens after the one that completes the string are none of the answer.
      counts = range(before + 1, len(answer.tokens) + 1)
      count = next(n for n in counts if n == counts[-1] or word in self._decode(answer, answer.tokens[:n]))
      del answer.tokens[count:]
      answer.text, answer.ended = text[:place], "stop"
    else:
      answer.text = text if answer.ended else text[: _sure(text, stop)]

  def _decode(self, answer, tokens):
    joint = answer.prompt[-JOINT:]
    return self.tokenizer.decode(joint + tokens)[len(self.tokenizer.decode(joint)) :]


def _sure(text: str, stop: Sequence[str]) -> int:
  """Returns how much of a text stays as it is, whatever tokens follow."""
  whole = len(text.rstrip(HALF))
  starts = (i for word in stop for i in range(1, len(word)) if text[:whole].endswith(word[:i]))
  return whole - max(starts, default=0)


def tokenizer_of(source: Any) -> Tokenizer | None:
  """Returns the tokenizer that the tokens of a source of text are made with; None if it has none."""
  if hasattr(source, "store"):  # A text begins as the documents of the store do.
    return dataclasses.replace(source.store.tokenizer, begin=source.store.index["bos"])
  if hasattr(source, "tokenizer"):
    return source.tokenizer
  if hasattr(source, "vocabulary"):
    return tokenizers.load("byte") if source.vocabulary is None else tokenizers.characters(source.vocabulary)
  return next((found for part in getattr(source, "sources", ()) if (found := tokenizer_of(part)) is not None), None)
