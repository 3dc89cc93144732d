import pytest

from moe_jax.design.units import parse_count, parse_gigabytes, parse_range
from moe_jax.errors import FieldError


@pytest.mark.parametrize("text, value", [
    ("200M", 2e8), ("9B", 9e9), ("1T", 1e12), ("1.5e9", 1.5e9), ("64", 64), ("3k", 3e3),
    ("2G", 2e9), (".5m", 5e5)])
def test_counts(text, value):
  assert parse_count("tokens", text) == pytest.approx(value)


@pytest.mark.parametrize("text, value", [
    ("16", 16), ("16GB", 16), ("16 gb", 16), ("16GiB", 17.179869184), ("2TB", 2000),
    ("500MB", 0.5)])
def test_sizes_are_decimal_gigabytes(text, value):
  assert parse_gigabytes("memory_gb", text) == pytest.approx(value)


def test_a_range():
  assert parse_range("aspect", "32:128") == (32, 128)


@pytest.mark.parametrize("parse, text", [
    (parse_count, "200MB"), (parse_count, "-3M"), (parse_count, "0"), (parse_count, "many"),
    (parse_count, "1e999"), (parse_count, ""), (parse_gigabytes, "16 bits"),
    (parse_gigabytes, "0GB"), (parse_range, "128:32"), (parse_range, "8"), (parse_range, "0:4"),
    (parse_range, "1:2:3"), (parse_range, "a:b"), (parse_range, "1:inf")])
def test_bad_input_names_the_flag(parse, text):
  with pytest.raises(FieldError, match="^flag=.*must be") as error:
    parse("flag", text)
  assert "\n" not in str(error.value)
