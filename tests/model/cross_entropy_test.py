import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.mesh import make_mesh
from moe_jax.model import cross_entropy
from tests.small import MESHES, ONE_DEVICE, small_config

B, S, D, V = 8, 7, 5, 13


def inputs(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  return (3 * jax.random.normal(keys[0], (B, S, D), dtype),
          jax.random.normal(keys[1], (D, V), dtype),
          jax.random.randint(keys[2], (B, S), 0, V))


def plain(x_BSD, head_DV, targets_BS):
  logits_BSV = jnp.einsum("bsd,dv->bsv", x_BSD, head_DV, preferred_element_type=jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, targets_BS)


def mesh_of(name):
  config = small_config(execution={"mesh": MESHES.get(name, ONE_DEVICE)})
  return make_mesh(config, jax.devices()[:8 if name in MESHES else 1])


# A chunk of all tokens, of an eighth, of a single one, of a part that divides no device's seven.
@pytest.mark.parametrize("mesh_name,chunk_bytes", [
    ("one", 2**24), ("one", 7 * V * 4), ("one", V * 4), ("data2_fsdp2_expert2", 4 * V * 4)])
def test_equals_the_plain_loss_and_its_gradients(mesh_name, chunk_bytes, monkeypatch):
  monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", chunk_bytes)
  mesh, args = mesh_of(mesh_name), inputs(jnp.float32)

  def ours(x_BSD, head_DV, targets_BS):  # a factor, as a mean has one
    return 0.3 * cross_entropy.summed_nll(x_BSD, head_DV, targets_BS, mesh)

  value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(*args)
  true_value, true_grads = jax.value_and_grad(
      lambda *args: 0.3 * plain(*args).sum(), argnums=(0, 1))(*args)
  np.testing.assert_allclose(value, true_value, rtol=1e-6)
  for grad, true_grad in zip(grads, true_grads, strict=True):
    np.testing.assert_allclose(grad, true_grad, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(jax.jit(ours)(*args), true_value, rtol=1e-6)  # without gradients
  nll_BS, greedy_BS = jax.jit(lambda *args: cross_entropy.token_scores(*args, mesh))(*args)
  np.testing.assert_allclose(nll_BS, plain(*args), rtol=1e-5, atol=1e-6)
  likeliest_BS = jnp.einsum("bsd,dv->bsv", *args[:2]).argmax(-1)
  np.testing.assert_array_equal(greedy_BS, likeliest_BS == args[2])


def test_bfloat16_rounds_no_more_than_the_plain_loss():
  mesh, args = mesh_of("one"), inputs(jnp.bfloat16)
  value, grads = jax.jit(jax.value_and_grad(
      lambda *args: cross_entropy.summed_nll(*args, mesh), argnums=(0, 1)))(*args)
  exact = [x.astype(jnp.float32) for x in args[:2]] + [args[2]]
  true_value, true_grads = jax.value_and_grad(
      lambda *args: plain(*args).sum(), argnums=(0, 1))(*exact)
  np.testing.assert_allclose(value, true_value, rtol=1e-5)
  for grad, true_grad in zip(grads, true_grads, strict=True):
    assert grad.dtype == jnp.bfloat16
    difference = np.linalg.norm(np.float32(grad) - true_grad)
    assert difference < 2**-7 * np.linalg.norm(true_grad)


def test_no_array_has_the_logits_of_the_batch(monkeypatch):
  monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", 4 * V * 4)
  mesh = mesh_of("one")
  hlo = jax.jit(jax.grad(lambda *args: cross_entropy.summed_nll(*args, mesh),
                         argnums=(0, 1))).lower(*inputs(jnp.float32)).as_text()
  assert f"tensor<4x{V}xf32>" in hlo  # a chunk
  assert f"{B * S}x{V}x" not in hlo and f"{B}x{S}x{V}x" not in hlo
  assert f"tensor<{B * S // 4}x4x{V}x" not in hlo


def lengths_of_chunks(n_tokens, limit, monkeypatch):
  monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", limit * V * 4)
  x_bSD, targets_bS = jnp.ones((1, n_tokens, D)), jnp.ones((1, n_tokens), int)
  return cross_entropy._chunks(x_bSD, targets_bS, V, mesh_of("one")).target_NR.shape


def test_chunks_are_equal_where_a_few_more_make_them_so(monkeypatch):
  assert lengths_of_chunks(64, 10, monkeypatch) == (8, 8)  # and not 7 of 10, the last one short
  assert lengths_of_chunks(67, 10, monkeypatch) == (7, 10)  # a prime
  assert lengths_of_chunks(67, 1, monkeypatch) == (67, 1)
