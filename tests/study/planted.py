"""Runs of a small grid with a planted law: their directories and their results.csv."""

import dataclasses
import itertools
import math
import pathlib

import numpy as np

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
from moe_jax.grid import Grid
from moe_jax.run_dir import write_json

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


def write_runs(folder: pathlib.Path, of: Grid, noise: float = 0.002, configs: bool = True,
               seed: int = 0) -> str:
  """Writes <folder>/planted with a config.json a run; the path of results.csv."""
  rng, rows = np.random.default_rng(seed), []
  for name, config in zip(of.names, of.cells, strict=True):
    known = facts(config)
    log_loss = (3 - TRUTH["a"] * math.log(known["n_total"])
                + TRUTH["b_minus_c"] * math.log(known["n_exp"])
                + TRUTH["c"] * math.log(known["sparsity"]) + noise * rng.standard_normal())
    rows.append({"experiment": of.name, "cell": name, "evaluation": "heldout", **known,
                 "state": "finished", "step": config.train.steps, "steps": config.train.steps,
                 "tokens": config.train.steps * config.batch_tokens, "loss": math.exp(log_loss)})
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
