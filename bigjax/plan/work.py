"""Model FLOPs: the multiplications and additions that an update needs, whoever computes it and however often.

They are read off the traced loss, so every model has them. A product of matrices or a convolution counts 2 m k n in the
forward pass, and as much again in the backward pass for each of its operands that depends on parameters: with weights
in one operand and activations in the other that makes 6 for each parameter and token,
https://arxiv.org/abs/2001.08361 (section 2.1) and https://arxiv.org/abs/2204.02311 (appendix B). Unlike there, a causal
query counts the keys that it sees and no others, a token the experts that it chose and no room that a capacity leaves
empty, a convolution its input and no padding. Nothing else is counted: not what is computed again, not elementwise
operations, not the optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from typing import Any

import jax
import numpy as np

from bigjax import sharding

# A scope of `bigjax.models.attention`: attend_512x512_causal_window128.
_SCOPE = re.compile(r"attend_(\d+)x(\d+)(_causal)?(?:_window(\d+))?")


@dataclasses.dataclass(frozen=True)
class Work:
  """FLOPs of a step on a whole batch."""

  forward: int
  backward: int
  attention: int  # Of both: scores and weighted values.
  unmasked: int  # What `attention` would be if every query saw every key.
  endless: bool = False  # A loop of unknown length was counted once.

  @property
  def total(self) -> int:
    return self.forward + self.backward

  @property
  def visible(self) -> float:
    """The share of scores that are wanted."""
    return self.attention / self.unmasked if self.unmasked else 1.0


def of(run: Any) -> Work:
  """Returns the model FLOPs of a step of an experiment, of `bigjax.experiment.build`."""
  model = _plainly(run)
  params, extras = run.model.abstract

  def loss(params, extras, batch, key):
    with sharding.use(_one_device(run.mesh)):
      return run.task.loss(model.bind(params, extras), batch, key=key).sums["loss"]

  key = jax.eval_shape(lambda: jax.random.key(0))
  traced = jax.make_jaxpr(loss)(params, extras, dict(run.batch), key)
  trainable = len(jax.tree.leaves(params))
  active = [i < trainable for i in range(len(traced.jaxpr.invars))]
  return count(traced, active)


def _plainly(run):
  """The model with every score in memory, whose products can be seen, and no rows for experts that nobody chose."""
  config = run.config.model
  plain, known = {"attention": "reference", "capacity_factor": None}, inspect.signature(config.factory).parameters
  plain = {k: v for k, v in plain.items() if k in known}
  config = dataclasses.replace(config, kwargs={**config.kwargs, **plain})
  return dataclasses.replace(run.model, build=config)


def _one_device(mesh):
  """A mesh of one device of the same platform, which what is computed may depend on."""
  device = np.array(mesh.devices.flat[:1]).reshape((1,) * len(mesh.axis_names))
  return sharding.Layout(mesh=jax.sharding.Mesh(device, mesh.axis_names))


def count(traced: Any, active: list[bool]) -> Work:
  """Returns the FLOPs of a traced function and of its gradient for the inputs that are `active`."""
  found = _Counter()
  found.walk(traced.jaxpr, active, 1, "")
  return Work(found.forward, found.backward, found.attention, found.unmasked, found.endless)


def seen(queries: int, keys: int, causal: bool, window: int | None) -> int:
  """Returns the pairs of a query and a key that it sees; queries and keys start at the same position."""
  i = np.arange(queries)
  first = np.zeros_like(i) if window is None else np.maximum(i - window + 1, 0)
  last = np.minimum(i, keys - 1) if causal else np.full_like(i, keys - 1)
  if window is not None and not causal:
    last = np.minimum(i + window - 1, keys - 1)
  return int(np.maximum(last - first + 1, 0).sum())


@functools.cache
def meeting(size: int, window: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
  """Returns the pairs of an output and a place in the window that meet an element of the input, in one dimension."""
  places = np.arange(out)[:, None] * stride + np.arange(window)[None] * rhs_dilate - pad
  inside = (places >= 0) & (places <= (size - 1) * lhs_dilate) & (places % lhs_dilate == 0)
  return int(inside.sum())


class _Counter:
  """Sums over a jaxpr, and which of its values depend on parameters."""

  def __init__(self):
    self.forward = self.backward = self.attention = self.unmasked = 0
    self.endless = False

  def walk(self, jaxpr, active, times, scope):
    """Adds up `jaxpr`, run so many times; returns which outputs are active."""
    known = dict(zip(jaxpr.invars, active, strict=True))
    is_active = lambda v: known.get(v, False) if not hasattr(v, "val") else False
    for eqn in jaxpr.eqns:
      ins = [is_active(v) for v in eqn.invars]
      outs = self._equation(eqn, ins, times, f"{scope}/{eqn.source_info.name_stack}")
      for v, on in zip(eqn.outvars, outs, strict=True):
        known[v] = on and jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact)
    return [is_active(v) for v in jaxpr.outvars]

  def _equation(self, eqn, ins, times, scope):
    name = eqn.primitive.name
    if name in _PRODUCTS:
      self._product(_PRODUCTS[name](eqn), ins[:2], times, scope)
    elif name == "scan":
      return self._scan(eqn, ins, times, scope)
    elif name == "while":
      return self._while(eqn, ins, times, scope)
    elif name == "cond":
      return self._cond(eqn, ins, times, scope)
    elif (inner := _inner(eqn)) is not None and len(inner.invars) == len(ins):
      parts = math.prod(eqn.params["mesh"].shape.values()) if name == "shard_map" else 1
      return self.walk(inner, ins, times * parts, scope)
    return [any(ins)] * len(eqn.outvars)

  def _product(self, flops, ins, times, scope):
    flops, whole = flops * times, flops * times
    found = _SCOPE.search(scope)
    if found:
      queries, keys = int(found[1]), int(found[2])
      pairs = seen(queries, keys, bool(found[3]), int(found[4]) if found[4] else None)
      flops = round(flops * pairs / (queries * keys))
      self.attention += flops * (1 + sum(ins))
      self.unmasked += whole * (1 + sum(ins))
    self.forward += flops
    self.backward += flops * sum(ins)

  def _scan(self, eqn, ins, times, scope):
    consts, carry = _scan_parts(eqn.params, ins)
    body, turns = _open(eqn.params["jaxpr"]), eqn.params["length"]
    ins = self._settled(lambda ins: _Counter().walk(body, ins, 1, ""), ins, consts, carry)
    return self.walk(body, ins, times * turns, scope)

  def _while(self, eqn, ins, times, scope):
    """Once: how often is not known before it runs."""
    before, body = eqn.params["cond_nconsts"], _open(eqn.params["body_jaxpr"])
    quiet = _Counter()
    ins = self._settled(
      lambda ins: quiet.walk(body, ins, 1, ""), ins[before:], eqn.params["body_nconsts"], len(eqn.outvars)
    )
    self.endless = self.endless or quiet.forward > 0
    return self.walk(body, ins, times, scope)

  @staticmethod
  def _settled(outputs, ins, consts, carry):
    """What is active of a loop's inputs, once what a turn passes to the next is, too."""
    while True:
      after = outputs(ins)[:carry]
      merged = [*ins[:consts], *(a or b for a, b in zip(ins[consts : consts + carry], after)), *ins[consts + carry :]]
      if merged == ins:
        return ins
      ins = merged

  def _cond(self, eqn, ins, times, scope):
    """The most expensive branch."""
    counters = [_Counter() for _ in eqn.params["branches"]]
    branches = map(_open, eqn.params["branches"])
    outs = [c.walk(branch, ins[1:], times, scope) for c, branch in zip(counters, branches, strict=True)]
    largest = max(counters, key=lambda c: c.forward + c.backward)
    for field in ("forward", "backward", "attention", "unmasked"):
      setattr(self, field, getattr(self, field) + getattr(largest, field))
    self.endless = self.endless or largest.endless
    return [any(each) for each in zip(*outs, strict=True)]


