"""Autoregressive decoding with a KV cache, on any mesh.

Prompts are processed in one pass (prefill), padded to one of a few lengths; then one compiled step
is repeated, which gives every row its next token. The tokens of a row depend only on its prompt,
its number and the seed, not on the rest of the batch or on the devices.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.errors import FieldError, require
from moe_jax.evaluate.sampling import Sampling
from moe_jax.mesh import batch_sharding, mesh_size, replicated
from moe_jax.model import cached, functional

_LEAST_SLOTS = 16  # shorter prompts share a shape
_LOOK_EVERY = 16  # tokens between checks whether all rows have ended: each check blocks


class Decoder:
  """A model ready to decode; its programs are compiled on first use, once per shape."""

  def __init__(self, config: RunConfig, mesh: Mesh, params: functional.Params,
               router: functional.Router | None = None):
    """Copies the parameters, cast to the dtype they are multiplied in.

    Raises:
      FieldError: the model cannot decode because its router is not causal.
    """
    self.config, self.mesh = cached.decoding_config(config), mesh
    self.params = jax.jit(functools.partial(cached.served, config),
                          out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params))(params)
    self.router = router or {}
    self._rows, self._whole = batch_sharding(mesh), replicated(mesh)

  def prefill(self, cache: cached.Cache, tokens_BS, length_B):
    """See cached.prefill; donates `cache`."""
    return self._prefill(self.params, self.router, cache, *self.put(tokens_BS, length_B))

  def decode(self, cache: cached.Cache, token_B, position_B):
    """See cached.decode; donates `cache`."""
    return self._decode(self.params, self.router, cache, *self.put(token_B, position_B))

  def empty_cache(self, batch: int, slots: int) -> cached.Cache:
    return cached.empty_cache(self.config, batch, slots, self.mesh)

  def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int,
               sampling: Sampling | None = None, end: int | None = None,
               ended: Callable[[list[int]], bool] | None = None,
               first_row: int = 0) -> list[list[int]]:
    """Continues each prompt.

    Args:
      prompts: token ids, of any lengths.
      new_tokens: maximum number of new tokens per prompt. A row also ends at the end of the
        context, `data.seq_len` tokens: the model was not trained on positions beyond it.
      sampling: greedy if None.
      end: a row ends at this token, which is not part of the result.
      ended: whether a row with these new tokens is complete. Decoding stops when all are,
        which is checked every _LOOK_EVERY tokens, so a row may get more tokens than it needs.
      first_row: number of the first prompt. Random draws depend on a row's number, so a batch
        draws the same tokens as it would as part of a larger one.

    Returns:
      The new tokens of each prompt.

    Raises:
      FieldError: a prompt is empty, or leaves no room in the context.
    """
    sampling, context = sampling or Sampling(), self.config.data.seq_len
    check_prompts(prompts, context)
    require(new_tokens >= 1, "new_tokens", new_tokens, "must be at least 1")
    tokens_BS, length_B = self._padded(prompts)
    row_B = first_row + np.arange(len(length_B), dtype=np.int32)
    longest, shortest = length_B.max(), length_B[:len(prompts)].min()
    slots = max(tokens_BS.shape[1], _shape_of(min(int(longest) + new_tokens, context), context))
    logits_BV, cache = self.prefill(self.empty_cache(len(row_B), slots), tokens_BS, length_B)
    row_B, position_B = self.put(row_B, length_B)
    choice = (jnp.float32(sampling.temperature), jnp.int32(sampling.top_k),
              jnp.float32(sampling.top_p), jax.random.key(sampling.seed))
    found, ended_B = [], np.arange(len(length_B)) >= len(prompts)
    for number in range(min(new_tokens, context - int(shortest))):
      if number:
        # A row at the end of the context stays there; its extra tokens are cut off below.
        logits_BV, cache = self.decode(cache, found[-1], position_B)
        position_B = self._next(position_B)
      found.append(self._choose(logits_BV, row_B, position_B, *choice))
      if (end is not None or ended) and number % _LOOK_EVERY == _LOOK_EVERY - 1:
        made_BN = np.asarray(jnp.stack(found, axis=1))
        ended_B = ended_B | (made_BN == end).any(1)
        for row in np.flatnonzero(~ended_B) if ended else ():
          ended_B[row] = ended(made_BN[row].tolist())
        if ended_B.all():
          break
    made_BN = np.asarray(jnp.stack(found, axis=1))
    return [_until(row[:context - len(prompt)].tolist(), end)
            for prompt, row in zip(prompts, made_BN, strict=False)]

  def _padded(self, prompts) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts to one of a few lengths, and the batch to a multiple of the devices."""
    n_devices = mesh_size(self.mesh)
    batch = -(-len(prompts) // n_devices) * n_devices
    length_B = np.array([len(prompt) for prompt in prompts] + [1] * (batch - len(prompts)),
                        np.int32)
    tokens_BS = np.zeros((batch, _shape_of(int(length_B.max()), self.config.data.seq_len)),
                         np.int32)
    for row, prompt in enumerate(prompts):
      tokens_BS[row, :len(prompt)] = prompt
    return tokens_BS, length_B

  def put(self, *arrays):
    """Puts arrays on the devices, split by row."""
    return jax.device_put(arrays, self._rows)

  @functools.cached_property
  def _prefill(self):
    return self._compile(cached.prefill)

  @functools.cached_property
  def _decode(self):
    return self._compile(cached.decode)

  @functools.cached_property
  def _next(self):
    last = self.config.data.seq_len - 1
    return jax.jit(lambda position_B: jnp.minimum(position_B + 1, last), out_shardings=self._rows)

  @functools.cached_property
  def _choose(self):
    return jax.jit(choose, out_shardings=self._rows)

  def _compile(self, function):
    config, mesh = self.config, self.mesh

    def step(params, router, cache, tokens, numbers):
      return function(config, params, router, cache, tokens, numbers, mesh)

    cache = cached.Cache(*[batch_sharding(mesh, axis=1)] * 2)
    return jax.jit(step, donate_argnums=2, out_shardings=(self._rows, cache))


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
  """Raises FieldError where a prompt is empty or leaves no room for one more token."""
  for prompt in prompts:
    require(len(prompt) > 0, "generate", "", "is an empty prompt: give at least one token")
    if len(prompt) >= context:
      raise FieldError("generate", f"a prompt of {len(prompt)} tokens", f"must be at most "
                       f"{context - 1}: the context is data.seq_len={context} tokens, one of "
                       "them to generate")


def choose(logits_BV: jax.Array, row_B: jax.Array, position_B: jax.Array, temperature, top_k,
           top_p, key) -> jax.Array:
  """Chooses the next token of each row, int32.

  Each draw's key is folded from the row's number and position. A token must be in both the top_k
  and the top_p set; top_p applies to the probabilities of all tokens at this temperature (the
  nucleus of arXiv 1904.09751, section 3.1).
  """
  scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
  order_BV = jnp.argsort(-scaled_BV, axis=-1)
  sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
  prob_BV = jax.nn.softmax(sorted_BV)
  before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
  rank_V = jnp.arange(logits_BV.shape[-1])
  kept_BV = (rank_V < jnp.where(top_k > 0, top_k, rank_V.size)) & (before_BV < top_p)
  kept_BV = kept_BV.at[:, 0].set(True)  # even if rounding excludes it

  def draw(row, position, logit_V):
    return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), position),
                                  logit_V)

  drawn_B = jax.vmap(draw)(row_B, position_B, jnp.where(kept_BV, sorted_BV, -jnp.inf))
  rank_B = jnp.where(temperature > 0, drawn_B, 0)
  return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _shape_of(length: int, context: int) -> int:
  """Rounds `length` up to a power of two, at least _LEAST_SLOTS and at most the context."""
  return min(context, max(_LEAST_SLOTS, 2 ** math.ceil(math.log2(length))))


def _until(tokens: list[int], end: int | None) -> list[int]:
  return tokens[:tokens.index(end)] if end in tokens else tokens
