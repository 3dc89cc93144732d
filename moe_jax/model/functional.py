"""The decoder as pure functions of a plain nested dict of layer-stacked arrays.

Names in the dict are the modules' attributes and carry their shapes, e.g.
`params["moe_layers"]["moe"]["w_gate_EDF"]` of shape [layers, E, D, F]: that is what a
checkpoint holds.
"""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moe_jax.config import RunConfig
from moe_jax.mesh import param_spec
from moe_jax.model.transformer import Transformer
from moe_jax.moe.router import RouterSums

Params = dict[str, Any]


@functools.lru_cache(maxsize=8)
def _abstract(config: RunConfig) -> tuple[nnx.GraphDef, nnx.State]:
  """The decoder's structure, without arrays."""
  model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
  graphdef, params, _ = nnx.split(model, nnx.Param, ...)
  return graphdef, params


def abstract_params(config: RunConfig, mesh: Mesh) -> Params:
  """ShapeDtypeStructs with shardings, for every parameter."""

  def describe(variable):
    shape = variable.get_value().shape
    axes = variable.get_metadata("axes")
    stacked = (None,) * (len(shape) - len(axes))  # the layer axis
    return jax.ShapeDtypeStruct(shape, variable.get_value().dtype,
                                sharding=NamedSharding(mesh, param_spec(stacked + axes)))

  _, params = _abstract(config)
  return nnx.to_pure_dict(jax.tree.map(
      describe, params, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def init_params(config: RunConfig, mesh: Mesh) -> Params:
  """Parameters from `config.seed_init`, made where they belong, the same on every mesh."""

  def create():
    model = Transformer(config, nnx.Rngs(params=jax.random.key(config.seed_init)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
  # LLVM takes ten seconds to optimise the random-number loops, which run once: 12.8 s of
  # compilation become 1.3 s.
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  options = {"xla_backend_optimization_level": 0} if on_cpu else None
  return jax.jit(create, out_shardings=shardings, compiler_options=options)()


def apply(config: RunConfig, params: Params, inputs_BS: jax.Array, segments_BS: jax.Array,
          mesh: Mesh, remat: str = "none", counted_BS: jax.Array | None = None
          ) -> tuple[jax.Array, RouterSums | None]:
  """logits_BSV in float32 and the router's sums by layer; see Transformer."""
  graphdef, abstract = _abstract(config)
  state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the cached one stays abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)(inputs_BS, segments_BS, mesh, remat, counted_BS)
