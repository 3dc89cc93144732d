"""Answers a design question; the entry point for the command line and for notebooks."""

import dataclasses

from moe_jax.arch import count
from moe_jax.design import inference
from moe_jax.design.answer import Answer, answer
from moe_jax.design.budget import budgets
from moe_jax.design.inference import Serving
from moe_jax.design.judge import MOE_LAWS, TOLERANCE, Judge, fitted, published
from moe_jax.design.published import PublishedModel
from moe_jax.design.search import search
from moe_jax.design.space import VARIABLES, Space
from moe_jax.errors import FieldError, require
from moe_jax.laws.fit import Fit
from moe_jax.laws.forms import FORMS
from moe_jax.laws.law import Law
from moe_jax.laws.registry import LAWS, get_law


@dataclasses.dataclass(frozen=True)
class Question:
  """A design question.

  Attributes:
    space: the architectures to search; with `like`, its template must be that of `like`.
    serving: how the model is served.
    memory_gb: memory for weights and cache; None takes what `like` needs, or else 90 % of the
      memory of `serving.slice`.
    active_params, decode_ms, prefill_ms: inference budgets. At least one is required without
      `like`, which defaults to its decode time if chips are given, else its active parameters.
    tokens: training tokens; None takes those of `like`, or else the most in the fit's data.
    law: a published law; None asks all that were fitted on mixtures of experts.
    fit: a law of one's own, listed first.
    like: a published model that provides the budgets that are not given.
    tolerance: relative difference in loss below which a published law is taken to see a tie.
  """

  space: Space = Space()
  serving: Serving = Serving()
  memory_gb: float | None = None
  active_params: float | None = None
  decode_ms: float | None = None
  prefill_ms: float | None = None
  tokens: float | None = None
  law: str | None = None
  fit: Fit | None = None
  like: PublishedModel | None = None
  tolerance: float = TOLERANCE

  def __post_init__(self):
    require(0 < self.tolerance < 1, "tolerance", self.tolerance, "must lie between 0 and 1")
    for name in ("memory_gb", "active_params", "decode_ms", "prefill_ms", "tokens"):
      value = getattr(self, name)
      require(value is None or value > 0, name, value, "must be above 0")


def resolved(question: Question) -> Question:
  """Fills in the missing budgets of a question from `like`, the chips and the fit's data.

  Raises:
    FieldError: a budget is missing, or two contradict each other.
  """
  serving, filled = question.serving, {}
  if question.law is not None:
    law = _law(question.law)
    if question.tokens is not None and "flops" not in law.sees:
      law.require_sees("tokens")
  for name in ("decode_ms", "prefill_ms"):
    if getattr(question, name) is not None and serving.slice is None:
      raise FieldError(name, getattr(question, name), "needs --hardware, e.g. v5e-8")
  has_inference = any(getattr(question, name) is not None
                      for name in ("active_params", "decode_ms", "prefill_ms"))
  if question.like is not None:
    shape = question.space.shape(*(getattr(question.like.arch, name) for name in VARIABLES))
    filled["memory_gb"] = float(inference.memory_gb(shape, serving))
    filled["tokens"] = question.like.tokens
    if not has_inference and serving.slice is not None:
      filled["decode_ms"] = float(inference.decode_ms(shape, serving))
    elif not has_inference:
      filled["active_params"] = float(count.n_active(shape))
  elif not has_inference:
    raise FieldError("active_params", None, "is missing: give an inference budget by "
                     "--active_params, --decode_ms, --prefill_ms or --like")
  if serving.slice is not None:
    filled.setdefault("memory_gb", serving.slice.usable_gb)
  if question.fit is not None:
    filled.setdefault("tokens", float(question.fit.cells.columns["tokens"].max()))
  filled = {name: value for name, value in filled.items() if getattr(question, name) is None}
  question = dataclasses.replace(question, **filled)
  require(question.memory_gb is not None, "memory_gb", None, "is missing: give a memory "
          "budget by --memory_gb, --hardware or --like")
  if serving.slice is not None and question.memory_gb > serving.slice.usable_gb * (1 + 1e-9):
    raise FieldError("memory_gb", round(question.memory_gb, 3), f"is more than {serving.slice} "
                     f"has for weights and cache, {serving.slice.usable_gb:.4g} GB "
                     f"({100 * inference.HBM_SHARE:g} % of its memory)")
  return question


def judges(question: Question) -> tuple[Judge, ...]:
  """Returns the laws to ask, the fit first.

  Raises:
    FieldError: an unknown law, one without coefficients, or a variable that is missing.
  """
  found = [] if question.fit is None else [fitted(question.fit, question.tokens)]
  names = MOE_LAWS if question.law is None else (question.law,)
  return (*found, *(published(_law(name), question.tokens, question.tolerance)
                    for name in names))


def _law(name: str) -> Law:
  if name in FORMS and name not in LAWS:
    raise FieldError("law", name, "is a form without published coefficients: fit it with "
                     "--results, or choose one of " + ", ".join(LAWS))
  return get_law(name)


def ask(question: Question) -> tuple[Question, Answer]:
  """Returns the question with its defaults resolved, and its answer.

  Raises:
    FieldError: a budget is missing, contradictory or impossible; a law cannot be used.
  """
  question = resolved(question)
  asked = judges(question)
  limits = budgets(question.serving, question.memory_gb, question.active_params,
                   question.decode_ms, question.prefill_ms)
  extra = () if question.like is None else (question.like.arch,)
  return question, answer(search(question.space, limits, asked, extra), asked)
