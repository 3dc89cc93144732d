"""Chooses an architecture for given budgets by a fitted law, a published one, or all of them.

    python -m moe_jax.design --memory_gb=16 --active_params=200M --tokens=9B
    python -m moe_jax.design --hardware=v5e-8 --batch=64 --context=8192 --decode_ms=10 --tokens=1T
    python -m moe_jax.design --like=OLMoE-1B-7B
    python -m moe_jax.design --results=runs/grid/results.csv --law=paper \\
        --memory_gb=16 --active_params=200M
"""

import dataclasses
import json
import sys
import time

from absl import flags

from moe_jax import cli
from moe_jax.design import ask as ask_lib
from moe_jax.design import files, inference, report, units
from moe_jax.design.judge import TOLERANCE
from moe_jax.design.published import PUBLISHED, get_model
from moe_jax.design.space import DEFAULT_TEMPLATE, DEFAULT_VOCAB, Space
from moe_jax.errors import FieldError, require
from moe_jax.laws.flags import define_rows_flags

_MEMORY = flags.DEFINE_string(
    "memory_gb", None, "Memory for weights and cache, e.g. 16, 16GB or 32GiB. Default: what "
    "--like needs, else 90 % of --hardware's memory.")
_ACTIVE = flags.DEFINE_string("active_params", None, "Maximum number of active parameters, without "
                              "embedding and head, e.g. 200M.")
_DECODE = flags.DEFINE_float("decode_ms", None, "Maximum milliseconds per decode step, by a "
                             "roofline of --hardware at --batch and --context.")
_PREFILL = flags.DEFINE_float("prefill_ms", None, "Maximum milliseconds to prefill a prompt of "
                              "--context tokens, by the same roofline.")
_HARDWARE = flags.DEFINE_string("hardware", None, "Chips that serve one copy of the model, e.g. "
                                "v5e-8 for 8 chips.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences decoded together.")
_CONTEXT = flags.DEFINE_integer("context", 4096, "Tokens in the cache of each sequence.")
_DTYPE = flags.DEFINE_string("dtype", "bf16", "Type of the stored weights: bf16, fp8, int8. "
                             "The cache is bf16.")
_TOKENS = flags.DEFINE_string("tokens", None, "Training tokens, e.g. 9B.")
_LAW = flags.DEFINE_string("law", None, "A published law or, with --results, the form to fit "
                           "(default paper). Without either, all published laws of MoEs.")
_RESULTS = flags.DEFINE_string("results", None, "results.csv of an experiment: fit --law to it.")
_WHERE, _WITHOUT = define_rows_flags()
_TOLERANCE = flags.DEFINE_float("tolerance", TOLERANCE, "Relative difference in loss below "
                                "which a published law is taken to see a tie.")
_LIKE = flags.DEFINE_string("like", None, "Take budgets, tokens, vocabulary, heads, shared and "
                            f"dense layers from one of {', '.join(PUBLISHED)}.")
_EXPERTS = flags.DEFINE_string("experts", "8:512", "Range of n_exp.")
_TOPK = flags.DEFINE_string("topk", "1:32", "Range of n_topk.")
_GRANULARITY = flags.DEFINE_string("granularity", "0.5:16", "Range of d_model / d_expert.")
_ASPECT = flags.DEFINE_string("aspect", "32:128", "Range of d_model / n_layers.")
_MULTIPLE = flags.DEFINE_integer("multiple", 128, "d_model and d_expert are multiples of this.")
_TEMPLATE = {
    "vocab_size": flags.DEFINE_integer("vocab_size", None, "Vocabulary size: rows of the "
                                       "embedding and of the output head, both counted as memory. "
                                       f"Default {DEFAULT_VOCAB}."),
    "n_shared_experts": flags.DEFINE_integer("shared_experts", None, "Experts that see every "
                                             "token. Default 0."),
    "head_dim": flags.DEFINE_integer("head_dim", None, "Width of an attention head. Default 128."),
    "n_kv_heads": flags.DEFINE_integer("kv_heads", None, "Key-value heads. Default: as many as "
                                       "query heads."),
}
_JSON = flags.DEFINE_bool("json", False, "Print the answer as JSON.")
_CSV = flags.DEFINE_string("csv", None, "Write the best architecture and the Pareto front of "
                           "every law to this file, as CSV.")
