"""With lm_eval itself: the same answers as its Hugging Face LM gives, and the command.

It runs in the environment of tests/export/transformers_test.py, which has lm_eval, torch and this
project too. The run has random weights and a mesh of eight devices.
"""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from moe_jax import cli
from moe_jax.data import adding
from moe_jax.data.prepare import prepare
from moe_jax.data.sources import Source
from moe_jax.evaluate.harness import suite
from moe_jax.export.to_hf import export
from tests.data.conftest import write_documents
from tests.experiment_files import ROOT
from tests.export.conftest import leave_run
from tests.export.transformers_test import FOLDER

pytestmark = pytest.mark.slow

EXPERIMENT = '''
from moe_jax.config import *
from moe_jax.grid import Grid


def get_grid():
  recipe = RunConfig(
      arch=Architecture(n_layers=2, d_model=32, d_expert=16, n_exp=8, n_topk=2, n_heads=4,
                        n_kv_heads=2, vocab_size=300),
      moe=MoEConfig(norm_topk_prob=True), model=ModelConfig(compute_dtype="float32"),
      data=DataConfig(corpus="mine", tokenizer="bpe-300", seq_len=64),
      train=TrainConfig(steps=4, batch_size=16, warmup_steps=1),
      execution=ExecutionConfig(mesh=MeshConfig(2, 2, 2)))
  return Grid("asked", recipe, (recipe,))
'''
TASK = """task: next_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: FOLDER/questions.jsonl
  cache_dir: FOLDER/cache
output_type: generate_until
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
"""
TASKS = ["heldout_cloze", "heldout_choice", "heldout_bits", "next_words"]


def in_environment(*arguments, home, **environment):
  """Runs the interpreter that has lm_eval; skips the test where it is not there."""
  python = FOLDER / "bin" / "python"
  if not list(FOLDER.glob("lib/python3*/site-packages/lm_eval")):
    pytest.skip("lm_eval is not installed; make test-slow installs it")
  return subprocess.run(
      [python, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500,
      env={**os.environ, "PYTHONPATH": ROOT, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1",
           **environment})


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
  """A finished run of random weights, exported, and a folder with a local task."""
  folder = tmp_path_factory.mktemp("asked")
  out, tasks = folder / "runs", folder / "tasks"
  tasks.mkdir()
  write_documents(folder / "texts", count=60, words=400)
  adding.add("mine", Source((str(folder / "texts"),)), out / "_data")
  (folder / "asked.py").write_text(EXPERIMENT)
  (cell,) = cli.selected_cells(str(folder / "asked.py"), [])
  leave_run(out, cell)
  export(cell, out, folder / "hf")
  (tasks / "next_words.yaml").write_text(TASK.replace("FOLDER", str(tasks)))
  (tasks / "questions.jsonl").write_text("".join(json.dumps(
      {"context": f"the union of states {n} ", "target": "stands"}) + "\n" for n in range(5)))
  return folder, cell, suite.build(prepare(cell.config.data, out / "_data"), out / "_data")


def requests_of(suite_dir):
  """Of the suite, and such as are at the edges: empty, spaces at the end, far too long."""
  texts = [json.loads(line)["text"] for line in (suite_dir / "heldout_bits.jsonl").open()]
  choices = [json.loads(line) for line in (suite_dir / "heldout_choice.jsonl").open()][:8]
  pairs = [(each["context"][-size:], choice) for each, size in zip(
      choices, (10, 25, 40, 1000) * 2, strict=True) for choice in each["choices"]]
  pairs += [("", " the union"), ("the union  ", "of states"), ("Naïve 漢字", " 🙂\n"),
            (texts[0], " peace"), ("the un", "ion"), ("a", texts[1][:60])]
  settings = {"until": ["\n", " the"], "max_gen_toks": 24, "do_sample": False}
  prompts = [text[:size] for text in texts for size in (1, 10, 50, 400)]
  return {"loglikelihood": pairs,
          "loglikelihood_rolling": [(text,) for text in (*texts, "peace", texts[0][:130])],
          "generate_until": [(prompt, settings) for prompt in prompts]
          + [(prompt, {"until": [], "max_gen_toks": 40}) for prompt in prompts[:5]]}


@pytest.fixture(scope="module")
def told(asked):
  """What `python -m moe_jax.evaluate --tasks` leaves: its process, and eval/ by task."""
  folder, cell, _ = asked
  done = in_environment(
      "-m", "moe_jax.evaluate", f"--config={folder}/asked.py", f"--out={folder}/runs",
      f"--tasks={','.join(TASKS)}", f"--task_dir={folder}/tasks", home=folder / "home")
  assert done.returncode == 0, done.stderr[-3000:]
  run_dir = folder / "runs" / "asked" / cell.name
  return done, {task: json.loads((run_dir / "eval" / f"{task}.json").read_text())
                for task in TASKS}


@pytest.fixture(scope="module")
def answers(asked):
  folder, _, suite_dir = asked
  job = {"config": f"{folder}/asked.py", "out": f"{folder}/runs", "hf": f"{folder}/hf",
         "suite": str(suite_dir), "task_dir": f"{folder}/tasks", "tasks": TASKS,
         "requests": requests_of(suite_dir), "result": f"{folder}/answers.json"}
  (folder / "job.json").write_text(json.dumps(job))
  done = in_environment(str(pathlib.Path(__file__).with_name("hf_side.py")),
                        f"{folder}/job.json", home=folder / "home")
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / "answers.json").read_text())


