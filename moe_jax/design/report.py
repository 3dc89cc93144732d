"""Prints the answer as tables and lines of text on standard output."""

from typing import Any

import numpy as np

from moe_jax.design.answer import PRINCIPLE, Answer, Recommendation, front, name, ranges
from moe_jax.design.ask import Question
from moe_jax.design.inference import CACHE_DTYPE
from moe_jax.design.judge import COMPUTE_EXPONENT
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.text import short

_PARTS = (1.0, 0.5, 0.25)  # fractions of each budget shown in the Pareto front table
_MARKED = ("* outside the range the law was fitted on; ? possibly outside, as the range of a "
           "variable is not recorded.")


def show(question: Question, answer: Answer, seconds: float) -> None:
  """Prints the complete answer."""
  print("\n".join(header(question, answer)))
  print(f"  in {seconds:.1f} s")
  print_sheet(best_table(answer))
  if len(answer.recommendations) > 1 or answer.chosen is not None:
    print_sheet(regret_table(answer))
  print_sheet(near_table(answer))
  print_sheet(price_table(answer))
  if question.fit is not None or question.law is not None:
    print_sheet(front_table(answer, 0))
  print("\n" + "\n".join(principle_lines(answer) + notes(answer)))


def header(question: Question, answer: Answer) -> list[str]:
  """Returns lines on the question and on the space that was searched."""
  found, serving, space = answer.found, question.serving, question.space
  template = space.template
  lines = [
      "budgets: " + "; ".join(f"{budget.label} at most {budget.text(budget.most)}"
                              for budget in found.budgets)
      + f"; {short(question.tokens)} training tokens" * (question.tokens is not None),
      f"  weights {serving.dtype}, with a vocabulary of {template.vocab_size:,} "
      f"({'one table' if template.tie_embeddings else 'embedding and head'}); cache "
      f"{CACHE_DTYPE}, {serving.batch:,} x {serving.context:,} tokens"
      + (f"; on {serving.slice}" if serving.slice else "")]
  if question.like is not None:
    lines.append(f"  like {question.like.name}, {question.like.source}"
                 + (f"; {question.like.note}" if question.like.note else ""))
  heads = (f"{template.n_kv_heads} key-value heads" if template.n_kv_heads
           else "as many key-value heads as query heads")
  return [*lines,
          f"searched: {short(found.lattice)} architectures, {int(found.within().sum()):,} "
          f"within the budgets; n_exp {_range(space.experts)}, n_topk "
          f"{_range(space.topk)}, granularity {_range(space.granularity)}, d_model / n_layers "
          f"{_range(space.aspect)}, multiples of {space.multiple}",
          f"  heads of {template.d_head}, {heads}; {template.n_shared_experts} shared experts, "
          f"{template.n_dense_layers} dense layers"]


def compared(answer: Answer) -> list[tuple[str, int, Recommendation | None]]:
  """Returns (who recommends, candidate, recommendation) for laws, the principle and the chosen."""
  found = []
  for r in answer.recommendations:
    found.append((r.judge.name, r.best, r))
    if r.inside is not None and r.inside != r.best and is_inside(answer, r, r.best) is False:
      found.append(("  in its domain", r.inside, r))
  found.append(("the principle", answer.principle, None))
  if answer.chosen is not None:
    found.append(("published model", answer.chosen, None))
  return found


def facts(answer: Answer, index: int) -> dict[str, Any]:
  """Returns an architecture's name, dimensions, parameter counts and costs."""
  found = answer.found
  arch, shape = found.architecture(index), found.shape([index])
  return {"name": name(arch), "n_layers": arch.n_layers, "d_model": arch.d_model,
          "d_expert": arch.d_expert, "n_exp": arch.n_exp, "n_topk": arch.n_topk,
          "n_heads": arch.n_heads, "n_kv_heads": arch.kv_heads,
          "sparsity": arch.sparsity, "granularity": arch.granularity,
          "n_total": int(shape.n_total[0]), "n_active": int(shape.n_active[0]),
          **{budget.field: float(cost[index])
             for budget, cost in zip(found.budgets, found.costs, strict=True)}}


def best_table(answer: Answer) -> Sheet:
  budgets = [b for b in answer.found.budgets if b.field != "active_params"]
  made = Sheet("The best architecture, law by law",
               ["law", "architecture"], ["s", "g", "N_total", "N_active",
                                         *(b.field.replace("_", " ") for b in budgets),
                                         "predicted"],
               f"{_MARKED} Different laws predict losses on "
               "different text and tokenizers, so they are not comparable across laws. "
               + ("Times are estimates (lower bounds)." * any(b.estimate for b in budgets)))
  for who, index, r in compared(answer):
    values = facts(answer, index)
    made.add(
        who, values["name"], f"{values['sparsity']:.3g}", f"{values['granularity']:.3g}",
        short(values["n_total"]), short(values["n_active"]),
        *(f"{values[b.field]:.4g}" for b in budgets),
        "" if r is None else r.judge.text(answer.found.scores[answer.recommendations.index(r),
                                                              index])
        + _mark(answer, r, index))
  return made


def is_inside(answer: Answer, r: Recommendation, index: int) -> bool | None:
  """Whether a candidate lies in the law's domain; None if that is not fully on record."""
  inside = bool(np.all(r.judge.inside(answer.found.shape([index]))))
  return None if inside and not r.judge.on_record else inside


