import time

import jax
import numpy as np

from moe_jax.train import throughput


def test_speed_and_mfu_follow_from_steps_and_time(monkeypatch):
  now = iter([10.0, 12.0, 13.0, 13.5])
  monkeypatch.setattr(time, "perf_counter", lambda: next(now))
  speed = throughput.Throughput(tokens_per_step=100, flops_per_token=6.0, peak=6000.0)
  assert speed.look(0) == {}
  assert speed.look(8) == {"tokens_per_second": 400.0, "mfu": 0.4}
  assert speed.look(10) == {"tokens_per_second": 200.0, "mfu": 0.2}
  assert speed.look(10) == {}  # no step lies between


def test_the_peak_of_a_processor_is_that_of_the_machine_however_many_devices_share_it():
  one, eight = (throughput.peak_flops(jax.devices()[:n]) for n in (1, 8))
  assert one > 1e8
  np.testing.assert_allclose(np.log(one), np.log(eight), atol=np.log(8) - 0.1)
