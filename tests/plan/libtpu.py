"""libtpu for tests that really compile: in a folder of its own, because beside JAX it would
make every start of JAX look for a TPU.

    python -m tests.plan.libtpu      # prints what to install there
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

import pytest

from tests.experiment_files import ROOT

FOLDER = pathlib.Path(sys.prefix) / "libtpu"


def environment() -> dict[str, str]:
  """For run_module: what makes its process see libtpu; skips the test where there is none."""
  if importlib.util.find_spec("libtpu") is not None:
    return {}
  if not (FOLDER / "libtpu").is_dir():
    pytest.skip("libtpu is not installed; make test-slow installs it")
  return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER)])}


def requirement() -> str:
  """The libtpu that the installed JAX asks for, as pip takes it."""
  from packaging.requirements import Requirement
  wanted = (Requirement(text) for text in importlib.metadata.requires("jax"))
  return next(str(w).partition(";")[0].strip() for w in wanted if w.name == "libtpu")


if __name__ == "__main__":
  print(requirement())
