"""From the config's rules to one optax transformation: what happens between a gradient and the next parameters.

In this order, which is that of PyTorch, big_vision and optax's own recipes:

1. A gradient taken elsewhere takes the place of the gradient (sharpness-aware optimizers).
2. Clipping: by value, by global norm, adaptive.
3. Coupled decay is added to the gradient: `l2(s)` adds s * param, `l1(s)` adds s * sign(param).
4. The optimizer itself, one for each learning rate, times that rate.
5. Decoupled decay: minus rate(step) * s * param, as AdamW; then all of the update times the leaf's multiplier.
6. Reduction on a plateau, which scales decay too.
7. Averaging that the optimizer is built on (schedule-free).
8. Rounding, where parameters are kept in bfloat16: parameter + update is one (`precision.py`).
9. The moving average of the parameters as they are after the update, in float32.

All of it in float32, whatever the gradient and the parameters are kept in. An update that overflowed float16 is none:
the parameters and all that is kept here but the scale of the loss stay as they were.

Frozen leaves take no part in any of it: no update, no memory, no share in a global norm. Where a paper has decay inside
the optimizer (the trust ratio of LAMB and LARS), use the optimizer's own argument, which decays every leaf. And what
looks at whole leaves (trust ratios, Adafactor's scale, adaptive clipping) sees a stack of scanned layers as one.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigjax import paths, precision
from bigjax.errors import UserError, suggest
from bigjax.schedules import Schedule

PyTree = Any
MEASURES = {"loss_scale": "scale", "skipped_steps": "skipped", "skipped_in_a_row": "skipped_in_a_row"}


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """A transformation, and what there is to know about it.

  Call `tx.update(grads, opt_state, params, value=loss, grad_fn=lambda params, _: grads)`; those that need the loss or
  another gradient find it there.
  """

  tx: optax.GradientTransformationExtraArgs
  learning_rates: Mapping[str, Schedule]  # By "", or if there are several by "/" and their regex.
  views: Mapping[str, Callable[[PyTree, PyTree], PyTree]]  # (opt_state, params) -> other parameters to evaluate.

  def rates(self, opt_state: PyTree, step: Any) -> dict[str, Any]:
    """Returns the learning rates by name at `step`, including what a plateau has reduced them by."""
    scales = _find(opt_state, optax.contrib.ReduceLROnPlateauState)
    scale = lambda schedule: next(scales).scale if hasattr(schedule, "transform") else 1
    for scaled in _find(opt_state, precision.LossScaleState):
      step = step - scaled.skipped  # Schedules stand still where nothing is updated.
    return {name: schedule(step) * scale(schedule) for name, schedule in self.learning_rates.items()}

  def loss_scale(self, opt_state: PyTree) -> Any:
    """Returns what the summed loss is to be multiplied by before its gradient is taken; divide the gradient by it."""
    return next((s.scale for s in _find(opt_state, precision.LossScaleState)), 1.0)

  def unless_skipped(self, opt_state: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """Returns `new`, or `old` if the update that `opt_state` came from was skipped."""
    for scaled in _find(opt_state, precision.LossScaleState):
      new = jax.tree.map(lambda n, o, skipped=scaled.skipped_in_a_row > 0: jnp.where(skipped, o, n), new, old)
    return new

  def measures(self, opt_state: PyTree) -> dict[str, Any]:
    """Returns what there is to log of the optimizer itself, by name."""
    found = _find(opt_state, precision.LossScaleState)
    return {k: getattr(s, w) for s in found for k, w in MEASURES.items()}


def make(
  factory: Callable[..., optax.GradientTransformation],
  schedule: Schedule | Sequence[tuple[str, Schedule | None]],
  abstract_params: PyTree,
  *,
  clip: Mapping[str, float | None] | None = None,
  decay: Sequence[tuple[str, float | str]] = (),
  lr_multipliers: Sequence[tuple[str, float]] = (),
  freeze: Sequence[str] = (),
  ema: float | None = None,
  ema_warmup: bool = False,
  numbers: precision.PrecisionConfig = precision.FLOAT32,
  seed: int = 0,
  weight: float = 1.0,
) -> Optimizer:
  """Returns the optimizer that a config describes.

  Args:
    factory: From a learning rate, here a schedule, to an optax transformation.
    schedule: A schedule for all leaves, or rules (regex, schedule); None instead of a schedule freezes.
    abstract_params: The parameters or their shapes.
    clip: Limits on the gradient by `value` (each element), `norm` (of all leaves together) and `adaptive` (each unit's
      norm in proportion to its weight's, https://arxiv.org/abs/2102.06171).
    decay: Rules (regex, 0.1 or "decoupled(0.1)" or "l2(0.1)" or "l1(1e-4)"); other leaves don't decay.
    lr_multipliers: Rules (regex, factor); 1 for other leaves.
    freeze: Regexes of leaves that don't change.
    ema: Decay of an exponential moving average of the parameters, offered as the view "ema". It starts at the first
      parameters.
    ema_warmup: Let the decay be at most (1 + t) / (10 + t) at update t, so that the start is soon forgotten.
    numbers: What parameters and moments are kept in.
    seed: Of the rounding by chance.
    weight: About what the sum of the loss is divided by; see `precision.scaled`.

  Raises:
    UserError: A rule that decides nothing, a leaf without a schedule, a value out of range, decay said twice.
  """
  abstract_params = precision.cast(abstract_params, jnp.float32)
  names = paths.names(abstract_params)
  rules = schedule if isinstance(schedule, Sequence) else ((".*", schedule),)
  group_of = _groups(rules, freeze, names)
  decays = _decays(decay, names)
  multipliers = _choose(lr_multipliers, names, "config.lr_multipliers", 1.0)
  for pattern, value in lr_multipliers:
    if value < 0:
      raise UserError(f"config.lr_multipliers: {pattern!r} has {value}; a multiplier can't be negative.")
  _check_decay_is_said_once(factory, decays)

  groups, averages = {}, False
  for index in sorted(set(group_of.values())):
    rate = rules[index][1]
    optimizer, state = _built(factory, rate, abstract_params)
    if any(_find(state, optax.contrib.ScheduleFreeState)):
      averages = True
      _check_nothing_follows(optimizer, decays["decoupled"], multipliers)
    members = {name: multipliers[name] for name in names if group_of.get(name) == index}
    groups[index] = _finished(optimizer, rate, members, decays["decoupled"])
  mask = lambda among: paths.map_with_name(lambda name, _: group_of.get(name) in among, abstract_params)
  several = [_only(tx, mask({index})) for index, tx in groups.items()]
  together = optax.chain(*several) if len(several) > 1 else groups[min(groups)]
  tx = _chain(
    gradient=getattr(optimizer, "before", None),  # The same in all groups.
    clip=_clip(clip or {}),
    penalty=_penalty(decays["l2"], decays["l1"]),
    optimizer=precision.stored(together, seed) if numbers.narrow and numbers.moments != "float32" else together,
    rounding=_rounding(numbers, seed),
    ema=None if ema is None else _average(ema, ema_warmup),
  )
  if len(group_of) < len(names):
    tx = optax.chain(_only(tx, mask(groups)), optax.masked(optax.set_to_zero(), mask({None})))
  tx = precision.widened(tx) if numbers.narrow else tx
  tx = precision.scaled(tx, numbers, weight) if numbers.mode == "float16" else tx

  views = {"averaged": _averaged} if averages else {}
  views |= {} if ema is None else {"ema": _ema}
  shown = {f"/{rules[i][0]}" if len(groups) > 1 else "": rules[i][1] for i in groups}
  return Optimizer(tx, shown, views)


# Rules


def _choose(rules, names, where, default):
  """Returns the value of the first matching rule, or `default`, by name."""
  chosen = paths.first_match([pattern for pattern, _ in rules], names, where)
  return {name: default if i is None else rules[i][1] for name, i in zip(names, chosen, strict=True)}


def _groups(rules, freeze, names):
  """Returns the index of the schedule of every leaf that is trained."""
  indexed = [(pattern, i) for i, (pattern, _) in enumerate(rules)]
  index = _choose(indexed, names, "config.schedule", None)
  for name in names:
    if index[name] is None:
      raise UserError(f"config.schedule: no rule matches {name!r}; end the list with ('.*', dict(name=...)) or None.")
  frozen = _choose([(pattern, True) for pattern in freeze], names, "config.freeze", False)
  groups = {name: index[name] for name in names if not frozen[name] and rules[index[name]][1] is not None}
  if not groups:
    raise UserError("config.freeze and config.schedule leave nothing to train; free some parameters.")
  return groups


def _decays(rules, names):
  """Returns for each kind of decay its strengths by name, without those that are 0."""
  parsed = [(pattern, _parse_decay(value, f"config.decay[{i}]")) for i, (pattern, value) in enumerate(rules)]
  chosen = _choose(parsed, names, "config.decay", ("decoupled", 0.0))
  return {kind: {n: s for n, (k, s) in chosen.items() if k == kind and s} for kind in ("decoupled", "l2", "l1")}


def _parse_decay(value, where):
  call = re.fullmatch(r"(decoupled|l2|l1)\(\s*(\S+?)\s*\)", str(value).strip())
  kind, number = (call[1], call[2]) if call else ("decoupled", value)
  try:
    strength = float(number)
  except ValueError:
    strength = -1.0
  if not 0 <= strength < float("inf"):
    raise UserError(f"{where}: {value!r} must be a number, 'decoupled(0.1)', 'l2(1e-4)' or 'l1(1e-5)', not negative.")
  return kind, strength


def _check_decay_is_said_once(factory, decays):
  """An optimizer's own decay, often not 0 by default, would come on top of the config's rules."""
  if not any(decays.values()):
    return
  bound = getattr(factory, "kwargs", {})
  for name, parameter in inspect.signature(getattr(factory, "factory", factory)).parameters.items():
    value = bound.get(name, parameter.default)
    if re.fullmatch(r".*weight_decay(_rate)?", name) and value is not parameter.empty and value:
      said = "is set" if name in bound else "is the default"
      raise UserError(
        f"config.decay: the optimizer decays every leaf itself ({name}={value!r} {said}); "
        f"set config.optimizer.{name} to 0 and say it in config.decay only, or remove config.decay."
      )


def _check_nothing_follows(optimizer, decoupled, multipliers):
  if getattr(optimizer, "after", None) is None and (decoupled or set(multipliers.values()) != {1.0}):
    raise UserError(
      "config.optimizer: optax's own schedule-free optimizers leave no room for config.decay or "
      "config.lr_multipliers; use dict(name='schedule_free', base='adamw' or 'sgd')."
    )


# Stages


def _built(factory, schedule, abstract_params):
  """Returns the optimizer and its abstract state for a few leaves: a trial whether we have what its update asks for."""
  few = paths.names(abstract_params)[:2]
  mask = paths.map_with_name(lambda name, _: name in few, abstract_params)

  def trial(params):
    tx = _only(optimizer, mask)
    return tx.update(params, tx.init(params), params, value=jnp.float32(0), grad_fn=lambda params, _: params)[1]

  try:
    optimizer = factory(schedule)
    return optimizer, jax.eval_shape(trial, abstract_params)
  except UserError:
    raise
  except (TypeError, ValueError) as e:
    raise UserError(
      f"config.optimizer can't be used here: {str(e).rstrip('.')}. It gets a schedule as its learning_rate, and in "
      "each update the gradient, the parameters, `value` and `grad_fn`; choose another."
    ) from e


def _chain(**stages):
  """The stages that there are, their states by name."""
  return optax.named_chain(*((name, tx) for name, tx in stages.items() if tx is not None))


def _only(tx, mask):
  """Restricts `tx` to the leaves where `mask` is true, `grad_fn` included; the others pass through."""
  inner = optax.masked(tx, mask)
  select = lambda tree: jax.tree.map(lambda m, x: x if m else optax.MaskedNode(), mask, tree)

  def update(updates, state, params=None, *, grad_fn=None, **extra):
    def masked_grad_fn(part, *index):
      whole = jax.tree.map(lambda m, new, old: new if m else old, mask, part, params)
      return select(grad_fn(whole, *index))

    extra |= {} if grad_fn is None else {"grad_fn": masked_grad_fn}
    return inner.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _clip(limits):
  makers = {"value": optax.clip, "norm": optax.clip_by_global_norm, "adaptive": optax.adaptive_grad_clip}
  for name, limit in limits.items():
    if name not in makers:
      raise UserError(f"config.clip.{name} is not a way to clip.{suggest(name, makers)}")
    if limit is not None and limit <= 0:
      raise UserError(f"config.clip.{name}: {limit!r} must be positive.")
  used = [make(limits[name]) for name, make in makers.items() if limits.get(name) is not None]
  return optax.chain(*used) if used else None


def _penalty(l2, l1):
  """Adds the gradient of the L2 and L1 penalties."""
  if not l2 and not l1:
    return None

  def add(name, update, param):
    update = update + l2[name] * param if name in l2 else update
    return update + l1[name] * jnp.sign(param) if name in l1 else update

  return optax.stateless(lambda updates, params: paths.map_with_name(add, updates, params))


def _finished(optimizer, schedule, multipliers, strengths):
  """The optimizer of one learning rate with all that follows it."""
  strengths = {name: strengths[name] for name in multipliers if name in strengths}
  plain = not strengths and set(multipliers.values()) == {1.0}
  return _chain(
    base=getattr(optimizer, "base", optimizer),
    decay=None if plain else _decay(schedule, multipliers, strengths),
    plateau=getattr(schedule, "transform", None),
    average=getattr(optimizer, "after", None),
  )


def _decay(schedule, multipliers, strengths):
  """Subtracts rate * strength * param, then multiplies."""

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)) if strengths else optax.EmptyState()

  def update(updates, state, params=None):
    rate = schedule(state.count) if strengths else 0.0

    def finish(name, update, param):
      update = update - rate * strengths[name] * param if name in strengths else update
      return update if multipliers[name] == 1 else multipliers[name] * update

    state = optax.ScaleByScheduleState(optax.safe_increment(state.count)) if strengths else state
    return paths.map_with_name(finish, updates, params), state

  return optax.GradientTransformation(init, update)


def _rounding(numbers, seed):
  """The stage after which parameter + update is of the type that parameters are kept in."""
  if not numbers.narrow:
    return None
  return precision.kahan() if numbers.mode == "bfloat16_kahan" else precision.stochastic(seed)


class EmaState(NamedTuple):
  """The moving average, under the parameters' own paths."""

  count: jax.Array  # Updates so far, int32.
  params: PyTree


def _average(decay, warmup):
  """Keeps the moving average of the parameters after the update."""
  if not 0 <= decay < 1:
    raise UserError(f"config.ema: {decay!r} must be a decay from 0 to below 1, such as 0.999.")

  def init(params):
    # A copy, since the step gives away the memory of both.
    return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

  def update(updates, state, params=None):
    t = state.count.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t)) if warmup else decay
    average = optax.incremental_update(optax.apply_updates(params, updates), state.params, 1 - keep)
    return updates, EmaState(optax.safe_increment(state.count), average)

  return optax.GradientTransformation(init, update)


# Views


def _find(tree, kind) -> Iterator[Any]:
  """The states of a kind, in the order of the leaves."""
  is_kind = lambda x: isinstance(x, kind)
  return filter(is_kind, jax.tree.leaves(tree, is_leaf=is_kind))


def _where_kept(fn, params, kept):
  """Applies `fn(param, kept)` where something is kept; other parameters stay."""
  return jax.tree.map(lambda p, k: p if isinstance(k, optax.MaskedNode) else fn(p, k), params, kept)


def _ema(opt_state, params):
  """The moving average; frozen parameters as they are."""
  return _where_kept(lambda p, average: average, params, next(_find(opt_state, EmaState)).params)


def _averaged(opt_state, params):
  """Schedule-free's average x, from y = (1 - b1) z + b1 x."""
  params = precision.cast(params, jnp.float32)
  for state in precision.cast(list(_find(opt_state, optax.contrib.ScheduleFreeState)), jnp.float32):
    params = _where_kept(lambda y, z, b1=state.b1: (y - (1 - b1) * z) / b1, params, state.z)
  return params
