"""Submits work to other machines: uploads code and files first, then runs commands."""

import contextlib
import dataclasses
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Sequence

from etils import epath

from launch.code import Code
from launch.jobs import Job, read_launch, write_launch
from launch.plans import Plan, SlicePlan, with_folder
from launch.state import PENDING
from moe_jax.errors import FieldError
from moe_jax.files import is_local, write_bytes, write_text

TIMEOUT_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Answer:
  """A command's exit code and output. `code` is None if it timed out."""

  code: int | None
  stdout: str
  stderr: str

  @property
  def ok(self) -> bool:
    return self.code == 0

  @property
  def error(self) -> str:
    """Why it failed, in one line."""
    if self.code is None:
      return f"no answer in {TIMEOUT_SECONDS:.0f} s"
    lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("ERROR")), None)
    return told or (lines[-1] if lines else f"exit code {self.code}")


Run = Callable[[Sequence[str]], Answer]


def run(command: Sequence[str]) -> Answer:
  """Runs a command of a cloud's own tool. Raises FieldError if the tool is not installed."""
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
                          stdin=subprocess.DEVNULL, errors="replace")
  except FileNotFoundError:
    raise FieldError("backend", command[0], "is not on PATH; this backend needs it") from None
  except subprocess.TimeoutExpired as error:
    return Answer(None, _text(error.stdout), _text(error.stderr))
  return Answer(done.returncode, done.stdout, done.stderr)


def _text(output: bytes | str | None) -> str:
  return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def why_not_writable(out: str) -> str | None:
  """Returns why nothing can be written under `out`, in one line, or None."""
  probe = epath.Path(out) / "_code" / "probe"
  try:
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text("writable")
    probe.unlink()
  except Exception as error:  # each file system raises its own
    return f"cannot write to --out={out}: {' '.join(str(error).split())}"
  return None


def upload(code: Code, out: str) -> None:
  """Uploads the code, named by its hash, unless it is already there."""
  target = epath.Path(out) / "_code" / code.file_name
  if not target.exists():
    write_bytes(target, code.archive)


def write_files(plan: Plan, share: SlicePlan) -> None:
  for file in share.files:
    write_text(epath.Path(plan.out) / file.path, file.text)


def execute(share: SlicePlan, run: Run) -> str | None:
  """Runs a slice's commands with a local copy of its files. Returns the first error, or None."""
  with tempfile.TemporaryDirectory(prefix="moe_jax-") as folder:
    for file in share.files:
      copy = pathlib.Path(folder, file.path)
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_text(file.text)
    for command in share.commands:
      answer = run(with_folder(command, folder))
      if not answer.ok:
        return answer.error
  return None


def note_on(out: str) -> tuple[str, ...]:
  """Returns a note if --out is a local path, which other machines may not see."""
  if not is_local(out):
    return ()
  return (f"--out={out} is a local path: every machine must see the same directory there",)


def begin_anew(plan: Plan, share: SlicePlan, jobs: Sequence[Job]) -> None:
  """Resets a slice before its work begins: removes the now.json of earlier agents, and makes
  unfinished cells eligible again, with no failures counted."""
  for file in share.files:
    if file.path.endswith("work.json"):
      (epath.Path(plan.out) / file.path).with_name("now.json").unlink(missing_ok=True)
  wanted = set(share.cells)
  for job in jobs:
    if job.name in wanted and not job.is_finished():
      with contextlib.suppress(FieldError):  # a damaged file is the trainer's to refuse
        launch = read_launch(job.run_dir)
        if launch is not None and launch.ended is not None:
          write_launch(job.run_dir, dataclasses.replace(launch, state=PENDING, failures=0))
