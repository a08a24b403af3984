"""Multi-layer perceptron: dense layers with an activation after each but the last."""

from typing import Literal

from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from bigjax.errors import UserError
from bigjax.models import layers

# In turn: the columns of a layer, then the rows of the next, so that every second product needs no exchange. In a stack
# all layers are alike.
TENSOR = (
  (r"(first|blocks|blocks/\d*[13579])/dense/(kernel|bias)", -1),
  (r"blocks/\d*[02468]/dense/kernel", -2),
)


class Layer(nnx.Module):
  """Dense layer -> batch norm, if asked for -> activation -> dropout."""

  def __init__(self, fan_in: int, width: int, *, batch_norm, activation, dropout, rngs: nnx.Rngs, **dense):
    self.dense = nnx.Linear(fan_in, width, rngs=rngs, **dense)
    self.norm = layers.batch_norm(width, rngs=rngs) if batch_norm else None
    self.activation, self.dropout = activation, dropout

  def __call__(self, x: Float[Array, "batch _"], key: PRNGKeyArray | None, train: bool) -> Float[Array, "batch width"]:
    x = self.dense(x)
    if self.norm is not None:
      x = self.norm(x, use_running_average=not train)
    return layers.dropout(self.activation(x), self.dropout, key)


@nnx.dataclass(eq=False, kw_only=True)
class MLP(nnx.Module):
  """As many layers as there are widths; then the head."""

  first: Layer | None
  blocks: nnx.Module  # the layers after it: a list, or one stack to scan over
  head: nnx.Linear
  in_features: int
  depth: int
  dropout: float
  remat: str

  def features(
    self, inputs: Float[Array, "batch ..."], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float[Array, "batch width"]:
    """Returns the output of the last hidden layer."""
    keys = layers.subkeys(layers.training_key(key, train, self.dropout), self.depth)
    x = layers.flatten(inputs, self.in_features)
    if self.first is None:
      return x
    call = lambda layer, x, key: layer(x, key, train)
    rest = None if keys[0] is None else keys[1:]
    return layers.run_keeping(call, self.blocks, self.first(x, keys[0], train), keys=rest, remat=self.remat)

  def __call__(
    self, inputs: Float[Array, "batch ..."], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float32[Array, "batch outputs"]:
    return self.head(self.features(inputs, key=key, train=train))


def make(
  *,
  in_features: int,
  num_outputs: int,
  widths: tuple[int, ...] = (128,),
  activation: str = "relu",
  dropout: float = 0.0,
  batch_norm: bool = False,
  bias: bool = True,
  kernel_init: str = "lecun_normal",
  scan: bool = False,
  remat: Literal["none", "full", "dots"] = "none",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> MLP:
  """An MLP on `in_features` values an example, whatever the shape they come in.

  Args:
    in_features: number of values of an example.
    num_outputs: number of logits or predicted values.
    widths: of the hidden layers.
    activation: relu, gelu, gelu_tanh, silu, tanh, sigmoid, elu, selu, ... (`layers.ACTIVATIONS`).
    dropout: rate after each activation.
    batch_norm: normalise before each activation, https://arxiv.org/abs/1502.03167.
    bias: of the dense layers.
    kernel_init: lecun_normal, he_normal, glorot_uniform, orthogonal, ... (`layers.INITIALIZERS`).
    scan: compile one of the layers after the first, which must be of one width, and scan over them. For depth.
    remat: what the backward pass computes again: "none"; "full", all but what goes into a layer; "dots", all but the
      products.
    dtype: of the computation; parameters and outputs are float32.
  """
  layers.check_positive(in_features=in_features, num_outputs=num_outputs, widths=widths)
  layers.check_rate(dropout=dropout)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  init = layers.choose(layers.INITIALIZERS, "kernel_init", kernel_init)
  if scan and len(set(widths)) > 1:
    raise UserError(f"model.widths: {widths} differ, but scan=True needs layers of one width, such as {widths[:1]}.")
  options = dict(batch_norm=batch_norm, activation=layers.choose(layers.ACTIVATIONS, "activation", activation))
  dense = dict(kernel_init=init, use_bias=bias and not batch_norm, dtype=compute)  # A norm has its own bias.
  hidden = [
    Layer(fan_in, width, dropout=dropout, rngs=rngs, **options, **dense)
    for fan_in, width in zip((in_features, *widths), widths)
  ]
  return MLP(
    first=hidden[0] if hidden else None,
    blocks=(layers.stacked if scan else nnx.List)(hidden[1:]),
    head=nnx.Linear((in_features, *widths)[-1], num_outputs, kernel_init=init, use_bias=bias, rngs=rngs),
    in_features=in_features,
    depth=len(hidden),
    dropout=dropout,
    remat=remat,
  )
