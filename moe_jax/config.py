"""RunConfig: everything that defines a run, as frozen dataclasses. No JAX.

Identity (what is trained, which determines the result) and execution (how it is run: mesh, remat,
logging) are separate. A run may resume with a different execution, never with another identity.
Every section (sections.py) validates itself on construction, and `RunConfig` checks constraints
across sections, so an invalid configuration cannot exist.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from typing import Any

from moe_jax.arch import Architecture
from moe_jax.errors import require
from moe_jax.fields import checked, from_dict, leaf_types, leaves
from moe_jax.sections import (
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)

SCHEMA_VERSION = 1

# Fields added to version 1 after runs had been stored, each with the value that those runs used
# implicitly. A stored configuration may lack them, and identity_hash omits them at this value, so
# that the hashes of those runs stay valid.
_ADDED = {"moe.router": "softmax", "moe.bias_update_rate": 1e-3, "moe.jitter": 0.0,
          "moe.drop_order": "position", "train.branch_from": None, "arch.qk_norm": "head",
          "train.init_from": None, "execution.keep_steps": (), "execution.population": 1}


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One cell of a grid: an architecture, its training recipe, and how it is run."""

  arch: Architecture
  moe: MoEConfig = MoEConfig()
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  seed_init: int = 0
  seed_data: int = 0
  execution: ExecutionConfig = ExecutionConfig()
  schema_version: int = SCHEMA_VERSION

  def __post_init__(self):
    types = leaf_types(RunConfig)
    for path, value in leaves(self).items():  # experiment files are not type-checked
      require(path in types, path, value, "must be a section of the configuration")
      checked(value, types[path], path)
    require(self.schema_version == SCHEMA_VERSION, "schema_version", self.schema_version,
            f"this code reads and writes version {SCHEMA_VERSION}")
    for name in ("seed_init", "seed_data"):
      require(0 <= getattr(self, name) < 2**31, name, getattr(self, name),
              "must be at least 0 and below 2^31")
    require(not (self.moe.norm_topk_prob and self.arch.n_topk == 1 < self.arch.n_exp
                 and self.arch.n_moe_layers > 0),
            "moe.norm_topk_prob", True, "must be false for n_topk = 1: a weight that is "
            "always 1 gives the router no gradient")
    self.check_vocabulary(self.data.tokenizer_vocab_size or 0)
    require(self.moe.router != "expert_choice"
            or self.group_tokens * self.arch.n_topk % self.arch.n_exp == 0,
            "moe.routing_group_tokens", self.moe.routing_group_tokens, f"makes groups of "
            f"{self.group_tokens} tokens, of which each expert must pick a whole number: "
            f"{self.group_tokens} * n_topk ({self.arch.n_topk}) must be a multiple of n_exp "
            f"({self.arch.n_exp})")
    require(self.group_tokens % self.data.seq_len == 0, "moe.routing_group_tokens",
            self.moe.routing_group_tokens, "must be 0 or a multiple of data.seq_len, "
            f"which is {self.data.seq_len}")
    require(self.train.batch_size % (self.execution.microbatches * self.group_sequences)
            == 0, "train.batch_size", self.train.batch_size,
            "must be a multiple of execution.microbatches * the sequences in a routing "
            f"group, which is {self.execution.microbatches} * {self.group_sequences}")

  def check_vocabulary(self, vocab_size: int) -> None:
    """Raises FieldError if the embedding has fewer than `vocab_size` rows."""
    require(vocab_size <= self.arch.vocab_size, "arch.vocab_size", self.arch.vocab_size,
            f"must be at least the {vocab_size} tokens of the tokenizer {self.data.tokenizer!r}")

  @property
  def group_tokens(self) -> int:
    """Tokens in a routing group, resolved."""
    return self.moe.routing_group_tokens or self.data.seq_len

  @property
  def group_sequences(self) -> int:
    """Sequences in a routing group."""
    return self.group_tokens // self.data.seq_len

  @property
  def batch_tokens(self) -> int:
    """Tokens in a global batch."""
    return self.train.batch_size * self.data.seq_len


def require_causal(config: RunConfig) -> None:
  """Raises FieldError for a model that is not causal and so cannot decode token by token."""
  require(config.moe.causal, "moe.router", config.moe.router, "cannot decode: it is not "
          "causal, for an expert picks a token by comparing it with later ones; must be "
          "softmax or sigmoid")


