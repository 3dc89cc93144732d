"""Names for clouds: always legal, always the same, never shared."""

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.naming import digest, resource_name

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200), st.integers(16, 63))
@example("$(reboot); 'x' \"y\"", 63)
@example("ü" * 200, 63)
@example("-", 16)
@example("", 16)
@example("9lives", 16)
@example("a" * 15 + "-" * 200, 16)
def test_every_text_gives_a_legal_name(text, limit):
  name = resource_name(text, limit)
  assert _LABEL.fullmatch(name)
  assert len(name) <= limit


@settings(max_examples=300, deadline=None)
@given(st.text("ab.-_A", max_size=70), st.text("ab.-_A", max_size=70))
def test_two_texts_never_share_a_name(one, other):
  assert (resource_name(one) == resource_name(other)) == (one == other)


def test_a_good_name_stays_and_another_keeps_what_can_be_read():
  assert resource_name("quickstart") == "quickstart"
  assert re.fullmatch(r"scaling-v1-2-[0-9a-f]{8}", resource_name("scaling_v1.2"))


def test_a_digest_tells_parts_apart():
  assert digest("ab", "c") != digest("a", "bc")
