"""The first tensor that is not finite is named with its operation, its module and its line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import nonfinite


def line_of(function, text):
  """The number of the line of `function` that has `text`."""
  lines, first = inspect.getsourcelines(function)
  (found,) = [first + i for i, line in enumerate(lines) if text in line]
  return found


def origin(function, *args):
  (event,) = nonfinite.trace(function, *args).values()
  return event and event.origins[0]


def assert_at(event, function, text):
  assert event.line.startswith(f"{__file__}:{line_of(function, text)} ("), event.line


def logarithm(x):
  with jax.named_scope("gate"):
    y = jnp.log(x - 1)
  return jnp.sum(y * 2)


def test_the_operation_that_made_it_is_named_not_what_came_of_it():
  event = origin(logarithm, jnp.array([1.0, 2.0, 3.0]))
  assert (event.operation, event.module, event.tensor, event.infinities) == ("log", "gate", "float32[3]", 1)
  assert_at(event, logarithm, "jnp.log")
  assert origin(logarithm, jnp.array([2.0, 3.0])) is None


def norm(x):
  with jax.named_scope("norm"):
    return jnp.sqrt(jnp.sum(x * x))


def test_what_only_the_gradient_breaks_is_found_at_what_it_is_the_gradient_of():
  assert origin(norm, jnp.zeros(3)) is None
  event = origin(jax.grad(norm), jnp.zeros(3))
  assert (event.operation, event.module) == ("div", "norm")  # By twice the root.
  assert_at(event, norm, "jnp.sqrt")


def attention(scores, mask):
  scores = jnp.where(mask, scores, -jnp.inf)
  weights = jax.nn.softmax(scores)
  late = weights / (weights.sum() - 1)
  return jnp.sum(late)


def test_infinities_that_go_nowhere_are_not_blamed():
  event = origin(attention, jnp.array([0.0, 0.0, 0.0]), jnp.array([True, True, False]))
  assert event.operation == "div"
  assert_at(event, attention, "late =")


def guarded(x, weight):
  mean = jnp.where(weight == 0, jnp.nan * weight, x / jnp.where(weight == 0, 1, weight))
  return jnp.log(mean - mean)


def test_what_a_selection_leaves_out_is_not_blamed():
  event = origin(guarded, jnp.float32(2), jnp.float32(4))
  assert event.operation == "log"
  (whole,) = nonfinite.trace(lambda x: (x / 0 - x / 0) * 2, jnp.float32(1)).values()
  assert [e.operation for e in whole.origins] == ["div", "div"] and whole.first_nan.operation == "sub"


def layers(weights, x):
  def layer(x, w):
    with jax.named_scope("layer"):
      return jax.checkpoint(lambda x: jnp.exp(x * w))(x), x

  x, before = jax.lax.scan(layer, x, weights)
  return x.sum() + before.sum()


@pytest.mark.parametrize("gradient", [False, True])
def test_the_turn_of_a_loop_is_told(gradient):
  function = jax.grad(layers) if gradient else layers
  event = origin(function, jnp.array([1.0, 2.0, 100.0, 1.0]), jnp.ones(2))
  assert (event.operation, event.module, event.turns) == ("exp", "layer", (2,))
  assert_at(event, layers, "jnp.exp")


def branches(x, n):
  def body(carry):
    i, x = carry
    return i + 1, jax.lax.cond(i == 2, lambda x: 1 / (x - x), lambda x: x + 1, x)

  return jax.lax.while_loop(lambda carry: carry[0] < n, body, (0, x))[1]


def test_loops_of_unknown_length_and_branches_are_looked_into():
  event = origin(jax.jit(branches), jnp.float32(3), 5)
  assert (event.operation, event.turns) == ("div", (2,))
  assert_at(event, branches, "1 / (x - x)")
  assert origin(jax.jit(branches), jnp.float32(3), 2) is None


@jax.custom_jvp
def safe(x):
  return jnp.log(x)


safe.defjvps(lambda tangent, out, x: tangent * jnp.exp(-x) / x)


@jax.custom_vjp
def clipped(x):
  return jnp.sqrt(x)


clipped.defvjp(lambda x: (jnp.sqrt(x), x), lambda x, g: (g / (x - x),))


def test_rules_of_ones_own_are_looked_into():
  assert origin(jax.jit(lambda x: safe(x) * 2), jnp.zeros(2)).operation == "log"
  assert origin(jax.grad(lambda x: safe(x).sum()), jnp.array([1.0, 0.0])).operation in ("log", "div")
  assert origin(jax.jit(lambda x: clipped(x) * 2), -jnp.ones(2)).operation == "sqrt"
  event = origin(jax.grad(lambda x: clipped(x).sum()), jnp.ones(2))
  assert event.operation == "div" and event.backward


def test_an_argument_that_came_broken_is_named_by_its_path():
  params, batch = {"head": {"kernel": jnp.ones((2, 2))}}, {"image": jnp.array([[1.0, np.nan]])}
  event = origin(lambda params, batch: (batch["image"] @ params["head"]["kernel"]).sum(), params, batch)
  assert (event.operation, event.module, event.nans) == ("argument", "1/image", 1)
  assert str(event) == "1/image float32[1, 2], an argument: 1 NaN"


def test_bfloat16_keys_and_whole_numbers_are_looked_at_as_what_they_are():
  def function(key, x):
    return (x * jax.random.normal(key, (3,), jnp.bfloat16)).sum() / (x.astype(jnp.int32).sum() * 0)

  event = origin(function, jax.random.key(0), jnp.ones(3, jnp.bfloat16))
  assert event.operation == "div"


def test_where_a_whole_breaks_but_not_its_parts_the_whole_is_named():
  big = jnp.float32(3e38)
  event = origin(lambda x: jnp.stack([x, x]).sum(), big)
  assert event.operation == "reduce_sum" and event.infinities == 1
