import html.parser
import json
import math
import re

import numpy as np
import pytest

from bigjax.errors import UserError
from bigjax.metrics import Writers
from bigjax.report import curves, write_report
from bigjax.report.run import Run, Series, split_name

VOID = {"meta", "img", "br", "wbr", "path", "use"}


class Page(html.parser.HTMLParser):
  """The tags, attributes and visible text of a page; an error where tags don't match."""

  def __init__(self, path):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], ""
    self.feed(path.read_text(encoding="utf-8"))
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data


@pytest.fixture
def workdir(tmp_path):
  """A finished run of 40 rows with two evaluations and all its files."""
  folder = tmp_path / "digits"
  with Writers(folder, ("jsonl", "csv")) as writers:
    for step in range(10, 401, 10):
      writers.write(step, {"loss": 2 / step, "accuracy": 1 - 1 / step, "learning_rate": 1e-3, "grad_norm": 1.0})
      if step % 200 == 0:
        values = {"test/loss": 3 / step, "test/accuracy": 0.9876 if step == 200 else 0.9321, "test/recall/7": 0.8765}
        writers.write(step, values | {"test/confusion_matrix": [[1234, 56], [0, 7]], "test/ema/accuracy": 0.5})
  config = {
    "batch_size": 64,
    "model": {"name": "vit", "depth": 12},
    "evals": {"test": {"evaluator": {"name": "classification"}}},
    "decay": [[".*kernel", 0.05]],
    "early_stop": None,
    "claim": {"metric": "test/accuracy", "at_least": 0.925, "at_most": None},
  }
  run = {
    "status": "finished",
    "step": 400,
    "total_steps": 400,
    "command": ["bigjax", "train", "--config=configs/digits.py", "--config.note=a b"],
    "versions": {"jax": "0.12.0.1"},
    "git": {"commit": "0123456789abcdef", "changed_files": [" M a.py"]},
    "mesh": {"data": 8},
    "seconds": {"start": 5.0, "train": 9.0, "input": 1.0, "eval": 2.0, "save": 0.0},
    "started": "2026-11-22T03:10:02+00:00",
    "starts": ["2026-11-22T03:10:02+00:00"],
  }
  parameters = [
    {"path": "blocks/0/mlp/kernel", "shape": [64, 128], "dtype": "float32", "count": 8192, "bytes": 32768},
    {"path": "head/kernel", "shape": [128, 10], "dtype": "float32", "count": 1280, "bytes": 5120},
  ]
  for name, content in (("config", config), ("run", run), ("parameters", parameters)):
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


def test_the_page_tells_the_result_and_all_it_takes_to_repeat_it(workdir):
  path = write_report(workdir)
  assert path == workdir / "report.html"
  page = Page(path)
  for expected in (
    "0.9876",  # the best
    "0.9321",  # the last
    "claim reached",
    "2,560",  # examples/s: 40 steps a second of 64
    "1,234",  # confusion
    "0.8765",  # of one class
    "9,472",  # parameters
    "blocks",
    "vit",
    ".*kernel",
    "bigjax train --config=configs/digits.py '--config.note=a b'",
    "0123456789ab",
    "data 8",
    "0.12.0.1",
    "training steps",
    "22 Nov 2026, 03:10 UTC",
  ):
    assert expected in page.text, expected


def test_the_page_needs_nothing_but_itself(workdir):
  page = Page(write_report(workdir))
  assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
  for name, value in page.attributes:
    if name in ("src", "href", "xlink:href"):
      assert re.match(r"#|data:|[\w.]+$", value), value
  style = (workdir / "report.html").read_text()
  assert "@import" not in style and "://" not in style


def test_every_colour_of_a_curve_follows_the_scheme(workdir):
  text = write_report(workdir).read_text()
  assert "var(--series-0)" in text and "#f0f0" not in text


@pytest.mark.parametrize("where", ["config", "config key", "run", "parameters", "metric", "workdir", "eval"])
def test_what_comes_from_files_is_shown_but_never_becomes_markup(tmp_path, where):
  evil = "<script>alert('1')</script>\"&amp;"
  folder = tmp_path / (evil.replace("/", "") if where == "workdir" else "run")
  with Writers(folder, ("jsonl",)) as writers:
    writers.write(1, {evil if where == "metric" else "loss": 1.0, f"{evil}/loss" if where == "eval" else "a": 1.0})
  config = {"note": evil} if where == "config" else {evil: {"name": evil}} if where == "config key" else {}
  run = dict.fromkeys(("status", "command", "python"), evil) | {"versions": {evil: evil}, "mesh": {evil: evil}}
  leaf = {"path": evil, "dtype": evil, "shape": [evil], "count": 1, "spec": evil}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "run.json").write_text(json.dumps(run if where == "run" else {}))
  (folder / "parameters.json").write_text(json.dumps([leaf] if where == "parameters" else []))
  path = write_report(folder)
  page = Page(path)
  assert "script" not in page.tags
  assert "alert('1')" in page.text
  assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_name_with_dollars_is_no_formula(tmp_path):
  with Writers(tmp_path, ("jsonl",)) as writers:
    writers.write(1, {"loss": 1.0, "$\\frac{$": 1.0, "$a^$/loss": 2.0})
  assert "$\\frac{$" in Page(write_report(tmp_path)).text


