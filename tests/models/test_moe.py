"""The mixture of experts against a loop over tokens, on every mesh, and what it adds to a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import moe

WIDTH, HIDDEN, EXPERTS = 8, 12, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, WIDTH)), jnp.float32)
MASK = jnp.asarray(np.random.default_rng(1).random((8, 8)) < 0.8)
AUX = ("balance", "router_z", "load", "dropped")


def built(**changes):
  """The graph, and parameters and bias that favour some experts."""
  arguments = dict(experts=EXPERTS, top_k=2, rngs=nnx.Rngs(0)) | changes
  graphdef, params, rest = nnx.split(moe.MoE(WIDTH, HIDDEN, **arguments), nnx.Param, ...)
  rng = np.random.default_rng(2)
  redrawn = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape), jnp.float32), nnx.to_pure_dict(params))
  rest = nnx.to_pure_dict(rest)
  if "bias" in rest:
    rest["bias"] = jnp.asarray(rng.normal(0, 0.3, EXPERTS), jnp.float32)
  return graphdef, redrawn, rest


def mesh(**axes):
  axes = {name: axes[name] for name in sharding.AXES if name in axes}
  count = int(np.prod(list(axes.values())))
  return jax.make_mesh(axes.values(), axes.keys(), (AxisType.Auto,) * len(axes), devices=jax.devices()[:count])


@functools.partial(jax.jit, static_argnums=0)
def call(graphdef, params, rest, x, mask=None):
  return nnx.merge(graphdef, params, rest)(x, mask=mask)


def loss_and_gradients(graphdef, params, rest, layout, x=X, mask=MASK):
  """A loss with every term there is; parameters and tokens laid out as in training."""

  def loss(params, x, mask):
    out, aux = nnx.merge(graphdef, params, rest)(x, mask=mask)
    return jnp.sin(out).sum() + 0.1 * aux["balance"] + 0.01 * aux["router_z"], (out, aux)

  if layout.mesh is not None:
    x, mask = (jax.device_put(a, jax.NamedSharding(layout.mesh, layout.spec("batch", "seq"))) for a in (x, mask))
  with sharding.use(layout):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x, mask)


def by_hand(
  params, rest, x, mask, *, top_k=2, scoring="softmax", normalize=True, scale=1.0, groups=(1, 1), capacity=None
):
  """Every token on its own, in NumPy."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  silu = lambda a: a / (1 + np.exp(-a))
  out, load, dropped, balance, router_z = np.zeros_like(x), np.zeros(EXPERTS), 0, 0.0, 0.0
  for b in range(len(x)):
    taken, chosen, shares = np.zeros(EXPERTS, int), np.zeros(EXPERTS), np.zeros(EXPERTS)
    for t in range(x.shape[1]):
      if not mask[b, t]:
        continue
      logits = x[b, t] @ p["router"]["kernel"]
      scores = 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
      ranked = scores + np.asarray(rest.get("bias", 0.0))
      parts = ranked.reshape(groups[0], -1)
      if groups[0] > 1:
        best = np.sort(parts, axis=1)[:, -2:].sum(1)
        out_of = np.argsort(-best)[groups[1] :]
        parts[out_of] = -np.inf
      picked = np.argsort(-parts.reshape(-1), kind="stable")[:top_k]
      weight = scores[picked] / (scores[picked].sum() if normalize else 1) * scale
      for e, w in zip(picked, weight):
        load[e] += 1
        chosen[e] += 1
        if capacity is not None and taken[e] >= capacity:
          dropped += 1
          continue
        taken[e] += 1
        hidden = silu(x[b, t] @ p["experts"]["gate"]["kernel"][e]) * (x[b, t] @ p["experts"]["up"]["kernel"][e])
        out[b, t] += w * (hidden @ p["experts"]["down"]["kernel"][e])
      shares += scores / scores.sum()
      router_z += np.log(np.exp(logits).sum()) ** 2
    length = mask[b].sum()
    balance += length * (EXPERTS / (top_k * length) * chosen * shares / length).sum()
  return out, dict(balance=balance, router_z=router_z, load=load, dropped=dropped)


