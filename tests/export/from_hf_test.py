"""What is imported is the model, on any mesh; what is not whole is refused in one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.config import ExecutionConfig
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.tokenizer import SEPARATOR, ByteTokenizer, FileTokenizer
from moe_jax.errors import FieldError
from moe_jax.evaluate.cells import survey
from moe_jax.export import from_hf, shards, to_hf
from moe_jax.export.to_hf import export
from moe_jax.fields import override
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from tests.export.conftest import ARCHS, config_of
from tests.small import MESHES, ONE_DEVICE, random_params
from tests.train.checkpoint_states import restore_params

DOCUMENT = "Naïve\n\tdef f(x): return 漢字 🙂  <|document|> \x00\x7f"


def params_of(run_dir, config):
  step, params, _ = restore_params(run_dir, functional.abstract_params(
      config, make_mesh(config, jax.devices()[:1])))
  assert step == 0
  return params


@pytest.mark.parametrize("layout", ARCHS)
def test_an_import_has_the_very_weights(exported, out, layout):
  source = from_hf.look(exported / layout)
  cell = from_hf.as_experiment(source, out / "mine.py", out, corpus="small")
  assert (cell.experiment, cell.config.arch) == ("mine", ARCHS[layout])
  assert cell.config.train.init_from == source.init_from
  assert cell.config.data.tokenizer.startswith(layout.replace("_", "-"))
  run_dir = from_hf.import_weights(source, cell, out)
  jax.tree.map(np.testing.assert_array_equal, params_of(run_dir, cell.config),
               random_params(config_of(layout)))
  assert survey([cell], out).finished == [cell]


def test_an_export_of_an_import_is_the_same_files(exported, out):
  source = from_hf.look(exported / "qwen3_moe")
  cell = from_hf.as_experiment(source, out / "mine.py", out, corpus="small")
  from_hf.import_weights(source, cell, out)
  export(cell, out, out / "again", shard_bytes=20e3)
  for file in exported.joinpath("qwen3_moe").iterdir():
    if file.name != to_hf.ORIGIN:
      assert (out / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ["fsdp2_expert4", "data2_fsdp2_expert2"])
def test_weights_go_to_any_mesh_and_are_read_once(exported, out, monkeypatch, name):
  mesh = {f"execution.mesh.{axis}": size for axis, size in dataclasses.asdict(
      MESHES[name]).items()}
  source = from_hf.look(exported / "olmoe")
  read, names = source.weights.read, []
  monkeypatch.setattr(source.weights, "read", lambda name: (names.append(name), read(name))[1])
  config = override(config_of("olmoe"), mesh | {"train.init_from": source.init_from})
  run_dir = from_hf.import_weights(source, Cell("mine", "", "cell", config), out)
  assert sorted(names) == sorted(weight.name for weight in source.tensors)
  one = dataclasses.replace(config, execution=ExecutionConfig(mesh=ONE_DEVICE))
  jax.tree.map(np.testing.assert_array_equal, params_of(run_dir, one),
               random_params(config_of("olmoe")))


def test_a_cell_of_ones_own_must_be_the_model(exported, out):
  source = from_hf.look(exported / "olmoe")
  same = config_of("olmoe")
  assert from_hf.differences(same, source.said) == []
  other = override(same, {"arch.n_topk": 3, "arch.n_kv_heads": 4, "model.rope_theta": 3.0})
  assert from_hf.differences(other, source.said) == [
      "arch.n_topk is 3 in the cell and 2 in config.json",
      "arch.n_kv_heads is 4 in the cell and 2 in config.json",
      "model.rope_theta is 3.0 in the cell and 10000.0 in config.json"]


def test_bfloat16_is_read(exported, out):
  file = exported / "mixtral" / shards.WHOLE
  folder = shutil.copytree(exported / "mixtral", out / "half")
  import ml_dtypes
  save_file({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in
             load_file(file).items()}, folder / shards.WHOLE, metadata={"format": "pt"})
  weights = from_hf.look(folder).weights
  for name, tensor in load_file(file).items():
    np.testing.assert_array_equal(weights.read(name), tensor.astype(ml_dtypes.bfloat16))


def _lose_a_shard(folder):
  (folder / "model-00002-of-00005.safetensors").unlink()


def _cut_a_shard(folder):
  file = folder / "model-00002-of-00005.safetensors"
  file.write_bytes(file.read_bytes()[:-100])


def _change(**changes):
  def change(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  return change


@pytest.mark.parametrize("breakage, message", [
    (_lose_a_shard, "lacks model-00002-of-00005.safetensors, which its index names"),
    (_cut_a_shard, "model-00002-of-00005.safetensors'?: is damaged or truncated"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json'?: is damaged"),
    (lambda folder: (folder / shards.INDEX).unlink(), "has neither model.safetensors nor model"),
    (lambda folder: (folder / shards.INDEX).write_text("{}"), "is damaged: no weight_map"),
    (_change(num_hidden_layers=3), "lacks 33 of 102 tensors of its config.json: model.layers.2."),
    (_change(num_hidden_layers=1), "has tensors that do not belong to the model in its conf"),
    (_change(intermediate_size=13), r"experts.0.gate_proj.weight has the shape \[12, 16\], but con"
     r"fig.json implies \[13, 16\]"),
    (_change(num_hidden_layers=60_000), "has 69 tensors, too few for the 60000 layers and 8 exp"),
    (lambda folder: (folder / shards.INDEX).write_text('{"weight_map": {"a": "../a"}}'),
     "weight_map must hold names of files"),
], ids=["lost", "cut", "no_config", "broken_config", "no_index", "empty_index", "more_layers",
        "fewer_layers", "wider", "far_more_layers", "elsewhere"])
def test_a_directory_that_is_not_whole_is_refused(exported, tmp_path, breakage, message):
  folder = shutil.copytree(exported / "olmoe", tmp_path / "hf")
  breakage(folder)
  with pytest.raises(FieldError, match=message) as caught:
    from_hf.look(folder)
  assert caught.value.field == "hf" and "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_is_refused(exported, out):
  folder = shutil.copytree(exported / "olmoe", out / "hf")
  file = folder / tokenizer_lib.FILE
  said = json.loads(file.read_text())
  said["model"]["vocab"]["zz"] = 300
  file.write_text(json.dumps(said))
  source = from_hf.look(folder)
  with pytest.raises(FieldError, match="its tokenizer has 301 tokens, its config.json a vocabulary "
                     "of 264"):
    from_hf.as_experiment(source, out / "mine.py", out)
  cell = Cell("mine", "", "cell", override(config_of("olmoe"), {
      "train.init_from": source.init_from, "execution.mesh.data": -1}))
  with pytest.raises(FieldError, match="tokenizer='bytes': is not the tokenizer of .*differently"):
    from_hf.import_weights(source, cell, out)
  file.write_text("{")
  with pytest.raises(FieldError, match="hf='.*tokenizer.json': cannot be read"):
    from_hf.import_weights(source, cell, out)
  file.unlink()
  with pytest.raises(FieldError, match="has no tokenizer.json"):
    from_hf.as_experiment(source, out / "mine.py", out)
  assert not (out / "mine.py").exists() and not (out / "mine").exists()


def test_what_is_there_is_not_overwritten(exported, out):
  source = from_hf.look(exported / "mixtral")
  cell = from_hf.as_experiment(source, out / "mine.py", out, corpus="small")
  from_hf.import_weights(source, cell, out)
  with pytest.raises(FieldError, match="mine.py'?: exists, and is not overwritten"):
    from_hf.as_experiment(source, out / "mine.py", out)
  with pytest.raises(FieldError, match="out=.*already exists"):
    from_hf.import_weights(source, cell, out)


def test_an_interrupted_import_is_not_finished_and_goes_on(exported, out, monkeypatch):
  source = from_hf.look(exported / "mixtral")
  cell = from_hf.as_experiment(source, out / "mine.py", out, corpus="small")
  with monkeypatch.context() as patch:
    patch.setattr(from_hf.Checkpointer, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      from_hf.import_weights(source, cell, out)
  assert survey([cell], out).finished == []
  run_dir = from_hf.import_weights(source, from_hf.as_cell(source, str(out / "mine.py"), {}), out)
  assert survey([cell], out).finished == [cell] and run_dir.has_checkpoint(0)


def test_bytes_are_the_same_ids_in_a_file(exported):
  ours, theirs = ByteTokenizer(), FileTokenizer(exported / "olmoe" / tokenizer_lib.FILE)
  np.testing.assert_array_equal(theirs.encode(DOCUMENT), ours.encode(DOCUMENT))
  assert theirs.decode(theirs.encode(DOCUMENT)) == DOCUMENT
  assert (theirs.vocab_size, theirs.document_start_id) == (257, 256)
  assert theirs.document_start == SEPARATOR and tokenizer_lib.same_ids(ours, theirs)
