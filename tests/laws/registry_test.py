"""Check-points of the published laws, at the tolerance their rounding allows."""

import numpy as np
import pytest

from moe_jax.arch.architecture import Architecture
from moe_jax.errors import FieldError
from moe_jax.laws.law import LOSS, Training
from moe_jax.laws.registry import LAWS, get_law, zhao
from moe_jax.laws.shape import Shape

MOE = Architecture(n_layers=12, d_model=768, d_expert=192, n_exp=256, n_topk=4, n_heads=12)
DENSE = Architecture(n_layers=12, d_model=768, d_expert=2048, n_exp=1, n_topk=1, n_heads=12)

# Krajewski, table 2: N_active, D, G, loss.
_TABLE_2 = [
    (100e6, 4.37e9, 8, 3.133), (1e9, 28.94e9, 16, 2.491), (3e9, 72.9e9, 16, 2.245),
    (7e9, 137.6e9, 32, 2.076), (70e9, 941.07e9, 32, 1.694), (300e9, 2.96e12, 64, 1.503),
    (1e12, 7.94e12, 64, 1.367)]

# Kimi K2, arXiv 2507.20534: how many times the FLOPs of sparsity 48 other sparsities need for the
# same loss of 1.5.
_KIMI_K2_FLOPS = {8: 1.69, 16: 1.39, 32: 1.15, 48: 1.0}

# Joint MoE: C, E -> optimal N_active and D.
_OPTIMA = [
    (1e20, 1, 1.7e9, 9.7e9), (1e20, 4, 1.2e9, 13.9e9), (1e20, 8, 0.99e9, 17e9),
    (1e20, 16, 0.81e9, 20.7e9), (1e21, 4, 4.4e9, 38e9), (1e21, 8, 3.8e9, 44.3e9),
    (1e21, 16, 3.3e9, 51.2e9), (1e22, 4, 15.8e9, 105.4e9), (1e22, 8, 14.4e9, 115.8e9)]


def krajewski_total(n_active: float, expansion: float = 64) -> float:
  """N of a model whose active part is 12 d² n_blocks: (8 E + 4) / 12 times as much."""
  return n_active * (8 * expansion + 4) / 12


@pytest.mark.parametrize("n_active,tokens,g,loss", _TABLE_2)
def test_krajewski_table_2(n_active, tokens, g, loss):
  n_total = krajewski_total(n_active)
  assert LAWS["krajewski"].at(N=n_total, D=tokens, G=g) == pytest.approx(loss, rel=0.01)


def test_krajewski_is_of_the_total_parameters():
  assert krajewski_total(12) == 43 * 12
  at_64_times = LAWS["krajewski"].at(N=64 * 1e8, D=4.37e9, G=8)
  assert abs(at_64_times / 3.133 - 1) > 0.02


def test_krajewski_of_dense_models():
  # c + a / N^alpha + b / D^beta with a 16.3, alpha 0.126, b 26.7, beta 0.127, c 0.47:
  # N^0.126 = 10^1.134 = 13.6144, D^0.127 = 10^(0.127 * 10.30103) = 20.3344.
  by_hand = 0.47 + 1.19726 + 1.31305
  assert LAWS["krajewski-dense"].at(N=1e9, D=2e10) == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("compute,n_exp,n_active,tokens", _OPTIMA)
def test_joint_moe_optima(compute, n_exp, n_active, tokens):
  n = np.geomspace(1e8, 1e11, 20_001)
  best = n[np.argmin(LAWS["joint-moe"].at(N=n, D=compute / (6 * n), E=n_exp))]
  assert best == pytest.approx(n_active, rel=0.025)
  assert compute / (6 * best) == pytest.approx(tokens, rel=0.025)


def test_zhao_optima():
  def argmin(grid, **changed):
    at = dict(N=30e9, Na=12e9, D=1e12, G=6.78, S=0.31) | changed
    return grid[np.argmin(LAWS["zhao"].at(**at))]

  g, s, ratio = np.linspace(1, 20, 4001), np.linspace(0, 1, 4001), np.linspace(0.01, 1, 4001)
  assert argmin(g, G=g) == pytest.approx(6.78, abs=0.01)
  assert argmin(s, S=s) == pytest.approx(0.31, abs=0.01)
  assert argmin(ratio, Na=ratio * 30e9) == pytest.approx(0.40, abs=0.01)
  assert argmin(ratio, N=671e9, Na=ratio * 671e9) == pytest.approx(0.22, abs=0.01)


def test_ling_check_point_and_its_log_bases():
  ling = LAWS["ling"]
  assert ling.at(A=0.031, G=12, C=1e22) == pytest.approx(7.245, abs=0.001)
  g = np.geomspace(2, 64, 2001)
  assert g[np.argmax(ling.at(A=0.031, G=g, C=1e22))] == pytest.approx(12, rel=0.1)


def test_flame_moe():
  assert LAWS["flame-moe"].at(N=354.9e6, D=9.392317e9) == pytest.approx(3.083539, abs=1e-5)


def test_clark():
  assert LAWS["clark"].at(N=5e6, E=1) == pytest.approx(3.4831, abs=1e-4)
  assert LAWS["clark"].at(N=5e6, E=128) == pytest.approx(2.8915, abs=1e-4)


def test_abnar():
  assert LAWS["abnar"].at(N=1e9, D=2e10, S=0) == pytest.approx(2.5657, abs=1e-4)
  assert LAWS["abnar"].at(N=1e10, D=2e10, S=0.95) == pytest.approx(2.4073, abs=1e-4)


