"""The lattice search under the iso-N_total solver: many cells at once, in NumPy.

A shape is (n_layers, d_model, d_expert) on a lattice of multiples. Counts are affine in
n_layers and in d_expert and grow with d_model, which leaves little to search: the range of
d_model that the box of allowed shapes admits is found by bisection, for each d_model there
is an interval of n_layers, and for each pair an interval of d_expert. All pairs in the box
are looked at, so the best one found is the best there is.

Suffixes: N cells, P pairs (cell, d_model), T triples (cell, d_model, n_layers).
"""

import dataclasses
import operator
from collections.abc import Callable

import numpy as np

from moe_jax.arch.architecture import Architecture
from moe_jax.arch.count import n_parameters

_EDGE = 1e-9  # a ratio on the edge of the window is inside it
_MARGIN = 1e-6  # layers beyond a bound, for rounding: the counts are judged exactly later
_CHUNK = 1024  # cells searched together, so that the arrays stay in cache
_MOST_SHAPES = 4_000_000  # looked at together; about a gigabyte
_MOST_PARAMETERS = 10**17  # int64 has room for the products below it


class TooManyShapes(Exception):
  """One cell's window holds more lattice points than fit into memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
  """Arrays of shapes under Architecture's names, so that they can be counted."""

  template: Architecture
  n_layers: np.ndarray
  d_model: np.ndarray
  d_expert: np.ndarray
  n_exp: np.ndarray
  n_topk: np.ndarray

  # One value for all shapes.
  n_heads = property(operator.attrgetter("template.n_heads"))
  n_kv_heads = property(operator.attrgetter("template.n_kv_heads"))
  head_dim = property(operator.attrgetter("template.head_dim"))
  qk_norm = property(operator.attrgetter("template.qk_norm"))
  n_shared_experts = property(operator.attrgetter("template.n_shared_experts"))
  n_dense_layers = property(operator.attrgetter("template.n_dense_layers"))
  d_dense = property(operator.attrgetter("template.d_dense"))
  # Architecture's own formulas, which hold for arrays too.
  kv_heads, d_head = Architecture.kv_heads, Architecture.d_head
  qk_norm_scales = Architecture.qk_norm_scales
  n_moe_layers, dense_width = Architecture.n_moe_layers, Architecture.dense_width


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
  """What is asked: one entry a cell. Of each pair of optional fields exactly one is held.

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
    """The cells at `index`, repeated or left out as it says."""
    return Cells(**{field.name: None if (value := getattr(self, field.name)) is None
                    else value[index] for field in dataclasses.fields(self)})

  def __len__(self) -> int:
    return len(self.n_total)


@dataclasses.dataclass(frozen=True)
class Space:
  """Where to look.

  Attributes:
    template: everything of the architecture that is neither asked nor searched.
    d_model_multiple, d_expert_multiple: the lattice.
    tolerance: |n_total found / asked - 1| that is one unit of misfit.
    n_active_tolerance: the same of n_active, where it is held.
    shift: held ratios may move by a factor 1 + shift either way.
    most_misfit: how many tolerances n_total may be off.
    n_active_most_misfit: the same of n_active.
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
    """Whole parameters that n_total may be off."""
    return _whole(n_total * self.tolerance * self.most_misfit)

  def n_active_slack(self, n_active: np.ndarray) -> np.ndarray:
    """Whole parameters that n_active may be off."""
    return _whole(n_active * self.n_active_tolerance * self.n_active_most_misfit)


def _whole(slack: np.ndarray) -> np.ndarray:
  return np.minimum(np.floor(slack), _MOST_PARAMETERS).astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """The best shape of each cell; n_layers is 0 where the space holds none.

  Attributes:
    n_layers, d_model, d_expert: int64 [N].
    distance: how far the held ratios moved: the Euclidean norm of their logarithms.
    misfit: sum of |residual| / tolerance over the counts that are held.
  """

  n_layers: np.ndarray
  d_model: np.ndarray
  d_expert: np.ndarray
  distance: np.ndarray
  misfit: np.ndarray


def search(cells: Cells, space: Space, nearest: str) -> Found:
  """The best shape of every cell within `space`.

  Args:
    cells: what is asked.
    space: where to look.
    nearest: what is smallest in the best shape: `distance` or `misfit`; the other one
      decides ties, then fewer layers, then the narrower model.

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
  """Fewest and most layers that the held aspect or depth allows, before rounding."""
  if cells.aspect is None:
    return cells.n_layers, cells.n_layers
  return (d_model / (cells.aspect * (1 + space.shift)),
          d_model * (1 + space.shift) / cells.aspect)


def _expert_window(cells: Cells, space: Space, d_model):
  """Narrowest and widest expert that the held granularity allows, before rounding."""
  return (d_model / (cells.granularity * (1 + space.shift)),
          d_model * (1 + space.shift) / cells.granularity)


@dataclasses.dataclass(frozen=True)
class _Bound:
  """A condition on (n_layers, d_model) that every solution meets.

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
    """The real n_layers at which the count is the limit."""
    first = space.fewest_layers
    count = self.count(cells, space, first, d_model)
    slope = self.count(cells, space, first + 1, d_model) - count
    return first + (self.limit - count) / slope


