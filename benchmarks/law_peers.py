"""Compares our fitter with public ones on the same points, by the same objectives.

Chinchilla's form L = E + A / N^alpha + B / D^beta is the one that the public fitters support:
  chinchilla  https://github.com/kyo-takano/chinchilla (pip install chinchilla): BFGS from a
              grid of starts, on ln L
  vpnls       https://github.com/Open-Athena/vpnls (pip install from there): variable
              projection, on L; a grid of exponents, then L-BFGS-B
A fitter that is not installed is skipped. There are two objectives, as the peers differ in what
they minimize: the mean Huber loss (delta 1e-3) of the residuals of ln L and of L itself.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable

import numpy as np

from moe_jax.laws import solvers
from moe_jax.laws.cells import Cells
from moe_jax.laws.forms import form_for
from moe_jax.laws.solvers import DELTA, Problem, huber_sum

# E, A, B, alpha, beta
_PUBLISHED = {
    "published, Hoffmann et al.": (1.69, 406.4, 410.7, 0.34, 0.28),
    "published, Besiroglu et al.": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}


@dataclasses.dataclass(frozen=True)
class Reached:
  """The result of a fitter: (E, A, B, alpha, beta), both objectives, and seconds."""

  fitter: str
  parameters: tuple[float, ...]
  of_log: float
  of_loss: float
  seconds: float


class LossProblem(Problem):
  """The same problem with residuals of L instead of ln L."""

  def residual(self, phi: np.ndarray) -> np.ndarray:
    return np.exp(super().residual(phi) + self.y_N) - np.exp(self.y_N)

  def jacobian(self, phi: np.ndarray) -> np.ndarray:
    predicted_N = np.exp(Problem.residual(self, phi) + self.y_N)
    return predicted_N[:, None] * super().jacobian(phi)


def ours(problem_type: type[Problem], cells: Cells, starts: int) -> tuple[float, ...]:
  """Fits with this project's Huber solver, on the residuals of `problem_type`."""
  form = form_for("chinchilla", cells)
  problem = problem_type(form, form.matrix(cells), cells.log_loss)
  found = dict(zip(form.parameters, solvers.huber(problem, starts).theta, strict=True))
  return (*np.exp([found[name] for name in ("ln_E", "ln_A", "ln_B")]), found["alpha"],
          found["beta"])


def chinchilla_package(cells: Cells) -> tuple[float, ...]:
  """Fits with kyo-takano/chinchilla, from 72 starts in the range of published laws."""
  import chinchilla
  from chinchilla._metrics import log_huber
  grid = dict(e=[0.2, 0.6], a=[4.0, 6.0, 8.0], b=[5.0, 7.0, 9.0], alpha=[0.3, 0.5],
              beta=[0.3, 0.5])
  with tempfile.TemporaryDirectory() as folder:
    fitter = chinchilla.Chinchilla(
        folder, param_grid=grid, loss_fn=functools.partial(log_huber, delta=DELTA), log_level=50)
    for n, d, loss in zip(cells.columns["n_active"], cells.columns["tokens"], cells.loss,
                          strict=True):
      fitter.append(N=n, D=d, loss=loss)
    fitter.fit(parallel=False)
  return tuple(float(getattr(fitter, name)) for name in ("E", "A", "B", "alpha", "beta"))


def vpnls_package(cells: Cells, method: str, resolution: float) -> tuple[float, ...]:
  """Fits with Open-Athena/vpnls, whose units are millions of parameters and billions of tokens."""
  from vpnls.api import fit_vpnls, huber
  found = fit_vpnls(cells.columns["n_active"] / 1e6, cells.columns["tokens"] / 1e9,
                    cells.loss.copy(), method=method, resolution=resolution, loss=huber(DELTA))
  return (found.E, found.A * 1e6**found.alpha, found.B * 1e9**found.beta, found.alpha,
          found.beta)


def reached(fitter: str, run: Callable[[], tuple[float, ...]], cells: Cells) -> Reached:
  """Runs a fitter and evaluates its result by both objectives."""
  began = time.perf_counter()
  parameters = run()
  seconds = time.perf_counter() - began
  e, a, b, alpha, beta = parameters
  predicted = (e + a / cells.columns["n_active"]**alpha + b / cells.columns["tokens"]**beta)
  return Reached(fitter, parameters,
                 huber_sum(np.log(predicted) - cells.log_loss) / len(cells),
                 huber_sum(predicted - cells.loss) / len(cells), seconds)


def compare(cells: Cells, starts: int, published: bool) -> list[Reached]:
  """Runs ours on both residuals, every installed peer and, if asked, the published values."""
  runs = {"moe_jax, on ln L": functools.partial(ours, Problem, cells, starts),
          "moe_jax, on L": functools.partial(ours, LossProblem, cells, starts)}
  if importlib.util.find_spec("chinchilla"):
    version = importlib.metadata.version("chinchilla")
    runs[f"chinchilla {version}, on ln L"] = functools.partial(chinchilla_package, cells)
  if importlib.util.find_spec("vpnls"):
    runs["vpnls grid 0.001, on L"] = functools.partial(vpnls_package, cells, "grid", 0.001)
    runs["vpnls scipy, on L"] = functools.partial(vpnls_package, cells, "scipy", 0.01)
  if published:
    runs |= {name: functools.partial(tuple, values) for name, values in _PUBLISHED.items()}
  return [reached(name, run, cells) for name, run in runs.items()]


def lines(title: str, cells: Cells, starts: int, published: bool) -> list[str]:
  """Returns a Markdown table of `compare`, and whether ours is no worse than the best peer."""
  found = compare(cells, starts, published)
  text = [f"{title}: {len(cells)} points", "",
          "| fitter | mean Huber of ln L, 1e-6 | mean Huber of L, 1e-6 | E | A | B | alpha | "
          "beta | seconds |", "|---|---|---|---|---|---|---|---|---|"]
  for r in found:
    e, a, b, alpha, beta = r.parameters
    text.append(f"| {r.fitter} | {1e6 * r.of_log:.4f} | {1e6 * r.of_loss:.4f} | {e:.4f} | "
                f"{a:.4g} | {b:.4g} | {alpha:.4f} | {beta:.4f} | {r.seconds:.2f} |")
  peers = [r for r in found[2:] if r.fitter not in _PUBLISHED]
  if not peers:
    return [*text, "", "no peer is installed: pip install chinchilla"]
  for name, mine, theirs in (("ln L", found[0].of_log, min(r.of_log for r in peers)),
                             ("L", found[1].of_loss, min(r.of_loss for r in peers))):
    verdict = "no worse than" if mine <= theirs * (1 + 1e-6) else "WORSE than"
    text += ["" if name == "ln L" else None,
             f"mean Huber of {name}: ours is {verdict} the best peer's, "
             f"{1e6 * mine:.6f} against {1e6 * theirs:.6f} (1e-6)"]
  return [line for line in text if line is not None] + [""]