def resolve_mesh(config: RunConfig, n_devices: int,
                 n_slices: int = 1) -> tuple[int, int, int]:
  """Returns the (data, fsdp, expert) mesh sizes on `n_devices` devices in `n_slices` equal slices.

  Raises:
    FieldError: the mesh does not use all devices, does not divide the experts or the
      width, cannot split a microbatch into whole routing groups for each device, or puts
      an axis other than `data` across slices.
  """
  mesh, arch = config.execution.mesh, config.arch
  model_parallel = mesh.fsdp * mesh.expert
  require(n_devices % mesh.fsdp == 0, "execution.mesh.fsdp", mesh.fsdp,
          f"must divide the {n_devices} devices")
  require(n_devices % model_parallel == 0, "execution.mesh.expert", mesh.expert,
          f"times fsdp ({mesh.fsdp}) must divide the {n_devices} devices")
  data = n_devices // model_parallel if mesh.data == -1 else mesh.data
  require(data * model_parallel == n_devices, "execution.mesh.data", mesh.data,
          f"times fsdp ({mesh.fsdp}) times expert ({mesh.expert}) must be the "
          f"{n_devices} devices there are; -1 takes what is left over")
  require(data % n_slices == 0, "execution.mesh.data", data, f"must be a multiple of the "
          f"{n_slices} slices: only gradients are to cross the slower network between them")
  require(arch.n_exp % mesh.expert == 0, "execution.mesh.expert", mesh.expert,
          f"must divide n_exp, which is {arch.n_exp}")
  require(arch.d_model % model_parallel == 0, "execution.mesh.fsdp", mesh.fsdp,
          f"times expert ({mesh.expert}) must divide d_model, which is {arch.d_model}")
  micro = config.train.batch_size // config.execution.microbatches
  require(micro % (n_devices * config.group_sequences) == 0, "train.batch_size",
          config.train.batch_size, f"split into {config.execution.microbatches} "
          f"microbatch(es) must give each of the {n_devices} devices whole routing groups "
          f"of {config.group_sequences} sequence(s)")
  return data, mesh.fsdp, mesh.expert


def identity(config: RunConfig) -> dict[str, Any]:
  """The fields that determine the result, as a flat dict from dotted path to value.

  It is canonical: it does not depend on whether a default is written out, on the order of corpora
  or on the sum of their weights. A float written as an integer (`weight_decay=0`) has the same
  identity as 0.0, and so has -0.0. Runs from before widths and corpora were canonicalized have
  another hash if they wrote these out; config.json has the hash that a run began with.
  A branch contributes only the step at which it leaves its trunk: the trunk's state at that step is
  determined by fields that both share (branch.require_trunk). `init_from` contributes
  EXPERIMENT/CELL@STEP, without the path.
  """
  floats = _float_paths()
  values = leaves(config) | _canonical_fields(config) | {
      "moe.balance_coef": config.moe.balance_weight, "moe.z_coef": config.moe.z_weight,
      "data.corpus": config.data.canonical_corpus,
      "train.branch_from": config.train.branch_step,
      "train.init_from": _init_source(config.train)}
  return {path: float(value) + 0.0 if path in floats else value
          for path, value in values.items() if not path.startswith("execution.")}


def _canonical_fields(config: RunConfig) -> dict[str, int | None]:
  """Returns, at their defaults, the fields whose value is redundant with the default or unused."""
  arch, found = config.arch, dict[str, int | None]()
  if arch.kv_heads == arch.n_heads:
    found["arch.n_kv_heads"] = None
  if arch.d_head * arch.n_heads == arch.d_model:
    found["arch.head_dim"] = None
  if not arch.n_dense_layers or arch.dense_width == dataclasses.replace(
      arch, d_dense=None).dense_width:
    found["arch.d_dense"] = None
  if config.group_tokens == config.data.seq_len:
    found["moe.routing_group_tokens"] = 0
  return found


@functools.cache
def _float_paths() -> frozenset[str]:
  return frozenset(path for path, hint in leaf_types(RunConfig).items()
                   if hint in (float, float | None))


def _init_source(train: TrainConfig) -> str | None:
  if train.init_from is None:
    return None
  run = "/".join(train.init_run.split("/")[-2:])
  return run if train.init_step is None else f"{run}@{train.init_step}"


def identity_hash(config: RunConfig) -> str:
  """A hash of the identity, 12 hex digits, which appears in every row of results."""
  told = {path: value for path, value in identity(config).items()
          if path not in _ADDED or value != _ADDED[path]}
  canonical = json.dumps(told, sort_keys=True)
  return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def identity_difference(ours: RunConfig, theirs: RunConfig) -> list[str]:
  """Describes each identity field in which two configurations differ, one phrase per field."""
  a, b = identity(ours), identity(theirs)
  return [f"{path} is {a[path]!r} here and {b[path]!r} there"
          for path in a if a[path] != b[path]]


def to_dict(config: RunConfig) -> dict[str, Any]:
  """A nested dict of plain values, ready for JSON."""
  return dataclasses.asdict(config)


def config_from_dict(values: dict[str, Any]) -> RunConfig:
  """The inverse of `to_dict`. Raises FieldError on an unknown field or a wrong type."""
  values = copy.deepcopy(values)
  for path, before in _ADDED.items():
    *sections, name = path.split(".")
    inner = values
    for section in sections:
      inner = inner.get(section) if isinstance(inner, dict) else None
    if isinstance(inner, dict):  # otherwise from_dict raises
      inner.setdefault(name, before)
  return from_dict(RunConfig, values)


__all__ = [
    "Architecture", "DataConfig", "ExecutionConfig", "MeshConfig",
    "ModelConfig", "MoEConfig", "RunConfig", "SCHEMA_VERSION", "TrainConfig",
    "config_from_dict", "identity", "identity_difference", "identity_hash",
    "require_causal", "resolve_mesh", "to_dict",
]
