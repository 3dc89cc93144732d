"""A run asked through our LM, its export through lm_eval's Hugging Face LM: both answers.

    python hf_side.py JOB.json

Run by the interpreter that has lm_eval, transformers and torch, and this project too.
"""

import json
import pathlib
import sys

from moe_jax.evaluate.harness import run

run.quiet()

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from moe_jax import cli  # noqa: E402
from moe_jax.data.prepare import prepare  # noqa: E402
from moe_jax.evaluate.generate import open_decoder  # noqa: E402
from moe_jax.evaluate.harness import catalogue  # noqa: E402
from moe_jax.evaluate.harness.model import CheckpointLM  # noqa: E402
from moe_jax.evaluate.harness.requests import Answerer  # noqa: E402
from moe_jax.run_dir import RunDir  # noqa: E402


def main(job):
  (cell,) = cli.selected_cells(job["config"], [])
  own = prepare(cell.config.data, f"{job['out']}/_data")
  _, decoder = open_decoder(cell, RunDir.of(job["out"], cell), own)
  ours = CheckpointLM(Answerer(decoder, own.tokenizer))
  theirs = HFLM(pretrained=job["hf"], dtype="float32", device="cpu", batch_size=8,
                add_bos_token=True)
  found = {"mesh": dict(decoder.mesh.shape), "max_length": theirs.max_length, "answers": {}}
  for method, requests in job["requests"].items():
    # Where contexts begin with a BOS, theirs puts two before a whole text and scores the second.
    theirs.add_bos_token = method != "loglikelihood_rolling"
    found["answers"][method] = [
        getattr(model, method)([Instance(method, {}, tuple(args), number)
                                for number, args in enumerate(requests)])
        for model in (ours, theirs)]
  theirs.add_bos_token = True
  # What ours made, as a continuation: greedy, where its text gives the same tokens again.
  greedy = [Instance("loglikelihood", {}, (args[0], made[:8]), 0) for args, made in zip(
      job["requests"]["generate_until"], found["answers"]["generate_until"][0], strict=True)
            if made]
  found["answers"]["greedy"] = [model.loglikelihood(greedy) for model in (ours, theirs)]
  manager = catalogue.open_manager(job["tasks"], pathlib.Path(job["suite"]), job["task_dir"])
  found["metrics"] = {}
  for task in job["tasks"]:
    theirs.add_bos_token = task != "heldout_bits"
    answer = lm_eval.simple_evaluate(model=theirs, tasks=[task], task_manager=manager,
                                     bootstrap_iters=0, log_samples=False)
    found["metrics"][task] = run.describe(task, answer)["columns"]
  pathlib.Path(job["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
  main(json.loads(pathlib.Path(sys.argv[1]).read_text()))
