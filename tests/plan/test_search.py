"""The search: what can't be or can't fit is left out before a compile, the best comes with flags to paste."""

import json
import shlex
import time

import bigjax
from bigjax.plan import kept, search

# Without remat to choose, which would be four times as many.
PLAIN = dict(
  total_steps=10,
  batch_size=2,
  data=dict(source=dict(name="synthetic", kind="images", num_examples=8, shape=(4, 4, 1), num_classes=3)),
  model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3),
  task=dict(name="classification"),
  optimizer=dict(name="sgd"),
  schedule=dict(name="constant", peak=1e-3),
)


def test_meshes_multiply_to_the_devices_and_batches_divide(small):
  config = bigjax.resolve(small())
  found = list(search.combinations(config, ("h100:8", 1)))
  assert {tuple(size for _, size in c["mesh"]) for c in found} >= {(8,), (4, 2), (2, 4), (1, 8)}
  assert {c["batch_size"] for c in found} == {8, 16, 32}
  assert {c["model.remat"] for c in found} == set(search.REMATS)
  for c in found:
    ways = dict(map(tuple, c["mesh"]))["data"]
    assert c["batch_size"] % (ways * c["accumulate"]) == 0


def test_the_most_promising_comes_first_and_what_can_not_be_is_counted(small):
  config = bigjax.resolve(small(model__vocab_size=500))  # Not to be split into 8.
  every = search.combinations(config, ("h100:8", 1))
  tried = [c for c in every if (c["model.remat"], c["batch_size"], c["accumulate"]) == ("none", 16, 1)]
  found, refused = search.candidates(config, tried, ("h100:8", 1), time.monotonic() + 600)
  assert refused == sum(["tensor", 8] in c["mesh"] for c in tried) > 0
  assert len(found) == len(tried) - refused
  assert [c.seconds_a_token for c in found] == sorted(c.seconds_a_token for c in found)


def test_without_a_compiler_estimates_are_ranked_and_the_flags_are_a_command():
  lines = list(search.run(bigjax.resolve(PLAIN), [], ("h100:2", 1), kept.Kept(), 60.0))
  assert any("estimates alone" in line for line in lines)
  flags = shlex.split(lines[-1])
  assert all(flag.startswith("--config.") for flag in flags)
  best = next(line for line in lines if " ns " in line)
  assert lines[-1] in best


def test_time_being_up_ends_it(small):
  config = bigjax.resolve(small())
  lines = list(search.run(config, [], ("h100:8", 1), kept.Kept(), 0.0))
  assert lines[-1] == "nothing was found that fits"


def test_what_was_compiled_before_is_not_even_lowered_again(tmp_path, monkeypatch):
  config, where, keep = bigjax.resolve(PLAIN), ("h100:2", 1), kept.Kept(str(tmp_path))
  monkeypatch.setattr(search.slices, "compiles", lambda name: True)
  known = dict(fits=True, chips=2, memory=dict(total=2**20), time=dict(pace_a_chip=100.0, pace_unit="examples"))
  found, _ = search.candidates(config, search.combinations(config, where), where, time.monotonic() + 600)
  assert len({c.question for c in found}) == len(found) > 2
  for candidate in found[:-1]:
    keep.put(candidate.question, known)
  started = []

  class Process:
    def __init__(self, command, **_):
      started.append(command)
      self.returncode = 0

    def communicate(self, timeout):
      return json.dumps(known | {"kept": False}), ""

  monkeypatch.setattr(search.subprocess, "Popen", Process)
  lines = list(search.run(config, ["--config=mine.py"], where, keep, 600.0, jobs=1))
  assert sum("(kept)" in line for line in lines) == len(found) - 1 and len(started) == 1
  assert "--config=mine.py" in started[0] and f"--keep={tmp_path}" in started[0]
  list(search.run(config, ["--config=mine.py"], where, keep, 600.0, jobs=1))
  assert len(started) == 1


def test_the_ranking_is_by_time_a_token():
  rows = [dict(changes={"accumulate": n}, seconds=s, memory=2**30, about=False) for n, s in ((1, 3e-9), (2, 1e-9))]
  lines = list(search.ranking(rows, 2**31))
  assert lines[-1] == "--config.accumulate=2" and "50%" in lines[2]
