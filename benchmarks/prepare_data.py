"""Measures speed and memory of data preparation, and checks that it survives being killed.

    python -m benchmarks.prepare_data --gigabytes=1
    python -m benchmarks.prepare_data --gigabytes=1 --kills=10

Generates JSON lines of random words with Zipf's distribution, each document starting with its
number, adds them as a corpus, and tokenizes it. Memory is the resident memory of the command and
its child processes, sampled ten times a second; shared pages count for each process. With --kills
the command is killed by SIGKILL at random moments and restarted until it is done. At the end every
number should be in the tokens exactly once, else it exits with 1. Prints the figures as JSON.
"""

import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import psutil
from absl import flags

from moe_jax import cli
from moe_jax.config import DataConfig
from moe_jax.data.pool import default_processes
from moe_jax.data.prepare import SPLITS, PreparedData, prepare
from moe_jax.errors import require

_GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Size of the text, in 1e9 bytes.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "bpe-4096", "As for python -m moe_jax.data.")
_PROCESSES = flags.DEFINE_integer("processes", default_processes(), "Processes.", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 0, "Number of kills.", lower_bound=0)
_FOLDER = flags.DEFINE_string("folder", None, "A new folder to work in, which is kept. By "
                              "default a temporary one.")

_WORDS = 50_000
_DOCUMENT_WORDS = 300
_BATCH_DOCUMENTS = 500


def write_text(file: pathlib.Path, n_bytes: int) -> int:
  """Writes JSON lines with at least `n_bytes` bytes of text; returns the number of documents."""
  rng = np.random.default_rng(0)
  letters = np.array(list("etaoinshrdlucmfwyp"))
  words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(1, 12, _WORDS)])
  shares = 1 / np.arange(1, _WORDS + 1)
  bounds = np.cumsum(shares / shares.sum())
  written = number = 0
  with file.open("w") as opened:
    while written < n_bytes:
      drawn = words[np.searchsorted(bounds, rng.random((_BATCH_DOCUMENTS, _DOCUMENT_WORDS)))]
      for row in drawn:
        text = f"{number} " + " ".join(row)
        opened.write(json.dumps({"text": text}) + "\n")
        number, written = number + 1, written + len(text)
  return number


def run(arguments: list[str], kill_after: float | None = None) -> dict[str, Any]:
  """Runs python -m moe_jax.data; returns peak memory, if it was killed and, if not, seconds."""
  began, peak = time.perf_counter(), 0
  with tempfile.TemporaryFile("w+") as said:
    process = psutil.Popen([sys.executable, "-m", "moe_jax.data", *arguments],
                           stdout=subprocess.DEVNULL, stderr=said)
    while process.poll() is None:
      peak = max(peak, _memory(process))
      if kill_after is not None and time.perf_counter() - began > kill_after:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return {"killed": True, "peak": peak}
      time.sleep(0.1)
    if process.returncode:
      said.seek(0)
      sys.exit((said.read().splitlines() or ["no error output"])[-1])
  return {"killed": False, "seconds": time.perf_counter() - began, "peak": peak}


def _memory(process: psutil.Popen) -> int:
  total = 0
  for found in (process, *_children(process)):
    try:
      total += found.memory_info().rss
    except psutil.NoSuchProcess:
      continue
  return total


def _children(process: psutil.Popen) -> list[psutil.Process]:
  try:
    return process.children(recursive=True)
  except psutil.NoSuchProcess:
    return []


def run_killed(arguments: list[str], kills: int, seconds: float) -> list[float]:
  """Kills the command `kills` times; returns the random moments, in seconds after each start."""
  draw, moments = random.Random(0), []
  while len(moments) < kills:
    moments.append(round(draw.uniform(0.05, 1) * seconds, 1))
    if not run(arguments, kill_after=moments[-1])["killed"]:
      return moments[:-1]  # it finished before the kill
  return moments


def lost_and_doubled(prepared: PreparedData, n_documents: int) -> tuple[int, int]:
  """Counts the documents 0 to n - 1 that are in no split, and those that occur more than once."""
  seen = np.zeros(n_documents, np.int64)
  for name in SPLITS:
    split = prepared.splits[name]
    for start, stop in zip(split.starts_D1[:-1], split.starts_D1[1:], strict=True):
      head = prepared.tokenizer.decode(split.tokens_N[start:min(stop, start + 24)])
      seen[int(head.partition(" ")[0])] += 1
  return int((seen == 0).sum()), int((seen > 1).sum())


def measure(folder: pathlib.Path) -> dict[str, Any]:
  text, data_dir = folder / "text.jsonl", folder / "data"
  n_documents = write_text(text, int(_GIGABYTES.value * 1e9))
  common = [f"--data_dir={data_dir}", f"--processes={_PROCESSES.value}"]
  steps = {"add": [*common, "--add=bench", f"--from={text}"],
           "tokenize": [*common, "--corpus=bench", f"--tokenizer={_TOKENIZER.value}"]}
  n_bytes, found = text.stat().st_size, {}
  for name, arguments in steps.items():
    kills = run_killed(arguments, (_KILLS.value + 1) // 2, 30 * _GIGABYTES.value)
    measured = run(arguments)
    found[name] = {"seconds": round(measured["seconds"], 1),
                   "peak_memory_mb": round(measured["peak"] / 1e6)}
    if _KILLS.value:
      found[name] |= {"killed_after_s": kills}  # `seconds` then covers only the last attempt
    else:
      found[name] |= {"mb_per_s": round(n_bytes / 1e6 / measured["seconds"], 2)}
  prepared = prepare(DataConfig("bench", _TOKENIZER.value), data_dir)
  n_tokens = sum(split.n_tokens for split in prepared.splits.values())
  if not _KILLS.value:
    found["tokenize"]["tokens_per_s"] = round(n_tokens / found["tokenize"]["seconds"])
  lost, doubled = lost_and_doubled(prepared, n_documents)
  return {"documents": n_documents, "lost": lost, "doubled": doubled,
          "megabytes": round(n_bytes / 1e6), "tokens": n_tokens,
          "fingerprint": prepared.fingerprint, **found,
          "processes": _PROCESSES.value, "cores": os.cpu_count(),
          "load_average": round(os.getloadavg()[0], 1), "machine": platform.machine()}


def main(overrides: list[str]) -> int:
  cli.no_overrides(overrides)
  require(_GIGABYTES.value > 0, "gigabytes", _GIGABYTES.value, "must be above 0")
  if _FOLDER.value is None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="prepare_data-"))
  else:
    folder = pathlib.Path(_FOLDER.value)
    require(not folder.exists(), "folder", _FOLDER.value, "exists; name a new folder")
    folder.mkdir(parents=True)
  try:
    measured = measure(folder)
    print(json.dumps(measured, indent=2))
    return 1 if measured["lost"] or measured["doubled"] else 0
  finally:
    if _FOLDER.value is None:
      shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
  cli.run(main)