VARIANTS = {
  "softmax": dict(),
  "one of them": dict(top_k=1, normalize=False),
  "all of them": dict(top_k=8),
  "not normalised": dict(top_k=3, normalize=False),
  "deepseek": dict(top_k=3, scoring="sigmoid", scale=2.5, groups=4, top_groups=2, bias_rate=0.001),
  "half capacity": dict(top_k=2, capacity_factor=0.5),
  "double capacity": dict(top_k=3, capacity_factor=2.0, scoring="sigmoid"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_sum_over_experts_is_that_of_a_loop_over_tokens(name):
  variant = VARIANTS[name]
  graphdef, params, rest = built(**variant)
  out, aux = call(graphdef, params, rest, X, MASK)
  told = {k: variant[k] for k in ("top_k", "normalize", "scoring", "scale") if k in variant}
  capacity = variant.get("capacity_factor") and int(
    np.ceil(variant["capacity_factor"] * 8 * variant["top_k"] / EXPERTS)
  )
  groups = variant.get("groups", 1), variant.get("top_groups", 1)
  expected, sums = by_hand(params, rest, X, np.asarray(MASK), **told, groups=groups, capacity=capacity)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
  assert set(aux) == set(AUX)
  for k in AUX:
    np.testing.assert_allclose(aux[k], sums[k], rtol=1e-5, err_msg=k)
  assert (aux["dropped"] > 0) == (name == "half capacity")


def test_capacity_takes_the_first_tokens_of_a_group_and_no_later_one():
  graphdef, params, rest = built(top_k=1, capacity_factor=2.0)  # 2 of 8 tokens an expert.
  params["router"]["kernel"] = jnp.zeros((WIDTH, EXPERTS)).at[:, 3].set(1.0)
  x = jnp.abs(X)  # All choose expert 3.
  out, aux = call(graphdef, params, rest, x)
  used = np.abs(out).max(axis=-1) > 0
  np.testing.assert_array_equal(used, np.broadcast_to(np.arange(8) < 2, (8, 8)))
  assert aux["dropped"] == 8 * 6
  np.testing.assert_array_equal(aux["load"], 64 * (np.arange(8) == 3))
  # Two groups of 4, one token an expert in each.
  graphdef, _, rest = built(top_k=1, capacity_factor=2.0, group=4)
  out, aux = call(graphdef, params, rest, x)
  np.testing.assert_array_equal(np.abs(out).max(axis=-1) > 0, np.broadcast_to(np.arange(8) % 4 == 0, (8, 8)))
  # Padding takes no place.
  out, aux = call(graphdef, params, rest, x, jnp.broadcast_to(jnp.arange(8) >= 2, (8, 8)))
  np.testing.assert_array_equal(np.abs(out).max(axis=-1) > 0, np.broadcast_to(np.isin(np.arange(8), (2, 4)), (8, 8)))


@pytest.mark.parametrize("variant", [dict(), dict(capacity_factor=0.5), dict(capacity_factor=1.0, group=4)])
def test_a_later_token_changes_nothing_before_it(variant):
  graphdef, params, rest = built(**variant)
  before, after = (call(graphdef, params, rest, x)[0] for x in (X, X.at[:, 5:].set(-X[:, 5:])))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])


