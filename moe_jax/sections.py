"""The sections of a RunConfig, as frozen dataclasses that check themselves. No JAX."""

import dataclasses
import math
import re
import struct
from typing import Literal

from moe_jax.errors import require

_LEAST, _MOST = 1e-37, 1e37  # bounds for positive numbers that training computes with in float32


def _require_positive(config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(_LEAST <= value <= _MOST, name, value, f"must lie between {_LEAST:g} and {_MOST:g}")


def _in_float32(value: float) -> float:
  return struct.unpack("f", struct.pack("f", value))[0]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Routing and dispatch semantics (identity: they decide which expert sees which token).

  Attributes:
    dispatch: `capacity` (fixed slots, drops the overflow), `dropless` (one row per assignment,
      sorted by expert) or `reference` (every expert on every token: slow, drops nothing).
    capacity_factor: slots per expert and routing group are
      ceil(capacity_factor * group tokens * n_topk / n_exp).
    routing_group_tokens: tokens that compete for the same slots; a whole number of
      sequences. 0 means one sequence.
    norm_topk_prob: divide the chosen probabilities by their sum (as Qwen3-MoE does).
      Must be off for n_topk = 1 among several experts: a weight that is always 1 gives
      the router no gradient from the language-model loss.
    balance_coef: weight of the load-balance loss (1 per layer at perfect balance); None
      means 0.01 for `softmax` and 0 for the routers that balance without a loss.
    z_coef: weight of the router z-loss, which keeps the logits of a softmax small; None
      means 0.001, and 0 for `sigmoid`, whose scores it would push towards 1 / n_exp.
    router: `softmax` (Qwen3-MoE's), `sigmoid` (DeepSeek-V3's: sigmoid scores, balanced by a
      bias that only affects the selection) or `expert_choice` (each expert picks its tokens,
      n_topk experts per token on average; not causal, so for research only; its number of
      slots ignores capacity_factor and it drops nothing).
    bias_update_rate: step size of the selection bias of `sigmoid`, per training step.
    jitter: in training, the router's inputs are multiplied by noise uniform in 1 +- this.
    drop_order: which assignments `capacity` drops first, within a group and expert: those at
      later positions (`position`), or those with the lowest weights (`score`, which makes drops
      depend on later tokens too).
  """

  dispatch: Literal["capacity", "dropless", "reference"] = "capacity"
  capacity_factor: float = 1.25
  routing_group_tokens: int = 0
  norm_topk_prob: bool = True
  balance_coef: float | None = None
  z_coef: float | None = None
  router: Literal["softmax", "sigmoid", "expert_choice"] = "softmax"
  bias_update_rate: float = 1e-3
  jitter: float = 0.0
  drop_order: Literal["position", "score"] = "position"

  def __post_init__(self):
    _require_positive(self, "capacity_factor")
    require(self.routing_group_tokens >= 0, "routing_group_tokens",
            self.routing_group_tokens, "must be 0 (one sequence) or more")
    for name in ("balance_coef", "z_coef", "bias_update_rate"):
      value = getattr(self, name)
      require(value is None or 0 <= value <= _MOST, name, value,
              f"must be 0 or more, and at most {_MOST:g}")
    require(0 <= self.jitter < 1, "jitter", self.jitter, "must be at least 0 and below 1")
    if self.router == "expert_choice":
      require(self.dispatch in ("capacity", "reference"), "dispatch", self.dispatch,
              "must be 'capacity' or 'reference' for expert_choice, whose experts all take the "
              "same number of tokens")
      require(not self.norm_topk_prob, "norm_topk_prob", self.norm_topk_prob, "must be false "
              "for expert_choice: the weights of a token's experts need not sum to 1")

  @property
  def causal(self) -> bool:
    """Whether a token's output is independent of later tokens, except through capacity drops."""
    return self.router != "expert_choice"

  @property
  def balance_weight(self) -> float:
    """Weight of the balance loss, resolved."""
    default = 0.01 if self.router == "softmax" else 0.0
    return default if self.balance_coef is None else self.balance_coef

  @property
  def z_weight(self) -> float:
    """Weight of the z-loss, resolved."""
    default = 0.0 if self.router == "sigmoid" else 0.001
    return default if self.z_coef is None else self.z_coef


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Numerics of the decoder, as opposed to its shape.

  Attributes:
    compute_dtype: dtype of activations, of weights when multiplied, and of the sum of a
      weight's gradient over devices; the master weights, their moments, the router, norms,
      softmaxes and the loss are always float32.
    rope_theta: base of the rotary embedding.
    norm_eps: epsilon of every RMSNorm.
  """

  compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6

  def __post_init__(self):
    require(1 < self.rope_theta <= _MOST, "rope_theta", self.rope_theta,
            f"must be above 1, and at most {_MOST:g}")
    _require_positive(self, "norm_eps")


NAME = "[a-z0-9]+(?:[._-][a-z0-9]+)*"  # of a corpus, used in folder and job names
MIXTURE_PERIOD = 10_000  # rows over which the shares of the corpora are exact
_VOCAB_SIZES = {"bytes": 257, "gpt2": 50257}  # including the document separator


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The training data.

  Attributes:
    corpus: name of a corpus known to `python -m moe_jax.data`, e.g. `sotu`; or several
      with weights, `sotu:0.7,python:0.3`, which give their shares of the training rows.
    tokenizer: `bytes`; `bpe-N`, a byte-level BPE of N tokens trained on the corpus; `gpt2`;
      or the name that `python -m moe_jax.data` gave to a tokenizer.json, which ends in a
      hash of the file.
    seq_len: tokens per packed sequence.
    mask_documents: whether attention stops at document boundaries.
  """

  corpus: str = "sotu"
  tokenizer: str = "bytes"
  seq_len: int = 256
  mask_documents: bool = True

  def __post_init__(self):
    require(self.seq_len >= 2, "seq_len", self.seq_len, "must be at least 2")
    _ = self.mixture
    bpe = re.fullmatch("bpe-([1-9][0-9]{0,8})", self.tokenizer)
    known = int(bpe[1]) >= 257 if bpe else (
        self.tokenizer in _VOCAB_SIZES or re.fullmatch(NAME + "-[0-9a-f]{8}", self.tokenizer))
    require(bool(known), "tokenizer", self.tokenizer,
            "must be 'bytes' or 'bpe-N' with N at least 257, e.g. 'bpe-4096', or 'gpt2', or the "
            "name that python -m moe_jax.data --tokenizer=FILE gives to a tokenizer.json")

  @property
  def mixture(self) -> dict[str, float]:
    """Corpus -> its share of the rows, sorted by name; the shares sum to 1."""
    weights: dict[str, float] = {}
    for part in self.corpus.split(","):
      name, colon, weight = part.strip().partition(":")
      require(re.fullmatch(NAME, name) is not None and name not in weights
              and (bool(colon) or part == self.corpus), "corpus", self.corpus,
              "must be the name of a corpus (lower-case letters, digits, '.', '_' and '-'), or "
              "several different ones with their weights: NAME:WEIGHT,NAME:WEIGHT")
      try:
        weights[name] = float(weight) if colon else 1.0
      except ValueError:
        weights[name] = math.nan
      require(0 < weights[name] < math.inf, "corpus", self.corpus, f"the weight of {name!r} is "
              f"{weight!r}: must be a finite number above 0")
    shares = {name: weights[name] / sum(weights.values()) for name in sorted(weights)}
    least = min(shares, key=shares.get)
    require(shares[least] * MIXTURE_PERIOD > 1 - 1e-6, "corpus", self.corpus,
            f"the share of {least!r} is {shares[least]:.3g}: must be at least one row in "
            f"{MIXTURE_PERIOD}")
    return shares

  @property
  def canonical_corpus(self) -> str:
    """`corpus` with names sorted and weights normalized to sum to 1."""
    shares = self.mixture
    if len(shares) == 1:
      return next(iter(shares))
    return ",".join(f"{name}:{share:.12g}" for name, share in shares.items())

  @property
  def tokenizer_vocab_size(self) -> int | None:
    """Number of token ids the tokenizer can emit, its document separator included.

    None for a tokenizer.json, whose size is only known once the data are prepared.
    """
    bpe = re.fullmatch("bpe-([0-9]+)", self.tokenizer)
    return int(bpe[1]) if bpe else _VOCAB_SIZES.get(self.tokenizer)


_INIT_FROM = re.compile(r"(.*[^/@]/[^/@]+)(?:@([0-9]{1,16}))?")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimizer, schedule and amount of training.

  Attributes:
    steps: optimizer steps.
    batch_size: sequences per global batch.
    learning_rate: peak learning rate.
    schedule: `wsd` (warm-up, stable, linear decay) or `cosine` (warm-up, cosine decay).
    warmup_steps: steps of linear warm-up.
    decay_fraction: fraction of the steps over which `wsd` decays.
    final_learning_rate_fraction: end value of the decay, as a fraction of the peak.
    weight_decay: decoupled weight decay, on matrices only (see train/optimizer.py).
    beta1, beta2, eps: of AdamW.
    clip_norm: maximum global gradient norm.
    branch_from: `RUN@STEP` takes the first STEP steps from another `wsd` run, the trunk,
      instead of repeating them; STEP must be in the stable phase of both. RUN is a cell of
      the same experiment, EXPERIMENT/CELL, or a path. Only the amount of training, the decay
      and the execution may differ from the trunk's, so the result is the same as without
      branching, and one trunk serves several budgets (grid.trunk_and_branches).
    init_from: `RUN@STEP` initializes the parameters from another run's checkpoint; everything
      else starts fresh: step 0, optimizer, data. RUN alone means its last step. RUN is
      EXPERIMENT/CELL or a path. A dense run is upcycled if this one is an MoE
      (model/upcycle.py).
  """

  steps: int = 1000
  batch_size: int = 32
  learning_rate: float = 1e-3
  schedule: Literal["wsd", "cosine"] = "wsd"
  warmup_steps: int = 100
  decay_fraction: float = 0.2
  final_learning_rate_fraction: float = 0.0
  weight_decay: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  branch_from: str | None = None
  init_from: str | None = None

  def __post_init__(self):
    require(1 <= self.steps < 2**31, "steps", self.steps, "must be at least 1 and below 2^31")
    require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
    _require_positive(self, "learning_rate", "eps", "clip_norm")
    require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
    require(0 <= self.weight_decay <= _MOST, "weight_decay", self.weight_decay,
            f"must be 0 or more, and at most {_MOST:g}")
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      require(0 <= value < 1 and _in_float32(value) < 1, name, value,
              "must be at least 0 and below 1, as a float32 too")
    for name in ("decay_fraction", "final_learning_rate_fraction"):
      require(0 <= getattr(self, name) <= 1, name, getattr(self, name),
              "must lie between 0 and 1")
    stable = self.stable_steps if self.schedule == "wsd" else self.steps
    require(self.warmup_steps <= stable, "warmup_steps",
            self.warmup_steps, f"with {self.steps - stable} steps of decay must fit into the "
            f"{self.steps} steps of training")
    if self.branch_from is not None:
      require(re.fullmatch(r".+@[1-9][0-9]{0,15}", self.branch_from) is not None, "branch_from",
              self.branch_from, "must be RUN@STEP: a cell of the same experiment, "
              "EXPERIMENT/CELL or a path, and a step above 0")
      require(self.schedule == "wsd", "branch_from", self.branch_from,
              "needs the schedule 'wsd', which has a stable phase to branch from")
      require(self.warmup_steps <= self.branch_step <= stable, "branch_from", self.branch_from,
              f"must name a step of this run's stable phase, from {self.warmup_steps} (the end "
              f"of the warm-up) to {stable} (where its decay begins)")
    require(self.init_from is None or _INIT_FROM.fullmatch(self.init_from) is not None,
            "init_from", self.init_from, "must be RUN or RUN@STEP: RUN is EXPERIMENT/CELL or a "
            "path, e.g. quickstart/l2-d152-f70-e8-k2@240")

  @property
  def stable_steps(self) -> int:
    """Steps before `wsd` begins to decay, warm-up included."""
    return self.steps - round(self.steps * self.decay_fraction)

  @property
  def init_run(self) -> str | None:
    """RUN of `init_from`."""
    return None if self.init_from is None else _INIT_FROM.fullmatch(self.init_from)[1]

  @property
  def init_step(self) -> int | None:
    """STEP of `init_from`; None for the run's last step, and without `init_from`."""
    step = self.init_from and _INIT_FROM.fullmatch(self.init_from)[2]
    return int(step) if step else None

  @property
  def branch_run(self) -> str | None:
    """RUN of `branch_from`."""
    return None if self.branch_from is None else self.branch_from.rpartition("@")[0]

  @property
  def branch_step(self) -> int | None:
    """STEP of `branch_from`."""
    return None if self.branch_from is None else int(self.branch_from.rpartition("@")[2])


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Number of devices along each mesh axis; `data` = -1 takes all remaining devices."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1

  def __post_init__(self):
    require(self.data == -1 or self.data >= 1, "data", self.data,
            "must be at least 1, or -1 for all devices left over")
    for name in ("fsdp", "expert"):
      require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """How a run is executed. May change between attempts at the same run.

  Attributes:
    mesh: how devices are laid out.
    remat: what the backward pass recomputes: `none`, `dots` (all but the dense projections:
      attention scores and routed experts are recomputed), `rows` (all but what is
      expensive to recompute: the rows that experts received and, on a TPU, the output of
      attention) or `full` (each layer, from its input and the saved routing decisions).
    microbatches: number of parts the global batch is processed in sequentially, to save memory.
      The result does not change; values above 1 cost an additional forward pass.
    log_every: steps between two records of metrics.
    checkpoint_every: steps between two checkpoints.
    keep_checkpoints: how many of the latest checkpoints are kept.
    keep_steps: steps whose checkpoints are written and kept in any case. A grid adds those from
      which its cells branch or are initialized.
    population: maximum number of cells of one shape (population.py) that train together in one
      process, on one device. The result does not change, up to rounding; 1 means one at a time.
  """

  mesh: MeshConfig = MeshConfig()
  remat: Literal["none", "dots", "rows", "full"] = "none"
  microbatches: int = 1
  log_every: int = 10
  checkpoint_every: int = 200
  keep_checkpoints: int = 2
  keep_steps: tuple[int, ...] = ()
  population: int = 1

  def __post_init__(self):
    for name in ("microbatches", "log_every", "checkpoint_every", "keep_checkpoints",
                 "population"):
      require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    require(isinstance(self.keep_steps, tuple)
            and all(isinstance(step, int) and step >= 1 for step in self.keep_steps),
            "keep_steps", self.keep_steps, "must be a tuple of steps of at least 1")
