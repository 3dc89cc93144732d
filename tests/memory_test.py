"""A program starts anew once, with huge pages asked for, and keeps its arguments."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from moe_jax.memory import use_huge_pages
use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("given", [None, "glibc.malloc.perturb=0"])
def test_it_starts_anew_once_as_the_same_process(given):
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  if given is not None:
    environment["GLIBC_TUNABLES"] = given
  with subprocess.Popen([sys.executable, "-c", PROGRAM, "--steps=3", "a b"], text=True,
                        stdout=subprocess.PIPE, env=environment) as process:
    printed = process.communicate()[0]
  assert process.returncode == 0
  assert printed == f"{given or 'glibc.malloc.hugetlb=1'} {process.pid} --steps=3 a b\n"