def test_experts_can_be_plain_and_some_shared_by_all_tokens():
  shared = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))
  graphdef, params, rest = built(gated=False, activation="relu", shared=shared, top_k=8, normalize=False)
  assert set(params["experts"]) == {"up", "down"}
  out, _ = nnx.merge(graphdef, params, rest)(X)
  k = params["experts"]
  scores = jax.nn.softmax(X @ params["router"]["kernel"])
  parts = jnp.einsum(
    "bseh,ehw->bsew", jax.nn.relu(jnp.einsum("bsw,ewh->bseh", X, k["up"]["kernel"])), k["down"]["kernel"]
  )
  expected = (parts * scores[..., None]).sum(2) + X @ params["shared"]["kernel"] + params["shared"]["bias"][None, None]
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_computing_every_expert_for_every_token():
  graphdef, params, rest = built(top_k=3)

  def dense(params, x):
    scores = jax.nn.softmax(x @ params["router"]["kernel"])
    best = jax.lax.top_k(scores, 3)[1]
    weight = jnp.where((best[..., None] == jnp.arange(EXPERTS)[None, None, None]).any(2), scores, 0)
    weight = weight / weight.sum(-1, keepdims=True)
    k = {name: params["experts"][name]["kernel"] for name in ("gate", "up", "down")}
    hidden = jax.nn.silu(jnp.einsum("bsw,ewh->bseh", x, k["gate"])) * jnp.einsum("bsw,ewh->bseh", x, k["up"])
    return jnp.einsum("bseh,ehw,bse->bsw", hidden, k["down"], weight)

  gradients = [
    jax.jit(jax.grad(lambda params, x, f=f: jnp.sin(f(params, x)).sum(), (0, 1)))(params, X)
    for f in (dense, lambda params, x: nnx.merge(graphdef, params, rest)(x)[0])
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *gradients)


MESHES = {
  "expert 2": dict(expert=2),
  "expert 4": dict(expert=4),
  "expert 8": dict(expert=8),
  "data 2 expert 2 tensor 2": dict(data=2, expert=2, tensor=2),
  "expert 2 seq 2 tensor 2": dict(expert=2, seq=2, tensor=2),
  "replica 2 data 2 seq 2": dict(replica=2, data=2, seq=2),
  "tensor 4": dict(tensor=4),
}
MODES = {
  "dropless": dict(),
  "deepseek": VARIANTS["deepseek"],
  "capacity": dict(capacity_factor=0.5, group=2),
}


@functools.cache
def on_one_device(mode):
  model = built(**MODES[mode])
  return model, loss_and_gradients(*model, sharding.Layout())


def assert_same(found, expected):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize(
  ("mode", "axes"),
  [("dropless", axes) for axes in MESHES]
  + [("deepseek", "expert 4"), ("deepseek", "data 2 expert 2 tensor 2")]
  + [("capacity", axes) for axes in ("expert 8", "data 2 expert 2 tensor 2", "expert 2 seq 2 tensor 2")],
)
def test_any_mesh_gives_what_one_device_gives(mode, axes):
  model, expected = on_one_device(mode)
  assert_same(loss_and_gradients(*model, sharding.Layout(mesh(**MESHES[axes]))), expected)


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """What jax.lax's documentation says it does, by gathering everything; CPUs have no such collective."""
  del recv_sizes
  me = jax.lax.axis_index(axis_name)
  operands, starts, sizes, targets = (
    jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
  )
  place = jnp.arange(len(output))
  for source in range(len(operands)):
    at = place - targets[source, me]
    rows = operands[source][jnp.clip(at + starts[source, me], 0, operands.shape[1] - 1)]
    output = jnp.where(((at >= 0) & (at < sizes[source, me]))[:, None], rows, output)
  return output


@pytest.mark.parametrize(
  ("mode", "axes"), [("dropless", "expert 2"), ("deepseek", "expert 8"), ("deepseek", "data 2 expert 2 tensor 2")]
)
def test_sending_each_choice_to_its_experts_device_gives_the_same(monkeypatch, mode, axes):
  monkeypatch.setattr(moe, "_has_ragged", lambda mesh: True)
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
  _, expected = on_one_device(mode)
  model = built(**MODES[mode], exchange="ragged")
  layout = sharding.Layout(mesh(**MESHES[axes]))
  assert_same(loss_and_gradients(*model, layout), expected)
  traced = lambda x: nnx.merge(*model)(x)[0]
  with sharding.use(layout):
    assert "psum_scatter" not in str(jax.make_jaxpr(traced)(X))


