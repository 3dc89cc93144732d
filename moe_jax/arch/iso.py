"""The iso-N_total solver: finds integer architectures of a given exact size.

To compare shapes at equal N_total, one fixes N_total, varies n_exp, n_topk or granularity, and
holds the rest constant. That leaves three integers, n_layers, d_model and d_expert, which are
determined by three constraints:

    N_total                         within `tolerance_ppm`, counted exactly
    depth against width             `aspect` (d_model / n_layers) or `n_layers` is held
    experts against attention       `granularity` (d_model / d_expert) or `n_active` is held

A held `n_layers` is exact and a held `n_active` has a tolerance of its own; aspect and granularity
are ratios of integers and may shift by a factor of at most 1 + `max_shift` either way. Of all
shapes that satisfy the constraints, the solver returns the one whose held ratios shift least:

    minimize hypot(ln(aspect / held aspect), ln(granularity / held granularity))

with a term for each ratio that is held. Ties go to the smallest sum of |residual| /
tolerance, then to fewer layers, then to the narrower model. The search is exhaustive, so the
returned shape is optimal; if there is none, `IsoRefused` is raised.

Heads, grouped queries, shared experts, dense first layers and the vocabulary come from a
template, including n_heads. If it sets no head_dim, heads fill d_model, which must then also be
a multiple of 2 * n_heads (rotary embeddings rotate pairs).
"""

import contextlib
import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.arch import count
from moe_jax.arch.architecture import Architecture
from moe_jax.arch.iso_search import Cells, Found, Shapes, Space, TooManyShapes, search
from moe_jax.errors import FieldError, require

# Larger values make no sense and would overflow int64.
_LARGEST = {"n_total": 10**15, "n_active": 10**15, "n_exp": 10**5, "n_topk": 10**5,
            "n_layers": 10**5}
# The search tries small shifts of the held ratios first, as fractions of max_shift; most cells
# need no more.
_FIRST_SHIFTS = (1 / 16, 1 / 4)


@dataclasses.dataclass(frozen=True)
class IsoLimits:
  """The constraints that a solution must satisfy.

  Attributes:
    d_model_multiple: d_model is a multiple of it. 128 fills the lanes of a TPU.
    d_expert_multiple: d_expert is a multiple of it. Coarser multiples suit the hardware
      better but can match fewer sizes.
    tolerance_ppm: maximum |residual| of n_total, in parts per million.
    n_active_tolerance_ppm: the same for n_active, if it is held.
    max_shift: 0.25 allows a held aspect or granularity to end up anywhere between 1/1.25 and
      1.25 times the requested value.
  """

  d_model_multiple: int = 64
  d_expert_multiple: int = 8
  tolerance_ppm: float = 5000.0
  n_active_tolerance_ppm: float = 20_000.0
  max_shift: float = 0.25

  def __post_init__(self):
    for name in ("d_model_multiple", "d_expert_multiple"):
      require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    for name in ("tolerance_ppm", "n_active_tolerance_ppm"):
      require(0 < getattr(self, name) <= 1e6, name, getattr(self, name),
              "must be above 0 and at most 1e6")
    require(0 <= self.max_shift <= 3, "max_shift", self.max_shift,
            "must lie between 0 and 3")


@dataclasses.dataclass(frozen=True)
class IsoSolution:
  """A shape, and its deviations from the requested values.

  Attributes:
    arch: the architecture.
    residual_ppm: (its n_total / asked - 1) * 1e6, by the exact count.
    n_active_residual_ppm: the same for n_active; None if not held.
    aspect_shift: its d_model / n_layers over the held aspect, minus 1; None if not held.
    granularity_shift: its granularity over the held one, minus 1; None if not held.
  """

  arch: Architecture
  residual_ppm: float
  n_active_residual_ppm: float | None
  aspect_shift: float | None
  granularity_shift: float | None

  def __str__(self) -> str:
    arch = self.arch
    parts = [f"n_layers={arch.n_layers} d_model={arch.d_model} d_expert={arch.d_expert}",
             f"n_total {self.residual_ppm:+.1f} ppm"]
    if self.n_active_residual_ppm is not None:
      parts.append(f"n_active {self.n_active_residual_ppm:+.1f} ppm")
    for name in ("aspect", "granularity"):
      shift = getattr(self, name + "_shift")
      if shift is not None:
        parts.append(f"{name} {100 * shift:+.3g}%")
    return ", ".join(parts)


