"""What is exported computes what the run does, and what cannot be exported leaves nothing."""

import json
import math
import pathlib
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from safetensors.numpy import load_file

from moe_jax.errors import FieldError
from moe_jax.export import shards, to_hf
from moe_jax.export.layouts import LAYOUTS, weights
from moe_jax.export.to_hf import export
from moe_jax.train import checkpoint_format
from moe_jax.train.checkpoint_format import CheckpointError
from moe_jax.train.checkpoint_parts import StoredParams
from tests.experiment_files import run_module
from tests.export import plain
from tests.export.conftest import ARCHS, cell_of, config_of, leave_run
from tests.export.forward import outputs
from tests.small import random_params

TOKENS_BS = np.random.default_rng(0).integers(0, 256, (8, 16))


@pytest.mark.parametrize("layout", ARCHS)
def test_the_exported_model_is_the_run(exported, layout):
  """Logits, the experts of every token and the balance loss, against NumPy."""
  config = config_of(layout)
  ours, balance, assigned_LE = outputs(config, random_params(config), TOKENS_BS)
  model = plain.Model(exported / layout)
  theirs, experts, probability = zip(*map(model, TOKENS_BS), strict=True)
  np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-5)
  experts_LSK = np.concatenate(experts, axis=1)
  np.testing.assert_array_equal(assigned_LE, [
      np.bincount(layer.ravel(), minlength=8) for layer in experts_LSK])
  np.testing.assert_allclose(balance, plain.balance_loss(
      experts_LSK, np.concatenate(probability, axis=1)), rtol=1e-5)
  assert model.used == set(model.weights)  # and nothing else is there


