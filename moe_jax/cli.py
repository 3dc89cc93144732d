"""Command lines: absl flags, `--config=FILE[:CELL]` and typed `--config.PATH=VALUE` overrides.

Every command of the project is started by `run`, so that invalid input ends with one line on
stderr and exit code 2, before anything is compiled, launched or written.
"""

import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from moe_jax import grid
from moe_jax.config import RunConfig
from moe_jax.errors import FieldError, did_you_mean
from moe_jax.fields import leaf_types, parse

EXIT_BAD_INPUT = 2
_PREFIX = "--config."
_THREADS_PER_FAKE_DEVICE = 8  # for collectives that run concurrently

flags.disclaim_key_flags()  # so that a command's --help lists the flags declared here


def define_config_flag(required: bool = True) -> flags.FlagHolder:
  """Declares `--config`, whose value `selected_cells` takes, together with the overrides."""
  return flags.DEFINE_string(
      "config", None, "Experiment file, experiments/NAME.py, or one cell of it, "
      "experiments/NAME.py:CELL, or several, :CELL,CELL. Override a field with "
      "--config.PATH=VALUE, e.g. --config.train.steps=200.", required=required)


def parse_override(argument: str) -> tuple[str, Any]:
  """`--config.train.steps=200` -> ("train.steps", 200). Raises FieldError."""
  path, equals, text = argument.removeprefix(_PREFIX).partition("=")
  known = leaf_types(RunConfig) | {grid.TOKENS: float}
  if path not in known:
    raise FieldError("config." + path, text, "no such field; "
                     + did_you_mean("config." + path, ["config." + name for name in known]))
  if not equals:
    raise FieldError("config." + path, "", "needs a value: --config." + path + "=VALUE")
  return path, parse(text, known[path], "config." + path)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits a command line into absl's arguments and the `--config.PATH=VALUE` overrides."""
  overrides = [arg for arg in argv[1:] if arg.startswith((_PREFIX, _PREFIX[1:]))]
  rest = [arg for arg in argv if arg not in overrides]
  return rest, [_PREFIX + arg.partition("config.")[2] for arg in overrides]  # one dash is two


def give_fake_devices_threads() -> None:
  """Gives XLA enough threads for the collectives of the fake devices it emulates on a CPU, if any.

  Each device's part of a collective blocks a thread of XLA's pool while it waits for the others.
  With no more threads than devices, two concurrent collectives deadlock, and XLA terminates the
  process after 40 s. XLA reads the number of processors from NPROC.
  """
  count = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
  if count:
    threads = max(_THREADS_PER_FAKE_DEVICE * int(count[1]), os.cpu_count() or 1)
    os.environ.setdefault("NPROC", str(threads))


def run(main: Callable[[list[str]], int | None]) -> None:
  """Runs `main(overrides)` under absl, with the raw --config.PATH=VALUE arguments."""
  found: list[str] = []
  for library in ("fsspec", "gcsfs"):  # they log every read, and errors that they also raise
    logging.getLogger(library).setLevel(logging.CRITICAL)

  def flags_parser(argv):
    rest, found[:] = split_overrides(argv)
    try:
      for override in found:
        if "=" not in override:  # for --config.train.steps 5, absl would complain about the 5
          parse_override(override)
      left = flags.FLAGS(rest)
    except FieldError as error:
      _fail(f"--{error}")
    except flags.Error as error:
      _fail(_in_our_words(error))
    if len(left) > 1:
      _fail(f"{left[1]!r}: not a flag; every argument is --NAME=VALUE")
    return left

  def body(_):
    try:
      code = main(found)
      sys.stdout.flush()
      return code
    except FieldError as error:
      _fail(f"--{error}")
    except BrokenPipeError:
      _end_if_nobody_reads()
      raise
    except KeyboardInterrupt:
      print("interrupted; what was finished is kept", file=sys.stderr, flush=True)
      os._exit(128 + signal.SIGINT)  # exit handlers would wait for running threads

  give_fake_devices_threads()
  app.run(body, flags_parser=flags_parser)


def _end_if_nobody_reads() -> None:
  """Exits as SIGPIPE would, which Python ignores, if it is standard output that was closed."""
  output = select.poll()
  output.register(sys.__stdout__.fileno(), 0)
  if any(event & select.POLLERR for _, event in output.poll(0)):  # `| head` has seen enough
    os._exit(128 + signal.SIGPIPE)


def selected_cells(spec: str, overrides: Sequence[str]) -> tuple[grid.Cell, ...]:
  """The cells that `--config` and the overrides select. Raises FieldError."""
  return grid.select(spec, dict(parse_override(argument) for argument in overrides))


def no_overrides(overrides: Sequence[str]) -> None:
  """Raises FieldError if a command that takes no --config.PATH=VALUE overrides was given one."""
  if overrides:
    field, _, value = overrides[0].removeprefix("--").partition("=")
    raise FieldError(field, value, "is not a flag of this command")


def _in_our_words(error: flags.Error) -> str:
  """Rephrases an absl error: the flag, its value, and what is accepted."""
  if isinstance(error, flags.UnrecognizedFlagError):
    ours = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    return f"--{error.flagname}: no such flag; {did_you_mean(error.flagname, ours, cutoff=0.6)}"
  text = " ".join(str(error).split())
  found = re.match(r"flag --(\w+)=(.*?): (.*)", text)
  if not found or found[1] not in flags.FLAGS:
    return text
  name, value, why = found.groups()
  parser = flags.FLAGS[name].parser
  if "value other than None" in why:
    return f"--{name}: is required: {flags.FLAGS[name].help.partition('. ')[0]}"
  options = ("true", "false") if parser.flag_type() == "bool" else getattr(
      parser, "enum_values", ())
  accepted = " or ".join(filter(None, options)) or parser.syntactic_help
  shown = value if re.fullmatch(r"-?[0-9.]+", value) else repr(value)
  return f"--{name}={shown}: " + (f"must be {accepted}" if accepted else why)


def require_file(flag: str, path: str | None) -> None:
  """Raises FieldError if no file can be written at `path`; to be called before any work starts."""
  if path is None:
    return
  if not path:
    raise FieldError(flag, path, "must be the name of a file")
  folder = os.path.dirname(path) or "."
  if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    raise FieldError(flag, path, "must name a file in a folder that can be written")


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(EXIT_BAD_INPUT)
