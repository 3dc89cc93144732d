"""Checks the design matrix before any fit: which parameters the data can tell apart.

A parameter is refused if its variable hardly varies or if it is collinear with others; of
collinear parameters, the combination that is identified is kept. Collinearity is diagnosed as
Belsley, Kuh and Welsch do: a condition index of 30 or more on centered columns of unit length is
harmful, and the parameters involved are those with variance-decomposition proportions above one
half in the weak directions.
"""

import dataclasses

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells
from moe_jax.laws.forms import MIN_SPREAD, ONE, Basis, Form, Term, ln

MAX_CONDITION = 30.0
MAX_SLOPE = 0.2  # above every published exponent of a loss; bounds the effect of an omitted term
# Among collinear variables, the slope is reported for the earliest in this list.
_DRIVERS = ("n_exp", "sparsity", "tokens", "n_active", "granularity", "core", "n_total")


class TooFew(FieldError):
  """Fewer cells or architectures than a form needs."""


@dataclasses.dataclass(frozen=True)
class Identified:
  """The identifiable part of a form.

  Attributes:
    asked: the form that was requested.
    form: the form that the data identify; `asked` itself if nothing is refused.
    refused: parameter -> why it is not reported, one line each.
    combinations: new parameter of `form` -> its expression in the refused ones.
    condition: largest condition index over the requested terms, columns centered and scaled.
  """

  asked: Form
  form: Form
  refused: dict[str, str]
  combinations: dict[str, str]
  condition: float

  def lines(self) -> list[str]:
    """Returns the report as lines of text."""
    found = [f"design: {self.asked.formula}",
             f"  condition index {self.condition:.3g} (harmful from {MAX_CONDITION:g})"]
    found += [f"  {p}: REFUSED, {why}" for p, why in self.refused.items()]
    found += [f"  identified instead: {p} = {what}" for p, what in self.combinations.items()]
    if not self.refused:
      found.append("  every coefficient is identified" if self.asked.is_linear else
                   "  no two variables of one term are collinear; the intervals show whether the "
                   "data bound each coefficient")
    return found


def identify(form: Form, cells: Cells) -> Identified:
  """Reduces `form` to the parameters that `cells` can identify.

  Raises:
    TooFew: fewer cells or architectures than the reduced form needs.
  """
  refused: dict[str, str] = {}
  combinations: dict[str, str] = {}
  terms = [_without_held(term, cells, refused) for term in form.terms]
  condition = 1.0
  for k, term in enumerate(terms):
    shared = {p for j, other in enumerate(terms) if j != k for p in other}
    condition = max(condition, _condition(_columns(term, cells)))
    terms[k] = _without_collinear(term, shared, cells, refused, combinations)
  terms = _merged(terms, refused)
  reduced = form if not refused else Form(form.name, form.formula, tuple(terms))
  _check_enough(reduced, cells)
  return Identified(form, reduced, refused, combinations, condition)


def _check_enough(form: Form, cells: Cells) -> None:
  """Requires more cells than parameters, and two more architectures than shape coefficients."""
  needed = len(form.parameters) + 1
  if len(cells) < needed:
    raise TooFew("results", f"{len(cells)} cells", f"too few for {form.name}: its {needed - 1} "
                 f"identifiable coefficients need {needed} or more")
  of_shape = {p for term in form.terms for p, basis in term.items()
              if basis.columns and basis.columns != ("tokens",)}
  if cells.n_architectures < len(of_shape) + 2:
    raise TooFew("results", f"{cells.n_architectures} architectures", f"too few for {form.name}: "
                 f"its {len(of_shape)} shape coefficients need {len(of_shape) + 2} or more, "
                 "regardless of tokens")


def _columns(term: Term, cells: Cells) -> np.ndarray:
  """Returns the centered columns of a term without its intercept: [n, p]."""
  columns = [basis.of(cells) for basis in term.values() if basis is not ONE]
  x_NP = np.stack(columns, axis=1) if columns else np.zeros((len(cells), 0))
  return x_NP - x_NP.mean(axis=0)


def _condition(x_NP: np.ndarray) -> float:
  """Returns the condition index of columns scaled to unit length; 1 for fewer than two columns."""
  if x_NP.shape[1] < 2:
    return 1.0
  values = np.linalg.svd(x_NP / np.linalg.norm(x_NP, axis=0), compute_uv=False)
  return float(values[0] / max(values[-1], 1e-15)) if len(x_NP) >= x_NP.shape[1] else np.inf


