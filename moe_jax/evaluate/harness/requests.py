"""Requests of lm-evaluation-harness, answered in text, without importing it.

Every context begins a document, as in training: its first token is the one that begins documents.
That is `add_bos_token=True` of the harness's Hugging Face model; what is too long is cut from the
left as it does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import FieldError, require
from moe_jax.evaluate.decode import Decoder
from moe_jax.evaluate.harness.scoring import Score, Scorer, batch_size
from moe_jax.evaluate.sampling import Sampling
from moe_jax.mesh import mesh_size

NEW_TOKENS = 256  # where a request does not say; the harness's default
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION_FIELDS = (*_LENGTH_NAMES, "until", "do_sample", "temperature", "top_k", "top_p",
                      "seed")


class Generation(NamedTuple):
  """How a request wants to be continued.

  Attributes:
    new_tokens: at most so many.
    stops: texts; the continuation ends before the first of any.
    sampling: how tokens are chosen.
  """

  new_tokens: int
  stops: tuple[str, ...]
  sampling: Sampling


class Answerer:
  """A model and its tokenizer: texts in, loglikelihoods and texts out."""

  def __init__(self, decoder: Decoder, tokenizer: Tokenizer):
    self._decoder, self._tokenizer = decoder, tokenizer
    self._scorer = Scorer(decoder)

  def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores of (context, continuation); see encode_pair."""
    return self._scorer.score([encode_pair(self._tokenizer, *pair) for pair in pairs])

  def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
    """Loglikelihoods of whole texts; see windows."""
    context = self._decoder.config.data.seq_len
    start = self._tokenizer.document_start_id
    of_text = [windows(self._tokenizer.encode(text).tolist(), start, context) for text in texts]
    scores = iter(self._scorer.score([pair for found in of_text for pair in found]))
    return [sum(next(scores).loglikelihood for _ in found) for found in of_text]

  def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Continuations of (context, settings), without what ended them; see parse_generation.

    Of a context the last tokens are kept, so that the new ones have room.

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
    """Prompts of like lengths together, in batches of one size."""
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
  """Token ids of a context, which begins a document, and of its continuation.

  Both are cut into tokens together, for a word's token holds the space before it: spaces at the
  end of the context move to the continuation, which gets what the context's own tokens leave.
  """
  words = context.rstrip()
  continuation, context = context[len(words):] + continuation, words
  before = [tokenizer.document_start_id, *tokenizer.encode(context).tolist()]
  whole = [tokenizer.document_start_id, *tokenizer.encode(context + continuation).tolist()]
  return before, whole[len(before):]


def windows(tokens: Sequence[int], start: int, context: int) -> list[tuple[list[int], list[int]]]:
  """(context, continuation) pairs that score each token of a text once.

  The first `context` tokens follow the token `start`; each further window holds as many new
  tokens as fit behind one that is known, and the last one's context reaches back as far as it can.
  """
  found, done = [], 0
  while done < len(tokens):
    end = min(done + context, len(tokens))
    before = [start] if done == 0 else tokens[max(0, end - context - 1):done]
    found.append((list(before), list(tokens[done:end])))
    done = end
  return found


def parse_generation(settings: Mapping[str, Any], context: int) -> Generation:
  """What a task's generation_kwargs say. Raises FieldError, of `tasks`."""
  for name in settings:
    require(name in _GENERATION_FIELDS, "tasks", f"generation_kwargs.{name}",
            f"is not known here; {', '.join(_GENERATION_FIELDS)} are")
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
  """The text before the first of the stops."""
  return text[:min((text.find(stop) for stop in stops if stop in text), default=len(text))]
