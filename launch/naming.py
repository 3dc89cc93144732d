"""Names that clouds accept, made of names that people chose: always the same from the same."""

import hashlib
import re

LIMIT = 63  # RFC 1035 labels, and Google Cloud's labels


def digest(*parts: str, length: int = 8) -> str:
  """Hexadecimal digits that tell these texts from others."""
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:length]


def resource_name(text: str, limit: int = LIMIT) -> str:
  """`text` as an RFC 1035 label: lower case, digits and '-', a letter first, none of '-' last.

  A text that is one already stays as it is. One that had to be changed or cut ends in a hash
  of the original, so that two texts never share a name.

  Args:
    text: anything.
    limit: the most characters, at least 16.
  """
  name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
  if not name[:1].isalpha():
    name = f"m-{name}".rstrip("-")
  if name == text and len(name) <= limit:
    return name
  return f"{name[:limit - 9].rstrip('-')}-{digest(text)}"
