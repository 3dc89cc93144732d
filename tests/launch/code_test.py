"""The code that is sent: exactly what is here, and nothing that was not meant."""

import io
import json
import subprocess
import tarfile

import pytest

from launch.code import pack
from moe_jax.errors import FieldError


def _git(root, *arguments):
  subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=root,
                 check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
  root = tmp_path / "checkout"
  root.mkdir()
  _git(root, "init", "--quiet")
  (root / "kept.py").write_text("kept = 1\n")
  (root / "study.py").write_text("study = 1\n")
  (root / ".gitignore").write_text(".env\n")
  _git(root, "add", ".")
  _git(root, "commit", "--quiet", "-m", "first")
  return root


def _files(code):
  with tarfile.open(fileobj=io.BytesIO(code.archive)) as tar:
    return {member.name: tar.extractfile(member).read().decode()
            for member in tar if member.isfile()}


def test_a_clean_checkout_is_its_head(checkout):
  code = pack(str(checkout / "study.py"), checkout)
  assert _files(code).keys() == {"kept.py", "study.py", ".gitignore", "code.json"}
  assert code.experiment == "study.py"
  assert not code.commit.endswith("+")
  assert json.loads(_files(code)["code.json"])["commit"] == code.commit


def test_what_differs_is_sent_and_recorded(checkout):
  before = pack(str(checkout / "study.py"), checkout)
  (checkout / "kept.py").write_text("kept = 2\n")
  code = pack(str(checkout / "study.py"), checkout)
  assert _files(code)["kept.py"] == "kept = 2\n"
  assert code.commit == before.commit + "+"
  assert code.sha256 != before.sha256
  assert pack(str(checkout / "study.py"), checkout) == code  # the same files, the same bytes


def test_untracked_files_stay_here_and_are_named(checkout):
  (checkout / "draft.py").write_text("")
  (checkout / "token.txt").write_text("secret")
  (checkout / ".env").write_text("secret")
  code = pack(str(checkout / "study.py"), checkout)
  assert code.left_out == ("draft.py",)
  assert not {"draft.py", "token.txt", ".env"} & set(_files(code))


def test_the_experiment_is_sent_wherever_it_is(checkout, tmp_path):
  (checkout / "new.py").write_text("new = 1\n")
  code = pack(str(checkout / "new.py"), checkout)
  assert _files(code)["new.py"] == "new = 1\n"
  (tmp_path / "outside.py").write_text("outside = 1\n")
  code = pack(str(tmp_path / "outside.py"), checkout)
  assert code.experiment == "_submitted/outside.py"
  assert _files(code)[code.experiment] == "outside = 1\n"


def test_the_checkout_is_left_as_it_was(checkout):
  (checkout / "kept.py").write_text("kept = 2\n")
  (checkout / "new.py").write_text("")

  def state():
    return [subprocess.run(["git", *command], cwd=checkout, capture_output=True).stdout
            for command in (["status", "--porcelain"], ["count-objects"], ["diff", "--cached"])]

  before = state()
  pack(str(checkout / "new.py"), checkout)
  assert state() == before


def test_without_a_checkout_the_answer_is_one_line(tmp_path):
  (tmp_path / "study.py").write_text("")
  with pytest.raises(FieldError, match="must be a git checkout to .*: .*not a git repository"):
    pack(str(tmp_path / "study.py"), tmp_path)
