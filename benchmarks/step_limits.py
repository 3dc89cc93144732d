"""Lower bounds on a training step: its matrix products, and the bytes it must move."""

from typing import NamedTuple

from moe_jax.arch import Architecture


class Product(NamedTuple):
  """A batched product [rows, inner] @ [inner, columns] that a step performs `count` times.

  Attributes:
    transposed: which factor is stored transposed: "left", "right", or empty for neither. A step has
      all three: forward (neither), gradient of the inputs (right) and of the weights (left).
  """

  name: str
  count: int
  batch: int
  rows: int
  inner: int
  columns: int
  transposed: str

  @property
  def flops(self) -> int:
    return 2 * self.count * self.batch * self.rows * self.inner * self.columns

  @property
  def elements(self) -> int:
    """Elements of factors and results, each counted once."""
    return self.count * self.batch * (self.rows * self.inner + self.inner * self.columns
                                      + self.rows * self.columns)


def products(arch: Architecture, sequences: int, seq_len: int) -> list[Product]:
  """Products of forward and backward pass, with half of the scores (causal) and no drops."""
  tokens, layers = sequences * seq_len, arch.n_layers
  d, f, h = arch.d_model, arch.d_expert, arch.d_head
  assigned = tokens * arch.n_topk // arch.n_exp
  heads = arch.n_heads * h
  forward = [("queries, output", 2 * layers, 1, tokens, d, heads),
             ("keys, values", 2 * layers, 1, tokens, d, arch.kv_heads * h),
             ("router", layers, 1, tokens, d, arch.n_exp),
             ("gate and up", layers, arch.n_exp, assigned, d, 2 * f),
             ("down", layers, arch.n_exp, assigned, f, d),
             ("scores", layers, sequences * arch.n_heads, seq_len, h, seq_len // 2),
             ("values", layers, sequences * arch.n_heads, seq_len, seq_len // 2, h),
             ("head", 1, 1, tokens, d, arch.vocab_size)]
  return [made for name, count, batch, m, k, n in forward
          for made in (Product(name, count, batch, m, k, n, ""),
                       Product(name, count, batch, m, n, k, "right"),
                       Product(name, count, batch, k, m, n, "left"))]


def matmul_seconds(made: list[Product], *measured: list[float]) -> float:
  """Seconds of all products, each at the fastest time measured for its shape."""
  return sum(product.count * min(seconds)
             for product, seconds in zip(made, zip(*measured, strict=True), strict=True))


def step_bytes(made: list[Product], n_params: int, itemsize: int) -> int:
  """Bytes of a step: each product's arrays once, plus AdamW in float32: 4 reads and 3 writes."""
  return itemsize * sum(product.elements for product in made) + 7 * 4 * n_params
