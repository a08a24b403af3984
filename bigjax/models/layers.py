"""What two or more models share: names of functions, dropout, the transformer block and the stack of them."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bigjax import sharding
from bigjax.errors import UserError, suggest
from bigjax.models import blockwise, pipeline
from bigjax.models.attention import BACKENDS, attend
from bigjax.models.cache import Layer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

ACTIVATIONS = {
  "identity": lambda x: x,
  "relu": jax.nn.relu,
  "relu6": jax.nn.relu6,
  "leaky_relu": jax.nn.leaky_relu,
  "elu": jax.nn.elu,
  "selu": jax.nn.selu,
  "celu": jax.nn.celu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "mish": jax.nn.mish,
  "tanh": jnp.tanh,
  "sigmoid": jax.nn.sigmoid,
  "hard_tanh": jax.nn.hard_tanh,
  "hard_sigmoid": jax.nn.hard_sigmoid,
  "hard_silu": jax.nn.hard_silu,
  "softplus": jax.nn.softplus,
  "softsign": jax.nn.soft_sign,
  "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}

INITIALIZERS = {
  "lecun_normal": nnx.initializers.lecun_normal(),
  "lecun_uniform": nnx.initializers.lecun_uniform(),
  "he_normal": nnx.initializers.he_normal(),
  "he_uniform": nnx.initializers.he_uniform(),
  "glorot_normal": nnx.initializers.glorot_normal(),
  "glorot_uniform": nnx.initializers.glorot_uniform(),
  "orthogonal": nnx.initializers.orthogonal(),
  "normal": nnx.initializers.normal(0.02),
  "zeros": nnx.initializers.zeros,
}

# Activations that a policy of remat can name: what blocks call `checkpoint_name` on.
NAMED = ("qkv", "attention", "hidden")


def choose(table: dict[Any, Any], argument: str, name: Any) -> Any:
  """Returns `table[name]`; an unknown name is an error that says which argument of the model it was."""
  if name not in table:
    raise UserError(f"model.{argument}: {name!r} is not known.{suggest(str(name), map(str, table))}")
  return table[name]


def read_patch_variant(variants: dict[str, dict[str, int]], variant: str | None) -> dict[str, dict[str, int]]:
  """Adds to the table what "B/16" means: the sizes of "B" and patches of 16 x 16 pixels."""
  if variant is None:
    return variants
  name, slash, patch = variant.partition("/")
  if slash and not patch.isdigit():
    raise UserError(f'model.variant: {variant!r} has no patch size after the slash. Write it like "B/16".')
  return variants | {variant: choose(variants, "variant", name) | ({"patch_size": int(patch)} if slash else {})}


def sizes(variants: dict[str, dict[str, int]], variant: str | None, **given: int | None) -> dict[str, int]:
  """Returns the sizes of `variant`, each replaced by the one given if there is one."""
  found = {} if variant is None else choose(variants, "variant", variant)
  found = found | {name: size for name, size in given.items() if size is not None}
  missing = [name for name in given if name not in found]
  if missing:
    remedy = f"or a variant: {', '.join(variants)}" if variant is None else f"which variant {variant!r} doesn't set"
    raise UserError(f"model.{missing[0]} is missing. Give it, {remedy}.")
  check_positive(**found)
  return found


def check_positive(**sizes: int | tuple[int, ...] | None) -> None:
  """Raises unless every size, and every size in a tuple, is above 0; None passes."""
  for name, size in sizes.items():
    if any(s <= 0 for s in (size if isinstance(size, tuple) else (size,)) if s is not None):
      raise UserError(f"model.{name}: {size} must be above 0.")


def check_rate(**rates: float) -> None:
  """Raises unless every rate is in [0, 1)."""
  for name, rate in rates.items():
    if not 0 <= rate < 1:
      raise UserError(f"model.{name}: {rate} is not a rate. Choose 0 <= {name} < 1; 0 turns it off.")


def check_heads(width: int, heads: int) -> None:
  """Raises unless `heads` divides `width`."""
  check_positive(width=width, heads=heads)
  if width % heads:
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    nearest = min(divisors, key=lambda n: abs(n - heads))
    raise UserError(f"model.heads: {heads} does not divide width {width}. The nearest number that does is {nearest}.")


def training_key(key: PRNGKeyArray | None, train: bool, *rates: float) -> PRNGKeyArray | None:
  """Returns the key to drop things with: None unless training, when one must be there if any rate is above 0."""
  if train and key is None and any(rates):
    raise ValueError("This model drops values in training: call it with key=.")
  return key if train else None


def grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
  """Returns (rows, columns) of square patches in an image; raises unless they cover it."""
  check_positive(patch_size=patch_size)
  height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
  for side in (height, width):
    if side <= 0 or side % patch_size:
      nearest = max(round(side / patch_size), 1) * patch_size
      remedy = f"Resize images to {nearest}, or change the patches."
      raise UserError(f"model.patch_size: {patch_size} does not divide image_size {side}. {remedy}")
  return height // patch_size, width // patch_size


def patches(images: Float[Array, "batch height width channel"], grid: tuple[int, int], patch_size: int, channels: int):
  """Returns [batch, patches, patch_size * patch_size * channels], row by row.

  A dense layer on them is the usual strided convolution, as one product.
  """
  (rows, columns), size = grid, patch_size
  expected = (rows * size, columns * size, channels)
  if images.shape[1:] != expected:
    remedy = "Set model.image_size and model.channels, or resize the images."
    raise UserError(f"model.image_size: the model was built for images of {expected}, not {images.shape[1:]}. {remedy}")
  x = images.reshape(-1, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(len(images), rows * columns, -1)


def flatten(inputs: Float[Array, "batch ..."], in_features: int) -> Float[Array, "batch features"]:
  """Returns the values of each example in a row; raises unless there are `in_features` of them."""
  x = inputs.reshape(len(inputs), -1)
  if x.shape[1] != in_features:
    shape = inputs.shape[1:]
    raise UserError(f"model.in_features: {in_features}, but an example of shape {shape} has {x.shape[1]} values.")
  return x


def batch_norm(width: int, *, zero_scale: bool = False, rngs: nnx.Rngs) -> nnx.BatchNorm:
  """Batch normalisation over all but the last dimension, https://arxiv.org/abs/1502.03167, computed in float32."""
  scale_init = nnx.initializers.zeros if zero_scale else nnx.initializers.ones
  return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, scale_init=scale_init, rngs=rngs)


