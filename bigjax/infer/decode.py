"""Tokens after prompts: the prompts at once, then a token of every row at a time, several in one compiled program.

Compiled once for each bucket: rows and the slots of the cache are rounded up to powers of two, the longest prompt to
those and one and a half of them. The cache grows from one bucket to the next, so that a short answer doesn't pay
for a long context.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.infer import sampling as samplings
from bigjax.infer.sampling import GREEDY, Sampling
from bigjax.models.cache import Cache

SMALLEST = 64  # Slots of the first cache.
FLUSH = 32  # Tokens a row between two looks at them.


class Piece(NamedTuple):
  """What came out since the last look: of each row new tokens and, if asked for, their log-probabilities."""

  tokens: list[list[int]]
  log_probabilities: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Generation:
  """What follows a prompt."""

  tokens: list[int]
  log_probabilities: list[float]  # Natural, of the model itself: before temperature and whatever else is for sampling.


class _State(NamedTuple):
  cache: Cache
  last: Int[Array, " batch"]  # Token of each row, which the model has not seen.
  made: Int[Array, ""]  # Tokens a row.
  done: Bool[Array, " batch"]
  seen: Bool[Array, "batch vocab"] | None  # For the repetition penalty.


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """A model and its weights, to go on where prompts end."""

  bind: Callable[..., Any]  # (*weights) -> module, which has `extend`, `unembed` and `empty_cache`.
  weights: tuple[Any, ...]
  layout: sharding.Layout = dataclasses.field(default_factory=sharding.Layout)

  def generate(self, prompts: Sequence[Sequence[int]], **how: Any) -> list[Generation]:
    """Returns what follows each prompt; the arguments are those of `stream`."""
    found = [Generation([], []) for _ in prompts]
    for piece in self.stream(prompts, **how):
      for row, tokens, log_probabilities in zip(found, *piece, strict=True):
        row.tokens.extend(tokens)
        row.log_probabilities.extend(log_probabilities)
    return found

  def stream(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    stopped: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    log_probabilities: bool = False,
    cache: str | None = None,
    vocabulary: int | None = None,
    flush: int = FLUSH,
  ) -> Iterator[Piece]:
    """Yields tokens as they come.

    Args:
      prompts: tokens, at least one each.
      max_tokens: for each row; a row also ends where the model's context does.
      sampling: how a token is drawn; the likeliest is taken if left out.
      seed: with a row's number, all that its tokens are drawn by.
      rows: the numbers of the rows; 0, 1, ... if None.
      stop_tokens: end a row; the last token is then one of them.
      stopped: is asked of each row with its new tokens, and ends it.
      log_probabilities: whether there are any.
      cache: the type of the cache's numbers, such as "int8"; the model's if None.
      vocabulary: only the first so many tokens are drawn: those that stand for text, where a model has some more.
      flush: tokens a row that a piece has, at most.

    Raises:
      UserError: Prompts that the model can't take; logits that are no numbers.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    self._check(prompts, lengths, max_tokens, flush, seed)
    if not len(prompts):
      return
    limits = self.context - lengths
    limits = limits if max_tokens is None else np.minimum(limits, max_tokens)
    # All but the last token of a prompt go into the cache at once.
    width = bucket(int(lengths.max()) - 1)
    batch = self._batch(len(prompts))
    tokens = np.zeros((batch, width + 1), np.int32)
    for row, prompt in zip(tokens, prompts):
      row[width + 1 - len(prompt) :] = prompt
    filled = lambda found, rest: np.concatenate([found, np.full(batch - len(found), rest)]).astype(np.int32)
    padding, limits, most = filled(width + 1 - lengths, width), filled(limits, 0), int(limits.max())
    keys = _row_keys(seed, filled(range(len(prompts)) if rows is None else rows, 0))

    slots = power_of_two(max(SMALLEST, width + min(flush, most)))
    over, made = limits == 0, 0
    with sharding.use(self.layout):
      state = self._start(self.weights, tokens, padding, slots, cache, "repetition_penalty" in sampling.on)
      while made < most and not over.all():
        end = min(int(made) + flush, most)
        if width + end > slots:
          slots = power_of_two(width + end)
          state = self._grow(state, slots, cache)
        call = (keys, limits, over, np.int32(end), sampling.numbers())
        how = (flush, sampling.on, tuple(stop_tokens), log_probabilities, vocabulary)
        state, out = self._more(self.weights, state, *call, *how)
        made, over, chosen, likely, bad = jax.device_get(out)
        if bad.any():
          raise UserError(
            f"the logits after prompt {int(bad.argmax())} are no numbers (NaN or infinite): the weights are damaged, "
            "or training diverged. Take an earlier checkpoint."
          )
        found = [row[row >= 0].tolist() for row in chosen[: len(prompts)]]
        yield Piece(found, [row[: len(new)].tolist() if log_probabilities else [] for row, new in zip(likely, found)])
        over = over | filled([bool(new) and stopped(row, new) for row, new in enumerate(found)], True).astype(bool)

  @functools.cached_property
  def context(self) -> int:
    """The longest sequence, prompt and all."""
    return self._module.context

  @functools.cached_property
  def vocab_size(self) -> int:
    return self._module.vocab_size

  @functools.cached_property
  def _module(self):
    """The module, without its weights."""
    found = []
    with sharding.use(self.layout):
      jax.eval_shape(lambda *weights: found.append(self.bind(*weights)), *self.weights)
    if not hasattr(found[0], "extend"):
      raise UserError(f"config.model: {type(found[0]).__name__} is no model that writes on. Take gpt or decoder.")
    return found[0]

  def check(self, sequences: Sequence[Sequence[int]], what: str = "prompt") -> None:
    """Raises unless the model generates, knows every token, and has room for the sequences."""
    context, size = self.context, self.vocab_size
    for row, tokens in enumerate(sequences):
      if not len(tokens):
        raise UserError(f"{what} {row} is empty; it takes a token to begin with.")
      if len(tokens) > context:
        raise UserError(f"{what} {row} has {len(tokens):,} tokens, and the model's context is {context:,}.")
      if not 0 <= min(tokens) <= max(tokens) < size:
        wrong = next(t for t in tokens if not 0 <= t < size)
        raise UserError(
          f"{what} {row} has token {wrong}, and the model's vocabulary {size:,}: the tokenizer is not "
          "the one it was trained with."
        )

  def _check(self, prompts, lengths, max_tokens, flush, seed):
    self.check(prompts)
    if not 0 <= seed < 2**32:
      raise UserError(f"seed: {seed} is outside 0 to {2**32 - 1:,}, in which seeds differ.")
    if max_tokens is not None and max_tokens < 1:
      raise UserError(f"max_tokens: {max_tokens} is no number of tokens to generate; give 1 or more.")
    if flush < 1:
      raise UserError(f"flush: {flush} tokens are never shown; give 1 or more.")
    if len(prompts) and lengths.max() == self.context:
      row = int(lengths.argmax())
      raise UserError(f"prompt {row} fills the model's context of {self.context:,} tokens: nothing can follow it.")

  def _batch(self, rows):
    """Rows in whole parts for the devices that split them."""
    ways = self.layout.size("batch")
    return -(-power_of_two(rows) // ways) * ways

  @functools.cached_property
  def _start(self):
    @functools.partial(jax.jit, static_argnums=(3, 4, 5))
    def start(weights, tokens, padding, slots, dtype, penalised):
      module = self.bind(*weights)
      cache = module.empty_cache(sharding.constrain(padding, "batch"), slots, dtype)
      if tokens.shape[1] > 1:
        _, cache = module.extend(sharding.constrain(tokens[:, :-1], "batch", None), cache)
      seen = None
      if penalised:
        real = jnp.arange(tokens.shape[1])[None] >= padding[:, None]
        rows = jnp.arange(len(tokens))[:, None]
        seen = jnp.zeros((len(tokens), module.vocab_size), bool)
        seen = seen.at[rows, jnp.where(real, tokens, module.vocab_size)].set(True, mode="drop")
      return _State(cache, tokens[:, -1], jnp.zeros((), jnp.int32), jnp.zeros(len(tokens), bool), seen)

    return start

  @functools.cached_property
  def _grow(self):
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def grow(state, slots, dtype):
      like = jax.eval_shape(lambda padding: self._module.empty_cache(padding, slots, dtype), state.cache.padding)
      return state._replace(cache=state.cache.grown(like))

    return grow

  @functools.cached_property
  def _more(self):
    @functools.partial(jax.jit, static_argnums=(7, 8, 9, 10, 11), donate_argnums=1)
    def more(weights, state, keys, limits, over, end, numbers, flush, on, stop_tokens, log_probabilities, vocabulary):
      module, first = self.bind(*weights), state.made
      batch = len(limits)

      def step(carry):
        state, chosen, likely, bad = carry
        hidden, cache = module.extend(state.last[:, None], state.cache)
        logits = module.unembed(hidden)[:, 0]
        seen = None if state.seen is None else state.seen[:, :vocabulary]
        drawn_by = jax.vmap(jax.random.fold_in, (0, None))(keys, state.made)
        token = samplings.choose(logits[:, :vocabulary], on, numbers, drawn_by, seen)
        logit = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        bad = bad | (~jnp.isfinite(logit) & ~state.done)
        place = state.made - first
        chosen = chosen.at[:, place].set(jnp.where(state.done, -1, token))
        if log_probabilities:
          likely = likely.at[:, place].set(logit - jax.nn.logsumexp(logits, axis=-1))
        ends = state.done | (state.made + 1 >= limits)
        for stop in stop_tokens:
          ends = ends | (token == stop)
        seen = None if state.seen is None else state.seen.at[jnp.arange(batch), token].set(True)
        return _State(cache, token, state.made + 1, ends, seen), chosen, likely, bad

      state = state._replace(done=over, last=sharding.constrain(state.last, "batch"))
      empty = jnp.full((batch, flush), -1, jnp.int32), jnp.zeros((batch, flush)), jnp.zeros(batch, bool)
      go_on = lambda carry: (carry[0].made < end) & ~carry[0].done.all()
      state, *out = jax.lax.while_loop(go_on, step, (state, *empty))
      return state, (state.made, state.done, *out)

    return more


def _row_keys(seed, rows):
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))


def power_of_two(count: int) -> int:
  """Returns the least power of two that is not below `count`."""
  return 1 << max(count - 1, 0).bit_length()


def bucket(count: int) -> int:
  """Returns `count` rounded up to 16, 24, 32, 48, 64, ...; 0 stays."""
  whole = power_of_two(max(count, 16))
  between = whole // 4 * 3
  return 0 if count == 0 else between if count <= between and whole > 16 else whole
