"""Confusion matrices: as numbers while they can be read, as a picture when there are many classes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np

from bigjax.report.markup import Markup, element
from bigjax.report.run import Run, split_name

_MOST_NUMBERS = 25  # Classes, beyond which cells become too small for digits.
_MOST_PIXELS = 2000


def sections(run: Run) -> Iterator[tuple[Markup, int]]:
  """Yields a section and its number of classes for each `.../confusion_matrix`, of the newest row that has it."""
  names = dict.fromkeys(name for row in run.rows for name in row if name.rsplit("/", 1)[-1].startswith("confusion"))
  for name in names:
    step, value = run.last(name)
    try:
      counts = np.asarray(value, float)
    except (ValueError, TypeError):
      continue
    if counts.ndim == 2 and counts.shape[0] == counts.shape[1] > 1:
      yield _section(split_name(name, run.evals)[0], step, np.nan_to_num(counts)), len(counts)


def _section(label: str, step: int, counts: np.ndarray) -> Markup:
  classes = len(counts)
  lead = f"{label} at step {step:,}: rows are what is true, columns what the model says."
  if classes <= _MOST_NUMBERS:
    body = _table(counts)
  elif classes <= _MOST_PIXELS:
    body = _picture(counts)
  else:
    body = None
  return element(
    "section",
    element("h2", "Confusion"),
    element("p", lead, cls="lead"),
    element("div", element("div", body, cls="scroll"), _worst(counts), cls="pair"),
  )


def _table(counts: np.ndarray) -> Markup:
  totals = counts.sum(axis=1)
  header = [element("th", ""), [element("th", i, scope="col") for i in range(len(counts))], element("th", "recall")]
  lines = []
  for i, row in enumerate(counts):
    cells = []
    for j, count in enumerate(row):
      share = count / totals[i] if totals[i] else 0.0
      # A miss of a few percent has to be seen beside a hit of 90: their scales differ.
      strength = share if i == j else min(1.0, 0.15 + 2.5 * share)
      if not count:
        cells.append(element("td", ""))
        continue
      cls = ("hit" if i == j else "miss") + (" strong" if strength > 0.6 else "")
      tip = f"{_count(count)} of {_count(totals[i])} of class {i} taken for {j}"
      cells.append(element("td", _count(count), cls=cls, style=f"--share:{90 * strength:.0f}%", title=tip))
    recall = f"{row[i] / totals[i]:.1%}" if totals[i] else ""
    lines.append(element("tr", element("th", i, scope="row"), cells, element("td", recall, cls="recall")))
  return element("table", element("thead", element("tr", header)), element("tbody", lines), cls="confusion")


def _picture(counts: np.ndarray) -> Markup:
  """A pixel a cell, each row scaled to its sum: hits blue, misses orange."""
  from matplotlib.image import imsave

  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  hits = np.eye(len(counts), dtype=bool)
  strength = np.where(hits, shares, np.minimum(1, np.where(shares > 0, 0.15, 0) + 2.5 * shares))[..., None]
  colour = np.where(hits[..., None], (0, 114, 178), (213, 94, 0))
  pixels = np.concatenate([np.broadcast_to(colour, (*counts.shape, 3)), 255 * strength], axis=-1).astype(np.uint8)
  out = io.BytesIO()
  imsave(out, pixels, format="png")
  source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
  return element("img", src=source, cls="heat", alt="Confusion matrix: true class down, predicted class across")


def _worst(counts: np.ndarray) -> Markup:
  """The pairs that are taken for each other most often."""
  misses = counts * ~np.eye(len(counts), dtype=bool)
  order = np.argsort(misses, axis=None, kind="stable")[::-1][:10]
  pairs = [(i, j) for i, j in zip(*np.unravel_index(order, misses.shape), strict=True) if misses[i, j]]
  right, total = np.trace(counts), counts.sum()
  text = f"{_count(right)} of {_count(total)} right." + ("" if pairs else " None is taken for another.")
  header = [element("th", t, cls=c) for t, c in (("true", None), ("taken for", None), ("times", "num"), ("of", "num"))]
  lines = [
    element(
      "tr",
      element("td", i),
      element("td", j),
      element("td", _count(misses[i, j]), cls="num"),
      element("td", _count(counts[i].sum()), cls="num soft"),
    )
    for i, j in pairs
  ]
  table = element("table", element("thead", element("tr", header)), element("tbody", lines)) if pairs else None
  return element("div", element("p", text, cls="lead", style="margin-top:0"), table)


def _count(value: float) -> str:
  return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