def subkeys(key: PRNGKeyArray | None, count: int) -> Any:
  """Splits `key`; no key gives None for each."""
  return (None,) * count if key is None else jax.random.split(key, count)


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
  """Zeroes values at `rate` and scales the others up to keep the mean; without a key it changes nothing."""
  if key is None or rate == 0:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros_like(x))


def drop_path(x: Float[Array, "batch ..."], rate: Array | None, key: PRNGKeyArray | None) -> Array:
  """Stochastic depth, https://arxiv.org/abs/1603.09382: zeroes whole examples at `rate`, scales the others up."""
  if key is None or rate is None:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, (len(x), 1)) / (1 - rate)
  return (x.reshape(len(x), -1) * keep.astype(x.dtype)).reshape(x.shape)


class Dense(nnx.Linear):
  """A dense layer on `[..., width]`, as one product of two matrices.

  XLA's CPU code for the backward pass of products with three dimensions is 1.6 times slower than with two; elsewhere
  merging them costs nothing. Only where devices split the sequence, it could not be merged with the batch in place.
  """

  adapter: nnx.Module | None = None  # Adds to the result, see bigjax/lora.py.

  def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... features"]:
    if x.ndim == 2 or sharding.seq_is_split():
      return self._product(x)
    return self._product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

  def _product(self, x):
    y = super().__call__(x)
    return y if self.adapter is None else y + self.adapter(x)

  def to_heads(self, x: Float[Array, "batch seq width"], heads: int) -> Float[Array, "batch seq heads dim"]:
    """Returns features by head, what attention takes in.

    On a TPU the product makes them so, its kernel split into heads: what a product makes in a row is copied, heads
    first, before and after attention. 5% fewer cycles for Llama 3.1 8B, as the compiler estimates them.
    """
    if blockwise.platform() != "tpu":
      return self(x).reshape(*x.shape[:-1], heads, -1)
    bias = None if self.bias is None else self.bias[...].reshape(*(1,) * (x.ndim - 1), heads, -1)
    inputs, kernel, bias = self.promote_dtype(
      (x, self.kernel[...].reshape(x.shape[-1], heads, -1), bias), dtype=self.dtype
    )
    y = self.dot_general(inputs, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    y = y if bias is None else y + bias
    return y if self.adapter is None else y + self.adapter(x).reshape(y.shape)

  def from_heads(self, x: Float[Array, "batch seq heads dim"]) -> Float[Array, "batch seq features"]:
    """Returns a product that sums over heads and their dimensions; see `to_heads`."""
    flat = x.reshape(*x.shape[:-2], -1)
    if blockwise.platform() != "tpu":
      return self(flat)
    bias = None if self.bias is None else self.bias[...].reshape(*(1,) * (x.ndim - 2), -1)
    inputs, kernel, bias = self.promote_dtype((x, self.kernel[...].reshape(*x.shape[-2:], -1), bias), dtype=self.dtype)
    y = self.dot_general(inputs, kernel, (((x.ndim - 2, x.ndim - 1), (0, 1)), ((), ())))
    y = y if bias is None else y + bias
    return y if self.adapter is None else y + self.adapter(flat)


def unembed(
  hidden: Float[Array, "batch seq width"], embedding: Float[Array, "vocab width"]
) -> Float[Array, "batch seq vocab"]:
  """Returns logits in float32; where devices split the vocabulary, each of them has those of its part."""
  if sharding.seq_is_split():
    logits = jnp.einsum("bsd,vd->bsv", hidden, embedding, preferred_element_type=jnp.float32)
  else:  # As in Dense.
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.einsum("td,vd->tv", flat, embedding, preferred_element_type=jnp.float32)
    logits = logits.reshape(*hidden.shape[:-1], -1)
  return sharding.constrain(logits, "batch", "seq", "vocab")


class BlockInit(NamedTuple):
  """How the dense layers of a transformer block start."""

  qkv: Callable
  out: Callable
  up: Callable
  down: Callable


class SelfAttention(nnx.Module):
  """Multi-head self-attention with one product for query, key and value.

  The columns of its kernel are [heads, (query, key, value), head_dim], so that a split of the last dimension over
  devices gives each of them whole heads.
  """

  def __init__(self, width: int, heads: int, *, causal, bias, dropout, backend, dtype, init: BlockInit, rngs: nnx.Rngs):
    check_heads(width, heads)
    self.heads, self.causal, self.dropout = heads, causal, dropout
    self.backend = choose(dict(zip(BACKENDS, BACKENDS)), "attention", backend)
    self.qkv = Dense(width, 3 * width, use_bias=bias, kernel_init=init.qkv, dtype=dtype, rngs=rngs)
    self.out = Dense(width, width, use_bias=bias, kernel_init=init.out, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "batch seq width"],
    *,
    key: PRNGKeyArray | None = None,
    segments: Array | None = None,
    cache: Layer | None = None,
  ) -> tuple[Array, Layer | None]:
    """Returns what goes on, and the cache with the tokens: all rows' first ones together, or one more of each."""
    qkv = checkpoint_name(self.qkv.to_heads(x, 3 * self.heads), "qkv").reshape(*x.shape[:2], self.heads, 3, -1)
    query, key_, value = (sharding.constrain(qkv[:, :, :, i], "batch", "seq", "heads", None) for i in range(3))
    cache = None if cache is None else cache.add({"key": key_, "value": value})
    if cache is not None and x.shape[1] == 1:
      out = cache.recall(query)
    else:
      backend = self.backend if cache is None else "auto"  # Prompts have any length.
      how = dict(causal=self.causal, balanced=self.causal, segments=segments, backend=backend)
      out = attend(query, key_, value, dropout_rate=self.dropout, dropout_key=key, **how)
    return self.out.from_heads(out), cache


