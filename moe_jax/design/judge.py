"""Wraps a law as the judge of a search, which scores many shapes; lower is better.

A score is ln L. Ling's law does not predict a loss but the leverage EL of an MoE over a dense
model: a dense model trained with EL C FLOPs is as good as an MoE trained with C. As the loss of
dense models scales as compute^-0.05 (Kaplan et al., arXiv 2001.08361), its score is
-0.05 ln(EL C), which equals ln L up to a constant.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.errors import FieldError
from moe_jax.laws.fit import Fit
from moe_jax.laws.information import design_of
from moe_jax.laws.law import LOSS, Law, Training
from moe_jax.laws.registry import LAWS
from moe_jax.laws.shape import Shape
from moe_jax.laws.validate import leave_one_architecture_out

# Published laws come without covariances. Given their rounded coefficients and their residuals,
# half a percent of the loss is an optimistic uncertainty.
TOLERANCE = 0.005
LEVEL = 0.95
COMPUTE_EXPONENT = 0.05


@dataclasses.dataclass(frozen=True)
class Judge:
  """A law bound to a training budget.

  Attributes:
    name: the law's name.
    source: where it comes from.
    is_loss: whether exp(score) is a loss; otherwise exp(-score / COMPUTE_EXPONENT) is the
      FLOPs that a dense model would need for the same loss.
    sees: the project's names of the quantities it depends on.
    score: Shape -> array.
    inside: Shape -> bools, whether it lies within the recorded ranges and assumptions.
    on_record: whether every variable's range is recorded.
    notes: Shape -> lines on how it lies outside them, and the law's caveat.
    slack: (Shape, Shape of the best) -> how far above the best a score may be without the law
      distinguishing the two; broadcasts.
    slack_text: description of the slack.
  """

  name: str
  source: str
  is_loss: bool
  sees: tuple[str, ...]
  score: Callable[[Shape], np.ndarray]
  inside: Callable[[Shape], np.ndarray]
  on_record: bool
  notes: Callable[[Shape], tuple[str, ...]]
  slack: Callable[[Shape, Shape], ArrayLike]
  slack_text: str

  def value(self, score: float) -> float:
    """Converts a score to a loss, or to equal-loss dense FLOPs."""
    return float(np.exp(score if self.is_loss else -score / COMPUTE_EXPONENT))

  def text(self, score: float) -> str:
    return f"{self.value(score):.4f}" if self.is_loss else f"{self.value(score):.3g} FLOPs"

  def change_text(self, score: float, change: float) -> str:
    """Formats a change of score as a change of loss, or of FLOPs if the law predicts no loss."""
    if self.is_loss:
      return f"{self.value(score + change) - self.value(score):+.4f}"
    return f"{100 * np.expm1(-change / COMPUTE_EXPONENT):+.1f} % FLOPs"


def of_moe(law: Law) -> bool:
  """Whether a law's assumptions allow mixtures of experts."""
  probe = Shape(n_layers=8, d_model=512, d_expert=256, n_exp=np.array([64, 64, 512]),
                n_topk=np.array([1, 8, 8]))
  return all(np.any(assumption.holds(probe)) for assumption in law.assumes)


MOE_LAWS = tuple(name for name, law in LAWS.items() if of_moe(law))


def published(law: Law, tokens: float | None, tolerance: float = TOLERANCE) -> Judge:
  """Makes a judge of a published law. Raises FieldError if it needs tokens and has none."""
  training = Training(tokens)
  is_loss = law.quantity == LOSS

  def score(shape: Shape) -> np.ndarray:
    values = law.values(shape, training)
    if is_loss:
      return np.log(values)
    return -COMPUTE_EXPONENT * np.log(values * 6 * shape.n_active * tokens)

  law.variables_of(Shape(1, 128, 128, 8, 1), training)  # fail now if a variable is missing
  return Judge(law.name, law.source, is_loss, law.sees, score,
               lambda shape: law.inside(shape, training), law.on_record,
               lambda shape: law.predict(shape, tokens).outside,
               lambda shape, best: tolerance,
               f"{100 * tolerance:.2g} % (a tolerance; no covariance is published)")


