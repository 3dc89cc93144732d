import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import TrainConfig
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.train import optimizer
from tests.small import ARCH, small_config


def rates(**fields):
  train = TrainConfig(**fields)
  return np.array([optimizer.learning_rate_schedule(train)(n) for n in range(train.steps)])


def test_wsd_rises_stays_and_falls_and_never_wastes_a_step():
  lr = rates(steps=100, warmup_steps=10, learning_rate=1.0, decay_fraction=0.2)
  np.testing.assert_allclose(lr[:10], np.linspace(1 / 11, 1, 11)[:10], rtol=1e-6)
  np.testing.assert_allclose(lr[10:81], 1.0)
  np.testing.assert_allclose(lr[80:], np.linspace(1, 0, 21)[:20], rtol=1e-5)
  assert lr.min() > 0


def test_cosine_falls_from_the_end_of_the_warm_up():
  lr = rates(steps=100, warmup_steps=20, learning_rate=2.0, schedule="cosine",
             final_learning_rate_fraction=0.1)
  progress = np.arange(80) / 80
  np.testing.assert_allclose(lr[20:], 2 * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2),
                             rtol=1e-5)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_without_warm_up_or_decay(schedule):
  lr = rates(steps=5, warmup_steps=0, learning_rate=0.5, schedule=schedule, decay_fraction=0.0)
  assert lr[0] == 0.5 and (lr > 0).all()
  if schedule == "wsd":
    np.testing.assert_array_equal(lr, np.float32(0.5))


def test_matrices_decay_and_norms_and_embedding_do_not():
  config = small_config(ARCH)
  params = functional.init_params(config, make_mesh(config, jax.devices()[:1]))
  train = TrainConfig(learning_rate=0.5, weight_decay=0.2, warmup_steps=0, steps=10)
  transform = optimizer.make_optimizer(train)
  nothing = jax.tree.map(jnp.zeros_like, params)
  updates, _ = transform.update(nothing, transform.init(params), params)
  kept = {"embedding_VD"}
  for path, update in jax.tree.leaves_with_path(updates):
    name = path[-1].key
    leaf = params
    for key in path:
      leaf = leaf[key.key]
    expected = 0 if name in kept or "norm" in name else -0.5 * 0.2 * leaf
    np.testing.assert_allclose(update, np.broadcast_to(expected, leaf.shape), rtol=1e-5)


def test_adamw_by_hand_with_clipping():
  """Two steps of one weight, against the formulas."""
  train = TrainConfig(learning_rate=0.1, weight_decay=0.3, warmup_steps=0, steps=10,
                      decay_fraction=0.0, clip_norm=1.0, beta1=0.8, beta2=0.9, eps=1e-8)
  transform = optimizer.make_optimizer(train)
  params = {"w_x": jnp.array([1.0, -2.0])}
  state = transform.init(params)
  w, mu, nu = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
  for n, gradient in enumerate([np.array([3.0, 4.0]), np.array([0.3, -0.4])], start=1):
    updates, state = transform.update({"w_x": jnp.asarray(gradient)}, state, params)
    params = {"w_x": params["w_x"] + updates["w_x"]}
    gradient = gradient / max(1, np.linalg.norm(gradient))
    mu, nu = 0.8 * mu + 0.2 * gradient, 0.9 * nu + 0.1 * gradient**2
    step = mu / (1 - 0.8**n) / (np.sqrt(nu / (1 - 0.9**n)) + 1e-8)
    w = w - 0.1 * (step + 0.3 * w)
    np.testing.assert_allclose(params["w_x"], w, rtol=1e-5)