class Mlp(nnx.Module):
  """Two dense layers with an activation between them, on `[batch, ..., width]`."""

  def __init__(self, width: int, hidden: int, *, activation, bias=True, dropout, dtype, init, rngs: nnx.Rngs):
    self.activation, self.dropout = choose(ACTIVATIONS, "activation", activation), dropout
    arguments = dict(use_bias=bias, dtype=dtype, rngs=rngs)
    self.up = Dense(width, hidden, kernel_init=init.up, **arguments)
    self.down = Dense(hidden, width, kernel_init=init.down, **arguments)

  def __call__(self, x: Float[Array, "batch ... width"], *, key: PRNGKeyArray | None = None) -> Array:
    words = ("batch", "seq", "hidden") if x.ndim == 3 else ("batch", "hidden")
    hidden = checkpoint_name(sharding.constrain(self.up(x), *words), "hidden")
    return self.down(dropout(self.activation(hidden), self.dropout, key))


class Block(nnx.Module):
  """The pre-norm transformer block."""

  def __init__(
    self,
    width: int,
    heads: int,
    mlp_dim: int,
    *,
    causal: bool = False,
    activation: str = "gelu_tanh",
    bias: bool = True,
    epsilon: float = 1e-6,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    mlp_dropout: float = 0.0,
    attention: str = "auto",
    dtype: Any = None,
    init: BlockInit,
    rngs: nnx.Rngs,
  ):
    norm = dict(epsilon=epsilon, use_bias=bias, rngs=rngs)  # In float32: see `dtype` of nnx.LayerNorm.
    dense = dict(bias=bias, dtype=dtype, init=init, rngs=rngs)
    self.dropout = dropout
    self.norm1 = nnx.LayerNorm(width, **norm)
    self.attn = SelfAttention(width, heads, causal=causal, dropout=attention_dropout, backend=attention, **dense)
    self.norm2 = nnx.LayerNorm(width, **norm)
    self.mlp = Mlp(width, mlp_dim, activation=activation, dropout=mlp_dropout, **dense)

  def __call__(
    self,
    x: Float[Array, "batch seq width"],
    *,
    key: PRNGKeyArray | None = None,
    drop_rate: Array | None = None,
    segments: Int[Array, "batch seq"] | None = None,
    cache: Layer | None = None,
  ) -> tuple[Array, dict[str, Any]]:
    keys = subkeys(key, 6)

    def residual(x, branch, dropout_key, path_key):
      x = x + drop_path(dropout(branch, self.dropout, dropout_key), drop_rate, path_key)
      return sharding.constrain(x, "batch", "seq", "embed")

    out, cache = self.attn(self.norm1(x), key=keys[0], segments=segments, cache=cache)
    x = residual(x, out, keys[1], keys[2])
    x = residual(x, self.mlp(self.norm2(x), key=keys[3]), keys[4], keys[5])
    return x, {} if cache is None else {"cache": cache}


