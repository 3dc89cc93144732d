import numpy as np
import pytest

from benchmarks import law_coverage
from moe_jax.arch import Architecture
from moe_jax.design.judge import MOE_LAWS, fitted, jackknife, published
from moe_jax.errors import FieldError
from moe_jax.laws.fit import fit
from moe_jax.laws.law import LOSS
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.registry import LAWS
from moe_jax.laws.shape import Shape
from tests.laws.results_file import TRUTH, rows_of
from tests.laws.validate_test import one_of_another_size

MANY = Shape(n_layers=np.array([8, 12, 30]), d_model=np.array([512, 1024, 2048]), d_expert=256,
             n_exp=np.array([8, 64, 256]), n_topk=np.array([2, 8, 1]), n_heads=8, head_dim=64)
ALONE = [Architecture(n_layers=l, d_model=d, d_expert=256, n_exp=e, n_topk=k, n_heads=8,
                      head_dim=64)
         for l, d, e, k in ((8, 512, 8, 2), (12, 1024, 64, 8), (30, 2048, 256, 1))]  # noqa: E741


@pytest.fixture(scope="module")
def cells():
  return to_cells(rows_of(n_cells=30, learning_rates=1, seeds=2))


def test_laws_of_dense_models_are_not_asked_about_experts():
  assert set(LAWS) - set(MOE_LAWS) == {"krajewski-dense", "chinchilla", "besiroglu"}


@pytest.mark.parametrize("name", LAWS)
def test_a_score_is_the_laws_own_prediction(name):
  judge = published(LAWS[name], 2e10)
  for score, arch in zip(np.broadcast_to(judge.score(MANY), 3), ALONE, strict=True):
    answer = LAWS[name].predict(arch, tokens=2e10)
    expected = float(answer.value)
    if answer.quantity != LOSS:
      expected *= 6 * float(Shape.of(arch).n_active) * 2e10
    assert judge.value(score) == pytest.approx(expected, rel=1e-9)


def test_less_is_better_where_more_leverage_is():
  judge = published(LAWS["ling"], 1e12)
  sparse, dense = (Shape(8, 512, 512, n_exp, 1) for n_exp in (64, 8))
  assert LAWS["ling"].predict(sparse, 1e12).value > LAWS["ling"].predict(dense, 1e12).value
  assert judge.score(sparse) < judge.score(dense)
  score = judge.score(sparse)
  assert judge.value(score - 0.05 * np.log(1.1)) == pytest.approx(1.1 * judge.value(score))
  assert judge.change_text(float(score), -0.05 * np.log(1.1)) == "+10.0 % FLOPs"
  assert published(LAWS["zhao"], 1e12).change_text(np.log(2.0), np.log(1.01)) == "+0.0200"


def test_tokens_that_a_law_needs_are_asked_for_at_once():
  with pytest.raises(FieldError, match="tokens=None: is missing: zhao needs"):
    published(LAWS["zhao"], None)
  assert published(LAWS["clark"], None).score(MANY).shape == (3,)


def test_a_fit_judges_as_it_predicts(cells):
  found = fit(cells, "paper")
  judge = fitted(found, 9e9)
  np.testing.assert_allclose(np.exp(judge.score(MANY)), found.predict(MANY, 9e9).loss, rtol=1e-12)
  assert judge.sees == found.form.columns
  assert judge.inside(MANY).tolist() == [
      not found.predict(Shape.of(arch), 9e9).outside for arch in ALONE]
  assert any("n_total" in line for line in judge.notes(MANY))


def test_the_jackknife_is_near_the_covariance_of_least_squares(cells):
  found = fit(cells, "paper")
  x_NP = found.form.matrix(found.cells)[0]
  variance = np.sum(found.residual**2) / (len(cells) - x_NP.shape[1])
  plain = np.sqrt(np.diag(np.linalg.inv(x_NP.T @ x_NP)) * variance)
  covariance, df = jackknife(found)
  assert df == len(cells) - 1
  np.testing.assert_allclose(np.sqrt(np.diag(covariance)), plain, rtol=0.2)


def test_a_covariance_without_the_architecture_that_matters_most_is_refused(cells):
  found = fit(one_of_another_size(cells), "paper")
  with pytest.raises(FieldError, match="paper': has no covariance: without .* the form cannot "
                     "be fitted: the remaining cells do not identify a: ln n_total hardly "
                     "varies") as refused:
    fitted(found, 9e9)
  assert "\n" not in str(refused.value)


def test_slack_covers_what_the_fit_gets_wrong_and_two_runs_scatter():
  """One-sided, each way: what 90 % of differences between a run of each do not leave.

  Of two models that are nearly as good the runs scatter most; of two far apart the parameters
  are wrong by as much.
  """
  best = Shape(10, 512, 128, 16, 4)
  others = Shape(np.array([5, 20]), np.array([512, 1024]), np.array([128, 256]),
                 np.array([64, 512]), np.array([4, 1]))
  true = planted(others) - planted(best)
  assert abs(true[0]) < 0.005 < abs(true[1])
  rng, within = np.random.default_rng(0), []
  for seed in range(100):
    judge = fitted(fit(to_cells(rows_of(seed, n_cells=24, learning_rates=1)), "paper",
                       n_starts=2), 9e9)
    wrong = judge.score(others) - judge.score(best) - true + one_run(rng) - one_run(rng)
    within.append(np.abs(wrong) <= judge.slack(others, best))
  share = np.mean(within, axis=(0, 1))
  assert np.all(np.abs(share - 0.9) <= 0.03), share
  assert judge.slack(best, best)[0] == 0


def planted(shape):
  """ln L of results_file's law, but for its constant."""
  return (-TRUTH["a"] * np.log(shape.n_total) + TRUTH["b_minus_c"] * np.log(shape.n_exp)
          + TRUTH["c"] * np.log(shape.n_exp / shape.n_topk))


def one_run(rng):
  """By how much ln L of ten runs of two models is off it: as results_file's at one rate."""
  miss = 0.3 * rng.standard_normal((10, 2))
  return law_coverage.LR_CURVATURE * miss**2 + law_coverage.NOISE * rng.standard_normal((10, 2))


def test_slack_grows_with_the_distance_from_the_best(cells):
  judge = fitted(fit(cells, "paper"), 9e9)
  best = Shape(10, 512, 128, 64, 4)
  near, far = Shape(11, 512, 128, 64, 4), Shape(10, 512, 128, 512, 1)
  assert 0 < judge.slack(near, best)[0] < judge.slack(far, best)[0]


def test_what_the_data_do_not_identify_is_not_searched_by(cells):
  one_size = cells.take(np.abs(cells.log("n_total") - np.log(1e8)) < 0.3)
  found = fit(one_size, "paper")
  assert "a" in found.identified.refused
  with pytest.raises(FieldError, match="do not identify a .*the search depends on it"):
    fitted(found, 9e9)


def test_other_tokens_than_the_datas_are_noted(cells):
  found = fit(cells, "paper")
  assert not any("tokens" in line for line in fitted(found, 9e9).notes(MANY))
  assert any("no variable for tokens" in line for line in fitted(found, 1e12).notes(MANY))