class IsoRefused(FieldError):
  """No shape satisfies the constraints.

  Attributes:
    nearest: the shape closest in size within `max_shift` (if there is none of any size, within
      4 * max(max_shift, 0.1)). If n_active is held, n_total is within its tolerance if possible.
      None only if the lattice is too fine to be searched that far.
    further: the nearest shape within tolerance beyond `max_shift`; None if there is none
      within 4 * max(max_shift, 0.1).
  """

  def __init__(self, field: str, value: object, accepted: str,
               nearest: IsoSolution | None = None, further: IsoSolution | None = None):
    super().__init__(field, value, accepted)
    self.nearest, self.further = nearest, further

  def under(self, prefix: str) -> "IsoRefused":
    return IsoRefused(f"{prefix}.{self.field}", self.value, self.accepted, self.nearest,
                      self.further)


@dataclasses.dataclass(frozen=True, eq=False)
class IsoGrid:
  """The solutions of many cells, as arrays [N]; the shape is 0 for a cell without a solution.

  `grid[i]` is the IsoSolution of cell i, or raises its IsoRefused, which is computed lazily.

  Attributes:
    n_layers, d_model, d_expert: the shapes, int64.
  """

  n_layers: np.ndarray
  d_model: np.ndarray
  d_expert: np.ndarray
  _cells: Cells
  _template: Architecture
  _limits: IsoLimits

  @property
  def solved(self) -> np.ndarray:
    """Which cells have a solution."""
    return self.n_layers > 0

  @property
  def residual_ppm(self) -> np.ndarray:
    """(n_total / asked - 1) * 1e6 of every cell, by the exact count; NaN without a solution."""
    asked = self._cells.n_total
    shapes = Shapes(self._template, self.n_layers, self.d_model, self.d_expert,
                    self._cells.n_exp, self._cells.n_topk)
    return np.where(self.solved, (count.n_total(shapes) - asked) / asked * 1e6, np.nan)

  def __len__(self) -> int:
    return len(self.n_layers)

  def __getitem__(self, index: int) -> IsoSolution:
    index = range(len(self))[index]
    cell = self._cells.take(slice(index, index + 1))
    if not self.solved[index]:
      raise _refusal(cell, self._template, self._limits)
    return _solution(cell, self._template, self.n_layers[index], self.d_model[index],
                     self.d_expert[index])


def solve(*, template: Architecture, n_total: int, n_exp: int, n_topk: int,
          aspect: float | None = None, n_layers: int | None = None,
          granularity: float | None = None, n_active: int | None = None,
          limits: IsoLimits | None = None) -> IsoSolution:
  """Finds the best architecture of this size, as defined in the module's docstring.

  Args:
    template: provides heads, shared experts, dense layers, vocabulary and weight tying.
    n_total: parameters without embedding and head.
    n_exp, n_topk: routed experts, and those a token is sent to. 1 and 1 is a dense model.
    aspect, n_layers: hold one of them.
    granularity, n_active: hold one of them.
    limits: multiples, tolerances and maximum shift of held ratios.

  Raises:
    FieldError: a value is invalid.
    IsoRefused: no shape satisfies the constraints; names the reason and the nearest shape.
  """
  grid = solve_grid(template=template, n_total=n_total, n_exp=n_exp, n_topk=n_topk,
                    aspect=aspect, n_layers=n_layers, granularity=granularity,
                    n_active=n_active, limits=limits)
  require(len(grid) == 1, "n_total", n_total, "solve takes one cell; solve_grid takes many")
  return grid[0]


def solve_grid(*, template: Architecture, n_total: ArrayLike, n_exp: ArrayLike,
               n_topk: ArrayLike, aspect: ArrayLike | None = None,
               n_layers: ArrayLike | None = None, granularity: ArrayLike | None = None,
               n_active: ArrayLike | None = None,
               limits: IsoLimits | None = None) -> IsoGrid:
  """`solve` for many cells at once.

  Numbers and 1-D arrays may be mixed; all arrays have the same length, the number of cells. The
  same quantities are held in all cells.

  Raises:
    FieldError: a value is invalid, in any cell. A cell without a solution does
      not raise: it is False in `solved`, and `grid[i]` raises the reason.
  """
  limits = limits or IsoLimits()
  cells = _cells(template, n_total=n_total, n_exp=n_exp, n_topk=n_topk, aspect=aspect,
                 n_layers=n_layers, granularity=granularity, n_active=n_active)
  shape = np.zeros((3, len(cells)), np.int64)
  open_cells = np.arange(len(cells))
  for fraction in (*_FIRST_SHIFTS, 1):
    if not len(open_cells):
      break
    shift = limits.max_shift * fraction
    try:
      found = search(cells.take(open_cells), _space(template, limits, shift), "distance")
    except TooManyShapes:
      raise FieldError("d_model_multiple", limits.d_model_multiple, "the window holds "
                       "millions of shapes: take coarser multiples or a smaller max_shift"
                       ) from None
    # Shapes outside the window are further away than its edge.
    best = (found.distance <= np.log1p(shift)) | ((fraction == 1) & (found.n_layers > 0))
    shape[:, open_cells[best]] = np.stack(
        [found.n_layers, found.d_model, found.d_expert])[:, best]
    open_cells = open_cells[~best]
  return IsoGrid(*shape, cells, template, limits)


