"""The decoder as pure functions of a plain nested dict of layer-stacked arrays.

Names in the dict are the modules' attributes and carry their shapes, e.g.
`params["moe_layers"]["moe"]["w_gate_EDF"]` of shape [layers, E, D, F]. This is the format of
checkpoints. The state of routers beside their parameters (the selection bias for sigmoid
scores, `router["moe_layers"]["moe"]["bias_E"]` of shape [layers, E]) is a separate dict.
"""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moe_jax.config import RunConfig
from moe_jax.mesh import param_spec, platform_of, replicated
from moe_jax.model.transformer import RouterState, Transformer
from moe_jax.moe.router import RouterSums

Params = dict[str, Any]
Router = dict[str, Any]  # {} for routers without state


@functools.lru_cache(maxsize=8)
def _abstract(config: RunConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """The decoder's structure, its parameters and its routers' state, without arrays."""
  model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
  return nnx.split(model, nnx.Param, RouterState)


def abstract_model(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
  """{"params", "router"} as ShapeDtypeStructs with shardings: all arrays of a forward pass."""

  def describe(variable):
    shape = variable.get_value().shape
    axes = variable.get_metadata("axes")
    stacked = (None,) * (len(shape) - len(axes))  # the layer axis
    return jax.ShapeDtypeStruct(shape, variable.get_value().dtype,
                                sharding=NamedSharding(mesh, param_spec(stacked + axes)))

  _, *states = _abstract(config)
  params, router = (nnx.to_pure_dict(jax.tree.map(
      describe, state, is_leaf=lambda x: isinstance(x, nnx.Variable))) for state in states)
  return {"params": params, "router": router}


def abstract_params(config: RunConfig, mesh: Mesh) -> Params:
  """All parameters as ShapeDtypeStructs with shardings."""
  return abstract_model(config, mesh)["params"]


def init_params(config: RunConfig, mesh: Mesh) -> Params:
  """Initializes the parameters from `config.seed_init`, identically on every mesh.

  Each device initializes its own shards, so no device ever holds a whole sharded parameter.
  """
  # LLVM takes ten seconds to optimize the random-number loops, which run once: without that,
  # compilation takes 1.3 s instead of 12.8 s.
  on_cpu = platform_of(mesh) == "cpu"
  options = {"xla_backend_optimization_level": 0} if on_cpu else None
  return lower_init_params(config, mesh).compile(options)(np.int32(config.seed_init))


def lower_init_params(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
  """Lowers the program of init_params, whose argument is the seed."""

  def create(seed):
    model = Transformer(config, nnx.Rngs(params=jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
  return jax.jit(create, out_shardings=shardings).lower(
      jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh)))


def init_router(config: RunConfig, mesh: Mesh) -> Router:
  """The initial state of the routers: every bias is 0."""
  return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype),
                                                  leaf.sharding),
                      abstract_model(config, mesh)["router"])


def apply(config: RunConfig, params: Params, inputs_BS: jax.Array, segments_BS: jax.Array,
          mesh: Mesh, remat: str = "none", counted_BS: jax.Array | None = None,
          router: Router | None = None, noise_key_B: jax.Array | None = None
          ) -> tuple[jax.Array, RouterSums | None]:
  """logits_BSV in float32 and the router's sums by layer; see Transformer.

  `router` may be omitted if the routers have no state.
  """
  return merged(config, params, router)(inputs_BS, segments_BS, mesh, remat, counted_BS,
                                        noise_key_B)


def merged(config: RunConfig, params: Params, router: Router | None = None) -> Transformer:
  """The decoder with these arrays as its weights, e.g. to run only parts of it."""
  graphdef, *abstract = _abstract(config)
  states = jax.tree.map(lambda leaf: leaf, abstract)  # copies: the cached ones stay abstract
  for state, values in zip(states, (params, router or {}), strict=True):
    if jax.tree.structure(nnx.to_pure_dict(state)) != jax.tree.structure(values):
      raise ValueError("params or router does not match this configuration")
    nnx.replace_by_pure_dict(state, values)
  return nnx.merge(graphdef, *states)
