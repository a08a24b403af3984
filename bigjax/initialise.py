"""Starting from another run's parameters and batch statistics, or from published weights, with a line for every leaf.

The rules rename, and are read from the new model's side, so that nothing is left over in silence: each leaf here either
names where it comes from, or is said to stay fresh.
"""

from __future__ import annotations

import re

import jax
import numpy as np
from flax import nnx

from bigjax import changes, paths, weights
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError, suggest


def first_state(run, key: jax.Array):
  """Returns the state before the first step, as `config.init_from` says, or fresh."""
  init = run.config.init_from
  if init is not None and init.whole:
    return _whole(run, init, key)
  return from_config(run, run.init(key)) if init is None or init.weights is None else _published(run, init, key)


def _whole(run, init, key):
  """All of another run's state, to go on with."""
  if run.config.lora is not None:
    raise UserError("config.init_from.whole: adapters start with their first step; take the parameters only.")
  allowed = changes.Changes(rules=init.rules, drop=init.drop, resize=init.resize, cast=init.cast)
  with Checkpoints(init.workdir, read_only=True, where="config.init_from.workdir") as checkpoints:
    step = checkpoints.newest() if init.step is None else init.step
    if step is None:
      raise UserError(f"config.init_from.workdir={init.workdir} has no checkpoint yet.")
    checkpoints.verify(step)
    fresh = lambda: run.init(key)
    state, report = changes.take(checkpoints, step, run.abstract, run.shardings, allowed, fresh)
  if jax.process_index() == 0:
    print("\n".join([f"init_from {init.workdir}: going on from step {step}", *(f"  {r}" for r in report)]))
  return state


def _published(run, init, key):
  """The state with published weights; nothing is made that they take the place of."""
  opened = weights.open_weights(init.weights)
  shapes, layouts = ((_flat(t.params) | _flat(t.extras)) for t in (run.abstract, run.shardings))
  names = list(shapes)
  chosen = paths.first_match([r[0] for r in init.rules], names, "config.init_from.rules")
  if None in chosen:
    first = names[chosen.index(None)]
    raise UserError(f"config.init_from.rules: no rule matches {first!r}; add ('.*', None) to leave the rest fresh.")
  here = {n: jax.ShapeDtypeStruct(shapes[n].shape, shapes[n].dtype, sharding=layouts[n]) for n in names}
  rules = {n: init.rules[index] for n, index in zip(names, chosen, strict=True)}
  there = {n: re.fullmatch(regex, n).expand(template) for n, (regex, template) in rules.items() if template is not None}
  options = getattr(nnx.eval_shape(lambda: run.config.model(rngs=nnx.Rngs(0))), "options", None)
  fresh = [n for n in names if n not in there]
  wanted = {there[n]: here[n] for n in names if n in there}
  arrays, report = weights.load_leaves(opened, options, wanted, changed=init.changed, partial=bool(fresh))
  leaves = {n: arrays[there[n]] for n in there}
  if fresh:
    state = run.init(key)
    leaves |= {n: x for n, x in (_flat(state.params) | _flat(state.extras)).items() if n in fresh}
    del state
  params, extras = (
    jax.tree.unflatten(jax.tree.structure(t), [leaves[n] for n in paths.names(t)])
    for t in (run.abstract.params, run.abstract.extras)
  )
  if jax.process_index() == 0:
    report = [f"{n}: fresh" for n in fresh] + report
    taken = f"init_from {init.weights} ({opened.family.architecture}): {len(there)} of {len(names)} leaves taken"
    print("\n".join([taken, *(f"  {r}" for r in report)]))
  opt_state = jax.jit(run.optimizer.tx.init, out_shardings=run.shardings.opt_state)(params)
  step = jax.device_put(np.zeros((), np.int32), run.shardings.step)
  return type(run.abstract)(step, params, extras, opt_state)


def from_config(run, state):
  """Returns `state` with leaves taken as `config.init_from` says; the same state where it says nothing.

  Batch statistics are leaves as parameters are: a model that brought one without the other would see noise.
  """
  init = run.config.init_from
  if init is None:
    return state
  with Checkpoints(init.workdir, read_only=True, where="config.init_from.workdir") as checkpoints:
    found = checkpoints.read(init.step, only=("params/", "extras/"))
  source = {n.partition("/")[2]: v for n, v in found.items()}
  leaves, report = take(_flat(state.params) | _flat(state.extras), source, init.rules)
  params, extras = (
    jax.tree.unflatten(jax.tree.structure(t), [leaves[n] for n in paths.names(t)]) for t in (state.params, state.extras)
  )
  if jax.process_index() == 0:
    taken = sum("<-" in line for line in report)
    print("\n".join([f"init_from {init.workdir}: {taken} of {len(report)} leaves taken", *(f"  {r}" for r in report)]))
  # Laid out as the step wants it, which would compile a second time otherwise.
  opt_state = jax.jit(run.optimizer.tx.init, out_shardings=run.shardings.opt_state)(params)
  return type(state)(state.step, params, extras, opt_state)


def _flat(tree):
  return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


def take(params, source: dict[str, np.ndarray], rules, where: str = "config.init_from.rules"):
  """Returns (leaves, report): those of `params` replaced by those of `source` that the rules name.

  Args:
    params: The fresh ones; shapes, types and shardings stay theirs.
    source: Leaves of the other run by name.
    rules: `(regex of a leaf here, template of its name there or None)`, first match; `\\g<0>` is the same name.
    where: The config path of the rules, for messages.

  Raises:
    UserError: A leaf without rule, a name that is not there, a shape that differs, or a rule that matches nothing.
  """
  names = paths.names(params)
  chosen = paths.first_match([r[0] for r in rules], names, where)
  leaves, report, wrong = [], [], []
  for name, index, leaf in zip(names, chosen, jax.tree.leaves(params), strict=True):
    template = None if index is None else rules[index][1]
    if index is None:
      wrong.append(f"{name}: no rule matches; add ('.*', None) to leave the rest fresh.")
    elif template is None:
      report.append(f"{name}: fresh")
    else:
      there = re.fullmatch(rules[index][0], name).expand(template)
      if there not in source:
        wrong.append(f"{name}: there is no {there!r} in the other run.{suggest(there, source)}")
      elif source[there].shape != leaf.shape:
        wrong.append(
          f"{name} {leaf.shape}: {there!r} has shape {source[there].shape}; give it a rule with None to leave it fresh."
        )
      else:
        report.append(f"{name} <- {there}")
        leaf = jax.device_put(np.asarray(source[there], leaf.dtype), leaf.sharding)
    leaves.append(leaf)
  if wrong:
    raise UserError(f"{where}:\n" + "\n".join(f"  {w}" for w in wrong[:20]))
  return jax.tree.unflatten(jax.tree.structure(params), leaves), report
