"""Turns the answer into sections of a report page: the Pareto fronts, and tables below them."""

from moe_jax.design import report
from moe_jax.design.answer import PRINCIPLE, Answer
from moe_jax.design.ask import Question
from moe_jax.design.plot import pareto_figure
from moe_jax.design.sheet import Sheet
from moe_jax.laws.publish.page import Section
from moe_jax.laws.publish.table import Table

TITLE = "Which architecture for these budgets?"


def design_sections(question: Question, answer: Answer) -> list[Section]:
  """Returns what `report.show` prints, plus the figure and without the run time: deterministic."""
  sections = [
      Section("pareto", "Loss against inference cost, by memory",
              tuple(line.strip() for line in report.header(question, answer)),
              pareto_figure(answer),
              "Each panel shows one law. A line is the best predicted loss within an inference "
              "cost, for a fraction of the memory budget; each corner is an architecture on the "
              "Pareto front. Losses of different laws are not comparable."),
      _section("best", report.best_table(answer), (f"The paper's principle: {PRINCIPLE}.",))]
  if len(answer.recommendations) > 1 or answer.chosen is not None:
    sections.append(_section("law_against_law", report.regret_table(answer)))
  sections += [_section("as_good", report.near_table(answer)),
               _section("prices", report.price_table(answer))]
  sections += [_section(f"front_{r.judge.name}", report.front_table(answer, row), fold=True)
               for row, r in enumerate(answer.recommendations)]
  lines = (*report.principle_lines(answer), *report.notes(answer))
  return [*sections, Section("reading", "How to read it",
                             tuple(line.strip() for line in lines if line.strip()))]


def _section(key: str, sheet: Sheet, text: tuple[str, ...] = (), fold: bool = False) -> Section:
  table = Table((*sheet.left, *sheet.right), tuple(tuple(row) for row in sheet.rows))
  return Section(key, sheet.title, (*text, *([sheet.caption] if sheet.caption else [])),
                 table=table, fold=fold)