def test_shards_have_an_index_and_keep_to_their_size(exported):
  folder = exported / "olmoe"
  index = json.loads((folder / shards.INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  assert files == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
  sizes = []
  for name in files:
    tensors = load_file(folder / name)
    assert set(tensors) == {t for t, file in index["weight_map"].items() if file == name}
    sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
  assert max(sizes) <= 20e3 and sum(sizes) == index["metadata"]["total_size"]
  assert not list(exported.glob(".*"))


def test_a_tensor_larger_than_a_shard_has_one_to_itself():
  found = tuple(weights(ARCHS["olmoe"], LAYOUTS["olmoe"]))
  planned = shards.plan(found, 4, 1)
  assert [len(shard) for shard in planned] == [1] * len(found)
  assert shards.plan(found, 4, 1e12) == [list(found)]


def test_both_generations_of_keys_are_there(exported):
  said = json.loads((exported / "qwen3_moe" / "config.json").read_text())
  assert said["num_experts"] == said["num_local_experts"] == 8
  assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 50_000.0
  assert said["dtype"] == said["torch_dtype"] == "float32"
  assert said["mlp_only_layers"] == [0] and said["intermediate_size"] == 20
  assert said["bos_token_id"] == said["eos_token_id"] == 256


def test_the_origin_is_told(exported, out_with_data):
  told = json.loads((exported / "mixtral" / to_hf.ORIGIN).read_text())
  assert (told["run"], told["step"]) == ("kinds/mixtral", 4)
  assert told["checkpoint"] and told["config"]["arch"]["qk_norm"] == "none"


def test_bfloat16_halves_it(exported, out_with_data, tmp_path):
  done = export(cell_of("mixtral"), out_with_data, tmp_path / "hf", dtype="bfloat16")
  half, whole = (load_file(folder / shards.WHOLE) for folder in (
      tmp_path / "hf", exported / "mixtral"))
  assert 2 * done.n_bytes == sum(tensor.nbytes for tensor in whole.values())
  for name, tensor in half.items():
    assert tensor.dtype.name == "bfloat16"
    np.testing.assert_allclose(tensor.astype(np.float32), whole[name], rtol=2**-8)


def chunks_read():
  """Chunks that TensorStore has read and decoded in this process."""
  found = ts.experimental_collect_matching_metrics("/tensorstore/cache/chunk_cache/reads")
  return sum(value["value"] for metric in found for value in metric["values"])


def test_chunks_that_cut_matrices_and_join_experts_are_read_once(exported, out, monkeypatch):
  """As those of a large model are: its arrays are cut along their longest axes."""
  monkeypatch.setattr(checkpoint_format, "_CHUNK_BYTES", 2000)
  cell = cell_of("olmoe")
  run_dir = leave_run(out, cell)
  stored = ocp.PyTreeCheckpointHandler().metadata(
      pathlib.Path(run_dir.checkpoints, "4", "params")).tree
  assert stored["moe_layers"]["moe"]["w_up_EDF"].storage.chunk_shape == (2, 4, 8, 6)
  n_chunks = sum(math.prod(math.ceil(size / part) for size, part in zip(
      leaf.shape, leaf.storage.chunk_shape, strict=True)) for leaf in jax.tree.leaves(stored))
  before = chunks_read()
  export(cell, out, out / "hf", shard_bytes=20e3)
  assert chunks_read() - before == n_chunks
  for file in exported.joinpath("olmoe").glob("*.safetensors*"):
    assert (out / "hf" / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_export_leaves_nothing_that_looks_whole(out_with_data, exported, tmp_path,
                                                              monkeypatch):
  def chunks(self, path):
    read.append(path)
    if len(read) == 5:
      raise KeyboardInterrupt
    return whole(self, path)

  read, whole = [], StoredParams.chunks
  monkeypatch.setattr(StoredParams, "chunks", chunks)
  with pytest.raises(KeyboardInterrupt):
    export(cell_of("olmoe"), out_with_data, tmp_path / "hf", shard_bytes=20e3)
  assert list(tmp_path.glob(".hf.partial/*-of-*")) and not (tmp_path / "hf").exists()
  monkeypatch.undo()
  export(cell_of("olmoe"), out_with_data, tmp_path / "hf", shard_bytes=4e9)
  assert [path.name for path in tmp_path.iterdir()] == ["hf"]
  assert not list((tmp_path / "hf").glob("*-of-*"))


def test_what_cannot_be_written_is_refused_first(exported, out_with_data, tmp_path, monkeypatch):
  def refused(field, message, layout="olmoe", **arguments):
    hf = arguments.pop("hf", tmp_path / "new")
    with pytest.raises(FieldError, match=message) as caught:
      export(cell_of(layout), arguments.pop("out", out_with_data), hf, **arguments)
    assert caught.value.field == field

  refused("hf", "exists, and is not overwritten", hf=exported / "olmoe")
  refused("hf", "must be a local path", hf="gs://bucket/model")
  refused("dtype", "float8.*must be float32 or bfloat16", dtype="float8")
  refused("out", "holds no run kinds/olmoe", out=tmp_path / "empty")
  monkeypatch.setattr(to_hf.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5}))
  refused("hf", "needs 7.83e-05 GB, but only 5e-09 GB are free")
  assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_or_a_changed_text_is_refused(out, small_corpus, monkeypatch):
  cell = cell_of("mixtral")
  run_dir = leave_run(out, cell)
  with pytest.raises(CheckpointError, match="holds no checkpoint 3: it has 4"):
    export(cell, out, out / "hf", step=3)
  with monkeypatch.context() as patch:
    patch.setattr(to_hf, "prepare", lambda *_: types.SimpleNamespace(fingerprint="another"))
    with pytest.raises(FieldError, match="the text has changed since the run read it"):
      export(cell, out, out / "hf")
  folder = pathlib.Path(run_dir.checkpoints, "4", "params")
  file = max((path for path in folder.rglob("*") if path.is_file()),
             key=lambda path: path.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1] + b"x")
  with pytest.raises(CheckpointError, match="params/.* does not match its checksum"):
    export(cell, out, out / "hf")
  assert not (out / "hf").exists()


def test_the_command_refuses_in_one_line(tmp_path):
  for arguments, message in (
      ([f"--hf={tmp_path}/x"], "--to=None: give either --to=hf or --from=hf"),
      (["--to=hf", f"--hf={tmp_path}/x"], "--config=None: is needed: FILE:CELL"),
      (["--to=hf", f"--hf={tmp_path}/x", "--config=experiments/quickstart.py:l2-d80-f42-e32-k4",
        "--shard_gb=nan"], "--shard_gb=nan: must be a number"),
      (["--to=hf", f"--hf={tmp_path}/x", "--write=x.py"], "--write='x.py': cannot be combined"),
      (["--from=hf", f"--hf={tmp_path}/x", "--write=x.py"], "is not a directory")):
    done = run_module("-m", "moe_jax.export", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
