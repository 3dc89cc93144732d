"""Archives compact records of the study's runs and builds its tables from them.

    python -m experiments.study.keep --out=runs
    python -m experiments.study.keep --out=packed/results-1.zip

    experiments/study/results/results.csv           arm A at full length: the input of the
                                                    study's statistic
    experiments/study/results/EXPERIMENT/results.csv    every cell, even those without a result
    experiments/study/results/EXPERIMENT/CELL/      config.json, status.json, eval/, metrics/

Without --out it only rebuilds the tables. The command is idempotent, and the order of the --out
folders does not matter, except that if a run was done twice, the record kept first stays.
"""

from absl import flags

from experiments.study import plan
from moe_jax import cli
from moe_jax.study import kept

_OUT = flags.DEFINE_multi_string("out", [], "Folder of runs, or a .zip of a sitting; may be "
                                 "repeated.")
_TO = flags.DEFINE_string("to", plan.RESULTS, "Folder of the archived records.")


def main(overrides: list[str]) -> int:
  cli.no_overrides(overrides)
  grids, problems = plan.grids(), []
  for out in _OUT.value:
    written, same, refused = kept.keep(out, _TO.value, grids)
    print(f"{out}: {written} runs archived, {same} already archived")
    problems += refused
  print("\n".join(plan.write_tables(_TO.value, grids)))
  for line in problems:
    print(line)
  return 1 if problems else 0


if __name__ == "__main__":
  cli.run(main)
