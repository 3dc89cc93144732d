"""`python -m moe_jax.evaluate` as a user starts it, on a run that the trainer left."""

import functools

import pytest

from tests.experiment_files import BASE, run_module, write_tiny


def evaluate(spec, out, **environment):
  return run_module("-m", "moe_jax.evaluate", f"--config={spec}", f"--out={out}",
                    timeout=600, **environment)


def test_before_any_run_it_says_how_to_train_and_writes_nothing(tmp_path):
  file, out = write_tiny(tmp_path), tmp_path / "runs"
  done = evaluate(file, out)
  assert done.returncode == 2
  assert done.stdout.splitlines() == [f"{BASE}: skipped: not trained yet",
                                      f"{BASE}-s1: skipped: not trained yet"]
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"error: --out='{out}': holds no finished cell of {file}")
  assert "python -m launch.submit" in line and not out.exists()


@pytest.mark.slow
def test_train_then_evaluate(tmp_path):
  """From a trained cell to the table: learned more than a unigram model has."""
  run = functools.partial(run_module, XLA_FLAGS="")  # one device, as for a user
  file, out = write_tiny(tmp_path, steps=150), tmp_path / "runs"
  trained = run("-m", "moe_jax.train", f"--config={file}:{BASE}", f"--out={out}",
                "--config.train.learning_rate=1e-2", timeout=600)
  assert trained.returncode == 0, trained.stderr
  (folder,) = (out / "tiny").iterdir()
  done = run("-m", "moe_jax.evaluate", f"--config={file}", f"--out={out}",
             "--config.train.learning_rate=1e-2", timeout=600)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert "skipped: not trained yet" in lines[0]
  assert lines[-2:] == [str(out / "tiny" / "results.csv"), str(out / "tiny" / "results.png")]
  (row,) = [line.split() for line in lines if line.split()[:1] == [folder.name]
            and "±" in line]
  loss, unigram = float(row[4]), float(row[-1])
  assert loss < unigram - 0.2
  prompted = run("-m", "moe_jax.evaluate", f"--config={file}:{BASE}", f"--out={out}",
                 "--config.train.learning_rate=1e-2", "--generate=The state",
                 "--new_tokens=5", timeout=600)
  assert prompted.returncode == 0, prompted.stderr
  assert prompted.stdout.startswith("The state") and "step 150: 5 tokens" in prompted.stderr
  page = tmp_path / "page.html"
  whole = run("-m", "moe_jax.evaluate", f"--config={file}:{BASE}", f"--out={out}",
              "--config.train.learning_rate=1e-2", "--steps=all", "--inference",
              "--batch_sizes=1,2", f"--report={page}", timeout=600)
  assert whole.returncode == 0, whole.stderr
  assert "already evaluated" in whole.stdout
  assert (out / "tiny" / "results.csv").read_text().count("\n") == 2
  text = page.read_text()
  for title in ("Loss against step", "Which experts work together", "Specialization over training",
                "Loss against measured cost of inference"):
    assert title in text
  assert "decode_ms_b2" in (out / "tiny" / "results.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("flag, message", [
    ("--split=held", "--split='held': must be heldout or train"),
    ("--steps=last", "--steps='last': must be all"),
    ("--compare=a,b", "--compare='a': no such cell"),
    ("--batch_sizes=0", "--batch_sizes='0': must be numbers"),
    ("--task_dir=here", "--task_dir='here': requires --tasks"),
    ("--tasks=heldout_cloze,", "--tasks='heldout_cloze,': must be names of tasks"),
    ("--report=page.txt", "--report='page.txt': must end in .html"),
    ("--generate=Hello", "selects 2 cells and --generate takes one")])
def test_a_bad_flag_is_one_line_and_writes_nothing(tmp_path, flag, message):
  file, out = write_tiny(tmp_path), tmp_path / "runs"
  done = evaluate_with(flag, file, out)
  assert done.returncode == 2 and message in done.stderr
  assert done.stderr.count("\n") == 1 and done.stdout == "" and not out.exists()


def evaluate_with(flag, spec, out):
  return run_module("-m", "moe_jax.evaluate", f"--config={spec}", f"--out={out}", flag,
                    timeout=120)
