"""Loss of one run on a split of text, from a checkpoint, on the devices there are.

Every target of the split is predicted once. The loss is that of the model without capacity
limits: which tokens a limit drops depends on who else is in the batch, so it is no property
of the model. The loss at the capacity of training stands beside it: for it the rows come in
one fixed random order, so that a routing group holds rows of many documents, as in training.
In the order of the text it would hold one document's, whose tokens want the same experts.
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

ORDER_SEED = 0  # of the order in which rows are evaluated
VERSION = 3  # raise it when the same checkpoint gives other numbers: old results are redone


class Documents(NamedTuple):
  """By document of the split, float64 or int64 [D]: what a comparison of two runs needs.

  Attributes:
    nats_D: the loss, dropless, summed over the document's targets.
    nats_at_capacity_D: at the capacity of training.
    targets_D: how many targets.
    bytes_D: UTF-8 bytes of the text.
    domain_D: number of its domain.
  """

  nats_D: np.ndarray
  nats_at_capacity_D: np.ndarray
  targets_D: np.ndarray
  bytes_D: np.ndarray
  domain_D: np.ndarray


class Measured(NamedTuple):
  """What the text gave: `losses` as plain values, by document, and what routers chose."""

  losses: dict[str, Any]
  documents: Documents
  routing: RoutingCounts | None


class Evaluation(NamedTuple):
  """One checkpoint on one text.

  Attributes:
    result: what eval/NAME.json holds; see `measure`.
    documents: of the text.
    routing: counts of what routers chose; None where there are none.
    labels: of the domains.
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
    cell: its identity must be that of the run; its execution says how to run.
    run_dir: of the run.
    own: the text of the run, which must be what it was trained on.
    devices: all of them if None. A mesh of the cell that does not suit them is replaced,
      with a warning.
    text: what is evaluated; `own` if None.
    split: of the text.
    step: of the checkpoint; the newest sound one if None.
    keep_choices: see RoutingCounts.

  Raises:
    FieldError: the text has changed, its tokens do not fit the model, the loss is not finite.
    CheckpointError: no checkpoint is sound, or not that one.
  """
  started = time.perf_counter()
  devices, text = devices or jax.devices(), text or own
  config = evaluation_config(cell.config, len(devices))
  if config.execution.mesh != cell.config.execution.mesh:
    logging.warning("%s: %s does not suit %d device(s): evaluated on %s, which gives the same",
                    cell.name, cell.config.execution.mesh, len(devices), config.execution.mesh)
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
  """(step, {"params", "router"}) of a checkpoint whose text is `own`; see `evaluate`."""
  config.check_vocabulary(own.vocab_size)
  step, model, meta = restore_model(run_dir, abstract_model(config, mesh), step)
  if meta["data_fingerprint"] != own.fingerprint:
    raise FieldError("config.data.corpus", config.data.corpus,
                     f"the text has changed since the run read it (fingerprint "
                     f"{meta['data_fingerprint']} then, {own.fingerprint} now)")
  return step, model


def measure(config: config_lib.RunConfig, forward: Forward, prepared: PreparedData,
            split_name: str = HELDOUT, keep_choices: bool = False) -> Measured:
  """Runs a whole split, its rows in the order of ORDER_SEED.

  Losses are in nats per token, standard errors (`_se`) are over documents; see
  estimate.ratio. Bits per byte divide by the bytes of the text, so they compare tokenizers.
  `domains` has both for the documents of each domain. With a router that is not causal
  (`causal` is false) they have seen the future: they compare with each other and with no other
  model's. There `loss` is that of training's routing groups. What the router does is measured
  in the pass at the capacity of training: the share of assignments dropped, loads (over their
  mean) of each layer's experts, and their spread as in router_metrics; None where every layer
  is dense.
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
  """Labels of the domains, each once; several corpora may share one."""
  return list(dict.fromkeys(domain.label for domain in prepared.domains)) or ["all"]


def _domain_of_label(prepared: PreparedData, labels: list[str]) -> np.ndarray:
  """The number of the label of each corpus."""
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
