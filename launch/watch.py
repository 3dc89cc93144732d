"""Drives an experiment's queued resources, from any machine that sees --out.

    python -m launch.watch --out=gs://BUCKET/runs --experiment=NAME

It resumes where the last driver ended or died. GKE and SLURM need no driver.
"""

from launch import driver, submitted
from moe_jax import cli
from moe_jax.errors import FieldError

_OUT, _EXPERIMENT = submitted.define_flags()


def main(overrides: list[str]) -> int:
  del overrides
  folder = submitted.folder_of(_OUT.value, _EXPERIMENT.value)
  if "gcloud" not in submitted.submissions(folder):
    raise FieldError("experiment", _EXPERIMENT.value, "has no queued resources; GKE and "
                     "SLURM need no driver")
  return driver.drive(folder)


if __name__ == "__main__":
  cli.run(main)
