import pytest

from moe_jax.text import natural, short


@pytest.mark.parametrize("number, text", [
    (None, ""), (0, "0"), (7, "7"), (999, "999"), (999.6, "1k"), (1000, "1k"),
    (1_234_567, "1.23M"), (999_999, "1M"), (67e9, "67B"), (1.5e12, "1.5T"), (0.25, "0.25"),
])
def test_three_digits(number, text):
  assert short(number) == text


def test_numbers_in_names_sort_by_value():
  names = ["a/l10-e8", "a/l2-e16", "a/l2-e8", "a/l2-e8-s1", "B/l2", "10", "9"]
  assert sorted(names, key=natural) == [
      "9", "10", "B/l2", "a/l2-e8", "a/l2-e8-s1", "a/l2-e16", "a/l10-e8"]
