"""What a router carries from step to step: its selection bias, and the jitter of a step."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.arch import count
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.moe.router import router_metrics
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint, step
from moe_jax.train.checkpoint_format import CheckpointError
from tests.small import ARCH, MESHES, ONE_DEVICE, small_config
from tests.train.step_test import batch_of

RATE = 0.004
SIGMOID = {"router": "sigmoid", "bias_update_rate": RATE, "jitter": 0.1, "capacity_factor": 0.75}


def start(config):
  """(a state, the compiled step, a function from a seed to a batch) on the config's mesh."""
  n_devices = int(np.prod(dataclasses.astuple(config.execution.mesh)))
  mesh = make_mesh(config, jax.devices()[:n_devices])
  return (step.init_state(config, mesh), step.compile_train_step(config, mesh),
          lambda seed: step.put_batch(batch_of(config, seed), config, mesh))


def after(config, n_steps):
  """State and metrics after some steps, on the host."""
  state, train_step, batch = start(config)
  for seed in range(n_steps):
    state, metrics = train_step(state, batch(seed))
  return jax.device_get((state, metrics))


def bias_of(state):
  (bias_LE,) = jax.tree.leaves(state["router"])
  return np.asarray(bias_LE)


@pytest.fixture(scope="module")
def one_device():
  return after(small_config(moe=SIGMOID), 3)


def test_the_bias_moves_against_the_load_of_each_layer():
  """By exactly the rate, however the optimizer is set: and the parameters do not feel it."""
  config = small_config(moe=SIGMOID, train={"weight_decay": 0.9, "learning_rate": 0.5})
  state, train_step, batch = start(config)
  params = jax.device_get(state["params"])
  mesh = make_mesh(config, jax.devices()[:1])
  (_, (_, sums)), grads = jax.jit(jax.value_and_grad(
      lambda params, batch, router: step.batch_loss(params, batch, config, mesh, router, 0),
      has_aux=True))(params, batch(0), functional.init_router(config, mesh))
  state, _ = train_step(state, batch(0))
  load_LE = np.asarray(sums.assigned_E)
  assert load_LE.shape == (2, 8) and len(set(load_LE.ravel())) > 4
  expected_LE = RATE * np.sign(load_LE.mean(1, keepdims=True) - load_LE)
  np.testing.assert_array_equal(bias_of(state), expected_LE)
  # It is no parameter: no gradient, no moments, no size.
  for tree in (grads, state["mu"], state["nu"], state["params"]):
    assert jax.tree.structure(tree) == jax.tree.structure(params)
  size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
  assert size == count.n_total_with_embedding(config.arch)


@pytest.mark.parametrize("execution", [
    {"mesh": MESHES["data2_fsdp2_expert2"]}, {"microbatches": 4, "remat": "dots"},
    pytest.param({"mesh": MESHES["fsdp2_expert4"]}, marks=pytest.mark.slow),
], ids=str)
def test_bias_and_jitter_are_those_of_the_global_batch(execution, one_device):
  """Neither the mesh nor microbatches change who is counted, or the noise a token gets."""
  state, metrics = after(small_config(moe=SIGMOID, execution=execution), 3)
  true_state, true_metrics = one_device
  np.testing.assert_array_equal(bias_of(state), bias_of(true_state))
  assert np.abs(bias_of(state)).max() > 2 * RATE  # it went on after the first step
  for name, value in true_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_jitter_follows_the_seed_and_the_step_alone():
  config = small_config(moe={"jitter": 0.5, "dispatch": "reference"})
  mesh = make_mesh(config, jax.devices()[:1])
  params = functional.init_params(config, mesh)
  batch = step.put_batch(batch_of(config), config, mesh)

  def loss(seed, number):
    seeded = dataclasses.replace(config, seed_init=seed)
    return float(step.batch_loss(params, batch, seeded, mesh, step=number)[1][0]["loss"])

  run = {(seed, number): loss(seed, number) for seed in (0, 1) for number in (0, 1, None)}
  assert run[0, None] == run[1, None]  # no jitter
  assert len(set(run.values())) == 5
  assert loss(0, 1) == run[0, 1]


def test_evaluation_has_no_jitter_and_uses_the_bias(one_device):
  config = small_config(moe=SIGMOID)
  mesh = make_mesh(config, jax.devices()[:1])
  state = jax.tree.map(np.copy, one_device[0])
  batch = batch_of(config, 9)

  def evaluate(config, router):
    return jax.jit(lambda: functional.apply(config, state["params"], batch["inputs_BS"],
                                            batch["segments_BS"], mesh, router=router)[0])()

  ours = evaluate(config, state["router"])
  still = small_config(moe=SIGMOID | {"jitter": 0.0})
  np.testing.assert_array_equal(ours, evaluate(still, state["router"]))
  unbiased = evaluate(config, functional.init_router(config, mesh))
  assert np.abs(ours - unbiased).max() > 1e-3  # the bias is used
  with pytest.raises(ValueError, match="router does not match"):
    functional.apply(config, state["params"], batch["inputs_BS"], batch["segments_BS"], mesh)


def saved(config, state, folder):
  """The run directory with one checkpoint of this state."""
  run_dir = RunDir.of(folder, Cell("small", "small.py:x", "cell", config))
  with checkpoint.Checkpointer(run_dir, keep=1) as checkpointer:
    checkpointer.save(int(state["step"]), state, {}, {})
  return run_dir


