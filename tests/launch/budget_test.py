"""What machines count themselves: the limit holds where no launcher lives."""

import random

import pytest
from etils import epath

from launch import budget
from launch.backends import gke
from launch.budget import Meter, set_limit
from launch.host import agent as agent_lib
from launch.host.agent import Agent, Pace
from launch.jobs import read_launch
from launch.work import from_text
from moe_jax.errors import FieldError
from moe_jax.files import read_json
from tests.launch.agent_test import _here, _work


@pytest.mark.parametrize("seed", range(3))
def test_slices_that_look_now_and_then_never_pass_the_limit_together(tmp_path, seed):
  """Each takes up to the margin to save and end; some die and are made anew meanwhile."""
  chance, folder, now, limit = random.Random(seed), epath.Path(tmp_path), [0.0], 200.0
  rates, used, dies = {"a": 0.01, "b": 0.05, "c": 0.002}, 0.0, {}
  set_limit(folder, limit)
  meters = {name: Meter(folder / name, rate, lambda: now[0]) for name, rate in rates.items()}
  while meters:
    now[0] += 30.0
    used += 30.0 * sum(rates[name] for name in meters)
    for name, meter in list(meters.items()):
      if now[0] >= dies.get(name, 1e9):
        meter.count(ended=True)
        del meters[name]
      elif name not in dies:
        meter.count()
        if chance.random() < 0.01:  # its machine is taken away and another goes on
          meters[name] = Meter(folder / name, rates[name], lambda: now[0])
        if meter.why_too_dear():
          dies[name] = now[0] + chance.uniform(0, budget.MARGIN_SECONDS - 60)
  assert 0.9 * limit < used <= limit
  assert sum(read_json(file)["usd"] for file in folder.glob("*/used.json")) == pytest.approx(used)


def test_an_agent_saves_and_ends_before_the_limit_and_goes_on_with_a_higher_one(
    tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(agent_lib, "HEARTBEAT_SECONDS", 0.05)
  file = _work(tmp_path, ["slow", "ok"], steps=60, usd_per_second=1.0)
  todo, folder = from_text(file.read_text(), file), epath.Path(file.parent)

  def train():
    assert _here(Agent(todo, folder, "0-0", Pace(0.02, 0.02))) == 0
    return [launch and launch.state for launch in (
        read_launch(todo.run_dir(name)) for name in todo.cells)], capfd.readouterr().out

  set_limit(folder.parent, budget.MARGIN_SECONDS + 1.5)
  states, said = train()
  assert states == ["preempted", None]
  assert said.count("spending would exceed --max_cost_usd=201.5: ending the slice\n") == 1
  assert said.count(": unfinished\n") == 2  # in two groups, told of the limit once
  assert budget.account(folder.parent)[0].startswith("s0: $")
  assert 1.0 < read_json(folder / "used.json")["usd"] < 60
  assert read_json(folder / "now.json")["done"]  # the other hosts end too
  assert train()[0] == ["preempted", None]  # nothing is begun
  set_limit(folder.parent, None)
  assert train()[0] == ["finished", "finished"]


def test_a_limit_needs_a_price():
  with pytest.raises(FieldError, match="max_cost_usd=5.0: needs --usd_per_chip_hour: tpu7x has no"):
    gke.Options("tpu7x-8", "i:1", max_cost_usd=5.0)
  assert gke.Options("tpu7x-8", "i:1", max_cost_usd=5.0, usd_per_chip_hour=3.6).usd_per_second == (
      pytest.approx(4 * 3.6 / 3600))
