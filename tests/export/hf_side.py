"""The side of transformers: run by its own interpreter, which has torch.

    python hf_side.py JOBS.json

A job makes a random model and saves it, or runs one that lies in a directory. Several run in one
process, for most of the time goes into imports.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def make(job):
  """Saves a random model whose weights are large enough to make experts differ."""
  torch.manual_seed(job["seed"])
  config = transformers.AutoConfig.for_model(**job["config"])
  model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim == 1:  # norm scales, which begin at 1
        weight.uniform_(0.5, 1.5)
      else:
        weight.normal_(0, 1.0 if "gate.weight" in name else 0.2)
  model.save_pretrained(job["dir"], max_shard_size=job["shard"])
  wanted = job["config"].get("experts_implementation")
  if wanted:  # it is not saved, and needed to run
    file = pathlib.Path(job["dir"], "config.json")
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"experts_implementation": wanted}))


def run(job):
  """Logits, the experts of each token and the balance loss, or the loss of each document."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      job["dir"], dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
  wrong = {name: sorted(map(str, found)) for name, found in info.items() if found}
  assert not wrong, wrong
  model.eval()
  with torch.no_grad():
    if "documents" in job:
      result = {"nats": _nats(model, np.load(job["documents"]))}
    else:
      result = _outputs(model, torch.from_numpy(np.load(job["tokens"])).long())
  if "text" in job:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["dir"])
    result["ids"] = np.array(tokenizer.encode(job["text"], add_special_tokens=False))
    result["back"] = np.array(tokenizer.decode(result["ids"].tolist()))
    result["start"] = np.array(tokenizer.bos_token_id)
  np.savez(job["result"], version=np.array(transformers.__version__), **result)


def _outputs(model, tokens):
  done = model(tokens, output_router_logits=True, use_cache=False)
  gates = torch.stack([layer for layer in done.router_logits if layer is not None])
  experts = torch.topk(gates, model.config.num_experts_per_tok, dim=-1).indices
  return {"logits": done.logits.numpy(), "experts": np.sort(experts.numpy(), -1),
          "balance": np.array(float(done.aux_loss)), "theta": np.array(_theta(model.config))}


def _theta(config):
  parameters = getattr(config, "rope_parameters", None)
  return parameters["rope_theta"] if parameters else config.rope_theta


def _nats(model, documents):
  """The summed loss of each row of tokens; -1 fills it up."""
  nats = []
  for row in documents:
    tokens = torch.from_numpy(row[row >= 0]).long()[None]
    logits = model(tokens, use_cache=False).logits
    nats.append(float(torch.nn.functional.cross_entropy(
        logits[0, :-1], tokens[0, 1:], reduction="sum").double()))
  return np.array(nats)


if __name__ == "__main__":
  torch.set_num_threads(1)
  with open(sys.argv[1], encoding="utf-8") as file:
    for each in json.load(file):
      {"make": make, "run": run}[each["do"]](each)
