"""The parameter tree: counted exactly, split by one table, the same on every mesh."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from moe_jax.arch import count
from moe_jax.config import Architecture
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from tests.small import MESHES, small_config


@st.composite
def architectures(draw):
  n_heads = draw(st.sampled_from([1, 2, 6]))
  n_exp = draw(st.integers(1, 9))
  n_layers = draw(st.integers(1, 4))
  return Architecture(
      n_layers=n_layers,
      d_model=n_heads * draw(st.sampled_from([2, 10])),
      d_expert=draw(st.integers(1, 30)),
      n_exp=n_exp,
      n_topk=draw(st.integers(1, n_exp)),
      n_heads=n_heads,
      n_kv_heads=draw(st.sampled_from([None, 1, n_heads])),
      head_dim=draw(st.sampled_from([None, 4, 14])),
      vocab_size=draw(st.integers(257, 400)),
      n_shared_experts=draw(st.integers(0, 2)),
      n_dense_layers=draw(st.integers(0, n_layers)),
      d_dense=draw(st.sampled_from([None, 1, 33])),
      tie_embeddings=draw(st.booleans()))


def abstract(config):
  return functional.abstract_params(config, make_mesh(config, jax.devices()[:1]))


def size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@hypothesis.given(architectures())
@hypothesis.settings(max_examples=25, deadline=None)
def test_counts_equal_the_real_tree(arch):
  params = abstract(small_config(arch))
  embedding = [params.get(name, []) for name in ("embedding_VD", "w_head_DV")]
  assert size(params) == count.n_total_with_embedding(arch)
  assert size(params) - size(embedding) == count.n_total(arch)

  experts = 0  # weights of routed experts; a token uses n_topk of n_exp
  if arch.n_moe_layers:
    moe = params["moe_layers"]["moe"]
    experts = size([moe[name] for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")])
  unused = experts * (arch.n_exp - arch.n_topk) // arch.n_exp
  assert count.n_active(arch) == count.n_total(arch) - unused
  assert count.n_active_with_embedding(arch) == size(params) - unused


def test_init_has_the_described_shapes_and_shardings():
  config = small_config(dataclasses.replace(small_config().arch, n_dense_layers=1),
                        execution={"mesh": MESHES["data2_fsdp2_expert2"]})
  mesh = make_mesh(config)
  described = functional.abstract_params(config, mesh)
  params = functional.init_params(config, mesh)
  assert jax.tree.structure(described) == jax.tree.structure(params)
  for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(described), strict=True):
    assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
  # A device holds its share of every matrix: an eighth would need data to split too.
  gate_LEDF = params["moe_layers"]["moe"]["w_gate_EDF"]
  assert gate_LEDF.addressable_shards[0].data.shape == (1, 4, 8, 12)
  query = params["moe_layers"]["attention"]["w_query_DHh"]
  assert query.addressable_shards[0].data.shape == (1, 4, 2, 8)


@pytest.fixture(scope="module")
def on_one_device():
  config = small_config()
  return functional.init_params(config, make_mesh(config, jax.devices()[:1]))


@pytest.mark.parametrize("name", [
    "fsdp8", "fsdp2_expert4", pytest.param("data2_fsdp2_expert2", marks=pytest.mark.slow)])
def test_initial_parameters_do_not_depend_on_the_mesh(name, on_one_device):
  config = small_config(execution={"mesh": MESHES[name]})
  there = functional.init_params(config, make_mesh(config))
  for a, b in zip(jax.tree.leaves(on_one_device), jax.tree.leaves(there), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name, devices_sharing", [
    ("fsdp8", 8), ("expert8", 8), ("fsdp2_expert4", 8), ("data2_fsdp2_expert2", 4)])
def test_no_parameter_is_whole_on_one_device_while_it_is_made(name, devices_sharing):
  """By the compiler's count of what each device holds, results and temporaries."""
  arch = dataclasses.replace(small_config().arch, d_model=64, d_expert=64)
  config = small_config(arch, execution={"mesh": MESHES[name]})
  mesh = make_mesh(config)
  memory = functional.lower_init_params(config, mesh).compile().memory_analysis()
  share = 4 * size(functional.abstract_params(config, mesh)) / devices_sharing
  assert memory.output_size_in_bytes < 1.1 * share
  assert memory.temp_size_in_bytes < 2 * share  # whole, it would be 4 or 8 of them


def test_seed_init_changes_every_matrix_and_layers_differ():
  configs = [small_config(seed_init=seed) for seed in (0, 0, 1)]
  a, again, b = (functional.init_params(c, make_mesh(c, jax.devices()[:1])) for c in configs)
  for (path, leaf), same, other in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(again),
                                       jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(leaf, same)
    if "norm" not in path[-1].key:
      assert not np.array_equal(leaf, other), path
  query_LDHh = a["moe_layers"]["attention"]["w_query_DHh"]
  assert not np.array_equal(query_LDHh[0], query_LDHh[1])
