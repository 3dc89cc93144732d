"""What libtpu's compiler lets a program have of a device's memory, and what it counts, asked anew
with programs of which both are known."""

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
  x = jax.ShapeDtypeStruct((int(gib * 2**18), 1024), jnp.float32,
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


_KNOWN = """
def beside(n):
  \"\"\"n arrays as large as the argument are alive beside it.\"\"\"
  def f(x):
    a = jax.lax.optimization_barrier([x * i for i in range(n)])
    b = jax.lax.optimization_barrier([jnp.sin(v) for v in a])
    return x + 1 + sum(b)
  return f

print(json.dumps([compiled("v5litepod-8", *program) for program in (
    (jnp.sum, 15.5), (jnp.sum, 17), (beside(0), 8), (beside(0), 7), (beside(0), 15.5, 0),
    (beside(0), 17, 0), (beside(4), 3), (beside(4), 3, 0), (beside(5), 3), (beside(5), 3, 0))]))
"""


def test_what_is_needed_is_counted_alike_whether_it_fits_or_not():
  """Arguments, temporaries and outputs, donated ones once, at the moment of most."""
  gib = [{name: size / 2**30 for name, size in found.items()} for found in answer(_KNOWN)]
  near = lambda size: pytest.approx(size, abs=0.01)  # noqa: E731
  needed = [found.get("peak", found.get("hbm_needed")) for found in gib]
  assert needed == [near(size) for size in (15.5, 17, 16, 14, 15.5, 17, 15, 15, 18, 18)]
  assert ["peak" in found for found in gib] == [size < 15.75 for size in needed]
  assert gib[7]["arguments"] + gib[7]["temporaries"] == near(15)
