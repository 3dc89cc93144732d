"""Answers the requests of lm-evaluation-harness, text in and text out, without importing it.

As in training, every context starts with the token that begins a document. This corresponds to
`add_bos_token=True` of the harness's Hugging Face model; as there, inputs that are too long are
truncated from the left.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import FieldError, require
from moe_jax.evaluate.decode import Decoder
from moe_jax.evaluate.harness.scoring import Score, Scorer, batch_size
from moe_jax.evaluate.sampling import Sampling
from moe_jax.mesh import mesh_size

NEW_TOKENS = 256  # if a request sets no length; the harness's default
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION_FIELDS = (*_LENGTH_NAMES, "until", "do_sample", "temperature", "top_k", "top_p",
                      "seed")


class Generation(NamedTuple):
  """The generation settings of a request.

  Attributes:
    new_tokens: maximum number of new tokens.
    stops: stop strings; the continuation ends before the first occurrence of any.
    sampling: how tokens are chosen.
  """

  new_tokens: int
  stops: tuple[str, ...]
  sampling: Sampling


class Answerer:
  """Scores and continues texts with a model and its tokenizer."""

  def __init__(self, decoder: Decoder, tokenizer: Tokenizer):
    self._decoder, self._tokenizer = decoder, tokenizer
    self._scorer = Scorer(decoder)

  def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores (context, continuation) pairs; see encode_pair."""
    return self._scorer.score([encode_pair(self._tokenizer, *pair) for pair in pairs])

  def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
    """Returns the log-likelihoods of whole texts; see windows."""
    context = self._decoder.config.data.seq_len
    start = self._tokenizer.document_start_id
    of_text = [windows(self._tokenizer.encode(text).tolist(), start, context) for text in texts]
    scores = iter(self._scorer.score([pair for found in of_text for pair in found]))
    return [sum(next(scores).loglikelihood for _ in found) for found in of_text]

  def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Continues (context, settings) requests, without the stop strings; see parse_generation.

    A context is truncated from the left to leave room for the new tokens.

    Raises:
      FieldError: a setting is unknown, or the new tokens alone fill the context.
    """
    context = self._decoder.config.data.seq_len
    found = [""] * len(requests)
    by_setting: dict[Generation, list[int]] = {}
    for number, (_, settings) in enumerate(requests):
      by_setting.setdefault(parse_generation(settings, context), []).append(number)
    for generation, numbers in by_setting.items():
      kept = context - generation.new_tokens
      prompts = {number: [self._tokenizer.document_start_id,
                          *self._tokenizer.encode(requests[number][0]).tolist()][-kept:]
                 for number in numbers}
      for number, text in self._continue(prompts, generation).items():
        found[number] = text
    return found

  def _continue(self, prompts: dict[int, list[int]], generation: Generation) -> dict[int, str]:
    """Continues prompts sorted by length, in batches of one size."""
    numbers = sorted(prompts, key=lambda number: -len(prompts[number]))
    size = batch_size(len(numbers), self._scorer.batch_tokens // self._decoder.config.data.seq_len,
                      mesh_size(self._decoder.mesh))
    found = {}
    for start in range(0, len(numbers), size):
      chosen = numbers[start:start + size]
      rows = [prompts[number] for number in chosen]
      made = self._decoder.generate(
          rows + rows[-1:] * (size - len(rows)), generation.new_tokens, generation.sampling,
          end=self._tokenizer.document_start_id,
          ended=lambda tokens: is_stopped(self._tokenizer.decode(tokens), generation.stops),
          first_row=start)
      found |= {number: cut(self._tokenizer.decode(tokens), generation.stops)
                for number, tokens in zip(chosen, made, strict=False)}
    return found


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str
                ) -> tuple[list[int], list[int]]:
  """Returns token ids of a context, which begins a document, and of its continuation.

  A word's token includes the space before it, so whitespace at the end of the context moves to
  the continuation. Both are then tokenized together, and the continuation gets the tokens after
  as many as the context alone has.
  """
  words = context.rstrip()
  continuation, context = context[len(words):] + continuation, words
  before = [tokenizer.document_start_id, *tokenizer.encode(context).tolist()]
  whole = [tokenizer.document_start_id, *tokenizer.encode(context + continuation).tolist()]
  return before, whole[len(before):]


def windows(tokens: Sequence[int], start: int, context: int) -> list[tuple[list[int], list[int]]]:
  """Returns (context, continuation) pairs that score each token of a text once.

  The first window scores `context` tokens after the token `start`. Each further window scores
  `context` new tokens after one known token; the last one may have fewer, and then as long a
  context as fits.
  """
  found, done = [], 0
  while done < len(tokens):
    end = min(done + context, len(tokens))
    before = [start] if done == 0 else tokens[max(0, end - context - 1):done]
    found.append((list(before), list(tokens[done:end])))
    done = end
  return found


def parse_generation(settings: Mapping[str, Any], context: int) -> Generation:
  """Parses a task's generation_kwargs. Raises FieldError for the field `tasks`."""
  for name in settings:
    require(name in _GENERATION_FIELDS, "tasks", f"generation_kwargs.{name}",
            f"is not supported; must be one of {', '.join(_GENERATION_FIELDS)}")
  new_tokens = next((_number(settings, name, int, 0) for name in _LENGTH_NAMES
                     if settings.get(name) is not None), NEW_TOKENS)
  if not 0 < new_tokens < context:
    raise FieldError("tasks", f"max_gen_toks={new_tokens}", f"must be 1 to {context - 1}: the "
                     f"context is data.seq_len={context} tokens, and holds the prompt too")
  until = settings.get("until") or []
  until = [until] if isinstance(until, str) else until
  draws = settings.get("do_sample")
  temperature = _number(settings, "temperature", float, 1.0 if draws else 0.0)
  try:
    sampling = Sampling(0.0 if draws is False else temperature,
                        _number(settings, "top_k", int, 0), _number(settings, "top_p", float, 1.0),
                        _number(settings, "seed", int, 0))
  except FieldError as error:
    raise FieldError("tasks", f"{error.field}={error.value}", error.accepted) from None
  return Generation(new_tokens, tuple(stop for stop in until if stop), sampling)


def _number(settings: Mapping[str, Any], name: str, kind: type, default):
  value = settings.get(name)
  try:
    return default if value is None else kind(value)
  except (TypeError, ValueError):
    raise FieldError("tasks", f"generation_kwargs.{name}={value!r}", "must be a number") from None


def is_stopped(text: str, stops: Sequence[str]) -> bool:
  return any(stop in text for stop in stops)


def cut(text: str, stops: Sequence[str]) -> str:
  """Returns the text before the first stop string."""
  return text[:min((text.find(stop) for stop in stops if stop in text), default=len(text))]
