"""The parity matrix: every model on every mesh against one device, with what differed.

Command   python scripts/parity.py [--models=gpt,vit] [--meshes=FSDP8,TP4] [--variants=scan]

Each cell trains a small model for 20 steps on 8 fake CPU devices in float32 and compares with the same model on one
device: losses (within 2e-5 of their size), the gradient of the first step (within 1e-4 of its norm, leaf by leaf), and
the last state after it was saved and read onto one device, which must be the same to the bit. A cell that can't be
says why. Tokens have weights that differ from place to place, so that a mean of means doesn't pass for a mean. The last
table has the largest differences of each mesh and model.
"""

import argparse
import dataclasses
import math
import sys
import tempfile

import jax
import numpy as np

from bigjax import config as configs
from bigjax import experiment, paths, sharding, train
from bigjax import main as entrypoint
from bigjax.checkpoint import Checkpoints
from bigjax.data import order, synthetic
from bigjax.errors import UserError

STEPS = 20
LOSSES, GRADIENTS = 2e-5, 1e-4  # Relative tolerances.

BATCH = 16
TRANSFORMER = dict(width=32, depth=4, heads=4)
MODELS = {
  "mlp": dict(name="mlp", in_features=192, widths=(64, 64), num_outputs=8),
  "resnet": dict(name="resnet", stages=(1, 2), width=8, num_classes=8, stem="small", bottleneck=False),
  "vit": dict(name="vit", image_size=8, patch_size=2, num_classes=8, head="gap", mlp_dim=64, **TRANSFORMER),
  "gpt": dict(name="gpt", vocab_size=64, context=16, **TRANSFORMER),
  "moe": dict(
    name="decoder",
    vocab_size=64,
    context=16,
    kv_heads=4,
    mlp_dim=64,
    **TRANSFORMER,
    experts=8,
    top_k=2,
    shared_experts=1,
    balance_loss=1e-2,
    router_z_loss=1e-3,
    bias_rate=1e-3,
  ),
}
MESHES = {
  "1": dict(mesh=(("data", 1),)),
  "DP8": dict(mesh=(("data", 8),), sharding="replicated"),
  "FSDP8": dict(mesh=(("data", 8),), sharding="fsdp"),
  "HSDP2x4": dict(mesh=(("replica", 2), ("data", 4)), sharding="hsdp"),
  "TP4": dict(mesh=(("tensor", 4),), sharding="tensor"),
  "FSDP2xTP4": dict(mesh=(("data", 2), ("tensor", 4)), sharding="fsdp+tensor"),
  "CP4": dict(mesh=(("seq", 4),), sharding="replicated"),
  "CP4u": dict(mesh=(("seq", 4),), sharding="replicated", sequence="ulysses"),
  "FSDP2xCP4": dict(mesh=(("data", 2), ("seq", 4)), sharding="fsdp"),
  "EP4": dict(mesh=(("expert", 4),), sharding="expert"),
  "FSDP2xEP4": dict(mesh=(("data", 2), ("expert", 4)), sharding="fsdp+expert"),
  "PP4": dict(mesh=(("pipe", 4),), sharding="pipe"),
  "PP2r2": dict(mesh=(("pipe", 2),), sharding="pipe", pipeline=dict(repeats=2, microbatches=4)),
  "PP2xFSDP2xTP2": dict(mesh=(("data", 2), ("pipe", 2), ("tensor", 2)), sharding="pipe+fsdp+tensor"),
  "ACC2": dict(mesh=(("data", 1),), accumulate=2),
  "ACC4xFSDP4": dict(mesh=(("data", 4),), sharding="fsdp", accumulate=4),
}
VARIANTS = {"": {}, "scan": dict(scan=True), "scan+remat": dict(scan=True, remat="full")}
SEQUENCES = ("vit", "gpt", "moe")


def why_not(model: str, mesh: str, variant: str) -> str | None:
  """Returns why a cell can't be, or None."""
  if mesh.startswith(("CP", "FSDP2xCP")) and model not in SEQUENCES:
    return "no sequence to split"
  if "EP" in mesh and model != "moe":
    return "no experts"
  if mesh.startswith("PP") and model not in SEQUENCES:
    return "layers without a pipeline: they differ, or keep batch statistics"
  if mesh.startswith("PP") and not variant:
    return "a pipeline needs scan"
  if mesh.startswith("ACC") and model == "resnet":
    return "batch statistics are those of the part, as in every framework"
  return None


@dataclasses.dataclass(frozen=True)
class WeightedTokens:
  """Synthetic tokens of which a third, other ones in each example, are not to be predicted."""

  tokens: synthetic.Synthetic

  def __len__(self) -> int:
    return len(self.tokens)

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    keys = order.example_keys(7, np.zeros_like(ids), ids)
    share = order.uniform(keys, 0, 1)  # Some examples have many, some few.
    return self.tokens.fetch(ids) | {"token_mask": (order.uniform(keys, 1, 17) > share * 0.7).astype(np.float32)}


def weighted_tokens() -> WeightedTokens:
  """A source for the language models of the matrix."""
  return WeightedTokens(synthetic.make("tokens", num_examples=256, vocab_size=64, length=16))


