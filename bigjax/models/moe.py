"""A mixture of experts: each token is computed by the few MLPs its router picks, and by any that all tokens share.

Three ways to bring tokens to experts. `dropless` sorts the tokens by expert and multiplies groups of any size; every
choice counts. With a `capacity` each expert takes a fixed number of tokens from every `group` of consecutive tokens of
a sequence, the first come; the others pass it by. What is dropped depends on the group alone, so neither the number of
devices nor accumulation changes it, and no token on a later one.

Where the mesh has an expert axis, each of its devices holds some of the experts, and part of the batch.
Capacity mode trades its fixed buffers by all-to-all, and so does dropless with `exchange="ragged"`, which sends every
choice to its expert's device. `exchange="gather"` instead gathers the axis's tokens, computes the local experts'
part of each and adds up the parts with a reduce-scatter: the same program on every backend, and over n devices
n - 1 rows of the network per token and direction against top_k * (n - 1) / n, so no more where n <= top_k. "auto" takes
ragged above that where the backend has it. Memory is for the worst case, every token of n devices choosing these
experts, either way.

What is added to a loss has to be a sum over tokens, or accumulation and data parallelism would change it. So `aux` has
sums, and a task whose weights count tokens adds `coefficient * aux["balance"]` to its sum:
balance   over sequences, (number of tokens) * sum_i f_i P_i, equations 17 to 20 of https://arxiv.org/abs/2412.19437;
          1 a token for a uniform router. f and P are of one sequence: those of a batch, as in
          https://arxiv.org/abs/2101.03961, are no sum over examples, and differ for every split of the batch.
router_z  squared log-sum-exp of the router's logits, https://arxiv.org/abs/2202.08906, over tokens.
load      [experts], how many tokens chose each; `dropped`, how many of these choices met a full expert.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import layers
from bigjax.models.grouped import grouped_dot, pick

# How "tensor" and "expert" split the leaves: (regex, dimension from the right).
TENSOR = ((".*experts/(gate|up)/kernel", -1), (".*experts/down/kernel", -2))
EXPERT = ((".*experts/.*/kernel", -3),)

SCORING = {"softmax": lambda logits: jax.nn.softmax(logits, axis=-1), "sigmoid": jax.nn.sigmoid}


class Kernels(nnx.Module):
  """A kernel for each expert."""

  def __init__(self, experts: int, inputs: int, outputs: int, init: Callable, rngs: nnx.Rngs):
    one = lambda key: init(key, (inputs, outputs), jnp.float32)
    self.kernel = nnx.Param(jax.vmap(one)(jax.random.split(rngs.params(), experts)))


class Experts(nnx.Module):
  """The kernels of MLPs without biases; `gate` is None if they are plain."""

  def __init__(self, experts: int, width: int, hidden: int, *, gated: bool, init: tuple[Callable, Callable], rngs):
    self.gate = Kernels(experts, width, hidden, init[0], rngs) if gated else None
    self.up = Kernels(experts, width, hidden, init[0], rngs)
    self.down = Kernels(experts, hidden, width, init[1], rngs)


class Router(nnx.Module):
  """One score for each expert, in float32."""

  def __init__(self, width: int, experts: int, init: Callable, rngs: nnx.Rngs):
    self.kernel = nnx.Param(init(rngs.params(), (width, experts), jnp.float32))

  def __call__(self, x: Float[Array, "batch seq width"]) -> Float32[Array, "batch seq experts"]:
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    logits = jnp.dot(flat, self.kernel[...], precision=jax.lax.Precision.HIGHEST)
    return logits.reshape(*x.shape[:2], -1)


class MoE(nnx.Module):
  """Routed experts, added to those that are `shared`.

  Args:
    width, hidden: of a token, and inside an expert.
    experts, top_k: how many there are, and how many a token chooses.
    gated, activation: down(activation(gate(x)) * up(x)), or down(activation(up(x))).
    scoring: "softmax" or "sigmoid" of the router's logits.
    normalize: the chosen scores are divided by their sum.
    scale: what the chosen scores are multiplied by.
    groups, top_groups: choose among the experts of the `top_groups` groups whose two best have the largest sum,
      https://arxiv.org/abs/2412.19437.
    bias_rate: above 0, balances without a loss, https://arxiv.org/abs/2408.15664: a bias on the scores, only for
      choosing, moves by this after each step (`settle`).
    capacity_factor: None for dropless; else an expert takes capacity_factor * group * top_k / experts tokens, rounded
      up, of each group.
    group: tokens a group, None for a sequence.
    exchange: "gather", "ragged" (TPU and GPU), or "auto".
    shared: a module `[batch, seq, width] -> [batch, seq, width]`, or None.
    init: of what reads the residual stream and of what enters it.
  """

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    experts: int,
    top_k: int,
    gated: bool = True,
    activation: str = "silu",
    scoring: str = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    bias_rate: float = 0.0,
    capacity_factor: float | None = None,
    group: int | None = None,
    exchange: str = "auto",
    shared: nnx.Module | None = None,
    dtype: Any = jnp.float32,
    init: tuple[Callable, Callable] = (nnx.initializers.normal(0.02),) * 2,
    rngs: nnx.Rngs,
  ):
    check(experts, top_k, groups, top_groups)
    layers.check_positive(width=width, hidden=hidden, group=group)
    if capacity_factor is not None and capacity_factor <= 0:
      raise UserError(f"model.capacity_factor: {capacity_factor} must be above 0, or None for dropless.")
    self.count, self.top_k, self.normalize, self.scale = experts, top_k, normalize, scale
    self.groups, self.top_groups, self.bias_rate = groups, top_groups, bias_rate
    self.capacity_factor, self.group, self.dtype = capacity_factor, group, dtype
    self.exchange = layers.choose({name: name for name in ("auto", "gather", "ragged")}, "exchange", exchange)
    self.activation = layers.choose(layers.ACTIVATIONS, "activation", activation)
    self.scoring = layers.choose(SCORING, "scoring", scoring)
    self.router = Router(width, experts, init[0], rngs)
    self.experts = Experts(experts, width, hidden, gated=gated, init=init, rngs=rngs)
    self.shared = shared
    self.grouped_dot = grouped_dot  # What quantize.py may put another in the place of.
    # What is called runs inside of a scan and can't change these: the model adds `aux["load"]` up, after it.
    self.bias = nnx.BatchStat(jnp.zeros(experts)) if bias_rate else None
    self.load = nnx.BatchStat(jnp.zeros(experts)) if bias_rate else None

  def __call__(
    self, x: Float[Array, "batch seq width"], *, mask: Bool[Array, "batch seq"] | None = None, dropless: bool = False
  ) -> tuple[Float[Array, "batch seq width"], dict[str, Array]]:
    """Returns what to add to the residual stream, and `aux`; tokens whose mask is False choose no expert.

    With `dropless` there is no capacity, whatever the factor.
    """
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    index, weight, aux = self.route(x, mask)
    x = x.astype(self.dtype)
    out, dropped = self._routed(x, index, weight, dropless)
    if self.shared is not None:
      out = out + self.shared(x)
    return out, aux | {"dropped": dropped}

  def settle(self) -> None:
    """Moves the bias towards experts that had less than their share of the step's tokens; for stacked layers too."""
    if self.bias_rate:
      load = self.load[...]
      self.bias[...] += self.bias_rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
      self.load[...] = jnp.zeros_like(load)

  def route(
    self, x: Float[Array, "batch seq width"], mask: Bool[Array, "batch seq"]
  ) -> tuple[Int[Array, "batch seq chosen"], Float32[Array, "batch seq chosen"], dict[str, Array]]:
    """Returns the experts each token chose, number `experts` for none, what each counts, and sums to balance them."""
    logits = self.router(x)
    scores = self.scoring(logits)
    ranked = jax.lax.stop_gradient(scores)
    if self.bias is not None:
      ranked = ranked + jax.lax.stop_gradient(self.bias[...])[None, None]
    if self.groups > 1:
      ranked = _within_groups(ranked, self.groups, self.top_groups)
    index = jax.lax.top_k(ranked, self.top_k)[1]
    weight = jnp.take_along_axis(scores, index, axis=-1)
    if self.normalize:
      weight = weight / (weight.sum(axis=-1, keepdims=True) + 1e-20)
    index = jnp.where(mask[:, :, None], index, self.count)

    real = mask.astype(jnp.float32)
    chosen = (index[..., None] == jnp.arange(self.count)[None, None, None]).sum(axis=(1, 2)).astype(jnp.float32)
    share = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    probability = (share * real[..., None]).sum(axis=1)
    length = jnp.maximum(real.sum(axis=1), 1)
    aux = {
      "balance": self.count / self.top_k * ((chosen * probability).sum(axis=-1) / length).sum(),
      "router_z": (jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real).sum(),
      "load": chosen.sum(axis=0),
    }
    return index, weight * self.scale, aux

  def _routed(self, x, index, weight, dropless):
    layout = sharding.current()
    ways = layout.size("experts")
    if self.count % ways:
      near = self.count // ways * ways
      raise UserError(
        f"model.experts: {self.count} experts can't be divided over the expert axis of {ways} devices; "
        f"the nearest numbers that can are {f'{near} and ' if near else ''}{near + ways}."
      )
    kernels = {
      name: getattr(self.experts, name).kernel[...].astype(self.dtype)
      for name in ("gate", "up", "down")
      if getattr(self.experts, name) is not None
    }
    hidden = kernels["up"].shape[-1]
    if hidden % layout.size("hidden"):
      near = max(1, hidden // layout.size("hidden")) * layout.size("hidden")
      raise UserError(f"model.hidden: {hidden} can't be divided over {layout.size('hidden')} devices; {near} can.")
    run = functools.partial(self._on_device, layout=layout, dropless=dropless)
    if layout.mesh is None:
      return run(x, index, weight, kernels)
    tokens = layout.spec("batch", "seq", None)
    spec = {name: layout.spec("experts", None, "hidden") for name in kernels}
    spec["down"] = layout.spec("experts", "hidden", None)
    out_specs = (tokens, jax.sharding.PartitionSpec())
    mapped = jax.shard_map(
      run, mesh=layout.mesh, in_specs=(tokens, tokens, tokens, spec), out_specs=out_specs, check_vma=False
    )
    return mapped(x, index, weight, kernels)

  def _on_device(self, x, index, weight, kernels, *, layout, dropless):
    """What one device does with its tokens, its experts and its part of their hidden units."""
    axes, ways = layout.axes("experts"), layout.size("experts")
    run = functools.partial(self._mlp, kernels)
    flat = x.reshape(-1, x.shape[-1]), index.reshape(-1, self.top_k), weight.reshape(-1, self.top_k)
    dropped = jnp.zeros(())
    if self.capacity_factor is not None and not dropless:
      group = self._group(x.shape[1], layout)
      out, dropped = _with_capacity(*flat, run, self.count, group, self._capacity(group), axes, ways)
      if split := layout.axes("batch") + layout.axes("seq"):
        dropped = jax.lax.psum(dropped, split)
    elif ways == 1:
      out = _dropless(*flat, run, self.count, 0)
    elif self._sends(ways, layout.mesh):
      out = _exchange_ragged(*flat, run, self.count, axes, ways)
    else:
      gathered = [jax.lax.all_gather(a, axes, tiled=True) for a in flat]
      first = jax.lax.axis_index(axes) * (self.count // ways)
      out = _dropless(*gathered, run, self.count // ways, first)
      out = jax.lax.psum_scatter(out, axes, tiled=True)
    if layout.axes("hidden"):
      out = jax.lax.psum(out, layout.axes("hidden"))
    return out.reshape(x.shape), dropped

  def _sends(self, ways, mesh):
    if self.exchange == "ragged" and not _has_ragged(mesh):
      raise UserError('model.exchange: "ragged" needs a collective that CPUs lack; set "gather" or "auto".')
    return self.exchange == "ragged" or (self.exchange == "auto" and ways > self.top_k and _has_ragged(mesh))

  def _mlp(self, kernels, rows, sizes=None):
    """The experts on `rows`: of one after another so many, or [experts, rows, width]."""
    product = self._batched_dot if sizes is None else lambda rows, kernels: self.grouped_dot(rows, kernels, sizes)
    hidden = product(rows, kernels["up"])
    if "gate" in kernels:
      hidden = self.activation(product(rows, kernels["gate"])) * hidden
    else:
      hidden = self.activation(hidden)
    return product(hidden, kernels["down"])

  def _batched_dot(self, rows, kernels):
    if self.grouped_dot is grouped_dot:
      return jnp.einsum("ecw,ewh->ech", rows, kernels)
    experts, each = rows.shape[:2]
    sizes = jnp.full(experts, each, jnp.int32)
    return self.grouped_dot(rows.reshape(experts * each, -1), kernels, sizes).reshape(experts, each, -1)

  def _group(self, seq, layout):
    """Tokens a group; raises unless each is whole on a device."""
    whole = seq * layout.size("seq")
    group = whole if self.group is None else self.group
    # With a ring a device has two runs of neighbours, one from either end of the sequence.
    run = seq // 2 if layout.size("seq") > 1 and layout.sequence == "ring" else seq
    if run % group:
      fits = [n for n in range(1, run + 1) if run % n == 0]
      near = min(fits, key=lambda n: abs(n - group))
      raise UserError(
        f"model.group: groups of {group} tokens don't divide the {run} neighbouring tokens of a sequence of {whole} "
        f"that are on one device; the nearest that do have {near}. Or set capacity_factor=None (dropless)."
      )
    return group

  def _capacity(self, group):
    return max(1, math.ceil(self.capacity_factor * group * self.top_k / self.count))


def check(experts: int, top_k: int, groups: int = 1, top_groups: int = 1) -> None:
  """Raises unless a token can choose `top_k` of the `experts`, in `top_groups` of `groups` groups of equal size."""
  layers.check_positive(experts=experts, top_k=top_k, groups=groups, top_groups=top_groups)
  if top_k > experts:
    raise UserError(f"model.top_k: a token can't choose {top_k} of {experts} experts; give {experts} or less.")
  if experts % groups or (groups > 1 and experts // groups < 2):
    fits = [n for n in range(1, experts // 2 + 1) if experts % n == 0] or [1]
    near = min(fits, key=lambda n: abs(n - groups))
    raise UserError(f"model.groups: {groups} groups of 2 or more don't divide {experts} experts; {near} do.")
  if top_groups > groups:
    raise UserError(f"model.top_groups: a token can't choose {top_groups} of {groups} groups; give {groups} or less.")
  if top_k > top_groups * (experts // groups):
    raise UserError(
      f"model.top_groups: {top_groups} of {groups} groups have {top_groups * (experts // groups)} experts, "
      f"fewer than top_k={top_k}; give {math.ceil(top_k * groups / experts)}."
    )


def _within_groups(ranked, groups, top_groups):
  """Leaves the experts of the best groups their score, and gives the others -inf."""
  grouped = ranked.reshape(*ranked.shape[:-1], groups, -1)
  best = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
  kept = jax.lax.top_k(best, top_groups)[1]
  allowed = (kept[..., None] == jnp.arange(groups)[None, None, None]).any(axis=-2)
  return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranked.shape)


def _has_ragged(mesh) -> bool:
  return mesh.devices.flat[0].platform != "cpu"  # XLA's CPU backend has no ragged all-to-all.


def _sort(expert, count, rows):
  """Puts choices in the order of their experts, those of expert `count` last, and keeps the first `rows`.

  Returns (choice of each row, row of each choice, rows of each expert), the number of what is missing for what is not.
  """
  choices = len(expert)
  order = jnp.argsort(expert, stable=True)
  position = jnp.argsort(order)
  sizes = (expert[:, None] == jnp.arange(count)[None]).sum(axis=0, dtype=jnp.int32)
  order = jnp.where(jnp.arange(rows) < sizes.sum(), order[:rows], choices)
  return order, jnp.where(expert < count, position, rows), sizes


def _combine(rows, order, position, weight):
  """Adds up what the experts made of each token's choices, weighted."""
  tokens, top_k = weight.shape
  parts = pick(rows, position, order[:, None]).reshape(tokens, top_k, -1)
  return jnp.einsum("tkw,tk->tw", parts, weight, preferred_element_type=jnp.float32).astype(rows.dtype)


def _dropless(x, index, weight, run, count, first):
  """The part in every token of the experts `first` to `first + count`."""
  tokens, top_k = index.shape
  expert = index.reshape(-1) - first
  expert = jnp.where((expert >= 0) & (expert < count), expert, count)
  order, position, sizes = _sort(expert, count, tokens * min(top_k, count))
  rows = pick(x, order // top_k, position.reshape(tokens, top_k))
  rows = run(rows, sizes)
  return _combine(rows, order, position, weight)


def _with_capacity(x, index, weight, run, count, group, capacity, axes, ways):
  """Each expert takes the first `capacity` tokens of every group that chose it; all experts' buffers are as large."""
  top_k = index.shape[1]
  groups = len(x) // group
  expert = index.reshape(groups, group * top_k)
  # In each group: a choice's rank among those of its expert, and the choice at each of an expert's places.
  order, position, sizes = jax.vmap(lambda e: _sort(e, count, group * top_k))(expert)
  begin = jnp.cumsum(sizes, axis=1) - sizes
  mine = jnp.minimum(expert, count - 1)
  rank = position - jnp.take_along_axis(begin, mine, axis=1)
  kept = (expert < count) & (rank < capacity)
  slots = count * groups * capacity
  slot = jnp.where(kept, (mine * groups + jnp.arange(groups)[:, None]) * capacity + rank, slots).reshape(-1)
  place = jnp.arange(capacity)[None, None]
  row = jnp.minimum(begin[..., None] + place, group * top_k - 1)  # [groups, experts, capacity]
  choice = jnp.take_along_axis(order, row.reshape(groups, -1), axis=1).reshape(row.shape)
  choice = choice + (jnp.arange(groups) * group * top_k)[:, None, None]
  choice = jnp.where(place < sizes[..., None], choice, len(x) * top_k).swapaxes(0, 1).reshape(-1)

  rows = pick(x, choice // top_k, slot.reshape(-1, top_k)).reshape(count, groups * capacity, -1)
  if ways > 1:
    rows = jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=1, tiled=True)
  rows = run(rows)
  if ways > 1:
    rows = jax.lax.all_to_all(rows, axes, split_axis=1, concat_axis=0, tiled=True)
  out = _combine(rows.reshape(slots, -1), choice, slot, weight)
  return out, ((expert < count) & ~kept).sum().astype(jnp.float32)


def _exchange_ragged(x, index, weight, run, count, axes, ways):
  """Every choice travels to its expert's device and back, and nothing else does."""
  tokens, top_k = index.shape
  local, me = count // ways, jax.lax.axis_index(axes)
  order, position, sizes = _sort(index.reshape(-1), count, tokens * top_k)
  rows = pick(x, order // top_k, position.reshape(tokens, top_k))
  sizes = jax.lax.all_gather(sizes, axes).reshape(ways, ways, local)  # From each, for each, for its experts.
  amount = sizes.sum(axis=-1)
  # Where what `a` sends to `b` starts: in the rows of `a`, and in those of `b`.
  leaves, lands = jnp.cumsum(amount, axis=1) - amount, jnp.cumsum(amount, axis=0) - amount

  room = jnp.zeros((ways * tokens * min(top_k, local), x.shape[1]), x.dtype)
  here = jax.lax.ragged_all_to_all(rows, room, leaves[me], amount[me], lands[me], amount[:, me], axis_name=axes)
  # They came by device and then by expert.
  arrived = jnp.tile(jnp.arange(local), ways)
  expert = jnp.repeat(arrived, sizes[:, me].reshape(-1), total_repeat_length=len(room))
  expert = jnp.where(jnp.arange(len(room)) < amount[:, me].sum(), expert, local)
  by_expert, back, own = _sort(expert, local, len(room))
  here = pick(here, by_expert, back[:, None])
  here = run(here, own)
  here = pick(here, back, by_expert[:, None])
  room = jnp.zeros_like(rows)
  rows = jax.lax.ragged_all_to_all(here, room, lands[:, me], amount[:, me], leaves[:, me], amount[me], axis_name=axes)
  return _combine(rows, order, position, weight)
