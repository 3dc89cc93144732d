import io

import numpy as np
import pytest

from moe_jax.design.ask import Question, ask
from moe_jax.design.plot import pareto_figure, stairs
from tests.design.space_test import SMALL


@pytest.fixture(scope="module")
def asked():
  return ask(Question(SMALL, memory_gb=0.4, active_params=3e7, tokens=1e10))[1]


def test_stairs_go_down():
  cost, score = stairs(np.array([3.0, 1, 2, 2, 4]), np.array([5.0, 9, 6, 7, 5]))
  assert cost.tolist() == [1, 2, 3] and score.tolist() == [9, 6, 5]


@pytest.mark.parametrize("laws, panels", [(None, 7), (["abnar"], 1), (["ling", "zhao"], 2)])
def test_a_panel_a_law_with_the_best_of_each_part_of_the_memory(asked, laws, panels):
  figure = pareto_figure(asked, laws)
  shown = [axes for axes in figure.axes if axes.get_visible()]
  assert len(shown) == panels
  names = [r.judge.name for r in asked.recommendations]
  for axes in shown:
    name = axes.get_title(loc="left").partition(":")[0]
    row = names.index(name)
    judge, found = asked.recommendations[row].judge, asked.found
    within = found.within()
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert "up to 0.4 GB" in lines and len(lines) >= 3
    for part in (1, 0.5, 0.25):
      x, y = lines[f"up to {0.4 * part:.4g} GB"].get_data()
      inside = within & (found.costs[0] <= 0.4 * part)
      assert y[-1] == pytest.approx(judge.value(found.scores[row, inside].min()))
      assert x[-1] == 3e7 and np.all(np.diff(x) >= 0)
      assert np.all(np.diff(y) * (1 if judge.is_loss else -1) <= 0)
    low, high = sorted(axes.get_ylim())
    assert low < judge.value(asked.recommendations[row].score) < high
  image = io.BytesIO()
  figure.savefig(image, format="png")
  assert image.getvalue()[:4] == b"\x89PNG"
