"""The grids for pods: what they hold, as their docstrings say it."""

from experiments import depth_width, scaling_law
from moe_jax.arch import count


def spread(values):
  return min(values), max(values)


def test_what_the_scaling_law_holds():
  cells = [config.arch for config in scaling_law.get_grid().cells]
  assert len(cells) == 80
  for arch in cells:
    size = min(scaling_law.LEARNING_RATES, key=lambda n: abs(n - count.n_total(arch)))
    assert abs(count.n_total(arch) / size - 1) < 0.005
  least, most = spread([arch.granularity for arch in cells])
  assert (1.55 < least < 1.6) and (2.2 < most < 2.29)
  least, most = spread([arch.d_model / arch.n_layers for arch in cells])
  assert (51 < least < 53) and (80 < most < 83)


def test_what_depth_and_width_hold():
  cells = [config.arch for config in depth_width.get_grid().cells]
  n_total, n_active = ([f(arch) for arch in cells] for f in (count.n_total, count.n_active))
  assert max(n_total) / min(n_total) < 1.006 and max(n_active) / min(n_active) < 1.05
  assert {(arch.n_exp, arch.n_topk) for arch in cells} == {(64, 8)}
  least, most = spread([arch.granularity for arch in cells])
  assert least >= 1.8 and most < 2.2
  least, most = spread([arch.d_model / arch.n_layers for arch in cells])
  assert (17 < least < 18) and most == 224
