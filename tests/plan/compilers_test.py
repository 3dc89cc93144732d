"""What becomes of a compiler is its cell's row, and none outlives the command."""

import concurrent.futures
import errno
import importlib.util
import os
import pathlib
import sys
import time

import pytest

from moe_jax.config import MeshConfig
from moe_jax.grid import Cell
from moe_jax.plan import cells, compilers, topology, worker
from tests.small import small_config

V5P = topology.parse("v5p-16")
CONFIG = small_config(train={"batch_size": 32}, execution={"mesh": MeshConfig()})


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_what_a_worker_dies_of_is_one_line_and_not_kept(tmp_path):
  found = cells.plan_config("cell", CONFIG, V5P, tmp_path)
  assert found.fits is None and found.error and "\n" not in found.error
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, said, answer", [
    (-9, "", "ran out of this machine's memory"),
    (137, "", "this machine's memory"), (-6, "LLVM ERROR: out of memory", "this machine's memory"),
    (1, "tcmalloc.cc:290] Unable to allocate 4096", "this machine's memory"),
    (-6, "F1126 elf_reader.cc:309] mmap: Cannot allocate memory [12]", "this machine's memory"),
    (1, "Traceback\n  a line\nTypeError:  two\twords\n\n", "ended with 1: TypeError: two words"),
    (-11, "", "ended with -11: no error output")])
def test_a_worker_without_an_answer_is_one_line(code, said, answer):
  line = compilers.why_it_ended(code, said)
  assert answer in line and "\n" not in line


def test_what_a_worker_finds_no_memory_for_is_told_alike():
  assert worker.one_line(MemoryError()) == compilers.why_it_ended(-9, "")


@pytest.mark.parametrize("answer", ["", '{"memory": {"argum'])
def test_a_broken_answer_is_that_cells_row(tmp_path, monkeypatch, answer):
  class Workers:
    def run(self, command):
      pathlib.Path(command[-1]).write_text(answer)
      return -11, "last words"

  monkeypatch.setattr(compilers, "_workers", Workers())
  found = cells.plan_config("cell", CONFIG, V5P, tmp_path)
  assert found.fits is None and found.error == "the compiler ended with -11: last words"


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.ENOSPC])
def test_a_worker_that_cannot_be_started_is_that_cells_row(tmp_path, monkeypatch, code):
  def popen(*_, **__):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(compilers.subprocess, "Popen", popen)
  found = cells.plan_config("cell", CONFIG, V5P, tmp_path)
  assert found.fits is None
  assert found.error == f"the compiler cannot be run: {os.strerror(code)}"


def test_compilers_end_with_the_command(monkeypatch):
  """They would work on for minutes, and be asked for nothing."""
  workers = compilers._Workers()
  command = [sys.executable, "-c", "import time; time.sleep(60)"]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    waiting = [pool.submit(workers.run, command) for _ in range(2)]
    while len(workers._running) < 2:
      time.sleep(0.01)
    workers.kill()
    for future in (*waiting, pool.submit(workers.run, command)):
      with pytest.raises(concurrent.futures.CancelledError):
        future.result(timeout=10)


def test_an_interruption_kills_what_compiles(tmp_path, monkeypatch):
  workers, killed = compilers._Workers(), []
  monkeypatch.setattr(compilers, "_workers", workers)
  monkeypatch.setattr(cells, "check_libtpu", lambda _: None)

  def plan_config(name, *_):
    if name == "compiles":
      try:
        workers.run([sys.executable, "-c", "import time; time.sleep(60)"])
      except concurrent.futures.CancelledError:
        killed.append(name)
        raise
    while not workers._running:
      time.sleep(0.01)
    raise KeyboardInterrupt

  monkeypatch.setattr(cells, "plan_config", plan_config)
  both = [Cell("grid", name, name, CONFIG) for name in ("is interrupted", "compiles")]
  with pytest.raises(KeyboardInterrupt):
    cells.plan_cells(both, V5P, tmp_path, parallel=2)
  assert killed == ["compiles"]
