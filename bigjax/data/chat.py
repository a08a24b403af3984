"""Conversations to learn to answer from: the whole is read, and only the answers are learned.

Conversations are packed into rows like documents (`tokens.py`), and `token_mask` tells the task which tokens to
predict: those of answers, and what ends them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from bigjax.data import packing, splits, templates, tokenizers
from bigjax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class Chat:
  """Rows of conversations."""

  tokenizer: tokenizers.Tokenizer
  packing: packing.Packing
  tokens: np.ndarray  # Of all conversations, one after another.
  learned: np.ndarray  # Whether each is part of an answer.
  dropped: int  # Conversations whose answers all lie beyond the row's end.
  bytes_per_token: float  # Mean over answers, of UTF-8.

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @property
  def efficiency(self) -> float:
    """The part of all places that hold a token."""
    return self.packing.efficiency

  def __len__(self) -> int:
    return len(self.packing)

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    plan = self.packing
    tokens, token_mask, segments, positions = np.zeros((4, len(ids), plan.room), np.int32)
    for row, i in enumerate(ids.tolist()):
      place = 0
      for segment, piece in enumerate(range(plan.rows[i], plan.rows[i + 1]), 1):
        start, length = int(plan.starts[piece]), int(plan.lengths[piece])
        there = slice(place, place + length)
        tokens[row, there] = self.tokens[start : start + length]
        token_mask[row, there] = self.learned[start : start + length]
        segments[row, there], positions[row, there] = segment, np.arange(length)
        place += length
    return {
      "tokens": tokens,
      "token_mask": token_mask.astype(np.float32),
      "segments": segments,
      "positions": positions,
    }

  def spans(self, ids: np.ndarray) -> list[str]:
    """Returns which tokens of all conversations each row is, in words."""
    return self.packing.spans(ids)


def make(
  path: str | tuple[str, ...],
  *,
  tokenizer: str,
  template: str,
  block: int,
  packed: bool = True,
  answers: Literal["all", "last"] = "all",
  field: str = "messages",
  split: str = "train",
  split_seed: int | None = None,
  vocab_size: int | None = None,
) -> Chat:
  """Reads conversations: a line of JSON each, `{"messages": [{"role": "user", "content": "..."}, ...]}`.

  Args:
    path: A JSONL file, or several.
    tokenizer: `byte`, or a file or folder that `tokenizers.load` reads.
    template: How the model reads a conversation: `chatml`, `llama3`, `gemma`, `phi3`, `mistral`, `plain`, or a model's
      own: its `tokenizer_config.json`, a Jinja file, or a folder with one.
    block: Tokens a row, to which the next is added: `tokens` is int32 [batch, block + 1], with `token_mask`, `segments`
      and `positions` of the same shape. A longer conversation is cut.
    packed: As many conversations in a row as fit; or one.
    answers: Learns from every answer of a conversation, or from its last.
    field: Of a line, the messages.
    split: Which conversations, in TFDS's notation.
    split_seed: Cuts the split out of this permutation of them.
    vocab_size: The model's, to be told here if it isn't the tokenizer's.

  Raises:
    UserError: A line is no conversation, or the template can't take it; the message has file and line.
  """
  if block < 1:
    raise UserError(f"block={block} must be 1 or more.")
  known, render = tokenizers.load(tokenizer), templates.load(template)
  if vocab_size is not None:
    known.check_model(vocab_size, "vocab_size")
  found = [line for one in ((path,) if isinstance(path, str) else path) for line in _lines(one)]
  if not found:
    raise UserError(f"path: {path!r} holds no conversation.")
  subset = splits.parse(split, {"train": len(found)}, split_seed)[1]
  chosen = np.arange(len(found))[subset.rows()]
  tokens, learned, lengths, dropped, answered = [], [], [], 0, 0
  for i in chosen.tolist():
    where, record = found[i]
    try:
      messages = _messages(record, field)
      ids, mask = encode(known, render(messages), answers)
    except UserError as e:
      raise UserError(f"{where}: {e}") from e
    ids, mask = ids[: block + 1], mask[: block + 1]
    if not mask[1:].any():
      dropped += 1
      continue
    answered += sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    tokens.append(ids)
    learned.append(mask)
    lengths.append(len(ids))
  if not lengths:
    raise UserError(f"block={block}: every answer lies beyond the row's end. Raise it.")
  sizes = np.asarray(lengths, np.int64)
  starts = np.cumsum(sizes) - sizes
  if packed:
    plan = packing.pack(starts, sizes, block + 1)
  else:
    plan = packing.Packing(block + 1, np.arange(len(sizes) + 1), starts, sizes)
  whole = np.concatenate(learned)
  return Chat(known, plan, np.concatenate(tokens), whole, dropped, answered / max(1, int(whole.sum())))


def encode(
  tokenizer: tokenizers.Tokenizer, pieces: Sequence[templates.Piece], answers: str = "all"
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (tokens, whether each is part of an answer).

  Names of control tokens are these where the template says them; in what people wrote they are text. Between control
  tokens, text is encoded in one, as a model has seen it, unless an answer would then begin within a token.
  """
  last = max((i for i, p in enumerate(pieces) if p.learned), default=-1)
  first = last
  while first > 0 and pieces[first - 1].learned:
    first -= 1
  ids, mask, run = [], [], []  # Of the run: (text, learned).

  def flush():
    texts = [(text, learned) for text, learned in run if text]
    run.clear()
    if not texts:
      return
    whole = tokenizer.encode(["".join(text for text, _ in texts)])[0]
    parts = tokenizer.encode([text for text, _ in texts])
    marks, ends = [learned for _, learned in texts], np.cumsum([len(part) for part in parts])
    if len(set(marks)) > 1:
      prefix = np.concatenate(parts[: marks.index(True)]) if marks.index(True) else parts[0][:0]
      if (
        marks.index(True) == 0
        or not all(marks[marks.index(True) :])
        or not np.array_equal(whole[: len(prefix)], prefix)
      ):
        whole = np.concatenate(parts)
        found = np.repeat(marks, np.diff(ends, prepend=0))
      else:
        found = np.arange(len(whole)) >= len(prefix)
    else:
      found = np.full(len(whole), marks[0])
    ids.append(whole)
    mask.append(found)

  names = sorted(tokenizer.special, key=len, reverse=True)
  for i, piece in enumerate(pieces):
    learned = piece.learned and (answers == "all" or i >= first)
    text = piece.text
    while text:
      at = [(text.find(name), -len(name), name) for name in names if name in text] if piece.control else []
      if not at:
        run.append((text, learned))
        break
      place, _, name = min(at)
      run.append((text[:place], learned))
      flush()
      ids.append(np.asarray([tokenizer.special[name]], np.int32))
      mask.append(np.asarray([learned]))
      text = text[place + len(name) :]
  flush()
  return np.concatenate(ids).astype(np.int32), np.concatenate(mask)


