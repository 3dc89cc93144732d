"""What libtpu's compiler lets a program have of a device's memory, asked anew."""

import json

import pytest

from moe_jax.arch.hardware import HARDWARE
from tests.experiment_files import run_module
from tests.plan import libtpu

pytestmark = pytest.mark.slow

_BEGIN = """
import json, os
from moe_jax.plan import topology, worker
os.environ.update(worker.ENVIRONMENT)
import jax, jax.numpy as jnp

def compiled(name, f, gib, donate=()):
  device = worker.tpu_devices(topology.parse(name))[0]
  x = jax.ShapeDtypeStruct((int(gib * 2**15), 8192), jnp.float32,
                           sharding=jax.sharding.SingleDeviceSharding(device))
  try:
    program = jax.jit(f, donate_argnums=donate).lower(x).compile()
  except jax.errors.JaxRuntimeError as error:
    return worker._memory_asked(str(error))
  return worker._memory(program.memory_analysis())
"""


def answer(code: str) -> dict:
  done = run_module("-c", _BEGIN + code, timeout=300, **libtpu.environment())
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_each_kind_of_chip_says_what_a_program_can_have():
  names = {"v4": "v4-8", "v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8",
           "tpu7x": "tpu7x-8"}
  said = answer(f"""
print(json.dumps({{kind: compiled(name, lambda x: x + 1, 200)["hbm_there"]
                  for kind, name in {names}.items()}}))""")
  assert said == {kind: HARDWARE[kind].program_hbm_bytes for kind in names}
