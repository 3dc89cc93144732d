"""Selects the text to evaluate on: a split of the run's own data or of another corpus. No JAX."""

import dataclasses
import os

from moe_jax.config import DataConfig, RunConfig
from moe_jax.errors import FieldError, did_you_mean

HELDOUT = "heldout"
SPLITS = (HELDOUT, "train")
_ANYWHERE = ("bytes", "gpt2")  # tokenizers that are not trained on a corpus


@dataclasses.dataclass(frozen=True)
class Text:
  """The text to evaluate on.

  Attributes:
    split: `heldout` or `train`.
    corpus: another corpus, as in DataConfig (the weights of a mixture have no effect here); the
      run's own if None.
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
    """Whether the corpus is the run's own."""
    return self.corpus is None

  @property
  def name(self) -> str:
    """Name of the file in eval/ and of the evaluation in results.csv."""
    return self.split if self.is_own else f"{'+'.join(self._corpora)}-{self.split}"

  @property
  def _corpora(self) -> list[str]:
    return list(DataConfig(corpus=self.corpus).mixture)

  def prepare(self, config: RunConfig, data_dir: str | os.PathLike, own):
    """Prepares the text; returns a PreparedData with all splits of the corpus.

    Another corpus is tokenized with the run's own tokenizer. If that was trained on the run's
    corpus, its file is registered under a name of its own first.

    Args:
      config: configuration of the run.
      data_dir: <out>/_data.
      own: the run's PreparedData.

    Raises:
      FieldError: the corpus is unknown, or its token ids are not those of the run.
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
      raise FieldError("corpus", self.corpus, "its tokenizer differs from the run's: "
                       f"{found.vocab_size} tokens instead of {own.vocab_size}, document-start "
                       f"token {found.document_start_id} instead of {own.document_start_id}")
    return found
