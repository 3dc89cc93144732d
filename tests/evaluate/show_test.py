"""The table and the picture say what the rows say."""

import matplotlib.image
import numpy as np
import pytest
from etils import epath

from moe_jax.evaluate import plot
from moe_jax.evaluate.show import show
from moe_jax.evaluate.table import print_table


def row(n_exp=8, n_topk=2, **changes):
  return {"experiment": "small", "step": 400, "cell": f"l2-d16-f12-e{n_exp}-k{n_topk}",
          "evaluation": "heldout", "n_exp": n_exp, "sparsity": n_exp / n_topk,
          "n_total": 1_000_000, "n_active": 300_000, "tokens": 1_600_000, "loss": 1.9,
          "loss_se": 0.02, "loss_at_capacity": 1.95, "bits_per_byte": 2.7,
          "drop_rate": 0.0213, "load_variation": 0.3, "unigram_loss": 3.0285,
          "heldout_documents": 25, "causal": True} | changes


def test_the_table_is_whole_on_a_pipe(capsys):
  name = "l2-d16-f12-e64-k8-" + "x" * 80
  print_table([row(), row(64, 8, cell=name, loss_se=None, drop_rate=None,
                          load_variation=None)])
  lines = capsys.readouterr().out.splitlines()
  (first,) = [line for line in lines if "e8-k2" in line]
  for text in (" 400 ", "1M", "300k", " 4 ", "1.9000 ± 0.0200", "1.9500", "2.7000", "2.13%", "0.30",
               "3.0285"):
    assert text in first
  (second,) = [line for line in lines if name in line]
  assert "±" not in second and second.split()[-3:] == ["-", "-", "3.0285"]
  assert any("25 documents" in line for line in lines)


def test_the_table_marks_what_is_not_causal(capsys):
  print_table([row(), row(64, 8, loss=1.5, causal=False)])
  out = capsys.readouterr().out
  assert "1.5000 ± 0.0200*" in out and "1.9000 ± 0.0200*" not in out
  assert "* NOT CAUSAL: its router sees later tokens" in out
  print_table([row()])
  assert "CAUSAL" not in capsys.readouterr().out


def test_only_runs_of_equally_many_tokens_are_compared():
  rows = [row(tokens=10), row(16, tokens=20), row(32, tokens=20), row(8, 1, tokens=30)]
  assert plot.equal_tokens(rows) == rows[1:3]
  assert plot.equal_tokens([row(tokens=10), row(tokens=20)])[0]["tokens"] == 20
  assert plot.caption(rows).endswith("another number of tokens: 2.")
  assert "another number" not in plot.caption(rows[1:3])


def test_short_runs_say_that_they_are_no_law():
  assert "test the pipeline, not the law" in plot.caption([row(tokens=990_000)])
  told = "20 training tokens per parameter, where compute-optimal"
  assert plot.caption([row(tokens=19_900_000)]).startswith(told)
  assert "per parameter" not in plot.caption([row(tokens=20_000_000)])
  assert "3.029" in plot.caption([row()])


def test_cells_of_different_texts_are_not_said_to_compare():
  same = [row() | {"data_fingerprint": "a"}, row(16) | {"data_fingerprint": "a"}]
  assert "the same for all cells" in plot.caption(same)
  same[0]["data_fingerprint"] = "b"
  assert "DIFFERENT TEXTS" in plot.caption(same) and "the same" not in plot.caption(same)


def test_the_title_tells_the_spread_of_n_total():
  assert "N_total = 1M," in plot.title([row(), row(16)])
  assert "1M ± 2.0%" in plot.title([row(n_total=980_000), row(n_total=1_020_000)])


def test_the_picture_is_written_and_shows_the_losses(tmp_path):
  rows = [row(n_exp, n_topk, loss=2 + n_topk / 10) for n_exp in (8, 16) for n_topk in (1, 2, 4)]

  def picture(rows):
    file = epath.Path(tmp_path / "results.png")
    plot.plot(rows, file)
    return matplotlib.image.imread(file)

  first = picture(rows)
  assert first.shape[1] >= 1200
  assert (first[..., :3].min(axis=2) < 0.5).mean() > 0.01  # not an empty page
  assert not np.array_equal(first, picture([rows[0] | {"loss": 2.3}, *rows[1:]]))
  picture([row(1, 1, loss_se=None)])  # a single dense cell, a single document


@pytest.mark.parametrize("blocked, other", [("results.csv", "results.png"),
                                            ("results.png", "results.csv")])
def test_a_file_that_cannot_be_written_is_named_and_hides_nothing_else(
    tmp_path, capsys, blocked, other):
  (tmp_path / blocked).mkdir()
  (problem,) = show([row()], [row()], epath.Path(tmp_path / "results.csv"))
  assert problem.startswith(f"{blocked}: not written: ") and "\n" not in problem
  assert (tmp_path / other).stat().st_size > 0
  printed = capsys.readouterr().out
  assert "1.9000 ± 0.0200" in printed and printed.splitlines()[-1] == str(tmp_path / other)
  assert {file.name for file in tmp_path.iterdir()} == {blocked, other}  # no part is left
