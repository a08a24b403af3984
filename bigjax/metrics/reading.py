"""What the rows of a run say: which way a metric gets better, its best and last values, the summary at the end.

Names are words joined by "_" in parts joined by "/": `loss`, `val/top5_accuracy`, `val/ema/accuracy`, `val/recall/cat`.
The last part says what was measured, the parts before it on what.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bigjax.errors import UserError, understood
from bigjax.metrics.stopwatch import COMPUTING, TRAINING

EVENTS = "events.out.tfevents.*"  # What TensorBoard looks for in a folder.


def read_rows(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of `workdir/metrics.jsonl`, oldest first, with NaN for values that were not finite; [] if there is none.

  A last line that is still being written is left out.
  """
  path = Path(workdir) / "metrics.jsonl"
  return [_with_nan(row) for row, _ in parsed_lines(path)] if path.exists() else []


def parsed_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
  """Yields each row of a JSONL file and its line.

  A last line that was cut short is left out, and so, with a warning, is a damaged one before it.
  """
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}; mend it or remove it.") from e
  while lines and not lines[-1].strip(b"\0\r "):  # some file systems end a file with zeros when the power fails
    lines.pop()
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      row["step"] = int(row["step"])
      if not all(map(_is_measured, row.values())):
        raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
      if number < len(lines):
        logging.getLogger("bigjax").warning("%s: line %d cannot be read and is left out.", path, number)
      continue
    yield row, line + b"\n"


def _is_measured(value: Any) -> bool:
  """Whether it is what `Writers` write: a number, one that was not finite, or a list of these."""
  if isinstance(value, list):
    return all(map(_is_measured, value))
  return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))


@functools.cache
def direction(name: str) -> str | None:
  """`"min"` or `"max"`: which way a metric called `name` gets better; None if its last part does not tell."""
  words = set(name.rsplit("/", 1)[-1].lower().replace("-", "_").split("_"))
  if words & _LOWER:
    return "min"
  return "max" if words & _HIGHER or any(re.fullmatch(r"\d+shot", word) for word in words) else None


_LOWER = frozenset("loss error perplexity mse mae rmse nll entropy wer cer brier ece bpb bits regret distance".split())
_HIGHER = frozenset("accuracy acc precision recall f1 r2 auc top top1 top5 bleu rouge ssim psnr iou map score".split())


@functools.cache
def is_timing(name: str) -> bool:
  """Whether a metric called `name` tells about the machine's speed, so that two equal runs may differ in it."""
  return bool(set(name.rsplit("/", 1)[-1].lower().split("_")) & _TIMING)


_TIMING = frozenset("second seconds sec ms time elapsed eta mfu goodput throughput".split())


@functools.cache
def is_per_class(name: str) -> bool:
  """Whether `name` is one class's share of a metric, such as `test/recall/3` or `test/precision/cat`."""
  parent, _, last = name.rpartition("/")
  return bool(parent) and direction(last) is None and direction(parent) is not None


def best_and_last(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int | float]]:
  """For each metric: `last` and `last_step`; `best` and `best_step` where a direction is known.

  NaN is never the best. Left out are timing, values of single classes and nested lists.
  """
  table: dict[str, dict[str, int | float]] = {}
  for row in rows:
    for name, value in row.items():
      if name == "step" or isinstance(value, list) or is_timing(name) or is_per_class(name):
        continue
      entry = table.setdefault(name, {})
      entry["last"], entry["last_step"] = value, row["step"]
      sign = {"min": -1, "max": 1, None: 0}[direction(name)]
      if sign and sign * value > sign * entry.get("best", -sign * math.inf):
        entry["best"], entry["best_step"] = value, row["step"]
  return table


def format_value(value: int | float) -> str:
  """Four significant digits for people: `0.1234`, `12.3`, `5,120`, `1.23e-05`, `nan`."""
  if not math.isfinite(value):
    return str(float(value))
  size = abs(value)
  if value == int(value) and size < 1e9:
    return f"{value:,.0f}"
  if size >= 1e9 or size < 1e-4:
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
  return f"{value:,.0f}" if size >= 999.95 else f"{value:.4g}"


def format_rate(value: int | float) -> str:
  """Three significant digits, or all before the point: more of a speed is noise."""
  return format_value(value if value >= 1000 else float(f"{value:.3g}"))


def format_seconds(seconds: int | float) -> str:
  """`0:32`, `1:02:03`, `2d 03:04:05`."""
  days, clock = divmod(max(0, round(seconds)), 86400)
  hours, minutes, seconds = clock // 3600, clock // 60 % 60, clock % 60
  if days:
    return f"{days}d {hours:02}:{minutes:02}:{seconds:02}"
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def speed(run: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float]:
  """`examples_per_second` and `milliseconds_per_step` of a run's last start, from its run.json and config.json.

  The compilation, evaluations and saves are left out. {} if the run has not noted enough to tell.
  """
  rate = run.get("steps_per_second")
  if rate is None and len(run.get("starts", [])) <= 1:
    seconds = run.get("seconds") or {}
    training = sum(seconds.get(name) or 0.0 for name in ("train", *TRAINING))
    rate = (run.get("step") or 0) / training if training else None
  if not rate:
    return {}
  batch = config.get("batch_size")
  examples = {"examples_per_second": rate * batch} if isinstance(batch, int) else {}
  return examples | {"milliseconds_per_step": 1000 / rate}


