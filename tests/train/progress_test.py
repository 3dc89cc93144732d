"""A live line on a terminal, plain whole lines elsewhere."""

import io
import re

import rich.console

from moe_jax.train.progress import PLAIN_SECONDS, Progress


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def run(steps, total, seconds_per_step, name="l4-d128", terminal=False, width=80, **values):
  """What is shown when `steps` are done one after the other."""
  file, clock = io.StringIO(), Clock()
  console = rich.console.Console(file=file, force_terminal=terminal, width=width,
                                 legacy_windows=False, _environ={"TERM": "xterm"})
  with Progress(total, name, console, clock) as progress:
    for step in steps:
      clock.now = step * seconds_per_step
      progress.update(step, **values)
  return file.getvalue()


def test_plain_lines_are_whole():
  shown = run([10, 20], 100, PLAIN_SECONDS, name="a-rather-long-name" * 3, loss=3.14159,
              tokens_per_second=123456.7, mfu=0.4126, drop_rate=0.012)
  assert shown.splitlines() == [
      "a-rather-long-name" * 3 + "  10/100  loss 3.1416  123,457 tok/s  MFU 41.3%  drop 1.2%",
      "a-rather-long-name" * 3 + "  20/100  0:06:40 left  loss 3.1416  123,457 tok/s  "
      "MFU 41.3%  drop 1.2%"]


def test_plain_lines_come_now_and_then_with_the_first_and_the_last():
  def steps_shown(steps, total, seconds_per_step):
    return [int(n) for n in re.findall(
        rf"(\d+)/{total}", run(steps, total, seconds_per_step, loss=1.0))]
  assert steps_shown(range(1, 13), 12, PLAIN_SECONDS / 4) == [1, 5, 9, 12]
  assert steps_shown(range(1, 7), 100, 0.01) == [1, 6]  # stopped early: the last one too
  assert steps_shown([7], 7, 1.0) == [7]


def test_time_left_ignores_what_lies_before_the_first_update():
  shown = run([500, 501, 510], 1000, PLAIN_SECONDS)  # resumed at 500
  assert shown.splitlines()[-1].endswith(f"510/1000  {'0:40:50'} left")


def test_what_is_unknown_is_left_out_and_a_nan_is_shown():
  assert run([1], 1, 1.0, name="", loss=float("nan")) == "1/1  loss nan\n"


def test_terminal_shows_one_line_that_is_redrawn():
  shown = run(range(10, 101, 10), 100, 1.0, terminal=True, loss=3.14159,
              tokens_per_second=123456.7, mfu=0.4126, drop_rate=0.012)
  assert shown.count("\n") == 1 and shown.rstrip("\x1b[?25lh").endswith("\n")
  redrawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).split("\r")
  assert redrawn[1:-1] and all(len(line.rstrip("\n")) <= 80 for line in redrawn)
  half = next(line for line in redrawn if " 50/100 " in line)
  assert half.startswith("━━━╺━━ 50/100  0:00:50 left  loss 3.1416  123,457 tok/s  MFU 41.3%  "
                         "drop 1.2%")
