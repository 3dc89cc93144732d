"""The lattice search behind the iso-N_total solver: many cells at once, in NumPy.

A shape is (n_layers, d_model, d_expert) on a lattice of multiples. Counts are affine in
n_layers and in d_expert and grow with d_model, so little has to be searched: the range of
d_model that the box of allowed shapes admits is found by bisection, for each d_model there
is an interval of n_layers, and for each pair an interval of d_expert. All pairs in the box
are examined, so the best shape found is optimal.

Suffixes: N cells, P pairs (cell, d_model), T triples (cell, d_model, n_layers).
"""

import dataclasses
import operator
from collections.abc import Callable

import numpy as np

from moe_jax.arch.architecture import Architecture
from moe_jax.arch.count import n_parameters

_EDGE = 1e-9  # relative, so that a ratio on the edge of the window counts as inside
_MARGIN = 1e-6  # slack of bounds on n_layers, for rounding; counts are checked exactly later
_CHUNK = 1024  # cells searched together, so that the arrays stay in cache
_MOST_SHAPES = 4_000_000  # examined together; about a gigabyte
_MOST_PARAMETERS = 10**17  # products below it fit into int64


class TooManyShapes(Exception):
  """One cell's window holds more lattice points than fit into memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
  """Arrays of shapes with the field names of Architecture, so that count.py works on them."""

  template: Architecture
  n_layers: np.ndarray
  d_model: np.ndarray
  d_expert: np.ndarray
  n_exp: np.ndarray
  n_topk: np.ndarray

  # The same for all shapes.
  n_heads = property(operator.attrgetter("template.n_heads"))
  n_kv_heads = property(operator.attrgetter("template.n_kv_heads"))
  head_dim = property(operator.attrgetter("template.head_dim"))
  qk_norm = property(operator.attrgetter("template.qk_norm"))
  n_shared_experts = property(operator.attrgetter("template.n_shared_experts"))
  n_dense_layers = property(operator.attrgetter("template.n_dense_layers"))
  d_dense = property(operator.attrgetter("template.d_dense"))
  # Architecture's own formulas, which also work for arrays.
  kv_heads, d_head = Architecture.kv_heads, Architecture.d_head
  qk_norm_scales = Architecture.qk_norm_scales
  n_moe_layers, dense_width = Architecture.n_moe_layers, Architecture.dense_width


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
  """The requested values, one entry per cell. Exactly one of each pair of optional fields is held.

  Attributes:
    n_total, n_exp, n_topk: int64 [N].
    aspect, n_layers: float64, int64 [N] or None.
    granularity, n_active: float64, int64 [N] or None.
  """

  n_total: np.ndarray
  n_exp: np.ndarray
  n_topk: np.ndarray
  aspect: np.ndarray | None
  n_layers: np.ndarray | None
  granularity: np.ndarray | None
  n_active: np.ndarray | None

  def take(self, index) -> "Cells":
    """The cells at `index`, as in NumPy indexing."""
    return Cells(**{field.name: None if (value := getattr(self, field.name)) is None
                    else value[index] for field in dataclasses.fields(self)})

  def __len__(self) -> int:
    return len(self.n_total)


@dataclasses.dataclass(frozen=True)
class Space:
  """The search space.

  Attributes:
    template: provides everything of the architecture that is neither requested nor searched.
    d_model_multiple, d_expert_multiple: the lattice.
    tolerance: the |n_total found / asked - 1| that counts as a misfit of 1.
    n_active_tolerance: the same for n_active, if it is held.
    shift: held ratios may shift by a factor of 1 + shift either way.
    most_misfit: maximum deviation of n_total, in tolerances.
    n_active_most_misfit: the same for n_active.
  """

  template: Architecture
  d_model_multiple: int
  d_expert_multiple: int
  tolerance: float
  n_active_tolerance: float
  shift: float
  most_misfit: float = 1.0
  n_active_most_misfit: float = 1.0

  @property
  def fewest_layers(self) -> int:
    return self.template.n_dense_layers + 1

  def slack(self, n_total: np.ndarray) -> np.ndarray:
    """Maximum deviation of n_total, in whole parameters."""
    return _whole(n_total * self.tolerance * self.most_misfit)

  def n_active_slack(self, n_active: np.ndarray) -> np.ndarray:
    """Maximum deviation of n_active, in whole parameters."""
    return _whole(n_active * self.n_active_tolerance * self.n_active_most_misfit)


def _whole(slack: np.ndarray) -> np.ndarray:
  return np.minimum(np.floor(slack), _MOST_PARAMETERS).astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """The best shape of each cell; n_layers is 0 if the space contains none.

  Attributes:
    n_layers, d_model, d_expert: int64 [N].
    distance: Euclidean norm of the logarithms of the held ratios' shifts.
    misfit: sum of |residual| / tolerance over the counts that are held.
  """

  n_layers: np.ndarray
  d_model: np.ndarray
  d_expert: np.ndarray
  distance: np.ndarray
  misfit: np.ndarray


def search(cells: Cells, space: Space, nearest: str) -> Found:
  """Finds the best shape of every cell within `space`.

  Args:
    cells: the requested values.
    space: the search space.
    nearest: what to minimize: `distance` or `misfit`; the other one breaks ties, then fewer
      layers, then the narrower model.

  Raises:
    TooManyShapes: the lattice is too fine for the window of one cell.
  """
  return _search_parts(cells, space, nearest, _CHUNK)


def _search_parts(cells: Cells, space: Space, nearest: str, size: int) -> Found:
  """`search`, `size` cells at a time."""
  parts = [_search_chunk(cells.take(slice(start, start + size)), space, nearest)
           for start in range(0, len(cells), size)]
  return Found(*(np.concatenate([getattr(part, field.name) for part in parts])
                 for field in dataclasses.fields(Found)))


def _search_chunk(cells: Cells, space: Space, nearest: str) -> Found:
  try:
    cell_P, d_model_P = _widths(cells, space)
    cell_T, d_model_T, n_layers_T = _depths(cells, space, cell_P, d_model_P)
  except TooManyShapes:
    if len(cells) == 1:
      raise
    return _search_parts(cells, space, nearest, (len(cells) + 1) // 2)
  return _best(cells, space, cell_T, d_model_T, n_layers_T, nearest)


def _layer_window(cells: Cells, space: Space, d_model):
  """Minimum and maximum n_layers that the held aspect or depth allows, before rounding."""
  if cells.aspect is None:
    return cells.n_layers, cells.n_layers
  return (d_model / (cells.aspect * (1 + space.shift)),
          d_model * (1 + space.shift) / cells.aspect)


def _expert_window(cells: Cells, space: Space, d_model):
  """Minimum and maximum d_expert that the held granularity allows, before rounding."""
  return (d_model / (cells.granularity * (1 + space.shift)),
          d_model * (1 + space.shift) / cells.granularity)


@dataclasses.dataclass(frozen=True)
class _Bound:
  """A necessary condition on (n_layers, d_model) for a solution.

  The count with `n_routed` experts of width `d_expert(d_model)` is at most (or least)
  `limit`. It grows with both variables and is affine in n_layers.
  """

  n_routed: np.ndarray | int
  d_expert: Callable
  limit: np.ndarray

  def count(self, cells: Cells, space: Space, n_layers, d_model):
    shapes = Shapes(space.template, n_layers, d_model, self.d_expert(cells, d_model),
                    cells.n_exp, cells.n_topk)
    return n_parameters(shapes, self.n_routed)

  def depth(self, cells: Cells, space: Space, d_model):
    """The real-valued n_layers at which the count equals the limit."""
    first = space.fewest_layers
    count = self.count(cells, space, first, d_model)
    slope = self.count(cells, space, first + 1, d_model) - count
    return first + (self.limit - count) / slope


def _bounds(cells: Cells, space: Space) -> tuple[list[_Bound], _Bound]:
  """The upper bounds (all hold) and the lower bound that every solution satisfies."""
  total_slack = space.slack(cells.n_total)
  most, least = cells.n_total + total_slack, cells.n_total - total_slack
  step = space.d_expert_multiple
  if cells.n_active is None:
    return ([_Bound(cells.n_exp, lambda c, d: _expert_window(c, space, d)[0], most)],
            _Bound(cells.n_exp, lambda c, d: _expert_window(c, space, d)[1], least))
  # Both counts have the same rest besides the routed experts, of which a token uses a fraction
  # `used`: (n_active - used * n_total) / (1 - used). Only the rest's shared experts and dense
  # layers depend on d_expert: they are 0 at d_expert = 0, and at most `attached` times the
  # routed experts, (n_total - n_active) / (1 - used).
  active_slack = space.n_active_slack(cells.n_active)
  most_active, least_active = cells.n_active + active_slack, cells.n_active - active_slack
  used, idle = cells.n_topk / cells.n_exp, 1 - cells.n_topk / cells.n_exp
  template = space.template
  attached = template.n_shared_experts / cells.n_exp
  if template.d_dense is None:
    attached = attached + template.n_dense_layers * (
        cells.n_topk + template.n_shared_experts) / cells.n_exp
  most_attached = attached * (most - least_active) / idle
  return ([_Bound(cells.n_exp, lambda c, d: step, most),
           _Bound(0, lambda c, d: 0, (most_active - used * least) / idle)],
          _Bound(0, lambda c, d: 0, (least_active - used * most) / idle - most_attached))


def _widths(cells: Cells, space: Space) -> tuple[np.ndarray, np.ndarray]:
  """Every d_model on the lattice that the bounds allow: (cell, d_model) [P]."""
  uppers, lower = _bounds(cells, space)
  step = space.d_model_multiple

  def layers(unit_N, side):
    # If the window has fewer layers than the template needs, the template's minimum is the bound.
    return np.maximum(_layer_window(cells, space, unit_N * float(step))[side],
                      space.fewest_layers)

  def too_wide(unit_N):
    d_model_N, n_layers_N = unit_N * float(step), layers(unit_N, 0)
    return np.any([upper.count(cells, space, n_layers_N, d_model_N) > upper.limit
                   for upper in uppers], axis=0)

  def wide_enough(unit_N):
    return lower.count(cells, space, layers(unit_N, 1), unit_N * float(step)) >= lower.limit

  # A shape has more than d_model parameters, so this d_model exceeds the limit.
  top_N = uppers[0].limit // step + 2
  # One more unit on either side allows for rounding in the float counts.
  last_N = _first_true(too_wide, top_N)
  first_N = np.maximum(_first_true(wide_enough, top_N) - 1, 1)
  cell_P, offset_P = _expand(last_N - first_N + 1)
  return cell_P, (first_N[cell_P] + offset_P) * step


def _first_true(holds, top_N: np.ndarray) -> np.ndarray:
  """Bisects for the smallest unit >= 1 at which the monotone condition holds, or `top_N`."""
  below_N, above_N = np.zeros_like(top_N), top_N
  while np.any(above_N - below_N > 1):
    middle_N = (below_N + above_N) // 2
    true_N = holds(middle_N)
    above_N = np.where(true_N, middle_N, above_N)
    below_N = np.where(true_N, below_N, middle_N)
  return above_N


def _expand(length_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the row and the offset within it of each element: [2, 1] -> ([0, 0, 1], [0, 1, 0])."""
  length_N = np.maximum(length_N, 0)
  # In floats, since an int64 sum might overflow.
  if np.sum(length_N, dtype=np.float64) > _MOST_SHAPES:
    raise TooManyShapes
  row = np.repeat(np.arange(len(length_N)), length_N)
  start_N = np.cumsum(length_N) - length_N
  return row, np.arange(len(row)) - start_N[row]


