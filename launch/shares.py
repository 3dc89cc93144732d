"""Distributes cells over slices: keeps families together and balances work, deterministically."""

import dataclasses
import itertools
from collections.abc import Sequence

from launch.jobs import Job, predecessors
from launch.naming import digest, resource_name
from moe_jax import population
from moe_jax.arch.count import n_active
from moe_jax.errors import require

# Leaves room for what clouds append: a node's index in a multislice, a pod's in a job.
_NAME_LIMIT = 45


@dataclasses.dataclass(frozen=True)
class Share:
  """The cells that one slice trains, one after another.

  Attributes:
    name: name of the slice and of its folder: an RFC 1035 label.
    jobs: its jobs in the order in which they are trained, each after its predecessors.
  """

  name: str
  jobs: tuple[Job, ...]


def families(jobs: Sequence[Job]) -> list[list[Job]]:
  """Groups jobs into families: a trunk and its branches, a run and those that start from its
  parameters, and cells that train together.

  Finished jobs count too, or else submitting again would distribute the jobs differently.
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
  """Distributes jobs over `slices` shares, or fewer if there are fewer families.

  Greedy: heaviest family first, each to the slice with the least work. The same jobs give the
  same shares and names, so that submitting again finds the existing slices.

  Args:
    jobs: as `launch.jobs.plan` orders them.
    slices: maximum number of shares.

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
  """Returns a number proportional to a cell's FLOPs: active parameters times tokens."""
  config = job.cell.config
  return float(n_active(config.arch)) * config.train.steps * config.train.batch_size * (
      config.data.seq_len)


def _share(index: int, jobs: Sequence[Job]) -> Share:
  # Run directories are part of the name: the same grid under another --out needs another one.
  tag = digest(*(str(job.run_dir.path) for job in jobs))
  stem = resource_name(jobs[0].cell.experiment, _NAME_LIMIT - 13)
  return Share(f"{stem}-{index}-{tag}", tuple(jobs))
