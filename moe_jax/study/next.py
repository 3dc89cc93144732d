"""Proposes runs to add to a grid: those expected to shrink a confidence interval the most.

    python -m moe_jax.study.next --results=runs/quickstart/results.csv --target=b_minus_c \\
        --add=5 --write=experiments/next.py

The proposed runs belong to the same experiment: launched with --config=experiments/next.py, they
appear in the same results.csv.
"""

from absl import flags

from moe_jax import cli
from moe_jax.design.units import parse_count
from moe_jax.errors import require
from moe_jax.laws.flags import define_law_flag, define_rows_flags
from moe_jax.study import noise as noise_lib
from moe_jax.study.targets import ALL, CHOICE, MEAN

_RESULTS = flags.DEFINE_string("results", None, "results.csv of the runs so far.", required=True)
_CONFIG = flags.DEFINE_string("config", None, "Their experiment file; needed if the runs' "
                              "config.json files are not next to the table.")
_LAW = define_law_flag()
_TARGET = flags.DEFINE_string(
    "target", "b_minus_c", f"A coefficient of the form; {ALL}: the volume of the "
    f"joint confidence region of all exponents; {MEAN}: their mean variance; {CHOICE}: which "
    "architecture is best for --choice_n_total and --choice_n_active.")
_ADD = flags.DEFINE_integer("add", 5, "Maximum number of runs to add.")
_FLOPS = flags.DEFINE_string("flops", None, "Budget of training FLOPs, e.g. 1e16: runs are then "
                             "chosen by information per FLOP.")
_WRITE = flags.DEFINE_string("write", None, "Experiment file to write; must not exist yet.")
_N_TOTAL = flags.DEFINE_list("n_total", None, "Sizes to consider, e.g. 2M,6M; default: those of "
                             "the runs.")
_N_EXP = flags.DEFINE_list("n_exp", None, "Numbers of experts; default: those of the runs, "
                           "half the smallest and twice the largest.")
_SPARSITY = flags.DEFINE_list("sparsity", None, "n_exp / n_topk; default: as for --n_exp.")
_GRANULARITY = flags.DEFINE_list("granularity", None, "d_model / d_expert; default: those of "
                                 "the runs.")
_ASPECT = flags.DEFINE_float("aspect", None, "d_model / n_layers to hold fixed.")
_N_LAYERS = flags.DEFINE_integer("n_layers", None, "Depth to hold fixed. Default: the depth of "
                                 "the runs if each size has only one, else their mean aspect is "
                                 "held.")
_SEED_SD, _ARCHITECTURE_SD = noise_lib.define_flags()
_WHERE, _WITHOUT = define_rows_flags()
_CHOICE_TOTAL = flags.DEFINE_string("choice_n_total", None, "N_total of the architectures to "
                                    "choose from, e.g. 1B.")
_CHOICE_ACTIVE = flags.DEFINE_string("choice_n_active", None, "Maximum N_active of these "
                                     "architectures.")


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  if _TARGET.value != CHOICE:
    for flag in (_CHOICE_TOTAL, _CHOICE_ACTIVE):
      require(flag.value is None, flag.name, flag.value, f"applies only to --target={CHOICE}")
  from moe_jax.study import proposal
  from moe_jax.study.write import check_free
  if _WRITE.value:
    check_free(_WRITE.value)
  ask = proposal.Ask(
      law=_LAW.value, target=_TARGET.value, add=_ADD.value,
      flops=parse_count("flops", _FLOPS.value) if _FLOPS.value else None,
      region={"n_total": _numbers("n_total", _N_TOTAL.value, whole=True),
              "n_exp": _numbers("n_exp", _N_EXP.value, whole=True),
              "sparsity": _numbers("sparsity", _SPARSITY.value),
              "granularity": _numbers("granularity", _GRANULARITY.value),
              "aspect": _ASPECT.value, "n_layers": _N_LAYERS.value},
      seed_sd=_SEED_SD.value, architecture_sd=_ARCHITECTURE_SD.value,
      choice=(_whole("choice_n_total", _CHOICE_TOTAL.value),
              _whole("choice_n_active", _CHOICE_ACTIVE.value)))
  found = proposal.propose(_RESULTS.value, ask, _CONFIG.value, _WHERE.value, _WITHOUT.value)
  print("\n".join(found.lines()))
  if _WRITE.value:
    found.write(_WRITE.value)
    print(f"written: {_WRITE.value}; launch it with\n  python -m launch.submit "
          f"--config={_WRITE.value} --backend=local")


def _numbers(field: str, texts: list[str] | None, whole: bool = False) -> tuple | None:
  if texts is None:
    return None
  values = [parse_count(field, text) for text in texts]
  return tuple(round(value) for value in values) if whole else tuple(values)


def _whole(field: str, text: str | None) -> int | None:
  return None if text is None else round(parse_count(field, text))


if __name__ == "__main__":
  cli.run(main)