def _bounds(cells: Cells, space: Space) -> tuple[list[_Bound], _Bound]:
  """What every solution is at most (all of the list), and at least."""
  total_slack = space.slack(cells.n_total)
  most, least = cells.n_total + total_slack, cells.n_total - total_slack
  step = space.d_expert_multiple
  if cells.n_active is None:
    return ([_Bound(cells.n_exp, lambda c, d: _expert_window(c, space, d)[0], most)],
            _Bound(cells.n_exp, lambda c, d: _expert_window(c, space, d)[1], least))
  # Without the routed experts, of which a token uses `used`, both counts leave the same
  # rest: (n_active - used * n_total) / (1 - used). Of the rest only shared experts and
  # dense layers depend on d_expert: none of it at d_expert = 0, and never more than
  # `attached` times the routed experts, (n_total - n_active) / (1 - used).
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
  """Every d_model on the lattice that the bounds leave: (cell, d_model) [P]."""
  uppers, lower = _bounds(cells, space)
  step = space.d_model_multiple

  def layers(unit_N, side):
    # Where the window has too few layers for the template, more of them stay a bound.
    return np.maximum(_layer_window(cells, space, unit_N * float(step))[side],
                      space.fewest_layers)

  def too_wide(unit_N):
    d_model_N, n_layers_N = unit_N * float(step), layers(unit_N, 0)
    return np.any([upper.count(cells, space, n_layers_N, d_model_N) > upper.limit
                   for upper in uppers], axis=0)

  def wide_enough(unit_N):
    return lower.count(cells, space, layers(unit_N, 1), unit_N * float(step)) >= lower.limit

  # A shape has more than d_model parameters, so this d_model has more than n_total may be.
  top_N = uppers[0].limit // step + 2
  # One unit more on either side makes up for rounding in the float counts.
  last_N = _first_true(too_wide, top_N)
  first_N = np.maximum(_first_true(wide_enough, top_N) - 1, 1)
  cell_P, offset_P = _expand(last_N - first_N + 1)
  return cell_P, (first_N[cell_P] + offset_P) * step


def _first_true(holds, top_N: np.ndarray) -> np.ndarray:
  """Smallest unit >= 1 where the monotone condition holds, or `top_N`."""
  below_N, above_N = np.zeros_like(top_N), top_N
  while np.any(above_N - below_N > 1):
    middle_N = (below_N + above_N) // 2
    true_N = holds(middle_N)
    above_N = np.where(true_N, middle_N, above_N)
    below_N = np.where(true_N, below_N, middle_N)
  return above_N


def _expand(length_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[2, 0, 3] -> ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2])."""
  length_N = np.maximum(length_N, 0)
  # Summed as floats: a sum that overflows is too many all the same.
  if np.sum(length_N, dtype=np.float64) > _MOST_SHAPES:
    raise TooManyShapes
  row = np.repeat(np.arange(len(length_N)), length_N)
  start_N = np.cumsum(length_N) - length_N
  return row, np.arange(len(row)) - start_N[row]


def _depths(cells: Cells, space: Space, cell_P: np.ndarray, d_model_P: np.ndarray):
  """Every n_layers that the bounds leave: (cell, d_model, n_layers) [T]."""
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
    """Exact count at d_expert = 0, and what one step of d_expert adds to it."""
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
  targets = []  # in steps of d_expert, where distance or misfit has its least value
  for asked_T, slack_T, _, start_T, slope_T in held:
    low_T = np.maximum(low_T, -((start_T - asked_T + slack_T) // slope_T))
    high_T = np.minimum(high_T, (asked_T + slack_T - start_T) // slope_T)
    targets.append((asked_T - start_T) // slope_T)
  if at_T.granularity is not None:
    narrowest_T, widest_T = _expert_window(at_T, space, d_model_T)
    low_T = np.maximum(low_T, np.ceil(narrowest_T / step * (1 - _EDGE)).astype(np.int64))
    high_T = np.minimum(high_T, np.floor(widest_T / step * (1 + _EDGE)).astype(np.int64))
    targets.append(np.floor(d_model_T / at_T.granularity / step).astype(np.int64))

  # Distance and misfit are convex in d_expert: of whole steps in [low, high] the best is
  # next to a target, or the end of the interval that is nearest to it.
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
  distance = np.round(distance, 12)  # so that equal ratios tie, whatever their rounding
  order = (distance, misfit) if nearest == "distance" else (misfit, distance)
  cell, pick = _least(len(cells), cell_T[rows], (*order, n_layers, d_model, d_expert))

  def per_cell(value, absent):
    result_N = np.full(len(cells), absent, value.dtype)
    result_N[cell] = value[pick]
    return result_N

  return Found(per_cell(n_layers, 0), per_cell(d_model, 0), per_cell(d_expert, 0),
               per_cell(distance, np.inf), per_cell(misfit, np.inf))


def _least(n_cells: int, cell: np.ndarray, keys) -> tuple[np.ndarray, np.ndarray]:
  """Index of the lexicographically least row of every cell that has one: (cell, row)."""
  row = np.arange(len(cell))
  for key in keys:
    least_N = np.full(n_cells, np.inf)
    np.minimum.at(least_N, cell[row], key[row])
    row = row[key[row] == least_N[cell[row]]]
  found, first = np.unique(cell[row], return_index=True)
  return found, row[first]