def test_each_request_has_the_answer_of_the_hugging_face_model(answers):
  assert answers["mesh"] == {"data": 2, "fsdp": 2, "expert": 2} and answers["max_length"] == 64
  ours, theirs = (np.array(found, float) for found in answers["answers"]["loglikelihood"])
  rolling = [np.array(found) for found in answers["answers"]["loglikelihood_rolling"]]
  print(f"{len(ours)} loglikelihoods differ by {abs(ours - theirs)[:, 0].max():.1e} of "
        f"{abs(ours[:, 0]).max():.0f}, {len(rolling[0])} of whole texts by "
        f"{abs(rolling[0] - rolling[1]).max():.1e} of {abs(rolling[0]).max():.0f}")
  np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=1e-4, rtol=0)
  np.testing.assert_array_equal(ours[:, 1], theirs[:, 1])
  # lm_eval adds up a window's tokens in float32
  np.testing.assert_allclose(*rolling, atol=1e-4, rtol=1e-6)
  made, theirs = (np.array(found, float) for found in answers["answers"]["greedy"])
  np.testing.assert_allclose(made[:, 0], theirs[:, 0], atol=1e-4, rtol=0)
  np.testing.assert_array_equal(made[:, 1], theirs[:, 1])
  assert made[:, 1].any()
  ours, theirs = answers["answers"]["generate_until"]
  assert ours == theirs and len(set(ours)) > len(ours) // 3


def test_the_command_says_the_same_as_lm_eval_of_the_export(told, answers):
  done, of_task = told
  for task in TASKS:
    for column, value in answers["metrics"][task].items():
      assert of_task[task]["columns"][column] == pytest.approx(value, rel=1e-4), column
  assert of_task["heldout_choice"]["columns"]["heldout_choice.acc_se"] > 0
  assert of_task["next_words"]["questions"] == 5
  assert "heldout_choice.acc" in done.stdout and "tasks evaluated" in done.stdout
  header, row = (pathlib.Path(done.args[-3].removeprefix("--out=")) / "asked" / "results.csv"
                 ).read_text().splitlines()
  found = dict(zip(header.split(","), row.split(","), strict=True))
  assert float(found["heldout_bits.bits_per_byte"]) == pytest.approx(
      of_task["heldout_bits"]["metrics"]["heldout_bits"]["bits_per_byte"])


@pytest.mark.parametrize("name, old, new, message", [
    ("next_word", "", "", "--tasks='next_word': no such task; did you mean 'next_words'"),
    ("next_words", "task:", "task: [", "--task_dir='"),
    ("next_words", "{{context}}", "{{a.b}}", "'a' is undefined"),
    ("next_words", "exact_match", "no_such", "cannot be loaded: no_such not found")])
def test_a_wrong_task_is_one_line(asked, tmp_path, name, old, new, message):
  folder, *_ = asked
  (tmp_path / "next_words.yaml").write_text(TASK.replace(old, new).replace(
      "FOLDER", f"{folder}/tasks"))
  done = in_environment("-m", "moe_jax.evaluate", f"--config={folder}/asked.py",
                        f"--out={tmp_path}/none", f"--tasks={name}", f"--task_dir={tmp_path}",
                        home=folder / "home")
  assert done.returncode == 2 and message in done.stderr, done.stderr[-2000:]
  assert done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
