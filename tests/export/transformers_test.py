"""Against transformers itself, 5 and 4.57: exported models there, models made there here.

It runs in an environment of its own, which `make test-slow` makes: torch is large, and two versions
of transformers cannot be installed side by side.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.config import ExecutionConfig
from moe_jax.data.loader import EvalRows
from moe_jax.data.prepare import prepare
from moe_jax.evaluate import heldout
from moe_jax.export import from_hf
from moe_jax.export.layouts import LAYOUTS, config_json
from moe_jax.export.to_hf import export
from moe_jax.fields import override
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.run_dir import RunDir
from moe_jax.train import loop
from tests.export.conftest import ARCHS, config_of
from tests.export.forward import outputs
from tests.small import random_params

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(os.environ.get("TRANSFORMERS_VENV", f"{sys.prefix}/transformers"))
VERSIONS = {"5": "", "4.57": str(FOLDER / "4.57")}  # what is put before its site-packages
TEXT = "Naïve\n\tdef f(x): return 漢字 🙂  \x7f"
TOKENS_BS = np.random.default_rng(0).integers(0, 256, (4, 16))


def run_jobs(version, jobs, folder):
  """Runs hf_side.py; skips the test where its environment is not there."""
  if not (FOLDER / "bin" / "python").exists():
    pytest.skip("transformers is not installed; make test-slow installs it")
  (folder / "jobs.json").write_text(json.dumps(jobs))
  path = os.pathsep.join(filter(None, [VERSIONS[version]]))
  done = subprocess.run(
      [FOLDER / "bin" / "python", pathlib.Path(__file__).with_name("hf_side.py"),
       folder / "jobs.json"], capture_output=True, text=True, timeout=500,
      env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
  assert done.returncode == 0, done.stderr[-3000:]
  for job in jobs:
    if "result" in job:
      with np.load(job["result"]) as found:
        assert str(found["version"]).startswith(version + ".")


def trained_cell():
  config = override(config_of("qwen3_moe"), {
      "train.steps": 30, "train.batch_size": 8, "train.learning_rate": 1e-2,
      "moe.dispatch": "capacity", "train.warmup_steps": 2, "execution.mesh.data": -1})
  return Cell("trained", "", "cell", config)


@pytest.fixture(scope="module")
def trained(exported, out_with_data):
  """The folder of a trained and exported cell, and its held-out loss."""
  cell = trained_cell()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "use_compilation_cache", lambda out: None)  # keep that of the tests
    assert loop.train(cell, out_with_data) == 0
  prepared = prepare(cell.config.data, out_with_data / "_data")
  found = heldout.evaluate(cell, RunDir.of(out_with_data, cell), prepared)
  export(cell, out_with_data, exported / "trained")
  return exported / "trained", found.result["loss"], documents(cell.config, prepared)


def documents(config, prepared):
  """Every piece of a document that stands in a row, and its last target; -1 fills it up."""
  rows, pieces = EvalRows(prepared.splits["heldout"], config.data.seq_len), []
  for batch in rows.batches(8, 0):
    for inputs, targets, segments, mask in zip(*(batch[f"{name}_BS"] for name in (
        "inputs", "targets", "segments", "mask")), strict=True):
      for segment in np.unique(segments[mask]):
        here = np.flatnonzero((segments == segment) & mask)
        piece = np.full(config.data.seq_len + 1, -1)
        piece[:len(here) + 1] = [*inputs[here], targets[here[-1]]]
        assert (piece[1:len(here) + 1] == targets[here]).all()
        pieces.append(piece)
  return np.stack(pieces), rows.n_targets


@pytest.fixture(scope="module", params=VERSIONS)
def answers(request, exported, trained, tmp_path_factory):
  """What one version of transformers says of all that it is asked."""
  folder = tmp_path_factory.mktemp(f"transformers-{request.param}")
  np.save(folder / "tokens.npy", TOKENS_BS)
  np.save(folder / "documents.npy", trained[2][0])
  jobs = []
  for layout in ARCHS:
    config = config_json(config_of(layout), LAYOUTS[layout], "float32", 256)
    common = {"do": "run", "tokens": str(folder / "tokens.npy")}
    jobs += [{**common, "dir": str(exported / layout), "text": TEXT,
              "result": str(folder / f"exported-{layout}.npz")},
             {"do": "make", "config": config, "seed": 1, "shard": "20KB",
              "dir": str(folder / layout)},
             {**common, "dir": str(folder / layout),
              "result": str(folder / f"made-{layout}.npz")}]
  jobs.append({"do": "run", "dir": str(trained[0]), "documents": str(folder / "documents.npy"),
               "result": str(folder / "trained.npz")})
  run_jobs(request.param, jobs, folder)
  return folder


def compare(config, params, answer):
  """Logits, the experts of every token, and the balance loss."""
  ours, balance, assigned_LE = outputs(config, params, TOKENS_BS)
  theirs = np.load(answer)
  print(f"{answer.parent.name} {answer.stem}: logits differ by "
        f"{np.abs(ours - theirs['logits']).max():.1e}, the balance loss by "
        f"{abs(balance - theirs['balance']):.1e}")
  np.testing.assert_allclose(ours, theirs["logits"], atol=1e-5, rtol=0)
  chosen_LTE = chosen_experts(config, params)
  np.testing.assert_array_equal(chosen_LTE, theirs["experts"])
  np.testing.assert_allclose(balance, theirs["balance"], rtol=1e-5)
  assert assigned_LE.sum(-1).tolist() == [TOKENS_BS.size * 2] * len(assigned_LE)


def chosen_experts(config, params):
  """The experts of each MoE layer and token, sorted: what a token more adds to the assignments."""
  mesh = make_mesh(config, jax.devices()[:1])
  run = jax.jit(lambda params, tokens, counted: functional.apply(
      config, params, tokens, 0 * tokens, mesh, counted_BS=counted)[1].assigned_E)
  size, layers = TOKENS_BS.shape[1], []
  for row_1S in TOKENS_BS[:, None].astype(np.int32):
    counts_LSE = np.stack([run(params, row_1S, np.arange(size)[None] <= n)
                           for n in range(size)], axis=1)
    layers.append(np.diff(counts_LSE, axis=1, prepend=0))
  return np.stack([[np.flatnonzero(token) for token in layer]
                   for layer in np.concatenate(layers, axis=1)])


@pytest.mark.parametrize("layout", ARCHS)
def test_what_is_exported_is_the_same_model_there(answers, layout):
  config = config_of(layout)
  compare(config, random_params(config), answers / f"exported-{layout}.npz")
  found = np.load(answers / f"exported-{layout}.npz")
  np.testing.assert_allclose(found["theta"], config.model.rope_theta)
  assert found["ids"].tolist() == list(TEXT.encode())
  assert (str(found["back"]), int(found["start"])) == (TEXT, 256)


@pytest.mark.parametrize("layout", ARCHS)
def test_what_is_made_there_is_the_same_model_here(answers, layout):
  source = from_hf.look(answers / layout)
  config = dataclasses.replace(config_of(layout), execution=ExecutionConfig())
  assert from_hf.differences(config, source.said) == []
  params = from_hf.read_params(source, config, make_mesh(config, jax.devices()[:1]))
  compare(config, params, answers / f"made-{layout}.npz")


def test_a_trained_cell_has_the_same_heldout_loss_there(answers, trained):
  _, loss, (pieces, n_targets) = trained
  nats = np.load(answers / "trained.npz")["nats"]
  print(f"{answers.name}: held-out loss {nats.sum() / n_targets:.7f}, here {loss:.7f}, over "
        f"{n_targets} targets in {len(pieces)} pieces")
  assert nats.sum() / n_targets == pytest.approx(loss, abs=1e-5)
