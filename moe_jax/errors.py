"""FieldError, the exception for invalid input: names the field, the value and what is accepted.

No JAX, so that every module may import it.
"""

import difflib


class FieldError(ValueError):
  """A value given by the user is invalid.

  Attributes:
    field: dotted path of the field, e.g. ``arch.n_topk``.
    value: the given value.
    accepted: what would be accepted, as a phrase.
  """

  def __init__(self, field: str, value: object, accepted: str):
    super().__init__(field, value, accepted)
    self.field, self.value, self.accepted = field, value, accepted

  def __str__(self) -> str:
    return f"{self.field}={self.value!r}: {self.accepted}"

  def under(self, prefix: str) -> "FieldError":
    """The same error with a prefixed field: ``n_topk`` becomes ``arch.n_topk``."""
    return type(self)(f"{prefix}.{self.field}", self.value, self.accepted)


class DamagedFile(FieldError):
  """A file of a run is damaged, which affects only that run."""


def require(condition: bool, field: str, value: object, accepted: str) -> None:
  """Raises FieldError unless `condition` holds."""
  if not condition:
    raise FieldError(field, value, accepted)


def did_you_mean(word: str, known: list[str], cutoff: float = 0.4) -> str:
  """A phrase that suggests the closest known names: ``did you mean 'x'?``, or lists them."""
  near = difflib.get_close_matches(word, known, n=2, cutoff=cutoff)
  if near:
    return "did you mean " + " or ".join(repr(name) for name in near) + "?"
  shown = ", ".join(sorted(known)[:12])
  return f"one of {shown}{', ...' if len(known) > 12 else ''} is accepted"
