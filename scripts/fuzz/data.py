"""Damaged data: images, tables, documents, conversations, stores of tokens, datasets in TFDS's formats."""

from __future__ import annotations

import functools
import gzip
import io
import json
import pathlib
import struct

import damage
import numpy as np
from cases import Target

from bigjax.errors import UserError

ANY = {**damage.CONTENT, **damage.TEXT, **damage.PLACE}
TREE = {**ANY, **damage.TREE}
TEXTS = [f"document {i}: {'the cat sat on the mat. ' * (i % 5 + 1)}" for i in range(12)]


# Images


def _images(folder: pathlib.Path) -> None:
  from PIL import Image

  y, x = np.mgrid[:24, :32] / 8
  pixels = (127 * np.stack([np.sin(x) + 1, np.cos(y) + 1, np.sin(x + y) + 1], -1)).astype(np.uint8)
  options = {"JPEG": dict(quality=90), "PNG": {}, "GIF": {}, "BMP": {}}
  for kind, option in options.items():
    Image.fromarray(pixels).save(folder / f"image.{kind.lower()}", kind, **option)
  Image.fromarray(pixels).save(folder / "progressive.jpeg", "JPEG", progressive=True)
  Image.fromarray(pixels[..., 0]).save(folder / "grey.png", "PNG")


def _decoded(folder: pathlib.Path, name: str):
  """As a config decodes and crops them, and `bigjax data prepare images` looks them over."""
  from bigjax.data import ops, prepare, tfdata

  tf = tfdata.tensorflow()
  content = (folder / name).read_bytes()
  chains = ["decode", "decode(precise=True)", "inception_crop(8)"] if name.endswith("jpeg") else ["decode(0)"]
  found = {}
  for text in chains:
    example = {"image": tf.constant(content)}
    for op in ops.parse(text):
      example = op.apply(example, tf.constant((3, 4), tf.int32))
    found[text] = example["image"].numpy()
  prepare._check_whole(folder, [pathlib.Path(name)])
  return found


# Tables


def _tables(folder: pathlib.Path) -> None:
  import pyarrow
  import pyarrow.parquet

  draw = np.random.default_rng(0)
  x, label = draw.normal(size=(20, 3)).astype(np.float32), draw.integers(0, 3, 20)
  rows = ["a,b,c,label"] + [",".join(map(str, [*row, k])) for row, k in zip(x.tolist(), label.tolist(), strict=True)]
  (folder / "rows.csv").write_text("\n".join(rows) + "\n")
  quoted = ["a,job,label"] + [f'{i}.5,"mason, retired {i % 2}",{i % 3}' for i in range(20)]
  (folder / "quoted.csv").write_text("\n".join(quoted) + "\n")
  (folder / "rows.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
  np.savez(folder / "arrays.npz", x=x, label=label)
  np.savez_compressed(folder / "small.npz", x=x, label=label)
  np.save(folder / "x.npy", x)
  buffer = io.BytesIO()
  np.save(buffer, x)
  (folder / "x.npy.gz").write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
  images = draw.integers(0, 256, (5, 4, 4), np.uint8)
  idx = bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape) + images.tobytes()
  (folder / "images-ubyte").write_bytes(idx)
  (folder / "images-ubyte.gz").write_bytes(gzip.compress(idx, mtime=0))
  columns = {name: x[:, i] for i, name in enumerate("abc")} | {"label": label, "job": ["a", "b"] * 10}
  pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")


def _table(folder: pathlib.Path, name: str):
  from bigjax.data import arrays

  drop = ("job",) if name in ("rows.parquet", "quoted.csv") else ()
  source = arrays.make(str(folder / name), drop=drop)
  return source.fetch(np.arange(len(source))) | {"classes": source.classes}


# Text


