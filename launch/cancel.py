"""Cancels what an experiment has on other machines; runs keep their checkpoints.

    python -m launch.cancel --out=gs://BUCKET/runs --experiment=NAME

The same `launch.submit` resumes it later. To stop cells on this machine, press Ctrl-C in their
launcher.
"""

from absl import flags
from etils import epath

from launch import driver, remote, submitted
from moe_jax import cli

_OUT, _EXPERIMENT = submitted.define_flags()
_CONTEXT = flags.DEFINE_string("kube_context", None, "kubectl context; by default the current one.")


def main(overrides: list[str]) -> int:
  del overrides
  folder = submitted.folder_of(_OUT.value, _EXPERIMENT.value)
  found = submitted.submissions(folder)
  codes = [_other(one, backend) for backend in ("gke", "slurm") for one in found.get(backend, [])]
  if "gcloud" in found:
    codes.append(0 if driver.end_all(folder) else 1)
  return max(codes)


def _other(one: epath.Path, backend: str) -> int:
  command = (submitted.kubectl_for(one, _CONTEXT.value, "delete", "jobset", one.name,
                               "--ignore-not-found") if backend == "gke" else
             ("scancel", "--me", f"--name={one.name}"))
  answer = remote.run(command)
  print(f"{one.name}: {'cancelled' if answer.ok else answer.error}")
  return 0 if answer.ok else 1


if __name__ == "__main__":
  cli.run(main)
