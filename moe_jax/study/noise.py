"""The noise that losses scatter by: measured where it can be, given or assumed elsewhere."""

import numpy as np
from absl import flags

from moe_jax.laws.fit import Fit
from moe_jax.laws.information import Noise, noise_of

# Of ln L: 0.2 % of the loss is what benchmarks.law_coverage plants between seeds.
SEED_SD = ARCHITECTURE_SD = 0.002

flags.disclaim_key_flags()  # they are the commands', whose --help lists them


def define_flags() -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Declares --seed_sd and --architecture_sd, None where they are not given."""
  return (
      flags.DEFINE_float("seed_sd", None, "Standard deviation of ln L between seeds; default: "
                         f"from repeated runs, else {SEED_SD}."),
      flags.DEFINE_float("architecture_sd", None, "The same of what the form does not know of an "
                         f"architecture; default: from the residuals, else {ARCHITECTURE_SD}."))


def given(seed_sd: float | None, architecture_sd: float | None) -> Noise:
  """What flags say, or what is assumed without them. Raises FieldError."""
  def source(value: float | None) -> str:
    return "assumed" if value is None else "given"

  return Noise(SEED_SD if seed_sd is None else seed_sd,
               ARCHITECTURE_SD if architecture_sd is None else architecture_sd,
               source(seed_sd), source(architecture_sd))


def measured(fitted: Fit, seed_sd: float | None, architecture_sd: float | None) -> Noise:
  """What the fit's repeats and residuals say; what is given goes first. Raises FieldError."""
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
               + ("" if architecture else "; they are no more than seeds explain"))
