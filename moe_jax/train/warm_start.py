"""Warm start: initializes a run with the parameters of another, for `train.init_from`.

Parameters and the routers' state are copied; the optimizer, the schedule and the data start
afresh. If the other run is dense and this one is not, it is upcycled (model/upcycle.py).
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config as config_lib
from moe_jax import run_dir as run_dir_lib
from moe_jax.config import RunConfig
from moe_jax.errors import FieldError, require
from moe_jax.model import functional, upcycle
from moe_jax.run_dir import RunDir
from moe_jax.train import step as step_lib
from moe_jax.train.checkpoint import restore_model
from moe_jax.train.checkpoint_files import checkpoint_steps, content_hash

FIELD = "config.train.init_from"


@dataclasses.dataclass(frozen=True)
class Source:
  """The checkpoint that a run is initialized from.

  Attributes:
    run_dir: of the other run.
    config: of the other run.
    step: of the checkpoint.
  """

  run_dir: RunDir
  config: RunConfig
  step: int

  @property
  def record(self) -> dict[str, Any]:
    """What the run records about it in config.json."""
    path = self.run_dir.path
    return {"run": f"{path.parent.name}/{path.name}", "step": self.step,
            "identity": config_lib.identity_hash(self.config),
            "checkpoint": content_hash(self.run_dir, self.step)}

  def begin(self, state: step_lib.State, config: RunConfig, mesh: Mesh) -> step_lib.State:
    """Replaces the parameters in a new `state` by the checkpoint's. Raises CheckpointError."""
    if not _is_upcycled(config, self.config):
      del state["params"], state["router"]  # frees their memory
      abstract = functional.abstract_model(config, mesh)
      return state | restore_model(self.run_dir, abstract, self.step)[1]
    abstract = jax.tree.map(lambda leaf: _placed(leaf, mesh),
                            functional.abstract_params(self.config, mesh))
    _, dense, _ = restore_model(self.run_dir, {"params": abstract}, self.step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state["params"])
    grown = jax.jit(lambda dense, fresh: upcycle.upcycled(dense, fresh, config),
                    out_shardings=shardings)
    return state | {"params": grown(dense["params"], state["params"])}


def first_state(run_dir: RunDir, config: RunConfig, mesh: Mesh) -> step_lib.State:
  """The state before the first step: new, or with another run's parameters.

  Raises:
    FieldError: as for find_source.
    CheckpointError: the checkpoint is damaged.
  """
  source, state = find_source(run_dir, config), step_lib.init_state(config, mesh)
  return state if source is None else source.begin(state, config, mesh)


def find_source(run_dir: RunDir, config: RunConfig) -> Source | None:
  """Finds the checkpoint that a run is yet to be initialized from; writes nothing.

  Args:
    run_dir: of the run; an EXPERIMENT/CELL is looked for under the same root.
    config: of the run.

  Returns:
    None without `init_from`, or if the run already has checkpoints of its own.

  Raises:
    FieldError: there is no such run or checkpoint, or it does not fit.
  """
  train = config.train
  if train.init_from is None or checkpoint_steps(run_dir):
    return None
  there = run_dir.source(config)
  theirs = there.read_config()
  require(theirs is not None, FIELD, train.init_from, f"there is no run at {there.path}: train "
          "it first" + (", or import it with python -m moe_jax.export --from=hf"
                        if train.init_run.startswith("hf/") else ""))
  try:
    require_fit(config, theirs)
  except FieldError as error:
    raise error.under("config") from None
  return Source(there, theirs, _step_of(there, train))


def _step_of(run_dir: RunDir, train: config_lib.TrainConfig) -> int:
  step, steps = train.init_step, checkpoint_steps(run_dir)
  if step is None:
    require(run_dir.read_status().get("state") == run_dir_lib.FINISHED and bool(steps), FIELD,
            train.init_from, "that run has not finished: name a step of it, "
            f"{train.init_from}@STEP; it has "
            f"{', '.join(map(str, steps)) or 'no checkpoint yet'}")
    return steps[-1]
  require(step in steps, FIELD, train.init_from, f"that run has no checkpoint of step {step}; it "
          f"has {', '.join(map(str, steps)) or 'none yet'}")
  return step


def _is_upcycled(config: RunConfig, source: RunConfig) -> bool:
  return upcycle.is_dense(source) and not upcycle.is_dense(config)


def require_fit(config: RunConfig, source: RunConfig) -> None:
  """Checks that a run can be initialized with the parameters of another.

  Raises:
    FieldError: names the fields that differ, or the one that rules out upcycling.
  """
  upcycled = _is_upcycled(config, source)
  if upcycled:
    upcycle.check(config, source)
  ours, theirs = _function(config, upcycled), _function(source, upcycled)
  differing = [f"{path} is {ours[path]!r} here and {theirs[path]!r} there"
               for path in ours if ours[path] != theirs[path]]
  require(not differing, "train.init_from", config.train.init_from,
          "that run's model differs: " + "; ".join(differing))


def _function(config: RunConfig, upcycled: bool) -> dict[str, Any]:
  """The fields that must agree for the same parameters to compute the same function of a text."""
  arch, data = config.arch, config.data
  fields = {f"arch.{name}": getattr(arch, name) for name in (
      "n_layers", "d_model", "n_heads", "vocab_size", "tie_embeddings", "qk_norm")}
  fields |= {"arch.n_kv_heads": arch.kv_heads, "arch.head_dim": arch.d_head,
             "model.rope_theta": config.model.rope_theta,
             "model.norm_eps": config.model.norm_eps, "data.tokenizer": data.tokenizer}
  if data.tokenizer.startswith("bpe-") and data.tokenizer_vocab_size:  # trained on the corpus
    fields["data.tokenizer"] += f" of {'+'.join(data.mixture)}"
  if upcycled:
    return fields
  fields |= {"arch.n_dense_layers": arch.n_dense_layers,
             "arch.d_dense": arch.dense_width if arch.n_dense_layers else None}
  routed = {f"arch.{name}": getattr(arch, name) for name in (
      "d_expert", "n_exp", "n_topk", "n_shared_experts")}
  routed |= {"moe.router": config.moe.router, "moe.norm_topk_prob": config.moe.norm_topk_prob}
  return fields | {path: value if arch.n_moe_layers else None for path, value in routed.items()}


def _placed(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Drops mesh axes that do not divide the array: a dense run's only expert cannot be split."""
  axes = []
  for size, names in zip(leaf.shape, leaf.sharding.spec, strict=False):
    names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    parts = 1
    for name in names:
      parts *= mesh.shape[name]
    axes.append(names if names and size % parts == 0 else None)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P(*axes)))
