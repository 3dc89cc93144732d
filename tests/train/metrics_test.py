"""Metrics are strict JSON, survive a kill, and are not doubled by another attempt."""

import contextlib
import json
import math
import struct

import jax.numpy as jnp
from tensorboardX.proto import event_pb2

from moe_jax.train.metrics import FLUSH_SECONDS, MetricsWriter


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def strict(line):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")
  return json.loads(line, parse_constant=refuse)


def lines(run_dir):
  return {file.name: [strict(line) for line in file.read_text().splitlines()]
          for file in sorted((run_dir.path / "metrics").iterdir())}


def board_points(run_dir):
  """(step, tag, value) as TensorBoard shows them: a restart hides later, older steps."""
  points = []
  for file in sorted(run_dir.tensorboard.iterdir(), key=lambda f: f.name):
    content = file.read_bytes()
    while content:  # length, its CRC, the event, its CRC
      (length,) = struct.unpack("<Q", content[:8])
      event = event_pb2.Event.FromString(content[12:12 + length])
      content = content[16 + length:]
      if event.session_log.status == event_pb2.SessionLog.START:
        points = [point for point in points if point[0] < event.step]
      points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return points


def test_a_file_for_each_checkpoint_interval(run_dir):
  with contextlib.closing(MetricsWriter(run_dir, attempt=1, step=0)) as writer:
    for step in range(1, 6):
      writer.write(step, {"loss": 1 / step})
      if step % 2 == 0:
        writer.next_chunk()
  assert {name: [record["step"] for record in records]
          for name, records in lines(run_dir).items()} == {
              "0001-00000001.jsonl": [1, 2], "0001-00000003.jsonl": [3, 4],
              "0001-00000005.jsonl": [5]}
  assert run_dir.read_metrics() == [{"step": s, "loss": 1 / s} for s in range(1, 6)]


def test_jax_and_non_finite_values_are_strict_json(run_dir):
  with contextlib.closing(MetricsWriter(run_dir, 1, 0)) as writer:
    writer.write(1, {"loss": jnp.float32(2.5), "half": jnp.bfloat16(0.5)})
    writer.write(2, {"loss": math.nan, "norm": math.inf, "low": -math.inf})
  assert lines(run_dir)["0001-00000001.jsonl"] == [
      {"step": 1, "loss": 2.5, "half": 0.5},
      {"step": 2, "loss": None, "norm": None, "low": None}]
  (nan,) = [value for step, tag, value in board_points(run_dir) if (step, tag) == (2, "loss")]
  assert math.isnan(nan)


def test_lines_reach_the_disk_now_and_then_without_a_checkpoint(run_dir):
  clock = Clock()
  writer = MetricsWriter(run_dir, 1, 0, clock)
  writer.write(1, {"loss": 1.0})
  assert run_dir.read_metrics() == []
  clock.now = FLUSH_SECONDS
  writer.write(2, {"loss": 2.0})
  assert [record["step"] for record in run_dir.read_metrics()] == [1, 2]
  writer.write(3, {"loss": 3.0})
  assert [record["step"] for record in run_dir.read_metrics()] == [1, 2]
  writer.close()
  assert [record["step"] for record in run_dir.read_metrics()] == [1, 2, 3]


def test_a_later_attempt_replaces_the_steps_it_repeats(run_dir):
  first = MetricsWriter(run_dir, run_dir.next_attempt(), step=0)
  for step in (1, 2, 3, 4):
    first.write(step, {"loss": 10.0 + step})
    if step == 2:
      first.next_chunk()
  first.close()  # ended here; the last checkpoint was at 2
  with contextlib.closing(MetricsWriter(run_dir, run_dir.next_attempt(), step=2)) as second:
    for step in (3, 4, 5):
      second.write(step, {"loss": 20.0 + step})
  expected = [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0), (5, 25.0)]
  assert [(r["step"], r["loss"]) for r in run_dir.read_metrics()] == expected
  assert [(step, value) for step, _, value in board_points(run_dir)] == expected
  assert run_dir.next_attempt() == 3


def test_nothing_written_leaves_no_file(run_dir):
  MetricsWriter(run_dir, 1, 0).close()
  assert run_dir.read_metrics() == [] and run_dir.next_attempt() == 1
