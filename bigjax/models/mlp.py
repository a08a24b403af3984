"""Multi-layer perceptron: dense layers with an activation after each but the last."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from bigjax.models import layers

# In turn: the columns of a layer, then the rows of the next, so that every second product needs no exchange.
TENSOR = (
  (r"hidden/\d*[02468]/(kernel|bias)", -1),
  (r"hidden/\d*[13579]/kernel", -2),
)


@nnx.dataclass(eq=False, kw_only=True)
class MLP(nnx.Module):
  """Dense layer -> batch norm, if asked for -> activation -> dropout, as often as there are widths; then the head."""

  hidden: nnx.Module  # a list
  norms: nnx.Module | None  # a list
  head: nnx.Linear
  in_features: int
  activation: Callable[[Array], Array]
  dropout: float

  def features(
    self, inputs: Float[Array, "batch ..."], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float[Array, "batch width"]:
    """Returns the output of the last hidden layer."""
    keys = layers.subkeys(layers.training_key(key, train, self.dropout), len(self.hidden))
    x = layers.flatten(inputs, self.in_features)
    for i, dense in enumerate(self.hidden):
      x = dense(x)
      if self.norms is not None:
        x = self.norms[i](x, use_running_average=not train)
      x = layers.dropout(self.activation(x), self.dropout, keys[i])
    return x

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
    dtype: of the computation; parameters and outputs are float32.
  """
  layers.check_positive(in_features=in_features, num_outputs=num_outputs, widths=widths)
  layers.check_rate(dropout=dropout)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  init = layers.choose(layers.INITIALIZERS, "kernel_init", kernel_init)
  dense = dict(kernel_init=init, use_bias=bias and not batch_norm, dtype=compute, rngs=rngs)  # A norm has its own bias.
  return MLP(
    hidden=nnx.List([nnx.Linear(n, width, **dense) for n, width in zip((in_features, *widths), widths)]),
    norms=nnx.List([layers.batch_norm(width, rngs=rngs) for width in widths]) if batch_norm else None,
    head=nnx.Linear((in_features, *widths)[-1], num_outputs, kernel_init=init, use_bias=bias, rngs=rngs),
    in_features=in_features,
    activation=layers.choose(layers.ACTIVATIONS, "activation", activation),
    dropout=dropout,
  )
