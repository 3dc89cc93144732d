"""An upcycled mixture computes what its dense model does; one that could not is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Architecture
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.mesh import make_mesh
from moe_jax.model import functional, upcycle
from tests.small import random_params, small_config

DENSE = Architecture(n_layers=2, d_model=16, d_expert=24, n_exp=1, n_topk=1, n_heads=2)
TOKENS_BS = np.random.default_rng(0).integers(0, 256, (8, 16)).astype(np.int32)


def config_of(arch, **moe):
  return small_config(arch, moe={"dispatch": "dropless", **moe}, seed_init=arch.n_exp)


@functools.cache  # compiled once
def forward(config):
  mesh = make_mesh(config, jax.devices()[:1])
  router = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype),
                        functional.abstract_model(config, mesh)["router"])
  return jax.jit(lambda params: functional.apply(
      config, params, TOKENS_BS, 0 * TOKENS_BS, mesh, router=router)[0])


@pytest.mark.parametrize("dense, mixture, router", [
    ({}, {"n_exp": 8, "n_topk": 2}, "softmax"),
    ({}, {"n_exp": 8, "n_topk": 4, "d_expert": 12}, "softmax"),
    ({"n_dense_layers": 2, "d_dense": 24, "tie_embeddings": True},
     {"n_exp": 6, "n_topk": 3, "d_expert": 8, "n_dense_layers": 1, "d_dense": 24,
      "tie_embeddings": True}, "softmax"),
    ({"n_dense_layers": 1}, {"n_exp": 4, "n_topk": 2}, "sigmoid"),
], ids=["whole", "halves", "thirds_and_a_dense_layer", "sigmoid"])
def test_the_mixture_begins_as_the_dense_model(dense, mixture, router):
  dense = config_of(dataclasses.replace(DENSE, **dense), norm_topk_prob=False)
  config = config_of(dataclasses.replace(DENSE, **mixture), router=router, norm_topk_prob=True)
  upcycle.check(config, dense)
  dense_params, fresh = random_params(dense), random_params(config, seed=1)
  params = upcycle.upcycled(dense_params, fresh, config)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  np.testing.assert_allclose(forward(config)(params), forward(dense)(dense_params), atol=1e-5)


def test_tokens_go_to_whole_groups_and_experts_of_one_differ():
  """The function would be equal without routing at all: look at what is routed."""
  config = config_of(dataclasses.replace(DENSE, n_exp=8, n_topk=4, d_expert=12))
  dense = config_of(DENSE, norm_topk_prob=False)
  params = upcycle.upcycled(random_params(dense), random_params(config, seed=1), config)[
      "moe_layers"]["moe"]
  router_LDE = np.asarray(params["w_router_DE"])
  np.testing.assert_array_equal(router_LDE[..., ::2], router_LDE[..., 1::2])
  assert len(np.unique(router_LDE[0, 0])) == 4
  gate_LEDF = np.asarray(params["w_gate_EDF"])
  np.testing.assert_array_equal(gate_LEDF[:, 0], gate_LEDF[:, 2])  # the same shard
  assert (gate_LEDF[:, 0] != gate_LEDF[:, 1]).any()


def test_a_model_without_routed_layers_is_dense_whatever_its_experts_would_be():
  routed = config_of(dataclasses.replace(DENSE, n_exp=8, n_topk=2, n_shared_experts=1))
  assert not upcycle.is_dense(routed)
  assert upcycle.is_dense(override(routed, {"arch.n_dense_layers": DENSE.n_layers}))


@pytest.mark.parametrize("dense, changes, problem", [
    ({}, {"moe.router": "expert_choice", "moe.norm_topk_prob": False, "moe.dispatch": "capacity"},
     "moe.router='expert_choice': must be softmax or sigmoid for upcycling"),
    ({}, {"moe.norm_topk_prob": False}, "moe.norm_topk_prob=False: must be true for upcycling"),
    ({}, {"arch.n_shared_experts": 1}, "arch.n_shared_experts=1: must be 0 for upcycling"),
    ({}, {"arch.d_expert": 10}, "arch.d_expert=10: must divide 24, the hidden width"),
    ({}, {"arch.d_expert": 12, "arch.n_exp": 9}, "arch.n_exp=9: must be a multiple of 2"),
    ({}, {"arch.d_expert": 12, "arch.n_topk": 3}, "arch.n_topk=3: must be a multiple of 2"),
    ({}, {"arch.n_dense_layers": 1}, "arch.d_dense=48: must be 24, as in the dense run"),
    ({"n_dense_layers": 1, "d_dense": 7}, {}, "its dense layers are not all of one width"),
])
def test_a_mixture_that_cannot_be_the_dense_model_is_refused(dense, changes, problem):
  config = override(config_of(dataclasses.replace(DENSE, n_exp=8, n_topk=2)), changes)
  with pytest.raises(FieldError, match=problem):
    upcycle.check(config, config_of(dataclasses.replace(DENSE, **dense), norm_topk_prob=False))
