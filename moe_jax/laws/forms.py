"""The functional forms a law can have, all written as ln L = logsumexp over terms of M_KNP @ theta.

Each term is the exponential of an expression linear in the parameters: A / N^alpha is
exp(ln_A - alpha ln N), a constant is exp(ln_E). With a single term ln L itself is linear; these
are the log-log forms. The solvers work only on the arrays M_KNP: K terms, N cells, P parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from moe_jax.errors import FieldError, did_you_mean
from moe_jax.laws.cells import Cells
from moe_jax.laws.registry import joint_moe
from moe_jax.laws.registry.saturation import saturated

MIN_SPREAD = np.log(1.1)  # a variable that varies by less than 10 % is treated as constant


@dataclasses.dataclass(frozen=True)
class Basis:
  """The regressor that a parameter multiplies inside the exponent of its term.

  Attributes:
    text: its text in a formula, e.g. ``-ln n_total``.
    columns: the columns of the data that it needs.
    of: Cells -> array [n].
    sign: the sign of a plain logarithm; 0 for anything else (products, squares).
  """

  text: str
  columns: tuple[str, ...]
  of: Callable[[Cells], np.ndarray]
  sign: int = 0


ONE = Basis("1", (), lambda cells: np.ones(len(cells)))


def ln(column: str, sign: int = 1) -> Basis:
  return Basis(f"{'-' if sign < 0 else ''}ln {column}", (column,),
               lambda cells: sign * cells.log(column), sign)


Term = Mapping[str, Basis]  # parameter -> its basis; exactly one parameter has ONE


@dataclasses.dataclass(frozen=True)
class Form:
  """A law whose parameters are not yet fitted.

  Attributes:
    name: key in FORMS.
    formula: the formula as a line of text.
    terms: the K terms.
  """

  name: str
  formula: str
  terms: tuple[Term, ...]

  @property
  def parameters(self) -> tuple[str, ...]:
    """The P parameter names, in the order of theta."""
    return tuple(dict.fromkeys(name for term in self.terms for name in term))

  @property
  def intercepts(self) -> tuple[int, ...]:
    """For each term, the index of the parameter that is the log of its coefficient."""
    names = self.parameters
    return tuple(next(names.index(p) for p, basis in term.items() if basis is ONE)
                 for term in self.terms)

  @property
  def is_linear(self) -> bool:
    return len(self.terms) == 1

  @property
  def columns(self) -> tuple[str, ...]:
    """The columns of the data that the form needs."""
    return tuple(dict.fromkeys(
        c for term in self.terms for basis in term.values() for c in basis.columns))

  def matrix(self, cells: Cells) -> np.ndarray:
    """Returns M_KNP for these cells."""
    names = self.parameters
    m_KNP = np.zeros((len(self.terms), len(cells), len(names)))
    for k, term in enumerate(self.terms):
      for name, basis in term.items():
        m_KNP[k, :, names.index(name)] = basis.of(cells)
    return m_KNP

  def log_loss(self, theta_P: np.ndarray, cells: Cells) -> np.ndarray:
    """Predicted ln L, [n]."""
    return log_sum(self.matrix(cells) @ theta_P)


def log_sum(z_KN: np.ndarray) -> np.ndarray:
  """Returns the logsumexp over the terms, [N]."""
  top_N = z_KN.max(axis=0)
  return top_N + np.log(np.exp(z_KN - top_N).sum(axis=0))


def _mean_log(cells: Cells, column: str) -> float:
  return float(cells.log(column).mean())


def curvature(cells: Cells, column: str) -> Basis:
  """½ (ln x - m)², with m the mean over `cells`: the linear slope is then the slope at x = e^m."""
  mean = _mean_log(cells, column)
  return Basis(f"½ (ln {column} - {mean:.3g})²", (column,),
               lambda at: (at.log(column) - mean)**2 / 2)


_PAPER: Term = {"c0": ONE, "a": ln("n_total", -1), "b_minus_c": ln("n_exp"),
                "c": ln("sparsity")}
_TOTAL_SPARSITY: Term = {p: basis for p, basis in _PAPER.items() if p != "b_minus_c"}


def _log_log(name: str, cells: Cells, formula: str, term: Term) -> Form:
  """A one-term form; adds tokens if they vary, or their effect would be ascribed to shape."""
  if "tokens" in cells.columns and np.ptp(cells.log("tokens")) >= MIN_SPREAD:
    term, formula = dict(term) | {"d": ln("tokens", -1)}, formula + " - d ln tokens"
  return Form(name, "ln L = " + formula, (term,))


def paper(cells: Cells) -> Form:
  """The log-log law that arXiv 2601.08215 implies."""
  return _log_log("paper", cells, "c0 - a ln n_total + b_minus_c ln n_exp + c ln s", _PAPER)


def paper_curved(cells: Cells) -> Form:
  """`paper` with curvature in ln s: c is then the slope at the grid's mean ln s."""
  return _log_log("paper-curved", cells, "c0 - a ln n_total + b_minus_c ln n_exp + c ln s "
                  "+ q/2 (ln s - mean)²", _PAPER | {"q": curvature(cells, "sparsity")})


def paper_active(cells: Cells) -> Form:
  """`paper_curved` plus ln n_active: does b_minus_c reflect more than fewer active parameters?"""
  return _log_log("paper-active", cells, "c0 - a ln n_total + b_minus_c ln n_exp + c ln s "
                  "+ q/2 (ln s - mean)² + active ln n_active",
                  _PAPER | {"q": curvature(cells, "sparsity"), "active": ln("n_active")})


