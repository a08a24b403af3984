"""Text to numbers and back, whoever made the vocabulary.

`load` reads what models are published with: `tokenizer.json` of Hugging Face, a SentencePiece model, GPT-2's
vocabulary with its merges, tiktoken's ranks; and there are bytes and characters, which need no library. All but the
latter two run in the `tokenizers` or the `sentencepiece` library, on batches, or on words not seen yet (wordwise.py).
What a text says is never taken for a control token, unless asked for: a page about `<|endoftext|>` must not end a
document.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigjax.data import wordwise
from bigjax.errors import UserError, shown, suggest

# How text is cut into words before pairs are merged, and control tokens, of vocabularies whose files don't tell.
# https://github.com/openai/tiktoken/blob/main/tiktoken_ext/openai_public.py, and Llama 3's tokenizer.py.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
  rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
  rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
  r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": _GPT2, "cl100k": _CL100K, "o200k": _O200K}
_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
_LLAMA3 = [
  *["<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"],
  *[_RESERVED[4], "<|eot_id|>", *_RESERVED[5:]],
]
_TIKTOKEN = {  # By the number of ranks in the file.
  50256: (_GPT2, {"<|endoftext|>": 50256}),
  50280: (_GPT2, {"<|endoftext|>": 50256}),
  100256: (
    _CL100K,
    {f"<|{name}|>": 100257 + i for i, name in enumerate(("endoftext", "fim_prefix", "fim_middle", "fim_suffix"))}
    | {"<|endofprompt|>": 100276},
  ),
  199998: (_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
  128000: (_CL100K, {name: 128000 + i for i, name in enumerate(_LLAMA3)}),
}

# What control tokens are called, for vocabularies that don't say which is which; the first that is there.
_ROLES = {
  "bos": ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]"),
  "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>"),
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
  "mask": ("[MASK]", "<mask>"),
  "unk": ("<unk>", "[UNK]"),
}
# A byte-level BPE of pieces is that of the whole, and the library is twice as fast on a thousand characters as on a
# book; what puts a space before each text should not be given too many.
_SHORT, _LONG = 2**10, 2**16


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary and how text is written in it; made by `load`, `characters`, `bpe` or `train`."""

  kind: str
  vocab_size: int  # One more than the largest number of a token.
  special: Mapping[str, int]  # Control tokens by name.
  roles: Mapping[str, int]  # Of these, which is bos, eos, pad, mask, unk; only those there are.
  names: Callable[[], Mapping[str, int]]  # Every token by name, as the vocabulary spells it.
  files: Callable[[], Mapping[str, bytes]]  # What `load` reads to make it again.
  piece: int  # Characters a long text is best cut into before it is encoded, see `documents.cut`.
  _encode: Callable[[Sequence[str], bool], list[np.ndarray]]
  _decode: Callable[[list[int]], str]
  begin: int | None = None  # The control token that a model of this vocabulary has seen before each text.

  def encode(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
    """Returns the tokens of each text, int32, without control tokens around them.

    Args:
      texts: A batch of them, encoded in as many threads as there are cores.
      special: Takes the name of a control token in a text, such as `<|endoftext|>`, for that token.
    """
    return self._encode(texts, special)

  def decode(self, tokens: Iterable[int] | np.ndarray) -> str:
    """Returns the text that tokens stand for, control tokens by name; bytes that are no UTF-8 as U+FFFD."""
    return self._decode([int(token) for token in tokens])

  @functools.cached_property
  def digest(self) -> str:
    """What tells vocabularies apart, in whatever file they came: a SHA-256 of the tokens' names and numbers."""
    pairs = sorted((number, name) for name, number in self.names().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

  def bytes_per_token(self, texts: Sequence[str]) -> float:
    """Returns the mean over texts, UTF-8: a loss in bits a byte is loss / ln 2 / bytes_per_token."""
    return sum(len(text.encode()) for text in texts) / max(1, sum(map(len, self.encode(texts))))

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes files into a folder that `load(folder)` makes this tokenizer from."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self.files().items():
      (folder / name).write_bytes(content)

  def check_model(self, vocab_size: int, where: str = "config.model.vocab_size") -> None:
    """Raises `UserError` if a model of `vocab_size` tokens can't be this vocabulary's; a few more are padding."""
    if not 0 <= vocab_size - self.vocab_size < _padding(self.vocab_size):
      raise UserError(
        f"{where}: the model has {vocab_size:,} tokens and the tokenizer ({self.kind}) {self.vocab_size:,}: "
        + ("the model can't tell all of them apart." if vocab_size < self.vocab_size else "they don't belong together.")
        + f" Set {where.rpartition('.')[2]}={self.vocab_size}, or take the tokenizer the model was trained with."
      )


def _padding(size: int) -> int:
  """So many rows of an embedding beyond the vocabulary are no padding: Phi-2 has 905, 128 is a usual multiple."""
  return min(1024, max(128, size // 16))


def load(path: str, pattern: str | None = None) -> Tokenizer:
  """Reads a tokenizer, told apart by what is in it.

  Args:
    path: `byte`; or a file: `tokenizer.json` (Hugging Face), a SentencePiece model, GPT-2's `vocab.json` or
      `encoder.json` with its merges beside it, a tiktoken file; or a folder that holds one of these, such as a token
      store's or a model's.
    pattern: For a tiktoken file with a vocabulary of its own: the regular expression that cuts text into words, or
      `gpt2`, `cl100k` or `o200k`.

  Raises:
    UserError: There is none, it is damaged, or the library it needs is missing.
  """
  if path == "byte":
    return _bytes()
  place = pathlib.Path(path).expanduser()
  if place.is_dir():
    place = _in_folder(place)
  if not place.is_file():
    raise UserError(f"tokenizer: there is no file {str(place)!r}; it is 'byte', or a file or folder.")
  try:
    content = place.read_bytes()
    if not content:
      raise UserError(f"tokenizer: {str(place)!r} is empty. Fetch it again.")
    if place.suffix == ".json":
      return _json(place, content)
    if place.suffix in (".bpe", ".txt"):
      return _gpt2(_beside(place, "vocab.json", "encoder.json"), place)
    first = content.split(b"\n", 1)[0].split()
    if len(first) == 2 and first[1].isdigit():
      return _tiktoken(content, pattern)
    return _sentencepiece(content)
  except (UserError, KeyboardInterrupt, SystemExit):
    raise
  except BaseException as e:  # The libraries raise bare exceptions, for damage too; a panic of Rust is no Exception.
    raise UserError(f"tokenizer: {str(place)!r} can't be read, it may be cut short: {str(e)[:300]}") from e


def hugging_face(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
  """Returns the tokenizer of what would stand in `tokenizer.json` and `tokenizer_config.json`."""
  return _hugging_face(_library("tokenizers").Tokenizer.from_str(json.dumps(tokenizer)), _roles(config))


def characters(text: str) -> Tokenizer:
  """Returns the tokenizer whose vocabulary is the sorted symbols of `text`."""
  points = np.flatnonzero(np.bincount(np.frombuffer(text.encode("utf-32-le"), np.uint32)))
  symbols = "".join(map(chr, points))
  number = np.full(points[-1] + 1 if len(points) else 0, -1, np.int32)
  number[points] = np.arange(len(points))

  def encode(texts, special):
    del special
    found = []
    for text in texts:
      codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
      tokens = number[np.minimum(codes, len(number) - 1)] if len(number) else np.full(len(codes), -1, np.int32)
      unknown = (tokens < 0) | (codes >= len(number))
      if unknown.any():
        symbol = chr(codes[unknown.argmax()])
        raise UserError(
          f"tokenizer: {symbol!r} (U+{ord(symbol):04X}) is not among its {len(symbols)} characters; "
          "make it from all of the text."
        )
      found.append(tokens)
    return found

  return Tokenizer(
    kind="characters",
    piece=_LONG,
    vocab_size=len(symbols),
    special={},
    roles={},
    names=lambda: {symbol: i for i, symbol in enumerate(symbols)},
    files=lambda: {"vocabulary.json": json.dumps({"characters": symbols}).encode()},
    _encode=encode,
    _decode=lambda tokens: "".join(symbols[token] for token in tokens),
  )


def bpe(
  vocab: Mapping[str, int],
  merges: Sequence[tuple[str, str]],
  *,
  pattern: str = _GPT2,
  special: Mapping[str, int] | None = None,
  ignore_merges: bool = False,
) -> Tokenizer:
  """Returns the byte-level BPE of a vocabulary and the merges that make it, best first.

  Args:
    vocab: Tokens, their bytes spelt as GPT-2 does (a space is Ġ).
    merges: Pairs of tokens.
    pattern: A regular expression for words, within which pairs are merged.
    special: Control tokens by name; nothing else is one.
    ignore_merges: A word that is a token is that token, even if no merges make it.
  """
  lib = _library("tokenizers")
  special = dict(special or {})
  model = lib.models.BPE(vocab={**vocab, **special}, merges=list(merges), ignore_merges=ignore_merges)
  tokenizer = lib.Tokenizer(model)
  if pattern == _GPT2:  # The library's own, several times as fast.
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
  else:
    words = lib.pre_tokenizers.Split(lib.Regex(pattern), behavior="isolated")
    spelling = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence([words, spelling])
  tokenizer.decoder = lib.decoders.ByteLevel()
  tokenizer.add_special_tokens(sorted(special, key=special.get))
  return _hugging_face(tokenizer, {})


def train(
  texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = ("<|endoftext|>",), pattern: str = "gpt2"
) -> Tokenizer:
  """Makes a byte-level BPE of `vocab_size` tokens from texts; the same texts, in any order, make the same.

  Args:
    texts: To count words in; no longer than some megabytes each.
    vocab_size: Tokens: the control tokens, 256 bytes, and merges.
    special: Control tokens, the first numbers of the vocabulary.
    pattern: How text is cut into words: `gpt2`, `cl100k`, `o200k` or a regular expression.
  """
  lib = _library("tokenizers")
  if vocab_size < 256 + len(special):
    raise UserError(f"vocab_size={vocab_size} is less than the 256 bytes and {len(special)} control tokens.")
  words = PATTERNS.get(pattern, pattern)
  counted = lib.Tokenizer(lib.models.BPE())
  counted.pre_tokenizer = lib.pre_tokenizers.Sequence(
    [
      lib.pre_tokenizers.Split(lib.Regex(words), behavior="isolated"),
      lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  trainer = lib.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(special),
    initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  counted.train_from_iterator(texts, trainer)
  model = json.loads(counted.to_str())["model"]
  vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
  if len(vocab) < vocab_size:
    raise UserError(
      f"vocab_size={vocab_size}: the text has words for {len(vocab):,} tokens only; take as many or fewer."
    )
  return bpe(vocab, merges, pattern=words, special={name: vocab[name] for name in special})


def _library(name: str) -> Any:
  try:
    if name == "tokenizers":
      import tokenizers

      return tokenizers
    import sentencepiece

    return sentencepiece
  except ModuleNotFoundError:
    raise UserError(f"tokenizer: this kind needs the package {name}: pip install 'bigjax[text]'.") from None


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
  names = ("tokenizer.json", "vocabulary.json", "tokenizer.model", "spiece.model", "vocab.json", "encoder.json")
  for place in (folder, folder / "tokenizer"):
    found = [place / name for name in names if (place / name).is_file()]
    found += sorted(place.glob("*.tiktoken")) + sorted(place.glob("*.model"))
    if found:
      return found[0]
  raise UserError(f"tokenizer: the folder {str(folder)!r} holds none of {', '.join(names)}, *.tiktoken, *.model.")


def _beside(place: pathlib.Path, *names: str) -> pathlib.Path:
  for name in names:
    if (place.parent / name).is_file():
      return place.parent / name
  raise UserError(f"tokenizer: {place.name!r} needs {' or '.join(names)} beside it, in {str(place.parent)!r}.")


def _json(place, content):
  read = json.loads(content)
  if not isinstance(read, dict):
    raise UserError(f"tokenizer: {str(place)!r} is not a tokenizer's file.")
  if isinstance(read.get("characters"), str):  # In GPT-2's vocabulary these are tokens, with numbers.
    return characters(read["characters"])
  if read.get("bytes") is True:
    return _bytes()
  if isinstance(read.get("model"), dict):
    return _hugging_face(_library("tokenizers").Tokenizer.from_str(content.decode()), _config(place))
  if read and all(isinstance(number, int) for number in read.values()):
    return _gpt2(place, _beside(place, "merges.txt", "vocab.bpe"))
  raise UserError(f"tokenizer: {str(place)!r} is not a tokenizer's file; it holds {', '.join(list(read)[:5])}.")


def _config(place: pathlib.Path) -> dict[str, str]:
  """Returns which token `tokenizer_config.json` says is bos, eos, ..."""
  file = place.parent / "tokenizer_config.json"
  read = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
  return _roles(read)


def _roles(config):
  found = {role: config.get(f"{role}_token") for role in _ROLES}
  return {role: t["content"] if isinstance(t, dict) else t for role, t in found.items() if t}


def _hugging_face(tokenizer, config: Mapping[str, str]) -> Tokenizer:
  tokenizer.no_truncation()  # Some files have a length of their own.
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True  # As text.
  if hasattr(tokenizer.model, "_resize_cache"):
    # Words whose tokens are remembered: the library's 10,000 are fewer than a book has, which costs a quarter.
    tokenizer.model._resize_cache(2**16)
  special = {t.content: number for number, t in tokenizer.get_added_tokens_decoder().items() if t.special}
  roles = {}
  for role, names in _ROLES.items():
    name = config.get(role) or next((name for name in names if name in special), None)
    number = tokenizer.token_to_id(name) if name else None
    if number is not None:
      roles[role] = number

  around = tokenizer.encode("").ids  # What the library's template puts there.
  begin = around[0] if around and around[0] == roles.get("bos") else None

  @functools.cache
  def reading_control_tokens():
    return _library("tokenizers").Tokenizer.from_str(tokenizer.to_str())

  def by_library(texts, chosen=tokenizer):
    found = chosen.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in found]

  pattern = _word_pattern(tokenizer)
  plainly = by_library if pattern is None else wordwise.Encoder(pattern, by_library)

  def encode(texts, special):
    return by_library(texts, reading_control_tokens()) if special else plainly(texts)

  def files():
    config = {f"{role}_token": tokenizer.id_to_token(number) for role, number in roles.items()}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}

  spelling = json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
  plain = tokenizer.normalizer is None and "ByteLevel" in spelling and '"add_prefix_space": true' not in spelling
  return Tokenizer(
    kind="tokenizers",
    piece=_SHORT if plain else _LONG,
    vocab_size=max(tokenizer.get_vocab().values()) + 1,
    special=special,
    roles=roles,
    names=tokenizer.get_vocab,
    files=files,
    _encode=encode,
    _decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False),
    begin=begin,
  )


def _word_pattern(tokenizer) -> str | None:
  """Returns what cuts text into words, if it is known and a word's tokens depend on nothing else."""
  made = json.loads(tokenizer.to_str())
  if made["normalizer"] or made["model"]["type"] != "BPE" or made["model"].get("dropout"):
    return None
  if not all(token["special"] for token in made["added_tokens"]):  # Others are found in text.
    return None
  *before, spelling = (made["pre_tokenizer"] or {}).get("pretokenizers", [made["pre_tokenizer"]]) or [None]
  if not spelling or spelling["type"] != "ByteLevel" or spelling["add_prefix_space"]:
    return None
  if not before:
    return _GPT2 if spelling["use_regex"] else None
  split = {"type": "Split", "behavior": "Isolated", "invert": False}
  found = [pattern for pattern in PATTERNS.values() if before == [{**split, "pattern": {"Regex": pattern}}]]
  return found[0] if found and not spelling["use_regex"] else None


def _gpt2(vocab_file, merges_file) -> Tokenizer:
  vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
  lines = merges_file.read_text(encoding="utf-8").split("\n")
  merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
  missing = next(("".join(pair) for pair in merges if "".join(pair) not in vocab), None)
  if missing is not None or not all(len(pair) == 2 for pair in merges):
    raise UserError(
      f"tokenizer: {merges_file.name!r} does not belong to {vocab_file.name!r}: {shown(missing)} is no token."
    )
  special = {name: number for name, number in vocab.items() if name.startswith("<|") and name.endswith("|>")}
  return bpe(vocab, merges, special=special)


def _tiktoken(content: bytes, pattern: str | None) -> Tokenizer:
  """A rank for each string of bytes: the pair is merged first whose union has the lowest."""
  ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
  known, special = _TIKTOKEN.get(len(ranks), (None, {}))
  if pattern is None and known is None:
    raise UserError(
      f"tokenizer: a tiktoken file of {len(ranks):,} ranks is none that is known: say how text is cut into words with "
      f"pattern, a regular expression or one of {', '.join(PATTERNS)}."
    )
  spell = _spelling()
  merges = []
  for token, rank in ranks.items():
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    # Every way to make the token: which one a text takes depends on what was merged in it before.
    halves = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
    merges += [(rank, *half) for half in halves]
  merges.sort()
  return bpe(
    {spell(token): rank for token, rank in ranks.items()},
    [(spell(a), spell(b)) for *_, a, b in merges],
    pattern=PATTERNS.get(pattern, pattern) or known,
    special=special,
    ignore_merges=True,
  )


def _spelling() -> Callable[[bytes], str]:
  """How GPT-2 writes bytes as letters: printable ones of Latin-1 as they are, others from U+0100 on."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
  return lambda token: "".join(letters[byte] for byte in token)


def _sentencepiece(content: bytes) -> Tokenizer:
  model = _library("sentencepiece").SentencePieceProcessor(model_proto=content)
  size = model.get_piece_size()
  if not size:
    raise UserError("tokenizer: the SentencePiece model holds no pieces, it may be cut short.")
  names = [model.id_to_piece(i) for i in range(size)]
  roles = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
  roles = {role: number for role, number in roles.items() if number >= 0}
  special = {name: i for i, name in enumerate(names) if model.is_control(i)}

  def encode(texts, special):
    del special  # Its control tokens have no text.
    return [np.array(tokens, np.int32) for tokens in model.encode(list(texts), out_type=int)]

  return Tokenizer(
    kind="sentencepiece",
    piece=_LONG,
    vocab_size=size,
    special=special,
    roles=roles,
    names=lambda: {name: i for i, name in enumerate(names)},
    files=lambda: {"tokenizer.model": content},
    _encode=encode,
    _decode=model.decode,
    begin=roles.get("bos"),
  )


def _bytes() -> Tokenizer:
  return Tokenizer(
    kind="bytes",
    piece=_LONG,
    vocab_size=256,
    special={},
    roles={},
    names=lambda: {f"<0x{byte:02X}>": byte for byte in range(256)},
    files=lambda: {"vocabulary.json": b'{"bytes": true}'},
    _encode=lambda texts, special: [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts],
    _decode=lambda tokens: bytes(tokens).decode(errors="replace"),
  )


def role(tokenizer: Tokenizer, name: str, choice: str = "auto") -> int | None:
  """Returns the token for a role (`eos`, ...): the vocabulary's own, the one named `choice`, or None for `none`."""
  if choice == "none":
    return None
  if choice == "auto":
    return tokenizer.roles.get(name)
  found = tokenizer.names()
  if choice not in found:
    raise UserError(f"{name}={choice!r} is not in the vocabulary.{suggest(choice, tokenizer.special)}")
  return found[choice]