def _space(template: Architecture, limits: IsoLimits, shift: float, **most_misfit) -> Space:
  """The search space in which held ratios may shift by a factor of up to 1 + shift."""
  heads_multiple = 1 if template.head_dim else 2 * template.n_heads
  return Space(template, math.lcm(limits.d_model_multiple, heads_multiple),
               limits.d_expert_multiple, limits.tolerance_ppm / 1e6,
               limits.n_active_tolerance_ppm / 1e6, shift, **most_misfit)


def _cells(template: Architecture, **asked: ArrayLike | None) -> Cells:
  """Checks the requested values and broadcasts them to all cells."""
  for pair in (("aspect", "n_layers"), ("granularity", "n_active")):
    require(sum(asked[name] is not None for name in pair) == 1, pair[0], asked[pair[0]],
            f"hold either {pair[0]} or {pair[1]}, which is {asked[pair[1]]}")
  columns = {name: np.asarray(value) for name, value in asked.items() if value is not None}
  sizes = {column.size for column in columns.values() if column.ndim == 1}
  require(all(column.ndim <= 1 for column in columns.values()) and len(sizes) <= 1,
          "n_total", asked["n_total"], "must be a number or an array [N], as all others")
  n_cells = sizes.pop() if sizes else 1
  for name, column in columns.items():
    column = np.broadcast_to(column, (n_cells,))

    def refuse_where(bad, accepted, name=name, column=column):
      if np.any(bad):
        raise FieldError(name, column[np.argmax(bad)].item(), accepted)

    require(column.dtype.kind in "iuf", name, asked[name], "must be a number")
    refuse_where(~np.isfinite(column), "must be finite")
    if name in ("aspect", "granularity"):
      refuse_where((column < 1e-3) | (column > 1e5), "must lie between 0.001 and 100000")
      columns[name] = column.astype(np.float64)
      continue
    refuse_where(column != np.floor(column), "must be a whole number")
    refuse_where((column < 1) | (column > _LARGEST[name]),
                 f"must lie between 1 and {_LARGEST[name]:g}")
    if name == "n_layers":
      refuse_where(column <= template.n_dense_layers, "must be above the template's "
                   f"n_dense_layers, which is {template.n_dense_layers}")
    if name == "n_topk":
      refuse_where(column > columns["n_exp"], "must be at most n_exp")
      refuse_where((asked["n_active"] is not None) & (column == columns["n_exp"]),
                   "is n_exp: all parameters are active, so hold granularity, not n_active")
    columns[name] = column.astype(np.int64)
  return Cells(**{name: columns.get(name) for name in asked})


def _solution(cell: Cells, template: Architecture, n_layers, d_model,
              d_expert) -> IsoSolution:
  arch = dataclasses.replace(
      template, n_layers=int(n_layers), d_model=int(d_model), d_expert=int(d_expert),
      n_exp=int(cell.n_exp[0]), n_topk=int(cell.n_topk[0]))

  def off(found, asked):
    return None if asked is None else found / asked[0].item() - 1

  n_total, active = cell.n_total[0].item(), None
  if cell.n_active is not None:
    n_active = cell.n_active[0].item()
    active = (count.n_active(arch) - n_active) / n_active * 1e6
  return IsoSolution(arch, (count.n_total(arch) - n_total) / n_total * 1e6, active,
                     off(arch.d_model / arch.n_layers, cell.aspect),
                     off(arch.granularity, cell.granularity))


