"""What a run measures of itself: rows in files, the line on the screen, the summary at the end."""

from bigjax.metrics.logger import Logger
from bigjax.metrics.progress import Progress
from bigjax.metrics.reading import (
  best_and_last,
  direction,
  format_seconds,
  format_value,
  is_per_class,
  is_timing,
  read_rows,
  summary,
)
from bigjax.metrics.stopwatch import Pace, Stopwatch
from bigjax.metrics.writers import Writers

__all__ = [
  "Logger",
  "Pace",
  "Progress",
  "Stopwatch",
  "Writers",
  "best_and_last",
  "direction",
  "format_seconds",
  "format_value",
  "is_per_class",
  "is_timing",
  "read_rows",
  "summary",
]
