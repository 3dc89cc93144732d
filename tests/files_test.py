"""Files are whole, damage and storage out of reach are one line."""

import dataclasses
import errno
import threading

import pytest
from etils import epath

from moe_jax.errors import DamagedFile, FieldError
from moe_jax.files import reaching, read_as, read_json, write_json, write_text


def test_a_reader_sees_the_old_file_or_the_new_one_never_a_part(tmp_path):
  # as a trainer and its heartbeat thread write one status while a launcher reads it
  path = epath.Path(tmp_path) / "status.json"
  payloads = [{"who": who, "filler": [who] * 20_000} for who in range(3)]
  write_json(path, payloads[0])
  stop = threading.Event()

  def write(payload):
    while not stop.is_set():
      write_json(path, payload)

  writers = [threading.Thread(target=write, args=(payload,)) for payload in payloads]
  for writer in writers:
    writer.start()
  try:
    for _ in range(100):
      assert read_json(path) in payloads
  finally:
    stop.set()
    for writer in writers:
      writer.join()
  assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
  path = epath.Path(tmp_path) / "status.json"
  write_json(path, {"n": 1})
  with pytest.raises(UnicodeEncodeError):
    write_text(path, "half of it \ud800")
  assert read_json(path) == {"n": 1}
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "x").touch()
  with pytest.raises(OSError, match="folder cannot be written"):
    write_text(epath.Path(tmp_path) / "folder", "x")
  assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "status.json"]


@dataclasses.dataclass(frozen=True)
class Flat:
  word: str
  number: int = 0


def test_a_flat_dataclass_is_read_back_and_what_is_none_is_damage(tmp_path):
  path = epath.Path(tmp_path) / "flat.json"
  assert read_as(Flat, path) is None
  write_json(path, dataclasses.asdict(Flat("a", 2)))
  assert read_as(Flat, path) == Flat("a", 2)
  for wrong in ({"word": "a", "more": 1}, {"number": 1}, {"word": 1}, ["a"]):
    write_json(path, wrong)
    with pytest.raises(DamagedFile, match=r"flat\.json'?: is damaged"):
      read_as(Flat, path)


@pytest.mark.parametrize("raised, told", [
    (OSError(errno.ENOSPC, "No space left on device"),
     r"out='here': cannot be read or written: .*No space"),
    (type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("503\n later"),
     "out='here': cannot be read or written: 503 later")])
def test_what_storage_raises_is_one_line(raised, told):
  with pytest.raises(FieldError, match=told), reaching("here"):
    raise raised


@pytest.mark.parametrize("raised", [KeyError("a mistake"), BrokenPipeError()])
def test_what_storage_does_not_raise_is_left_alone(raised):
  with pytest.raises(type(raised)) as found, reaching("here"):
    raise raised
  assert found.value is raised
