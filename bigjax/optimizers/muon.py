"""Muon: momentum whose singular values are all made one, for hidden matrices; Adam for everything else.

https://kellerjordan.github.io/posts/muon/. optax.contrib.muon takes every two-dimensional leaf for a matrix, which is
wrong for a stack of scanned layers: there a stack of biases has two dimensions and one of kernels three. So names
decide here. Leaves that end in `kernel` are matrices, but those of the first and the last layer, by their usual names.
"""

from __future__ import annotations

import functools
import re

import jax
import optax

from bigjax import paths
from bigjax.errors import UserError

# Embeddings, stems and heads: their rows and columns are not what an operator norm is about.
OUTER = r"(.*/)?(head|lm_head|logits|classifier|stem|stem_.*|\w*embed\w*)(/.*)?"

# What the axes of a kernel are by the number of them: l a stack of layers, i inputs, o outputs. Query, key and value in
# one kernel are one matrix.
LAYOUTS = {2: "io", 3: "lio", 4: "iiio", 5: "liiio"}


def make(
  learning_rate: optax.ScalarOrSchedule,
  *,
  beta: float = 0.95,
  nesterov: bool = True,
  ns_steps: int = 5,
  consistent_rms: float | None = 0.2,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  layouts: tuple[tuple[str, str], ...] = (),
) -> optax.GradientTransformation:
  """Returns Muon for matrices and Adam (`b1`, `b2`, `eps`) for the other leaves, under one learning rate.

  Args:
    learning_rate: Of both; give Adam's leaves another by `config.lr_multipliers`.
    beta: Decay of the momentum.
    nesterov: Whether the momentum looks ahead, Adam's too.
    ns_steps: Newton-Schulz iterations.
    consistent_rms: Updates have this root mean square for matrices of any shape; 0.2 is that of AdamW, so that its
      learning rates fit (https://arxiv.org/abs/2502.16982). None: as Keller Jordan's, sqrt(max(1, outputs / inputs)).
    b1: Adam's decay of the mean.
    b2: Adam's decay of the square.
    eps: Against division by zero.
    layouts: What the axes of a leaf are, by first match: a letter each, `l` a stack of layers, `i` inputs, `o` outputs,
      such as `(".*/query/kernel", "ioo")` for [width, heads, head_dim]; or "adam". Not given: leaves named `kernel`
      are "io", "lio", "iiio" (convolution) or "liiio" by their number of axes, unless in an embedding, stem or head.
  """
  for i, (_, layout) in enumerate(layouts):
    if layout != "adam" and not (set(layout) <= set("lio") and {"i", "o"} <= set(layout)):
      where = f"config.optimizer.layouts[{i}]"
      raise UserError(f"{where}: {layout!r} must be 'adam', or a letter for each axis: l layers, i inputs, o outputs.")

  return optax.contrib.muon(
    learning_rate,
    ns_steps=ns_steps,
    beta=beta,
    eps=eps,
    nesterov=nesterov,
    adam_b1=b1,
    adam_b2=b2,
    muon_weight_dimension_numbers=functools.partial(_dimension_numbers, layouts=layouts),
    consistent_rms=consistent_rms,
  )


def _dimension_numbers(params, layouts):
  """Returns which axes of each leaf are inputs and outputs; None for Adam's."""
  # Leaves of another group of the optimizer are masked out; their names still tell whether a rule matches something.
  masked = lambda x: isinstance(x, optax.MaskedNode)
  placeholders = jax.tree.map(lambda x: 0 if masked(x) else x, params, is_leaf=masked)
  names = paths.names(placeholders)
  chosen = paths.first_match([pattern for pattern, _ in layouts], names, "config.optimizer.layouts")
  chosen = {name: None if i is None else layouts[i][1] for name, i in zip(names, chosen, strict=True)}
  return paths.map_with_name(lambda name, leaf: _axes(name, leaf, chosen[name] or _usual(name, leaf.ndim)), params)


def _usual(name, ndim):
  is_matrix = name.rpartition("/")[2] == "kernel" and not re.fullmatch(OUTER, name)
  return LAYOUTS.get(ndim, "adam") if is_matrix else "adam"


def _axes(name, leaf, layout):
  if layout == "adam":
    return None
  if len(layout) != leaf.ndim:
    where = f"config.optimizer.layouts: {layout!r} for {name!r}"
    raise UserError(f"{where} names {len(layout)} axes, but the leaf has {leaf.ndim}: {leaf.shape}.")
  find = lambda letter: tuple(i for i, x in enumerate(layout) if x == letter)
  return optax.contrib.MuonDimensionNumbers(reduction_axis=find("i"), output_axis=find("o"))
