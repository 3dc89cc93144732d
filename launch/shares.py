"""Cells dealt out to few slices: families together, work even, always the same."""

import dataclasses
import itertools
from collections.abc import Sequence

from launch.jobs import Job, predecessors
from launch.naming import digest, resource_name
from moe_jax import population
from moe_jax.arch.count import n_active
from moe_jax.errors import require

# Room for what clouds append: a node's number within a multislice, a pod's within a job.
_NAME_LIMIT = 45


@dataclasses.dataclass(frozen=True)
class Share:
  """The cells that one slice trains, one after another.

  Attributes:
    name: of the slice and of its files: an RFC 1035 label.
    jobs: in the order in which they are trained, each behind those that it goes on from.
  """

  name: str
  jobs: tuple[Job, ...]


def families(jobs: Sequence[Job]) -> list[list[Job]]:
  """Of one family are a trunk and its branches, a run and what begins with its parameters, and
  cells that train together.

  What is finished counts too: else submitting again would deal them otherwise.
  """
  elder = {job.name: job.name for job in jobs}

  def root(name: str) -> str:
    while elder[name] != name:
      elder[name] = name = elder[elder[name]]
    return name

  ties = [(name, older) for name, others in predecessors(jobs).items() for older in others]
  for group in population.deal([job.cell for job in jobs]):
    ties += [(younger.name, older.name) for older, younger in itertools.pairwise(group)]
  for younger, older in ties:
    elder[root(younger)] = root(older)
  found: dict[str, list[Job]] = {}
  for job in jobs:
    found.setdefault(root(job.name), []).append(job)
  return list(found.values())


def deal(jobs: Sequence[Job], slices: int) -> tuple[Share, ...]:
  """The shares of `slices` slices, or of fewer where there are fewer families.

  The heaviest family first, each to the slice that has least to do. The same jobs give the
  same shares and names: submitting again finds what is there.

  Args:
    jobs: as `launch.jobs.plan` orders them.
    slices: how many there may be.

  Raises:
    FieldError: fewer than one slice.
  """
  require(slices >= 1, "slices", slices, "must be at least 1")
  order = {job.name: place for place, job in enumerate(jobs)}
  work = [(sum(map(_work, family)), family) for family in families(jobs)]
  work.sort(key=lambda item: (-item[0], order[item[1][0].name]))
  loads = [0.0] * min(slices, len(work))
  dealt: list[list[Job]] = [[] for _ in loads]
  for weight, family in work:
    least = loads.index(min(loads))
    loads[least] += weight
    dealt[least] += family
  return tuple(_share(index, sorted(jobs, key=lambda job: order[job.name]))
               for index, jobs in enumerate(dealt))


def _work(job: Job) -> float:
  """In proportion to the FLOPs of a cell: active parameters times tokens."""
  config = job.cell.config
  return float(n_active(config.arch)) * config.train.steps * config.train.batch_size * (
      config.data.seq_len)


def _share(index: int, jobs: Sequence[Job]) -> Share:
  # The directories are part of the name: the same grid under another --out is another thing.
  tag = digest(*(str(job.run_dir.path) for job in jobs))
  stem = resource_name(jobs[0].cell.experiment, _NAME_LIMIT - 13)
  return Share(f"{stem}-{index}-{tag}", tuple(jobs))
