"""Flags that the commands which read results and fit a law have in common."""

from absl import flags

from moe_jax.laws.forms import FORMS

flags.disclaim_key_flags()  # they are the commands', whose --help lists them


def define_rows_flags(cells_of: str = "--results") -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Declares --where and --without, as `table.read_results` takes them.

  Args:
    cells_of: the flags whose cells --without names.
  """
  return (
      flags.DEFINE_multi_string("where", [], "COLUMN=VALUE: keep these rows of --results alone, "
                                "e.g. state=finished. May be repeated."),
      flags.DEFINE_list("without", [], f"Cells of {cells_of} to leave out, by name."))


def define_law_flag(which: str = "The form to fit") -> flags.FlagHolder:
  """Declares --law; `which` says what the form is."""
  return flags.DEFINE_string("law", "paper", f"{which}: {', '.join(FORMS)}.")
