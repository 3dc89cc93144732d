"""Experiment files for tests: written to a temporary folder, as a user would write them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

_TINY = '''"""Does the seed matter?"""

import dataclasses

from moe_jax.config import Architecture, ExecutionConfig, RunConfig, TrainConfig
from moe_jax.grid import Grid

RECIPE = RunConfig(
    arch=Architecture(n_layers=2, d_model=32, d_expert=16, n_exp=4, n_topk=2, n_heads=2),
    train=TrainConfig(steps={steps}, warmup_steps=2, batch_size=8),
    execution=ExecutionConfig(checkpoint_every=5))


def get_grid():
  return Grid("tiny", RECIPE, tuple(dataclasses.replace(RECIPE, seed_init=seed)
                                    for seed in range({seeds})))
'''
BASE = "l2-d32-f16-e4-k2"  # name of the tiny grid's first cell; the next are -s1, -s2, ...


def write_tiny(folder: pathlib.Path, seeds: int = 2, steps: int = 20) -> str:
  """A grid of `seeds` cells that differ in seed_init; the file's path."""
  return write(folder, _TINY.format(seeds=seeds, steps=steps))


def write(folder: pathlib.Path, source: str, name: str = "tiny.py") -> str:
  file = folder / name
  file.write_text(source)
  return str(file)


def run_module(*arguments: str, timeout: float = 300,
               **environment: str) -> subprocess.CompletedProcess:
  """`python ARGUMENTS` in the repository, as a user starts a command; its output as text."""
  return subprocess.run(
      [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
      timeout=timeout, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
