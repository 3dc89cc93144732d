"""Targets for choosing the next runs: a coefficient, all of them, or an architecture choice."""

import dataclasses

import numpy as np

from moe_jax.arch import count
from moe_jax.arch.architecture import Architecture
from moe_jax.design import answer
from moe_jax.errors import FieldError, did_you_mean
from moe_jax.laws.cells import Cells
from moe_jax.laws.exchange import Target
from moe_jax.laws.forms import Form
from moe_jax.laws.information import design_of
from moe_jax.laws.power import t_quantile
from moe_jax.text import short

ALL, MEAN, CHOICE = "all", "mean", "choice"


def coefficients(name: str, form: Form, refused: dict[str, str]) -> Target:
  """Returns the target of that name: a parameter of the form, `all` or `mean`.

  `all` is the volume of the slopes' joint confidence region (D-optimality), `mean` their mean
  variance (A-optimality); both exclude intercepts.

  Raises:
    FieldError: an unknown name, or a parameter that no candidate can identify.
  """
  rows = np.eye(len(form.parameters))
  if name in (ALL, MEAN):
    slopes = [p for p in range(len(rows)) if p not in form.intercepts]
    return Target("all exponents (" + ("geometric mean over the axes of their joint region)"
                                       if name == ALL else "root mean square)"),
                  rows[slopes], volume=name == ALL)
  if name in refused:
    raise FieldError("target", name, f"no candidate identifies it: {refused[name]}; widen "
                     "--n_total, --n_exp, --sparsity or --granularity")
  if name not in form.parameters:
    known = [*form.parameters, ALL, MEAN, CHOICE]
    raise FieldError("target", name, did_you_mean(name, known))
  return Target(name, rows[[form.parameters.index(name)]])


@dataclasses.dataclass(frozen=True)
class Doubt:
  """The architectures that a fitted law cannot distinguish from its best one.

  Attributes:
    target: the loss differences between each of them and the best.
    lines: lines on what was compared.
  """

  target: Target
  lines: tuple[str, ...]


def choice(archs: list[Architecture], asked: Cells, form: Form, theta_P: np.ndarray,
           covariance_PP: np.ndarray, df: float) -> Doubt:
  """Finds the architectures whose predicted loss is indistinguishable from the best one's.

  An architecture is in doubt if 0 lies within the 95 % interval of its difference in ln L to the
  best. The interval only includes the uncertainty of the coefficients: more runs cannot reduce the
  architecture effect that the form misses.

  Args:
    archs: two or more architectures within the budget.
    asked: the same architectures as cells of the law.
    form: the fitted form.
    theta_P, covariance_PP: its coefficients and their covariance.
    df: degrees of freedom of the covariance.

  Raises:
    FieldError: none is in doubt.
  """
  predicted = form.log_loss(theta_P, asked)
  x_NP = design_of(form, asked, theta_P).x_NP
  order = np.argsort(predicted)
  best = order[0]
  apart_NP = x_NP - x_NP[best]
  half_N = t_quantile(df) * np.sqrt(np.einsum("np,pq,nq->n", apart_NP, covariance_PP, apart_NP))
  rivals = [i for i in order[1:] if predicted[i] - predicted[best] < half_N[i]]
  if not rivals:
    second = order[1]
    raise FieldError("target", CHOICE, f"is not in doubt: {_named(archs[best])} is predicted "
                     f"{100 * (predicted[second] - predicted[best]):.2g} % better than the next, "
                     f"± {100 * half_N[second]:.2g} %")
  lines = [f"best of {len(archs)} architectures by the fit: {_named(archs[best])}; {len(rivals)} "
           "others are not significantly worse:"]
  lines += [f"  {_named(archs[i])}: +{100 * (predicted[i] - predicted[best]):.2g} % ± "
            f"{100 * half_N[i]:.2g} %" for i in rivals[:5]]
  lines += [f"  and {len(rivals) - 5} more"] if len(rivals) > 5 else []
  return Doubt(Target("the differences in ln L from the best (root mean square)",
                      apart_NP[rivals]), tuple(lines))


def _named(arch: Architecture) -> str:
  return f"{answer.name(arch)} ({short(count.n_active(arch))} active)"
