"""Rows reach their experts' devices and come back, by the numbers ragged_all_to_all takes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.moe import ragged_exchange

N_DEVICES, N_EXP, N_ROWS, D_MODEL = 4, 8, 24, 3  # rows a device
N_ARRIVING = N_DEVICES * N_ROWS
SIZES = st.sampled_from(["even", "skewed", "all to one", "none from one"])


def random_sizes(kind, seed):
  """size_PE with N_ROWS rows a device."""
  rng = np.random.default_rng(seed)
  weights_PE = {"even": np.ones, "skewed": lambda shape: rng.dirichlet([0.2] * N_EXP, N_DEVICES),
                "all to one": lambda shape: np.eye(N_EXP)[[seed % N_EXP] * N_DEVICES],
                "none from one": np.ones}[kind]((N_DEVICES, N_EXP))
  size_PE = np.stack([rng.multinomial(N_ROWS, w / w.sum()) for w in weights_PE])
  if kind == "none from one":  # what a device without tokens would send
    size_PE[seed % N_DEVICES] = 0
  return size_PE.astype(np.int32)


def transfer(x_PSD, ways, n_rows):
  """What jax.lax.ragged_all_to_all is documented to do, slice by slice."""
  y_PRD = np.zeros((N_DEVICES, n_rows, x_PSD.shape[2]), x_PSD.dtype)
  e = len(ways[0].send_size) // N_DEVICES
  for source, way in enumerate(ways):
    for i in range(len(way.send_size)):
      target = i // e
      # The receiver must expect this size at the same place of its own list.
      assert ways[target].receive_size[source * e + i % e] == way.send_size[i]
      rows = slice(way.send_start[i], way.send_start[i] + way.send_size[i])
      place = slice(way.arrive_start[i], way.arrive_start[i] + way.send_size[i])
      assert place.stop <= n_rows and not y_PRD[target, place].any()  # within, and once
      y_PRD[target, place] = x_PSD[source, rows]
  return y_PRD


@jax.jit
def plans_of_all(size_PE):
  return [ragged_exchange.plan_exchange(size_PE, device) for device in range(N_DEVICES)]


def numbered_rows():
  """Each row has a number of its own, above 0."""
  return 1 + np.arange(N_DEVICES * N_ROWS * D_MODEL, dtype=np.float32).reshape(
      N_DEVICES, N_ROWS, D_MODEL)


@hypothesis.given(kind=SIZES, seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=60, deadline=None)
def test_rows_arrive_sorted_by_expert_and_return_to_their_places(kind, seed):
  size_PE = random_sizes(kind, seed)
  plans = jax.device_get(plans_of_all(size_PE))
  x_PSD = numbered_rows()
  for p, sizes in enumerate(size_PE):  # rows that go nowhere
    x_PSD[p, sizes.sum():] = 0
  y_PRD = transfer(x_PSD, [plan.there for plan in plans], N_ARRIVING)
  start_PE = np.cumsum(size_PE, axis=1) - size_PE
  for p, plan in enumerate(plans):
    start_e = np.cumsum(plan.size_e) - plan.size_e
    for i, expert in enumerate(range(p * 2, p * 2 + 2)):
      sent = np.concatenate([x_PSD[s, start_PE[s, expert]:][:size_PE[s, expert]]
                             for s in range(N_DEVICES)])
      np.testing.assert_array_equal(y_PRD[p, start_e[i]:][:plan.size_e[i]], sent)
  np.testing.assert_array_equal(
      transfer(y_PRD, [plan.back for plan in plans], N_ROWS), x_PSD)


MESH = jax.sharding.Mesh(np.array(jax.devices()[:N_DEVICES]), ("expert",))


def over_devices(platform):
  """(x_PSD, size_PE) -> what arrives on each device, as a function over the mesh."""

  @functools.partial(jax.shard_map, mesh=MESH, in_specs=P("expert"), out_specs=P("expert"))
  def run(x_1SD, size_1E):
    size_PE = jax.lax.all_gather(size_1E[0], "expert")
    plan = ragged_exchange.plan_exchange(size_PE, jax.lax.axis_index("expert"))
    return ragged_exchange.exchange(x_1SD[0], plan.there, plan.back, N_ARRIVING, "expert",
                                    platform)[None]

  return run


@jax.jit
def exchanged(x_PSD, size_PE, dy_PRD):
  y_PRD, pull_back = jax.vjp(lambda x: over_devices("cpu")(x, size_PE), x_PSD)
  return y_PRD, *pull_back(dy_PRD)


@hypothesis.given(kind=SIZES, seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=30, deadline=None)
def test_the_stand_in_does_what_ragged_all_to_all_is_documented_to_do(kind, seed):
  """On four fake devices, with the gradient: that is the transfer the other way."""
  size_PE = random_sizes(kind, seed)
  plans = jax.device_get(plans_of_all(size_PE))
  dy_PRD = 1 + np.arange(N_DEVICES * N_ARRIVING * D_MODEL, dtype=np.float32).reshape(
      N_DEVICES, N_ARRIVING, D_MODEL)
  y_PRD, dx_PSD = exchanged(numbered_rows(), size_PE, dy_PRD)
  np.testing.assert_array_equal(
      y_PRD, transfer(numbered_rows(), [plan.there for plan in plans], N_ARRIVING))
  np.testing.assert_array_equal(
      dx_PSD, transfer(dy_PRD, [plan.back for plan in plans], N_ROWS))


def test_on_tpu_it_is_ragged_all_to_all_both_ways():
  """Lowered for TPU (no TPU is needed for that): two exchanges, no gathered rows."""

  def loss(x_PSD, size_PE):
    return (over_devices("tpu")(x_PSD, size_PE) ** 2).sum()

  lowered = jax.jit(jax.grad(loss)).trace(
      numbered_rows(), random_sizes("even", 0)).lower(lowering_platforms=("tpu",)).as_text()
  assert lowered.count("@ragged_all_to_all(") == 2
  gathers = [line for line in lowered.splitlines() if "all_gather" in line]
  assert len(gathers) == 1 and "f32" not in gathers[0]  # of the sizes


@pytest.mark.parametrize("target", [[5, 0], [0, 9]])
def test_slices_are_read_from_and_written_to_their_places(target):
  index = ragged_exchange.slice_index(jnp.array([20, 40]), jnp.array(target),
                                      jnp.array([3, 2]), 12)
  expected = np.full(12, np.iinfo(np.int32).max)
  expected[target[0]:target[0] + 3] = [20, 21, 22]
  expected[target[1]:target[1] + 2] = [40, 41]
  np.testing.assert_array_equal(index, expected)
