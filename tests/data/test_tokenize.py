import gzip
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bigjax.commands import data as command
from bigjax.data import documents, token_store, tokenize, tokenizers
from bigjax.errors import UserError

BYTE = tokenizers.load("byte")
LINES = [f"line {i} é" * (1 + i % 5) + "\n" for i in range(60)]


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def read(*paths, size=10**9, **kwargs):
  """Every document, and how many parts they came in."""
  inputs = documents.Inputs(tuple(map(str, paths)), **kwargs)
  parts = inputs.parts(size)
  return [text for part in parts for text in inputs.read(part)], len(parts)


def contents(store):
  """The text of every document, by way of its tokens."""
  found = []
  for (start, _), (stop, _) in zip(store.documents[:-1].tolist(), store.documents[1:].tolist()):
    tokens = np.empty(stop - start, np.int32)
    store.read(start, tokens)
    found.append(store.tokenizer.decode(tokens))
  return found


def digests(folder):
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.name[0].isdigit()
  }


def jsonl(path, texts, field="text"):
  return write(path, "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))


def parquet(path, texts):
  import pyarrow
  import pyarrow.parquet

  table = pyarrow.table({"meta": [{"a": 1, "b": 2}] * len(texts), "text": texts})
  pyarrow.parquet.write_table(table, path, row_group_size=7)
  return str(path)


@pytest.mark.parametrize("size", [1, 50, 333, 10**9])
def test_documents_are_the_same_in_however_many_parts(tmp_path, size):
  text = write(tmp_path / "a.txt", "".join(LINES))
  assert read(text, size=size, document="line")[0] == LINES
  assert read(text, size=size) == (["".join(LINES)], 1)
  assert read(jsonl(tmp_path / "a.jsonl", LINES), size=size)[0] == LINES
  assert read(parquet(tmp_path / "a.parquet", LINES), size=size)[0] == LINES
  paragraphs = ["\n\none\ntwo\n\n", "three\n\n\n\n", "four\r\n\r\n", "five\n"]
  text = write(tmp_path / "p.txt", "".join(paragraphs))
  assert read(text, size=size, document="paragraph")[0] == paragraphs
  assert read(text, size=1, document="paragraph")[1] == 4


def test_kinds_of_files_mix_and_may_be_compressed(tmp_path):
  write(tmp_path / "b.txt.gz", gzip.compress(b"bb"))
  jsonl(tmp_path / "c.jsonl", ["c1", "", "c2"])
  write(tmp_path / "c.jsonl.gz", gzip.compress((tmp_path / "c.jsonl").read_bytes()))
  write(tmp_path / "a.txt", "\ufeffaa")
  found, parts = read(tmp_path / "*.txt*", tmp_path / "*.jsonl", tmp_path / "*.gz")
  assert found == ["aa", "bb", "c1", "c2", "bb", "c1", "c2"]
  assert parts == 1


def test_a_prepared_dataset_of_tfds_is_read(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  from bigjax.data import prepare

  class Texts:
    def __len__(self):
      return 20

    def fetch(self, ids):
      return {"text": np.array([LINES[i] for i in ids], object), "label": ids}

  prepare.from_sources({"train": Texts()}, dataset="lines", data_dir=str(tmp_path))
  found, parts = read(tfds="lines", data_dir=str(tmp_path), split="train[:50%]", size=40)
  assert len(found) == 10 and set(found) <= set(LINES) and parts > 2
  with pytest.raises(UserError, match=r"feature 'label' is no text"):
    read(tfds="lines", data_dir=str(tmp_path), field="label")


@pytest.mark.parametrize(
  ("name", "content", "kwargs", "message"),
  [
    ("a.jsonl", '{"text": "x"}\n{"txt": 1}\n', {}, r"a\.jsonl', the line at byte 14: there is no field 'text'"),
    ("a.jsonl", '{"text": 1}\n', {}, r"byte 0: the field 'text' is int, not text"),
    ("a.jsonl", '["x"]\n', {}, r"it is list, not an object"),
    ("a.jsonl", '{"text": "x"\n', {}, r"byte 0, is no JSON"),
    ("a.txt", "né".encode("latin-1"), {}, r"a\.txt' is not utf-8: .* after b'n'\. Set encoding, such as 'latin-1'"),
    ("a.txt", "x", dict(encoding="utf-16"), r"lines of 'utf-16' don't end as in ASCII"),
    ("a.txt", "x", dict(encoding="utf8000"), r"'utf8000' is none that Python knows"),
    ("a.txt", "x", dict(tfds="mnist"), r"and not both"),
    ("a.txt.gz", b"\x1f\x8bxx", {}, r"a\.txt\.gz' can't be read, it may be cut short"),
    ("a.parquet", b"PAR1", {}, r"a\.parquet' can't be read, it may be cut short"),
  ],
)
def test_a_document_that_can_not_be_read_is_named(tmp_path, name, content, kwargs, message):
  write(tmp_path / name, content)
  with pytest.raises(UserError, match=message):
    read(tmp_path / name, **kwargs)


def test_a_column_that_is_missing_is_told_with_those_there_are(tmp_path):
  with pytest.raises(UserError, match=r"no field 'body'.* Known: meta, text\. Say which"):
    read(parquet(tmp_path / "a.parquet", LINES), field="body")
  with pytest.raises(UserError, match=r"holds None, not text: drop the row"):
    read(parquet(tmp_path / "a.parquet", ["x", None]))
  with pytest.raises(UserError, match=r"there is no file '.*b\*'"):
    read(tmp_path / "b*")


def test_a_store_holds_every_document_in_order(tmp_path):
  inputs = documents.Inputs((jsonl(tmp_path / "a.jsonl", LINES),))
  store = tokenize.tokenize(inputs, str(tmp_path / "store"), BYTE, shard_mb=1e-3, workers=1)
  assert len(store.index["shards"]) > 2
  assert contents(store) == LINES
  assert (store.num_documents, store.num_tokens) == (60, len("".join(LINES).encode()))
  assert store.bytes_per_token == 1 and store.index["dtype"] == "<u2"
  everything = np.empty(store.num_tokens, np.int32)
  store.read(0, everything)  # Through all shards.
  assert bytes(everything.tolist()) == "".join(LINES).encode()


def test_control_tokens_stand_around_documents_and_tell_no_bytes(tmp_path):
  trained = tokenizers.train(LINES, 262, special=("<s>", "<|endoftext|>", "<x>"))
  inputs = documents.Inputs((jsonl(tmp_path / "a.jsonl", ["ab", "abc"]),))
  store = tokenize.tokenize(inputs, str(tmp_path / "auto"), trained)
  assert contents(store) == ["ab<|endoftext|>", "abc<|endoftext|>"]
  assert store.documents[-1].tolist() == [7, 5]
  assert contents(tokenize.tokenize(inputs, str(tmp_path / "none"), trained, eos="none")) == ["ab", "abc"]
  both = tokenize.tokenize(inputs, str(tmp_path / "both"), trained, bos="auto", eos="<x>")
  assert contents(both) == ["<s>ab<x>", "<s>abc<x>"]
  assert both.tokenizer.digest == trained.digest


def test_large_vocabularies_take_four_bytes(tmp_path):
  symbols = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) + "".join(map(chr, range(0x20000, 0x20000 + 50_000)))
  inputs = documents.Inputs((write(tmp_path / "a.txt", "一\U00020000\U0002c34f"),))
  store = tokenize.tokenize(inputs, str(tmp_path / "store"), tokenizers.characters(symbols))
  assert store.index["dtype"] == "<u4"
  assert contents(store) == ["一\U00020000\U0002c34f"]


def test_any_number_of_processes_makes_the_same_bytes(tmp_path):
  trained = tokenizers.train(LINES, 280)
  inputs = documents.Inputs((jsonl(tmp_path / "a.jsonl", LINES),))
  for workers in (1, 2):
    tokenize.tokenize(inputs, str(tmp_path / str(workers)), trained, shard_mb=1e-3, workers=workers)
  assert digests(tmp_path / "1") == digests(tmp_path / "2") and len(digests(tmp_path / "1")) > 4
  index = [json.loads((tmp_path / str(workers) / "index.json").read_text()) for workers in (1, 2)]
  assert index[0] == index[1]


def test_a_job_that_fails_or_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
  inputs = documents.Inputs((jsonl(tmp_path / "a.jsonl", LINES),))
  tokenize.tokenize(inputs, str(tmp_path / "whole"), BYTE, shard_mb=5e-4, workers=1)
  made = []

  def until(limit):
    def tell(line):
      made.append(line)
      if len(made) == limit:
        raise KeyboardInterrupt

    return tell

  with pytest.raises(KeyboardInterrupt):
    tokenize.tokenize(inputs, str(tmp_path / "store"), BYTE, shard_mb=5e-4, workers=1, tell=until(2))
  with pytest.raises(UserError, match=r"no finished token store .* with the same arguments goes on"):
    token_store.open_store(str(tmp_path / "store"))
  # What was under way when the machine went down: a shard's file without the word that it is whole.
  (tmp_path / "store" / "00002.tokens").write_bytes(b"half")
  tokenize.tokenize(inputs, str(tmp_path / "store"), BYTE, shard_mb=5e-4, workers=1, tell=until(0))
  assert digests(tmp_path / "store") == digests(tmp_path / "whole")
  assert len(made) == len(token_store.open_store(str(tmp_path / "store")).index["shards"])
  tokenize.tokenize(inputs, str(tmp_path / "store"), BYTE, shard_mb=5e-4, workers=1, tell=until(0))
  assert not list((tmp_path / "store").glob("*.new")) and len(made) == len(digests(tmp_path / "whole")) / 2


def test_a_process_killed_in_the_middle_leaves_what_the_next_goes_on_with(tmp_path):
  path = jsonl(tmp_path / "a.jsonl", LINES * 400)
  arguments = ["tokenize", path, "--tokenizer=byte", "--shard_mb=0.02", "--workers=1"]
  line = [sys.executable, "-m", "bigjax", "data", *arguments, f"--out={tmp_path / 'killed'}"]
  with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2]) as child:
    child.stdout.readline()  # A shard is done.
    time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
  assert not (tmp_path / "killed" / "index.json").exists()
  for name in ("killed", "whole"):
    assert command.main([*arguments, f"--out={tmp_path / name}"]) == 0
  assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  inputs = documents.Inputs((jsonl(tmp_path / "a.jsonl", LINES),))
  out = tmp_path / "store"
  tokenize.tokenize(inputs, str(out), BYTE)
  with pytest.raises(
    UserError, match=r"holds another token store \(vocabulary: .* there, .* here; vocab_size: 256 there"
  ):
    tokenize.tokenize(inputs, str(out), tokenizers.train(LINES, 262))
  os.utime(tmp_path / "a.jsonl", (1, 1))
  with pytest.raises(UserError, match=r"another token store \(files:"):
    tokenize.tokenize(inputs, str(out), BYTE)
  with pytest.raises(UserError, match=r"holds something else"):
    tokenize.tokenize(inputs, str(tmp_path), BYTE)


