"""What is refused of a config that can be read but can't work, before any device does."""

from __future__ import annotations

import jax

from bigjax import sharding
from bigjax.errors import UserError


def sizes(config, mesh: jax.sharding.Mesh) -> None:
  """Raises `UserError` unless sizes are positive and each batch can be split over the mesh and into its parts."""
  positive = {"batch_size": config.batch_size, "accumulate": config.accumulate, "keep.last": config.keep.last}
  positive |= {"early_stop.patience": config.early_stop.patience} if config.early_stop else {}
  positive |= {f"evals.{n}.batch_size": e.batch_size for n, e in config.evals.items()}
  for name, size in positive.items():
    if size is not None and size < 1:
      raise UserError(f"config.{name} must be positive, not {size}.")
  ways = sharding.batch_ways(mesh)
  sharding.data_part(mesh)  # Refuses processes with unequal shares.
  batches = {"config.batch_size": (config.batch_size, ways * config.accumulate)}
  for n, e in config.evals.items():
    batches[f"config.evals.{n}.batch_size"] = (e.batch_size or config.batch_size, ways)
  for where, (size, parts) in batches.items():
    if size % parts:
      near = max(parts, size // parts * parts)
      raise UserError(
        f"{where}: {size} examples can't be split evenly over {ways} data-parallel devices"
        + (f" times accumulate={config.accumulate}" if parts != ways else "")
        + f"; use a multiple of {parts}, such as {near} or {near + parts}."
      )


def claim(config) -> None:
  """Raises `UserError` for a claim of nothing, or of a metric that the config doesn't measure."""
  made = config.claim
  if made is None:
    return
  if (made.at_least is None) == (made.at_most is None):
    raise UserError("config.claim needs one of at_least and at_most.")
  if "/" in made.metric and made.metric.split("/")[0] not in config.evals:
    known = ", ".join(config.evals) or "none"
    raise UserError(f"config.claim.metric: {made.metric!r} is no metric of config.evals ({known}).")


def trace(model, task, params, extras, batch):
  """Returns the shapes of what a prediction gives; raises `UserError` where model and task can't take the batch.

  Loss and prediction are traced on shapes alone.
  """

  def loss_and_outputs(params, extras, batch, key):
    module = model.bind(params, extras)
    task.loss(module, batch, key=key)
    return task.predict(model.bind(params, extras), batch)

  try:
    return jax.eval_shape(loss_and_outputs, params, extras, batch, jax.eval_shape(lambda: jax.random.key(0)))
  except UserError as e:
    raise UserError(model.build.located(str(e)) if str(e).startswith("model.") else str(e)) from e
  except KeyError as e:
    has = ", ".join(map(repr, batch))
    raise UserError(f"config.task wants {e} in a batch, which has {has}; name or rename it in data.preprocess.") from e
  except (TypeError, ValueError, AttributeError, IndexError, AssertionError) as e:
    shapes = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in batch.items())
    frame = _last_frame(e)
    raise UserError(f"config.model and config.task can't take a batch of {shapes}: {e} ({frame})") from e


def _last_frame(error):
  """The last line of the model's or the task's own code that an error went through."""
  trace, found = error.__traceback__, ""
  while trace is not None:
    code = trace.tb_frame.f_code
    if "site-packages" not in code.co_filename:
      found = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}"
    trace = trace.tb_next
  return found
