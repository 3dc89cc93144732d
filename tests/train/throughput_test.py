import itertools
import time
import types

import jax
import numpy as np

from moe_jax.arch import count
from moe_jax.train import throughput
from tests.small import small_config


def test_speed_and_mfu_follow_from_steps_and_time(monkeypatch):
  now = iter([10.0, 12.0, 13.0, 13.5])
  monkeypatch.setattr(time, "perf_counter", lambda: next(now))
  config = small_config()
  flops = count.training_flops_per_token(config.arch, config.data.seq_len)
  speed = throughput.Throughput(config, peak=1e9)
  assert config.batch_tokens == 128
  assert speed.look(0) == {}
  assert speed.look(8) == {"tokens_per_second": 512.0, "mfu": 512 * flops / 1e9}
  assert speed.look(10)["tokens_per_second"] == 256.0
  assert speed.look(10) == {}  # no step lies between


def test_the_typical_speed_is_the_median_without_the_first_look(monkeypatch):
  """One slow interval (a checkpoint, a neighbour) is not the speed of the run."""
  now = iter([0.0, 100.0, 101.0, 103.0, 203.0])
  monkeypatch.setattr(time, "perf_counter", lambda: next(now))
  speed = throughput.Throughput(small_config(), peak=1e9)
  assert speed.look(0) == speed.typical() == {}
  first = speed.look(1)
  assert speed.typical() == first  # the best there is yet
  looks = [speed.look(step, drop_rate=0.1 * step) for step in (2, 3, 4)]
  assert speed.typical() == {"tokens_per_second": 64.0, "mfu": looks[1]["mfu"]}


def test_dropped_assignments_are_no_useful_work(monkeypatch):
  """With everything dropped the FLOPs left are those of a model without routed experts."""
  now = iter([0.0, 1.0])
  monkeypatch.setattr(time, "perf_counter", lambda: next(now))
  config = small_config()
  speed = throughput.Throughput(config, peak=1.0)
  speed.look(0)
  mfu = speed.look(1, drop_rate=1.0)["mfu"]
  arch = config.arch
  experts = arch.n_layers * arch.n_topk * 3 * arch.d_model * arch.d_expert
  everything = count.training_flops_per_token(arch, config.data.seq_len)
  np.testing.assert_allclose(mfu, config.batch_tokens * (everything - 6 * experts))


def test_an_unknown_accelerator_has_no_peak_and_no_mfu(monkeypatch):
  unknown = types.SimpleNamespace(device_kind="Accelerator X", platform="gpu")
  assert throughput.peak_flops([unknown]) is None
  now = iter([0.0, 1.0])
  monkeypatch.setattr(time, "perf_counter", lambda: next(now))
  speed = throughput.Throughput(small_config(), peak=None)
  speed.look(0)
  assert speed.look(1).keys() == {"tokens_per_second"}


def test_processors_of_many_processes_have_no_peak():
  """They may be of many machines, of which this one alone could be measured."""
  assert throughput.peak_flops([
      types.SimpleNamespace(device_kind="cpu", platform="cpu", process_index=i)
      for i in range(2)]) is None


def test_a_known_accelerator_counts_every_device():
  h200 = types.SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")
  assert throughput.peak_flops([h200] * 8) == 8 * throughput.peak_flops([h200]) > 7e15


def test_the_peak_of_a_processor_is_that_of_the_machine_however_many_devices_share_it(monkeypatch):
  now = itertools.count()
  monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))  # a product takes a second
  assert [throughput.peak_flops(jax.devices()[:n]) for n in (1, 8)] == [2 * 1024**3] * 2
