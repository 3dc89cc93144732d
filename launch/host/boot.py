"""Entry point of the container image: fetches a submission's code, verifies it, and runs it.

    python boot.py --code=URI --sha256=HASH -- -m launch.host --work=URI

No other module of the project is in the image, so this one imports none.
"""

import hashlib
import io
import os
import sys
import tarfile
import tempfile

from etils import epath


def main() -> None:
  ours, theirs = sys.argv[1:3], sys.argv[4:]
  if len(ours) != 2 or sys.argv[3:4] != ["--"]:
    sys.exit("error: usage: boot.py --code=URI --sha256=HASH -- ARGUMENTS")
  code, sha256 = (argument.partition("=")[2] for argument in ours)
  archive = epath.Path(code).read_bytes()
  found = hashlib.sha256(archive).hexdigest()
  if found != sha256:
    sys.exit(f"error: {code} has the hash {found}, not {sha256}: it was changed or truncated")
  folder = tempfile.mkdtemp(prefix="moe_jax-")
  with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
    tar.extractall(folder, filter="data")
  os.chdir(folder)
  os.execv(sys.executable, [sys.executable, *theirs])


if __name__ == "__main__":
  main()
