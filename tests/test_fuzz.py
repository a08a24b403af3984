"""Damaged files of every kind, scripts/fuzz/run.py: refused in words, harmless, or what their format can't tell."""

import importlib
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts" / "fuzz"))
cases, run = importlib.import_module("cases"), importlib.import_module("run")

SLOW_TO_IMPORT = {"image.jpeg", "progressive.jpeg", "image.png", "grey.png", "image.gif", "image.bmp"}
SLOW_TO_IMPORT |= {"TFRecord", "TFRecord, records", "ArrayRecord"}


def failures(names, count, seed):
  found = cases.run(run.TARGETS, dict.fromkeys(names, count), seed)
  assert len(found) == count * len(names)
  assert {e.target for e in found if e.outcome == "refused"} == set(names)  # The damage is seen at all.
  return [f"{e.target}, case {e.case}: {e.outcome}: {e.why}" for e in found if e.outcome not in cases.FINE]


def test_damaged_files_are_refused_in_words_or_harmless():
  assert failures([n for n in run.TARGETS if n not in SLOW_TO_IMPORT], 8, seed=1) == []


@pytest.mark.slow
def test_many_damaged_files_of_every_kind_are_refused_in_words_or_harmless():
  assert failures(list(run.TARGETS), 60, seed=2) == []


def test_a_reader_that_crashes_hangs_or_takes_all_memory_is_noticed(tmp_path):
  reader = tmp_path / "wrong_reader.py"
  reader.write_text(
    "import os, pathlib, time\n"
    "import damage\n"
    "from cases import Target\n"
    "from bigjax.errors import UserError\n"
    "def make(folder): (folder / 'a.txt').write_text('whole')\n"
    "def wrong(act):\n"
    "  def read(folder):\n"
    "    if (text := (folder / 'a.txt').read_bytes()) == b'whole': return text\n"
    "    return act()\n"
    "  return read\n"
    "def refuse(text): raise UserError(text)\n"
    "acts = dict(CRASH=lambda: 1 / 0, SLOW=lambda: time.sleep(99), MEMORY=lambda: bytearray(2**40))\n"
    "acts |= dict(CHANGED=lambda: 1)\n"
    "acts |= dict(signal=lambda: os.abort(), UNCLEAR=lambda: refuse('it failed'))\n"
    "kinds = {'grow': damage.CONTENT['grow']}\n"
    "TARGETS = [Target(n, __name__, make, wrong(a), kinds, sure='*') for n, a in acts.items()]\n"
  )
  sys.path.append(str(tmp_path))  # Of the process that reads, too.
  try:
    targets = {t.name: t for t in importlib.import_module("wrong_reader").TARGETS}
    found = cases.run(targets, dict.fromkeys(targets, 1), seconds=3)
  finally:
    sys.path.remove(str(tmp_path))
  assert {e.target: e.outcome for e in found} == {n: n if n != "signal" else "CRASH" for n in targets}
