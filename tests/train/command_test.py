"""`python -m moe_jax.train` as a user, and a sitting of the study, starts it."""

from etils import epath

from moe_jax.run_dir import EXIT_BUSY, RunDir
from tests.experiment_files import BASE, run_module, write_tiny

BOTH = BASE, f"{BASE}-s1"


def test_all_cells_of_a_file_are_not_trained_by_mistake(tmp_path):
  file, out = write_tiny(tmp_path), tmp_path / "runs"
  done = run_module("-m", "moe_jax.train", f"--config={file}", f"--out={out}")
  assert done.returncode == 2 and not out.exists()
  assert done.stderr.startswith(f"error: --config='{file}': has 2 cells and names none: add :CELL")
  assert done.stderr.count("\n") == 1 and done.stderr.endswith(", ".join(BOTH) + "\n")


def test_cells_that_are_named_train_one_after_another(tmp_path):
  """Whatever the population: so does a sitting one run at a time, or again after its memory ran
  out."""
  file, out = write_tiny(tmp_path, steps=3), tmp_path / "runs"
  done = run_module("-m", "moe_jax.train", f"--config={file}:{','.join(BOTH)}", f"--out={out}",
                    "--config.execution.population=1", XLA_FLAGS="")
  assert done.returncode == 0, done.stderr
  assert {folder.name for folder in (out / "tiny").iterdir()} == set(BOTH)
  assert all((folder / "status.json").read_text().count("finished") for folder
             in (out / "tiny").iterdir())


def test_a_cell_that_cannot_train_does_not_stop_those_after_it(tmp_path):
  file, out = write_tiny(tmp_path, steps=3), tmp_path / "runs"
  first, second = (RunDir(epath.Path(out) / "tiny" / cell) for cell in BOTH)
  with first.lock():
    done = run_module("-m", "moe_jax.train", f"--config={file}:{','.join(BOTH)}", f"--out={out}",
                      "--config.execution.population=1", XLA_FLAGS="")
  assert done.returncode == EXIT_BUSY and "is in use by process" in done.stderr
  assert first.read_status() == {} and second.read_status()["state"] == "finished"


def test_a_cell_that_another_process_holds_is_told_by_its_code(tmp_path):
  file, out = write_tiny(tmp_path, steps=3), tmp_path / "runs"
  with RunDir(epath.Path(out) / "tiny" / BASE).lock():
    done = run_module("-m", "moe_jax.train", f"--config={file}:{BASE}", f"--out={out}",
                      XLA_FLAGS="")
  assert done.returncode == EXIT_BUSY and done.stderr.count("\n") == 1, done.stderr
  assert done.stderr.startswith("error: ") and "is in use by process" in done.stderr
