"""Typed trees of fields: what text and Python values become, and what is refused."""

import dataclasses
from typing import Literal

import pytest
from hypothesis import given, strategies

from moe_jax.errors import FieldError
from moe_jax.fields import checked, from_dict, leaf_types, leaves, override, parse


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  kind: Literal["a", "b"] = "a"

  def __post_init__(self):
    if self.kind == "b" and self.rate > 1:
      raise FieldError("rate", self.rate, "must be at most 1 for kind b")


@dataclasses.dataclass(frozen=True)
class Outer:
  count: int
  inner: Inner = Inner()
  name: str = "x"
  width: int | None = None
  on: bool = True


@pytest.mark.parametrize("text, hint, value", [
    ("7", int, 7), ("-7", int, -7), ("3e-4", float, 3e-4), ("2", float, 2.0),
    ("true", bool, True), ("False", bool, False), ("1", bool, True), ("0", bool, False),
    ("none", int | None, None), ("None", int | None, None), ("4", int | None, 4),
    ("b", Literal["a", "b"], "b"), ("a=b c", str, "a=b c"), ("", str, ""),
])
def test_text_becomes_the_annotated_type(text, hint, value):
  read = parse(text, hint, "f")
  assert read == value
  assert type(read) is type(value)


@pytest.mark.parametrize("text, hint, accepted", [
    ("7.0", int, "whole number"), ("", int, "whole number"), ("x", float, "finite number"),
    ("nan", float, "finite number"), ("inf", float, "finite number"),
    ("yes", bool, "true or false"), ("x", int | None, "whole number"),
    ("c", Literal["a", "b"], "'a' or 'b'"),
])
def test_text_of_another_type_is_refused_with_what_is_accepted(text, hint, accepted):
  with pytest.raises(FieldError, match=accepted) as caught:
    parse(text, hint, "some.field")
  assert caught.value.field == "some.field"
  assert repr(text) in str(caught.value)


@pytest.mark.parametrize("value, hint", [
    (True, int), (1, bool), (1.0, int), ("1", int), (None, int), (float("nan"), float),
    (float("inf"), float), (True, float), ("c", Literal["a", "b"]), (1, str), ([1], int),
])
def test_python_values_of_another_type_are_refused(value, hint):
  with pytest.raises(FieldError):
    checked(value, hint, "f")


def test_a_whole_number_passes_as_a_float():
  assert checked(1, float, "f") == 1
  assert checked(None, int | None, "f") is None


def test_override_reaches_nested_fields_and_leaves_the_original_alone():
  before = Outer(1)
  after = override(before, {"inner.rate": 0.25, "count": 3, "width": 8})
  assert after == Outer(3, Inner(0.25), width=8)
  assert before == Outer(1)


def test_changes_to_one_section_are_made_at_once():
  # in either order, a half-changed Inner would be refused
  wide = Outer(1, Inner(rate=5.0))
  assert override(wide, {"inner.kind": "b", "inner.rate": 0.5}).inner == Inner(0.5, "b")
  assert override(wide, {"inner.rate": 0.5, "inner.kind": "b"}).inner == Inner(0.5, "b")


def test_a_refusal_names_the_whole_path():
  with pytest.raises(FieldError, match=r"^inner\.rate=5\.0: must be at most 1"):
    override(Outer(1), {"inner.rate": 5.0, "inner.kind": "b"})


@pytest.mark.parametrize("path, offered", [
    ("cuont", "'count'"), ("inner.rat", "'rate'"), ("rate", "'inner.rate'"),
    ("inner", "'inner."), ("count.x", "'count'"),
])
def test_an_unknown_path_is_answered_with_the_nearest(path, offered):
  with pytest.raises(FieldError, match="no such field; did you mean .*" + offered):
    override(Outer(1), {path: 1})


def test_leaves_and_leaf_types_have_the_same_paths():
  assert list(leaves(Outer(1))) == list(leaf_types(Outer)) == [
      "count", "inner.rate", "inner.kind", "name", "width", "on"]


@pytest.mark.parametrize("values, message", [
    ({"count": 1}, "inner=None: is missing"),
    ({"count": 1, "extra": 2}, "extra=2: no such field"),
])
def test_from_dict_wants_every_field_and_no_other(values, message):
  with pytest.raises(FieldError, match=message):
    from_dict(Outer, values)


_whole_numbers = strategies.integers(-10**15, 10**15)


@given(strategies.builds(
    Outer, _whole_numbers,
    strategies.builds(Inner, strategies.floats(allow_nan=False, allow_infinity=False,
                                               max_value=1), strategies.sampled_from("ab")),
    strategies.text(), strategies.none() | _whole_numbers, strategies.booleans()))
def test_every_leaf_survives_being_written_as_a_flag(tree):
  changes = {path: parse(str(value), leaf_types(Outer)[path], path)
             for path, value in leaves(tree).items()}
  assert override(Outer(0), changes) == tree
  assert from_dict(Outer, dataclasses.asdict(tree)) == tree
