"""Decoding gives what the teacher-forced forward pass gives, on any mesh, compiled once."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.errors import FieldError
from moe_jax.evaluate.decode import Decoder, Sampling, check_prompts, choose
from moe_jax.mesh import make_mesh
from moe_jax.model import cached, functional
from tests.small import ARCH, MESHES, small_config

CONTEXT = 256
GQA = dataclasses.replace(ARCH, n_layers=3, n_heads=4, n_kv_heads=2, n_shared_experts=1,
                          n_dense_layers=1)
CONFIGS = {
    "softmax": small_config(data={"seq_len": CONTEXT}),
    "sigmoid": small_config(GQA, moe={"router": "sigmoid"}, data={"seq_len": CONTEXT}),
}


def prompts(*lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, length).tolist() for length in lengths]


def decoder_of(config, n_devices=1, mesh=None):
  mesh_config = mesh or MeshConfig(n_devices, 1, 1)
  config = dataclasses.replace(
      config, execution=dataclasses.replace(config.execution, mesh=mesh_config))
  mesh = make_mesh(config, jax.devices()[:n_devices])
  params = functional.init_params(config, mesh)
  router = jax.tree.map(lambda bias_LE: bias_LE.at[:, 1].set(0.05),
                        functional.init_router(config, mesh))
  return Decoder(config, mesh, params, router), params, router


@functools.cache
def shared(name):
  """(decoder, teacher): the second gives logits_BSV by the forward pass of training."""
  decoder, params, router = decoder_of(CONFIGS[name])
  teacher = jax.jit(lambda rows: functional.apply(
      decoder.config, params, rows, jnp.zeros_like(rows), decoder.mesh, router=router)[0])
  return decoder, lambda rows: np.asarray(teacher(jnp.array(rows)))


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request):
  return shared(request.param)


@pytest.fixture(scope="module")
def softmax():
  return shared("softmax")[0]


def test_decode_is_the_teacher_forced_forward_token_by_token(pair):
  """Prompts of different lengths in one batch, the tokens behind them given."""
  decoder, teacher = pair
  length_B = np.array([3, 16, 9], np.int32)
  rows = np.array(prompts(40, 40, 40))
  expected_BSV = teacher(rows)
  padded = rows[:, :16].copy()
  for row, length in zip(padded, length_B, strict=True):
    row[length:] = 7  # whatever padding holds
  logits_BV, cache = decoder.prefill(decoder.empty_cache(3, 64), padded, length_B)
  for shift in range(24):
    at = length_B - 1 + shift
    want_BV = expected_BSV[np.arange(3), at]
    np.testing.assert_allclose(logits_BV, want_BV, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(np.argmax(logits_BV, -1), want_BV.argmax(-1))
    logits_BV, cache = decoder.decode(cache, rows[np.arange(3), at + 1], (at + 1).astype(np.int32))


def test_greedy_decoding_is_the_argmax_of_the_forward_pass(pair):
  decoder, teacher = pair
  texts = prompts(5, 16, 10)
  made = decoder.generate(texts, 48)  # 64 slots, as in the test before
  for text, row in zip(texts, made, strict=True):
    assert len(row) == 48
    logits_BSV = teacher([(text + row)[:40]] * 3)
    np.testing.assert_array_equal(logits_BSV[0, len(text) - 1:-1].argmax(-1),
                                  row[:40 - len(text)])


@contextlib.contextmanager
def count_compiles():
  """The compilations meanwhile, whether XLA does them or finds them in a cache on disk."""
  found = []

  def heard(event, *_, **__):
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(heard)
  yield found
  jax.monitoring.unregister_event_duration_listener(heard)


def test_the_cache_that_is_given_is_used_up(softmax):
  """There is room for one."""
  texts = np.array(prompts(16, 16))
  given = softmax.empty_cache(2, 64)
  _, cache = softmax.prefill(given, texts, np.full(2, 16, np.int32))
  softmax.decode(cache, texts[:, 0], np.full(2, 16, np.int32))
  assert all(leaf.is_deleted() for leaf in (*given, *cache))


def test_two_hundred_tokens_compile_nothing_new(softmax):
  """And neither do other prompts of these lengths, or another way to sample."""
  softmax.generate(prompts(5, 9), 200)
  with count_compiles() as compiled:
    first = softmax.generate(prompts(5, 9), 200)
    second = softmax.generate(prompts(7, 16, seed=1), 200, Sampling(0.7, 5, 0.9, seed=3))
    counted = len(compiled)
    jax.jit(lambda x: x * 3)(1.0)
  assert len(compiled) > counted  # the count does count
  assert [len(row) for row in first + second] == [200] * 4
  assert counted == 0


@pytest.mark.parametrize("mesh", ["data2_fsdp2_expert2",
                                  pytest.param("expert8", marks=pytest.mark.slow)])
def test_the_mesh_changes_neither_logits_nor_draws(softmax, mesh):
  """Eight devices, three prompts: the rest of the batch is filled up."""
  other, *_ = decoder_of(CONFIGS["softmax"], 8, MESHES[mesh])
  sampling = Sampling(temperature=0.5, top_k=20, seed=1)
  texts = prompts(4, 16, 2)
  assert other.generate(texts, 40, sampling) == softmax.generate(texts, 40, sampling)


def test_what_a_prompt_gets_does_not_depend_on_the_batch(softmax):
  one, *others = prompts(16, 4, 7, 2, 16)
  (first, *_), (*_, last) = (softmax.generate(texts, 40) for texts in (
      [one, *others[:2]], [*others[2:], one]))
  assert first == last and len(first) == 40


def test_a_batch_draws_as_its_rows_do_in_a_larger_one(softmax):
  text, sampling = prompts(6)[0], Sampling(temperature=1.0, seed=2)
  whole = softmax.generate([text] * 4, 20, sampling)
  parts = [row for start in (0, 2)
           for row in softmax.generate([text] * 2, 20, sampling, first_row=start)]
  assert parts == whole and len({tuple(row) for row in whole}) == 4


def test_a_row_ends_with_its_token_and_with_the_context(softmax):
  texts = prompts(CONTEXT - 4, 5)
  first, second = softmax.generate(texts, 30)
  assert len(first) == 4 and len(second) == 30
  end = second[3]
  cut = softmax.generate(texts, 30, end=end)
  assert cut[1] == second[:second.index(end)]
  assert len(softmax.generate(texts[1:], 1)[0]) == 1


@pytest.mark.parametrize("bad, message", [
    ([[]], "is an empty prompt"), ([[1] * 256], "must be at most 255: the context is")])
def test_prompts_that_cannot_be_continued_are_refused(softmax, bad, message):
  with pytest.raises(FieldError, match=message) as error:
    softmax.generate(bad, 4)
  assert "\n" not in str(error.value)
  check_prompts([[1] * 255], 256)


@pytest.mark.parametrize("field, value", [
    ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.5), ("seed", -1)])
def test_bad_sampling_is_refused(field, value):
  with pytest.raises(FieldError, match=field):
    Sampling(**{field: value})


def test_a_model_that_is_not_causal_cannot_decode():
  config = small_config(moe={"router": "expert_choice", "norm_topk_prob": False})
  with pytest.raises(FieldError, match="cannot decode"):
    cached.decoding_config(config)


LOGITS_V = np.log([0.05, 0.4, 0.3, 0.15, 0.1])


def drawn(temperature=1.0, top_k=0, top_p=1.0, n=4000):
  logits_BV = jnp.asarray(np.tile(LOGITS_V, (n, 1)), jnp.float32)
  token_B = jax.jit(choose)(logits_BV, jnp.arange(n), jnp.zeros(n, jnp.int32), temperature,
                            top_k, top_p, jax.random.key(0))
  return np.bincount(token_B, minlength=5) / n


def test_draws_follow_the_distribution_that_is_asked_for():
  close = {"atol": 0.04}
  np.testing.assert_allclose(drawn(), np.exp(LOGITS_V), **close)
  np.testing.assert_allclose(drawn(temperature=0.0), [0, 1, 0, 0, 0])
  np.testing.assert_allclose(drawn(top_k=2), [0, 4 / 7, 3 / 7, 0, 0], **close)
  # 0.4 + 0.3 reach 0.7, and the third is needed to reach 0.72
  np.testing.assert_allclose(drawn(top_p=0.69), [0, 4 / 7, 3 / 7, 0, 0], **close)
  three = np.array([0, 0.4, 0.3, 0.15, 0]) / 0.85
  np.testing.assert_allclose(drawn(top_p=0.72), three, **close)
  squared = np.exp(2 * LOGITS_V)
  np.testing.assert_allclose(drawn(temperature=0.5), squared / squared.sum(), **close)


def test_what_is_kept_in_memory_is_rounded_where_the_forward_pass_rounds():
  config = dataclasses.replace(CONFIGS["sigmoid"], model=dataclasses.replace(
      CONFIGS["sigmoid"].model, compute_dtype="bfloat16"))
  decoder, params, router = decoder_of(config)
  kinds = {path[-1].key: leaf.dtype for path, leaf in
           jax.tree_util.tree_leaves_with_path(decoder.params)}
  assert {name for name, kind in kinds.items() if kind == jnp.float32} == {
      "attention_norm_D", "ff_norm_D", "query_norm_h", "key_norm_h", "final_norm_D", "w_router_DE"}
  rows = jnp.array(prompts(16))
  forward = jax.jit(lambda params: functional.apply(
      decoder.config, params, rows, jnp.zeros_like(rows), decoder.mesh, router=router)[0])
  np.testing.assert_array_equal(forward(decoder.params), forward(params))
