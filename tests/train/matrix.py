"""Every way to compute a training step computes the same step; a test file for each router.

{reference, capacity, dropless} x {softmax, sigmoid with a bias} x meshes x {float32, bfloat16},
with shared experts and a dense first layer: loss, every gradient leaf and the experts of every
token, against the reference on one device. Some always, all under the slow marker. Capacity
multiplies empty slots, as on accelerators; "packed" leaves them out, as CPUs do that hold all
experts on one device. Meshes are all eight for the softmax router; the reference, with which
nobody trains, and the sigmoid router, which differs before anything travels, have some.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from moe_jax.config import Architecture
from moe_jax.mesh import MESH_AXES, make_mesh
from moe_jax.model import functional
from moe_jax.moe import expert_parallel, layer
from moe_jax.train import step
from tests.small import ARCH, MESHES, ONE_DEVICE, small_config
from tests.train.step_test import SHARED_AND_DENSE, batch_of

NO_DROPS = {"dispatch": "capacity", "capacity_factor": ARCH.n_exp / ARCH.n_topk}
DISPATCHES = {"reference": {"dispatch": "reference"}, "capacity": NO_DROPS, "packed": NO_DROPS,
              "dropless": {"dispatch": "dropless"}}
REFERENCE_ON = ("expert8", "data2_fsdp2_expert2")
DTYPES = ("float32", "bfloat16")


def arch_of(dtype: str) -> Architecture:
  """In bfloat16 with one MoE layer alone: a second one would see tokens that differ by
  rounding, and those near a boundary would be given other experts, so that no bound held."""
  if dtype == "float32":
    return SHARED_AND_DENSE
  return dataclasses.replace(SHARED_AND_DENSE, n_layers=1 + SHARED_AND_DENSE.n_dense_layers)


def tolerance_of(arch: Architecture, dtype: str) -> float:
  """Bound on the relative difference of two results that are the same in exact arithmetic.

  Float32 is asked for 1e-5. In bfloat16 every value on the path from the parameters to a
  gradient is rounded to 8 bits, an error of at most u = 2^-8. The errors are independent, so
  that after n of them the root mean square error of a leaf is at most about sqrt(n) u of its
  root mean square (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis,
  2019), and two such results differ by sqrt(2 n) u.

  n, along the longest path. Forward, a layer: norm, projection, rotation, scores, values,
  projection, sum; norm, gate, activation times up, down, combination, sum of experts, sum.
  Besides: the embedding, the last norm. Backward each of these again for its input and, where
  it has two inputs, where the two gradients meet. At the end, on eight devices: seven sums.
  """
  if dtype == "float32":
    return 1e-5
  forward = 14 * arch.n_layers + 2
  return math.sqrt(2 * (3 * forward + 7)) * 2**-8


def cells(fast: set[tuple[str, ...]], meshes: Iterable[str] = MESHES) -> list[Any]:
  """(dispatch, mesh, type) of every cell; those not in `fast` marked slow."""
  everything = [(dispatch, name, dtype) for dispatch, name, dtype
                in itertools.product(DISPATCHES, meshes, DTYPES)
                if (dispatch != "packed" or MESHES[name].expert == 1)
                and (dispatch != "reference" or name in REFERENCE_ON)]
  assert fast <= set(everything)
  return [cell if cell in fast else pytest.param(*cell, marks=pytest.mark.slow)
          for cell in everything]


class Result(NamedTuple):
  """Of one step.

  Attributes:
    loss: with the router's losses.
    grads: of every parameter.
    experts_LTK: which experts every MoE layer gave each token.
  """

  loss: np.ndarray
  grads: Any
  experts_LTK: np.ndarray


def check(router: str, dispatch: str, mesh_name: str, dtype: str) -> None:
  """One cell against the reference on one device."""
  ours = result_of(router, dispatch, mesh_name, dtype)
  truth = reference_of(router, dtype)
  np.testing.assert_array_equal(ours.experts_LTK, truth.experts_LTK)
  tolerance = tolerance_of(arch_of(dtype), dtype)
  np.testing.assert_allclose(ours.loss, truth.loss, rtol=tolerance)
  for (path, grad), true_grad in zip(jax.tree.leaves_with_path(ours.grads),
                                     jax.tree.leaves(truth.grads), strict=True):
    assert grad.any(), path  # something arrives at every leaf
    if dtype == "float32":
      np.testing.assert_allclose(grad, true_grad, rtol=tolerance, atol=tolerance,
                                 err_msg=str(path))
    else:
      difference = np.linalg.norm((grad - true_grad).ravel())
      assert difference <= tolerance * np.linalg.norm(true_grad.ravel()), path


@functools.cache
def reference_of(router: str, dtype: str) -> Result:
  return result_of(router, "reference", None, dtype)


def result_of(router: str, dispatch: str, mesh_name: str | None, dtype: str) -> Result:
  """A step from the first parameters, on the mesh of that name or on one device."""
  config = small_config(
      arch_of(dtype), model={"compute_dtype": dtype},
      moe={"router": router, **DISPATCHES[dispatch]},
      execution={"mesh": MESHES.get(mesh_name, ONE_DEVICE)})
  n_devices = 1 if mesh_name is None else 8
  mesh = make_mesh(config, jax.devices()[:n_devices])
  model = put_model(config, mesh, first_params(config.arch))
  batch = step.put_batch(batch_of(config), config, mesh)

  def loss(params, router_state, batch):
    total, (metrics, _) = step.batch_loss(params, batch, config, mesh, router_state)
    return total, metrics["drop_rate"]

  slots_to_pack = 0 if dispatch == "packed" else math.inf
  with recorded_routing() as chosen, mock.patch.object(expert_parallel, "_SLOTS_TO_PACK",
                                                       slots_to_pack):
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, drop_rate), grads = jax.device_get(run(model["params"], model["router"], batch))
    jax.effects_barrier()
  assert drop_rate == 0
  assert len(chosen) == n_devices
  # The devices hold the batch in the order of the mesh, and each runs its layers in order.
  experts_LTK = np.concatenate([np.stack(chosen[device]) for device in sorted(chosen)], axis=1)
  assert len(experts_LTK) == config.arch.n_moe_layers
  return Result(total, grads, experts_LTK)


@functools.cache
def first_params(arch: Architecture) -> functional.Params:
  """They depend neither on the mesh nor on the type in which the step computes."""
  config = small_config(arch)
  return jax.device_get(functional.init_params(config, make_mesh(config, jax.devices()[:1])))


def put_model(config, mesh, params) -> dict[str, Any]:
  """Parameters and router state on a mesh, with selection biases that change the selection."""
  abstract = functional.abstract_model(config, mesh)
  bias_E = np.random.default_rng(1).normal(size=ARCH.n_exp).astype(np.float32) / 4
  biases = jax.tree.map(lambda leaf: np.broadcast_to(bias_E, leaf.shape), abstract["router"])
  return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding),
                      {"params": params, "router": biases}, abstract)


@contextlib.contextmanager
def recorded_routing():
  """Has each device tell, layer by layer, which experts its tokens were given."""
  chosen, original = collections.defaultdict(list), layer.route

  def record(expert_TK, *device):
    chosen[tuple(map(int, device))].append(np.asarray(expert_TK))

  def route(*args, **kwargs):
    routing = original(*args, **kwargs)
    jax.debug.callback(record, routing.expert_TK, *map(jax.lax.axis_index, MESH_AXES))
    return routing

  with mock.patch.object(layer, "route", route):
    yield chosen
