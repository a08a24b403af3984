"""MLP-Mixer: one MLP across the patches of an image, one across channels, in turns. https://arxiv.org/abs/2105.01601"""

from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from bigjax import sharding
from bigjax.models import layers

# Table 1 of the paper.
VARIANTS = {
  "S": dict(width=512, depth=8, tokens_dim=256, channels_dim=2048),
  "B": dict(width=768, depth=12, tokens_dim=384, channels_dim=3072),
  "L": dict(width=1024, depth=24, tokens_dim=512, channels_dim=4096),
  "H": dict(width=1280, depth=32, tokens_dim=640, channels_dim=5120),
}

_LECUN = nnx.initializers.lecun_normal()
INIT = layers.BlockInit(qkv=_LECUN, out=_LECUN, up=_LECUN, down=_LECUN)


class MixerBlock(nnx.Module):
  """Token mixing, then channel mixing, each after a norm and around a skip."""

  def __init__(self, seq, width, tokens_dim, channels_dim, *, activation, dropout, dtype, rngs: nnx.Rngs):
    dense = dict(activation=activation, dropout=dropout, dtype=dtype, init=INIT, rngs=rngs)
    self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
    self.tokens = layers.Mlp(seq, tokens_dim, **dense)
    self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
    self.channels = layers.Mlp(width, channels_dim, **dense)

  def __call__(self, x: Float[Array, "batch seq width"], *, key=None, drop_rate=None) -> tuple[Array, dict]:
    keys = layers.subkeys(key, 4)
    mixed = self.tokens(self.norm1(x).transpose(0, 2, 1), key=keys[0]).transpose(0, 2, 1)
    x = sharding.constrain(x + layers.drop_path(mixed, drop_rate, keys[1]), "batch", "seq", "embed")
    mixed = self.channels(self.norm2(x), key=keys[2])
    return sharding.constrain(x + layers.drop_path(mixed, drop_rate, keys[3]), "batch", "seq", "embed"), {}


TENSOR = layers.BLOCK_TENSOR


@nnx.dataclass(eq=False, kw_only=True)
class Mixer(nnx.Module):
  """Patches -> linear embedding -> mixer blocks -> norm -> mean over patches -> head."""

  embed: layers.Dense
  blocks: nnx.Module
  norm: nnx.LayerNorm
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
    """Returns the mean over patches after the last norm."""
    key = layers.training_key(key, train, self.dropout, self.drop_path)
    x = self.embed(layers.patches(images, self.grid, self.patch_size, self.channels))
    x, _ = layers.run_stack(self.blocks, x, key=key, drop_path_rate=self.drop_path, remat=self.remat)
    return self.norm(x).mean(axis=1)

  def __call__(
    self, images: Float[Array, "batch height width channel"], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float32[Array, "batch classes"]:
    return self.head(self.features(images, key=key, train=train))


def make(
  *,
  num_classes: int,
  image_size: int | tuple[int, int] = 224,
  channels: int = 3,
  variant: str | None = None,
  patch_size: int | None = None,
  width: int | None = None,
  depth: int | None = None,
  tokens_dim: int | None = None,
  channels_dim: int | None = None,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  activation: str = "gelu_tanh",
  scan: bool = False,
  remat: str = "none",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> Mixer:
  """An MLP-Mixer of a published size (`variant`, such as "B/16": its size and its patches' side) or of your own.

  Args:
    num_classes: number of logits.
    image_size: side, or (height, width), in pixels; `patch_size` divides it.
    channels: of the images.
    patch_size, width, depth: each given one overrides the variant's.
    tokens_dim, channels_dim: widths inside the MLPs across patches and across channels.
    dropout: rate inside the MLPs.
    drop_path: stochastic depth's rate at the last block; it grows linearly from 0 at the first.
    activation: of the MLPs.
    scan: compile one block and scan over layers; parameters get a leading layer axis.
    remat: what the backward pass computes again: "none", "full", "dots", "save(qkv)"; see `layers.remat_policy`.
    dtype: of the computation; parameters and logits are float32.
  """
  variants = layers.read_patch_variant(VARIANTS, variant)
  given = dict(patch_size=patch_size, width=width, depth=depth, tokens_dim=tokens_dim, channels_dim=channels_dim)
  sizes = layers.sizes(variants, variant, **given)
  layers.check_positive(num_classes=num_classes, channels=channels)
  layers.check_rate(dropout=dropout, drop_path=drop_path)
  layers.remat_policy(remat)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  grid, width = layers.grid(image_size, sizes["patch_size"]), sizes["width"]

  def block(rngs):
    shape = (grid[0] * grid[1], width, sizes["tokens_dim"], sizes["channels_dim"])
    return MixerBlock(*shape, activation=activation, dropout=dropout, dtype=compute, rngs=rngs)

  return Mixer(
    embed=layers.Dense(sizes["patch_size"] ** 2 * channels, width, dtype=compute, rngs=rngs),
    blocks=layers.stack(block, sizes["depth"], scan=scan, rngs=rngs),
    norm=nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs),
    head=nnx.Linear(width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs),
    grid=grid,
    patch_size=sizes["patch_size"],
    channels=channels,
    dropout=dropout,
    drop_path=drop_path,
    remat=remat,
  )