def claim_outcome(claim: Mapping[str, Any] | None, table: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str] | None:
  """Whether a config's claim (`{"metric": ..., "at_least": ...}`) was reached by the last value, and that in words.

  Not by the best one: a step chosen by the result it is judged by would flatter it.
  """
  entry = table.get((claim or {}).get("metric", ""))
  if not entry:
    return None
  sign, bound, words = 1, claim.get("at_least"), "at least"
  if bound is None:
    sign, bound, words = -1, claim.get("at_most"), "at most"
  if bound is None:
    return None
  value, at = entry["last"], entry["last_step"]
  reached = sign * value >= sign * bound
  outcome = "reached" if reached else "not reached"
  return reached, f"{claim['metric']} {words} {format_value(bound)}: {outcome}, {format_value(value)} at step {at:,}"


def summary(workdir: str | os.PathLike) -> str:
  """What a person reads when a run is over: how far, how fast, how good, and where to look next.

  Everything comes from the workdir's files; what they don't tell is left out.
  """
  workdir = Path(workdir)
  with understood(f"{workdir}: its run.json or config.json", "Mend it or remove it."):
    return _summary(workdir)


def _summary(workdir):
  run, config = read_json(workdir / "run.json"), read_json(workdir / "config.json")
  table = best_and_last(read_rows(workdir))
  parts = [_headline(run, config), *_metric_lines(table)]

  seconds = {name: s for name, s in (run.get("seconds") or {}).items() if s >= 0.5}
  facts = [("time", "  ".join(f"{name} {format_seconds(s)}" for name, s in seconds.items()))] if seconds else []
  if "goodput" in run:
    facts.append(("goodput", _goodput(run["goodput"], run["seconds"])))
  if outcome := claim_outcome(config.get("claim"), table):
    facts.append(("claim", outcome[1]))
  files = ("report", "report.html"), ("curves", "curves.png"), ("metrics", "metrics.jsonl"), ("", "metrics.csv")
  facts += [(label, str(workdir / file)) for label, file in files if (workdir / file).exists()]
  parts += _labelled(facts)

  following = []
  if run.get("status") == "stopped":
    following.append("the same command again goes on from the last checkpoint")
  if (workdir / "report.html").exists():
    following.append(f"open {workdir / 'report.html'} in a browser")
  else:
    following.append(f"bigjax report {workdir}")
  if any(workdir.glob(EVENTS)):
    following.append(f"tensorboard --logdir={workdir}")
  following.append(f"bigjax eval --workdir={workdir}")
  parts += _labelled([("look next" if i == 0 else "", text) for i, text in enumerate(following)])
  return "\n".join(parts)


def _goodput(share: float, seconds: Mapping[str, float]) -> str:
  """How much of the time steps were computed, and what took most of the rest."""
  total = sum(seconds.values())
  rest = sorted(((s / total, name) for name, s in seconds.items() if name not in COMPUTING), reverse=True)
  return f"{share:.1%}; " + "  ".join(f"{name} {part:.1%}" for part, name in rest if part >= 0.001)


def read_json(path: Path) -> Any:
  """What a workdir's JSON file says; {} if there is none yet."""
  try:
    return json.loads(path.read_bytes()) if path.exists() else {}
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f"{path} can't be read: {e}; mend it or remove it.") from e


def _headline(run: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  text = str(run.get("status") or "unknown").capitalize()
  if (step := run.get("step")) is not None:
    text += f" at step {step:,}"
    if total := run.get("total_steps"):
      text += f" of {total:,}"
  if run.get("seconds"):
    text += f" in {format_seconds(sum(run['seconds'].values()))}"
  measured = speed(run, config)
  if "examples_per_second" in measured:
    text += f", {format_rate(measured['examples_per_second'])} examples/s"
  if "milliseconds_per_step" in measured:
    text += f", {format_rate(measured['milliseconds_per_step'])} ms/step"
  return text


def _metric_lines(table: Mapping[str, Mapping[str, int | float]]) -> list[str]:
  cells = [("", "last", "best", "at step")]
  # The training loss first; what has no better and no worse, such as the learning rate, last.
  rank = lambda name: (direction(name) is None, "/" in name, name != "loss")
  for name, entry in sorted(table.items(), key=lambda item: rank(item[0])):
    best = (format_value(entry["best"]), f"{entry['best_step']:,}") if "best" in entry else ("", "")
    cells.append((name, format_value(entry["last"]), *best))
  if len(cells) == 1:
    return []
  widths = [max(len(row[i]) for row in cells) for i in range(4)]
  line = lambda row: "  " + "   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
  return ["", *(line(row).rstrip() for row in cells)]


def _labelled(facts: list[tuple[str, str]]) -> list[str]:
  return ["", *(f"  {label:<9}  {text}" for label, text in facts)] if facts else []


def _with_nan(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _with_nan(item) for name, item in value.items()}
  if isinstance(value, list):
    return [_with_nan(item) for item in value]
  return math.nan if value is None else value