def _sure_misfit(cell: Cells, space: Space) -> float:
  """An upper bound on the least misfit, in tolerances, over shapes of any size in the window.

  It is derived from a lattice shape near the held ratios, with a generous margin.
  """
  least, fine, step = space.fewest_layers, cell.granularity, space.d_expert_multiple
  width_for_depth = 0 if cell.aspect is None else cell.aspect[0] * least
  width_for_expert = 0 if fine is None else fine[0] * step
  d_model = space.d_model_multiple * max(
      1.0, np.ceil(max(width_for_depth, width_for_expert) / space.d_model_multiple))
  n_layers = cell.n_layers[0] if cell.aspect is None else max(least, d_model / cell.aspect[0])
  d_expert = step if fine is None else max(step, d_model / fine[0])
  shape = Shapes(space.template, float(n_layers), d_model, float(d_expert), cell.n_exp,
                 cell.n_topk)
  size = 1000 * max(cell.n_total[0], count.n_total(shape)[0])
  enough = size / cell.n_total[0] / space.tolerance
  if cell.n_active is not None:
    enough = max(enough, size / cell.n_active[0] / space.n_active_tolerance)
  return enough


def _nearest(cell: Cells, template: Architecture, limits: IsoLimits) -> IsoSolution | None:
  """The shape of least misfit inside the window, of any size.

  If n_active is held, n_total stays within its tolerance if possible. If there is no shape
  of any size in the window, the window is widened.
  """
  ways = [("most_misfit", "n_active_most_misfit")]
  if cell.n_active is not None:
    ways.insert(0, ("n_active_most_misfit",))
  for shift in (limits.max_shift, 4 * _movable(limits)):
    enough = _sure_misfit(cell, _space(template, limits, shift))
    for loosened in ways:
      for misfit in 2.0 ** np.arange(1, 2 + math.log2(enough)):
        space = _space(template, limits, shift, **dict.fromkeys(loosened, misfit))
        found = search(cell, space, "misfit")
        # Shapes outside this space are off by more than `misfit` tolerances.
        if found.misfit[0] <= misfit:
          return _of(found, cell, template)
  return None


def _movable(limits: IsoLimits) -> float:
  return max(limits.max_shift, 0.1)


def _further(cell: Cells, template: Architecture, limits: IsoLimits) -> IsoSolution | None:
  """The nearest shape within tolerance if held ratios may shift further than allowed."""
  if cell.aspect is None and cell.granularity is None:
    return None
  for shift in (2 * _movable(limits), 4 * _movable(limits)):
    found = search(cell, _space(template, limits, shift), "distance")
    if found.distance[0] <= math.log1p(shift):
      break
  return _of(found, cell, template)


def _of(found: Found, cell: Cells, template: Architecture) -> IsoSolution | None:
  if not found.n_layers[0]:
    return None
  return _solution(cell, template, found.n_layers[0], found.d_model[0], found.d_expert[0])


def _reason(cell: Cells, limits: IsoLimits) -> tuple[str, int, str, bool]:
  """Returns (field, value, reason, whether larger shifts of the held ratios could help)."""
  n_total = cell.n_total[0].item()
  if cell.n_active is None:
    return "n_total", n_total, f"no shape is within {limits.tolerance_ppm:g} ppm", True
  n_active = cell.n_active[0].item()
  used = n_total * cell.n_topk[0] / cell.n_exp[0]
  if n_active >= n_total:
    return "n_active", n_active, f"must be below n_total, which is {n_total}", False
  if n_active <= used:
    return ("n_active", n_active, "must be above n_total * n_topk / n_exp, the part of the "
            f"experts that a token uses, which is {used:.0f}", False)
  return ("n_active", n_active, f"no shape is within {limits.n_active_tolerance_ppm:g} ppm "
          f"with n_total within {limits.tolerance_ppm:g} ppm of {n_total}", True)


def _refusal(cell: Cells, template: Architecture, limits: IsoLimits) -> IsoRefused:
  """Explains why a cell has no solution and finds the nearest shapes."""
  field, value, reason, may_help = _reason(cell, limits)
  nearest = further = None
  with contextlib.suppress(TooManyShapes):
    nearest = _nearest(cell, template, limits)
  with contextlib.suppress(TooManyShapes):
    further = _further(cell, template, limits) if may_help else None
  multiple = _space(template, limits, limits.max_shift).d_model_multiple
  held = [f"n_exp={cell.n_exp[0]}", f"n_topk={cell.n_topk[0]}"]
  if cell.n_layers is not None:
    held.append(f"n_layers={cell.n_layers[0]}")
  held += [f"{name} within a factor {1 + limits.max_shift:g} of {asked[0]:g}"
           for name in ("aspect", "granularity") if (asked := getattr(cell, name)) is not None]
  held += [f"d_model a multiple of {multiple}, d_expert of {limits.d_expert_multiple}"]
  text = f"{reason} ({', '.join(held)})"
  if nearest:
    text += f"; nearest: {nearest}"
  if further:
    text += f"; within tolerance but beyond max_shift: {further}"
  return IsoRefused(field, value, text, nearest, further)
