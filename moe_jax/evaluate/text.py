"""Which text is evaluated: a split of the run's own data, or of any other corpus. No JAX."""

import dataclasses
import os

from moe_jax.config import DataConfig, RunConfig
from moe_jax.errors import FieldError, did_you_mean

HELDOUT = "heldout"
SPLITS = (HELDOUT, "train")
_ANYWHERE = ("bytes", "gpt2")  # tokenizers that no corpus has trained


@dataclasses.dataclass(frozen=True)
class Text:
  """What is evaluated.

  Attributes:
    split: `heldout` or `train`.
    corpus: another corpus than the run's own; as DataConfig's, of which weights say nothing
      here.
  """

  split: str = HELDOUT
  corpus: str | None = None

  def __post_init__(self):
    if self.split not in SPLITS:
      raise FieldError("split", self.split, "must be heldout or train; "
                       + did_you_mean(self.split, list(SPLITS)))
    if self.corpus is not None:
      try:
        DataConfig(corpus=self.corpus)
      except FieldError as error:
        raise FieldError("corpus", self.corpus, error.accepted) from None

  @property
  def is_own(self) -> bool:
    """Whether it is of the data that the run was trained on."""
    return self.corpus is None

  @property
  def name(self) -> str:
    """Of the file in eval/, and of the evaluation in results.csv."""
    return self.split if self.is_own else f"{'+'.join(self._corpora)}-{self.split}"

  @property
  def _corpora(self) -> list[str]:
    return list(DataConfig(corpus=self.corpus).mixture)

  def prepare(self, config: RunConfig, data_dir: str | os.PathLike, own):
    """The PreparedData that holds it.

    Another corpus is cut by the very tokenizer of the run: one that was trained on the run's
    corpus is a file, which gets a name of its own.

    Args:
      config: of the run.
      data_dir: <out>/_data.
      own: the run's PreparedData.

    Raises:
      FieldError: the corpus is unknown, or its tokens are not those of the model.
    """
    if self.is_own:
      return own
    from moe_jax.data import mirror, tokenizer
    from moe_jax.data.prepare import prepare
    name = config.data.tokenizer
    if config.data.tokenizer_vocab_size is not None and name not in _ANYWHERE:  # bpe-N
      name = tokenizer.add(own.directory / tokenizer.FILE, mirror.home(data_dir))
    try:
      found = prepare(DataConfig(corpus=self.corpus, tokenizer=name), data_dir)
    except FieldError as error:
      raise FieldError("corpus", self.corpus, error.accepted) from None
    if (found.vocab_size, found.document_start_id) != (own.vocab_size, own.document_start_id):
      raise FieldError("corpus", self.corpus, f"its tokens are not those of the run: "
                       f"{found.vocab_size} and {own.vocab_size}, documents begin with "
                       f"{found.document_start_id} and {own.document_start_id}")
    return found
