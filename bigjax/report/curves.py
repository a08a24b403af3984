"""Loss and metric curves: small panels, one a metric, training and evaluations in it together.

Training is drawn raw and faint with its smoothed course on top, evaluations as points; the best point has a ring. The
colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), darkened where they stand on white, and told apart by
all kinds of colour vision.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bigjax.metrics.reading import direction, format_value, is_timing
from bigjax.report.run import Panel, Run, Series

MOST_PANELS = 15  # More make no picture; all the numbers are in metrics.csv.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b07d00", "#3a9ad9")
INK, FAINT, BAD = "#24272b", "#8a9096", "#c2185b"

# In the page a colour is a variable of its style sheet, so that it follows the light or dark scheme. Matplotlib wants
# real colours: these stand for the variables until they are replaced in what it wrote.
_STAND_INS = tuple(f"#f0f00{i}" for i in range(6)), "#f0f010", "#f0f011", "#f0f012"
_VARIABLES = [f"var(--series-{i})" for i in range(6)], "var(--ink)", "var(--faint)", "var(--bad)"


def png(run: Run) -> bytes:
  """All panels as one picture on white."""
  from matplotlib.figure import Figure

  panels = run.panels[:MOST_PANELS]
  columns = min(3, len(panels))
  lines = math.ceil(len(panels) / columns)
  with _settings():
    figure = Figure(figsize=(4.4 * columns, 2.9 * lines + 0.7), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(run.name, x=0.02, ha="left", fontsize=13, fontweight="bold", color=INK, parse_math=False)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    colour_of = _colours(run.labels, COLOURS)
    for axis, panel in zip(axes, panels, strict=False):
      axis.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=INK, parse_math=False)
      axis.set_title(note(panel), loc="right", fontsize=8.5, color=FAINT, parse_math=False)
      draw(axis, panel, run.steps, colour_of, INK, FAINT, BAD)
    for axis in axes[len(panels) :]:
      axis.set_visible(False)
    if run.labels != ("train",):
      from matplotlib.lines import Line2D

      handles = [Line2D([], [], color=colour_of(label), linewidth=2.5, label=_plain(label)) for label in run.labels]
      figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9.5)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
  return out.getvalue()


def svg(panel: Panel, run: Run) -> str:
  """One panel, without its title, as an `<svg>` element whose colours are the page's variables."""
  from matplotlib.figure import Figure

  series, ink, faint, bad = _STAND_INS
  with _settings():
    figure = Figure(figsize=(4.3, 2.45), layout="constrained")
    draw(figure.subplots(), panel, run.steps, _colours(run.labels, series), ink, faint, bad)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  text = out.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|\s(xmlns(:\w+)?|version)=\"[^\"]*\"", "", text, flags=re.DOTALL)
  text = re.sub(r'<g id="[^"]*"', "<g", text)
  text = re.sub(r'\swidth="[^"]*pt"|\sheight="[^"]*pt"', "", text, count=2)
  text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
  for stand_in, variable in zip((*series, ink, faint, bad), (*_VARIABLES[0], *_VARIABLES[1:]), strict=True):
    text = text.replace(stand_in, variable)
  return text


def note(panel: Panel) -> str:
  """What is said beside a panel's title: the best of an evaluation, or of training where there is no other."""
  chosen = _marked(panel)
  found = [(series, best) for series in chosen if (best := series.best())]
  if broken := sorted({step for series in panel.series for step in series.broken}):
    return f"not finite at {broken[0]:,}" + (f" and {len(broken) - 1} more" if len(broken) > 1 else "")
  if not found:
    return ""
  better = min if direction(panel.title) == "min" else max
  series, (step, value) = better(found, key=lambda item: item[1][1])
  where = "" if len(panel.series) == 1 else f"{series.label} "
  return f"best {where}{format_value(value)} at {step:,}"


def draw(axis: Any, panel: Panel, steps: tuple[int, int], colour_of: Callable[[str], str], *colours: str) -> None:
  """Draws `panel` on a matplotlib axis over `steps` (first, last), in the colours of ink, faint lines and errors."""
  ink, faint, bad = colours
  ordered = sorted(panel.series, key=lambda series: series.label != "train")
  for series in ordered:
    _draw_series(axis, series, colour_of(series.label), is_smoothed(series))
  for series in _marked(panel):
    if best := series.best():
      axis.plot(
        *([x] for x in best), "o", ms=8, mfc="none", mec=colour_of(series.label), mew=1.4, clip_on=False, zorder=5
      )
  broken = sorted({step for series in ordered for step in series.broken})
  if broken:
    axis.plot(broken, [0.03] * len(broken), "x", color=bad, ms=6, mew=1.6, transform=axis.get_xaxis_transform())
  _set_scales(axis, panel, steps)
  axis.spines[["top", "right"]].set_visible(False)
  axis.spines[["left", "bottom"]].set_color(faint)
  axis.spines[["left", "bottom"]].set_linewidth(0.7)
  axis.tick_params(colors=faint, labelcolor=ink, labelsize=9.5, width=0.7, length=3, which="major")
  axis.tick_params(length=0, which="minor", labelleft=False)
  axis.grid(True, axis="y", color=faint, alpha=0.22, linewidth=0.7)
  axis.set_axisbelow(True)