_PLOT = flags.DEFINE_string("plot", None, "Plot the Pareto fronts to this file, as PNG.")
_REPORT = flags.DEFINE_string("report", None, "Path of the .html report; its figures and "
                              "tables go into a folder next to it. With --results it begins with "
                              "the report of `moe_jax.laws`.")


def _space(like) -> Space:
  given = {name: flag.value for name, flag in _TEMPLATE.items() if flag.value is not None}
  if like is not None:
    for name in given:
      raise FieldError(_TEMPLATE[name].name, given[name],
                       f"contradicts --like={like.name}, which has its own")
    template = like.arch
  else:
    for name, value in given.items():
      require(value >= (0 if name == "n_shared_experts" else 1), _TEMPLATE[name].name, value,
              "is too small")
    template = _template(given)
  return Space(template, units.parse_range("experts", _EXPERTS.value),
               units.parse_range("topk", _TOPK.value), _MULTIPLE.value,
               units.parse_range("aspect", _ASPECT.value),
               units.parse_range("granularity", _GRANULARITY.value))


def _template(given: dict[str, int]):
  """Builds the template; its d_model is exactly as wide as its heads."""
  head_dim = given.get("head_dim", DEFAULT_TEMPLATE.d_head)
  require(head_dim % 2 == 0, "head_dim", head_dim,
          "must be even: rotary embeddings rotate pairs of dimensions")
  n_heads = given.get("n_kv_heads", 1)
  return dataclasses.replace(DEFAULT_TEMPLATE, **given | {
      "n_heads": n_heads, "head_dim": head_dim, "d_model": n_heads * head_dim})


def _cells():
  from moe_jax.laws.reduce import to_cells
  from moe_jax.laws.table import read_results
  return to_cells(read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value), _RESULTS.value)


def _fit():
  if _RESULTS.value is None:
    for flag in (_WHERE, _WITHOUT):
      require(not flag.value, flag.name, ",".join(flag.value), "needs --results")
    return None
  from moe_jax.laws.fit import fit
  return fit(_cells(), _LAW.value or "paper")


def _publish(question: ask_lib.Question, answer) -> None:
  from moe_jax.design.page import TITLE, design_sections
  from moe_jax.laws.publish.page import publish
  lead, sections = [], []
  if question.fit is not None:
    from moe_jax.laws.analysis import analyse
    from moe_jax.laws.publish.sections import law_sections, lead_of
    found = analyse(_cells(), _LAW.value or "paper")
    lead, sections = lead_of(found), law_sections(found, _RESULTS.value)
  files_made = publish(_REPORT.value, TITLE, lead, [*sections, *design_sections(question, answer)])
  print(f"{files_made[0]}, and {len(files_made) - 1} figures and tables in "
        f"{files_made[1].parent}/", file=sys.stderr if _JSON.value else sys.stdout)


def _question() -> ask_lib.Question:
  like = get_model(_LIKE.value) if _LIKE.value is not None else None
  space = _space(like)
  chips = inference.parse_slice(_HARDWARE.value) if _HARDWARE.value is not None else None
  serving = inference.Serving(inference.parse_dtype(_DTYPE.value), _BATCH.value, _CONTEXT.value,
                              chips)

  def parsed(flag, parse):
    return None if flag.value is None else parse(flag.name, flag.value)

  tokens = parsed(_TOKENS, units.parse_count)
  return ask_lib.Question(
      space, serving, parsed(_MEMORY, units.parse_gigabytes), parsed(_ACTIVE, units.parse_count),
      _DECODE.value, _PREFILL.value, tokens, None if _RESULTS.value else _LAW.value,
      _fit(), like, _TOLERANCE.value)


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  for flag in (_CSV, _PLOT):
    cli.require_file(flag.name, flag.value)
  if _REPORT.value is not None:
    from moe_jax.laws.publish.page import check_path
    check_path(_REPORT.value)
  question = _question()
  start = time.perf_counter()
  question, answer = ask_lib.ask(question)
  seconds = time.perf_counter() - start
  if _JSON.value:
    print(json.dumps(files.as_dict(question, answer, seconds), indent=2))
  else:
    report.show(question, answer, seconds)
  if _CSV.value:
    files.write_csv(_CSV.value, answer)
  if _PLOT.value:
    from moe_jax.design.plot import pareto_figure
    pareto_figure(answer).savefig(_PLOT.value, format="png")
  if _REPORT.value:
    _publish(question, answer)


if __name__ == "__main__":
  cli.run(main)
