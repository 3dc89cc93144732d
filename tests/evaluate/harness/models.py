"""A small model to ask, and what the forward pass of training says of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MeshConfig
from moe_jax.evaluate.decode import Decoder
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from tests.small import random_params, small_config

CONTEXT = 128
CONFIG = small_config(data={"seq_len": CONTEXT}, train={"batch_size": 4})


def decoder_of(mesh_config=None, n_devices=1):
  mesh_config = mesh_config or MeshConfig(n_devices, 1, 1)
  config = dataclasses.replace(
      CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=max(4, n_devices)),
      execution=dataclasses.replace(CONFIG.execution, mesh=mesh_config))
  mesh = make_mesh(config, jax.devices()[:n_devices])
  shardings = jax.tree.map(lambda leaf: leaf.sharding, functional.abstract_params(config, mesh))
  return Decoder(config, mesh, jax.device_put(random_params(config), shardings))


def teacher_of(decoder):
  """tokens_S -> log probabilities of the token behind each, [S, V], by the plain forward pass."""
  run = jax.jit(lambda tokens_BS: jax.nn.log_softmax(functional.apply(
      decoder.config, decoder.params, tokens_BS, jnp.zeros_like(tokens_BS), decoder.mesh)[0]))

  def logprobs(tokens):
    tokens_1S = np.zeros((1, CONTEXT), np.int32)
    tokens_1S[0, :len(tokens)] = tokens
    return np.asarray(run(tokens_1S))[0, :len(tokens)]

  return logprobs
