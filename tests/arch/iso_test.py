import dataclasses
import itertools
import math
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.arch import (
    Architecture,
    IsoLimits,
    IsoRefused,
    count,
    iso_search,
    solve,
    solve_grid,
)
from moe_jax.errors import FieldError

PLAIN = Architecture(n_layers=1, d_model=8, d_expert=8, n_exp=1, n_topk=1, n_heads=2)
TEMPLATES = [
    PLAIN,
    dataclasses.replace(PLAIN, n_kv_heads=1, head_dim=4),
    dataclasses.replace(PLAIN, qk_norm="projection"),
    dataclasses.replace(PLAIN, n_layers=3, n_shared_experts=2, n_dense_layers=2),
    dataclasses.replace(PLAIN, n_layers=2, n_dense_layers=1, d_dense=20),
]


@dataclasses.dataclass(frozen=True)
class Case:
  template: Architecture
  limits: IsoLimits
  asked: dict

  def candidates(self, most=None, max_shift=None):
    """Every shape of at most so many parameters, 1.5 times what is asked for: the slow truth."""
    asked, limits = self.asked, self.limits
    most = most or 1.5 * asked["n_total"]
    heads = 1 if self.template.head_dim else 2 * self.template.n_heads
    step = math.lcm(limits.d_model_multiple, heads)
    edge = (1 + (limits.max_shift if max_shift is None else max_shift)) * (1 + 1e-9)
    experts = {name: asked[name] for name in ("n_exp", "n_topk")}
    for d_model in itertools.count(step, step):
      least = dataclasses.replace(
          self.template, d_model=d_model, d_expert=limits.d_expert_multiple, **experts,
          n_layers=asked.get("n_layers", self.template.n_dense_layers + 1))
      if count.n_total(least) > most:
        return
      depths = [asked["n_layers"]] if "n_layers" in asked else range(
          self.template.n_dense_layers + 1, 1 + math.floor(d_model / asked["aspect"] * edge))
      for n_layers in depths:
        aspect = d_model / n_layers / asked.get("aspect", d_model / n_layers)
        if not 1 / edge <= aspect <= edge:
          continue
        for d_expert in itertools.count(limits.d_expert_multiple, limits.d_expert_multiple):
          fine = d_model / d_expert / asked.get("granularity", d_model / d_expert)
          if fine < 1 / edge:
            break
          arch = dataclasses.replace(self.template, n_layers=n_layers, d_model=d_model,
                                     d_expert=d_expert, **experts)
          total = count.n_total(arch)
          if total > most:
            break
          if fine <= edge:
            misfits = [abs(total / asked["n_total"] - 1) * 1e6 / limits.tolerance_ppm]
            if "n_active" in asked:
              misfits.append(abs(count.n_active(arch) / asked["n_active"] - 1) * 1e6
                             / limits.n_active_tolerance_ppm)
            yield arch, math.hypot(math.log(aspect), math.log(fine)), misfits

  def solve(self):
    return solve(template=self.template, limits=self.limits, **self.asked)


@st.composite
def cases(draw):
  template = draw(st.sampled_from(TEMPLATES))
  limits = IsoLimits(
      d_model_multiple=draw(st.sampled_from([1, 4, 6, 16])),
      d_expert_multiple=draw(st.sampled_from([1, 3, 8])),
      tolerance_ppm=draw(st.sampled_from([300.0, 5000.0, 200_000.0])),
      n_active_tolerance_ppm=draw(st.sampled_from([5000.0, 50_000.0])),
      max_shift=draw(st.sampled_from([0.0, 0.1, 0.25, 0.6])))
  n_exp = draw(st.integers(1, 8))
  n_topk = draw(st.integers(1, n_exp))
  asked = {"n_total": int(10 ** draw(st.floats(3, 5))), "n_exp": n_exp, "n_topk": n_topk}
  if draw(st.booleans()):
    asked["aspect"] = draw(st.floats(3, 20))
  else:
    asked["n_layers"] = template.n_dense_layers + draw(st.integers(1, 5))
  if n_topk == n_exp or draw(st.booleans()):
    asked["granularity"] = draw(st.sampled_from([0.25, 0.5, 1.0, 1.7, 3.0]))
  else:
    share = n_topk / n_exp
    share += (1 - share) * draw(st.floats(-0.2, 1.1))
    asked["n_active"] = max(1, int(asked["n_total"] * share))
  return Case(template, limits, asked)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(cases())
