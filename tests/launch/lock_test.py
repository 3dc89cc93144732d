"""The lock from which machines install has all that the project asks for, by hash."""

import re
from unittest import mock

import packaging.requirements
import setuptools

from tests.experiment_files import ROOT

_LOCK = (ROOT / "launch" / "requirements-tpu.txt").read_text()


def _wanted():
  with mock.patch.object(setuptools, "setup") as setup:
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {})
  told = setup.call_args.kwargs
  extras = told["extras_require"]
  return map(packaging.requirements.Requirement, [
      *told["install_requires"], *extras["tpu"], *extras["gcs"]])


def test_it_has_what_the_project_and_tpus_and_buckets_need():
  pins = dict(re.findall(r"^([a-z0-9._-]+)==([^ ;\\]+)", _LOCK, re.MULTILINE))
  for requirement in _wanted():
    pinned = pins.get(re.sub("[_.-]+", "-", requirement.name.lower()))
    assert pinned is not None, f"{requirement} is not in the lock"
    assert requirement.specifier.contains(pinned), f"{requirement}, but {pinned} in the lock"
  assert {"gcsfs", "libtpu", "aiohttp"} <= pins.keys()
  assert len(pins) == len(re.findall("^[a-z]", _LOCK, re.MULTILINE))
  for entry in re.split(r"^(?=[a-z])", _LOCK, flags=re.MULTILINE)[1:]:
    assert "--hash=sha256:" in entry, entry
