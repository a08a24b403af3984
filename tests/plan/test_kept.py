"""What compiled programs came to is found again for the same module, and never for another or a broken file."""

import sys
import types

import pytest

from bigjax.plan import kept


def test_it_is_found_under_the_hash_of_module_chips_options_and_versions(tmp_path, monkeypatch):
  keep = kept.Kept(str(tmp_path))
  key = kept.key("module", "v5e:2x2", {"a": True})
  assert keep.get(key) is None
  keep.put(key, {"bytes": 5})
  assert keep.get(kept.key("module", "v5e:2x2", {"a": True})) == {"bytes": 5}
  for other in (("module ", "v5e:2x2", {"a": True}), ("module", "v5e:2x4", {"a": True}), ("module", "v5e:2x2", None)):
    assert kept.key(*other) != key
  monkeypatch.setattr(kept, "_version", lambda name: "another")
  assert kept.key("module", "v5e:2x2", {"a": True}) != key


def test_a_file_cut_short_is_no_result(tmp_path):
  keep = kept.Kept(str(tmp_path))
  keep.put("k", {"bytes": 5})
  (tmp_path / "k.json").write_text('{"byt')
  assert keep.get("k") is None


def test_without_a_folder_nothing_is_kept(tmp_path):
  kept.Kept().put("k", {"bytes": 5})
  assert kept.Kept().get("k") is None


@pytest.fixture
def fresh():
  kept._code.cache_clear()
  yield kept._code.cache_clear
  kept._code.cache_clear()


def test_a_question_is_another_with_other_words_versions_flags_or_code_of_a_user(tmp_path, monkeypatch, fresh):
  own = tmp_path / "my_model.py"
  own.write_text("width = 1")
  monkeypatch.setitem(sys.modules, "my_model", types.ModuleType("my_model"))
  sys.modules["my_model"].__file__ = str(own)
  first = kept.question("config", "v5e:2x2")
  assert kept.question("config", "v5e:2x2") == first
  assert kept.question("config", "v5e:2x4") != first
  with monkeypatch.context() as m:
    m.setenv("LIBTPU_INIT_ARGS", "--xla_something=1")
    assert kept.question("config", "v5e:2x2") != first
  with monkeypatch.context() as m:
    m.setattr(kept, "_version", lambda name: "another")
    assert kept.question("config", "v5e:2x2") != first
  own.write_text("width = 2")
  fresh()
  assert kept.question("config", "v5e:2x2") != first
  own.write_text("width = 1")
  fresh()
  assert kept.question("config", "v5e:2x2") == first