def test_equals_brute_force(case):
  candidates = list(case.candidates())
  feasible = [(distance, sum(misfits)) for _, distance, misfits in candidates
              if max(misfits) <= 1]
  try:
    solution = case.solve()
  except IsoRefused as refused:
    assert not feasible
    check_nearest(case, refused)
    return
  assert feasible
  found = [(distance, misfits) for arch, distance, misfits in candidates
           if arch == solution.arch]
  assert len(found) == 1, "not on the lattice, or outside the window"
  ((distance, misfits),) = found
  assert max(misfits) <= 1
  least = min(feasible)[0]
  assert distance == pytest.approx(least, abs=1e-12)
  ties = [misfit for other, misfit in feasible if other <= least + 1e-12]
  assert sum(misfits) == pytest.approx(min(ties), abs=1e-9)


def check_nearest(case, refused):
  """Of the shapes in the window, or where it has none in a wider one, no other is nearer in size:
  first in N_total alone, where that is met in N_total and N_active together."""
  nearest, wider = refused.nearest.arch, 4 * max(case.limits.max_shift, 0.1)
  most = max(1.5 * case.asked["n_total"], count.n_total(nearest) + 1)
  for max_shift in (case.limits.max_shift, wider):
    shapes = {arch: misfits for arch, _, misfits in case.candidates(most, max_shift)}
    if shapes:
      break
  assert nearest in shapes
  met = [misfits for misfits in shapes.values() if misfits[0] <= 1]
  if "n_active" in case.asked and met:
    assert shapes[nearest][0] <= 1
    shapes_to_beat = met
  else:
    shapes_to_beat = shapes.values()
  assert sum(shapes[nearest]) == pytest.approx(min(map(sum, shapes_to_beat)), rel=1e-9)
  if not refused.accepted.startswith("no shape") or not {"aspect", "granularity"} & {*case.asked}:
    assert refused.further is None
    return
  within = [distance for _, distance, misfits in case.candidates(max_shift=wider)
            if max(misfits) <= 1]
  assert (refused.further is not None) == bool(within)
  if within:
    shifts = (refused.further.aspect_shift, refused.further.granularity_shift)
    distance = math.hypot(*(math.log1p(shift) for shift in shifts if shift is not None))
    assert distance == pytest.approx(min(within), abs=1e-9)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(cases(), st.floats(6, 12))
def test_what_is_returned_keeps_its_word(case, exponent):
  """At real sizes, where no brute force reaches."""
  head_dim = case.template.head_dim and 128
  limits = dataclasses.replace(case.limits, d_model_multiple=8 * case.limits.d_model_multiple)
  template = dataclasses.replace(case.template, d_model=64, n_heads=16, head_dim=head_dim)
  asked = dict(case.asked)
  if "aspect" in asked:
    asked["aspect"] *= 8
  scale = 10**exponent / asked["n_total"]
  for name in ("n_total", "n_active"):
    if name in asked:
      asked[name] = int(asked[name] * scale)
  try:
    solution = solve(template=template, limits=limits, **asked)
  except IsoRefused as refused:
    nearest = refused.nearest.arch
    assert nearest.d_model % limits.d_model_multiple == 0
    assert nearest.d_expert % limits.d_expert_multiple == 0
    assert refused.nearest.residual_ppm == pytest.approx(
        (count.n_total(nearest) / asked["n_total"] - 1) * 1e6, abs=1e-6)
    return
  arch = solution.arch
  assert (arch.n_exp, arch.n_topk) == (asked["n_exp"], asked["n_topk"])
  assert arch.d_model % limits.d_model_multiple == 0
  assert arch.d_expert % limits.d_expert_multiple == 0
  residual = (count.n_total(arch) - asked["n_total"]) / asked["n_total"] * 1e6
  assert solution.residual_ppm == pytest.approx(residual, abs=1e-9)
  assert abs(residual) <= limits.tolerance_ppm
  edge = (1 + limits.max_shift) * (1 + 1e-8)
  for name, value in (("aspect", arch.d_model / arch.n_layers),
                      ("granularity", arch.granularity)):
    shift = getattr(solution, name + "_shift")
    if name in asked:
      assert 1 / edge <= value / asked[name] <= edge
      assert shift == pytest.approx(value / asked[name] - 1)
    else:
      assert shift is None
  if "n_layers" in asked:
    assert arch.n_layers == asked["n_layers"]
  if "n_active" in asked:
    residual = (count.n_active(arch) - asked["n_active"]) / asked["n_active"] * 1e6
    assert solution.n_active_residual_ppm == pytest.approx(residual, abs=1e-9)
    assert abs(residual) <= limits.n_active_tolerance_ppm
  else:
    assert solution.n_active_residual_ppm is None


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(cases())
def test_finds_a_shape_that_exists_exactly(case):
  """A shape's own size and ratios lead back to that shape, whatever the template."""
  width = math.lcm(case.limits.d_model_multiple, 2 * PLAIN.n_heads) * 5
  arch = dataclasses.replace(
      case.template, n_layers=case.template.n_dense_layers + 3, d_model=width,
      d_expert=case.limits.d_expert_multiple * 4, n_exp=case.asked["n_exp"],
      n_topk=case.asked["n_topk"])
  solution = solve(
      template=case.template, limits=case.limits, n_total=count.n_total(arch),
      n_exp=arch.n_exp, n_topk=arch.n_topk, aspect=arch.d_model / arch.n_layers,
      granularity=arch.granularity)
  assert (solution.arch, solution.residual_ppm) == (arch, 0)


