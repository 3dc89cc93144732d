"""Noise of the losses: measured where possible, otherwise given by flags or assumed."""

import numpy as np
from absl import flags

from moe_jax.laws.fit import Fit
from moe_jax.laws.information import Noise, noise_of

# Of ln L, i.e. 0.2 % of the loss: the seed noise that benchmarks.law_coverage simulates.
SEED_SD = ARCHITECTURE_SD = 0.002

flags.disclaim_key_flags()  # so that each command's --help lists them as its own


def define_flags() -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Declares --seed_sd and --architecture_sd, which default to None."""
  return (
      flags.DEFINE_float("seed_sd", None, "Standard deviation of ln L between seeds; default: "
                         f"from repeated runs, else {SEED_SD}."),
      flags.DEFINE_float("architecture_sd", None, "Standard deviation of ln L of the architecture "
                         "effect that the form misses; default: from the residuals, else "
                         f"{ARCHITECTURE_SD}."))


def given(seed_sd: float | None, architecture_sd: float | None) -> Noise:
  """Returns the noise given by flags, with defaults for those not given. Raises FieldError."""
  def source(value: float | None) -> str:
    return "assumed" if value is None else "given"

  return Noise(SEED_SD if seed_sd is None else seed_sd,
               ARCHITECTURE_SD if architecture_sd is None else architecture_sd,
               source(seed_sd), source(architecture_sd))


def measured(fitted: Fit, seed_sd: float | None, architecture_sd: float | None) -> Noise:
  """Estimates the noise from a fit's repeats and residuals, unless given. Raises FieldError."""
  asked = given(seed_sd, architecture_sd)
  repeated = not np.isnan(fitted.cells.seed_noise)
  if repeated and seed_sd is None:
    source, (seed, architecture) = "from repeated runs", noise_of(fitted)
  else:
    source = asked.seed_source + (": no cell was repeated" if seed_sd is None else "")
    seed, architecture = noise_of(fitted, asked.seed)
  if architecture_sd is not None:
    return Noise(seed, asked.architecture, source, "given")
  df = len(fitted.cells) - len(fitted.parameters)
  return Noise(seed, architecture, source,
               f"from the residuals, {df} degree{'s' * (df > 1)} of freedom"
               + ("" if architecture else "; noise between seeds explains them"))
