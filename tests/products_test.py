"""Products equal JAX's own, with their gradients, in one program for every platform."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.products import multiply, multiply_each, turned


def mesh_of(platform):
  device = types.SimpleNamespace(platform=platform)
  return types.SimpleNamespace(devices=np.array([device]))


@pytest.mark.parametrize("n_sequences", [2, 32])  # few rows, and many
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_multiplies_as_others_do_forward_and_backward(dtype, n_sequences):
  keys = jax.random.split(jax.random.key(0), 4)
  x_BSHh = jax.random.normal(keys[0], (n_sequences, 3, 4, 5), dtype)
  w_HhD = jax.random.normal(keys[1], (4, 5, 6), dtype)
  w_DKh, w_DF = (jax.random.normal(key, (6, *shape), dtype)
                 for key, shape in zip(keys[2:], ((2, 3), (7,)), strict=True))

  def products(x_BSHh, w_HhD, w_DKh, w_DF, platform):
    mesh = mesh_of(platform)
    y_BSD = multiply(x_BSHh, w_HhD, mesh, axes=2)
    return y_BSD, *multiply_each(y_BSD, [w_DKh, w_DF], mesh)

  def made(platform):
    y, pull_back = jax.vjp(functools.partial(products, platform=platform), x_BSHh, w_HhD, w_DKh,
                           w_DF)
    rng = np.random.default_rng(0)
    return *y, *pull_back(tuple(jnp.asarray(rng.normal(size=leaf.shape), dtype) for leaf in y))

  for i, (ours, theirs) in enumerate(zip(made("cpu"), made("gpu"), strict=True)):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    # Both round the same sums, and few of them to the other side (by up to 2^-8 of a number). But
    # the gradient of y_BSD, of which those of x_BSHh and w_HhD are made, is rounded once where one
    # product gives it, else with each of its terms.
    tolerance = 1e-6 if dtype == "float32" else 3 * 2**-9 if i in (3, 4) else 2**-10
    ours, theirs = np.float64(ours), np.float64(theirs)
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("platform,said", [("cpu", 0), ("gpu", 3), ("tpu", 3)])
def test_accelerators_are_told_that_float32_is_meant(platform, said):
  """In the product and both of its gradients; bfloat16 says nothing."""
  def text(dtype):
    x_TD, w_DF = jnp.ones((4, 5), dtype), jnp.ones((5, 6), dtype)
    gradient = jax.grad(lambda x, w: multiply(x, w, mesh_of(platform)).sum().astype(jnp.float32)**2,
                        argnums=(0, 1))
    return str(jax.make_jaxpr(gradient)(x_TD, w_DF))
  assert text("float32").count("Precision.HIGHEST, Precision.HIGHEST") == said
  assert "HIGHEST" not in text("bfloat16")


def test_bfloat16_is_multiplied_as_such_and_nothing_is_transposed_in_a_product():
  """What the module is for; it depends on the compiler's version."""
  x_TD, w_DF = jnp.ones((512, 64), jnp.bfloat16), jnp.ones((64, 96), jnp.bfloat16)

  def loss(x_TD, w_DF):
    return multiply(x_TD, w_DF, mesh_of("cpu")).astype(jnp.float32).sum()

  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x_TD, w_DF).compile().as_text()
  kinds = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
  products = [line for line in text.splitlines() if " dot(" in line]
  for line in products:
    factors = re.search(r" dot\((%[\w.-]+), (%[\w.-]+)\)", line).groups()
    assert [kinds[name] for name in factors] == ["bf16", "bf16"], line
  assert products and all("lhs_contracting_dims={1}" in line for line in products), products
  np.testing.assert_array_equal(turned(w_DF * 2), w_DF.T * 2)
