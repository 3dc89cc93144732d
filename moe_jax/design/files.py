"""Exports the answer in machine-readable form: a dictionary for JSON, and rows for CSV."""

import csv
from typing import Any

import numpy as np

from moe_jax.design.answer import Answer, front, ranges
from moe_jax.design.ask import Question
from moe_jax.design.report import facts, is_inside


def as_dict(question: Question, answer: Answer, seconds: float) -> dict[str, Any]:
  """Returns everything in the tables as a dictionary."""
  found = answer.found
  return {
      "budgets": {b.field: b.most for b in found.budgets}, "tokens": question.tokens,
      "dtype": question.serving.dtype, "batch": question.serving.batch,
      "context": question.serving.context,
      "hardware": str(question.serving.slice) if question.serving.slice else None,
      "like": question.like.name if question.like else None,
      "lattice": found.lattice, "within": int(found.within().sum()), "seconds": seconds,
      "laws": [_law(answer, row) for row in range(len(answer.recommendations))],
      "principle": _compared(answer, answer.principle),
      "chosen": None if answer.chosen is None else _compared(answer, answer.chosen)}


def _law(answer: Answer, row: int) -> dict[str, Any]:
  r = answer.recommendations[row]
  value = r.judge.value(answer.found.scores[row, r.best])
  return {
      "law": r.judge.name, "source": r.judge.source, "sees": r.judge.sees,
      "best": _compared(answer, r.best),
      "loss": value if r.judge.is_loss else None,
      "equal_loss_dense_flops": None if r.judge.is_loss else value,
      "inside": is_inside(answer, r, r.best), "notes": r.notes,
      "edges": r.edges, "price_of_10_percent_in_log_loss": r.prices,
      "as_good": {"within": r.judge.slack_text, "count": len(r.near),
                  "ranges": ranges(answer.found, r.near),
                  "leanest": {budget.field: facts(answer, index) for budget, index in
                              zip(answer.found.budgets, r.leanest, strict=True)}},
      "agrees_with_principle": answer.agrees(row)}


def _compared(answer: Answer, index: int) -> dict[str, Any]:
  """Returns an architecture's facts, and by how many percent it is worse than each law's best."""
  return facts(answer, index) | {"regret_percent": {
      r.judge.name: float(100 * np.expm1(answer.regret(index, row)))
      for row, r in enumerate(answer.recommendations)}}


def write_csv(path: str, answer: Answer) -> None:
  """Writes, for each law, its best, the compared architectures and its Pareto front.

  Columns: law, what (best, front, principle, chosen), the architecture's numbers, `predicted`
  (a loss, or equal-loss dense FLOPs for a law that predicts leverage) and `worse_percent`.
  """
  with open(path, "w", newline="") as file:
    writer = None
    for row, r in enumerate(answer.recommendations):
      compared = [("principle", answer.principle), ("chosen", answer.chosen)]
      listed = [("best", r.best), *(pair for pair in compared if pair[1] is not None),
                *(("front", int(at)) for at in front(answer.found, row))]
      for what, index in listed:
        line = {"law": r.judge.name, "what": what, **facts(answer, index),
                "predicted": r.judge.value(answer.found.scores[row, index]),
                "worse_percent": 100 * np.expm1(answer.regret(index, row))}
        if writer is None:
          writer = csv.DictWriter(file, list(line))
          writer.writeheader()
        writer.writerow(line)
