"""Ends what an experiment has on other machines; runs keep their checkpoints.

    python -m launch.cancel --out=gs://BUCKET/runs --experiment=NAME

The same `launch.submit` goes on later. Cells on this machine end by Ctrl-C of their launcher.
"""

from absl import flags
from etils import epath

from launch import driver, lease, remote, slices, submitted
from moe_jax import cli

_OUT, _EXPERIMENT = submitted.define_flags()
_CONTEXT = flags.DEFINE_string("kube_context", None, "Context of kubectl.")


def main(overrides: list[str]) -> int:
  del overrides
  folder = submitted.folder_of(_OUT.value, _EXPERIMENT.value)
  found = submitted.submissions(folder)
  codes = [_other(one, backend) for backend in ("gke", "slurm") for one in found.get(backend, [])]
  if "gcloud" in found:
    codes.append(_queued_resources(folder))
  return max(codes)


def _other(one: epath.Path, backend: str) -> int:
  command = (submitted.kubectl_for(one, _CONTEXT.value, "delete", "jobset", one.name,
                               "--ignore-not-found") if backend == "gke" else
             ("scancel", "--me", f"--name={one.name}"))
  answer = remote.run(command)
  print(f"{one.name}: {'cancelled' if answer.ok else answer.error}")
  return 0 if answer.ok else 1


def _queued_resources(folder: epath.Path) -> int:
  """Says what is wanted; a driver, this one if no other is at work, does it."""
  for one in driver.read_all(folder):
    if one.record.state not in slices.FINAL:
      (one.folder / "cancel").write_text("")
  try:
    lease.acquire(folder).release()
  except lease.Held as held:
    print(f"{held}; it ends the slices")
    return 0
  driver.drive(folder)
  left = [one.record.name for one in driver.read_all(folder)
          if one.record.state not in slices.FINAL]
  return 1 if left else 0


if __name__ == "__main__":
  cli.run(main)
