"""Generates text from a checkpoint: continues prompts."""

import os
import time
from collections.abc import Callable, Sequence

from etils import epath

from moe_jax.config import require_causal
from moe_jax.errors import FieldError
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir


def generate(cell: Cell, out: str | os.PathLike, prompts: Sequence[str], new_tokens: int,
             sampling, say: Callable[[str], None] = print) -> list[str]:
  """Continues each prompt with the newest sound checkpoint of a run; writes nothing.

  Each prompt is treated as the beginning of a document. The run may still be training.

  Args:
    cell: the cell whose run to use.
    out: directory of all experiments.
    prompts: texts.
    new_tokens: see Decoder.generate.
    sampling: a sampling.Sampling.
    say: called with a summary line.

  Returns:
    The continuation of each prompt.

  Raises:
    FieldError: the model cannot decode; a prompt is empty or too long for the context; there is
      no run, or it has another identity.
    CheckpointError: no checkpoint is sound.
  """
  try:
    require_causal(cell.config)
  except FieldError as error:
    raise error.under("config") from None
  for prompt in prompts:
    if not prompt:
      raise FieldError("generate", "", "is an empty prompt: give some text")
  run_dir = RunDir.of(out, cell)
  if not run_dir.check_identity(cell):
    raise FieldError("out", str(run_dir.path), "holds no run: train it first, with "
                     f"python -m moe_jax.train --config={cell.selector} --out={out}")

  from moe_jax.data.prepare import prepare
  from moe_jax.evaluate.decode import check_prompts
  from moe_jax.train.loop import use_compilation_cache
  own = prepare(cell.config.data, epath.Path(out) / "_data")
  ids = [[own.document_start_id, *own.tokenizer.encode(prompt).tolist()] for prompt in prompts]
  check_prompts(ids, cell.config.data.seq_len)
  use_compilation_cache(out)
  step, decoder = open_decoder(cell, run_dir, own)
  started = time.perf_counter()
  made = decoder.generate(ids, new_tokens, sampling, end=own.document_start_id)
  seconds, n_made = time.perf_counter() - started, sum(map(len, made))
  full = any(len(old) + len(new) == cell.config.data.seq_len
             for old, new in zip(ids, made, strict=True))
  say(f"{cell.name}, step {step}: {n_made} tokens in {seconds:.1f} s, compilation included"
      + (f"; the context ends at {cell.config.data.seq_len} tokens" if full else ""))
  return [own.tokenizer.decode(row) for row in made]


def open_decoder(cell: Cell, run_dir: RunDir, own):
  """Returns (step, Decoder) for the newest sound checkpoint, on all devices."""
  import jax

  from moe_jax.evaluate import heldout
  from moe_jax.evaluate.decode import Decoder
  from moe_jax.evaluate.forward import evaluation_config
  from moe_jax.mesh import make_mesh
  config = evaluation_config(cell.config, len(jax.devices()))
  mesh = make_mesh(config)
  step, model = heldout.restore(config, run_dir, own, mesh)
  return step, Decoder(config, mesh, **model)
