"""The floors of the house that answer at once: they load no JAX and nothing else slow."""

import pathlib

from tests.experiment_files import ROOT, run_module

_SLOW = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow",
         "tensorflow_datasets", "scipy.optimize", "matplotlib", "tokenizers")
_LIGHT = ("moe_jax.arch", "moe_jax.config", "moe_jax.grid", "moe_jax.run_dir", "moe_jax.cli",
          "moe_jax.text", "moe_jax.evaluate.cells", "moe_jax.evaluate.results", "moe_jax.laws",
          "moe_jax.laws.__main__", "moe_jax.laws.registry", "moe_jax.design.__main__",
          "moe_jax.study.power", "moe_jax.study.next", "moe_jax.study.proposal",
          "moe_jax.study.learning_rate", "moe_jax.study.predict", "moe_jax.study.trial",
          "experiments.study.keep", "experiments.study.sitting",
          "moe_jax.design.plot", "launch.submit", "launch.status", "launch.backends.local",
          "launch.backends.gcloud", "launch.backends.gke", "launch.backends.slurm",
          "launch.host.__main__", "launch.watch", "launch.cancel", "launch.collect", "launch.gc",
          "launch.logs", "launch.together", "moe_jax.cluster", "moe_jax.train.__main__",
          "moe_jax.export.__main__", "moe_jax.export.layouts", "moe_jax.evaluate.harness.suite")


def _loaded(statement: str) -> set[str]:
  done = run_module("-c", f"import sys; {statement}; print('\\n'.join(sys.modules))")
  assert done.returncode == 0, done.stderr
  return set(done.stdout.split()) & set(_SLOW)


def test_light_modules_load_nothing_slow():
  """One after the other in one process: the first to load something is blamed for it."""
  done = run_module("-c", f"""
import importlib, sys
from absl import flags
for name in {_LIGHT}:
  importlib.import_module(name)
  flags.FLAGS.remove_flag_values(list(flags.FLAGS))  # two commands may have one of the same name
  slow = [found for found in {_SLOW} if found in sys.modules]
  assert not slow, f"{{name}} loads {{slow}}"
""")
  assert done.returncode == 0, done.stderr


def test_the_experiments_load_nothing_slow():
  files = [str(file) for file in pathlib.Path(ROOT, "experiments").glob("*.py")]
  assert _loaded("from moe_jax.grid import load_grid; "
                 f"[load_grid(f) for f in {files} if '__init__' not in f]") == set()


def test_what_is_looked_for_would_be_found():
  assert "jax" in _loaded("import jax")


def test_fits_run_on_one_thread_unless_the_user_says_otherwise():
  """NumPy reads it as it is imported, so it must be set before."""
  say = "import moe_jax; assert 'numpy' not in sys.modules; print(os.environ[name])"
  name = "import os, sys; name = 'OPENBLAS_NUM_THREADS'; "
  assert run_module("-c", f"{name} os.environ.pop(name, None); {say}").stdout == "1\n"
  assert run_module("-c", name + say, OPENBLAS_NUM_THREADS="3").stdout == "3\n"
