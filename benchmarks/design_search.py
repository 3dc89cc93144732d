"""Measures the design search in architectures per second, against a plain Python loop.

    python -m benchmarks.design_search

The budgets suit a model of 30e9 parameters on 16 v5p chips, and are wide enough that over a
million architectures meet them. There are three questions: one law under a budget of active
parameters, one law under a decoding roofline, and all published MoE laws under that roofline; the
best of --repeats searches counts. `judged` architectures went through every stage: counts, memory,
inference cost and laws; the lattice is larger, since a shape that is too expensive with few experts
is not tried with more. `answer` is the time to summarize them: the best, those as good, and the
prices of the budgets. A sample of the same architectures then goes through a plain Python loop of
Architecture, arch.count and Law.predict, with a separate roofline, and every cost and score must
agree. Prints a table, then the same figures as JSON.
"""

import json
import math
import time
from typing import Any

import numpy as np
from absl import flags

from benchmarks.iso_solver import machine
from moe_jax import cli
from moe_jax.arch import count
from moe_jax.arch.architecture import Architecture
from moe_jax.design.answer import answer
from moe_jax.design.ask import Question, judges, resolved
from moe_jax.design.budget import budgets
from moe_jax.design.inference import Serving, parse_slice
from moe_jax.design.search import Found, search
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.errors import require
from moe_jax.laws.law import LOSS
from moe_jax.laws.registry import LAWS
from moe_jax.text import short

_SAMPLE = flags.DEFINE_integer("sample", 2000, "Number of architectures for the plain loop.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Number of searches; the fastest counts.")

_SERVING = Serving("bfloat16", batch=32, context=4096, slice=parse_slice("v5p-16"))
QUESTIONS = {
    "active parameters, abnar": Question(serving=_SERVING, memory_gb=130, active_params=6e9,
                                         tokens=1e12, law="abnar"),
    "decode roofline, abnar": Question(serving=_SERVING, memory_gb=130, decode_ms=6,
                                       tokens=1e12, law="abnar"),
    "decode roofline, all laws": Question(serving=_SERVING, memory_gb=130, decode_ms=6,
                                          tokens=1e12),
}


def scalar_decode_ms(arch: Architecture, serving: Serving) -> float:
  """Decoding roofline of one architecture in plain Python, in ms."""
  chip, n = serving.slice.chip, serving.slice.n_chips
  batch, context = serving.batch, serving.context
  expert = 3 * arch.d_model * arch.d_expert
  missed = (1 - arch.n_topk / arch.n_exp)**batch
  head = arch.d_model * arch.vocab_size
  norms = arch.d_model + arch.n_layers * (2 * arch.d_model + arch.qk_norm_scales)
  rest = count.n_parameters(arch, 0)
  attention = 4 * arch.n_layers * arch.n_heads * arch.d_head * context
  size = count.dtype_bytes(serving.dtype)
  parts = [
      (rest * size, 2 * (rest - norms) * batch),
      (arch.n_moe_layers * arch.n_exp * (1 - missed) * expert * size,
       2 * arch.n_moe_layers * arch.n_topk * expert * batch),
      (count.kv_cache_bytes(arch, batch, context, "bfloat16"), attention * batch),
      (head * size, 2 * head * batch)]
  seconds = sum(max(moved / chip.hbm_bytes_per_second, work / chip.bf16_flops)
                for moved, work in parts) / n
  sent = 2 * arch.n_layers * 2 * (n - 1) / n * batch * arch.d_model * 2
  return 1e3 * (seconds + sent / chip.link_bytes_per_second)


def scalar(arch: Architecture, question: Question, laws: list[str]) -> tuple[list, list]:
  """(costs, scores) of one architecture, in plain Python."""
  serving = question.serving
  memory = (count.weight_bytes(arch, serving.dtype)
            + count.kv_cache_bytes(arch, serving.batch, serving.context, "bfloat16")) / 1e9
  cost = (count.n_active(arch) if question.decode_ms is None
          else scalar_decode_ms(arch, serving))
  scores = []
  for name in laws:
    answer = LAWS[name].predict(arch, question.tokens)
    scores.append(math.log(answer.value) if answer.quantity == LOSS else
                  -0.05 * math.log(answer.value * 6 * count.n_active(arch) * question.tokens))
  return [memory, cost], scores


def disagreement(found: Found, question: Question, laws: list[str],
                 n_sample: int) -> tuple[float, float]:
  """Returns (largest relative difference, seconds per architecture in the plain loop)."""
  sample = np.random.default_rng(0).choice(len(found), min(n_sample, len(found)), replace=False)
  archs = [found.architecture(int(i)) for i in sample]
  start = time.perf_counter()
  alone = [scalar(arch, question, laws) for arch in archs]
  took = (time.perf_counter() - start) / len(sample)
  costs, scores = (np.array(part).T for part in zip(*alone, strict=True))
  worst = max(np.max(np.abs(found.costs[:, sample] / costs - 1)),
              np.max(np.abs(found.scores[:, sample] - scores)))
  return float(worst), took


def measure(question: Question, n_sample: int, repeats: int) -> dict[str, Any]:
  """Returns the figures of one question. Raises RuntimeError if search and loop disagree."""
  question = resolved(question)
  asked = judges(question)
  limits = budgets(question.serving, question.memory_gb, question.active_params,
                   question.decode_ms, question.prefill_ms)
  took = []
  for _ in range(repeats):
    start = time.perf_counter()
    found = search(question.space, limits, asked)
    took.append(time.perf_counter() - start)
  start = time.perf_counter()
  answer(found, asked)
  answering = time.perf_counter() - start
  worst, alone = disagreement(found, question, [judge.name for judge in asked], n_sample)
  if worst > 1e-9:
    raise RuntimeError(f"the search and the plain loop disagree by {worst:.2g}")
  return {"lattice": found.lattice, "priced": found.priced, "judged": len(found),
          "laws": len(asked), "seconds": min(took),
          "answer_seconds": answering, "judged_a_second": len(found) / min(took),
          "plain_microseconds_each": 1e6 * alone, "sample": min(n_sample, len(found)),
          "times_faster": alone * len(found) / min(took), "largest_difference": worst}


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  for flag in (_SAMPLE, _REPEATS):
    require(flag.value >= 1, flag.name, flag.value, "must be at least 1")
  rows = {name: measure(question, _SAMPLE.value, _REPEATS.value)
          for name, question in QUESTIONS.items()}
  sheet = Sheet("the design search", ["question"], [
      "lattice", "judged", "search [s]", "answer [s]", "judged a second", "plain loop", "faster",
      "difference"])
  for name, row in rows.items():
    sheet.add(name, short(row["lattice"]), short(row["judged"]), f"{row['seconds']:.2f}",
              f"{row['answer_seconds']:.2f}", short(row["judged_a_second"]),
              f"{row['plain_microseconds_each']:.0f} us each",
              f"{row['times_faster']:.0f} x", f"{row['largest_difference']:.1g}")
  print_sheet(sheet)
  print(json.dumps({"machine": machine(), "questions": rows}, indent=2))


if __name__ == "__main__":
  cli.run(main)
