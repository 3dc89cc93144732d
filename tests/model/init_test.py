import dataclasses
import math

import jax
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.mesh import make_mesh
from moe_jax.model import functional, init
from tests.small import ARCH, small_config


@pytest.mark.parametrize("n_layers", [2, 8])
def test_every_matrix_has_the_stated_standard_deviation(n_layers):
  arch = dataclasses.replace(ARCH, n_layers=n_layers, d_model=64, d_expert=48, n_exp=8, n_topk=4,
                             n_heads=4, n_dense_layers=1, n_shared_experts=1)
  config = small_config(arch)
  params = functional.init_params(config, make_mesh(config, jax.devices()[:1]))
  residual = 1 / math.sqrt(2 * n_layers)
  routed = init.routed_scale(arch, MoEConfig())
  expected = {
      "embedding_VD": 1 / 8, "w_head_DV": 1 / 8, "w_query_DHh": 1 / 8, "w_key_DKh": 1 / 8,
      "w_value_DKh": 1 / 8, "w_out_HhD": residual / 8, "w_gate_EDF": 1 / 8,
      "w_up_EDF": 1 / 8, "w_down_EFD": residual * routed / math.sqrt(48),
      "w_router_DE": math.sqrt(0.1) / 8, "w_gate_DF": 1 / 8, "w_up_DF": 1 / 8}
  seen = set()
  for path, leaf in jax.tree.leaves_with_path(params):
    name = path[-1].key
    if name in expected:
      seen.add(name)
      np.testing.assert_allclose(leaf.std(), expected[name], rtol=4 / math.sqrt(leaf.size))
      np.testing.assert_allclose(leaf.mean(), 0, atol=5 * expected[name] / math.sqrt(leaf.size))
    elif "norm" in name:
      np.testing.assert_array_equal(leaf, 1)
    else:
      assert name == "w_down_FD"
      hidden = leaf.shape[1]
      np.testing.assert_allclose(leaf.std(), residual / math.sqrt(hidden),
                                 rtol=4 / math.sqrt(leaf.size))
  assert seen == set(expected)


@pytest.mark.parametrize("n_exp,n_topk", [(8, 2), (64, 8), (16, 16), (1, 1)])
def test_routed_scale_is_near_the_root_of_n_topk_when_normalized(n_exp, n_topk):
  arch = dataclasses.replace(ARCH, n_exp=n_exp, n_topk=n_topk)
  np.testing.assert_allclose(init.routed_scale(arch, MoEConfig()), math.sqrt(n_topk), rtol=0.06)
  expected = n_exp / math.sqrt(n_topk)  # for equal weights; the chosen are above average
  raw = init.routed_scale(arch, MoEConfig(norm_topk_prob=False))
  assert 0.4 * expected < raw <= expected + 1e-9
