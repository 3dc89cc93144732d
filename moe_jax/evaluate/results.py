"""Builds results.csv: one row per cell and evaluation, with everything a fit needs. No JAX.

The file is derived: it is rebuilt from config.json, status.json and eval/*.json of every run of
the experiment on disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

from moe_jax import config as config_lib
from moe_jax.arch import count
from moe_jax.config import RunConfig
from moe_jax.errors import FieldError
from moe_jax.files import csv_text, read_json, write_text
from moe_jax.run_dir import RunDir
from moe_jax.text import natural

Row = dict[str, Any]

# Files in eval/ that hold no losses: routing statistics and the measured cost of inference.
ROUTING, INFERENCE = "routing", "inference"

# The warning next to a loss whose router is not causal.
SEEN_THE_FUTURE = "its router sees later tokens, so its loss is not comparable with other models'"

# Fields copied unchanged from eval/NAME.json and from status.json.
_MEASURED = (
    "step", "loss", "loss_se", "loss_at_capacity", "loss_at_capacity_se", "bits_per_byte",
    "bits_per_byte_se", "unigram_loss", "unigram_bits_per_byte", "drop_rate",
    "load_variation", "max_load", "dead_experts", "left_behind", "router_entropy",
    "heldout_documents", "heldout_targets", "heldout_bytes", "data_fingerprint")
_OF_TRAINING = ("state", "steps", "tokens_per_second", "mfu", "device_kind", "n_devices",
                "commit")

# Fields that may differ between repeats of a run. A branch gives the same result as a run without
# branching.
_REPEATS = ("seed_init", "seed_data", "train.learning_rate", "train.branch_from")
# The variables of a law, and the fields that change with them.
_VARIABLES = (*(f"arch.{name}" for name in (
    "n_layers", "d_model", "d_expert", "n_exp", "n_topk", "n_heads", "n_kv_heads", "head_dim",
    "n_shared_experts", "n_dense_layers", "d_dense")), "train.steps")


def csv_path(out: str | os.PathLike, experiment: str) -> epath.Path:
  return epath.Path(out) / experiment / "results.csv"


def facts(config: RunConfig) -> Row:
  """Returns the columns that the configuration determines, with ratios and defaults resolved."""
  arch, moe, data, train = config.arch, config.moe, config.data, config.train
  return {
      "n_layers": arch.n_layers, "d_model": arch.d_model, "d_expert": arch.d_expert,
      "n_exp": arch.n_exp, "n_topk": arch.n_topk, "granularity": arch.granularity,
      "sparsity": arch.sparsity, "n_heads": arch.n_heads, "n_kv_heads": arch.kv_heads,
      "head_dim": arch.d_head, "n_shared_experts": arch.n_shared_experts,
      "n_dense_layers": arch.n_dense_layers, "d_dense": arch.dense_width,
      "vocab_size": arch.vocab_size, "tie_embeddings": arch.tie_embeddings,
      "qk_norm": arch.qk_norm,
      "n_total": count.n_total(arch), "n_active": count.n_active(arch),
      "n_total_with_embedding": count.n_total_with_embedding(arch),
      "n_active_with_embedding": count.n_active_with_embedding(arch),
      "corpus": data.canonical_corpus, "tokenizer": data.tokenizer, "seq_len": data.seq_len,
      "mask_documents": data.mask_documents, "dispatch": moe.dispatch,
      "capacity_factor": moe.capacity_factor, "routing_group_tokens": config.group_tokens,
      "norm_topk_prob": moe.norm_topk_prob, "balance_coef": moe.balance_weight,
      "z_coef": moe.z_weight, "router": moe.router, "bias_update_rate": moe.bias_update_rate,
      "jitter": moe.jitter, "drop_order": moe.drop_order, "causal": moe.causal,
      "compute_dtype": config.model.compute_dtype,
      "batch_tokens": config.batch_tokens, "learning_rate": train.learning_rate,
      "schedule": train.schedule, "warmup_steps": train.warmup_steps,
      "decay_fraction": train.decay_fraction, "weight_decay": train.weight_decay,
      "init_from": train.init_from, "seed_init": config.seed_init,
      "seed_data": config.seed_data}


def same_in_repeats(config: RunConfig) -> dict[str, Any]:
  """The identity fields that repeats of a run share: all but seeds, learning rate and branch."""
  return {path: value for path, value in config_lib.identity(config).items()
          if path not in _REPEATS}


def recipe_hash(config: RunConfig) -> str:
  """Hashes how a run was trained, regardless of its shape and length, to twelve hex digits.

  Comparable only between rows written by the same version of this code, as in one table.
  """
  recipe = {path: value for path, value in same_in_repeats(config).items()
            if path not in _VARIABLES}
  return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def rows_of(run_dir: RunDir) -> list[Row]:
  """Returns a row per evaluation of a run's newest checkpoint; none if the run has not begun.

  `tokens` and `training_flops` count up to the evaluated checkpoint. `tokens_per_second`, `mfu`,
  `device_kind`, `n_devices` and `commit` describe the training. If the text has several domains,
  there are columns `loss.LABEL` and `bits_per_byte.LABEL` for each, with their errors; if the cost
  of inference was measured, its columns (cost.columns); if tasks were evaluated on the same
  checkpoint, `TASK.METRIC` and `TASK.METRIC_se`.

  Raises:
    FieldError: a file is damaged.
  """
  evals = run_dir.read_evals()
  cost = evals.get(INFERENCE) or {}
  cost = cost if isinstance(cost, dict) else {}
  tasks = {name: found for name, found in evals.items() if _is_task(found)}
  rows = _rows(run_dir, {name: found for name, found in evals.items()
                         if name not in (ROUTING, INFERENCE, *tasks)})
  return [row | (cost.get("columns", {}) if cost.get("identity") == row["identity"] else {})
          | _of_tasks(tasks.values(), row) for row in rows]


def _is_task(found: Any) -> bool:
  return isinstance(found, dict) and "task" in found


def _of_tasks(tasks: Iterable[dict[str, Any]], row: Row) -> Row:
  """Returns the columns of the downstream tasks evaluated on the checkpoint of `row`."""
  return {name: value for found in tasks
          if (found.get("step"), found.get("identity")) == (row["step"], row["identity"])
          for name, value in found.get("columns", {}).items()}


def curve_rows_of(run_dir: RunDir, evaluation: str) -> list[Row]:
  """Returns a row for each checkpoint that has `evaluation`, by step; see rows_of."""
  rows = {}
  for step in (None, *run_dir.evaluated_steps()):
    found = run_dir.read_eval(evaluation, step)
    for row in [] if found is None else _rows(run_dir, {evaluation: found}):
      rows[row["step"]] = row
  return [rows[step] for step in sorted(rows)]


def _rows(run_dir: RunDir, evals: dict[str, Any]) -> list[Row]:
  config = run_dir.read_config()
  if config is None:
    return []
  cell = read_json(run_dir.path / "config.json").get("cell")
  if cell != run_dir.path.name:  # a copy would be counted twice in a fit
    raise FieldError("out", str(run_dir.path), f"is a copy of the run {cell!r}")
  status = run_dir.read_status()
  trunk = run_dir.read_branched_from() or {}
  identity = config_lib.identity_hash(config)
  flops = count.training_flops_per_token(config.arch, config.data.seq_len)
  rows = []
  for name, found in evals.items():
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
      raise FieldError("out", str(run_dir.path / "eval" / f"{name}.json"),
                       "is damaged: no step")
    if found.get("identity") != identity:  # left by an earlier run in this directory
      continue
    tokens = found["step"] * config.batch_tokens
    rows.append({
        "experiment": run_dir.path.parent.name, "cell": run_dir.path.name,
        "identity": identity, "recipe_hash": recipe_hash(config), "evaluation": name,
        **facts(config),
        "trunk_identity": trunk.get("identity"), "trunk_step": trunk.get("step"),
        "tokens": tokens, "training_flops": tokens * flops,
        **{key: found.get(key) for key in _MEASURED},
        **{key: status.get(key) for key in _OF_TRAINING}, **_by_domain(found)})
  return rows


def _by_domain(found: dict[str, Any]) -> Row:
  domains = found.get("domains") or {}
  if len(domains) < 2:
    return {}
  return {f"{key}.{label}": of_domain.get(key) for label, of_domain in domains.items()
          for key in ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se")}


def collect(out: str | os.PathLike, experiment: str,
            read: Callable[[RunDir], list[Row]] = rows_of, table: str = "results.csv",
            ) -> tuple[list[Row], list[str]]:
  """Returns the rows of all runs of an experiment, and a line for each run `table` lacks."""
  rows, problems = [], []
  folder = epath.Path(out) / experiment
  for file in sorted(folder.glob("*/config.json"), key=lambda f: natural(f.parent.name)):
    try:
      rows += read(RunDir(file.parent))
    except FieldError as error:
      problems.append(f"{file.parent.name}: not in {table}: {error}")
  return rows, problems


def write_csv(path: epath.Path, rows: Sequence[Row]) -> None:
  """Writes rows as CSV; see csv_text."""
  write_text(path, csv_text(rows))
