"""Linear and, with a softmax on top, logistic regression."""

from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from bigjax.models import layers


@nnx.dataclass(eq=False, kw_only=True)
class Linear(nnx.Module):
  """One dense layer on flattened inputs."""

  head: nnx.Linear

  def __call__(
    self, inputs: Float[Array, "batch ..."], *, key: PRNGKeyArray | None = None, train: bool = False
  ) -> Float32[Array, "batch outputs"]:
    del key, train  # It is the same function in training.
    return self.head(layers.flatten(inputs, self.head.in_features))


def make(
  *, in_features: int, num_outputs: int, bias: bool = True, kernel_init: str = "lecun_normal", rngs: nnx.Rngs
) -> Linear:
  """A linear model of `in_features` values an example, whatever the shape they come in."""
  layers.check_positive(in_features=in_features, num_outputs=num_outputs)
  init = layers.choose(layers.INITIALIZERS, "kernel_init", kernel_init)
  return Linear(head=nnx.Linear(in_features, num_outputs, use_bias=bias, kernel_init=init, rngs=rngs))
