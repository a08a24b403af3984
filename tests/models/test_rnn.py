"""Recurrent networks: sizes by hand, their equations step by step in NumPy, directions, padding, causality."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.errors import UserError
from bigjax.models import rnn

X = np.random.default_rng(0).normal(size=(3, 7, 2)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(1, 9, size=(3, 7)).astype(np.int32)


@functools.cache
def random(**arguments):
  graphdef, params = nnx.split(nnx.eval_shape(lambda: rnn.make(**arguments, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), nnx.to_pure_dict(params))
  return graphdef, params


def outputs(inputs, **arguments):
  graphdef, params = random(**arguments)
  return np.asarray(jax.jit(lambda x: nnx.merge(graphdef, params)(x))(inputs))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def vanilla_step(inputs, h, c, p):
  return np.tanh(inputs + h @ p["kernel"]), c


def lstm_step(inputs, h, c, p):
  i, f, g, o = np.split(inputs + h @ p["kernel"], 4, axis=-1)
  c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
  return sigmoid(o) * np.tanh(c), c


def gru_step(inputs, h, c, p):
  xr, xz, xn = np.split(inputs, 3, axis=-1)
  hr, hz, hn = np.split(h @ p["kernel"] + p["bias"], 3, axis=-1)
  z = sigmoid(xz + hz)
  return (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * h, c


STEPS = dict(vanilla=vanilla_step, lstm=lstm_step, gru=gru_step)


def reference(cell, x, p):
  """The state after each position, as the equations have it."""
  h = c = np.zeros((len(x), 5))
  states = []
  for t in range(x.shape[1]):
    h, c = STEPS[cell](x[:, t] @ p["inputs"]["kernel"] + p["inputs"]["bias"], h, c, p["recurrent"])
    states.append(h)
  return np.stack(states, axis=1)


@pytest.mark.parametrize("cell", STEPS)
def test_the_outputs_are_those_of_the_equations(cell):
  arguments = dict(num_outputs=4, in_features=2, cell=cell, width=5, bidirectional=True, output="position")
  _, params = random(**arguments)
  p = jax.tree.map(np.asarray, params)
  forward, backward = p["layers"][0][0], p["layers"][0][1]
  states = [reference(cell, X, forward), reference(cell, X[:, ::-1], backward)[:, ::-1]]
  expected = np.concatenate(states, -1) @ p["head"]["kernel"] + p["head"]["bias"]
  np.testing.assert_allclose(outputs(X, **arguments), expected, rtol=1e-4, atol=1e-5)


def test_one_output_a_sequence_is_of_the_last_state_or_the_mean_or_all():
  _, params = random(num_outputs=4, in_features=2, width=5)
  p = jax.tree.map(np.asarray, params)
  states = reference("lstm", X, p["layers"][0][0])
  for output, expected in dict(last=states[:, -1], mean=states.mean(1)).items():
    found = outputs(X, num_outputs=4, in_features=2, width=5, output=output)
    np.testing.assert_allclose(found, expected @ p["head"]["kernel"] + p["head"]["bias"], rtol=1e-4, atol=1e-5)
  _, params = random(num_outputs=4, in_features=2, width=5, output="flat", seq_len=7)
  p = jax.tree.map(np.asarray, params)
  expected = reference("lstm", X, p["layers"][0][0]).reshape(3, 35) @ p["head"]["kernel"] + p["head"]["bias"]
  found = outputs(X, num_outputs=4, in_features=2, width=5, output="flat", seq_len=7)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_pytorch_and_mnist1d():
  def count(**arguments):
    module = nnx.eval_shape(lambda: rnn.make(**arguments, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

  # https://github.com/greydanus/mnist1d: GRUBase, 6 wide in both directions, all states to the head: 5,134 parameters.
  gru = dict(num_outputs=10, in_features=1, cell="gru", width=6, bidirectional=True, output="flat", seq_len=40)
  assert count(**gru) == 5_134
  # 4 gates of (inputs + state + 1) x width, then the head. PyTorch's LSTM has a second bias that does the same.
  lstm = dict(num_outputs=10, in_features=3, width=8, depth=2)
  assert count(**lstm) == 4 * (3 + 8 + 1) * 8 + 4 * (8 + 8 + 1) * 8 + 90


def test_padding_leaves_the_state_as_it_is():
  arguments = dict(num_outputs=4, vocab_size=9, width=5, depth=2, bidirectional=True, pad_id=0)
  padded = np.concatenate([TOKENS, np.zeros((3, 4), np.int32)], axis=1)
  for output in ("last", "mean"):
    bare, found = (outputs(tokens, **arguments, output=output) for tokens in (TOKENS, padded))
    np.testing.assert_allclose(found, bare, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", STEPS)
def test_a_language_model_does_not_see_the_future(cell):
  arguments = dict(num_outputs=9, vocab_size=9, cell=cell, width=5, depth=2, output="position")
  changed = TOKENS.copy()
  changed[:, 4] = changed[:, 4] % 8 + 1
  before, after = outputs(TOKENS, **arguments), outputs(changed, **arguments)
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (np.abs(before - after)[:, 4:].max(axis=(0, 2)) > 0).all()


def test_values_may_come_in_a_row():
  arguments = dict(num_outputs=4, in_features=2, width=5)
  np.testing.assert_array_equal(outputs(X.reshape(3, 14), **arguments), outputs(X, **arguments))


def test_an_lstm_remembers_at_first():
  module = rnn.make(num_outputs=2, in_features=1, width=3, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(module.layers[0][0].inputs.bias[...], [0] * 3 + [1] * 3 + [0] * 6)


@pytest.mark.parametrize(
  ("arguments", "inputs", "remedy"),
  [
    (dict(in_features=3), X, "model.in_features: 3 does not fit"),
    (dict(vocab_size=9), X[..., 0], "model.vocab_size is set"),
    (dict(in_features=2, output="flat", seq_len=8), X, "model.seq_len: 8, but the sequences have 7"),
  ],
)
def test_inputs_that_do_not_fit_are_named_with_the_remedy(arguments, inputs, remedy):
  graphdef, params = random(num_outputs=4, width=5, **arguments)
  with pytest.raises(UserError, match=remedy):
    nnx.merge(graphdef, params)(jnp.asarray(inputs))
