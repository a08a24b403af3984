"""Products with weights in 8 bits, through Qwix; the weights themselves stay what they are.

A layer is told to multiply so when its module is put together for a call (`state.Model.bind`), by its own argument for
that: NNX's dense and convolutional layers call `self.dot_general` or `self.conv_general_dilated`, mixtures of experts
`self.grouped_dot`, and any layer that does so takes part. Nothing in Python is patched, the parameters keep names and
types, and a checkpoint knows nothing of it. Both factors are scaled by the largest value along what is summed over, for
each row and column, and the product of the scales goes onto the result.

Attention's products of two activations, embeddings and logits are no products with weights of this kind.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
from flax import nnx

from bigjax import paths
from bigjax.errors import UserError

Word = Literal["int8", "int8_forward", "fp8", "fp8_forward"]
Rules = tuple[tuple[str, Word | None], ...]

# The type in the forward pass, and that of the gradient in the two products of the backward pass. Gradients want range
# more than precision (https://arxiv.org/abs/2209.05433, section 3).
TYPES = {
  "int8": ("int8", "int8"),
  "int8_forward": ("int8", None),
  "fp8": ("float8_e4m3fn", "float8_e5m2"),
  "fp8_forward": ("float8_e4m3fn", None),
}
# One word for a whole model leaves out what is first and last: little time, and the most to lose.
SPARED = r"(.*/)?(head|embed|token_embed|position_embed|router)"


@dataclasses.dataclass(frozen=True)
class Product:
  """What takes the place of a layer's `jax.lax.dot_general`, `jax.lax.conv_general_dilated` or `grouped_dot`."""

  operation: str  # One of `OPERATIONS`.
  word: Word

  def __call__(self, inputs: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return OPERATIONS[self.operation](self.word, inputs, kernel, *args, **kwargs)


def applied(module: nnx.Module, rules: Rules | Word | None) -> nnx.Module:
  """Returns the module, each layer that a rule names told how to multiply."""
  if not rules:
    return module
  layers = _layers(module)
  for name, word in _chosen(rules, list(layers)).items():
    layer, operation = layers[name]
    setattr(layer, operation, Product(operation, word))
  return module


def check(module: nnx.Module, rules: Rules | Word | None) -> None:
  """Raises `UserError` for a rule that names no layer of the module, and for a word where there is nothing to say."""
  if rules and not _chosen(rules, list(_layers(module))):
    raise UserError(
      f"config.quantize: {rules!r} leaves every layer of the model as it is; it is for layers that multiply with a "
      "kernel of their own, dense, convolutional or of experts, other than embeddings and the head."
    )


def _layers(module):
  """The layers that can be told, with what they are told it by, by path."""
  found = {}
  for path, layer in nnx.iter_modules(module):
    operation = next((o for o in OPERATIONS if hasattr(layer, o)), None)
    if operation is not None:
      found["/".join(map(str, path))] = (layer, operation)
  return found


def _chosen(rules, names):
  if isinstance(rules, str):
    return {name: rules for name in names if not re.fullmatch(SPARED, name)}
  index = paths.first_match([regex for regex, _ in rules], names, "config.quantize")
  return {name: rules[i][1] for name, i in zip(names, index, strict=True) if i is not None and rules[i][1] is not None}


def _dot(word, inputs, kernel, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None):
  from qwix._src.core import dot_general_qt

  del precision, out_sharding
  forward, backward = TYPES[word]
  config = dot_general_qt.DotGeneralQtConfig(
    lhs_qtype=forward,
    rhs_qtype=forward,
    dlhs_grad_qtype=backward,
    drhs_grad_qtype=backward,
    use_original_residuals=backward is None,
  )
  return dot_general_qt.dot_general_qt(inputs, kernel, dimension_numbers, config).astype(
    preferred_element_type or inputs.dtype
  )


def _conv(
  word,
  inputs,
  kernel,
  window_strides,
  padding,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count=1,
  batch_group_count=1,
  precision=None,
  preferred_element_type=None,
  *,
  out_sharding=None,
):
  from qwix._src.core import conv_general_qt

  del precision, out_sharding
  forward, backward = TYPES[word]
  config = conv_general_qt.ConvGeneralQtConfig(
    lhs_qtype=forward, rhs_qtype=forward, dlhs_grad_qtype=backward, drhs_grad_qtype=backward
  )
  shape = (window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers)
  counts = (feature_group_count, batch_group_count)
  out = conv_general_qt.conv_general_qt(inputs, kernel, config, *shape, *counts)
  return out.astype(preferred_element_type or inputs.dtype)


def _grouped(word, rows, kernels, sizes):
  from qwix._src.core import ragged_dot_qt

  forward, backward = TYPES[word]
  config = ragged_dot_qt.RaggedDotQtConfig(
    lhs_qtype=forward, rhs_qtype=forward, dlhs_grad_qtype=backward, drhs_grad_qtype=backward
  )
  return ragged_dot_qt.ragged_dot_qt(rows, kernels, sizes, config).astype(rows.dtype)


OPERATIONS = {"dot_general": _dot, "conv_general_dilated": _conv, "grouped_dot": _grouped}
