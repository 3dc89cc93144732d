"""The native path of dropless expert parallelism, through XLA's compiler for TPU.

It has never run: there is no TPU here. What can be shown is that it compiles, forward and
gradient, and to what.
"""

import json
import math
import re

import pytest

from tests.experiment_files import run_module
from tests.plan import libtpu

_PROGRAM = '''
import json, sys
from moe_jax.plan import topology, worker
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from moe_jax.mesh import BATCH_AXES, MESH_AXES, param_spec
from moe_jax.moe.expert_parallel import sharded_moe_layer
from moe_jax.moe.experts import EXPERT_AXES, Experts
from moe_jax.moe.layer import Semantics

E, D, F, K, S = 16, 256, 128, 4, 256
devices = worker.tpu_devices(topology.parse("v5litepod-8"))
mesh = Mesh(np.array(devices).reshape(1, 2, 4), MESH_AXES)
semantics = Semantics(K, True, S, 0, "dropless")

def array(shape, dtype, spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

experts = Experts(*(array(shape, jnp.float32, param_spec(axes)) for shape, axes in zip(
    Experts((E, D, F), (E, D, F), (E, F, D)), EXPERT_AXES)))
rest = array((D, E), jnp.float32, P()), experts

def loss(*inputs):
  return (sharded_moe_layer(*inputs, semantics, mesh)[0].astype(jnp.float32) ** 2).sum()

gradient, result, *dtypes = jax.jit(jax.grad(loss, argnums=(0, 1, 2))), *sys.argv[1:]
json.dump({dtype: gradient.lower(array((8, S, D), jnp.dtype(dtype), P(BATCH_AXES)), *rest)
           .compile().as_text() for dtype in dtypes}, open(result, "w"))
'''
DTYPES = ("bfloat16", "float32")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  """What the compiler made of it, by type: one process for all, most of whose time is its start."""
  folder = tmp_path_factory.mktemp("compiled")
  program, result = folder / "compile.py", folder / "hlo.json"
  program.write_text("from moe_jax.plan.worker import ENVIRONMENT\n"
                     "import os\nos.environ.update(ENVIRONMENT)\n" + _PROGRAM)
  done = run_module(str(program), str(result), *DTYPES, timeout=500, **libtpu.environment())
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(result.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient_compile_to_exchanges_and_kernels(dtype, compiled):
  hlo = compiled[dtype]
  # Rows travel there and back, and so does their gradient; their weights go there, and the
  # gradient of those comes back, each number as long as 128.
  moved = re.findall(r"= \w+\[([\d,]+)\]\S* ragged-all-to-all\(", hlo)
  widths = sorted(math.prod(map(int, dims.split(",")[1:])) for dims in moved)
  assert widths == [128, 128, 256, 256, 256, 256], moved
  # Forward, and for the gradient of the rows: gate and up in one, down. Some XLA computes
  # again in the backward pass.
  assert len(re.findall(r"%ragged-dot-none[.\d]* = ", hlo)) >= 4
  # The gradients of the two weights go over blocks of 512 rows.
  assert len(re.findall(r"rd,rf->df/dot_general", hlo)) >= 2
  # No array has a row for each of 4 local experts and each of the 4096 that may arrive.
  arrived = 4 * 256 * 4 + 512
  assert f"[{arrived},256]" in hlo and f"[4,{arrived}," not in hlo