# What tensor parallelism splits in a block: the columns of what makes heads and hidden units, the rows of what takes
# them in. A path from the root of the parameters, and the dimension from the right.
BLOCK_TENSOR = (
  (r".*blocks/.*(qkv|up)/(kernel|bias)", -1),
  (r".*blocks/.*(out|down)/kernel", -2),
)


def stack(make_block: Callable[..., nnx.Module], depth: int, *, scan: bool, rngs: nnx.Rngs) -> nnx.Module:
  """Builds `depth` blocks: one whose leaves have a leading layer axis if `scan`, else a list; the values are the same.

  Either way the initialisation is compiled for one block and mapped over layers. For a circular pipeline of R rounds
  the layer axis is two, [R, depth / R].
  """
  check_positive(depth=depth)
  stacked = nnx.vmap(lambda key: make_block(rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))
  graphdef, state = nnx.split(stacked)
  if scan:
    repeats = sharding.current().repeats
    if depth % repeats:
      raise UserError(f"config.pipeline.repeats: {repeats} does not divide model.depth, {depth}.")
    group = lambda x: x.reshape(repeats, depth // repeats, *x.shape[1:]) if repeats > 1 else x
    return nnx.merge(graphdef, jax.tree.map(group, state))
  # The barrier keeps XLA from fusing, and so repeating, the drawing of random numbers into each slice.
  state = jax.lax.optimization_barrier(state)
  return nnx.List([nnx.merge(graphdef, _at(i, state)) for i in range(depth)])


def run_stack(
  blocks: nnx.Module, x: Array, *, key=None, drop_path_rate: float = 0.0, remat: str = "none", **arrays: Array
) -> tuple[Array, dict[str, Array]]:
  """Applies blocks built by `stack` in order, `block(x, key=, drop_rate=, **arrays) -> (x, aux)`.

  Returns x, and the arrays that the blocks returned beside it, stacked over layers. Where the mesh has stages, the
  blocks run as a pipeline.

  `drop_path_rate` is that of the last block; it grows linearly from 0 at the first.
  `remat` says what the backward pass computes again, see `remat_policy`.
  `arrays` have a leading batch axis, such as the segments of packed documents.
  """
  policy = remat_policy(remat)
  scanned = not isinstance(blocks, nnx.List)
  staged = sharding.current().size("stage") > 1
  if staged and not scanned:
    raise UserError("model.scan: a pipeline needs its layers in one stack; set scan=True.")
  groups = (sharding.current().repeats > 1) + 1  # Leading dimensions that count layers.
  depth = math.prod(jax.tree.leaves(blocks)[0].shape[:groups]) if scanned else len(blocks)
  rates = jnp.linspace(0.0, drop_path_rate, depth) if drop_path_rate and key is not None else None
  keys = None if key is None else jax.random.split(key, depth)

  def layer(x, block, key, drop_rate, **arrays):
    return block(x, key=key, drop_rate=drop_rate, **arrays)

  if staged:
    return pipeline.run(layer, blocks, x, keys=keys, rates=rates, arrays=arrays, policy=policy)
  if policy is not None:
    layer = jax.checkpoint(layer, policy=policy)
  if scanned:
    return jax.lax.scan(lambda x, xs: layer(x, *xs, **arrays), x, (blocks, keys, rates))
  found = []
  for i, block in enumerate(blocks):
    x, aux = layer(x, block, *_at(i, (keys, rates)), **arrays)
    found.append(aux)
  return x, jax.tree.map(lambda *layers: jnp.stack(layers), *found)


def stacked(blocks: Sequence[nnx.Module]) -> nnx.Module:
  """Makes of equal blocks one whose leaves have a leading layer axis; of none, an empty list."""
  if not blocks:
    return nnx.List([])
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, blocks))
  return nnx.merge(nnx.graphdef(blocks[0]), state)