def _inner(eqn):
  for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    if (found := eqn.params.get(key)) is not None:
      return _open(found)
  return None


def _open(jaxpr):
  """A jaxpr without the constants that it may be closed over."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def _scan_parts(params, ins):
  """How many of a scan's inputs are constants, and how many its carry."""
  if "num_consts" in params:  # JAX before 0.11.
    return params["num_consts"], params["num_carry"]
  consts, carry, _ = params["ft_in"].update(ins).unpack()
  return len(list(consts)), len(list(carry))


def _dot(eqn):
  (lhs_contract, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in lhs_contract)


def _convolution(eqn):
  (lhs, rhs), out, how = (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape, eqn.params
  (_, _, *places), (_, features, *window), (batch, channels, *outs) = how["dimension_numbers"]
  dilated = zip(how["window_strides"], how["padding"], how["lhs_dilation"], how["rhs_dilation"], strict=True)
  pairs = math.prod(
    meeting(lhs[p], rhs[w], out[o], stride, pad, lhs_dilate, rhs_dilate)
    for p, w, o, (stride, (pad, _), lhs_dilate, rhs_dilate) in zip(places, window, outs, dilated, strict=True)
  )
  return 2 * pairs * rhs[features] * out[batch] * out[channels]


def _ragged(eqn):
  """Every row with the matrix of its own group."""
  return 2 * math.prod(eqn.invars[0].aval.shape) * eqn.invars[1].aval.shape[-1]


_PRODUCTS = {
  "dot_general": _dot,
  "conv_general_dilated": _convolution,
  "ragged_dot": _ragged,
  "ragged_dot_general": _ragged,
}
