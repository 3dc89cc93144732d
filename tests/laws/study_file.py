"""Rows like those of a real study: 13 shapes at three sizes, a second arm, sweeps and mishaps."""

import hashlib
import math

import numpy as np

from moe_jax.arch import count, iso
from moe_jax.arch.architecture import Architecture
from moe_jax.design.answer import name
from moe_jax.laws.table import Row

SIZES = (2_000_000, 6_000_000, 16_000_000)
ARM_A = [(n_exp, n_exp // s, 2.0) for s, lowest in ((2, 8), (4, 8), (8, 16), (16, 32))
         for n_exp in (8, 16, 32, 64) if n_exp >= lowest]
ARM_B = [(8, 2, 1.0), (32, 8, 4.0), (64, 16, 8.0)]  # n_exp / granularity is 8 at s = 4
SLOPES = {"a": 0.075, "b_minus_c": 0.006, "c": 0.018, "q": 0.004}
NOISE = 0.0012
LIMITS = iso.IsoLimits(d_model_multiple=8, d_expert_multiple=2, tolerance_ppm=15_000)


def study_rows(seed: int = 0, noise: float = NOISE) -> list[Row]:
  """Rows with a planted law; one run diverged, one is at work, one sweep ends at an edge."""
  rng = np.random.default_rng(seed)
  template = Architecture(n_layers=1, d_model=64, d_expert=64, n_exp=1, n_topk=1, n_heads=4,
                          vocab_size=1024)
  rows = []
  for size in SIZES:
    for n_exp, n_topk, granularity in ARM_A + ARM_B:
      arch = iso.solve(template=template, n_total=size, n_exp=n_exp, n_topk=n_topk, aspect=32,
                       granularity=granularity, limits=LIMITS).arch
      corner = size == SIZES[0] and (n_exp, n_topk) in ((8, 4), (64, 32), (16, 2), (64, 4))
      for step in (-2, -1, 0, 1, 2) if corner else (0,):
        for repeat in range(3 if corner and step == 0 else 1):
          rows.append(_row(arch, step, repeat, rng, noise))
  low = [row for row in rows if (row["n_exp"], row["n_topk"]) == (64, 4) and row["n_total"] < 3e6]
  for row in low:  # falls all the way to the lowest rate
    row["loss"] = 4.2 * row["learning_rate"]**0.01
  rows[-1] |= {"state": "diverged", "step": 400, "loss": math.nan}
  rows[-4] |= {"state": "running", "step": 1200, "loss": ""}
  return rows


def _row(arch: Architecture, step: int, repeat: int, rng: np.random.Generator,
         noise: float) -> Row:
  n_total, n_active = count.n_total(arch), count.n_active(arch)
  log_s, t = math.log(arch.n_exp / arch.n_topk), SLOPES
  log_loss = (2.35 - t["a"] * math.log(n_total) + t["b_minus_c"] * math.log(arch.n_exp)
              + t["c"] * log_s + t["q"] / 2 * (log_s - math.log(4))**2
              + 0.02 * (step * math.log(2) / 2 + 0.1)**2 + noise * rng.standard_normal())
  rate = 4e-3 * 2**(step / 2)
  cell = name(arch) + (f"-lr{rate:.3g}" if step else "") + (f"-s{repeat}" if repeat else "")
  return {
      "experiment": "rehearsal", "cell": cell,
      "identity": hashlib.sha256(cell.encode()).hexdigest()[:12], "evaluation": "heldout",
      "n_layers": arch.n_layers, "d_model": arch.d_model, "d_expert": arch.d_expert,
      "n_exp": arch.n_exp, "n_topk": arch.n_topk, "n_total": n_total, "n_active": n_active,
      "tokens": 50_000_000, "corpus": "sotu", "tokenizer": "bpe-1024", "seq_len": 256,
      "learning_rate": rate, "batch_tokens": 16384, "seed_init": repeat, "seed_data": 0,
      "loss": math.exp(log_loss), "state": "finished", "step": 3050, "steps": 3050}