def is_smoothed(series: Series) -> bool:
  """Training is measured on one batch at a time: noisy, where there are enough points to see it."""
  noisy = direction(series.name) is not None or is_timing(series.name) or "norm" in series.name
  return series.label == "train" and noisy and len(series.finite[0]) >= 25


def smoothed(values: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
  """The mean over about a 20th of the points around each one, so that it lags behind neither rise nor fall.

  At the start, where a curve is steep, the window is as wide as it can be to both sides; at the end it reaches to the
  last point, so that one last batch does not decide how the curve ends.
  """
  half, count = max(1, len(values) // 40), len(values)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  at = np.arange(count)
  low, high = np.maximum(at - half, 0), np.minimum(at + np.minimum(at, half) + 1, count)
  return (sums[high] - sums[low]) / (high - low)


def thinned(
  steps: Int[np.ndarray, " points"], values: Float[np.ndarray, " points"], most: int = 800
) -> tuple[Int[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
  """At most about `most` points with the same outline: the extremes of each stretch stay."""
  if len(steps) <= most:
    return steps, values
  kept = {0, len(steps) - 1}
  for part in np.array_split(np.arange(len(steps)), most // 2):
    kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
  kept = sorted(kept)
  return steps[kept], values[kept]


def _draw_series(axis, series, colour, smooth):
  steps, values = series.finite
  if not steps:
    return
  steps, values = np.array(steps), np.array(values)
  few = len(steps) <= 40 and not smooth
  style = dict(color=colour, solid_joinstyle="round", solid_capstyle="round")
  if smooth:
    axis.plot(*thinned(steps, values), linewidth=0.7, alpha=0.35, **style)
    axis.plot(*thinned(steps, smoothed(values)), linewidth=1.7, **style)
  else:
    axis.plot(*thinned(steps, values), linewidth=1.5, marker="o" if few else "", ms=3.2, **style)


def _marked(panel: Panel) -> list[Series]:
  """Series whose best point means something: evaluations; training alone only where each point is the whole truth."""
  evaluations = [series for series in panel.series if series.label != "train"]
  return evaluations or [series for series in panel.series if not is_smoothed(series)]


def _set_scales(axis, panel, steps):
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

  low, high = steps
  margin = 0.03 * (high - low) or max(1, 0.05 * high)
  axis.set_xlim(low - margin, high + margin)
  axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
  axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x) if x >= 0 else ""))

  values = [value for series in panel.series for value in series.finite[1]]
  if not values:
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    return
  low, high = min(values), max(values)
  shrinks = direction(panel.title) == "min" or "norm" in panel.title
  if shrinks and low > 0 and high / low > 20:
    axis.set_yscale("log")
    axis.set_ylim(low / 1.25, high * 1.25)
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
  else:
    spread = high - low or abs(high) or 1.0
    axis.set_ylim(low - 0.07 * spread, high + 0.07 * spread)
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
  axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))


def _short(value: float) -> str:
  """A number beside a tick: `0.05`, `2,500`, `25k`, `1.5M`."""
  size = abs(value)
  for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if size >= 10 * unit or (size >= unit > 1e3):
      return f"{value / unit:.6g}{letter}"
  return f"{value:,.0f}" if size >= 1000 else f"{value:.6g}"


def _colours(labels: Sequence[str], colours: Sequence[str]) -> Callable[[str], str]:
  """The colour of a label: the first is training's, also where a run has none."""
  order = {label: i for i, label in enumerate(dict.fromkeys(("train", *labels)))}
  return lambda label: colours[order[label] % len(colours)]


def _plain(text: str) -> str:
  return text.replace("$", r"\$")


def _settings():
  """Matplotlib's own defaults, whatever the reader's matplotlibrc says, and text that stays text in an SVG."""
  import matplotlib

  defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
  return matplotlib.rc_context(defaults | {"svg.fonttype": "none", "svg.hashsalt": "bigjax"})