def _without_held(term: Term, cells: Cells, refused: dict[str, str]) -> Term:
  kept = dict(term)
  for name, basis in term.items():
    if basis is ONE:
      continue
    spread = np.ptp(basis.of(cells))
    variable = basis.text.removeprefix("-")
    # The spread of a product or a square is the product of two spreads.
    limit = MIN_SPREAD if len(basis.columns) == 1 and basis.sign else MIN_SPREAD**2 / 2
    if spread < limit or ("²" in basis.text and _levels(basis, cells) < 3):
      del kept[name]
      bound = "" if spread < 1e-9 else (f"; up to {100 * MAX_SLOPE * spread:.2g} % of the "
                                        "loss is left in the residual")
      refused[name] = f"{variable} hardly varies (by {spread:.2g}){bound}"
  return kept


def _levels(basis: Basis, cells: Cells) -> int:
  return len(np.unique(np.round(cells.log(basis.columns[0]), 6)))


def _without_collinear(term: Term, shared: set[str], cells: Cells, refused: dict[str, str],
                       combinations: dict[str, str]) -> Term:
  """Replaces a term's collinear parameters with slopes along fewer variables."""
  free = [p for p, basis in term.items() if basis is not ONE and p not in shared]
  x_NP = _columns({p: term[p] for p in free}, cells)
  if _condition(x_NP) < MAX_CONDITION:
    return term
  scaled = x_NP / np.linalg.norm(x_NP, axis=0)
  _, values, v_QP = np.linalg.svd(scaled, full_matrices=True)
  values = np.concatenate([values, np.zeros(len(free) - len(values))])
  weak = values <= values[0] / MAX_CONDITION
  parts_QP = (v_QP / np.maximum(values, 1e-12)[:, None])**2
  parts_P = parts_QP[weak].sum(axis=0) / parts_QP.sum(axis=0)
  # A weak direction involves at least two parameters: if too few exceed one half, take the largest.
  n_weak = int(weak.sum())
  tied = [j for j in range(len(free)) if parts_P[j] > 0.5]
  if len(tied) <= n_weak:
    tied = sorted(np.argsort(-parts_P)[:n_weak + 1])
  drivers = _choose_drivers([free[j] for j in tied], term, cells, len(tied) - n_weak)
  return _rewritten(term, [free[j] for j in tied], drivers, cells, refused, combinations)


def _choose_drivers(tied: list[str], term: Term, cells: Cells, n: int) -> list[str]:
  """Chooses up to `n` of the tied parameters, not collinear, in the order of `_DRIVERS`."""
  def rank(p: str) -> int:
    column = term[p].columns[0]
    return _DRIVERS.index(column) if column in _DRIVERS else len(_DRIVERS)

  drivers: list[str] = []
  for p in sorted((p for p in tied if term[p].sign), key=rank):
    tried = drivers + [p]
    if (len(drivers) < n
        and _condition(_columns({q: term[q] for q in tried}, cells)) < MAX_CONDITION):
      drivers = tried
  return drivers


def _rewritten(term: Term, tied: list[str], drivers: list[str], cells: Cells,
               refused: dict[str, str], combinations: dict[str, str]) -> Term:
  """Returns the term with the tied parameters replaced by slopes along the drivers' variables."""
  others = [p for p in tied if p not in drivers]
  x_ND = _columns({p: term[p] for p in drivers}, cells)
  share_DO = np.linalg.lstsq(x_ND, _columns({p: term[p] for p in others}, cells),
                             rcond=None)[0]
  kept = {p: basis for p, basis in term.items() if p not in tied}
  names = " and ".join(term[p].text.removeprefix("-") for p in tied)
  for p in tied:
    refused[p] = f"{names} are collinear in these data"
  for d, driver in enumerate(drivers):
    basis = term[driver]
    sign = basis.sign  # the new slope is along ln x, whatever the sign of the basis
    parts = [("" if sign > 0 else "-") + driver]
    parts += [f"{sign * share_DO[d, o]:+.3f} {p}" for o, p in enumerate(others)
              if abs(share_DO[d, o]) > 5e-4]
    slope = "slope_" + basis.columns[0]
    kept[slope] = ln(basis.columns[0])
    combinations[slope] = " ".join(parts)
  return kept


def _merged(terms: list[Term], refused: dict[str, str]) -> list[Term]:
  """Drops terms with the same exponents as an earlier one, e.g. a second constant."""
  kept: list[Term] = []
  for term in terms:
    powers = {p: basis for p, basis in term.items() if basis is not ONE}
    twin = next((k for k in kept if {p for p in k if k[p] is not ONE} == set(powers)), None)
    if twin is None:
      kept.append(term)
      continue
    first = next(p for p, basis in twin.items() if basis is ONE)
    mine = next(p for p, basis in term.items() if basis is ONE)
    refused[mine] = f"its term has the same shape as that of {first}: {first} stands for their sum"
  return kept
