"""The held-out loss is a property of the model: of no batch, no padding and no device."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import MeshConfig
from moe_jax.data.loader import EvalRows
from moe_jax.data.prepare import Domain, PreparedData, Split, prepare
from moe_jax.evaluate import forward as forward_lib
from moe_jax.evaluate.forward import Forward, evaluation_config
from moe_jax.evaluate.heldout import ORDER_SEED, evaluate, measure
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.moe.router import router_metrics
from tests.evaluate.conftest import cells_of, finish
from tests.small import ARCH, MESHES, small_config

SEQ_LEN = 16


def text(n_documents=5, seed=0):
  """Documents of random tokens; the held-out split ends in a row that is not full."""
  rng = np.random.default_rng(seed)
  length_D = rng.integers(30, 160, n_documents)
  starts_D1 = np.cumsum([0, *length_D])
  tokens_N = rng.integers(0, 256, starts_D1[-1])
  tokens_N[starts_D1[:-1]] = 256
  split = Split(tokens_N.astype(np.uint16), starts_D1, length_D - 1)
  card = {"splits": {"heldout": {"unigram_nats_per_token": 5.0,
                                 "unigram_bits_per_byte": 7.0}}}
  return PreparedData(pathlib.Path("nowhere"), card, {"heldout": split})


PREPARED = text()
assert (PREPARED.splits["heldout"].n_tokens - 1) % SEQ_LEN
assert len(EvalRows(PREPARED.splits["heldout"], SEQ_LEN)) % 8


def sharpened(params):
  """Routers that prefer some experts, so that tokens drop."""
  if "moe_layers" not in params:
    return params
  moe = params["moe_layers"]["moe"]
  moe = moe | {"w_router_DE": moe["w_router_DE"] * 8}
  return params | {"moe_layers": params["moe_layers"] | {"moe": moe}}


@functools.cache
def forward_of(config, n_devices=1):
  config = evaluation_config(config, n_devices)
  mesh = make_mesh(config, jax.devices()[:n_devices])
  return config, Forward(config, mesh, sharpened(functional.init_params(config, mesh)))


def numbers(measured):
  """What was measured, flat; with what the routers chose where there are any."""
  losses = dict(measured.losses)
  (whole,) = losses.pop("domains").values()
  assert whole.items() <= (losses | {"documents": losses["heldout_documents"], "targets":
                                     losses["heldout_targets"], "bytes":
                                     losses["heldout_bytes"]}).items()
  routing = measured.routing.result(["all"]) if measured.routing else {}
  return losses | {f"routing {name}": value for name, value in routing.items()
                   if isinstance(value, list) and name not in ("layers", "domains")}


def run(config, n_devices=1):
  config, forward = forward_of(config, n_devices)
  return numbers(measure(config, forward, PREPARED))


def assert_same(ours, theirs, rtol):
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    # A standard error is made of differences of losses, and is no more exact than these.
    atol = rtol * ours["loss"] if name.endswith("_se") else 0
    np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=atol, err_msg=name)


GROUPED = small_config(moe={"routing_group_tokens": 2 * SEQ_LEN})


@pytest.fixture(scope="module")
def grouped():
  result = run(GROUPED)
  assert 0.02 < result["drop_rate"] < 0.5  # what follows tests padding and drops
  assert result["loss_at_capacity"] != result["loss"]
  return result


@pytest.mark.parametrize("rows", [2, 26])
def test_the_batch_does_not_matter(grouped, rows):
  config = dataclasses.replace(
      GROUPED, train=dataclasses.replace(GROUPED.train, batch_size=rows))
  assert evaluation_config(config, 1).train.batch_size == rows
  assert_same(run(config), grouped, 1e-6)


def test_the_number_of_devices_does_not_matter(grouped):
  """Of any mesh: test_any_text_any_batch_any_mesh."""
  config = dataclasses.replace(GROUPED, execution=dataclasses.replace(
      GROUPED.execution, mesh=MESHES["data2_fsdp2_expert2"]))
  assert_same(run(config, 8), grouped, 1e-6)


def router_at_capacity(config, prepared, *seed):
  """Router metrics of passes over the rows in the order of `seed`, or of the text."""
  config, forward = forward_of(config)
  rows = EvalRows(prepared.splits["heldout"], SEQ_LEN)
  sums = [forward.at_capacity(batch).sums
          for batch in rows.batches(config.train.batch_size, *seed)]
  return router_metrics(jax.tree.map(lambda *leaves: np.sum(leaves, 0), *sums))


def test_a_routing_group_mixes_documents_as_in_training():
  """Documents of few words each: alone in a group, they would fight for few experts."""
  rng = np.random.default_rng(0)
  words_D4 = rng.integers(0, 256, (12, 4))
  tokens_N = np.concatenate([[256, *rng.choice(words_4, 8 * SEQ_LEN - 1)]
                             for words_4 in words_D4])
  starts_D1 = np.arange(13) * 8 * SEQ_LEN
  split = Split(tokens_N.astype(np.uint16), starts_D1, np.diff(starts_D1))
  prepared = dataclasses.replace(PREPARED, splits={"heldout": split})
  config = small_config(moe={"routing_group_tokens": 4 * SEQ_LEN})
  result = measure(*forward_of(config), prepared).losses
  shuffled = router_at_capacity(config, prepared, ORDER_SEED)
  for name in ("drop_rate", "load_variation"):
    np.testing.assert_allclose(result[name], shuffled[name], rtol=1e-5)
  assert result["drop_rate"] < 0.95 * router_at_capacity(config, prepared)["drop_rate"]


def test_dropless_is_the_reference_dispatch(grouped):
  config = dataclasses.replace(
      GROUPED, moe=dataclasses.replace(GROUPED.moe, dispatch="reference"))
  reference = run(config)
  for name in ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se"):
    np.testing.assert_allclose(reference[name], grouped[name], rtol=1e-5)
  assert reference["drop_rate"] == 0
  assert reference["loss_at_capacity"] == reference["loss"]


def test_every_target_counts_once_for_its_document():
  """Against the loss of each row alone, summed by hand."""
  config = small_config(moe={"dispatch": "reference"})
  result = run(config)
  one, forward = forward_of(dataclasses.replace(
      config, train=dataclasses.replace(config.train, batch_size=1)))
  split = PREPARED.splits["heldout"]
  stream, starts = split.tokens_N.astype(np.int32), split.starts_D1
  nats_D, targets_D = np.zeros((2, split.n_documents))
  apply = jax.jit(lambda tokens_1S, segments_1S: functional.apply(
      one, forward._params, tokens_1S, segments_1S, forward._mesh)[0])
  for start in range(0, len(stream) - 1, SEQ_LEN):
    at = np.arange(start, min(start + SEQ_LEN, len(stream) - 1))
    document = np.searchsorted(starts, at, side="right") - 1
    nats = optax.softmax_cross_entropy_with_integer_labels(
        apply(jnp.asarray(stream[at][None]), jnp.asarray(document[None]))[0],
        jnp.asarray(stream[at + 1]))
    np.add.at(nats_D, document, np.float64(nats))
    np.add.at(targets_D, document, 1)
  assert result["heldout_targets"] == len(stream) - 1 == targets_D.sum()
  np.testing.assert_allclose(result["loss"], nats_D.sum() / targets_D.sum(), rtol=1e-5)
  np.testing.assert_allclose(
      result["bits_per_byte"], nats_D.sum() / math.log(2) / split.n_bytes, rtol=1e-5)
  residual_D = nats_D - result["loss"] * targets_D
  n = split.n_documents
  np.testing.assert_allclose(
      result["loss_se"], np.sqrt(n / (n - 1) * (residual_D**2).sum()) / targets_D.sum(),
      rtol=1e-3)


def test_loads_are_those_of_the_text(grouped):
  load_LE = np.array(grouped["load"])
  assert load_LE.shape == (ARCH.n_layers, ARCH.n_exp)
  np.testing.assert_allclose(load_LE.mean(1), 1, atol=1e-3)
  np.testing.assert_allclose(grouped["max_load"], load_LE.max(), atol=1e-3)
  np.testing.assert_allclose(grouped["load_variation"], load_LE.std(1).max(), atol=1e-3)
  assert 0 < grouped["router_entropy"] < math.log(ARCH.n_exp)


def test_even_a_collapsed_router_drops_nothing():
  """Every token to the same two experts."""
  config, _ = forward_of(GROUPED)
  mesh = make_mesh(config, jax.devices()[:1])
  params = functional.init_params(config, mesh)
  moe = params["moe_layers"]["moe"]
  zero = {"w_router_DE": jnp.zeros_like(moe["w_router_DE"])}  # ties go to the first experts
  params["moe_layers"]["moe"] = moe | zero
  forward = Forward(config, mesh, params)
  batch = next(EvalRows(PREPARED.splits["heldout"], SEQ_LEN).batches(8))
  assert forward.at_capacity(batch).dropped > 0
  free = forward.dropless(batch)
  assert free.dropped == 0
  assert (free.sums.assigned_E[:, :2] == 8 * SEQ_LEN).all()


def test_what_a_gpu_does_to_drop_nothing_is_the_same(monkeypatch):
  """In groups of one sequence, as many at a time as memory bears."""
  config, forward = forward_of(GROUPED)
  batch = next(EvalRows(PREPARED.splits["heldout"], SEQ_LEN).batches(8))
  one_row = ARCH.n_exp * SEQ_LEN * ARCH.d_model * 4
  monkeypatch.setattr(forward_lib, "_SLOT_BYTES", 3 * one_row)
  on_gpu = forward_lib.dropping_nothing(config, "gpu", 1)
  assert (on_gpu.moe.dispatch, on_gpu.train.batch_size) == ("capacity", 2)  # 3 do not divide 8
  assert on_gpu.group_tokens == SEQ_LEN < config.group_tokens
  ours, free = forward._run_in_parts(on_gpu, batch), forward.dropless(batch)
  assert ours.dropped == free.dropped == 0 < forward.at_capacity(batch).dropped
  np.testing.assert_allclose(ours.nll_BS, free.nll_BS, rtol=1e-5)
  monkeypatch.setattr(forward_lib, "_SLOT_BYTES", 1)
  assert forward_lib.dropping_nothing(config, "gpu", 1).train.batch_size == 1


def test_a_dense_model_has_losses_and_no_router():
  arch = dataclasses.replace(ARCH, n_dense_layers=ARCH.n_layers)
  result = run(small_config(arch))
  assert result["loss"] == result["loss_at_capacity"] and 4 < result["loss"] < 8
  for name in ("drop_rate", "load_variation", "max_load", "router_entropy", "load"):
    assert result[name] is None


def test_batches_hold_whole_groups_and_are_as_large_as_a_microbatch():
  config = small_config(train={"batch_size": 96}, execution={"microbatches": 3},
                        moe={"routing_group_tokens": 4 * SEQ_LEN})
  assert evaluation_config(config, 1).train.batch_size == 32
  assert evaluation_config(config, 3).train.batch_size == 36
  assert evaluation_config(config, 100).train.batch_size == 400
  assert evaluation_config(config, 1).execution.microbatches == 1


@pytest.mark.slow
def test_a_run_saved_in_shards_is_evaluated_on_any_devices(out, caplog):
  """One device and four suit no mesh of eight: all of them take a share of the batch."""
  (cell,) = cells_of(seeds=1, execution={"mesh": MESHES["data2_fsdp2_expert2"]})
  prepared = prepare(cell.config.data, out / "_data")
  run_dir = finish(out, cell, n_devices=8)

  def found(n_devices, mesh="data2_fsdp2_expert2"):
    config = dataclasses.replace(cell.config, execution=dataclasses.replace(
        cell.config.execution, mesh=MESHES[mesh]))
    result = evaluate(dataclasses.replace(cell, config=config), run_dir, prepared,
                      jax.devices()[:n_devices]).result
    assert result["n_devices"] == n_devices
    return {name: value for name, value in result.items()
            if name not in ("n_devices", "seconds") and isinstance(value, float | list)}

  expected = found(8)
  assert expected["drop_rate"] > 0 and not caplog.messages
  assert_same(found(8, "fsdp2_expert4"), expected, 1e-6)
  assert not caplog.messages
  for n_devices in (1, 4):
    caplog.clear()
    assert_same(found(n_devices), expected, 1e-6)
    (line,) = [m for m in caplog.messages if "does not suit" in m]
    assert f"expert=2) does not suit {n_devices} device(s)" in line and "\n" not in line


def test_a_mesh_that_suits_is_kept():
  config = small_config(execution={"mesh": MESHES["fsdp4_expert2"]})
  assert evaluation_config(config, 8).execution.mesh == MESHES["fsdp4_expert2"]
  assert evaluation_config(config, 3).execution.mesh == MeshConfig(3, 1, 1)


def test_domains_add_up_to_the_whole_and_corpora_of_one_label_are_one():
  """Documents 0 and 4 are of one label, the others of another."""
  split = dataclasses.replace(PREPARED.splits["heldout"], domain_starts=(0, 1, 4))
  prepared = dataclasses.replace(PREPARED, splits={"heldout": split}, domains=tuple(
      Domain(name, label, 1 / 3) for name, label in (("a", "x"), ("b", "y"), ("c", "x"))))
  config, forward = forward_of(GROUPED)
  losses, documents, routing = measure(config, forward, prepared)
  assert list(losses["domains"]) == ["x", "y"]
  assert documents.domain_D.tolist() == [0, 1, 1, 1, 0]
  x, y = losses["domains"].values()
  assert (x["documents"], y["documents"]) == (2, 3)
  for value, size in (("loss", "targets"), ("bits_per_byte", "bytes")):
    total = x[value] * x[size] + y[value] * y[size]
    assert total / (x[size] + y[size]) == pytest.approx(losses[value])
  found = routing.result(["x", "y"])
  assert found["tokens"] == [x["targets"], y["targets"]]
  load_LGE = np.array(found["load"])
  mixed_LE = np.average(load_LGE, axis=1, weights=found["tokens"])
  np.testing.assert_allclose(mixed_LE, losses["load"], atol=1e-3)
  dropped = np.average(np.array(found["drop_rate"]), axis=1, weights=found["tokens"]).mean()
  assert dropped == pytest.approx(losses["drop_rate"], rel=1e-4)
  assert np.mean(found["entropy"]) == pytest.approx(losses["router_entropy"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name, rows, n_documents", [
    (None, 2, 1), ("fsdp2_expert4", 8, 3), ("data4_fsdp2", 14, 6)])
def test_any_text_any_batch_any_mesh(name, rows, n_documents):
  prepared, n_devices = text(n_documents, seed=rows), 1 if name is None else 8
  execution = GROUPED.execution if name is None else dataclasses.replace(
      GROUPED.execution, mesh=MESHES[name])
  rows *= n_devices
  other = dataclasses.replace(GROUPED, execution=execution, train=dataclasses.replace(
      GROUPED.train, batch_size=rows))
  ours, theirs = (numbers(measure(*forward_of(*which), prepared))
                  for which in ((other, n_devices), (GROUPED, 1)))
  for each in (ours, theirs):
    for key in [key for key, value in each.items() if value is None]:
      del each[key]
  assert_same(ours, theirs, 1e-6)


# Routers


def test_the_selection_bias_is_that_of_the_checkpoint(out):
  """With a bias of 1 every token goes to expert 0: seen in the loads, on other devices too."""
  unbiased, biased = cells_of(moe={"router": "sigmoid", "dispatch": "dropless"})
  prepared = prepare(biased.config.data, out / "_data")
  found = evaluate(unbiased, finish(out, unbiased), prepared, jax.devices()[:1]).result
  assert found["causal"] and np.array(found["load"]).max() < 3.9
  run_dir = finish(out, biased, bias=1.0)
  for n_devices in (1, 8):
    found = evaluate(biased, run_dir, prepared, jax.devices()[:n_devices]).result
    load_LE = np.array(found["load"])
    np.testing.assert_allclose(load_LE[:, 0], ARCH.n_exp / ARCH.n_topk)
    assert found["load_variation"] > 1


def test_expert_choice_is_measured_in_its_groups_and_marked():
  config, forward = forward_of(small_config(
      moe={"router": "expert_choice", "norm_topk_prob": False}))
  found = measure(config, forward, PREPARED).losses
  assert found["causal"] is False
  assert found["loss"] == found["loss_at_capacity"] and found["drop_rate"] == 0
  assert found["left_behind"] > 0