def run_keeping(
  call: Callable[[nnx.Module, Array, Any], Array],
  blocks: nnx.Module,
  x: Array,
  *,
  keys: Any = None,
  remat: str = "none",
) -> Array:
  """Applies blocks in order, in a list or `stacked`, that keep something of a call, such as batch statistics.

  `call(block, x, key) -> x` has one of `keys` for each block; `remat` is as in `run_stack`.
  """
  policy = remat_policy(remat)

  def layer(x, graphdef, params, kept, key):
    block = nnx.merge(graphdef, params, kept)
    x = call(block, x, key)
    return x, nnx.state(block, nnx.Not(nnx.Param))

  if policy is not None:
    layer = jax.checkpoint(layer, policy=policy, static_argnums=1)
  if not isinstance(blocks, nnx.List):
    if sharding.current().size("stage") > 1:
      raise UserError("config.mesh: these layers are no stages of a pipeline. Take the axis 'pipe' out, or scan=False.")
    graphdef, params, kept = nnx.split(blocks, nnx.Param, ...)
    x, kept = jax.lax.scan(lambda x, xs: layer(x, graphdef, *xs), x, (params, kept, keys))
    nnx.update(blocks, kept)
    return x
  for i, block in enumerate(blocks):
    x, kept = layer(x, *nnx.split(block, nnx.Param, ...), None if keys is None else keys[i])
    nnx.update(block, kept)
  return x


def remat_policy(remat: str) -> Callable | None:
  """Returns the policy of `jax.checkpoint` for a block; None where nothing is computed again.

  "none"; "full", all but the input of a block; "dots", all but the results of the dense layers. Or by tensor, all but
  "save(qkv,hidden)" and "offload(attention)", which is kept in the host's memory, joined by "+". Tensors have the names
  in `NAMED`: the projections that attention takes in, what it gives, and what is inside the MLP.
  """
  policies = jax.checkpoint_policies
  # Products of half precision are inside a rule of their own, which policies don't look into: see `precision.DENSE`.
  dots = policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("dense")
  )
  whole = {"none": None, "full": policies.nothing_saveable, "dots": dots}
  if remat in whole:
    return whole[remat]
  found = {"save": [], "offload": []}
  for word in remat.split("+"):
    call = re.fullmatch(r"(save|offload)\((.*)\)", word.strip())
    if not call:
      known = [*whole, "save(qkv)", "offload(hidden)"]
      raise UserError(f"model.remat: {remat!r} is not known.{suggest(remat, known)}")
    for name in call[2].split(","):
      if name.strip() not in NAMED:
        raise UserError(f"model.remat: {name.strip()!r} is no tensor of a block.{suggest(name.strip(), NAMED)}")
      found[call[1]].append(name.strip())
  return policies.save_and_offload_only_these_names(
    names_which_can_be_saved=found["save"],
    names_which_can_be_offloaded=found["offload"],
    offload_src="device",
    offload_dst="pinned_host",
  )


def _at(index, tree):
  return jax.tree.map(lambda leaf: leaf[index], tree)
