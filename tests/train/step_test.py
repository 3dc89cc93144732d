"""One training step: the same on every mesh, however divided, and equal to the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.moe.router import balance_loss
from moe_jax.train import step
from tests.small import ARCH, MESHES, small_config

SHARED_AND_DENSE = dataclasses.replace(ARCH, n_layers=3, n_shared_experts=1, n_dense_layers=1)


def batch_of(config, seed=0):
  rng = np.random.default_rng(seed)
  shape = (config.train.batch_size, config.data.seq_len)
  tokens_BS = rng.integers(0, 256, (shape[0], shape[1] + 1)).astype(np.int32)
  segments_BS = np.cumsum(rng.random(shape) < 0.1, axis=1).astype(np.int32)
  return {"inputs_BS": tokens_BS[:, :-1], "targets_BS": tokens_BS[:, 1:],
          "segments_BS": segments_BS}


def loss_and_grads(config):
  mesh = make_mesh(config, None if config.execution.mesh.data == -1
                   else jax.devices()[:np.prod(dataclasses.astuple(config.execution.mesh))])
  params = step.init_state(config, mesh)["params"]
  batch = step.put_batch(batch_of(config), config, mesh)

  def loss(params, batch):
    total, (metrics, _) = step.batch_loss(params, batch, config, mesh)
    return total, metrics

  return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch))


def assert_same(ours, theirs, tolerance=1e-5):
  (loss, metrics), grads = ours
  (true_loss, true_metrics), true_grads = theirs
  np.testing.assert_allclose(loss, true_loss, rtol=tolerance)
  for name, value in true_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
  for (path, grad), true_grad in zip(jax.tree.leaves_with_path(grads),
                                     jax.tree.leaves(true_grads), strict=True):
    np.testing.assert_allclose(grad, true_grad, rtol=tolerance, atol=tolerance, err_msg=str(path))


@pytest.fixture(scope="module")
def reference():
  return loss_and_grads(small_config(SHARED_AND_DENSE, moe={"dispatch": "reference"}))


@pytest.fixture(scope="module")
def dropping():
  return loss_and_grads(small_config(SHARED_AND_DENSE, moe={"capacity_factor": 0.75}))


# The layer alone is compared on all eight meshes in tests/moe, the whole model without drops in
# the matrix of this folder.
SOME_MESHES = ("expert8", "fsdp4_expert2", "data2_fsdp2_expert2")
ALL_MESHES = [name if name in SOME_MESHES else pytest.param(name, marks=pytest.mark.slow)
              for name in MESHES]


@pytest.mark.parametrize("name", SOME_MESHES)
def test_loss_and_every_gradient_equal_the_reference_on_some_meshes(name, reference):
  ours = loss_and_grads(small_config(SHARED_AND_DENSE, moe={"capacity_factor": 4.0},
                                     execution={"mesh": MESHES[name]}))
  assert ours[0][1]["drop_rate"] == 0
  assert_same(ours, reference)


@pytest.mark.parametrize("name", ALL_MESHES)
def test_where_tokens_drop_the_mesh_changes_nothing(name, dropping):
  ours = loss_and_grads(small_config(SHARED_AND_DENSE, moe={"capacity_factor": 0.75},
                                     execution={"mesh": MESHES[name]}))
  assert ours[0][1]["drop_rate"] > 0.1
  assert_same(ours, dropping)


def test_microbatches_leave_loss_and_gradient_unchanged():
  """With a strong balance loss, which is that of the whole batch and not of its parts."""
  moe = {"capacity_factor": 0.75, "balance_coef": 1.0}
  whole = loss_and_grads(small_config(SHARED_AND_DENSE, moe=moe))
  parts = loss_and_grads(small_config(SHARED_AND_DENSE, moe=moe,
                                      execution={"microbatches": 4}))
  assert_same(parts, whole)


@pytest.mark.parametrize("remat", ["dots", "rows", "full"])
def test_remat_changes_nothing(remat, dropping):
  assert_same(loss_and_grads(small_config(SHARED_AND_DENSE, moe={"capacity_factor": 0.75},
                                          execution={"remat": remat})), dropping)


def gradient_of(config, mesh):
  """The gradient of the parameters by a batch, as a function, and what it takes."""
  params = step.abstract_state(config, mesh)["params"]

  def loss(params, batch):
    return step.batch_loss(params, batch, config, mesh)[0]

  return jax.grad(loss), (params, step.abstract_batch(config, mesh))


def test_remat_keeps_what_it_is_named_for():
  """Products and exchanges in the program of a gradient, the repeated ones among them."""
  products, exchanges = {}, {}
  for remat in ("none", "dots", "rows", "full"):
    config = small_config(dataclasses.replace(ARCH, n_shared_experts=1),
                          execution={"mesh": MESHES["expert8"], "remat": remat})
    function, arguments = gradient_of(config, make_mesh(config))
    program = str(jax.make_jaxpr(function)(*arguments))
    products[remat] = program.count("= dot_general[")
    exchanges[remat] = program.count("= all_to_all[")
  assert products["none"] < products["dots"] < products["rows"] == products["full"]
  # Kept: of attention and of the shared expert the first product and the last.
  assert products["full"] - products["dots"] == 4
  # Rows and their weights go to the experts, outputs come back, and so do the gradients of the
  # three. What went there travels again, unless it was kept; outputs are in no gradient.
  assert exchanges == {"none": 6, "dots": 8, "rows": 7, "full": 8}


@pytest.mark.parametrize("remat", ["none", "rows"])
def test_on_a_cpu_layers_save_bfloat16_as_bits(remat):
  """XLA's CPU compiler would convert what all layers have saved for each layer's part of it."""
  config = small_config(SHARED_AND_DENSE, model={"compute_dtype": "bfloat16"},
                        execution={"remat": remat})
  mesh = make_mesh(config, jax.devices()[:1])
  tokens_BS = jnp.zeros((config.train.batch_size, config.data.seq_len), jnp.int32)

  def backward(params):
    return jax.vjp(lambda params: functional.apply(config, params, tokens_BS, tokens_BS, mesh,
                                                   remat)[0], params)[1]

  kept = jax.tree.leaves(jax.eval_shape(backward, step.abstract_state(config, mesh)["params"]))
  saved = [str(array.dtype) for array in kept if array.ndim > 3]  # layers, B, S, D
  assert "uint16" in saved and "bfloat16" not in saved


def test_microbatches_hold_the_activations_of_one():
  def temporary(microbatches):
    config = small_config(dataclasses.replace(ARCH, n_layers=1, n_dense_layers=1),
                          execution={"microbatches": microbatches})
    function, arguments = gradient_of(config, make_mesh(config, jax.devices()[:1]))
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

  assert temporary(8) < 0.5 * temporary(1)


def test_total_loss_adds_the_router_losses_of_all_layers():
  (total, metrics), _ = loss_and_grads(small_config(moe={"balance_coef": 0.5, "z_coef": 0.25}))
  n_layers = ARCH.n_layers
  np.testing.assert_allclose(
      total, metrics["loss"] + 0.5 * n_layers * metrics["balance_loss"]
      + 0.25 * n_layers * metrics["z_loss"], rtol=1e-6)


def test_a_dense_model_has_no_router_metrics():
  dense = dataclasses.replace(ARCH, n_dense_layers=ARCH.n_layers)
  (total, metrics), _ = loss_and_grads(small_config(dense))
  assert metrics.keys() == {"loss"} and total == metrics["loss"]


def test_steps_learn_and_the_state_stays_a_plain_tree():
  config = small_config(train={"learning_rate": 3e-3, "steps": 40})
  mesh = make_mesh(config, jax.devices()[:1])
  state = step.init_state(config, mesh)
  structure = jax.tree.structure(state)
  train_step = step.compile_train_step(config, mesh)
  batch = step.put_batch(batch_of(config), config, mesh)
  losses = []
  for _ in range(30):
    before = jax.tree.leaves(state)
    state, metrics = train_step(state, batch)
    losses.append(float(metrics["loss"]))
    assert all(leaf.is_deleted() for leaf in before)  # two states at a time would not fit
  assert jax.tree.structure(state) == structure
  assert int(state["step"]) == 30
  assert losses[0] > 5.0 and losses[-1] < losses[0] - 1.0  # it learns the batch by heart
  assert float(jnp.abs(state["mu"]["embedding_VD"]).max()) > 0


def test_on_a_tpu_the_compiler_is_given_its_options(monkeypatch):
  """This machine's does not know them, and says so."""
  config = small_config()
  mesh = make_mesh(config, jax.devices()[:1])
  monkeypatch.setattr(step, "platform_of", lambda mesh: "tpu")
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_"):
    step.lower_train_step(config, mesh).compile()


def test_a_balance_loss_of_each_part_would_be_another_loss():
  """The equality under microbatches is not for want of a difference."""
  config = small_config()
  mesh = make_mesh(config, jax.devices()[:1])
  params = step.init_state(config, mesh)["params"]
  batch = batch_of(config)

  @jax.jit
  def balance(inputs_BS, segments_BS):
    return balance_loss(functional.apply(config, params, inputs_BS, segments_BS, mesh)[1]).sum()

  first, second = (balance(batch["inputs_BS"][rows], batch["segments_BS"][rows])
                   for rows in (slice(0, 4), slice(4, 8)))
  whole = balance(batch["inputs_BS"], batch["segments_BS"])
  assert abs((first + second) / 2 - whole) > 1e-3
