"""Evaluates a checkpoint on a split of text: losses, in total and per document, and routing.

Every target of the split is predicted once. The main loss is dropless: which tokens a capacity
limit drops depends on the rest of the batch, so it is not a property of the model. The loss at
the capacity of training is reported alongside. For it the rows are in a fixed random order, so
that a routing group holds rows of many documents, as in training. In the order of the text it
would hold rows of a single document, whose tokens prefer the same experts.
"""

import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from moe_jax import config as config_lib
from moe_jax.data.loader import EvalRows
from moe_jax.data.prepare import PreparedData, Split
from moe_jax.errors import FieldError
from moe_jax.evaluate.estimate import ratio
from moe_jax.evaluate.forward import Forward, Output, evaluation_config
from moe_jax.evaluate.routing import RoutingCounts
from moe_jax.evaluate.text import HELDOUT
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.model.functional import abstract_model
from moe_jax.moe.router import RouterSums, router_metrics
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import restore_model
from moe_jax.train.checkpoint_files import content_hash

ORDER_SEED = 0  # for the order in which rows are evaluated
VERSION = 3  # increment when the same checkpoint gives other numbers: old results are redone


class Documents(NamedTuple):
  """Measurements per document of the split, float64 or int64 [D], for comparing two runs.

  Attributes:
    nats_D: dropless loss, summed over the document's targets.
    nats_at_capacity_D: the same at the capacity of training.
    targets_D: number of targets.
    bytes_D: UTF-8 bytes of the text.
    domain_D: index of the document's domain.
  """

  nats_D: np.ndarray
  nats_at_capacity_D: np.ndarray
  targets_D: np.ndarray
  bytes_D: np.ndarray
  domain_D: np.ndarray


class Measured(NamedTuple):
  """Results of `measure`: plain values, measurements per document, routing counts."""

  losses: dict[str, Any]
  documents: Documents
  routing: RoutingCounts | None


class Evaluation(NamedTuple):
  """One checkpoint on one text.

  Attributes:
    result: the content of eval/NAME.json; see `measure`.
    documents: measurements per document.
    routing: counts of the routers' choices; None if there are none.
    labels: labels of the domains.
  """

  result: dict[str, Any]
  documents: Documents
  routing: RoutingCounts | None
  labels: list[str]


def evaluate(cell: Cell, run_dir: RunDir, own: PreparedData,
             devices: list[jax.Device] | None = None, *, text: PreparedData | None = None,
             split: str = HELDOUT, step: int | None = None,
             keep_choices: bool = False) -> Evaluation:
  """Evaluates a checkpoint of a run; writes nothing.

  Args:
    cell: must have the identity of the run; its execution fields control how to evaluate.
    run_dir: directory of the run.
    own: the run's own text, which must be what it was trained on.
    devices: the devices to use; all if None. If the cell's mesh does not suit them, it is
      replaced, with a warning.
    text: the text to evaluate on; `own` if None.
    split: split of the text.
    step: step of the checkpoint; the newest sound one if None.
    keep_choices: see RoutingCounts.

  Raises:
    FieldError: the text has changed, its tokens do not fit the model, or the loss is not finite.
    CheckpointError: no checkpoint is sound, or the one at `step` is not.
  """
  started = time.perf_counter()
  devices, text = devices or jax.devices(), text or own
  config = evaluation_config(cell.config, len(devices))
  if config.execution.mesh != cell.config.execution.mesh:
    logging.warning("%s: %s does not suit %d device(s): evaluating on %s, which gives the "
                    "same results", cell.name, cell.config.execution.mesh, len(devices),
                    config.execution.mesh)
  mesh = make_mesh(config, devices)
  step, model = restore(config, run_dir, own, mesh, step)
  measured = measure(config, Forward(config, mesh, **model), text, split, keep_choices)
  if not math.isfinite(measured.losses["loss"]):
    raise FieldError("out", str(run_dir.path), f"its loss on {split} at step {step} is "
                     f"{measured.losses['loss']}")
  return Evaluation({
      "version": VERSION, "step": step, "checkpoint": content_hash(run_dir, step),
      "identity": config_lib.identity_hash(cell.config),
      "data_fingerprint": text.fingerprint, **measured.losses,
      "device_kind": devices[0].device_kind, "n_devices": len(devices),
      "seconds": round(time.perf_counter() - started, 2)},
      measured.documents, measured.routing, _labels(text))


