"""Held-out loss of one run, from its checkpoint, on the devices there are.

Every target of the split is predicted once. The loss is that of the model without capacity
limits: which tokens a limit drops depends on who else is in the batch, so it is no property
of the model. The loss at the capacity of training stands beside it: for it the rows come in
one fixed random order, so that a routing group holds rows of many documents, as in training.
In the order of the text it would hold one document's, whose tokens want the same experts.
"""

import math
import time
from typing import Any

import jax
import numpy as np
from absl import logging

from moe_jax import config as config_lib
from moe_jax.data.loader import eval_rows
from moe_jax.data.prepare import PreparedData, Split
from moe_jax.errors import FieldError
from moe_jax.evaluate.estimate import ratio
from moe_jax.evaluate.forward import Forward, Output, evaluation_config
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.model.functional import abstract_model
from moe_jax.moe.router import RouterSums, router_metrics
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import restore_model
from moe_jax.train.checkpoint_files import content_hash

NAME = "heldout"  # of the file in eval/
SPLIT = "heldout"
ORDER_SEED = 0  # of the order in which rows are evaluated
VERSION = 2  # raise it when the same checkpoint gives other numbers: old results are redone


def evaluate(cell: Cell, run_dir: RunDir, prepared: PreparedData,
             devices: list[jax.Device] | None = None) -> dict[str, Any]:
  """Evaluates the newest sound checkpoint of a run; writes nothing.

  Args:
    cell: its identity must be that of the run; its execution says how to run.
    run_dir: of the run.
    prepared: the text, which must be what the run was trained on.
    devices: all of them if None. A mesh of the cell that does not suit them is replaced,
      with a warning.

  Returns:
    What eval/heldout.json holds; see `measure` for the measurements.

  Raises:
    FieldError: the text has changed, the loss is not finite.
    CheckpointError: no checkpoint is sound.
  """
  started = time.perf_counter()
  devices = devices or jax.devices()
  config = evaluation_config(cell.config, len(devices))
  if config.execution.mesh != cell.config.execution.mesh:
    logging.warning("%s: %s does not suit %d device(s): evaluated on %s, which gives the same",
                    cell.name, cell.config.execution.mesh, len(devices), config.execution.mesh)
  mesh = make_mesh(config, devices)
  step, model, meta = restore_model(run_dir, abstract_model(config, mesh))
  if meta["data_fingerprint"] != prepared.fingerprint:
    raise FieldError("config.data.corpus", config.data.corpus,
                     f"the text has changed since the run read it (fingerprint "
                     f"{meta['data_fingerprint']} then, {prepared.fingerprint} now)")
  measured = measure(config, Forward(config, mesh, **model), prepared)
  if not math.isfinite(measured["loss"]):
    raise FieldError("out", str(run_dir.path), f"its held-out loss at step {step} is "
                     f"{measured['loss']}")
  return {
      "version": VERSION, "step": step, "checkpoint": content_hash(run_dir, step),
      "identity": config_lib.identity_hash(cell.config),
      "data_fingerprint": prepared.fingerprint, **measured,
      "device_kind": devices[0].device_kind, "n_devices": len(devices),
      "seconds": round(time.perf_counter() - started, 2)}


def measure(config: config_lib.RunConfig, forward: Forward,
            prepared: PreparedData) -> dict[str, Any]:
  """Runs the whole held-out split, its rows in the order of ORDER_SEED.

  Losses are in nats per token, standard errors (`_se`) are over documents; see
  estimate.ratio. Bits per byte divide by the bytes of the text, so they compare tokenizers.
  With a router that is not causal (`causal` is false) they have seen the future: they compare
  with each other and with no other model's. There `loss` is that of training's routing groups.
  What the router does is measured in the pass at the capacity of training: the share of
  assignments dropped, loads (over their mean) of each layer's experts, and their spread as
  in router_metrics; None where every layer is dense.
  """
  split = prepared.splits[SPLIT]
  rows = eval_rows(prepared, SPLIT, config.data.seq_len)
  nats_D, nats_at_capacity_D, targets_D = np.zeros((3, split.n_documents))
  sums = None
  for batch in rows.batches(config.train.batch_size, ORDER_SEED):
    limited = forward.at_capacity(batch)
    free = forward.dropless(batch) if limited.dropped else limited
    nats_D += _by_document(free, batch, split)
    nats_at_capacity_D += _by_document(limited, batch, split)
    targets_D += np.bincount(batch["segments_BS"][batch["mask_BS"]],
                             minlength=split.n_documents)
    sums = _add(sums, limited.sums)
  assert targets_D.sum() == rows.n_targets

  loss, at_capacity = ratio(nats_D, targets_D), ratio(nats_at_capacity_D, targets_D)
  bits_per_byte = ratio(nats_D, split.bytes_D).scaled(1 / math.log(2))
  card = prepared.card["splits"][SPLIT]
  return {
      "causal": config.moe.causal, "loss": loss.value, "loss_se": loss.se,
      "loss_at_capacity": at_capacity.value, "loss_at_capacity_se": at_capacity.se,
      "bits_per_byte": bits_per_byte.value, "bits_per_byte_se": bits_per_byte.se,
      "unigram_loss": card["unigram_nats_per_token"],
      "unigram_bits_per_byte": card["unigram_bits_per_byte"],
      **_router_facts(sums), "heldout_documents": split.n_documents,
      "heldout_targets": rows.n_targets, "heldout_bytes": split.n_bytes}


def _by_document(output: Output, batch: dict[str, np.ndarray], split: Split) -> np.ndarray:
  """Nats by document, in float64; a target counts for the document of its input."""
  mask_BS = batch["mask_BS"]
  return np.bincount(batch["segments_BS"][mask_BS], minlength=split.n_documents,
                     weights=output.nll_BS[mask_BS].astype(np.float64))


def _add(total: RouterSums | None, sums: RouterSums | None) -> RouterSums | None:
  if sums is None:
    return None
  sums = RouterSums(*(np.asarray(x, np.float64) for x in sums))
  return sums if total is None else jax.tree.map(np.add, total, sums)


def _router_facts(sums: RouterSums | None) -> dict[str, Any]:
  if sums is None:
    return dict.fromkeys(("drop_rate", "load_variation", "max_load", "dead_experts",
                          "left_behind", "router_entropy", "load"))
  load_LE = sums.assigned_E / sums.assigned_E.mean(-1, keepdims=True)
  return {**{name: float(value) for name, value in router_metrics(sums).items()},
          "load": load_LE.round(4).tolist()}