def test_an_empty_run_has_a_page(tmp_path):
  page = Page(write_report(tmp_path))
  assert "Nothing has been measured yet" in page.text
  assert not (tmp_path / "curves.png").exists()


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
  (tmp_path / "run.json").write_text('{"status": "running", "starts": [], "git": {}, "seconds": null}')
  (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "lo')
  page = Page(write_report(tmp_path))
  assert "running" in page.text and "0.5" in page.text


def test_a_loss_that_was_not_finite_is_said_at_the_top(tmp_path):
  with Writers(tmp_path, ("jsonl",)) as writers:
    for step in range(1, 61):
      writers.write(step, {"loss": 1 / step if step < 40 else math.nan, "accuracy": math.inf})
  text = Page(write_report(tmp_path)).text
  assert "accuracy was not finite at step 1" in text
  assert "not finite at 40 and 20 more" in text


def test_a_run_of_nothing_but_nan_has_a_page(tmp_path):
  with Writers(tmp_path, ("jsonl",)) as writers:
    writers.write(1, {"loss": math.nan, "test/confusion_matrix": [[math.nan, 1], [1, 1]]})
  assert "not finite" in Page(write_report(tmp_path)).text


def test_many_classes_become_a_picture_and_a_list_of_the_worst(tmp_path):
  counts = np.eye(60, dtype=int) * 20
  counts[41, 17] = 9
  with Writers(tmp_path, ("jsonl",)) as writers:
    writers.write(5, {"test/confusion_matrix": counts.tolist()})
  page = Page(write_report(tmp_path))
  assert any(name == "src" and value.startswith("data:image/png;base64,") for name, value in page.attributes)
  assert "1,200 of 1,209 right" in page.text
  assert "4117929" in page.text  # 41 taken for 17, 9 times of 29


def test_files_that_cannot_be_read_are_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config\.json can't be read"):
    write_report(tmp_path)
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(UserError, match=r"config\.json should hold"):
    write_report(tmp_path)
  with pytest.raises(UserError, match="is no folder"):
    write_report(tmp_path / "nowhere")


def test_writing_a_report_leaves_matplotlib_as_it_was(workdir):
  import matplotlib

  before = dict(matplotlib.rcParams)
  matplotlib.rcParams["lines.linewidth"] = 7.5
  try:
    write_report(workdir)
    assert matplotlib.rcParams["lines.linewidth"] == 7.5
  finally:
    matplotlib.rcParams["lines.linewidth"] = before["lines.linewidth"]
  assert dict(matplotlib.rcParams) == before


def test_training_and_evaluations_of_one_metric_share_a_panel(workdir):
  run = Run.read(workdir)
  panels = {panel.title: [series.label for series in panel.series] for panel in run.panels}
  assert panels == {
    "loss": ["train", "test"],
    "accuracy": ["train", "test", "test/ema"],
    "learning_rate": ["train"],
    "grad_norm": ["train"],
  }
  assert run.labels == ("train", "test", "test/ema")


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("loss", ("train", "loss")),
    ("val/loss", ("val", "loss")),
    ("val/ema/top_5_accuracy", ("val/ema", "top_5_accuracy")),
    ("learning_rate/head", ("head", "learning_rate")),
  ],
)
def test_a_name_tells_what_was_measured_and_on_what(name, expected):
  assert split_name(name, ["val"]) == expected


def test_the_best_point_is_noted_beside_the_panel(workdir):
  loss, accuracy = Run.read(workdir).panels[:2]
  assert curves.note(accuracy) == "best test 0.9876 at 200"
  assert curves.note(loss) == "best test 0.0075 at 400"


@pytest.mark.parametrize(
  ("name", "values", "scale"),
  [
    ("loss", [10.0, 1.0, 0.01], "log"),
    ("loss", [2.0, 1.5, 1.2], "linear"),
    ("loss", [10.0, 1.0, 0.0], "linear"),  # zero has no logarithm
    ("accuracy", [0.001, 0.5, 0.99], "linear"),
  ],
)
def test_a_loss_that_falls_far_has_a_log_axis(name, values, scale):
  from matplotlib.figure import Figure

  from bigjax.report.run import Panel

  axis = Figure().subplots()
  panel = Panel(name, (Series(name, "train", [1, 2, 3], values),))
  curves.draw(axis, panel, (1, 3), lambda label: "#000000", "#000000", "#000000", "#000000")
  assert axis.get_yscale() == scale


def test_smoothing_keeps_lines_straight_and_takes_noise_away():
  line = np.linspace(5.0, 1.0, 200)
  np.testing.assert_allclose(curves.smoothed(line)[:-5], line[:-5], rtol=1e-12)
  noise = np.random.default_rng(0).normal(size=1000)
  assert curves.smoothed(noise)[50:-50].std() < 0.2
  np.testing.assert_allclose(curves.smoothed(np.array([3.0])), [3.0])


def test_thinning_keeps_the_ends_and_the_extremes():
  steps = np.arange(10_000)
  values = np.sin(steps / 50)
  values[4321], values[8765] = 9.0, -9.0
  few_steps, few = curves.thinned(steps, values)
  assert len(few) <= 802
  assert few_steps[0] == 0 and few_steps[-1] == 9999
  assert few.max() == 9.0 and few.min() == -9.0