def test_damage_is_found(tmp_path):
  inputs = documents.Inputs((jsonl(tmp_path / "a.jsonl", LINES),))
  out = tmp_path / "store"
  tokenize.tokenize(inputs, str(out), BYTE, shard_mb=1e-3, workers=1)
  assert command.main(["verify", str(out)]) == 0
  file = out / "00001.tokens"
  content = bytearray(file.read_bytes())
  content[10] ^= 1
  file.write_bytes(content)
  assert [line[:12] for line in token_store.verify(str(out))] == ["00001.tokens"]
  assert command.main(["verify", str(out)]) == 1
  file.write_bytes(content[:-2])
  with pytest.raises(UserError, match=r"is damaged: 00001\.tokens has 1?,?\d+ bytes, not 1?,?\d+\. Copy it again"):
    token_store.open_store(str(out))
  file.unlink()
  with pytest.raises(UserError, match=r"00001\.tokens is missing"):
    token_store.open_store(str(out))
  (out / "index.json").write_text('{"format": "bigjax tokens 9"}')
  with pytest.raises(UserError, match=r"is of format 'bigjax tokens 9'"):
    token_store.open_store(str(out))
  (out / "index.json").write_text('{"for')
  with pytest.raises(UserError, match=r"index\.json' is damaged"):
    token_store.open_store(str(out))


def test_from_text_to_a_store_by_commands(tmp_path, capsys):
  text = write(tmp_path / "a.txt", "".join(LINES))
  assert command.main(["tokenizer", text, "--vocab_size=270", f"--out={tmp_path / 'bpe'}"]) == 0
  assert command.main(["tokenizer", text, "--kind=characters", f"--out={tmp_path / 'char'}"]) == 0
  for kind in ("bpe", "char"):
    out = tmp_path / f"store-{kind}"
    arguments = [text, f"--tokenizer={tmp_path / kind}", f"--out={out}", "--document=line", "--eos=none"]
    assert command.main(["tokenize", *arguments]) == 0
    assert contents(token_store.open_store(str(out))) == LINES
  assert 'source=dict(name="tokens", path=' in capsys.readouterr().out
  with pytest.raises(UserError, match=r"--vocab_size says how many"):
    command.main(["tokenizer", text, f"--out={tmp_path / 'x'}"])
