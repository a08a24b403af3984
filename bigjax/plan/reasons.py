"""Which of a step's collectives were meant, and which the compiler had to put in because two layouts don't meet.

The mesh, the rules of the state and the words of activations say what has to be sent: a gradient summed over what the
batch is split over, a parameter gathered over what it is split over, and so on. `judge` holds a collective against
that. One that nothing explains is not wrong, the result is the same, but somebody should look at the line it names.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bigjax import paths, sharding
from bigjax.plan import hlo
from bigjax.plan.collectives import Collective

SMALL = 1024  # Bytes of an array that nobody need explain.
# Optimizers that work on whole matrices, so that their update gathers what is split.
WHOLE_MATRICES = ("muon", "shampoo", "soap")

GATHERS = ("all-gather", "collective-broadcast")
SUMS = ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether a collective was meant, and the reason or the suspicion."""

  expected: bool
  why: str


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of the state."""

  shape: tuple[int, ...]
  axes: frozenset[str]  # Of the mesh, over which it is split.
  part: tuple[int, ...]  # Its shape on one device.


@dataclasses.dataclass(frozen=True)
class Intent:
  """What a run means to send; made by `of`."""

  layout: sharding.Layout
  leaves: Mapping[str, Leaf]  # Of the whole state, by path.
  vocab: int | None  # The last dimension of the logits.
  optimizer: str
  summed: int | None = None  # Elements of the largest partial product, which is as large as what goes between layers.

  @classmethod
  def of(cls, run: Any) -> Intent:
    """Returns what an experiment of `bigjax.experiment.build` means to send."""
    leaves = {}
    arrays, layouts = jax.tree.leaves(run.abstract), jax.tree.leaves(run.shardings)
    for name, leaf, layout in zip(paths.names(run.abstract), arrays, layouts, strict=True):
      split = [a for entry in layout.spec for a in ((entry,) if isinstance(entry, str) else entry or ())]
      axes = frozenset(a for a in split if run.mesh.shape[a] > 1)
      leaves[name] = Leaf(tuple(leaf.shape), axes, tuple(layout.shard_shape(leaf.shape)))
    logits = run.outputs.get("logits") if hasattr(run.outputs, "get") else None
    vocab = logits.shape[-1] if logits is not None and logits.ndim else None
    return cls(run.layout, leaves, vocab, run.config.optimizer.name)

  def axes(self, *words: str) -> frozenset[str]:
    return frozenset(a for word in words for a in self.layout.axes(word))

  def alike(self, array: hlo.Array, kind: str = "params/") -> list[Leaf]:
    """The leaves that an array may be, or be the gradient of: a layer of it, a part, transposed, or by head."""
    return [leaf for name, leaf in self.leaves.items() if name.startswith(kind) and _may_be(array.dims, leaf.shape)]


def judge_all(collectives: Sequence[Collective], intent: Intent) -> list[Verdict]:
  """Returns a verdict on each collective of a program."""
  sums = [c for c in collectives if c.kind in SUMS and c.phase == "forward" and c.axes]
  sums = [c for c in sums if frozenset(c.axes) <= _model(intent)]
  sizes = [a.count * (c.parts if c.kind == "reduce-scatter" else 1) for c in sums for a in c.arrays]
  largest = max(sizes, default=0) * intent.layout.microbatches  # Outside of a pipeline a batch is whole.
  intent = dataclasses.replace(intent, summed=largest)
  return [judge(c, intent) for c in collectives]


def judge(collective: Collective, intent: Intent) -> Verdict:
  """Returns whether `intent` explains the collective, and how, or what is suspicious."""
  rules = (
    _small,
    _columns,
    _of_the_state,
    _gradients,
    _update,
    _statistics,
    _stages,
    _sequence,
    _experts,
    _tensor,
    _windows,
  )
  verdicts = (rule(collective, frozenset(collective.axes), intent) for rule in rules)
  if found := next((v for v in verdicts if v is not None), None):
    return found
  if "shard_map" in collective.op_name:
    return Verdict(True, "asked for by the shard_map of that line")
  return _unexplained(collective, frozenset(collective.axes), intent)


def _small(c, over, intent):
  if all(a.bytes <= SMALL for a in c.arrays):
    return Verdict(True, "sums, norms and other arrays of at most 1 KiB")
  return None


def _columns(c, over, intent):
  """A table whose columns are split: each device looks its own up for the tokens of all."""
  tables = (leaf for name, leaf in intent.leaves.items() if name.startswith("params/") and name.endswith("embedding"))
  if "_take" not in c.op_name or not any(t.axes & over and t.part[-1] < t.shape[-1] for t in tables):
    return None
  if c.kind == "all-to-all":
    return Verdict(True, "columns of a table for the tokens of all, exchanged for rows of one's own")
  if c.kind in ("all-reduce", "all-gather") and all(a.dtype in ("s32", "u32") or intent.alike(a) for a in c.arrays):
    return Verdict(True, "the tokens of all, for whom keeps some columns of a table")
  return None


def _of_the_state(c, over, intent):
  """A gather of what the step was given."""
  name = hlo.leaf(c.origin)
  large = [a for a in c.arrays if a.bytes > SMALL]
  if c.kind in SUMS and c.phase in ("forward", "recompute") and not over & _model(intent):
    if any(f.function.endswith("_Groups.sum") for f in c.stack):
      return Verdict(True, "gradients of the head, summed over the batch after the last part of the logits")
    zeros = c.kind == "all-reduce" and all(
      any(_gathered(a, leaf, over, intent, False) for leaf in intent.alike(a)) for a in large
    )
    if zeros:
      return Verdict(True, "parameters, gathered for use (FSDP), by adding zeros, as the compiler does with small ones")
  if c.kind != "all-gather":
    return None
  leaf = intent.leaves.get(name)
  if leaf is None and c.origin.startswith("batch["):
    if over <= intent.axes("seq"):
      return Verdict(True, "the tokens, before they are split")
    return Verdict(False, f"gathers {c.origin}: every device reads examples of the others")
  if leaf is None:
    rows = re.search(r"_take|gather|dynamic_slice", c.op_name) is not None  # Of a table, looked up and then gathered.
    whole = all(any(_gathered(a, leaf, over, intent, rows) for leaf in intent.alike(a)) for a in large)
    return (
      Verdict(True, "parameters, gathered for use (FSDP)")
      if whole and c.phase != "update" and not over & _model(intent)
      else None
    )
  if not over <= leaf.axes:
    return Verdict(False, f"gathers {name} over {_words(over - leaf.axes)}, over which it is not split")
  if over & intent.axes("stage"):
    return Verdict(False, f"gathers {name} over the stages: each holds all layers")
  if over & intent.axes("experts") and re.search(r"(^|/)experts/", name):
    return Verdict(False, f"gathers the experts of {name}: tokens should go to them instead")
  if over & _model(intent):
    return Verdict(False, f"{name} is split over {_words(over & _model(intent))}, but its product wants it whole")
  if c.slow:
    return Verdict(False, f"gathers {name} across slices for every use; hsdp keeps that within a slice")
  return Verdict(True, "parameters, gathered for use (FSDP)")


def _gradients(c, over, intent):
  """Reductions, in the backward pass, of what is shaped like parameters."""
  if c.phase not in ("backward", "update") or c.kind not in SUMS:
    return None
  if c.slow and over <= intent.axes("batch"):  # Between slices arrays travel flat.
    return Verdict(True, "gradients, summed over the slices")
  large = [a for a in c.arrays if a.bytes > SMALL]
  if over <= intent.axes("batch", "seq") and len(large) == 1 and _flat(large[0], intent):
    return Verdict(True, "gradients, summed over the batch, many as one")
  if not all(intent.alike(a) for a in large):
    return None
  if over <= intent.axes("batch", "seq", "stage"):
    if c.kind == "all-reduce" and all(any(leaf.axes & over for leaf in intent.alike(a)) for a in large):
      return Verdict(True, "gradients, summed everywhere though each device keeps a part")
    return Verdict(True, "gradients, summed over the batch")
  if over & intent.axes("batch", "seq") and over <= intent.axes("batch", "seq", "stage") | _model(intent):
    return Verdict(True, "gradients of what all parts of a layer use")
  return None


def _update(c, over, intent):
  """Gathers in the update."""
  if c.phase != "update" or c.kind not in (*GATHERS, "all-to-all"):
    return None
  large = [a for a in c.arrays if a.bytes > SMALL]
  alike = [intent.alike(a, "") for a in large]
  if not all(alike):
    return None
  if all(any(a.count <= math.prod(leaf.part) for leaf in leaves) for a, leaves in zip(large, alike, strict=True)):
    return Verdict(True, "what the update computed in parts, back in its layout")
  if intent.optimizer.rpartition(".")[2] in WHOLE_MATRICES:
    return Verdict(True, f"{intent.optimizer} works on whole matrices")
  return Verdict(False, "the update gathers more of a leaf than its layout has on a device")


def _statistics(c, over, intent):
  """Batch normalisation."""
  large = [a for a in c.arrays if a.bytes > SMALL]
  if c.kind == "all-reduce" and over <= intent.axes("batch") and all(intent.alike(a, "extras/") for a in large):
    return Verdict(True, "statistics of the whole batch")
  return None


def _stages(c, over, intent):
  if not over or not over <= intent.axes("stage"):
    return None
  if c.kind == "collective-permute":
    return Verdict(True, "microbatches go on to the next stage")
  if c.kind in (*SUMS, *GATHERS):
    return Verdict(True, "what the last stage made, or the first needs")
  return None


def _sequence(c, over, intent):
  if not over or not over <= intent.axes("seq"):
    return None
  ring = intent.layout.sequence == "ring"
  reorders = any(re.search("balance|zigzag", f.function) for f in c.stack)
  if reorders or all(a.dtype in ("s32", "u32", "pred") for a in c.arrays):
    return Verdict(True, "a sequence, put into the order that balances causal attention, or back")
  if c.kind == "collective-permute":
    return Verdict(True, "keys and values go around the ring" if ring else "a sequence's neighbours")
  if c.kind == "all-to-all":
    if ring:
      return Verdict(False, 'sequences are exchanged for heads, but config.sequence is "ring"')
    return Verdict(True, "sequences are exchanged for heads (Ulysses)")
  return None


def _experts(c, over, intent):
  if over and over <= intent.axes("experts") and c.kind in ("all-to-all", "ragged-all-to-all"):
    return Verdict(True, "tokens go to their experts and back")
  return None


def _tensor(c, over, intent):
  if not over or not over <= _model(intent) or c.kind not in (*SUMS, *GATHERS):
    return None
  vocab = intent.vocab and over & intent.axes("vocab") and any(intent.vocab in a.dims for a in c.arrays)
  if c.kind == "all-gather" and vocab and intent.vocab >= SMALL:
    return Verdict(False, "whole logits on every device: the loss should work on parts of the vocabulary")
  if c.kind == "all-gather" and intent.summed is not None and max(a.count for a in c.arrays) > intent.summed:
    return Verdict(
      False, "gathers what a layer splits, not what goes between layers: a parameter is split the other way"
    )
  if c.kind == "all-gather":
    return Verdict(True, "activations for a product that is split over heads, hidden units or the vocabulary")
  return Verdict(True, "partial products over split heads, hidden units or vocabulary")


def _windows(c, over, intent):
  split = _model(intent) | {a for leaf in intent.leaves.values() for a in leaf.axes}
  if c.kind == "collective-permute" and re.search(r"dot_general|einsum|convolution", c.op_name) and over <= split:
    return Verdict(True, "a gather or scatter in pieces, overlapped with its product (collective matmul)")
  return None


def _unexplained(c, over, intent):
  if c.kind in ("collective-permute", "all-to-all", "ragged-all-to-all"):
    return Verdict(False, "an activation changes its layout: two constraints don't meet, or one is missing")
  if c.kind in GATHERS and over & intent.axes("batch"):
    return Verdict(False, "examples of other devices are gathered: the activation lost its split over the batch")
  if c.kind in GATHERS and over & intent.axes("seq"):
    return Verdict(False, "whole sequences are gathered: something works on the sequence that is not attention")
  if c.kind in SUMS and over & intent.axes("batch", "seq") and c.phase in ("forward", "recompute"):
    return Verdict(False, "activations are summed where a parameter should have been gathered")
  if c.kind in SUMS and over & intent.axes("batch", "seq"):
    return Verdict(False, "a sum over the batch that is no gradient: its shape is that of no parameter")
  return Verdict(False, f"nothing in the config speaks of a {c.kind} over {_words(over)}")


def _model(intent) -> frozenset[str]:
  """Axes over which the computation of a layer is split."""
  return intent.axes("heads", "hidden", "vocab", "embed") - intent.axes("batch", "seq")


def _words(axes) -> str:
  return " and ".join(sorted(axes, key=lambda a: sharding.AXES.index(a) if a in sharding.AXES else 99))


def _gathered(array, leaf, over, intent, rows) -> bool:
  """Whether an array is as large as a leaf, a layer, or some rows of it, gathered over some of its axes."""
  whole = math.prod(leaf.part) * math.prod(intent.layout.mesh.shape[a] for a in over)
  layers = itertools.accumulate(leaf.part[:2], int.__mul__, initial=1)
  return over <= leaf.axes and (any(array.count * n == whole for n in layers) or (rows and array.count < whole))


def _flat(array, intent) -> bool:
  """Whether an array is several gradients of parameters, and a few sums, laid end to end, as a GPU's compiler does."""
  sizes = [math.prod(leaf.shape) for name, leaf in intent.leaves.items() if name.startswith("params/")]
  return len(array.dims) == 1 and max(sizes, default=0) < array.count <= sum(sizes) + SMALL // 4


def _may_be(dims, shape) -> bool:
  dims = [d for d in dims if d > 1]
  by_head = [[*dims[:i], dims[i] * dims[i + 1], *dims[i + 2 :]] for i in range(len(dims) - 1)]  # One dimension in two.
  shapes = [[s for s in shape[start:] if s > 1] for start in range(min(3, max(1, len(shape))))]  # Layers lead.
  return any(
    len(found) == len(whole) <= 5
    and any(all(w % d == 0 for w, d in zip(order, found, strict=True)) for order in itertools.permutations(whole))
    for found in (dims, *by_head)
    for whole in shapes
  )
