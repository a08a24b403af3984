"""The model that published weights are of, with its state on one device or over a mesh; for what trains nothing."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
from flax import nnx

from bigjax import sharding
from bigjax import state as states
from bigjax.data import tokenizers
from bigjax.errors import UserError
from bigjax.weights import configs, gguf, huggingface


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
  """Where weights go."""

  mesh: tuple[tuple[str, int], ...] | None = None  # As `config.mesh`; None is one device.
  sharding: str | tuple[tuple[str, str], ...] = "auto"  # As `config.sharding`.


@dataclasses.dataclass(frozen=True)
class Published:
  """Weights in files and what they are for; made by `open_model`."""

  weights: huggingface.Weights
  layout: sharding.Layout
  rules: Any

  @functools.cached_property
  def model(self) -> states.Model:
    make = configs.MODELS[self.weights.family.model].make
    return states.Model(lambda rngs: make(**self.weights.arguments, rngs=rngs))

  @functools.cached_property
  def options(self) -> Any:
    """Those of the module."""
    return nnx.eval_shape(lambda: self.model.build(rngs=nnx.Rngs(0))).options

  @functools.cached_property
  def abstract(self) -> tuple[Any, Any]:
    """The shapes of (params, extras), with their layouts on the mesh if there is one."""
    with sharding.use(self.layout):
      found = self.model.abstract
    if self.layout.mesh is None:
      return found
    file = configs.MODELS[self.weights.family.model]
    roles = {axis: getattr(file, axis.upper()) for axis in ("tensor", "expert") if hasattr(file, axis.upper())}
    state = states.TrainState((), *found, ())
    laid_out = sharding.shard_tree(state, self.rules, self.layout.mesh, roles=roles)
    at = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(at, found, (laid_out.params, laid_out.extras))

  def read(self) -> tuple[Any, Any]:
    """Returns (params, extras) as the files have them."""
    return huggingface.load(self.weights, self.options, *self.abstract)[:2]

  def tokenizer(self) -> tokenizers.Tokenizer:
    """Returns the tokenizer that came with them."""
    path = self.weights.path
    if path.endswith(".gguf") and (said := gguf.tokenizer_files(self.weights.config)):
      return tokenizers.hugging_face(said["tokenizer.json"], said["tokenizer_config.json"])
    try:
      return tokenizers.load(path if os.path.isdir(path) else os.path.dirname(path) or ".")
    except UserError as e:
      raise UserError(f"{e} Name one with --tokenizer.") from e


def open_model(path: str, placement: Placement = Placement()) -> Published:
  """Opens weights, see `open_weights`; reads headers only.

  Raises:
    UserError: They can't be read, or the devices are none that such a mesh can be made of.
  """
  weights = huggingface.open_weights(path)
  mesh = None if placement.mesh is None else sharding.make_mesh(placement.mesh)
  return Published(weights, sharding.Layout(mesh=mesh), placement.sharding)
