"""On eight fake devices, laid out in eight ways, the layer is the one-device reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.mesh import MESH_AXES
from moe_jax.moe import expert_parallel
from moe_jax.moe.expert_parallel import sharded_moe_layer
from moe_jax.moe.experts import Experts
from moe_jax.moe.layer import Semantics

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (1, 2, 4), (2, 2, 2),
          (1, 4, 2)]
N_TOPK, GROUP = 3, 12
REFERENCE = Semantics(N_TOPK, True, GROUP, 0, "reference")
DROPLESS = Semantics(N_TOPK, True, GROUP, 0, "dropless")


def mesh_of(shape):
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  return jax.sharding.Mesh(devices, MESH_AXES)


def layer(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  x_BSD = jax.random.normal(keys[0], (16, 6, 16), dtype)
  w_router_DE = jax.random.normal(keys[1], (16, 8)) / 2
  shapes = Experts((8, 16, 12), (8, 16, 12), (8, 12, 16))
  return x_BSD, w_router_DE, Experts(
      *(jax.random.normal(key, shape) / 4 for key, shape in zip(keys[2:], shapes, strict=True)))


def value_and_grads(shape, semantics, dtype=jnp.float32, inputs=layer):
  mesh = mesh_of(shape)

  @jax.jit
  def run(x_BSD, w_router_DE, experts):
    def loss(x_BSD, w_router_DE, experts):
      y_BSD, sums = sharded_moe_layer(x_BSD, w_router_DE, experts, semantics, mesh)
      scale = jnp.cos(jnp.arange(y_BSD.size).reshape(y_BSD.shape))
      return (y_BSD * scale).sum(), (y_BSD, sums)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        x_BSD, w_router_DE, experts)

  (_, (y_BSD, sums)), grads = run(*inputs(dtype))
  return jax.device_get((y_BSD, sums, grads))


@pytest.mark.parametrize("n_here, n", [(1, 1), (6, 6), (8, 8), (9, 3), (11, 1), (12, 6), (64, 8)])
def test_experts_travel_in_as_many_equal_groups_as_there_can_be(n_here, n):
  assert expert_parallel.n_exchanges(n_here) == n


@pytest.fixture
def padded(monkeypatch):
  """Empty slots are multiplied, too, as on accelerators, however many they are."""
  monkeypatch.setattr(expert_parallel, "_SLOTS_TO_PACK", math.inf)


@pytest.fixture(scope="module")
def reference():
  return value_and_grads((1, 1, 1), REFERENCE)


@pytest.fixture(scope="module")
def dropping():
  return value_and_grads((1, 1, 1), Semantics(N_TOPK, True, GROUP, 5))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_capacity_equals_reference_on_every_mesh(shape, reference, padded):
  """Outputs, sums and all gradients to 1e-5, where nothing drops."""
  ours = value_and_grads(shape, Semantics(N_TOPK, True, GROUP, GROUP))
  assert ours[1].dropped == 0
  np.testing.assert_array_equal(ours[1].assigned_E, reference[1].assigned_E)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# The rest is in the matrix test of the whole model.
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 4), (2, 2, 2), (1, 4, 2)], ids=str)
def test_dropless_equals_the_reference(shape, reference):
  """Outputs, sums and all gradients to 1e-5."""
  ours = value_and_grads(shape, DROPLESS)
  np.testing.assert_array_equal(ours[1].assigned_E, reference[1].assigned_E)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [(0, 1, 2), (3, 6, 7)])
def test_dropless_drops_nothing_where_all_tokens_want_few_devices(experts):
  """Four devices of two experts; what arrives at one is as much as can arrive."""

  def skewed(dtype=jnp.float32):
    x_BSD, w_router_DE, weights = layer(dtype)
    x_BSD = x_BSD.at[..., 0].set(1.0)
    return x_BSD, w_router_DE.at[0, jnp.array(experts)].add(100.0), weights

  truth, ours = (value_and_grads(shape, semantics, inputs=skewed) for shape, semantics in (
      ((1, 1, 1), REFERENCE), ((1, 2, 4), DROPLESS)))
  assert ours[1].dropped == 0
  np.testing.assert_array_equal(np.flatnonzero(ours[1].assigned_E), experts)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_same_tokens_drop_on_every_mesh(shape, dropping):
  ours = value_and_grads(shape, Semantics(N_TOPK, True, GROUP, 5))
  assert ours[1].dropped == dropping[1].dropped > 0
  # A token that lost an expert has another output: equal outputs mean equal drops.
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(dropping), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [7, GROUP])
def test_many_empty_slots_are_left_out_on_one_device_and_the_same_tokens_drop(capacity, request):
  """Of 7 or 12 slots for 4.5 assignments a device with all experts multiplies those in use."""
  semantics, shape = Semantics(N_TOPK, True, GROUP, capacity), (2, 1, 1)

  def program():
    return str(jax.make_jaxpr(lambda *a: sharded_moe_layer(*a, semantics, mesh_of(shape)))(
        *layer()))

  rows_of_all_slots = f"f32[8,{4 * capacity},16]"
  packed, packed_program = value_and_grads(shape, semantics), program()
  request.getfixturevalue("padded")
  padded, padded_program = value_and_grads(shape, semantics), program()
  assert rows_of_all_slots in padded_program and rows_of_all_slots not in packed_program
  assert packed[1].dropped == padded[1].dropped
  assert (padded[1].dropped > 0) == (capacity < GROUP)
  for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(padded), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_padding_at_the_end_is_in_no_sum_on_a_mesh():
  """And, being served last, it takes no slot from the tokens before it."""
  x_BSD, w_router_DE, experts = layer()
  counted_BS = jnp.arange(16 * 6).reshape(16, 6) < 51
  semantics = Semantics(N_TOPK, True, GROUP, 5)

  def run(shape, x_BSD):
    return jax.jit(sharded_moe_layer, static_argnums=(3, 4))(
        x_BSD, w_router_DE, experts, semantics, mesh_of(shape), counted_BS)

  y_BSD, sums = run((1, 1, 1), x_BSD)
  assert sums.tokens == 51 and sums.assigned_E.sum() == 51 * N_TOPK
  padded_BSD = jnp.where(counted_BS[..., None], x_BSD, 3.0)
  for shape in ((1, 1, 1), (2, 2, 2)):
    theirs_BSD, their_sums = run(shape, padded_BSD)
    np.testing.assert_allclose(theirs_BSD[counted_BS], y_BSD[counted_BS], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), their_sums, sums)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_the_reference_too_runs_expert_parallel(shape, reference):
  ours = value_and_grads(shape, REFERENCE)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bytes_on_the_wire_are_those_of_the_compute_type():
  """Weights and rows travel as bfloat16 where the tokens are bfloat16: here by three gathers, and
  there and back for each of four local experts. Only what rows weigh is float32."""
  mesh = mesh_of((1, 4, 2))
  semantics = Semantics(N_TOPK, True, GROUP, 5)
  jaxpr = str(jax.make_jaxpr(lambda *a: sharded_moe_layer(*a, semantics, mesh)[0])(
      *layer(jnp.bfloat16)))
  moves = [line for line in jaxpr.splitlines() if "= all_to_all[" in line
           or "= all_gather[" in line]
  narrow = [line for line in moves if ":bf16[" in line]
  assert len(moves) == 12 and len(narrow) == 11, moves


def test_bfloat16_on_a_mesh_is_bfloat16_on_one_device(padded):
  """Forward the same rows are multiplied; gradients are summed over devices in bfloat16."""
  semantics = Semantics(N_TOPK, True, GROUP, GROUP)
  one, many = (value_and_grads(shape, semantics, jnp.bfloat16) for shape in ((1, 1, 1), (2, 2, 2)))
  np.testing.assert_array_equal(one[1].assigned_E, many[1].assigned_E)
  for a, b in zip(jax.tree.leaves((one[0], one[2])), jax.tree.leaves((many[0], many[2])),
                  strict=True):
    a, b = np.float32(a), np.float32(b)
    # Eight partial sums, each rounded to 8 bits, and a rounding for each of three additions.
    np.testing.assert_allclose(a, b, atol=np.abs(a).max() * 2**-6)