def fitted(fit: Fit, tokens: float) -> Judge:
  """Makes a judge of a law of one's own.

  Its slack is a one-sided 95 % bound on the difference of two scores: the covariance of the
  parameters is from the jackknife over architectures, and the scatter of single runs around the
  fit counts twice, once for each of the two models.

  Raises:
    FieldError: the data do not identify a shape coefficient, on which the search would rest, or
      the law cannot be refitted without one of the architectures.
  """
  from scipy import stats
  _require_identified(fit)
  covariance_PP, df = jackknife(fit)
  other_tokens = _other_tokens(fit, tokens)
  quantile = stats.t.ppf(LEVEL, df)

  def slack(shape: Shape, best: Shape) -> np.ndarray:
    ours, its = (design_of(fit.form, Fit.cells_of(s, tokens), fit.least_squares.theta).x_NP
                 for s in (shape, best))
    apart_NP = ours - its
    variance_N = np.einsum("np,pq,nq->n", apart_NP, covariance_PP, apart_NP)
    # No scatter between a model and itself.
    other_N = np.any(apart_NP != 0, axis=1)
    return quantile * np.sqrt(variance_N + 2 * fit.scatter_of_one_run**2 * other_N)

  def inside(shape: Shape) -> np.ndarray:
    asked, data = Fit.cells_of(shape, tokens).columns, fit.cells.columns
    return np.all([(0.999 * data[column].min() <= asked[column])
                   & (asked[column] <= 1.001 * data[column].max())
                   for column in fit.identified.asked.columns], axis=0)

  def notes(shape: Shape) -> tuple[str, ...]:
    return fit.predict(shape, tokens).outside + other_tokens

  return Judge(
      fit.form.name, f"fitted to {len(fit.cells)} cells", True, fit.form.columns,
      lambda shape: fit.log_loss(Fit.cells_of(shape, tokens)),
      inside, True, notes, slack,
      f"{100 * LEVEL:g} %, parameters (jackknife over {fit.cells.n_architectures} "
      "architectures) and residual scatter")


def _require_identified(fit: Fit) -> None:
  for term in fit.identified.asked.terms:
    for name, basis in term.items():
      if name in fit.identified.refused and set(basis.columns) - {"tokens"}:
        raise FieldError("law", fit.form.name, f"these data do not identify {name} "
                         f"({fit.identified.refused[name]}), and the search depends on it: "
                         "choose a form that they identify, or add runs that vary it")


def _other_tokens(fit: Fit, tokens: float) -> tuple[str, ...]:
  trained = fit.cells.columns["tokens"]
  if "tokens" in fit.form.columns or trained.min() <= 1.1 * tokens <= 1.21 * trained.max():
    return ()
  return (f"it has no variable for tokens: it was fitted at {trained.min():.4g} tokens, and "
          f"{tokens:.4g} were requested",)


def jackknife(fit: Fit) -> tuple[np.ndarray, int]:
  """Jackknife over architectures: covariance of the estimates [P, P] and degrees of freedom.

  Raises:
    FieldError: the law cannot be refitted without one of the architectures. Such architectures
      are the most influential, so skipping them would understate the covariance.
  """
  parts = leave_one_architecture_out(fit)
  impossible = [part for part in parts if part.theta is None]
  if impossible:
    others = f"; likewise without {len(impossible) - 1} others" * (len(impossible) > 1)
    raise FieldError("law", fit.form.name, f"has no covariance: {impossible[0].refusal}{others}")
  theta_GP = np.array([part.theta for part in parts])
  apart_GP = theta_GP - theta_GP.mean(axis=0)
  return apart_GP.T @ apart_GP * (len(parts) - 1) / len(parts), len(parts) - 1
