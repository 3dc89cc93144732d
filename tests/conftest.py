"""Eight fake CPU devices for the whole test session; set before JAX is imported."""

import os
import pathlib

import pytest

from moe_jax.cli import give_fake_devices_threads
from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import BASE, write_tiny

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is compilation, and its arrays are tiny: LLVM need not optimize.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]).strip()
# What one worker or an earlier session has compiled need not be compiled again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(
    pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
give_fake_devices_threads()


@pytest.fixture
def cell(tmp_path):
  """The tiny grid's first."""
  return select(f"{write_tiny(tmp_path)}:{BASE}")[0]


@pytest.fixture
def run_dir(tmp_path, cell):
  """Where the run of `cell` is to lie: nothing is there yet."""
  return RunDir.of(tmp_path / "runs", cell)


@pytest.fixture
def gcs(monkeypatch):
  """An object store for gs://bucket, to this process and to those that it starts."""
  # Read at the import: gcsfs would ask, by gRPC, what kind of bucket it is.
  monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  pytest.importorskip("gcsfs", reason="pip install 'moe_jax[gcs]'")
  from tests.fake_gcs import FakeGcs
  store = FakeGcs("bucket")
  for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    monkeypatch.setenv(variable, store.host)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # tensorstore's
  yield store
  store.close()