def _documents(folder: pathlib.Path) -> None:
  import pyarrow
  import pyarrow.parquet

  lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
  (folder / "a.jsonl").write_text(lines)
  (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
  with pyarrow.output_stream(str(folder / "a.jsonl.zst"), "zstd") as file:
    file.write(lines.encode())
  (folder / "a.txt").write_text("\n\n".join(TEXTS))
  pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet", row_group_size=4)


def _read(folder: pathlib.Path, name: str):
  from bigjax.data import documents, text

  inputs = documents.Inputs((str(folder / name),), document="paragraph")
  found = [document for part in inputs.parts(200) for document in inputs.read(part)]
  if name == "a.txt":
    source = text.make(str(folder / name), block=16, stride=16)
    found.append(source.fetch(np.arange(len(source)))["tokens"])
  return found


def _conversations(folder: pathlib.Path) -> None:
  turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
  (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns * (i % 2 + 1)}) + "\n" for i in range(6)))
  template = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
  )
  config = {"chat_template": template, "eos_token": "<|end|>", "bos_token": {"content": "<s>"}}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _chat(folder: pathlib.Path):
  from bigjax.data import chat

  template = str(folder / "tokenizer_config.json")
  source = chat.make(str(folder / "chat.jsonl"), tokenizer="byte", template=template, block=96)
  return source.fetch(np.arange(len(source)))


# Stores


def _store(folder: pathlib.Path) -> None:
  from bigjax.data import documents, tokenize, tokenizers

  (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
  inputs = documents.Inputs((str(folder / "a.jsonl"),))
  tokenize.tokenize(inputs, str(folder / "store"), tokenizers.load("byte"), shard_mb=5e-4, workers=1)
  (folder / "a.jsonl").unlink()
  _rows(folder)  # The packing is kept beside it.


def _rows(folder: pathlib.Path):
  from bigjax.data import tokens

  found = []
  for documents in ("joined", "packed"):
    source = tokens.make(str(folder / "store"), block=32, documents=documents)
    found.append((source.fetch(np.arange(len(source))), source.bytes_per_token))
  part = tokens.make(str(folder / "store"), block=8, split="[3:7]")
  return [*found, part.fetch(np.arange(len(part)))]


def _verified(folder: pathlib.Path):
  """As `bigjax data verify` has it."""
  from bigjax.data import token_store

  if wrong := list(token_store.verify(str(folder / "store"))):
    raise UserError("\n".join(wrong))
  return _rows(folder)


def _dataset(folder: pathlib.Path, kind: str) -> None:
  from bigjax.data import arrays, prepare

  _tables(folder)
  source = arrays.make(str(folder / "arrays.npz"))
  for file in folder.iterdir():
    file.unlink()
  prepare.from_sources({"train": source}, dataset="small", data_dir=str(folder), file_format=kind)


def _examples(folder: pathlib.Path):
  from bigjax.data import tfds

  source = tfds.make("small", split="train", data_dir=str(folder))
  return source.fetch(np.arange(len(source)))


def _target(name, make, read, kinds, files=("*",), **how) -> Target:
  return Target(name, __name__, make, read, kinds, files, **how)


TABLES = (
  "rows.csv quoted.csv rows.csv.gz arrays.npz small.npz x.npy x.npy.gz images-ubyte images-ubyte.gz rows.parquet"
).split()
SAID = r"path: |drop: |column|label|rows\.|quoted\."
DATASETS = {"TFRecord": ("tfrecord", "*tfrecord*"), "ArrayRecord": ("array_record", "*array_record*")}
IMAGES = "image.jpeg progressive.jpeg image.png grey.png image.gif image.bmp".split()
TARGETS = [
  *(_target(f"table, {n}", _tables, functools.partial(_table, name=n), ANY, (n,), said=SAID) for n in TABLES),
  *(
    _target(f"documents, {n}", _documents, functools.partial(_read, name=n), TREE, (n,), said=r"a\.\w|block=")
    for n in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet")
  ),
  _target("conversations", _conversations, _chat, TREE, said=r"path: |template"),
  _target("token store", _store, _rows, TREE),
  _target("token store, verified", _store, _verified, TREE, sure="*"),
  *(
    _target(name, functools.partial(_dataset, kind=kind), _examples, TREE, (files, "*.json"))
    for name, (kind, files) in DATASETS.items()
  ),
  _target(
    "TFRecord, records", functools.partial(_dataset, kind="tfrecord"), _examples, TREE, ("*tfrecord*",), sure="*"
  ),
  *(
    _target(n, _images, functools.partial(_decoded, name=n), damage.CONTENT, (n,), said="'image'|cut short|damaged")
    for n in IMAGES
  ),
]
