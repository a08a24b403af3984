"""ResNet v1.5: v1 with a bottleneck's stride in its 3 x 3 convolution. https://arxiv.org/abs/1512.03385

Batch statistics are over the whole batch on however many devices it lies: under `jax.jit` a mean is a mean of it all.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import layers

# Table 1 of the paper: blocks in each stage, and whether they are bottlenecks.
DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
}


def _conv(fan_in, fan_out, size, stride, dtype, rngs):
  # Padded alike on both sides, also where the stride would let "SAME" pad on one: published weights expect it.
  padding = ((size // 2, size // 2),) * 2
  shape = dict(kernel_size=(size, size), strides=(stride, stride), padding=padding)
  return nnx.Conv(fan_in, fan_out, **shape, use_bias=False, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)


def _draw_kernels(convs, key):
  """He's initialisation by fan-out, https://arxiv.org/abs/1502.01852.

  All of a fan-out from one array of normal numbers, as XLA compiles the drawing of each array anew: one for each kernel
  took ResNet-18 14 s on a CPU. A device draws some of the output channels only.
  """
  by_fan_out = {}
  for conv in convs:
    by_fan_out.setdefault(conv.kernel.shape[-1], []).append(conv)
  for fan_out, alike in by_fan_out.items():
    ends = np.cumsum([conv.kernel.size // fan_out for conv in alike])
    normal = sharding.spread(jax.random.normal(jax.random.fold_in(key, fan_out), (ends[-1], fan_out)))
    for conv, values in zip(alike, jnp.split(jax.lax.optimization_barrier(normal), ends[:-1])):
      height, width, *_ = conv.kernel.shape
      conv.kernel[...] = values.reshape(conv.kernel.shape) * (2 / (height * width * fan_out)) ** 0.5


class ResidualBlock(nnx.Module):
  """Two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1, around a skip."""

  def __init__(self, fan_in: int, width: int, stride: int, *, bottleneck: bool, dtype, rngs: nnx.Rngs):
    fan_out = 4 * width if bottleneck else width
    # (kernel size, stride, width) of each convolution.
    plan = [(1, 1, width), (3, stride, width), (1, 1, fan_out)] if bottleneck else [(3, stride, width), (3, 1, width)]
    self.width, self.dtype = fan_out, dtype
    self.convs, self.norms = nnx.List([]), nnx.List([])
    channels = fan_in
    for i, (size, conv_stride, conv_width) in enumerate(plan):
      self.convs.append(_conv(channels, conv_width, size, conv_stride, dtype, rngs))
      # A branch that starts at zero starts the block as the identity: https://arxiv.org/abs/1706.02677, section 5.1.
      self.norms.append(layers.batch_norm(conv_width, zero_scale=i == len(plan) - 1, rngs=rngs))
      channels = conv_width
    projects = stride != 1 or fan_in != fan_out
    self.project = _conv(fan_in, fan_out, 1, stride, dtype, rngs) if projects else None
    self.project_norm = layers.batch_norm(fan_out, rngs=rngs) if projects else None

  def __call__(self, x: Array, *, train: bool) -> Array:
    skip = x
    if self.project is not None:
      skip = self.project_norm(self.project(x), use_running_average=not train)
    for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
      x = norm(conv(x), use_running_average=not train)
      if i < len(self.convs) - 1:
        x = jax.nn.relu(x)
    return jax.nn.relu(x + skip).astype(self.dtype)


@nnx.dataclass(eq=False, kw_only=True)
class Stage(nnx.Module):
  """Blocks of one size: the first comes to it, the others are equal."""

  first: ResidualBlock
  blocks: nnx.Module  # a list, or one stack to scan over

  def __call__(self, x: Array, *, train: bool, remat: str) -> Array:
    call = lambda block, x, _: block(x, train=train)
    x = layers.run_keeping(call, nnx.List([self.first]), x, remat=remat)
    return layers.run_keeping(call, self.blocks, x, remat=remat)


TENSOR = ((r"stages/.*(convs/\d+|project)/kernel", -1),)  # Output channels.


@nnx.dataclass(eq=False, kw_only=True)
class ResNet(nnx.Module):
  """Stem -> stages of residual blocks, each half as large and twice as wide -> mean over pixels -> head."""

  stem: nnx.Conv
  stem_norm: nnx.BatchNorm
  stem_pool: bool
  stages: nnx.Module  # a list
  head: nnx.Linear
  dropout: float
  remat: str
  dtype: Any

  def features(
    self, images: Float[Array, "batch height width channel"], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float[Array, "batch features"]:
    """Returns the mean over pixels of the last stage."""
    if images.shape[-1] != self.stem.in_features:
      remedy = "Set it to theirs."
      raise UserError(f"model.channels: {self.stem.in_features}, but the images have {images.shape[-1]}. {remedy}")
    x = self.stem_norm(self.stem(images), use_running_average=not train)
    x = jax.nn.relu(x).astype(self.dtype)
    if self.stem_pool:
      x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage in self.stages:
      x = stage(x, train=train, remat=self.remat)
    x = x.mean(axis=(1, 2), dtype=jnp.float32)
    return layers.dropout(x, self.dropout, layers.training_key(key, train, self.dropout))

  def __call__(
    self, images: Float[Array, "batch height width channel"], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float32[Array, "batch classes"]:
    return self.head(self.features(images, key=key, train=train))


def make(
  *,
  num_classes: int,
  channels: int = 3,
  depth: int | None = None,
  stages: tuple[int, ...] | None = None,
  bottleneck: bool | None = None,
  width: int = 64,
  stem: Literal["imagenet", "small"] = "imagenet",
  dropout: float = 0.0,
  scan: bool = False,
  remat: Literal["none", "full"] = "none",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> ResNet:
  """A ResNet of a published depth (18, 34, 50, 101, 152) or of your own, for images of any size.

  Args:
    num_classes: number of logits.
    channels: of the images.
    depth: sets `stages` and `bottleneck`; each given one overrides it.
    stages: number of blocks in each stage.
    bottleneck: blocks of three convolutions, four times as wide at their ends.
    width: of the first stage; each next one has twice that.
    stem: "imagenet" starts at a quarter of the resolution; "small" keeps it, for images of 32 pixels or so.
    dropout: rate before the head.
    scan: compile one of the equal blocks of a stage, all but the first, and scan over them. For depth and for TPUs.
    remat: what the backward pass computes again: "none", or "full", all but what goes into a block.
    dtype: of the computation; parameters, batch statistics and logits are float32.
  """
  if depth is not None:
    published_stages, published_bottleneck = layers.choose(DEPTHS, "depth", depth)
    stages = published_stages if stages is None else stages
    bottleneck = published_bottleneck if bottleneck is None else bottleneck
  if stages is None:
    raise UserError(f"model.stages is missing. Give it, or a depth: {', '.join(map(str, DEPTHS))}.")
  layers.check_positive(num_classes=num_classes, channels=channels, width=width, stages=stages)
  layers.check_rate(dropout=dropout)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  size, stride = (7, 2) if stem == "imagenet" else (3, 1)
  stem_conv = _conv(channels, width, size, stride, compute, rngs)
  blocks, fan_in = [], width
  for stage, count in enumerate(stages):
    blocks.append([])
    for i in range(count):
      shape = (fan_in, width * 2**stage, 2 if stage and i == 0 else 1)
      blocks[stage].append(ResidualBlock(*shape, bottleneck=bool(bottleneck), dtype=compute, rngs=rngs))
      fan_in = blocks[stage][i].width
  in_blocks = [conv for stage in blocks for block in stage for conv in (*block.convs, block.project) if conv]
  _draw_kernels([stem_conv, *in_blocks], rngs.params())
  together = layers.stacked if scan else nnx.List
  return ResNet(
    stem=stem_conv,
    stem_norm=layers.batch_norm(width, rngs=rngs),
    stem_pool=stem == "imagenet",
    stages=nnx.List([Stage(first=first, blocks=together(rest)) for first, *rest in blocks]),
    head=nnx.Linear(fan_in, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs),
    dropout=dropout,
    remat=remat,
    dtype=compute,
  )
