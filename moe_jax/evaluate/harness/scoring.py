"""Scores continuations by a teacher-forced forward pass, compiled for a few shapes.

Rows are sorted by length and right-padded to one of at most four lengths. Attention is causal and
nothing is dropped, so neither the padding nor the other rows affect a row's scores.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.errors import FieldError, require
from moe_jax.evaluate.decode import Decoder
from moe_jax.mesh import batch_sharding, mesh_size, replicated
from moe_jax.model import functional
from moe_jax.model.cross_entropy import token_scores

_LEAST_LENGTH = 16  # shorter rows share a shape
_LENGTHS = 4  # a context, its half, its quarter, its eighth


class Score(NamedTuple):
  """The score of a continuation.

  Attributes:
    loglikelihood: log of its probability, in nats.
    greedy: whether each of its tokens is the most likely one.
  """

  loglikelihood: float
  greedy: bool


class Scorer:
  """Scores with the weights of a decoder, without copying them."""

  def __init__(self, decoder: Decoder):
    self._config, self._mesh = decoder.config, decoder.mesh
    self._weights = decoder.params, decoder.router
    # The tokens of an evaluation batch, which is known to fit.
    self.batch_tokens = self._config.train.batch_size * self._config.data.seq_len

  def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """Scores (context, continuation) pairs of token ids.

    A pair longer than the model's context plus one token is truncated from the left, as in
    lm-evaluation-harness's HFLM.

    Raises:
      FieldError: a context is empty, or a continuation is empty or longer than the context.
    """
    context = self._config.data.seq_len
    for before, after in pairs:
      require(len(before) > 0, "tasks", "", "gives an empty context: at least one token is needed")
      if not 0 < len(after) <= context:
        raise FieldError("tasks", f"a continuation of {len(after)} tokens", "must have 1 to "
                         f"{context}: the context is data.seq_len={context} tokens")
    rows = [([*before, *after][-(context + 1):], len(after)) for before, after in pairs]
    found: list[Score] = [Score(0.0, True)] * len(rows)
    for chosen, batch, length in batches([len(row) - 1 for row, _ in rows], context,
                                         self.batch_tokens, mesh_size(self._mesh)):
      tokens_BS = np.zeros((batch, length + 1), np.int32)
      for index, number in enumerate(chosen):
        tokens_BS[index, :len(rows[number][0])] = rows[number][0]
      nll_BS, greedy_BS = jax.device_get(self._program(
          *self._weights, *jax.device_put((tokens_BS[:, :-1], tokens_BS[:, 1:]),
                                          batch_sharding(self._mesh))))
      for index, number in enumerate(chosen):
        row, size = rows[number]
        scored = slice(len(row) - 1 - size, len(row) - 1)
        found[number] = Score(-float(nll_BS[index, scored].sum(dtype=np.float64)),
                              bool(greedy_BS[index, scored].all()))
    return found

  @functools.cached_property
  def _program(self):
    config, mesh = self._config, self._mesh

    def step(params, router, inputs_BS, targets_BS):
      x_BSD, head_DV, _ = functional.merged(config, params, router).features(
          inputs_BS, 0 * inputs_BS, mesh)
      return token_scores(x_BSD, head_DV, targets_BS, mesh)

    return jax.jit(step, out_shardings=replicated(mesh))


def batches(sizes: Sequence[int], context: int, batch_tokens: int, n_devices: int
            ) -> list[tuple[list[int], int, int]]:
  """Groups rows of these sizes into (row numbers, batch size, padded length), longest first.

  All batches of one length have the same batch size, a multiple of the number of devices: as many
  rows as `batch_tokens` allows, or fewer if there are fewer rows (see batch_size).
  """
  by_length: dict[int, list[int]] = {}
  for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
    by_length.setdefault(padded_length(sizes[number], context), []).append(number)
  found = []
  for length, numbers in by_length.items():
    batch = batch_size(len(numbers), batch_tokens // length, n_devices)
    found += [(numbers[start:start + batch], batch, length)
              for start in range(0, len(numbers), batch)]
  return found


def batch_size(n_rows: int, most: int, n_devices: int) -> int:
  """Rows per batch: on each device the power of two that holds all, or what `most` allows."""
  each = max(1, most // n_devices)
  return n_devices * min(each, 2 ** math.ceil(math.log2(-(-n_rows // n_devices))))


def padded_length(size: int, context: int) -> int:
  """Returns the smallest of the allowed lengths that holds `size` tokens, at most the context."""
  lengths = (-(-context // 2**halvings) for halvings in reversed(range(_LENGTHS)))
  return next(length for length in lengths
              if length >= min(size, context) and length >= min(_LEAST_LENGTH, context))