def test_grid_equals_one_by_one():
  rng = np.random.default_rng(0)
  n = 60
  n_exp = 2 ** rng.integers(3, 8, n)
  asked = {"n_total": np.exp(rng.uniform(14, 24, n)).astype(np.int64), "n_exp": n_exp,
           "n_topk": n_exp // 4, "granularity": rng.choice([1, 2, 4], n), "aspect": 48}
  # Several chunks: the search works on blocks of cells.
  many = {name: np.tile(value, 40) if np.ndim(value) else value
          for name, value in asked.items()}
  grid = solve_grid(template=PLAIN, **many)
  assert len(grid) == 40 * n
  assert 0 < grid.solved.sum() < len(grid)
  np.testing.assert_array_equal(grid.n_layers, np.tile(grid.n_layers[:n], 40))
  np.testing.assert_array_equal(grid.d_expert, np.tile(grid.d_expert[:n], 40))
  for i in range(n):
    cell = {name: value[i] if np.ndim(value) else value for name, value in asked.items()}
    if grid.solved[i]:
      assert grid[i] == solve(template=PLAIN, **cell)
      assert grid.residual_ppm[i] == pytest.approx(grid[i].residual_ppm, abs=1e-9)
    else:
      assert np.isnan(grid.residual_ppm[i])
      with pytest.raises(IsoRefused) as from_grid:
        grid[i]
      with pytest.raises(IsoRefused, match="no shape is within 5000 ppm"):
        solve(template=PLAIN, **cell)
      assert from_grid.value.nearest is not None
  with pytest.raises(IndexError):
    grid[len(grid)]


@pytest.mark.parametrize("held", ["granularity", "n_active"])
def test_looking_nearby_first_misses_nothing(held):
  """The widening windows find what one pass over the widest finds."""
  rng = np.random.default_rng(1)
  n = 600
  n_total = np.exp(rng.uniform(16, 22, n)).astype(np.int64)
  n_exp = 2 ** rng.integers(3, 7, n)
  asked = {"n_total": n_total, "n_exp": n_exp, "n_topk": n_exp // 4,
           "aspect": rng.uniform(20, 80, n), "n_layers": None, "granularity": None,
           "n_active": None}
  asked[held] = (rng.uniform(1, 6, n) if held == "granularity"
                 else (n_total * rng.uniform(0.3, 0.5, n)).astype(np.int64))
  grid = solve_grid(template=PLAIN, **asked)
  found = iso_search.search(
      iso_search.Cells(**asked),
      iso_search.Space(PLAIN, 64, 8, tolerance=5e-3, n_active_tolerance=2e-2, shift=0.25),
      "distance")
  assert 0 < grid.solved.sum() < n
  for name in ("n_layers", "d_model", "d_expert"):
    np.testing.assert_array_equal(getattr(grid, name), getattr(found, name))


def test_experts_and_fineness_vary_while_the_rest_stays():
  """n_exp / g held at fixed sparsity: N_total, N_active, depth and width all stay."""
  base = solve(template=PLAIN, n_total=10**9, n_exp=32, n_topk=4, granularity=2, aspect=64,
               limits=IsoLimits(d_expert_multiple=16))
  finer = solve(template=PLAIN, n_total=count.n_total(base.arch), n_exp=64, n_topk=8,
                n_active=count.n_active(base.arch), n_layers=base.arch.n_layers)
  assert finer.arch.d_model == base.arch.d_model
  assert finer.arch.d_expert == base.arch.d_expert / 2
  assert abs(finer.n_active_residual_ppm) < 20_000


def test_dense_model():
  solution = solve(template=PLAIN, n_total=10**8, n_exp=1, n_topk=1, granularity=0.25,
                   aspect=64)
  assert count.n_total(solution.arch) == count.n_active(solution.arch)
  assert abs(solution.residual_ppm) <= 5000


CELL = {"n_total": 10**9, "n_exp": 64, "n_topk": 8, "aspect": 64, "granularity": 4}


@pytest.mark.parametrize("changes, message", [
    ({"aspect": None}, "aspect=None: hold either aspect or n_layers, which is None"),
    ({"n_layers": 4}, "aspect=64: hold either aspect or n_layers, which is 4"),
    ({"n_active": 10}, "granularity=4: hold either granularity or n_active, which is 10"),
    ({"n_total": 0}, "n_total=0: must lie between 1 and 1e+15"),
    ({"n_total": 2.5}, "n_total=2.5: must be a whole number"),
    ({"n_total": math.nan}, "n_total=nan: must be finite"),
    ({"n_total": "1B"}, "n_total='1B': must be a number"),
    ({"n_total": 10**16}, "must lie between 1 and 1e+15"),
    ({"n_topk": 65}, "n_topk=65: must be at most n_exp"),
    ({"n_topk": 0}, "n_topk=0: must lie between"),
    ({"aspect": 0}, "aspect=0: must lie between 0.001"),
    ({"granularity": -1.0}, "granularity=-1.0: must lie between"),
    ({"granularity": None, "n_active": 5e8, "n_topk": 64}, "n_topk=64: is n_exp: all parameters"),
    ({"n_total": [10**9, 10**8]}, "solve takes one cell"),
    ({"n_total": [1, 2], "n_exp": [1, 2, 3]}, "must be a number or an array"),
    ({"n_exp": [8, 4]}, "n_topk=8: must be at most n_exp"),
])
def test_bad_input(changes, message):
  with pytest.raises(FieldError) as refused:
    solve(template=PLAIN, **(CELL | changes))
  assert not isinstance(refused.value, IsoRefused)
  assert message in str(refused.value)
  assert "\n" not in str(refused.value)


def test_depth_must_leave_an_moe_layer():
  template = dataclasses.replace(PLAIN, n_layers=3, n_dense_layers=3)
  with pytest.raises(FieldError, match="n_layers=3: must be above the template's n_dense"):
    solve(template=template, **(CELL | {"aspect": None, "n_layers": 3}))


@pytest.mark.parametrize("name, value", [
    ("d_model_multiple", 0), ("d_expert_multiple", -8), ("tolerance_ppm", 0),
    ("n_active_tolerance_ppm", 2e6), ("max_shift", -0.1), ("max_shift", math.nan)])
def test_bad_limits(name, value):
  with pytest.raises(FieldError, match=name):
    IsoLimits(**{name: value})


@pytest.mark.parametrize("changes, parts", [
    ({"n_total": 1000}, ["n_total=1000: no shape is within 5000 ppm",
                          "nearest: n_layers=1 d_model=64 d_expert=16"]),
    ({"n_total": 10**7}, ["no shape is within 5000 ppm", "granularity within a factor 1.25",
                           "nearest: n_layers=",
                            "within tolerance but beyond max_shift: n_layers="]),
    ({"granularity": None, "n_active": 2 * 10**9}, ["n_active=2000000000: must be below n_total",
                                                 "nearest: n_layers="]),
    ({"granularity": None, "n_active": 1}, ["must be above n_total", "nearest: n_layers="]),
    ({"granularity": None, "n_active": 10**8}, ["must be above n_total * n_topk / n_exp",
                                             "125000000", "nearest: n_layers="]),
])
def test_refusal_is_one_line_with_reason_and_nearest(changes, parts):
  with pytest.raises(IsoRefused) as refused:
    solve(template=PLAIN, **(CELL | changes))
  text = str(refused.value)
  assert all(part in text for part in parts), text
  assert "\n" not in text
  above = refused.value.under("design")
  assert above.nearest == refused.value.nearest
  assert above.field.startswith("design.n_")


def test_arch_imports_neither_jax_nor_scipy():
  program = ("import sys, moe_jax.arch; "
             "print([m for m in ('jax', 'scipy', 'matplotlib', 'rich') if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                        check=True)
  assert done.stdout.strip() == "[]"


def test_a_grid_of_no_cells_has_none():
  none = solve_grid(template=PLAIN, n_total=np.array([], int), n_exp=8, n_topk=2, aspect=64,
                    granularity=2.0)
  assert len(none) == 0
