"""Data: corpora as TFDS datasets, tokenizers, packed rows for training and evaluation."""
