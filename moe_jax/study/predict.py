"""Writes predictions to commit before the cells are measured, and later scores them.

    python -m moe_jax.study.predict --results=runs/study/results.csv --law=paper-curved \\
        --where=tokens=99975168 --config=experiments/study/large.py --write=predictions.csv
    python -m moe_jax.study.predict --results=runs/study/results.csv --predictions=predictions.csv

A cell that the results already contain is refused. The interval is a prediction interval for one
further run: it combines the uncertainty of the law (jackknife over architectures) with the scatter
of single runs around it. Every row has the identity hash of its run and a fingerprint of the fit.
"""

from absl import flags
from etils import epath

from moe_jax import cli
from moe_jax.errors import FieldError, require
from moe_jax.files import csv_text, write_text
from moe_jax.laws.flags import define_law_flag, define_rows_flags
from moe_jax.laws.table import read_results
from moe_jax.study import foresight

_RESULTS = flags.DEFINE_multi_string("results", None, "results.csv of an experiment; may be "
                                     "repeated.", required=True)
_CONFIG = cli.define_config_flag(required=False)
_LAW = define_law_flag()
_WHERE, _WITHOUT = define_rows_flags()
_WRITE = flags.DEFINE_string("write", None, "Write the predictions to this .csv file; must not "
                             "exist yet.")
_PREDICTIONS = flags.DEFINE_string("predictions", None, "A file written by --write, to be compared "
                                   "with --results; nothing is fitted.")
_TARGET = flags.DEFINE_float("target_percent", 0.3, "Target of the median absolute error, in "
                              "percent of the loss.")


def main(overrides: list[str]) -> None:
  require((_CONFIG.value is None) != (_PREDICTIONS.value is None), "config", _CONFIG.value,
          "give either --config, whose cells are predicted, or --predictions")
  if _PREDICTIONS.value is not None:
    require(not overrides and _WRITE.value is None, "predictions", _PREDICTIONS.value,
            "cannot be combined with --write or --config.PATH=VALUE")
    predictions = foresight.read(_PREDICTIONS.value)
    rows = read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value)
    print("\n".join(foresight.compare(predictions, rows).lines(_TARGET.value)))
    return
  if _WRITE.value is not None:
    require(_WRITE.value.endswith(".csv"), "write", _WRITE.value, "must end in .csv")
    require(not epath.Path(_WRITE.value).exists(), "write", _WRITE.value,
            "exists; predictions are never overwritten")
  cells = cli.selected_cells(_CONFIG.value, overrides)
  rows = read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value)
  found = foresight.predict(cells, rows, _LAW.value, ", ".join(_RESULTS.value))
  print("\n".join(found.lines()))
  if _WRITE.value is not None:
    try:
      write_text(epath.Path(_WRITE.value), csv_text(found.rows))
    except OSError as error:
      raise FieldError("write", _WRITE.value, str(error)) from None
    print(f"written: {_WRITE.value}; commit it before these cells run")


if __name__ == "__main__":
  cli.run(main)
