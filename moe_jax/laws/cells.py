"""The data points a law is fitted to: one loss per architecture and training budget."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.errors import FieldError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Cells:
  """Arrays over n cells; seeds and learning rates are already reduced (moe_jax.laws.reduce).

  Attributes:
    names: a unique name for each cell.
    loss: the loss, positive.
    columns: the variables under the project's names, positive: n_total, n_exp, tokens ...
    architecture: the architecture index of each cell; errors are clustered by it.
    loss_se: standard error of the loss due to seeds; NaN where it is not known.
    seeds: effective number of runs averaged into each loss: the number of seeds, or its
      equivalent for the vertex of a learning-rate sweep.
    notes: lines for the report on how the cells were obtained.
    runs: the rows of the results table behind each loss; empty if there is no table.
    unused: the rows that are in no cell, each with the reason under table.UNUSED.
  """

  names: tuple[str, ...]
  loss: np.ndarray
  columns: Mapping[str, np.ndarray]
  architecture: np.ndarray
  loss_se: np.ndarray
  seeds: np.ndarray
  notes: tuple[str, ...] = ()
  runs: tuple[tuple[Mapping[str, Any], ...], ...] = ()
  unused: tuple[Mapping[str, Any], ...] = ()

  @classmethod
  def of(cls, loss: ArrayLike, names: tuple[str, ...] | None = None,
         architecture: ArrayLike | None = None, loss_se: ArrayLike | None = None,
         notes: tuple[str, ...] = (), seeds: ArrayLike = 1.0,
         **columns: ArrayLike) -> "Cells":
    """Builds cells from plain arrays, deriving sparsity, granularity and core where possible.

    Without `architecture` every cell is an architecture of its own. Raises FieldError for a
    value that is not finite and positive.
    """
    loss = np.asarray(loss, float)
    n = len(loss)
    arrays = {name: np.broadcast_to(np.asarray(values, float), (n,))
              for name, values in columns.items()}
    if "sparsity" not in arrays and {"n_exp", "n_topk"} <= set(arrays):
      arrays["sparsity"] = arrays["n_exp"] / arrays["n_topk"]
    if "granularity" not in arrays and {"d_model", "d_expert"} <= set(arrays):
      arrays["granularity"] = arrays["d_model"] / arrays["d_expert"]
    if {"n_layers", "d_model"} <= set(arrays):
      arrays["core"] = arrays["n_layers"] * arrays["d_model"]**2
    names = names if names is not None else tuple(f"cell {i}" for i in range(n))
    for name, values in {"loss": loss, **arrays}.items():
      for i in np.flatnonzero(~(np.isfinite(values) & (values > 0))):
        raise FieldError(name, float(values[i]),
                         f"{names[i]}: must be a finite number above 0")
    clusters = np.arange(n) if architecture is None else np.unique(
        np.asarray(architecture), axis=0, return_inverse=True)[1].reshape(n)
    errors = np.full(n, np.nan) if loss_se is None else np.asarray(loss_se, float)
    return cls(names, loss, arrays, clusters, errors,
               np.broadcast_to(np.asarray(seeds, float), (n,)), notes)

  def __len__(self) -> int:
    return len(self.loss)

  @property
  def n_architectures(self) -> int:
    return len(np.unique(self.architecture))

  @property
  def seed_noise(self) -> float:
    """Standard deviation of ln L between seeds; NaN where no cell was repeated."""
    return float(np.mean(self.loss_se / self.loss * np.sqrt(self.seeds)))

  @property
  def log_loss(self) -> np.ndarray:
    return np.log(self.loss)

  def log(self, column: str) -> np.ndarray:
    """Returns ln of a column. Raises FieldError if the data have no such column."""
    if column not in self.columns:
      raise FieldError("column", column, "is not in these data; "
                       + did_you_mean(column, list(self.columns)))
    return np.log(self.columns[column])

  def take(self, which: np.ndarray) -> "Cells":
    """Returns the cells selected by a mask or by indices, in that order."""
    index = np.arange(len(self))[which]
    return dataclasses.replace(
        self, names=tuple(self.names[i] for i in index), loss=self.loss[index],
        columns={name: values[index] for name, values in self.columns.items()},
        architecture=self.architecture[index], loss_se=self.loss_se[index],
        seeds=self.seeds[index], runs=tuple(self.runs[i] for i in index if self.runs))
