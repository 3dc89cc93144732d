"""The check of the kernels finds what is wrong with them."""

import jax.numpy as jnp

from benchmarks import kernels


def test_what_is_right_passes_and_what_is_wrong_does_not():
  found = {name: (ours, exactly, members) for name, ours, exactly, members in kernels.cases(
      True, matrices=((20, 12),), widths=(16,))}
  assert len(found) == 2
  for ours, exactly, members in found.values():
    errors = kernels.errors(ours, exactly, members)
    assert errors.keys() == {"alone", "population"}
    assert all(1e-4 < error < kernels.MOST for error in errors.values())

    def wrong(*arrays, ours=ours):
      first, *others = ours(*arrays)
      return first, *(jnp.roll(x, 1, axis=-1) for x in others)

    assert min(kernels.errors(wrong, exactly, members).values()) > 1
