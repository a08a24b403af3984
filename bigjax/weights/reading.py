"""Tensors of a file become arrays on devices: each device is sent its own part, some rows at a time."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bigjax.errors import UserError
from bigjax.weights.links import Link
from bigjax.weights.tensors import Mapped, Tensor, whole

AT_ONCE = 8 * 2**20  # Bytes of a file on the way to a device.
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def read(
  found: Sequence[Link], tensors: Sequence[Tensor], leaves: Mapping[str, Any], files: Sequence[Mapped]
) -> Iterator[tuple[str, jax.Array]]:
  """Yields (name, array) of every leaf that the links make up.

  Args:
    found: what each leaf is made of.
    tensors: those of the links, in their order.
    leaves: shapes, types and shardings by name.
    files: what the tensors are in.

  Raises:
    UserError: A tensor is of no type that is read, or holds NaN or infinity.
  """
  for tensor in tensors:
    if tensor.dtype not in FLOATS:
      known = "float32, bfloat16 and float16 are read"
      raise UserError(f"{tensor.file}: {tensor.name!r} is of type {tensor.stored}; {known}.")
  sources: dict[str, dict[tuple[int, ...], tuple[Link, int, Tensor]]] = {}
  for link, tensor in zip(found, tensors, strict=True):
    for i, slot in enumerate(link.slots):
      sources.setdefault(slot.leaf, {})[slot.lead] = (link, i, tensor)
  for name, source in sources.items():
    yield name, _leaf(leaves[name], source, lambda: [file.drop() for file in files])


def _leaf(leaf, source, drop: Callable[[], Any]) -> jax.Array:
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shards, arrays = {}, []
  for device, index in sharding.addressable_devices_indices_map(tuple(leaf.shape)).items():
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
    if bounds not in shards:
      with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("alone",))):  # Whatever mesh is set around this.
        shards[bounds] = _shard(bounds, leaf.dtype, source, device, drop)
    arrays.append(jax.device_put(shards[bounds], device))
  return jax.make_array_from_single_device_arrays(tuple(leaf.shape), sharding, arrays)


def _shard(bounds, dtype, source, device, drop):
  """One device's part, from `bounds` (start, stop) of each dimension."""
  count = len(next(iter(source)))  # Leading dimensions, of layers and experts.
  lead, inner = bounds[:count], bounds[count:]
  shape = tuple(stop - start for start, stop in bounds)
  array = _zeros(shape, jnp.dtype(dtype), jax.sharding.SingleDeviceSharding(device))()
  finite = []
  for row in itertools.product(*(range(*b) for b in lead)):
    link, slot, tensor = source[row]
    first = [r - b[0] for r, b in zip(row, lead, strict=True)]
    for start, part in _parts(link, slot, tensor, inner):
      array, ok = _put(array, jax.device_put(part, device), (*first, *start), turned=link.turned, offset=link.offset)
      finite.append((tensor, ok))
      if part.nbytes > AT_ONCE // 4:
        array.block_until_ready()
        drop()
  wrong = next((t for t, ok in finite if not ok), None)
  if wrong is not None:
    raise UserError(f"{wrong.file}: {wrong.name!r} holds NaN or infinity; these weights are damaged.")
  drop()
  return array


def _parts(link, slot, tensor, inner):
  """Yields (start in the shard, values as they lie in the file) of one slot, a bounded number of rows at a time."""
  bounds = list(inner[::-1] if link.turned else inner)
  rows = bounds[0][1] - bounds[0][0]
  size = max(1, rows * tensor.dtype.itemsize * (bounds[1][1] - bounds[1][0] if len(bounds) > 1 else 1))
  step = max(1, rows * AT_ONCE // size)
  for at in range(0, rows, step):
    part = [slice(*b) for b in bounds]
    part[0] = slice(bounds[0][0] + at, min(bounds[0][0] + at + step, bounds[0][1]))
    first = [0] * len(bounds)
    first[0] = at
    out = part[link.axis]
    part[link.axis] = slice(out.start + link.start(slot), out.stop + link.start(slot))
    if link.order is None:
      value = tensor.read(tuple(part))
    else:  # Few rows of a run can lie anywhere in it.
      part[link.axis] = slice(link.start(slot), link.start(slot) + link.width(slot))
      value = np.take(tensor.read(tuple(part)), link.order[out], axis=link.axis)
    yield (first[::-1] if link.turned else first), np.array(value, copy=True)


def zeros(leaf: Any) -> jax.Array:
  """Returns zeros of a shape, a type and a sharding."""
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return _zeros(tuple(leaf.shape), jnp.dtype(leaf.dtype), sharding)()


@functools.cache
def _zeros(shape, dtype, sharding):
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, static_argnames=("turned", "offset"), donate_argnums=0)
def _put(array, part, start, *, turned, offset):
  """Returns the array with the part in its place, and whether all of the part is finite."""
  value = part.astype(jnp.float32)
  finite = jnp.isfinite(value).all()
  value = value - offset if offset else value
  value = (value.T if turned else value).astype(array.dtype)
  value = value.reshape((1,) * (array.ndim - value.ndim) + value.shape)
  return jax.lax.dynamic_update_slice(array, value, start), finite


def same(a: Tensor, b: Tensor) -> bool:
  """Whether two tensors are equal to the bit."""
  rows = max(1, AT_ONCE // max(1, a.dtype.itemsize * int(np.prod(a.shape[1:]))))
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  cut = lambda t, i: t.read((slice(i, min(i + rows, t.shape[0])), *whole(t.shape)[1:]))
  return all(cut(a, i).tobytes() == cut(b, i).tobytes() for i in range(0, a.shape[0], rows))
