"""Flags shared by the commands that read results and fit a law."""

from absl import flags

from moe_jax.laws.forms import FORMS

flags.disclaim_key_flags()  # so that each command's --help lists them as its own


def define_rows_flags(cells_of: str = "--results") -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Declares --where and --without, in the form `table.read_results` expects.

  Args:
    cells_of: the flags that provide the cells --without refers to, for the help text.
  """
  return (
      flags.DEFINE_multi_string("where", [], "COLUMN=VALUE: use only these rows of --results, "
                                "e.g. state=finished. May be repeated."),
      flags.DEFINE_list("without", [], f"Names of cells of {cells_of} to leave out."))


def define_law_flag(which: str = "The form to fit") -> flags.FlagHolder:
  """Declares --law; `which` begins its help text."""
  return flags.DEFINE_string("law", "paper", f"{which}: {', '.join(FORMS)}.")