def test_the_exchange_that_a_cpu_lacks_is_refused():
  model = built(exchange="ragged")
  with sharding.use(sharding.Layout(mesh(expert=2))), pytest.raises(UserError, match='exchange: "ragged".*"gather"'):
    nnx.merge(*model)(X)


def test_it_works_within_a_mapped_scanned_and_recomputed_stage():
  """As a pipeline calls it: a map over stages that lie on the mesh axis pipe, a scan over microbatches, remat."""
  graphdef, params, rest = built()
  stages = jax.tree.map(lambda p: jnp.stack([p, p[..., ::-1]]), params)
  x = jnp.stack([X, X[::-1]])

  def loss(stages, x):
    def one(params, x):
      step = jax.checkpoint(lambda x, _: (x + nnx.merge(graphdef, params, rest)(x)[0], None))
      return jax.lax.scan(step, x, None, length=2)[0]

    return jnp.sin(jax.vmap(one, spmd_axis_name="pipe")(stages, x)).sum()

  both = jax.value_and_grad(loss)
  expected = jax.jit(both)(stages, x)
  with sharding.use(sharding.Layout(mesh(pipe=2, expert=2, tensor=2))):
    found = jax.jit(lambda *a: both(*a))(stages, x)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_what_is_added_to_a_loss_is_the_sum_over_any_parts_of_the_batch(parts):
  model = built(capacity_factor=0.5)
  whole = call(*model, X, MASK)[1]
  split = [call(*model, x, mask)[1] for x, mask in zip(jnp.split(X, parts), jnp.split(MASK, parts))]
  total = jax.tree.map(lambda *a: sum(a), *split)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), total, whole)


def test_a_balance_of_the_whole_batch_would_depend_on_its_parts():
  """The loss of https://arxiv.org/abs/2101.03961, which a mean over local tokens makes: why `balance` isn't that."""
  _, params, _ = built()

  def switch(x):
    scores = jax.nn.softmax(x @ params["router"]["kernel"]).reshape(-1, EXPERTS)
    chosen = jax.nn.one_hot(jax.lax.top_k(scores, 2)[1], EXPERTS).sum(1)
    return len(scores) * EXPERTS / 2 * (chosen.mean(0) * scores.mean(0)).sum()

  assert abs(sum(switch(x) for x in jnp.split(X, 8)) / switch(X) - 1) > 1e-2


@pytest.mark.parametrize("length", [1, 4, 64])
def test_a_uniform_router_has_a_balance_of_one_a_token(length):
  graphdef, params, rest = built()
  params["router"]["kernel"] = jnp.zeros((WIDTH, EXPERTS))
  _, aux = call(graphdef, params, rest, jnp.ones((3, length, WIDTH)))
  np.testing.assert_allclose(aux["balance"], 3 * length, rtol=1e-5)
  np.testing.assert_allclose(aux["router_z"], 3 * length * np.log(EXPERTS) ** 2, rtol=1e-5)


def test_settling_moves_each_bias_towards_an_equal_load():
  graphdef, params, rest = built(bias_rate=0.01, scoring="sigmoid")
  rest["bias"] = jnp.zeros(EXPERTS)
  module = nnx.merge(graphdef, params, rest)
  load = module(X, mask=MASK)[1]["load"]
  np.testing.assert_array_equal(module.bias[...], np.zeros(EXPERTS))  # A call changes nothing.
  module.load[...] += load
  module.settle()
  np.testing.assert_allclose(module.bias[...], 0.01 * np.sign(np.mean(load) - load))
  np.testing.assert_array_equal(module.load[...], np.zeros(EXPERTS))

  @jax.jit
  def step(rest):
    module = nnx.merge(graphdef, params, rest)
    load = module(X, mask=MASK)[1]["load"]
    module.load[...] += load
    module.settle()
    return nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)), load

  for _ in range(100):
    rest, after = step(rest)
  assert np.std(after) < 0.6 * np.std(load)


