"""The one exception for bad input: it names the field, the value and what is accepted.

No JAX here: every floor of the house may import it.
"""

import difflib


class FieldError(ValueError):
  """A value that a user gave and that is refused.

  Attributes:
    field: dotted path of the field, e.g. ``arch.n_topk``.
    value: what was given.
    accepted: what would have been accepted, as a phrase.
  """

  def __init__(self, field: str, value: object, accepted: str):
    super().__init__(field, value, accepted)
    self.field, self.value, self.accepted = field, value, accepted

  def __str__(self) -> str:
    return f"{self.field}={self.value!r}: {self.accepted}"

  def under(self, prefix: str) -> "FieldError":
    """The same error seen from one level up: ``n_topk`` becomes ``arch.n_topk``."""
    return type(self)(f"{prefix}.{self.field}", self.value, self.accepted)


class DamagedFile(FieldError):
  """A file of a run that cannot be read: it is that run's failure alone."""


def require(condition: bool, field: str, value: object, accepted: str) -> None:
  """Raises FieldError unless `condition` holds."""
  if not condition:
    raise FieldError(field, value, accepted)


def did_you_mean(word: str, known: list[str], cutoff: float = 0.4) -> str:
  """A phrase that offers the nearest known names: ``did you mean 'x'?`` or the list."""
  near = difflib.get_close_matches(word, known, n=2, cutoff=cutoff)
  if near:
    return "did you mean " + " or ".join(repr(name) for name in near) + "?"
  shown = ", ".join(sorted(known)[:12])
  return f"one of {shown}{', ...' if len(known) > 12 else ''} is accepted"
