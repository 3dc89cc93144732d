"""Garbage-collects orphans: queued resources that no experiment under --out accounts for.

    python -m launch.gc --project=P --zones=us-east5-b --out=gs://BUCKET/runs

Lists them, and deletes them after confirmation (`--yes` skips the question). Only resources with
the project's label are considered. It asks because an experiment under another --out, such as a
colleague's, may account for them.
"""

from absl import flags
from etils import epath

from launch import cloud, remote, submitted
from launch.backends.gcloud import Options
from moe_jax import cli
from moe_jax.errors import FieldError
from moe_jax.files import absolute

_OUT = flags.DEFINE_string("out", "runs", "Root of the run directories.")
_PROJECT = flags.DEFINE_string("project", None, "Google Cloud project.", required=True)
_ZONES = flags.DEFINE_list("zones", None, "Zones to search.", required=True)
_YES = flags.DEFINE_bool("yes", False, "Delete without confirmation.")


def main(overrides: list[str]) -> int:
  del overrides
  options = Options(_PROJECT.value, tuple(_ZONES.value), "v6e-8")
  out = epath.Path(absolute(_OUT.value))
  try:
    found = submitted.orphans(options, out, remote.run)
    if not found:
      print("no orphans found")
      return 0
    for name, zone, label in found:
      print(f"{name} in {zone}, labelled {label}")
    if not _YES.value and _asked(f"delete these {len(found)}? [y/N] ") != "y":
      print("nothing was deleted")
      return 1
    refused = [f"{name} in {zone}: {error}" for name, zone, _ in found
               if (error := cloud.delete(name, options, zone, remote.run)) is not None]
  except (cloud.Unclear, cloud.NoCredentials) as error:
    raise FieldError("project", _PROJECT.value, str(error)) from None
  print("\n".join([*refused, f"requested {len(found) - len(refused)} deletions"]))
  return 1 if refused else 0


def _asked(question: str) -> str:
  try:
    return input(question).strip().lower()
  except EOFError:  # nobody is there to answer
    return ""


if __name__ == "__main__":
  cli.run(main)
