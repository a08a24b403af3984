"""Where training goes next: (seed, position) to an epoch and an example, with no state and no table.

An iterator's state has to be saved, ties a run to its number of hosts, and costs a replay to move. Here the order of an
epoch is a keyed permutation that is computed where it is asked for: a Feistel network over the smallest power of two
that holds the ids, walked along its cycles until it falls below `n` (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002). Any step costs the same, and hosts agree without talking. Random numbers for one example
come from hashes in the same way. The hash is SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", 2014), whole arrays at a time.
"""

import numpy as np
from jaxtyping import Float32, Int64, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


def shuffled(
  n: int, positions: Int64[np.ndarray, " batch"], seed: int
) -> tuple[Int64[np.ndarray, " batch"], Int64[np.ndarray, " batch"]]:
  """Returns the epoch and the example id at each position of the endless stream of reshuffled epochs of `n`."""
  epochs, places = np.divmod(positions, n)
  return epochs, permute(places, n, seed, epochs)


def permute(
  places: Int64[np.ndarray, " batch"], n: int, seed: int, epochs: Int64[np.ndarray, " batch"] | int = 0
) -> Int64[np.ndarray, " batch"]:
  """Maps places in [0, n) to ids in [0, n), one to one for every (seed, epoch)."""
  if n == 1:
    return np.zeros_like(places)
  # A domain of 64 at least: on fewer bits the permutations of a Feistel network are far from equally likely.
  bits = max(6, (n - 1).bit_length())
  right_bits, left_bits = bits // 2, bits - bits // 2
  keys = np.broadcast_to(fold(_start(seed), epochs), places.shape)
  ids = _feistel(places.astype(np.uint64), keys, left_bits, right_bits)
  outside = np.flatnonzero(ids >= n)
  while outside.size:
    ids[outside] = _feistel(ids[outside], keys[outside], left_bits, right_bits)
    outside = outside[ids[outside] >= n]
  return ids.astype(np.int64)


def example_keys(
  seed: int, epochs: Int64[np.ndarray, " batch"], ids: Int64[np.ndarray, " batch"]
) -> UInt64[np.ndarray, " batch"]:
  """Returns a key for each example in its epoch: all the randomness it may draw on."""
  return fold(fold(_start(seed), epochs), ids)


def fold(keys: UInt64[np.ndarray, "..."], salt: Int64[np.ndarray, "..."] | int) -> UInt64[np.ndarray, "..."]:
  """Returns new keys, one for each (key, salt)."""
  salt = np.atleast_1d(np.asarray(salt, np.int64)).astype(np.uint64)
  return _mix(keys + _mix(salt + np.uint64(_GOLDEN)))


def uniform(keys: UInt64[np.ndarray, " batch"], salt: int, count: int) -> Float32[np.ndarray, "batch {count}"]:
  """Returns `count` numbers in [0, 1) for each key; another salt gives others."""
  counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
  bits = _mix(fold(keys, salt)[:, None] + counter)
  return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _start(seed):
  return _mix(np.array([seed & (2**64 - 1)], np.uint64))


def _feistel(x, keys, left_bits, right_bits):
  """A permutation of the numbers of `left_bits + right_bits` bits, one for each key."""
  left_mask, right_mask = np.uint64((1 << left_bits) - 1), np.uint64((1 << right_bits) - 1)
  left, right = x >> np.uint64(right_bits), x & right_mask
  for r in range(0, _ROUNDS, 2):
    left ^= _mix(keys + right + np.uint64((r + 1) * _GOLDEN % 2**64)) & left_mask
    right ^= _mix(keys + left + np.uint64((r + 2) * _GOLDEN % 2**64)) & right_mask
  return (left << np.uint64(right_bits)) | right


def _mix(x):
  """SplitMix64's finaliser: every bit of the output depends on every bit of the input, one to one."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