def test_the_bias_decides_who_is_chosen_and_not_what_they_count():
  graphdef, params, rest = built(**VARIANTS["deepseek"] | dict(normalize=False, groups=1, top_groups=1))
  rest["bias"] = jnp.zeros(EXPERTS).at[jnp.asarray([1, 4, 6])].set(10.0)
  index, weight, _ = nnx.merge(graphdef, params, rest).route(X, jnp.ones((8, 8), bool))
  assert set(np.unique(index)) == {1, 4, 6}
  scores = jax.nn.sigmoid(X @ params["router"]["kernel"])
  np.testing.assert_allclose(weight, 2.5 * jnp.take_along_axis(scores, index, axis=-1), rtol=1e-5)


def test_half_precision_routes_in_float32():
  graphdef, params, rest = built(dtype=jnp.bfloat16)
  module = nnx.merge(graphdef, params, rest)
  out, aux = module(X.astype(jnp.bfloat16))
  exact, sums = nnx.merge(built()[0], params, rest)(X.astype(jnp.bfloat16).astype(jnp.float32))
  assert out.dtype == jnp.bfloat16 and all(a.dtype == jnp.float32 for a in aux.values())
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())
  np.testing.assert_array_equal(aux["load"], sums["load"])


@pytest.mark.parametrize(
  ("arguments", "remedy"),
  [
    (dict(top_k=9), "model.top_k: a token can't choose 9 of 8 experts; give 8 or less"),
    (dict(groups=3), "model.groups: 3 groups of 2 or more don't divide 8 experts; 2 do"),
    (dict(groups=8), "model.groups: 8 groups of 2 or more don't divide 8 experts; 4 do"),
    (dict(groups=4, top_groups=5), "model.top_groups: a token can't choose 5 of 4 groups"),
    (dict(groups=4, top_groups=1, top_k=4), "1 of 4 groups have 2 experts, fewer than top_k=4; give 2"),
    (dict(capacity_factor=0.0), "model.capacity_factor: 0.0 must be above 0"),
    (dict(scoring="softmin"), "model.scoring: 'softmin' is not known. Did you mean 'softmax'"),
  ],
)
def test_sizes_that_make_no_router_are_refused_with_the_nearest_that_do(arguments, remedy):
  with pytest.raises(UserError, match=remedy):
    nnx.eval_shape(lambda: moe.MoE(WIDTH, HIDDEN, **dict(experts=8, top_k=2) | arguments, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
  ("arguments", "axes", "remedy"),
  [
    (dict(experts=6), dict(expert=4), "6 experts can't be divided over the expert axis of 4 devices; .* 4 and 8"),
    (dict(experts=3), dict(expert=4), "3 experts can't be divided over the expert axis of 4 devices; .* are 4"),
    (dict(), dict(tensor=8), "model.hidden: 12 can't be divided over 8 devices; 8 can"),
    (dict(capacity_factor=1.0), dict(seq=2), "groups of 8 tokens don't divide the 2 neigh.* of 8 .* nearest .* have 2"),
    (dict(capacity_factor=1.0, group=3), dict(data=2), "groups of 3 tokens don't divide the 8 neigh.* have 2"),
  ],
)
def test_a_mesh_that_does_not_divide_it_is_refused_with_the_nearest_that_do(arguments, axes, remedy):
  module = moe.MoE(WIDTH, HIDDEN, **dict(experts=8, top_k=2) | arguments, rngs=nnx.Rngs(0))
  with sharding.use(sharding.Layout(mesh(**axes))), pytest.raises(UserError, match=remedy):
    jax.eval_shape(module, X)
