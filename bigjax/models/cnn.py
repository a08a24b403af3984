"""Convolutional network for small images and for sequences: stages of convolutions, pooling, dense layers."""

import math
from collections.abc import Callable
from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from bigjax.errors import UserError
from bigjax.models import layers

TENSOR = ((r"(convs|dense)/\d+/kernel", -1),)  # Output channels, output features.


@nnx.dataclass(eq=False, kw_only=True)
class CNN(nnx.Module):
  """Per stage: convolutions (batch norm, activation after each), pooling, dropout. Then dense layers and the head."""

  convs: nnx.Module  # a list
  norms: nnx.Module | None  # a list
  dense: nnx.Module  # a list
  head: nnx.Linear
  in_shape: tuple[int, ...]
  convs_per_stage: int
  pool: int
  pooling: str
  global_pool: bool
  activation: Callable[[Array], Array]
  conv_dropout: float
  dropout: float
  dtype: Any

  def features(
    self, inputs: Float[Array, "batch ..."], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float[Array, "batch width"]:
    """Returns the output of the last dense layer, or of the convolutions if there is none."""
    key = layers.training_key(key, train, self.conv_dropout, self.dropout)
    keys = iter(layers.subkeys(key, len(self.convs) + 1 + len(self.dense)))
    x = self._shaped(inputs)
    for i, conv in enumerate(self.convs):
      x = conv(x)
      if self.norms is not None:
        x = self.norms[i](x, use_running_average=not train)
      x = self.activation(x).astype(self.dtype)
      if (i + 1) % self.convs_per_stage == 0:
        x = layers.dropout(_pool(x, self.pool, self.pooling), self.conv_dropout, next(keys))
    x = x.mean(axis=tuple(range(1, x.ndim - 1))) if self.global_pool else x.reshape(len(x), -1)
    x = layers.dropout(x, 0.0 if self.dense else self.dropout, next(keys))
    for dense in self.dense:
      x = layers.dropout(self.activation(dense(x)), self.dropout, next(keys))
    return x

  def __call__(
    self, inputs: Float[Array, "batch ..."], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float32[Array, "batch classes"]:
    return self.head(self.features(inputs, key=key, train=train))

  def _shaped(self, inputs):
    """A last dimension of one channel may be left out: [batch, 28, 28] is images of (28, 28, 1)."""
    shape = inputs.shape[1:]
    if shape not in (self.in_shape, self.in_shape[:-1] if self.in_shape[-1] == 1 else None):
      raise UserError(f"model.in_shape: {self.in_shape}, but the examples are {shape}. Set it to their shape.")
    return inputs.reshape(-1, *self.in_shape)


def _pool(x, size, pooling):
  """Over windows beside each other; what doesn't fill one is left out.

  As a reshape and a maximum, because the backward pass of XLA's own window maximum takes 20 times as long on a CPU.
  """
  if size == 1:
    return x
  batch, *sides, channels = x.shape
  windows = [n // size for n in sides]
  x = x[(slice(None), *(slice(n * size) for n in windows))]
  x = x.reshape(batch, *(n for window in windows for n in (window, size)), channels)
  axes = tuple(range(2, 2 * len(sides) + 1, 2))
  return x.max(axis=axes) if pooling == "max" else x.mean(axis=axes)


def make(
  *,
  num_classes: int,
  in_shape: tuple[int, ...],
  channels: tuple[int, ...] = (32,),
  kernel: int | tuple[int, ...] = 3,
  convs_per_stage: int = 1,
  stride: int = 1,
  padding: Literal["same", "valid"] = "same",
  pool: int = 2,
  pooling: Literal["max", "mean"] = "max",
  global_pool: bool = False,
  dense: tuple[int, ...] = (128,),
  activation: str = "relu",
  conv_dropout: float = 0.0,
  dropout: float = 0.0,
  batch_norm: bool = False,
  kernel_init: str = "he_normal",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> CNN:
  """A convolutional network in two dimensions, or in one: `in_shape` says which.

  Args:
    num_classes: number of logits.
    in_shape: of an example: (height, width, channels), or (length, channels) for a sequence.
    channels: of the convolutions of each stage.
    kernel: side of the convolutions' kernel; one for all, or one a stage.
    convs_per_stage: convolutions before each pooling.
    stride: of the first convolution of each stage.
    padding: "same" keeps the size of an image through a convolution, "valid" uses no pixels from outside it.
    pool, pooling: side of the pooled windows (1: no pooling) and what is taken of each, "max" or "mean".
    global_pool: take the mean over what is left of the image instead of all its values.
    dense: widths of the layers between convolutions and head.
    activation: after every convolution and dense layer but the head.
    conv_dropout, dropout: rates at the end of each stage, and after each dense layer (before the head if none).
    batch_norm: normalise after each convolution, https://arxiv.org/abs/1502.03167.
    kernel_init: of convolutions and dense layers.
    dtype: of the computation; parameters and logits are float32.
  """
  if len(in_shape) not in (2, 3, 4):
    raise UserError(f"model.in_shape: {in_shape} must be (height, width, channels) or (length, channels).")
  kernels = (kernel,) * len(channels) if isinstance(kernel, int) else kernel
  if len(kernels) != len(channels):
    raise UserError(f"model.kernel: {kernel} are not as many as the {len(channels)} stages. Give one, or one a stage.")
  layers.check_positive(num_classes=num_classes, in_shape=in_shape, channels=channels, kernel=kernels, dense=dense)
  layers.check_positive(convs_per_stage=convs_per_stage, stride=stride, pool=pool)
  layers.check_rate(conv_dropout=conv_dropout, dropout=dropout)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  start = dict(kernel_init=layers.choose(layers.INITIALIZERS, "kernel_init", kernel_init), rngs=rngs)

  convs, norms = nnx.List([]), nnx.List([])
  size, fan_in = in_shape[:-1], in_shape[-1]
  for width, side in zip(channels, kernels):
    for i in range(convs_per_stage):
      step = stride if i == 0 else 1
      shape = dict(kernel_size=(side,) * len(size), strides=(step,) * len(size), padding=padding.upper())
      convs.append(nnx.Conv(fan_in, width, **shape, use_bias=not batch_norm, dtype=compute, **start))
      if batch_norm:
        norms.append(layers.batch_norm(width, rngs=rngs))
      reach = side if padding == "valid" else 1
      size, fan_in = tuple(math.ceil((n - reach + 1) / step) for n in size), width
    size = tuple(n // pool for n in size)
    if min(size) < 1:
      remedy = "Use fewer stages, or a smaller kernel, stride or pool."
      raise UserError(f"model.channels: nothing is left of {in_shape} after {len(convs)} convolutions. {remedy}")
  if not global_pool:
    fan_in *= math.prod(size)
  widths = (fan_in, *dense)
  return CNN(
    convs=convs,
    norms=norms if batch_norm else None,
    dense=nnx.List([nnx.Linear(n, width, dtype=compute, **start) for n, width in zip(widths, dense)]),
    head=nnx.Linear(widths[-1], num_classes, **start),
    in_shape=in_shape,
    convs_per_stage=convs_per_stage,
    pool=pool,
    pooling=pooling,
    global_pool=global_pool,
    activation=layers.choose(layers.ACTIVATIONS, "activation", activation),
    conv_dropout=conv_dropout,
    dropout=dropout,
    dtype=compute,
  )
