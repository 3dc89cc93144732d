"""Registry of the published laws, with one interface: LAWS[name].predict(architecture, tokens)."""

from moe_jax.errors import FieldError, did_you_mean
from moe_jax.laws.law import Law
from moe_jax.laws.registry.abnar import ABNAR
from moe_jax.laws.registry.chinchilla import BESIROGLU, CHINCHILLA
from moe_jax.laws.registry.clark import CLARK
from moe_jax.laws.registry.flame_moe import FLAME_MOE
from moe_jax.laws.registry.joint_moe import JOINT_MOE
from moe_jax.laws.registry.krajewski import KRAJEWSKI, KRAJEWSKI_DENSE
from moe_jax.laws.registry.ling import LING
from moe_jax.laws.registry.zhao import ZHAO

LAWS: dict[str, Law] = {
    law.name: law
    for law in (KRAJEWSKI, KRAJEWSKI_DENSE, JOINT_MOE, ZHAO, LING, FLAME_MOE, CLARK, ABNAR,
                CHINCHILLA, BESIROGLU)
}


def get_law(name: str) -> Law:
  """Returns the published law of that name. Raises FieldError for an unknown one."""
  if name not in LAWS:
    raise FieldError("law", name, did_you_mean(name, list(LAWS)))
  return LAWS[name]
