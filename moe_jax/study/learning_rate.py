"""Finds the best learning rate of each sweep, and fits a law lr*(N_total, s, n_exp) to them.

    python -m moe_jax.study.learning_rate --results=runs/study-pilots/results.csv \\
        --write=experiments/study/rates.json
    python -m moe_jax.study.learning_rate --results=runs/study-rate-check/results.csv \\
        --check=experiments/study/rates.json

A sweep is refused if its best rate is at an edge, or if noise between seeds leaves the optimum
unbounded; the message names the rates to add. --check compares a law fitted earlier with sweeps
at other cells.
"""

from absl import flags
from etils import epath

from moe_jax import cli
from moe_jax.errors import require
from moe_jax.files import write_json
from moe_jax.laws.flags import define_rows_flags
from moe_jax.laws.table import read_results
from moe_jax.study import rate_report, rates
from moe_jax.study.noise import SEED_SD

_RESULTS = flags.DEFINE_string("results", None, "results.csv of the sweeps.", required=True)
_WHERE, _WITHOUT = define_rows_flags()
_SEED_SD = flags.DEFINE_float("seed_sd", SEED_SD, "Standard deviation of ln L between seeds.")
_WRITE = flags.DEFINE_string("write", None, "Write the law to this .json file.")
_CHECK = flags.DEFINE_string("check", None, "Compare this law, a file written by --write, "
                             "with the sweeps; nothing is fitted.")


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  require(0 < _SEED_SD.value < 1, "seed_sd", _SEED_SD.value, "must be above 0 and below 1")
  require(_WRITE.value is None or _WRITE.value.endswith(".json"), "write", _WRITE.value,
          "must end in .json")
  require(_WRITE.value is None or _CHECK.value is None, "write", _WRITE.value,
          "cannot be combined with --check")
  law = None if _CHECK.value is None else rates.read(_CHECK.value, "check")
  sweeps = rates.sweeps_of(read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value),
                           _RESULTS.value)
  if law is not None:
    print("\n".join(rate_report.check(sweeps, law, _SEED_SD.value)))
    return
  found = rates.fit_rates(rate_report.optima_of(sweeps, _SEED_SD.value, _RESULTS.value),
                          _RESULTS.value)
  print("\n".join(rate_report.report(found, _SEED_SD.value)))
  if _WRITE.value is not None:
    write_json(epath.Path(_WRITE.value),
               rate_report.as_dict(found, epath.Path(_RESULTS.value).read_bytes()))
    print(f"written: {_WRITE.value}")


if __name__ == "__main__":
  cli.run(main)
