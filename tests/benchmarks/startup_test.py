import pytest

from benchmarks import startup
from benchmarks.startup_child import STAGES
from tests.experiment_files import BASE, write_tiny


def test_a_cold_start_finds_the_text_and_no_programs_and_a_cached_one_finds_both(
    tmp_path, monkeypatch):
  seen = []

  def start(_, out):
    seen.append({path.name for path in out.iterdir()})
    for name in ("_data", "_compilation_cache", "quickstart"):
      (out / name).mkdir(exist_ok=True)
    return dict.fromkeys(STAGES, float(len(seen)))

  monkeypatch.setattr(startup, "start", start)
  found = startup.measure("FILE:CELL", 3, tmp_path)
  programs = {"_data", "_compilation_cache"}
  assert seen == [set(), *[{"_data"}] * 3, *[programs] * 3]
  assert {name: row["compile"] for name, row in found.items()} == {"new": 1, "cold": 3, "cached": 6}


@pytest.mark.slow
def test_the_trainer_tells_its_stages_and_ends_after_a_step(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")  # one device, as for a user: the cell's groups suit no eight
  file, out = write_tiny(tmp_path), tmp_path / "runs"
  row = startup.start(f"{file}:{BASE}", out)
  assert tuple(row) == STAGES and all(seconds > 0 for seconds in row.values())
  with pytest.raises(RuntimeError, match="no such cell"):
    startup.start(f"{file}:{BASE[:-1]}", out)
