import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.errors import FieldError
from moe_jax.plan import topology


@pytest.mark.parametrize("name, chips, devices, shape", [
    ("v4-8", 4, 4, (2, 2, 1)),
    ("v5p-8", 4, 4, (2, 2, 1)),
    ("v5p-64", 32, 32, (2, 4, 4)),
    ("v5p-2048", 1024, 1024, (8, 8, 16)),
    ("v5p-12288", 6144, 6144, (16, 16, 24)),
    ("v5litepod-16", 16, 16, (4, 4)),
    ("v6e-256", 256, 256, (16, 16)),
    ("tpu7x-8", 4, 8, (2, 2, 1)),
])
def test_names_count_what_gcloud_counts(name, chips, devices, shape):
  found = topology.parse(name)
  assert (found.chips, found.devices, found.shape) == (chips, devices, shape)


@given(st.sampled_from(topology.names()), st.integers(1, 4))
def test_every_name_parses(name, n_slices):
  found = topology.parse(name, n_slices)
  prefix, _, number = name.rpartition("-")
  cores = {"v4": 2, "v5p": 2, "tpu7x": 2, "v5litepod": 1, "v6e": 1}[prefix]
  assert found.chips * cores == int(number) * n_slices
  assert found.label == (name if n_slices == 1 else f"{name}x{n_slices}")


@pytest.mark.parametrize("name, offered", [
    ("v5p-63", "v5p-32 and v5p-64"),
    ("v5p-48", "v5p-32 and v5p-64"),
    ("v6e-512", "the nearest are v6e-256"),
    ("v5lite-16", "did you mean v5litepod-16"),
    ("v5e-8", "did you mean v5litepod-8?"),
    ("V5P-64", "did you mean v5p-64?"),
    ("v5p-²", "did you mean"),
    ("h100-8", "there are v4-N, v5litepod-N"),
    ("", "e.g. v5p-64"),
])
def test_an_unknown_slice_is_answered_with_the_nearest(name, offered):
  with pytest.raises(FieldError, match="no such slice|table of slices") as error:
    topology.parse(name)
  assert offered in str(error.value)


@pytest.mark.parametrize("name", ["v5p-064", "v6e-016", "v4-0"])
def test_a_number_that_begins_with_zero_is_refused(name):
  with pytest.raises(FieldError, match=f"{name}.*not begin with zero"):
    topology.parse(name)


def test_no_slices_is_refused():
  with pytest.raises(FieldError, match="slices=0"):
    topology.parse("v5p-8", 0)


def test_what_wraps():
  assert all(topology.parse("v5p-128").wraps(i) for i in range(3))  # 4x4x4
  assert not any(topology.parse("v5p-64").wraps(i) for i in range(3))  # 2x4x4
  assert [topology.parse("v5litepod-128").wraps(i) for i in range(2)] == [False, True]
