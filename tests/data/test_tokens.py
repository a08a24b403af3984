import itertools
import json

import numpy as np
import pytest

from bigjax.data import documents, mixture, packing, pipeline, tokenize, tokenizers, tokens
from bigjax.errors import UserError

RNG = np.random.default_rng(0)
# Each document is of one byte and a number, so that whose a token is can be seen.
TEXTS = [chr(65 + i) * int(n) for i, n in enumerate(RNG.integers(1, 40, 25))] + ["z" * 200]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokens")
  (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
  inputs = documents.Inputs((str(folder / "a.jsonl"),))
  tokenize.tokenize(inputs, str(folder / "store"), tokenizers.load("byte"), shard_mb=2e-4, workers=1)
  return folder / "store"


def rows(source):
  return source.fetch(np.arange(len(source)))


def text(tokens):
  return bytes(np.asarray(tokens).tolist()).decode()


def test_windows_predict_every_token_once_through_all_shards(store):
  source = tokens.make(str(store), block=16)
  assert len(source.store.index["shards"]) > 2
  found = rows(source)["tokens"]
  assert found.dtype == np.int32 and found.shape == (len(source), 17)
  joined = "".join(TEXTS)
  assert len(source) == (len(joined) - 1) // 16
  assert text(found[:, 1:].ravel()) == joined[1 : 1 + 16 * len(source)]
  assert (found[1:, 0] == found[:-1, -1]).all()


def test_a_stride_of_one_takes_every_start(store):
  source = tokens.make(str(store), block=5, stride=1)
  joined = "".join(TEXTS)
  assert len(source) == len(joined) - 5
  ids = np.array([0, 7, len(source) - 1, 3])
  assert [text(row) for row in source.fetch(ids)["tokens"]] == [joined[i : i + 6] for i in ids]


def test_splits_are_of_documents_and_know_their_bytes(store):
  train, test = (tokens.make(str(store), block=4, stride=1, split=split) for split in ("[:20]", "[20:]"))
  assert text(rows(train)["tokens"][:, 0]) + text(rows(train)["tokens"][-1, 1:]) == "".join(TEXTS[:20])
  assert text(rows(test)["tokens"][0]) == "".join(TEXTS[20:])[:5]
  assert (train.vocab_size, train.bytes_per_token) == (256, 1.0)


@pytest.mark.parametrize("block", [1, 7, 16, 64, 500])
def test_packed_rows_hold_every_document_once_and_keep_them_apart(store, block):
  source = tokens.make(str(store), block=block, documents="packed")
  batch = rows(source)
  assert {name: (v.shape[1], v.dtype) for name, v in batch.items()} == dict.fromkeys(
    ("tokens", "segments", "positions"), (block + 1, np.int32)
  )
  assert (batch["tokens"][batch["segments"] == 0] == 0).all()
  predicted = {}
  for row, segments, positions in zip(*(batch[name] for name in ("tokens", "segments", "positions"))):
    used = segments > 0
    assert (np.diff(segments[used]) >= 0).all() and used[: used.sum()].all()  # In order, padding last.
    assert set(segments[used]) == set(range(1, segments.max() + 1))
    for segment in range(1, segments.max() + 1):
      piece = text(row[segments == segment])
      assert len(set(piece)) == 1  # Of one document.
      assert positions[segments == segment].tolist() == list(range(len(piece)))
      predicted[piece[0]] = predicted.get(piece[0], 0) + len(piece) - 1
  assert predicted == {t[0]: len(t) - 1 for t in TEXTS if len(t) > 1}
  assert source.efficiency == (batch["segments"] > 0).mean()


@pytest.mark.parametrize("kind", ["joined", "packed"])
def test_a_row_can_say_which_tokens_it_holds(store, kind):
  source, joined = tokens.make(str(store), block=16, documents=kind), "".join(TEXTS)
  mixed = mixture.make((source, source), weights=(1.0, 1.0))
  said = source.spans(np.arange(len(source)))
  for row, words in zip(rows(source)["tokens"], said):
    spans = [map(int, span.split(" to ")) for span in words.removeprefix("tokens ").split(", ")]
    held = "".join(joined[first : last + 1] for first, last in spans)
    assert text(row[: len(held)]) == held and not row[len(held) :].any()
  assert mixed.spans(np.arange(len(mixed))) == said + said and mixed.sizes() == [len(source)] * 2


def test_packing_some_documents_takes_those(store):
  source = tokens.make(str(store), block=50, documents="packed", split="[5:8]+[:2]")
  found = set(text(rows(source)["tokens"].ravel())) - {"\0"}
  assert found == {TEXTS[i][0] for i in (0, 1, 5, 6, 7) if len(TEXTS[i]) > 1}
  parts = [tokens.make(str(store), block=50, documents="packed", split=s) for s in ("fold(0,4)", "not_fold(0,4)")]
  letters = [set(text(rows(part)["tokens"].ravel())) - {"\0"} for part in parts]
  assert not letters[0] & letters[1]


def test_a_plan_is_made_once_and_a_damaged_one_again(store, monkeypatch):
  before = set(store.glob("packing-*.npz"))
  first = tokens.make(str(store), block=30, documents="packed")
  (file,) = set(store.glob("packing-*.npz")) - before
  made = []
  pack = packing.pack
  monkeypatch.setattr(packing, "pack", lambda *args: made.append(1) or pack(*args))
  again = tokens.make(str(store), block=30, documents="packed")
  assert not made
  file.write_bytes(file.read_bytes()[:-40])
  damaged = tokens.make(str(store), block=30, documents="packed")
  assert made
  for source in (again, damaged):
    for name, value in rows(first).items():
      np.testing.assert_array_equal(rows(source)[name], value)


def test_best_fit_puts_each_into_the_row_it_fills_best():
  lengths = np.array([6, 5, 4, 3, 2])
  plan = packing.pack(np.array([0, 10, 20, 30, 40]), lengths, 10)
  held = [plan.lengths[a:b].tolist() for a, b in itertools.pairwise(plan.rows)]
  assert held == [[6, 4], [5, 3, 2]] and plan.efficiency == 1
  assert plan.starts.tolist() == [0, 20, 10, 30, 40]


def test_documents_as_long_as_real_ones_are_fill_the_rows():
  lengths = np.exp(np.random.default_rng(1).normal(5.5, 1.2, 3000)).astype(np.int64) + 1
  plan = packing.pack(np.cumsum(lengths) - lengths, lengths, 1025)
  assert plan.efficiency > 0.995
  # Every token but the first of a document is predicted once.
  assert (plan.lengths - 1).sum() == (lengths - 1).sum()
  held = [plan.lengths[a:b].sum() for a, b in itertools.pairwise(plan.rows)]
  assert max(held) == 1025 and min(plan.lengths) > 1


def packed_batches(source, start=0, count=6, host=0, hosts=1):
  ops = ()
  with pipeline.train_batches(
    source, batch_size=4, seed=3, preprocess=ops, start_step=start, host=host, hosts=hosts
  ) as batches:
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("kind", ["joined", "packed", "mixed"])
def test_a_batch_is_a_function_of_seed_and_step_on_any_number_of_hosts(store, kind):
  def make():
    if kind != "mixed":
      return tokens.make(str(store), block=16, documents=kind)
    parts = tuple(tokens.make(str(store), block=16, documents="packed", split=s) for s in ("[:10]", "[10:]"))
    return mixture.make(parts, weights=(3.0, 1.0), changes=((4096, (0.0, 1.0)),))

  whole = packed_batches(make())
  later = packed_batches(make(), start=4, count=2)
  hosts = [packed_batches(make(), host=i, hosts=2) for i in range(2)]
  for name in whole[0]:
    for a, b in zip(whole[4:], later):
      np.testing.assert_array_equal(a[name], b[name])
    for step, batch in enumerate(whole):
      np.testing.assert_array_equal(batch[name], np.concatenate([h[step][name] for h in hosts]))


def test_mistakes_are_told(store, tmp_path):
  with pytest.raises(UserError, match=r"split='\[:1\]' has \d+ tokens, and a window takes 501"):
    tokens.make(str(store), block=500, split="[:1]")
  with pytest.raises(UserError, match=r"in one piece, such as \[:99%\]; or pack them"):
    tokens.make(str(store), block=5, split="[:2]+[4:]")
  with pytest.raises(UserError, match=r"stride=3 is for joined documents"):
    tokens.make(str(store), block=5, documents="packed", stride=3)
  with pytest.raises(UserError, match=r"vocab_size: the model has 100 tokens and the tokenizer \(bytes\) 256"):
    tokens.make(str(store), block=5, vocab_size=100)
  with pytest.raises(UserError, match=r"holds no finished token store"):
    tokens.make(str(tmp_path / "nothing"), block=5)
  with pytest.raises(UserError, match=r"block=0 and stride=None must be 1 or more"):
    tokens.make(str(store), block=0)
