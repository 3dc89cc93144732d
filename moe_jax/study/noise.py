"""The noise that losses scatter by: measured where it can be, given or assumed elsewhere."""

import numpy as np

from moe_jax.laws.fit import Fit
from moe_jax.laws.information import Noise, noise_of

# Of ln L: 0.2 % of the loss is what benchmarks.law_coverage plants between seeds.
SEED_SD = ARCHITECTURE_SD = 0.002


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
