"""Sparse upcycling: initializes an MoE from a dense model such that both compute the same.

Every expert of a layer starts as a copy of the dense layer (arXiv 2212.05055), everything else is
copied, and the router is new. Since a token's weights sum to 1, the weighted sum of the copies is
the dense layer: at step 0 the two models compute the same function.

Finer experts (arXiv 2410.07524): the dense layer is split along its hidden width into G shards,
whose outputs sum to its own, and each expert is a copy of one shard. This gives the dense layer
only if a token goes to complete sets of shards, so the experts form groups of G, one per shard,
whose router columns start equal (that paper's virtual groups). A token's n_topk best experts are
then n_topk / G complete groups. Each weight is G times smaller than with whole experts, so the
down projections are multiplied by G.

Copies start identical; they diverge because the router sends them different tokens.
"""

import jax.numpy as jnp

from moe_jax.config import RunConfig
from moe_jax.errors import require
from moe_jax.model.functional import Params


def is_dense(config: RunConfig) -> bool:
  """Whether every layer is a single SwiGLU, possibly written as an MoE with one expert."""
  arch = config.arch
  return arch.n_moe_layers == 0 or (arch.n_exp == 1 and arch.n_shared_experts == 0)


def dense_width(config: RunConfig) -> int | None:
  """Hidden width of a dense model's layers; None if they differ."""
  arch = config.arch
  widths = {arch.dense_width} if arch.n_dense_layers else set()
  widths |= {arch.d_expert} if arch.n_moe_layers else set()
  return widths.pop() if len(widths) == 1 else None


def check(config: RunConfig, dense: RunConfig) -> None:
  """Raises FieldError if `config` cannot be initialized from the dense model `dense`."""
  arch, width = config.arch, dense_width(dense)
  require(width is not None, "train.init_from", config.train.init_from,
          "its dense layers are not all of one width")
  require(dense.arch.n_moe_layers == 0 or dense.moe.router == "softmax"
          or dense.moe.norm_topk_prob, "train.init_from", config.train.init_from,
          "its only expert is weighted by a sigmoid")
  require(config.moe.router != "expert_choice", "moe.router", config.moe.router, "must be softmax "
          "or sigmoid for upcycling: the weights of a token's experts must sum to 1")
  require(config.moe.norm_topk_prob, "moe.norm_topk_prob", config.moe.norm_topk_prob,
          "must be true for upcycling: copies of a dense layer are that layer only if their "
          "weights sum to 1")
  require(arch.n_shared_experts == 0, "arch.n_shared_experts", arch.n_shared_experts,
          "must be 0 for upcycling: they would add to the dense layer")
  require(arch.n_dense_layers == 0 or arch.dense_width == width, "arch.d_dense",
          arch.dense_width, f"must be {width}, as in the dense run")
  require(width % arch.d_expert == 0, "arch.d_expert", arch.d_expert,
          f"must divide {width}, the hidden width of the dense run")
  parts = width // arch.d_expert
  for name in ("n_exp", "n_topk"):
    require(getattr(arch, name) % parts == 0, f"arch.{name}", getattr(arch, name),
            f"must be a multiple of {parts}: the dense run's hidden width of {width} makes "
            f"{parts} experts of width {arch.d_expert}, and a token must use all of them")


def upcycled(dense_params: Params, fresh: Params, config: RunConfig) -> Params:
  """Parameters of `config` that compute the same as the dense parameters.

  Args:
    dense_params: of a model that `check` has accepted.
    fresh: newly initialized parameters of `config`, of which only the routers are used.
    config: of the MoE.
  """
  arch = config.arch
  layers, ff = _dense_layers(dense_params)
  n_dense = arch.n_dense_layers
  params = {name: value for name, value in dense_params.items()
            if name not in ("dense_layers", "moe_layers")}
  if n_dense:
    params["dense_layers"] = _part(layers, slice(0, n_dense)) | {
        "ff": _part(ff, slice(0, n_dense))}
  if arch.n_moe_layers:
    moe = _experts(_part(ff, slice(n_dense, None)), arch.d_expert, arch.n_exp,
                   fresh["moe_layers"]["moe"]["w_router_DE"])
    params["moe_layers"] = _part(layers, slice(n_dense, None)) | {"moe": moe}
  return params


def _experts(ff: Params, d_expert: int, n_exp: int, w_router_LDE) -> Params:
  """Turns a stack of dense layers into experts; expert e is shard e mod G."""
  n_layers, d_model, width = ff["w_gate_DF"].shape
  parts = width // d_expert

  def by_column(w_LDF):
    return w_LDF.reshape(n_layers, d_model, parts, d_expert).transpose(0, 2, 1, 3)

  def copies(w_LGXX):
    return jnp.tile(w_LGXX, (1, n_exp // parts, 1, 1))

  w_down_LGFD = ff["w_down_FD"].reshape(n_layers, parts, d_expert, d_model)
  return {"w_gate_EDF": copies(by_column(ff["w_gate_DF"])),
          "w_up_EDF": copies(by_column(ff["w_up_DF"])),
          "w_down_EFD": copies(parts * w_down_LGFD),
          "w_router_DE": jnp.repeat(w_router_LDE[..., ::parts], parts, axis=-1)}


def _dense_layers(params: Params) -> tuple[Params, Params]:
  """Splits the layers into (all but feed-forward, feed-forward), stacked over all layers."""
  rest, ffs = [], []
  for name in ("dense_layers", "moe_layers"):
    if name not in params:
      continue
    stack = dict(params[name])
    if name == "dense_layers":
      ffs.append(stack.pop("ff"))
    else:
      moe = stack.pop("moe")
      ffs.append({"w_gate_DF": moe["w_gate_EDF"][:, 0], "w_up_DF": moe["w_up_EDF"][:, 0],
                  "w_down_FD": moe["w_down_EFD"][:, 0]})
    rest.append(stack)
  return _joined(rest), _joined(ffs)


def _joined(stacks: list[Params]) -> Params:
  return {name: _joined([stack[name] for stack in stacks]) if isinstance(value, dict)
          else jnp.concatenate([stack[name] for stack in stacks])
          for name, value in stacks[0].items()}


def _part(stack: Params, layers: slice) -> Params:
  return {name: _part(value, layers) if isinstance(value, dict) else value[layers]
          for name, value in stack.items()}
