"""Converts checkpoints to and from Hugging Face's layouts: Qwen3-MoE, OLMoE and Mixtral.

    python -m moe_jax.export --to=hf --config=experiments/quickstart.py:CELL --hf=DIR
    python -m moe_jax.export --from=hf --hf=DIR --write=experiments/mine.py
    python -m moe_jax.export --from=hf --hf=DIR --config=experiments/quickstart.py:CELL

--to writes a directory, tokenizer included, that transformers 4.57 and 5 can load. --from imports
such a directory as a run: with --write, of the only cell of a new experiment file; with --config,
of an existing cell.
"""

import pathlib
import sys

from absl import flags, logging

from moe_jax import cli
from moe_jax.config import DataConfig
from moe_jax.errors import FieldError, require

_CONFIG = cli.define_config_flag(required=False)
_OUT = flags.DEFINE_string("out", "runs", "Directory of all experiments, local or gs:// "
                           "(with --from=hf --write only local).")
_TO = flags.DEFINE_string("to", None, "'hf' writes a Hugging Face directory.")
_FROM = flags.DEFINE_string("from", None, "'hf' reads a Hugging Face directory.")
_HF = flags.DEFINE_string("hf", None, "The Hugging Face directory.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint to export; by default the "
                             "newest.", lower_bound=0)
_LAYOUT = flags.DEFINE_string("layout", None, "qwen3_moe, olmoe or mixtral; by default the one "
                              "with the run's arch.qk_norm.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Dtype of exported weights: float32 or bfloat16.")
_SHARD_GB = flags.DEFINE_float("shard_gb", 4.0, "Maximum size of a file.", lower_bound=0.0)
_WRITE = flags.DEFINE_string("write", None, "New experiment file for the imported model.")
_CORPUS = flags.DEFINE_string("corpus", DataConfig.corpus, "Corpus to evaluate --write's cell on.")


def main(overrides: list[str]) -> int:
  logging.set_verbosity(logging.WARNING)
  require((_TO.value is None) != (_FROM.value is None), "to", _TO.value,
          "give either --to=hf or --from=hf")
  for flag in (_TO, _FROM):
    require(flag.value in (None, "hf"), flag.name, flag.value, "must be 'hf'")
  _refuse_flags_of((_STEP, _LAYOUT, _DTYPE, _SHARD_GB) if _FROM.value else (_WRITE, _CORPUS),
                   "--from" if _FROM.value else "--to")
  try:
    return _export(overrides) if _TO.value else _import(overrides)
  except (FieldError, KeyboardInterrupt):
    raise
  except Exception as error:
    from moe_jax.train.checkpoint import CheckpointError
    if not isinstance(error, (CheckpointError, OSError)):
      raise
    print(f"error: {error}", file=sys.stderr)
    return 1


def _refuse_flags_of(others, mode: str) -> None:
  for flag in others:
    require(not flag.present, flag.name, flag.value, f"cannot be combined with {mode}=hf")


def _export(overrides: list[str]) -> int:
  require(_CONFIG.value is not None, "config", None, "is needed: FILE:CELL, whose run is exported")
  cells = cli.selected_cells(_CONFIG.value, overrides)
  require(len(cells) == 1, "config", _CONFIG.value, f"selects {len(cells)} cells, and one "
          "can be exported: add :CELL. Cells: " + ", ".join(cell.name for cell in cells))
  (cell,) = cells
  require(_SHARD_GB.value >= 0, "shard_gb", _SHARD_GB.value, "must be a number")  # not NaN
  from moe_jax.export.to_hf import export
  done = export(cell, _OUT.value, _HF.value, _STEP.value, _LAYOUT.value, _DTYPE.value,
                _SHARD_GB.value * 1e9)
  print(f"{cell.name}: step {done.step} as {done.layout} in {_HF.value}: "
        f"{done.n_parameters:,} parameters, {_DTYPE.value}, {done.n_bytes / 1e6:,.1f} MB in "
        f"{done.n_files} file(s)")
  print("The exported model drops no tokens: compare its loss with that of moe_jax.evaluate, not "
        "of training.")
  if cell.config.data.mask_documents:
    print("Attention was masked at document boundaries in training: feed one document per row, "
          "starting with the separator.")
  return 0


def _import(overrides: list[str]) -> int:
  require((_CONFIG.value is None) != (_WRITE.value is None), "write", _WRITE.value,
          "give either --write=experiments/NAME.py, for a new experiment, or --config=FILE:CELL")
  from moe_jax.export import from_hf
  source = from_hf.look(_HF.value)
  if _WRITE.value is not None:
    require(not overrides, "config", overrides and overrides[0], "overrides go with --config; "
            "the file that --write makes can be edited")
    cell = from_hf.as_experiment(source, _WRITE.value, _OUT.value, _CORPUS.value)
    again = f"--config={_WRITE.value}"
  else:
    changes = dict(cli.parse_override(argument) for argument in overrides)
    cell = from_hf.as_cell(source, _CONFIG.value, changes)
    again = " ".join([f"--config={cell.selector}",
                      f"--config.train.init_from={source.init_from}", *overrides])
  try:
    run_dir = from_hf.import_weights(source, cell, _OUT.value)
  except BaseException as error:
    if _WRITE.value is None:
      raise
    pathlib.Path(_WRITE.value).unlink()  # so that the same command can be retried
    if isinstance(error, FieldError) and error.field == "config.data.corpus":
      raise FieldError("corpus", error.value, error.accepted) from None
    raise
  print(f"{_HF.value} ({source.said.layout.name}) is step 0 of {run_dir.path}")
  print(f"evaluate it: python -m moe_jax.evaluate {again} --out={_OUT.value}")
  print("train further: python -m moe_jax.train --config=FILE:CELL --config.train.init_from="
        f"{cell.experiment}/{cell.name} --out={_OUT.value}")
  return 0


if __name__ == "__main__":
  cli.run(main)