def _mark(answer: Answer, r: Recommendation, index: int) -> str:
  return {True: "", None: "?", False: "*"}[is_inside(answer, r, index)]


def regret_table(answer: Answer) -> Sheet:
  made = Sheet("Law against law: how much worse the row's architecture is than the "
               "column's own best", ["best by"], [r.judge.name for r in answer.recommendations],
               f"Percent of the loss, by the column's law. {_MARKED}"
               + "".join(f" {r.judge.name} predicts compute, not loss: 1 % of compute counts as "
                         f"{COMPUTE_EXPONENT:g} % of the loss." for r in answer.recommendations
                         if not r.judge.is_loss))
  for who, index, _ in compared(answer):
    made.add(who, *(
        f"{100 * np.expm1(answer.regret(index, j)):+.2f}{_mark(answer, r, index)}"
        for j, r in enumerate(answer.recommendations)))
  return made


def near_table(answer: Answer) -> Sheet:
  budgets = answer.found.budgets
  made = Sheet("Architectures that the law cannot distinguish from its best", ["law"],
               ["how many", "n_exp", "n_topk", "s", "g", "n_layers", "N_total",
                *("least " + b.field.replace("_", " ") for b in budgets)],
               "Within " + "; ".join(dict.fromkeys(
                   f"{r.judge.slack_text}" for r in answer.recommendations)) + ".")
  for r in answer.recommendations:
    span = ranges(answer.found, r.near)
    made.add(
        r.judge.name, f"{len(r.near):,}",
        *(_range(span[column]) for column in ("n_exp", "n_topk", "sparsity", "granularity",
                                              "n_layers")),
        "{}:{}".format(*map(short, span["n_total"])),
        *(budget.text(answer.found.costs[row, index])
          for row, (budget, index) in enumerate(zip(budgets, r.leanest, strict=True))))
  return made


def price_table(answer: Answer) -> Sheet:
  fields = [budget.field for budget in answer.found.budgets]
  made = Sheet("Price of each budget: change of the predicted loss if it is 10 % larger",
               ["law"], [*fields, "at an end of the search"],
               "Solved again on the same lattice; - where the budget does not bind. If an "
               "architecture is at an end of the search, a wider search may find a better one: "
               "--experts, --topk, --granularity, --aspect.")
  for r in answer.recommendations:
    made.add(r.judge.name, *(
        "-" if r.prices[field] > -1e-6 else r.judge.change_text(r.score, r.prices[field])
        for field in fields), ", ".join(r.edges))
  return made


def front_table(answer: Answer, row: int) -> Sheet:
  """Returns a summary of the Pareto front: the best within fractions of the budgets."""
  found, r = answer.found, answer.recommendations[row]
  memory, cost = found.budgets[:2]
  within = found.within()
  made = Sheet(f"The Pareto front under {r.judge.name}: 9 of its {len(front(found, row)):,} "
               "points; --csv writes all of them", [f"{memory.field} up to"],
               [f"{cost.field} up to {cost.text(part * cost.most)}" for part in _PARTS])
  for memory_part in _PARTS:
    cells = []
    for part in _PARTS:
      inside = np.flatnonzero(within & (found.costs[0] <= memory_part * memory.most)
                              & (found.costs[1] <= part * cost.most))
      best = inside[np.argmin(found.scores[row, inside])] if len(inside) else None
      cells.append("none" if best is None else f"{r.judge.text(found.scores[row, best])} "
                   + name(found.architecture(best)))
    made.add(memory.text(memory_part * memory.most), *cells)
  return made


def principle_lines(answer: Answer) -> list[str]:
  """Returns a line on the paper's principle, and lines on which laws agree with it."""
  values = facts(answer, answer.principle)
  lines = [f"principle of arXiv 2601.08215, {PRINCIPLE}: {values['name']}, N_total "
           f"{short(values['n_total'])}, s {values['sparsity']:.3g}"]
  agree, open_, against = [], [], []
  for row, r in enumerate(answer.recommendations):
    if answer.agrees(row):
      agree.append(r.judge.name)
    elif answer.principle in r.near:
      open_.append(r.judge.name)
    else:
      loss = 100 * np.expm1(answer.regret(answer.principle, row))
      against.append(f"{r.judge.name} (its own best is {loss:.2g} % better)")
  for words, laws in (("the search agrees under", agree), ("differs, within the law's "
                      "uncertainty, under", open_), ("differs under", against)):
    if laws:
      lines.append(f"  {words}: {', '.join(laws)}")
  return lines


def notes(answer: Answer) -> list[str]:
  """Returns lines on the variables each law depends on and how its best lies outside its data."""
  lines = ["notes"]
  for r in answer.recommendations:
    lines.append(f"  {r.judge.name}, {r.judge.source}; depends on {', '.join(r.judge.sees)}")
    lines += [f"    {line}" for line in r.notes]
  return lines + ["  no law here separates depth from width; ties go to the least memory, then to "
                  "the middle of the aspect range"]


def _range(ends: tuple[float, float]) -> str:
  low, high = (f"{end:.3g}" for end in ends)
  return low if low == high else f"{low}:{high}"