def total_sparsity(cells: Cells) -> Form:
  """The rival without n_exp: nested in `paper` at b_minus_c = 0."""
  return _log_log("total-sparsity", cells, "c0 - a ln n_total + c ln s", _TOTAL_SPARSITY)


def total_active(cells: Cells) -> Form:
  """The rival f(N_total, N_active)."""
  return _log_log("total-active", cells, "c0 - a ln n_total - e ln n_active",
                  {"c0": ONE, "a": ln("n_total", -1), "e": ln("n_active", -1)})


def experts_or_core(cells: Cells) -> Form:
  """Tests whether more experts or fewer core dimensions raise the loss; core = l d²."""
  return _log_log("experts-or-core", cells,
                  "c0 - a ln n_total + c ln s + more_experts ln n_exp + core ln(l d²)",
                  _TOTAL_SPARSITY | {"more_experts": ln("n_exp"), "core": ln("core")})


def core_or_active(cells: Cells) -> Form:
  """Tests whether fewer core dimensions or fewer active parameters raise the loss."""
  return _log_log("core-or-active", cells,
                  "c0 - a ln n_total + c ln s + core ln(l d²) + active ln n_active",
                  _TOTAL_SPARSITY | {"core": ln("core"), "active": ln("n_active")})


_TOKENS: Term = {"ln_B": ONE, "beta": ln("tokens", -1)}
_FLOOR: Term = {"ln_E": ONE}


def paper_tokens(_: Cells) -> Form:
  """The paper's law with tokens and an irreducible term."""
  return Form("paper-tokens", "L = E + A n_total^-a n_exp^b_minus_c s^c + B / tokens^beta",
              ({"ln_A": ONE} | {p: basis for p, basis in _PAPER.items() if p != "c0"},
               _TOKENS, _FLOOR))


def chinchilla(_: Cells) -> Form:
  """Chinchilla's form in active parameters, which for a dense model are all of them."""
  return Form("chinchilla", "L = E + A / n_active^alpha + B / tokens^beta",
              ({"ln_A": ONE, "alpha": ln("n_active", -1)}, _TOKENS, _FLOOR))


def krajewski(_: Cells) -> Form:
  """Krajewski's form, arXiv 2402.07871, in g: gamma0 absorbs the factor of the paper's G = 4 g."""
  return Form("krajewski",
              "L = E + (gamma0 / g^gamma + A) / n_total^alpha + B / tokens^beta",
              ({"ln_gamma0": ONE, "gamma": ln("granularity", -1), "alpha": ln("n_total", -1)},
               {"ln_A": ONE, "alpha": ln("n_total", -1)}, _TOKENS, _FLOOR))


def _log_hat(cells: Cells) -> np.ndarray:
  hat = saturated(np.exp(cells.log("sparsity")), 1, joint_moe.E_START, joint_moe.E_MAX)
  return np.log(hat)


def _with_experts(cells: Cells, column: str) -> Basis:
  """(ln E^ - mean)(ln x - mean): centered, or it would be collinear with both factors."""
  hat, mean = float(_log_hat(cells).mean()), _mean_log(cells, column)
  return Basis(f"(ln E^ - {hat:.3g})(ln {column} - {mean:.3g})", ("sparsity", column),
               lambda at: (_log_hat(at) - hat) * (at.log(column) - mean))


def joint(cells: Cells) -> Form:
  """The joint MoE form, arXiv 2502.05172, at its published E_start and E_max.

  Its products are centered: alpha is the exponent at the mean ln E^, delta the effect of
  experts at the mean ln n_active; likewise for tokens.
  """
  experts = Basis("ln E^", ("sparsity",), _log_hat)
  return Form("joint-moe", "L = E + A E^^delta n_active^-alpha e^(gamma ln E^ ln n_active) "
              "+ B E^^omega tokens^-beta e^(zeta ln E^ ln tokens), products centered",
              ({"ln_A": ONE, "delta": experts, "alpha": ln("n_active", -1),
                "gamma": _with_experts(cells, "n_active")},
               {"ln_B": ONE, "omega": experts, "beta": ln("tokens", -1),
                "zeta": _with_experts(cells, "tokens")},
               _FLOOR))


FORMS: dict[str, Callable[[Cells], Form]] = {
    "paper": paper, "paper-curved": paper_curved, "paper-active": paper_active,
    "paper-tokens": paper_tokens,
    "total-active": total_active, "total-sparsity": total_sparsity,
    "experts-or-core": experts_or_core, "core-or-active": core_or_active,
    "chinchilla": chinchilla, "krajewski": krajewski, "joint-moe": joint,
}

# Columns that a form reads while it is built, to center its products.
_CENTERED = {"paper-curved": ("sparsity",), "paper-active": ("sparsity",),
            "joint-moe": ("sparsity", "n_active", "tokens")}


def form_for(name: str, cells: Cells) -> Form:
  """Builds the form of that name for these cells.

  Raises:
    FieldError: an unknown name, or a variable that the data lack.
  """
  if name not in FORMS:
    raise FieldError("law", name, did_you_mean(name, list(FORMS)))
  for column in _CENTERED.get(name, ()):
    _need(name, column, cells)
  form = FORMS[name](cells)
  for column in form.columns:
    _need(name, column, cells)
  return form


def _need(law: str, column: str, cells: Cells) -> None:
  if column not in cells.columns:
    raise FieldError("law", law, f"needs the column {column}, which these data lack")