def test_the_dense_laws_differ_where_the_replication_says_so():
  at = dict(N=70e9, D=1.4e12)
  assert LAWS["chinchilla"].at(**at) == pytest.approx(1.9366, abs=1e-3)
  assert LAWS["besiroglu"].at(**at) == pytest.approx(1.9730, abs=1e-3)


def test_kimi_k2_ordinal_check_holds_for_ling():
  flops = {s: 1 / float(LAWS["ling"].at(A=1 / s, G=12, C=1e22)) for s in _KIMI_K2_FLOPS}
  assert sorted(flops, key=flops.get) == sorted(_KIMI_K2_FLOPS, key=_KIMI_K2_FLOPS.get)


def test_each_paper_has_its_own_granularity():
  shape = Shape.of(MOE)  # g = 4
  of = {v.symbol: v.of for v in LAWS["krajewski"].variables}
  assert of["G"](shape, None) == 16
  of = {v.symbol: v.of for v in LAWS["ling"].variables}
  assert of["G"](shape, None) == 8


@pytest.mark.parametrize("name", LAWS)
def test_many_shapes_at_once_equal_one_at_a_time(name):
  archs = [MOE, DENSE, Architecture(n_layers=4, d_model=64, d_expert=20, n_exp=8, n_topk=2,
                                    n_heads=4, n_kv_heads=2, n_shared_experts=1,
                                    n_dense_layers=1, vocab_size=1000, tie_embeddings=True)]
  together = LAWS[name].predict(Shape.of(archs), tokens=np.full(3, 2e10)).value
  alone = [LAWS[name].predict(arch, tokens=2e10).value for arch in archs]
  np.testing.assert_allclose(together, alone, rtol=1e-12)
  assert np.all(together > 0)


def test_inside_the_domain_nothing_is_said():
  law = LAWS["krajewski"]
  inside = Architecture(n_layers=10, d_model=640, d_expert=160, n_exp=1024, n_topk=16,
                        n_heads=10)
  answer = law.predict(inside, tokens=20e9)
  assert answer.outside == () and law.inside(Shape.of(inside), Training(20e9))
  assert 2 < answer.loss < 4


def test_outside_the_domain_it_answers_and_says_so():
  answer = LAWS["krajewski"].predict(MOE, tokens=1e9)
  assert np.isfinite(answer.loss)
  assert any(line.startswith("D = 1e+09 is below 1.6e+10") for line in answer.outside)
  assert any("n_topk = 4 d_model / d_expert" in line for line in answer.outside)
  assert all("\n" not in line for line in answer.outside)


def test_which_laws_have_their_ranges_on_record():
  assert {name for name, law in LAWS.items() if law.on_record} == {
      "krajewski", "krajewski-dense", "chinchilla", "besiroglu"}


def test_inside_is_one_answer_a_shape():
  shape = Shape(n_layers=10, d_model=640, d_expert=160, n_exp=np.array([1024, 64]), n_topk=16,
                n_heads=10)
  assert LAWS["krajewski"].inside(shape, Training(20e9)).tolist() == [True, False]


def test_a_dense_law_says_what_it_cannot_see():
  assert LAWS["chinchilla"].predict(DENSE, tokens=1e10).outside == ()
  assert any("dense" in line for line in LAWS["chinchilla"].predict(MOE, tokens=1e10).outside)


def test_a_leverage_is_not_a_loss():
  answer = LAWS["ling"].predict(MOE, flops=1e20)
  assert answer.quantity != LOSS and answer.value > 1
  with pytest.raises(FieldError, match="not a loss"):
    _ = answer.loss


@pytest.mark.parametrize("ask,line", [
    (lambda: LAWS["abnar"].predict(MOE), "tokens=None: is missing: abnar needs"),
    (lambda: LAWS["ling"].predict(MOE), "flops=None: is missing: ling needs"),
    (lambda: LAWS["flame-moe"].require_sees("granularity"),
     "law='flame-moe': has no variable for granularity; it depends on n_active, tokens"),
    (lambda: LAWS["abnar"].at(N=1e9, D=1e9), "S=None: is missing: abnar needs"),
    (lambda: LAWS["abnar"].at(N=1e9, D=1e9, E=8), "E=8: is not a variable of abnar"),
    (lambda: get_law("abnarr"), "did you mean 'abnar'"),
])
def test_bad_questions_get_one_line(ask, line):
  with pytest.raises(FieldError) as error:
    ask()
  assert line in str(error.value) and "\n" not in str(error.value)


def test_a_million_candidates():
  rng = np.random.default_rng(0)
  n_topk = 2**rng.integers(0, 5, 10**6)
  shape = Shape(n_layers=rng.integers(4, 64, 10**6), d_model=64 * rng.integers(4, 64, 10**6),
                d_expert=64 * rng.integers(1, 16, 10**6), n_exp=n_topk * 16, n_topk=n_topk)
  for law in LAWS.values():
    values = law.values(shape, Training(1e10))
    assert values.shape == (10**6,) and np.all(np.isfinite(values)), law.name


def test_zhao_counts_shared_experts_among_the_active():
  arch = Architecture(n_layers=4, d_model=64, d_expert=32, n_exp=16, n_topk=4, n_heads=4,
                      n_shared_experts=1)
  values = LAWS["zhao"].variables_of(Shape.of(arch), Training(1e9))
  assert values["G"] == 5 and values["S"] == 0.2
  assert zhao.loss(**values) == LAWS["zhao"].predict(arch, tokens=1e9).loss
