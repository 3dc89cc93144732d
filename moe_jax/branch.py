"""Branches: several token budgets from one `wsd` run, the trunk. No JAX.

While the learning rate is stable, a run does not depend on its length. So runs of several
lengths share their first steps: a trunk takes them once, and each branch starts from the trunk's
checkpoint at the step where its own decay begins (arXiv 2404.06395, 2405.18392).
`grid.trunk_and_branches` creates such cells.
"""

from moe_jax.config import RunConfig, identity_difference
from moe_jax.errors import require

# Fields in which a branch may differ: they have no effect before the end of the stable phase.
_OWN = ("train.steps", "train.decay_fraction", "train.final_learning_rate_fraction",
        "train.branch_from")


def require_trunk(branch: RunConfig, trunk: RunConfig) -> None:
  """Checks that the first steps of `branch` are those of `trunk`.

  Raises:
    FieldError: names the fields that differ, or the phase in which the step lies.
  """
  def check(condition: bool, why: str) -> None:
    require(condition, "train.branch_from", branch.train.branch_from, why)

  step, train = branch.train.branch_step, trunk.train
  check(train.schedule == "wsd", f"the trunk's schedule is {train.schedule!r}, which has no "
        "stable phase to branch from; 'wsd' has")
  differing = [phrase for phrase in identity_difference(branch, trunk)
               if phrase.partition(" ")[0] not in _OWN]
  check(not differing, "the trunk differs in more than its steps and its decay: "
        + "; ".join(differing))
  check(step <= train.stable_steps, f"step {step} lies behind the trunk's stable phase, which "
        f"ends at step {train.stable_steps} of {train.steps}")
  check(step > (train.branch_step or 0), "the trunk is itself a branch and begins at step "
        f"{train.branch_step}")
