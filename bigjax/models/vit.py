"""Vision Transformer: patches of an image as the tokens of a transformer. https://arxiv.org/abs/2010.11929"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import layers
from bigjax.models.attention import attend

# B, L, H: table 1 of the paper. Ti, S: https://arxiv.org/abs/2012.12877. g, G: https://arxiv.org/abs/2106.04560.
# So400m: https://arxiv.org/abs/2305.13035. e: https://arxiv.org/abs/2209.06794. M: as big_vision has it.
VARIANTS = {
  "Ti": dict(width=192, depth=12, heads=3, mlp_dim=768),
  "S": dict(width=384, depth=12, heads=6, mlp_dim=1536),
  "M": dict(width=512, depth=12, heads=8, mlp_dim=2048),
  "B": dict(width=768, depth=12, heads=12, mlp_dim=3072),
  "L": dict(width=1024, depth=24, heads=16, mlp_dim=4096),
  "So400m": dict(width=1152, depth=27, heads=16, mlp_dim=4304),
  "H": dict(width=1280, depth=32, heads=16, mlp_dim=5120),
  "g": dict(width=1408, depth=40, heads=16, mlp_dim=6144),
  "G": dict(width=1664, depth=48, heads=16, mlp_dim=8192),
  "e": dict(width=1792, depth=56, heads=16, mlp_dim=15360),
}

# Xavier as the paper's code has it, where query, key and value are three square kernels: by fan-in for the fused one.
_XAVIER = nnx.initializers.xavier_uniform()
INIT = layers.BlockInit(qkv=nnx.initializers.lecun_uniform(), out=_XAVIER, up=_XAVIER, down=_XAVIER)


# Beside the blocks: the pooling attention, and the classes.
TENSOR = (
  *layers.BLOCK_TENSOR,
  (r"pool/(query|key|value|mlp/up)/(kernel|bias)", -1),
  (r"pool/(out|mlp/down)/kernel", -2),
)


class AttentionPool(nnx.Module):
  """One learned query attends to all tokens, then an MLP: https://arxiv.org/abs/2106.04560, section 3.3."""

  def __init__(self, width: int, heads: int, mlp_dim: int, *, dtype, rngs: nnx.Rngs):
    self.heads = heads
    dense = dict(dtype=dtype, rngs=rngs)
    self.probe = nnx.Param(_XAVIER(rngs.params(), (1, width), jnp.float32))
    self.query = layers.Dense(width, width, kernel_init=_XAVIER, **dense)
    self.key = layers.Dense(width, width, kernel_init=_XAVIER, **dense)
    self.value = layers.Dense(width, width, kernel_init=_XAVIER, **dense)
    self.out = layers.Dense(width, width, kernel_init=_XAVIER, **dense)
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
    self.mlp = layers.Mlp(width, mlp_dim, activation="gelu_tanh", dropout=0.0, init=INIT, **dense)

  def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch width"]:
    batch, _, width = x.shape

    def split_heads(x):
      return x.reshape(*x.shape[:2], self.heads, width // self.heads)

    query = split_heads(self.query(self.probe[...])[None])
    query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
    out = attend(query, split_heads(self.key(x)), split_heads(self.value(x)))
    out = self.out(out.reshape(batch, width))
    return out + self.mlp(self.norm(out))


@nnx.dataclass(eq=False, kw_only=True)
class ViT(nnx.Module):
  """Patches -> linear embedding, positions, a class token or registers -> blocks -> norm -> pooling -> head."""

  embed: layers.Dense
  class_token: nnx.Param | None
  registers: nnx.Param | None
  positions: nnx.Param | None  # None: fixed ones.
  blocks: nnx.Module
  norm: nnx.LayerNorm
  pool: AttentionPool | None  # None: the class token if there is one, else the mean.
  pre_logits: nnx.Linear | None
  head: nnx.Linear
  grid: tuple[int, int]
  patch_size: int
  channels: int
  dropout: float
  drop_path: float
  remat: str

  def features(
    self, images: Float[Array, "batch height width channel"], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float[Array, "batch features"]:
    """Returns what the head sees: the pooled tokens, through the pre-logits layer if there is one."""
    batch = len(images)
    embed_key, stack_key = layers.subkeys(layers.training_key(key, train, self.dropout, self.drop_path), 2)
    x = self.embed(layers.patches(images, self.grid, self.patch_size, self.channels))
    if self.positions is None:
      x = x + sincos2d(*self.grid, x.shape[-1])[None].astype(x.dtype)
    if self.class_token is not None:
      x = jnp.concatenate([_rows(self.class_token, batch, x.dtype), x], axis=1)
    if self.positions is not None:
      x = x + self.positions[...][None].astype(x.dtype)
    seq = x.shape[1]  # Registers come after it, without a position: https://arxiv.org/abs/2309.16588.
    if self.registers is not None:
      x = jnp.concatenate([x, _rows(self.registers, batch, x.dtype)], axis=1)

    x = sharding.constrain(layers.dropout(x, self.dropout, embed_key), "batch", "seq", "embed")
    x, _ = layers.run_stack(self.blocks, x, key=stack_key, drop_path_rate=self.drop_path, remat=self.remat)
    x = self.norm(x)[:, :seq]

    if self.pool is not None:
      x = self.pool(x)
    else:
      x = x.mean(axis=1) if self.class_token is None else x[:, 0]
    return x if self.pre_logits is None else jnp.tanh(self.pre_logits(x))

  def __call__(
    self, images: Float[Array, "batch height width channel"], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float32[Array, "batch classes"]:
    return self.head(self.features(images, key=key, train=train))


def _rows(tokens, batch, dtype):
  return jnp.broadcast_to(tokens[...].astype(dtype)[None], (batch, *tokens.shape))


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Float32[Array, "patches width"]:
  """Fixed positions: sines and cosines of the column and of the row, https://arxiv.org/abs/2104.02057 (MoCo v3)."""
  frequencies = 1.0 / temperature ** (np.arange(width // 4) / max(width // 4 - 1, 1))
  row, column = (np.outer(position.ravel(), frequencies) for position in np.mgrid[:rows, :columns])
  table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
  return jnp.asarray(table, jnp.float32)


def make(
  *,
  num_classes: int,
  image_size: int | tuple[int, int] = 224,
  channels: int = 3,
  variant: str | None = None,
  patch_size: int | None = None,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_dim: int | None = None,
  head: Literal["cls", "gap", "map"] = "cls",
  positions: Literal["learned", "sincos2d"] = "learned",
  registers: int = 0,
  pre_logits: int | None = None,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  activation: str = "gelu_tanh",
  attention: str = "auto",
  scan: bool = False,
  remat: str = "none",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> ViT:
  """A ViT of a published size (`variant`, such as "B/16": its size and its patches' side) or of your own.

  Args:
    num_classes: number of logits.
    image_size: side, or (height, width), in pixels; `patch_size` divides it.
    channels: of the images.
    patch_size, width, depth, heads, mlp_dim: each given one overrides the variant's.
    head: how tokens become one vector: "cls" (a class token), "gap" (their mean), "map" (attention pooling).
    positions: "learned", or "sincos2d" without parameters (a class token then has none).
    registers: extra tokens that are dropped at the end, https://arxiv.org/abs/2309.16588.
    pre_logits: width of a tanh layer before the head, as the paper has for pre-training; none if None.
    dropout: rate on embeddings, inside the MLP and on what enters the residual stream.
    drop_path: stochastic depth's rate at the last block; it grows linearly from 0 at the first.
    activation: of the MLP.
    attention: the backend, see attention.py.
    scan: compile one block and scan over layers; parameters get a leading layer axis. For depth and for TPUs.
    remat: what the backward pass computes again: "none", "full", "dots", "save(qkv)"; see `layers.remat_policy`.
    dtype: of the computation; parameters and logits are float32.
  """
  variants = layers.read_patch_variant(VARIANTS, variant)
  if variant is None and mlp_dim is None and width is not None:
    mlp_dim = 4 * width
  given = dict(patch_size=patch_size, width=width, depth=depth, heads=heads, mlp_dim=mlp_dim)
  sizes = layers.sizes(variants, variant, **given)
  width = sizes["width"]
  layers.check_positive(num_classes=num_classes, channels=channels, pre_logits=pre_logits)
  layers.check_rate(dropout=dropout, drop_path=drop_path)
  layers.remat_policy(remat)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  grid = layers.grid(image_size, sizes["patch_size"])
  if positions == "sincos2d" and width % 4:
    raise UserError(f"model.width: {width} is no multiple of 4, which positions 'sincos2d' need.")
  if registers < 0:
    raise UserError(f"model.registers: {registers} must be 0 or more.")

  def block(rngs):
    return layers.Block(
      width,
      sizes["heads"],
      sizes["mlp_dim"],
      activation=activation,
      dropout=dropout,
      mlp_dropout=dropout,
      attention=attention,
      dtype=compute,
      init=INIT,
      rngs=rngs,
    )

  def tokens(count):
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (count, width)))

  has_cls = head == "cls"  # It has a learned position too, as in the paper.
  return ViT(
    embed=layers.Dense(sizes["patch_size"] ** 2 * channels, width, dtype=compute, rngs=rngs),
    class_token=nnx.Param(jnp.zeros((1, width))) if has_cls else None,
    registers=tokens(registers) if registers else None,
    positions=tokens(grid[0] * grid[1] + has_cls) if positions == "learned" else None,
    blocks=layers.stack(block, sizes["depth"], scan=scan, rngs=rngs),
    norm=nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs),
    pool=AttentionPool(width, sizes["heads"], sizes["mlp_dim"], dtype=compute, rngs=rngs) if head == "map" else None,
    pre_logits=nnx.Linear(width, pre_logits, dtype=compute, rngs=rngs) if pre_logits else None,
    head=nnx.Linear(pre_logits or width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs),
    grid=grid,
    patch_size=sizes["patch_size"],
    channels=channels,
    dropout=dropout,
    drop_path=drop_path,
    remat=remat,
  )