def _lines(path: str) -> Iterator[tuple[str, Any]]:
  """Yields (file and line, what is there)."""
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise UserError(f"path: there is no file {path!r}.")
  with open(file, "rb") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        try:
          yield f"path: {path!r}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as e:
          raise UserError(f"path: {path!r}, line {number}, is no JSON: {e}") from e


def _messages(record: Any, field: str) -> list[Mapping[str, str]]:
  if not isinstance(record, dict) or not isinstance(record.get(field), list) or not record[field]:
    near = suggest(field, record) if isinstance(record, dict) else ""
    raise UserError(f"there is no list {field!r} of messages.{near} Say which holds them with field.")
  for i, message in enumerate(record[field]):
    for key in ("role", "content"):
      if not isinstance(message, dict) or not isinstance(message.get(key), str):
        has = f"it has {', '.join(map(repr, message))}" if isinstance(message, dict) else f"it is {message!r}"
        near = suggest(key, message) if isinstance(message, dict) else ""
        raise UserError(f"message {i} has no text {key!r} ({has}).{near} A message is {{'role': ..., 'content': ...}}.")
    if message["role"] not in templates.ROLES:
      raise UserError(
        f"message {i}: there is no role {message['role']!r}.{suggest(message['role'], templates.ROLES)} "
        f"It is one of {', '.join(templates.ROLES)}."
      )
  if all(message["role"] != "assistant" for message in record[field]):
    raise UserError("there is no message of 'assistant' to learn. Take the conversation out.")
  return record[field]