def _depths(cells: Cells, space: Space, cell_P: np.ndarray, d_model_P: np.ndarray):
  """Every n_layers that the bounds allow: (cell, d_model, n_layers) [T]."""
  at_P = cells.take(cell_P)
  uppers_P, lower_P = _bounds(at_P, space)
  fewest_P, most_P = _layer_window(at_P, space, d_model_P)
  fewest_P = np.maximum(fewest_P * (1 - _EDGE),
                        lower_P.depth(at_P, space, d_model_P) * (1 - _MARGIN) - _MARGIN)
  most_P = most_P * (1 + _EDGE)
  for upper_P in uppers_P:
    most_P = np.minimum(most_P, upper_P.depth(at_P, space, d_model_P) * (1 + _MARGIN) + _MARGIN)
  fewest_P = np.maximum(np.ceil(fewest_P), space.fewest_layers).astype(np.int64)
  most_P = np.floor(most_P).astype(np.int64)
  pair_T, offset_T = _expand(most_P - fewest_P + 1)
  return cell_P[pair_T], d_model_P[pair_T], fewest_P[pair_T] + offset_T


def _best(cells: Cells, space: Space, cell_T, d_model_T, n_layers_T, nearest: str) -> Found:
  """Chooses d_expert for each triple, and the best triple for each cell."""
  at_T = cells.take(cell_T)
  step = space.d_expert_multiple

  def line(n_routed_T):
    """Exact count at d_expert = 0, and its increase per step of d_expert."""
    zero_T = np.zeros_like(d_model_T)
    start_T, next_T = (n_parameters(Shapes(
        space.template, n_layers_T, d_model_T, d_expert, at_T.n_exp, at_T.n_topk),
        n_routed_T) for d_expert in (zero_T, zero_T + step))
    return start_T, next_T - start_T

  held = [(at_T.n_total, space.slack(at_T.n_total), space.tolerance, *line(at_T.n_exp))]
  if at_T.n_active is not None:
    held.append((at_T.n_active, space.n_active_slack(at_T.n_active),
                 space.n_active_tolerance, *line(at_T.n_topk)))
  low_T, high_T = np.ones_like(d_model_T), np.full_like(d_model_T, np.iinfo(np.int64).max)
  targets = []  # steps of d_expert near which the distance or the misfit is least
  for asked_T, slack_T, _, start_T, slope_T in held:
    low_T = np.maximum(low_T, -((start_T - asked_T + slack_T) // slope_T))
    high_T = np.minimum(high_T, (asked_T + slack_T - start_T) // slope_T)
    targets.append((asked_T - start_T) // slope_T)
  if at_T.granularity is not None:
    narrowest_T, widest_T = _expert_window(at_T, space, d_model_T)
    low_T = np.maximum(low_T, np.ceil(narrowest_T / step * (1 - _EDGE)).astype(np.int64))
    high_T = np.minimum(high_T, np.floor(widest_T / step * (1 + _EDGE)).astype(np.int64))
    targets.append(np.floor(d_model_T / at_T.granularity / step).astype(np.int64))

  # Distance and misfit are quasiconvex in d_expert, so the best integer step in [low, high] is
  # next to a target, or the end of the interval closest to it.
  rows = np.flatnonzero(low_T <= high_T)
  units = np.concatenate([np.clip(target_T[rows] + up, low_T[rows], high_T[rows])
                          for target_T in targets for up in (0, 1)])
  rows = np.tile(rows, 2 * len(targets))
  misfit = sum(
      np.abs(start_T[rows] + slope_T[rows] * units - asked_T[rows]) / (asked_T[rows] * unit)
      for asked_T, _, unit, start_T, slope_T in held)
  d_model, n_layers, d_expert = d_model_T[rows], n_layers_T[rows], units * step
  distance = np.zeros(len(rows))
  if at_T.aspect is not None:
    distance = np.hypot(distance, np.log(d_model / n_layers / at_T.aspect[rows]))
  if at_T.granularity is not None:
    distance = np.hypot(distance, np.log(d_model / d_expert / at_T.granularity[rows]))
  distance = np.round(distance, 12)  # so that equal ratios tie despite rounding errors
  order = (distance, misfit) if nearest == "distance" else (misfit, distance)
  cell, pick = _least(len(cells), cell_T[rows], (*order, n_layers, d_model, d_expert))

  def per_cell(value, absent):
    result_N = np.full(len(cells), absent, value.dtype)
    result_N[cell] = value[pick]
    return result_N

  return Found(per_cell(n_layers, 0), per_cell(d_model, 0), per_cell(d_expert, 0),
               per_cell(distance, np.inf), per_cell(misfit, np.inf))


def _least(n_cells: int, cell: np.ndarray, keys) -> tuple[np.ndarray, np.ndarray]:
  """Returns (cells with any rows, index of the lexicographically least row of each)."""
  row = np.arange(len(cell))
  for key in keys:
    least_N = np.full(n_cells, np.inf)
    np.minimum.at(least_N, cell[row], key[row])
    row = row[key[row] == least_N[cell[row]]]
  found, first = np.unique(cell[row], return_index=True)
  return found, row[first]
