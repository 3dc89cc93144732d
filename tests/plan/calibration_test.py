"""Published speeds and those of runs, beside the plan's; the compiler itself is plan_test's."""

import json

import pytest

from moe_jax.arch import count
from moe_jax.config import resolve_mesh
from moe_jax.errors import FieldError
from moe_jax.grid import select
from moe_jax.plan import calibrate, calibration, cells, topology
from moe_jax.run_dir import RunDir


@pytest.mark.parametrize("point, mfu", list(zip(calibration.PUBLISHED, (0.526, 0.352),
                                                strict=True)))
def test_the_published_speed_is_the_published_share_of_the_peak(point, mfu):
  """Tokens a second and MFU are published apart: that they agree shows that the model is the one
  that was measured. MaxText counted attention in full then."""
  chip = topology.parse(point.topology).hardware
  seq_len = point.config.data.seq_len
  arch = point.config.arch
  full = count.training_flops_per_token(arch, seq_len) + (
      6 * arch.n_layers * arch.n_heads * arch.d_head * seq_len)
  assert full * point.tokens_per_second / chip.bf16_flops == pytest.approx(mfu, rel=0.02)
  resolve_mesh(point.config, topology.parse(point.topology).devices)


def run(tmp_path, **status):
  (cell,) = select("experiments/reference.py")
  found = RunDir.of(tmp_path, cell)
  found.claim(cell)
  found.write_status({"state": "finished", "step": 1, "steps": 1, "device_kind": "TPU v5p",
                      "n_devices": 32, "tokens_per_second": 64_000.0} | status)
  return str(found.path), cell.config


def test_a_run_says_its_own_speed(tmp_path):
  path, config = run(tmp_path)
  point = calibration.of_run(path, "v5p-64", 1)
  assert point.config == config and point.tokens_per_second == 64_000 / 32


@pytest.mark.parametrize("status, message", [
    ({"device_kind": "cpu"}, "measured on 'cpu', which is no v5p"),
    ({"n_devices": 4}, "measured on 4 devices; v5p-64 has 32"),
    ({"tokens_per_second": None}, "no run with a measured speed")])
def test_a_run_that_was_measured_elsewhere_is_refused(tmp_path, status, message):
  path, _ = run(tmp_path, **status)
  with pytest.raises(FieldError, match=message):
    calibration.of_run(path, "v5p-64", 1)


def test_overrides_are_refused():
  with pytest.raises(FieldError, match=r"^config\.bogus='3': is not a flag of this command"):
    calibrate.main(["--config.bogus=3"])


def test_estimate_over_measurement(tmp_path, monkeypatch):
  """What an earlier plan said of the cell is read, so that no compiler is needed."""
  path, config = run(tmp_path)
  point = calibration.of_run(path, "v5p-64", 1)
  monkeypatch.setattr(cells, "check_libtpu", lambda where: None)
  where = topology.parse("v5p-64")
  kept = tmp_path / "_plans" / f"{cells._key(config, where)}.json"
  kept.parent.mkdir()
  kept.write_text(json.dumps({"seconds": 4.0, "memory": {"peak": 1}, "compile_seconds": 1}))
  (row,) = calibration.compare([point], str(tmp_path))
  assert row["measured_seconds"] == pytest.approx(config.batch_tokens / 64_000)
  assert row["ratio"] == pytest.approx(4.0 * 64_000 / config.batch_tokens)
  assert row["estimated_mfu"] / row["measured_mfu"] == pytest.approx(1 / row["ratio"])
