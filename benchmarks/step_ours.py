"""Child of benchmarks.train_step: serves this project's step (see step_serve.py)."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step_limits import Product, products
from benchmarks.step_serve import serve
from moe_jax.config import RunConfig, config_from_dict
from moe_jax.memory import use_huge_pages
from moe_jax.mesh import make_mesh
from moe_jax.model.cross_entropy import summed_nll
from moe_jax.products import einsum
from moe_jax.train import step as step_lib


class Ours:
  """Our step on the first device; writes its initial parameters to the file `weights`."""

  name = f"moe_jax on jax {jax.__version__}"

  def __init__(self, config: RunConfig, tokens: str, weights: str):
    self._config, self._mesh = config, make_mesh(config, jax.devices()[:1])
    tokens_BS = np.load(tokens)
    batch = {"inputs_BS": tokens_BS[:, :-1], "targets_BS": tokens_BS[:, 1:],
             "segments_BS": np.zeros_like(tokens_BS[:, 1:])}
    self._batch = step_lib.put_batch(batch, config, self._mesh)
    self._state = step_lib.init_state(config, self._mesh)
    leaves = jax.tree_util.tree_leaves_with_path(self._state["params"])
    np.savez(weights, **{"/".join(key.key for key in path): leaf for path, leaf in leaves})
    self._step = step_lib.compile_train_step(config, self._mesh)
    shape = (config.train.batch_size, config.data.seq_len, config.arch.d_model)
    self._dtype = jnp.dtype(config.model.compute_dtype)
    self._head_inputs = (jax.random.normal(jax.random.key(0), shape, self._dtype),
                         jnp.array(self._state["params"]["w_head_DV"], self._dtype, copy=True),
                         self._batch["targets"][0])
    self._head = jax.jit(jax.value_and_grad(
        lambda x_BSD, head_DV, targets_BS: summed_nll(x_BSD, head_DV, targets_BS, self._mesh),
        argnums=(0, 1)))

  def step(self) -> float:
    """Takes a step; returns the loss before it."""
    self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready(self._state)
    return float(metrics["loss"])

  def head(self) -> float:
    """Runs output head and loss, forward and backward; returns the loss."""
    return float(jax.block_until_ready(self._head(*self._head_inputs))[0])

  def matmuls(self) -> list[float]:
    """Times each product of the step, in seconds."""
    config = self._config
    return [_seconds_of(product, self._dtype) for product in products(
        config.arch, config.train.batch_size, config.data.seq_len)]

  def bandwidth(self) -> float:
    """Memory bandwidth of a copy in bytes/s, counting reads and writes."""
    x = jnp.ones(2**26, jnp.float32)
    return 2 * x.nbytes / _fastest(jax.jit(lambda x: x + 1), x)


def _seconds_of(product: Product, dtype) -> float:
  _, _, b, m, k, n, transposed = product
  left = jnp.ones((b, k, m) if transposed == "left" else (b, m, k), dtype)
  right = jnp.ones((b, n, k) if transposed == "right" else (b, k, n), dtype)
  formula = {"": "bmk,bkn->bmn", "left": "bkm,bkn->bmn", "right": "bmk,bnk->bmn"}[transposed]
  return _fastest(jax.jit(lambda left, right: einsum(formula, left, right).astype(dtype)),
                  left, right)


def _fastest(function, *args) -> float:
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    seconds.append(time.perf_counter() - start)
  return min(seconds[1:])


if __name__ == "__main__":
  use_huge_pages()  # as in training
  config, tokens, weights = sys.argv[1:]
  serve(Ours(config_from_dict(json.loads(config)), tokens, weights))