def restored(config, run_dir):
  mesh = make_mesh(config, jax.devices()[:1])
  with checkpoint.Checkpointer(run_dir, keep=1) as checkpointer:
    return checkpointer.restore_latest(step.abstract_state(config, mesh)).state


@pytest.mark.parametrize("moe", [SIGMOID, {"router": "expert_choice", "norm_topk_prob": False,
                                           "jitter": 0.1}], ids=lambda moe: moe["router"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(moe, tmp_path):
  config = small_config(moe=moe)
  state, train_step, batch = start(config)
  for seed in range(2):
    state, _ = train_step(state, batch(seed))
  run_dir = saved(config, state, tmp_path)
  again = restored(config, run_dir)
  for seed in range(2, 4):
    state, metrics = train_step(state, batch(seed))
    again, metrics_again = train_step(again, batch(seed))
  assert jax.tree.structure(again) == jax.tree.structure(state)
  for ours, theirs in zip(jax.tree.leaves((again, metrics_again)),
                          jax.tree.leaves((state, metrics)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_bias_is_restored_for_evaluation_on_any_mesh(one_device, tmp_path):
  state, _ = one_device
  config = small_config(moe=SIGMOID)
  run_dir = saved(config, jax.device_put(state, jax.devices()[0]), tmp_path)
  many = small_config(moe=SIGMOID, execution={"mesh": MESHES["fsdp2_expert4"]})
  for wanted, devices in ((config, jax.devices()[:1]), (many, None)):
    found, model, _ = checkpoint.restore_model(
        run_dir, functional.abstract_model(wanted, make_mesh(wanted, devices)))
    assert found == 3
    np.testing.assert_array_equal(bias_of(model), bias_of(state))


def test_a_checkpoint_without_a_bias_is_refused_where_one_is_needed(tmp_path):
  softmax, sigmoid = small_config(), small_config(moe=SIGMOID)
  mesh = make_mesh(softmax, jax.devices()[:1])
  run_dir = saved(softmax, step.init_state(softmax, mesh), tmp_path)
  assert not (run_dir.checkpoints / "0" / "router").exists()
  with pytest.raises(CheckpointError, match="router"):
    checkpoint.restore_model(run_dir, functional.abstract_model(sigmoid, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("moe", [
    {"router": "sigmoid", "capacity_factor": 4.0, "jitter": 0.1},
    {"router": "expert_choice", "norm_topk_prob": False, "jitter": 0.1},
], ids=lambda moe: moe["router"])
def test_with_shared_experts_and_a_dense_layer_a_mesh_equals_the_reference(moe):
  """Loss, metrics and every gradient, jitter and all."""
  arch = dataclasses.replace(ARCH, n_layers=3, n_shared_experts=1, n_dense_layers=1)

  def run(moe, mesh, devices):
    config = small_config(arch, moe=moe, execution={"mesh": mesh})
    mesh = make_mesh(config, devices)
    router = jax.tree.map(lambda bias_LE: bias_LE.at[:, 2].set(0.1),
                          functional.init_router(config, mesh))
    return jax.device_get(jax.jit(jax.value_and_grad(
        lambda params, batch: step.batch_loss(params, batch, config, mesh, router, 5),
        has_aux=True))(functional.init_params(config, mesh),
                       step.put_batch(batch_of(config), config, mesh)))

  ours = run(moe, MESHES["data2_fsdp2_expert2"], None)
  truth = run(moe | {"dispatch": "reference"}, ONE_DEVICE, jax.devices()[:1])
  for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(truth), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(path))


def words(config, seed):
  """A batch of sequences of 32 words of four tokens: something to learn."""
  book = np.random.default_rng(99).integers(0, 256, (32, 4))
  shape = config.train.batch_size, config.data.seq_len // 4 + 1
  tokens_BS = book[np.random.default_rng(seed).integers(0, 32, shape)].reshape(shape[0], -1)
  inputs_BS = tokens_BS[:, :config.data.seq_len].astype(np.int32)
  return {"inputs_BS": inputs_BS, "segments_BS": np.zeros_like(inputs_BS),
          "targets_BS": tokens_BS[:, 1:config.data.seq_len + 1].astype(np.int32)}


@pytest.mark.slow
def test_after_300_steps_no_expert_of_eight_is_dead():
  """Counted over new batches, with the bias as it then is; without it loads are uneven."""
  found = {}
  for rate in (0.003, 0.0):
    config = small_config(moe={"router": "sigmoid", "bias_update_rate": rate}, train={
        "steps": 300, "learning_rate": 1e-2, "warmup_steps": 20})
    mesh = make_mesh(config, jax.devices()[:1])
    state, train_step, _ = start(config)
    for seed in range(300):
      state, metrics = train_step(state, step.put_batch(words(config, seed), config, mesh))
    assert metrics["loss"] < 1.2  # of log(256) = 5.5: it has learned

    @jax.jit
    def router_sums(state, batch, config=config, mesh=mesh):
      return functional.apply(config, state["params"], batch["inputs_BS"], batch["segments_BS"],
                              mesh, router=state["router"])[1]

    sums = [router_sums(state, words(config, seed)) for seed in range(1000, 1020)]
    found[rate] = router_metrics(jax.tree.map(lambda *leaves: sum(leaves), *sums))
  assert found[0.003]["dead_experts"] == 0
  assert found[0.003]["load_variation"] < 0.15 and found[0.0]["load_variation"] > 0.25
