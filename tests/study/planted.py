"""Runs of a small grid with a planted law: their directories and their results.csv."""

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
from etils import epath

from moe_jax import arch
from moe_jax.config import (
  Architecture,
  DataConfig,
  MoEConfig,
  RunConfig,
  TrainConfig,
  identity_hash,
  to_dict,
)
from moe_jax.evaluate.results import facts, write_csv
from moe_jax.files import write_json, write_text
from moe_jax.grid import Cell, Grid
from moe_jax.run_dir import RunDir

RECIPE = RunConfig(
    arch=Architecture(n_layers=2, d_model=96, d_expert=48, n_exp=16, n_topk=4, n_heads=2),
    moe=MoEConfig(routing_group_tokens=512),
    data=DataConfig(seq_len=128),
    train=TrainConfig(steps=200, batch_size=16, warmup_steps=20))
TRUTH = {"a": 0.09, "b_minus_c": 0.01, "c": 0.02}


def grid(sizes=(700_000, 2_000_000), experts=((8, 4), (8, 2), (16, 8), (16, 4), (16, 2), (32, 8)),
         seeds=1) -> Grid:
  """Depth 2, granularity 2."""
  cells = []
  for n_total, (n_exp, n_topk), seed in itertools.product(sizes, experts, range(seeds)):
    shape = arch.solve(template=RECIPE.arch, n_total=n_total, n_exp=n_exp, n_topk=n_topk,
                       n_layers=2, granularity=2.0,
                       limits=arch.IsoLimits(d_model_multiple=4, d_expert_multiple=2))
    cells.append(dataclasses.replace(RECIPE, arch=shape.arch, seed_init=seed))
  return Grid("planted", RECIPE, tuple(cells))


def log_loss(known: dict) -> float:
  """By the planted law, of what the configuration says."""
  return (3 - TRUTH["a"] * math.log(known["n_total"]) + TRUTH["b_minus_c"]
          * math.log(known["n_exp"]) + TRUTH["c"] * math.log(known["sparsity"]))


def write_run(folder: pathlib.Path, experiment: str, cell: str, config: RunConfig,
              loss: float | None, state: str = "finished", error: str | None = None,
              records: int = 3, drop_rate: float = 0.0, every: int = 1,
              text: str = "planted") -> None:
  """One run's directory as trainer and evaluation leave it; without a loss, not evaluated.

  It has so many records of metrics, one `every` so many steps. `text` is the fingerprint of what
  it was trained on.
  """
  run = RunDir(epath.Path(folder) / experiment / cell)
  run.claim(Cell(experiment, f"planted.py:{cell}", cell, config))
  run.write_status({"state": state, "step": config.train.steps if state == "finished" else 7,
                    "steps": config.train.steps, "error": error, "commit": "0" * 12})
  begin = config.train.branch_step or 0
  lines = [json.dumps({"step": step, "loss": 1 / (3 + step), "drop_rate": drop_rate})
           for step in range(begin + every, begin + every * records + 1, every)]
  write_text(run.metrics_file(1, 1), "\n".join(lines) + "\n")
  if loss is not None:
    run.write_eval("heldout", {"step": config.train.steps, "identity": identity_hash(config),
                               "loss": loss, "loss_se": 0.01, "data_fingerprint": text})


def write_runs(folder: pathlib.Path, of: Grid, noise: float = 0.002, configs: bool = True,
               seed: int = 0) -> str:
  """Writes <folder>/planted with a config.json a run; the path of results.csv."""
  rng, rows = np.random.default_rng(seed), []
  for name, config in zip(of.names, of.cells, strict=True):
    known = facts(config)
    measured = log_loss(known) + noise * rng.standard_normal()
    rows.append({"experiment": of.name, "cell": name, "evaluation": "heldout", **known,
                 "state": "finished", "step": config.train.steps, "steps": config.train.steps,
                 "tokens": config.train.steps * config.batch_tokens, "loss": math.exp(measured)})
    if configs:
      run = folder / of.name / name
      run.mkdir(parents=True)
      write_json(run / "config.json", {"experiment": of.name, "cell": name,
                                       "identity": identity_hash(config),
                                       "config": to_dict(config)})
  path = folder / of.name / "results.csv"
  path.parent.mkdir(exist_ok=True)
  write_csv(path, rows)
  return str(path)