def restore(config: config_lib.RunConfig, run_dir: RunDir, own: PreparedData, mesh,
            step: int | None = None) -> tuple[int, dict[str, Any]]:
  """Restores (step, {"params", "router"}) of a run trained on `own`; see `evaluate`."""
  config.check_vocabulary(own.vocab_size)
  step, model, meta = restore_model(run_dir, abstract_model(config, mesh), step)
  if meta["data_fingerprint"] != own.fingerprint:
    raise FieldError("config.data.corpus", config.data.corpus,
                     f"the text has changed since the run read it (fingerprint "
                     f"{meta['data_fingerprint']} then, {own.fingerprint} now)")
  return step, model


def measure(config: config_lib.RunConfig, forward: Forward, prepared: PreparedData,
            split_name: str = HELDOUT, keep_choices: bool = False) -> Measured:
  """Evaluates a whole split, its rows in an order drawn from ORDER_SEED.

  Losses are in nats per token; standard errors (`_se`) are over documents, see estimate.ratio.
  Bits per byte divide by the bytes of the text, so they are comparable across tokenizers.
  `domains` has both for the documents of each domain. A model whose router is not causal (`causal`
  is false) has seen the future: its losses are comparable only with those of other such models, and
  `loss` depends on the routing groups of training. Routing is measured in the pass at the
  capacity of training: the share of assignments dropped, the load of each expert by layer (over
  the mean), and its spread as in router_metrics; None if every layer is dense.
  """
  split, labels = prepared.splits[split_name], _labels(prepared)
  rows = EvalRows(split, config.data.seq_len)
  domain_D = _domain_of_label(prepared, labels)[split.domain_D]
  nats_D, nats_at_capacity_D, targets_D = np.zeros((3, split.n_documents))
  sums, routing = None, RoutingCounts(
      len(labels), config.arch.n_exp, config.arch.vocab_size, config.arch.n_dense_layers,
      keep_choices)
  observed = False
  for batch in rows.batches(config.train.batch_size, ORDER_SEED):
    limited = forward.at_capacity(batch)
    free = forward.dropless(batch) if limited.dropped else limited
    nats_D += _by_document(free, batch, split)
    nats_at_capacity_D += _by_document(limited, batch, split)
    targets_D += np.bincount(batch["segments_BS"][batch["mask_BS"]],
                             minlength=split.n_documents)
    sums = _add(sums, limited.sums)
    if limited.choices is not None:
      observed = True
      routing.add(limited.choices, batch["inputs_BS"], domain_D[batch["segments_BS"]],
                  batch["mask_BS"])
  assert targets_D.sum() == rows.n_targets

  documents = Documents(nats_D, nats_at_capacity_D, targets_D.astype(np.int64),
                        np.array(split.bytes_D), domain_D)
  card = prepared.card["splits"][split_name]
  losses = {
      "causal": config.moe.causal, **_losses(documents, np.ones(split.n_documents, bool)),
      "unigram_loss": card["unigram_nats_per_token"],
      "unigram_bits_per_byte": card["unigram_bits_per_byte"],
      **_router_facts(sums), "heldout_documents": split.n_documents,
      "heldout_targets": rows.n_targets, "heldout_bytes": split.n_bytes,
      "domains": {label: _of_domain(documents, domain_D == number)
                  for number, label in enumerate(labels)}}
  return Measured(losses, documents, routing if observed else None)


def _labels(prepared: PreparedData) -> list[str]:
  """Returns the distinct labels of the domains; several corpora may share one."""
  return list(dict.fromkeys(domain.label for domain in prepared.domains)) or ["all"]


def _domain_of_label(prepared: PreparedData, labels: list[str]) -> np.ndarray:
  """Maps each corpus of a mixture to the index of its label."""
  return np.array([labels.index(domain.label) for domain in prepared.domains] or [0])


def _losses(documents: Documents, chosen_D: np.ndarray) -> dict[str, float | None]:
  nats_D, at_capacity_D, targets_D, bytes_D, _ = (each[chosen_D] for each in documents)
  found = {"loss": ratio(nats_D, targets_D), "loss_at_capacity": ratio(at_capacity_D, targets_D),
           "bits_per_byte": ratio(nats_D, bytes_D).scaled(1 / math.log(2))}
  return {key: value for name, estimate in found.items()
          for key, value in ((name, estimate.value), (f"{name}_se", estimate.se))}


def _of_domain(documents: Documents, chosen_D: np.ndarray) -> dict[str, Any]:
  counts = {"documents": int(chosen_D.sum()), "targets": int(documents.targets_D[chosen_D].sum()),
            "bytes": int(documents.bytes_D[chosen_D].sum())}
  return (_losses(documents, chosen_D) if counts["targets"] and counts["bytes"] else {}) | counts


def _by_document(output: Output, batch: dict[str, np.ndarray], split: Split) -> np.ndarray:
  """Sums nats by document, in float64; a target belongs to the document of its input."""
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