def config_of(model: str, mesh: str, variant: str) -> dict:
  """Returns the config of a cell."""
  if model in ("gpt", "moe"):
    source, task = dict(name=f"{__name__}.weighted_tokens"), dict(name="language_modeling")
  else:
    source = dict(name="synthetic", num_examples=256, shape=(8, 8, 3), num_classes=8)
    task = dict(name="classification")
  return dict(
    total_steps=STEPS,
    batch_size=BATCH,
    data=dict(source=source),
    model=MODELS[model] | VARIANTS[variant],
    task=task,
    optimizer=dict(name="sgd", momentum=0.9),  # Whose memory after a step is the gradient.
    schedule=dict(name="constant", peak=0.01),
    **MESHES[mesh],
  )


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a cell came to."""

  run: experiment.Experiment
  losses: np.ndarray
  gradient: dict[str, np.ndarray]  # Of the first step, by leaf.
  state: object


def run_cell(model: str, mesh: str, variant: str = "") -> Trained:
  """Trains a cell on the first devices there are."""
  config = configs.resolve(config_of(model, mesh, variant), experiment.TrainConfig)
  devices = jax.devices()[: math.prod(size for _, size in config.mesh)]
  run = experiment.build(config, devices)
  with jax.set_mesh(run.mesh), train.train_batches(run, 0) as batches:
    state, step = run.init(jax.random.key(0)), train.compile_step(run)
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    losses, gradient = [], {}
    for i in range(STEPS):
      state, measured = step(state, next(batches), key)
      losses.append(measured["loss"])
      if i == 0:
        named = zip(paths.names(state.opt_state), jax.tree.leaves(state.opt_state), strict=True)
        gradient = {n.partition("trace/")[2]: np.asarray(x) for n, x in named if "trace/" in n}
  return Trained(run, np.array([float(x) for x in losses]), gradient, state)


def unstacked(leaves: dict[str, np.ndarray], run: experiment.Experiment) -> dict[str, np.ndarray]:
  """Returns leaves by the names that they have in a model without scan."""
  found, groups = {}, 1 + (run.layout.repeats > 1)
  for name, value in leaves.items():
    if "blocks/" in name and not name.partition("blocks/")[2][0].isdigit():
      for i, layer in enumerate(value.reshape(-1, *value.shape[groups:])):
        found[name.replace("blocks/", f"blocks/{i}/")] = layer
    else:
      found[name] = value
  return found


def differences(cell: Trained, reference: Trained) -> tuple[float, float]:
  """Returns the largest relative difference of a loss, and of a leaf's gradient by its norm."""
  loss = np.abs(cell.losses / reference.losses - 1).max()
  here, there = unstacked(cell.gradient, cell.run), unstacked(reference.gradient, reference.run)
  assert here.keys() == there.keys(), here.keys() ^ there.keys()
  # A leaf whose gradient is zero but for rounding, such as a bias before a norm, is held to the size of the others.
  floor = 1e-3 * np.sqrt(sum(np.square(g).sum() for g in there.values()) / len(there))
  return loss, max(np.linalg.norm(here[n] - g) / max(np.linalg.norm(g), floor) for n, g in there.items())


def moved(cell: Trained) -> bool:
  """Returns whether the state is the same to the bit after it was saved and read onto one device."""
  config = dataclasses.replace(
    cell.run.config, mesh=(("data", 1),), sharding="replicated", pipeline=experiment.PipelineConfig()
  )
  there = experiment.build(config, jax.devices()[-1:])
  with tempfile.TemporaryDirectory() as folder:
    with Checkpoints(folder) as checkpoints:
      checkpoints.save(STEPS, cell.state, {})
    with Checkpoints(folder, read_only=True) as checkpoints:
      state, _ = checkpoints.restore(there.abstract, there.shardings)
  same = lambda a, b: np.array_equal(np.asarray(a).ravel(), np.asarray(b).ravel())
  return all(map(same, jax.tree.leaves(cell.state), jax.tree.leaves(state)))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", default=",".join(MODELS))
  parser.add_argument("--meshes", default=",".join(MESHES))
  parser.add_argument("--variants", default=",".join(VARIANTS))
  args = parser.parse_args()
  entrypoint.quiet()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  failed, reasons, found = 0, set(), {}
  print("| model | mesh | variant | loss | gradient | read on one device |\n| --- | --- | --- | --- | --- | --- |")
  for model in args.models.split(","):
    reference = run_cell(model, "1")
    for variant in args.variants.split(","):
      for mesh in args.meshes.split(","):
        row = f"| {model} | {mesh} | {variant or '-'} |"
        if reason := why_not(model, mesh, variant):
          reasons.add(f"{model}, {mesh}{', ' + variant if variant else ''}: {reason}")
          continue
        if (mesh, variant) == ("1", ""):
          continue
        try:
          cell = run_cell(model, mesh, variant)
          loss, gradient = differences(cell, reference)
          same = moved(cell)
        except UserError as e:
          print(f"{row} {e} |")
          failed += 1
          continue
        good = loss <= LOSSES and gradient <= GRADIENTS and same
        failed += not good
        found.setdefault((mesh, model), []).append((loss, gradient, same))
        print(
          f"{row} {loss:.1e} | {gradient:.1e} | {'same' if same else 'DIFFERS'} |{'' if good else ' FAILED'}",
          flush=True,
        )
  print("\nNot there:\n" + "\n".join(f"- {r}" for r in sorted(reasons)))
  print("\n" + "\n".join(summary(found)))
  return 1 if failed else 0


def summary(found):
  """Lines of a table: for each mesh and model the largest loss / gradient difference, and of how many cells."""
  models = sorted({model for _, model in found}, key=list(MODELS).index)
  yield f"| mesh | {' | '.join(models)} |\n|{' --- |' * (1 + len(models))}"
  for mesh in sorted({mesh for mesh, _ in found}, key=list(MESHES).index):
    row = []
    for model in models:
      cells = found.get((mesh, model), [])
      losses, gradients, same = zip(*cells, strict=True) if cells else ((), (), ())
      differs = "" if all(same) else " DIFFERS after moving"
      row.append(f"{max(losses):.1e} / {max(gradients):.1e} ({len(cells)}){differs}" if cells else "-")
    yield f"| {mesh} | {' | '.join(row)} |"


if __name__ == "__main__":
  sys.exit(main())
