"""Derives names that clouds accept from names that people chose, deterministically."""

import hashlib
import re

LIMIT = 63  # RFC 1035 labels, and Google Cloud's labels


def digest(*parts: str, length: int = 8) -> str:
  """Returns a short hexadecimal hash of the texts."""
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:length]


def resource_name(text: str, limit: int = LIMIT) -> str:
  """Returns `text` as an RFC 1035 label: a-z, 0-9 and '-', a letter first, no '-' last.

  A valid label is returned unchanged. One that had to be changed or truncated ends in a hash of
  the original, so that two texts never share a name.

  Args:
    text: anything.
    limit: maximum number of characters, at least 16.
  """
  name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
  if not name[:1].isalpha():
    name = f"m-{name}".rstrip("-")
  if name == text and len(name) <= limit:
    return name
  return f"{name[:limit - 9].rstrip('-')}-{digest(text)}"
