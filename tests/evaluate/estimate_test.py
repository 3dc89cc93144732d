import numpy as np

from moe_jax.evaluate.estimate import Estimate, ratio


def test_equal_documents_give_the_standard_error_of_a_mean():
  mean_D = np.random.default_rng(0).normal(2, 0.3, 40)
  found = ratio(mean_D * 7, np.full(40, 7))
  np.testing.assert_allclose(found.value, mean_D.mean())
  np.testing.assert_allclose(found.se, mean_D.std(ddof=1) / np.sqrt(40))


def test_the_error_is_that_of_drawing_other_documents():
  """Against the spread of the ratio over many draws of documents of unequal sizes."""
  rng = np.random.default_rng(1)

  def draw():
    size_D = rng.integers(20, 400, 60)
    return rng.normal(2, 0.4, 60) * size_D, size_D

  found = [ratio(*draw()) for _ in range(2000)]
  spread = np.std([estimate.value for estimate in found])
  np.testing.assert_allclose(np.mean([estimate.se for estimate in found]), spread, rtol=0.05)


def test_one_document_has_no_error_and_units_scale():
  assert ratio(np.array([6.0]), np.array([3])) == Estimate(2.0, None)
  assert Estimate(2.0, None).scaled(3) == Estimate(6.0, None)
  assert Estimate(2.0, 0.5).scaled(3) == Estimate(6.0, 1.5)
