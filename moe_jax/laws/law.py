"""Defines a published scaling law: its formula, its variables and the range it was fitted on."""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.arch.architecture import Architecture
from moe_jax.errors import FieldError, did_you_mean
from moe_jax.laws.shape import Shape

LOSS = "loss in nats per token"
LEVERAGE = "efficiency leverage over a dense model"


@dataclasses.dataclass(frozen=True)
class Training:
  """The training budget of a model: scalars, arrays, or None if unknown.

  Attributes:
    tokens: training tokens D.
    flops: training FLOPs C; None means 6 * n_active * tokens.
  """

  tokens: ArrayLike | None = None
  flops: ArrayLike | None = None


@dataclasses.dataclass(frozen=True)
class Variable:
  """One variable of a paper's formula.

  Attributes:
    symbol: the paper's letter, which is the formula's keyword argument.
    meaning: what the paper means by it, in a phrase.
    sees: the project's names of the quantities it depends on.
    of: (Shape, Training) -> array.
    low: smallest value the law was fitted on; None if not on record.
    high: largest value the law was fitted on; None if not on record.
  """

  symbol: str
  meaning: str
  sees: tuple[str, ...]
  of: Callable[[Shape, Training], ArrayLike]
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Assumption:
  """A condition that every model the law was fitted on satisfied."""

  text: str
  holds: Callable[[Shape], ArrayLike]


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The prediction of a law, with warnings.

  Attributes:
    law: the law's name.
    value: predicted values (0-d for one architecture).
    quantity: what `value` is, LOSS or LEVERAGE.
    outside: a line for each way in which the query lies outside what the law was fitted on,
      then the law's caveat or, for a fit of one's own, a line for each reason to distrust it
      anywhere; empty if there are none.
  """

  law: str
  value: np.ndarray
  quantity: str
  outside: tuple[str, ...]

  @property
  def loss(self) -> np.ndarray:
    """The value, if it is a loss. Raises FieldError if it is not."""
    if self.quantity != LOSS:
      raise FieldError("law", self.law, f"predicts the {self.quantity}, not a loss")
    return self.value


@dataclasses.dataclass(frozen=True)
class Law:
  """A published law. Different laws predict losses on different texts and tokenizers.

  Attributes:
    name: key in the registry.
    source: where the law and its coefficients come from.
    quantity: what it predicts, LOSS or LEVERAGE (where more is better).
    formula: a vectorized function of the paper's variables, passed by keyword.
    variables: how each is computed from a shape and a training budget.
    assumes: what held for every fitted model.
    caveat: a line added to every prediction, e.g. on ranges that are not on record.
  """

  name: str
  source: str
  quantity: str
  formula: Callable[..., np.ndarray]
  variables: tuple[Variable, ...]
  assumes: tuple[Assumption, ...] = ()
  caveat: str = ""

  @property
  def sees(self) -> tuple[str, ...]:
    """The project's names of the quantities the law depends on, e.g. n_total, tokens."""
    return tuple(dict.fromkeys(word for variable in self.variables for word in variable.sees))

  @property
  def on_record(self) -> bool:
    """Whether every variable has a recorded range; if not, `inside` may be too permissive."""
    return all((v.low, v.high) != (None, None) for v in self.variables)

  def require_sees(self, word: str) -> None:
    """Raises FieldError if the law has no variable for `word`, e.g. granularity."""
    if word not in self.sees:
      raise FieldError("law", self.name,
                       f"has no variable for {word}; it depends on {', '.join(self.sees)}")

  def at(self, **values: ArrayLike) -> np.ndarray:
    """Evaluates the formula at values of the paper's own variables.

    Raises:
      FieldError: an unknown or a missing variable.
    """
    symbols = [variable.symbol for variable in self.variables]
    for symbol in values:
      if symbol not in symbols:
        raise FieldError(symbol, values[symbol],
                         f"is not a variable of {self.name}; {did_you_mean(symbol, symbols)}")
    for variable in self.variables:
      if variable.symbol not in values:
        raise FieldError(variable.symbol, None,
                         f"is missing: {self.name} needs {variable.meaning}")
    return self.formula(**{name: np.asarray(v, float) for name, v in values.items()})

  def variables_of(self, shape: Shape, training: Training) -> dict[str, np.ndarray]:
    """Computes the paper's variables for each shape.

    Raises:
      FieldError: tokens or flops are needed and missing.
    """
    tokens = training.tokens is not None
    if "tokens" in self.sees and not tokens:
      raise FieldError("tokens", None, f"is missing: {self.name} needs training tokens D")
    if "flops" in self.sees and training.flops is None and not tokens:
      raise FieldError("flops", None, f"is missing: {self.name} needs training FLOPs C, or "
                       "tokens, to estimate them as 6 n_active tokens")
    return {v.symbol: np.asarray(v.of(shape, training), float) for v in self.variables}

  def values(self, shape: Shape, training: Training) -> np.ndarray:
    """Predicts a value for every shape without checking the fitted range; used in searches."""
    return self.formula(**self.variables_of(shape, training))

  def inside(self, shape: Shape, training: Training) -> np.ndarray:
    """Bool array: whether each shape is within all recorded ranges and meets all assumptions."""
    return ~np.any(np.stack(np.broadcast_arrays(
        np.zeros_like(self.values(shape, training), bool),
        *[bad for bad, _ in self._violations(shape, training)])), axis=0)

  def predict(self, arch: Architecture | Shape, tokens: ArrayLike | None = None,
              flops: ArrayLike | None = None) -> Prediction:
    """Predicts for one architecture or a Shape of many, with notes on the fitted range.

    Raises:
      FieldError: tokens or flops are needed and missing.
    """
    shape = Shape.of(arch) if isinstance(arch, Architecture) else arch
    training = Training(tokens, flops)
    notes = tuple(text for bad, text in self._violations(shape, training) if np.any(bad))
    return Prediction(self.name, self.values(shape, training), self.quantity,
                      notes + ((self.caveat,) if self.caveat else ()))

  def _violations(self, shape: Shape, training: Training) -> list[tuple[np.ndarray, str]]:
    """Returns (mask of violations, a line describing them) for each bound and assumption."""
    found = []
    values = self.variables_of(shape, training)
    for v in self.variables:
      x = values[v.symbol]
      if v.low is not None:
        found.append((x < v.low, f"{v.symbol} = {np.min(x):.4g} is below {v.low:.4g}, the "
                      f"minimum it was fitted on ({v.meaning})"))
      if v.high is not None:
        found.append((x > v.high, f"{v.symbol} = {np.max(x):.4g} is above {v.high:.4g}, the "
                      f"maximum it was fitted on ({v.meaning})"))
    found += [(~np.asarray(a.holds(shape), bool), f"it was fitted only with {a.text}")
              for a in self.assumes]
    return found


def tokens_variable(low: float | None = None, high: float | None = None) -> Variable:
  """D, the training tokens: the one variable that all papers define alike."""
  return Variable("D", "training tokens", ("tokens",), lambda _, t: t.tokens, low, high)
