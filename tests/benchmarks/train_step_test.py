import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import step_limits, train_step
from benchmarks.step_ours import Ours
from moe_jax.arch import Architecture, count

ARCH = Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2,
                    vocab_size=320)


@pytest.mark.parametrize("name", train_step.ARCHS)
def test_the_products_are_the_flops_of_the_architecture(name):
  arch = train_step.ARCHS[name]
  flops = sum(made.flops for made in step_limits.products(arch, 16, 256))
  assert flops == pytest.approx(16 * 256 * count.training_flops_per_token(arch, 256), rel=0.005)


def test_each_product_counts_at_its_best_speed():
  made = step_limits.products(ARCH, 2, 16)[:2]
  seconds = step_limits.matmul_seconds(made, [2.0, 3.0], [1.0, 5.0])
  assert seconds == made[0].count * 1.0 + made[1].count * 3.0
  one = step_limits.Product("", 3, 2, 4, 5, 6, "")
  assert one.flops == 2 * 3 * 2 * 4 * 5 * 6
  assert step_limits.step_bytes([one], 100, 2) == 2 * 3 * 2 * (20 + 30 + 24) + 2800


def test_models_that_differ_are_refused():
  config = train_step.config_of(ARCH, "float32")
  train_step.require_equal({"ours": 9.0, "eager": 9.00001}, config)
  with pytest.raises(RuntimeError, match="disagree"):
    train_step.require_equal({"ours": 9.0, "eager": 9.01}, config)


@pytest.mark.slow
def test_our_side_steps_and_writes_the_weights_it_began_with(tmp_path):
  config = train_step.config_of(ARCH, "float32", sequences=2, seq_len=16)
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, warmup_steps=1))
  tokens = np.random.default_rng(0).integers(0, 320, (2, 17), np.int32)
  np.save(tmp_path / "tokens.npy", tokens)
  ours = Ours(config, str(tmp_path / "tokens.npy"), str(tmp_path / "weights.npz"))
  first, second = ours.step(), ours.step()
  assert second < first and abs(first - np.log(320)) < 1
  assert ours.head() > 0 and len(ours.matmuls()) == len(step_limits.products(ARCH, 2, 16))
  with np.load(tmp_path / "weights.npz") as weights:
    assert weights["moe_layers/moe/w_gate_EDF"].shape == (1, 4, 16, 8)
    moved = np.abs(weights["w_head_DV"] - jax.device_get(ours._state["params"]["w_head_DV"]))
  assert moved.max() > 0
