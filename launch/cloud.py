"""Interprets gcloud's answers about queued resources."""

import json
import re
from typing import Any

from launch.backends import gcloud
from launch.backends.gcloud import LABEL, Options
from launch.remote import Answer, Run
from launch.slices import Seen

# Case-sensitive: "gcloud crashed (FileNotFoundError)" says nothing about a resource.
_NOT_FOUND = re.compile(r"\bNOT_FOUND\b|was not found|\bnotFound\b|\bcode=404\b")
_EXISTS = re.compile(r"ALREADY_EXISTS|already exists", re.IGNORECASE)
# Must not match "... which is the active account": gcloud ends every 401, 403 and 404 with it.
_CREDENTIALS = re.compile(r"not (currently )?have an active account|reauth|invalid_grant|"
                          r"UNAUTHENTICATED|auth tokens|auth login", re.IGNORECASE)
# gcloud also asks for a login when it only failed to reach the server that refreshes its token.
_NETWORK = re.compile(r"ConnectionPool|NameResolution|max retries|timed? ?out|temporary failure|"
                      r"connection (refused|reset|aborted)|unreachable", re.IGNORECASE)
_LATER = re.compile(r"\b429\b|rate.?limit|too many requests|per minute|UNAVAILABLE|"
                    r"\b(HTTPError|status|code)\W+50[0-4]\b|INTERNAL|deadline|timed? ?out|"
                    r"connection|temporar", re.IGNORECASE)


class Unclear(RuntimeError):
  """The cloud's answer is inconclusive; the caller asks again later."""


class NoCredentials(RuntimeError):
  """The account must log in again, which only a person can do."""


def describe(name: str, options: Options, zone: str, label: str, run: Run) -> Seen | None:
  """Returns the queued resource of that name, or None. Raises Unclear or NoCredentials."""
  answer = run(gcloud.describe(name, options, zone))
  if not answer.ok:
    if _is_not_found(answer):
      return None
    _require_credentials(answer)
    raise Unclear(answer.error)
  try:
    return parse(json.loads(answer.stdout), label)
  except (json.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
    raise Unclear(f"cannot parse gcloud's output: {error}") from None


def parse(resource: dict[str, Any], label: str) -> Seen:
  """Parses a QueuedResource message of the Cloud TPU API v2, as gcloud prints it."""
  state = resource["state"]
  failed = state.get("failedData", {}).get("error", {})
  return Seen(state["state"], state.get("stateInitiator"), failed.get("message"),
              label_of(resource) == label)


def label_of(resource: dict[str, Any]) -> str | None:
  """Returns the value of this project's label on a resource, or None if it has none."""
  specs = resource.get("tpu", {}).get("nodeSpec", [])
  return specs[0].get("node", {}).get("labels", {}).get(LABEL) if specs else None


def create_error(answer: Answer) -> tuple[str, bool] | None:
  """Returns None if the resource was requested, else (why not, whether to retry later).

  Raises:
    NoCredentials: the account must log in again.
  """
  if answer.ok or _EXISTS.search(answer.stderr):  # the next describe shows whose it is
    return None
  _require_credentials(answer)
  return answer.error, answer.code is None or _LATER.search(answer.stderr) is not None


def delete(name: str, options: Options, zone: str, run: Run) -> str | None:
  """Requests a deletion; the next `describe` shows whether it happens.

  Returns:
    Why it was refused, or None.

  Raises:
    NoCredentials: the account must log in again.
  """
  answer = run(gcloud.delete(name, options, zone))
  if answer.ok or _is_not_found(answer):
    return None
  _require_credentials(answer)
  return answer.error


def list_ours(options: Options, zone: str, run: Run) -> dict[str, str]:
  """Returns name -> label of this project's resources in a zone. Raises Unclear, NoCredentials."""
  answer = run(gcloud.list_all(options, zone))
  if not answer.ok:
    _require_credentials(answer)
    raise Unclear(answer.error)
  try:
    found = {resource["name"].rpartition("/")[2]: label_of(resource)
             for resource in json.loads(answer.stdout)}
  except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
    raise Unclear(f"cannot parse gcloud's output: {error}") from None
  return {name: label for name, label in found.items() if label is not None}


def _is_not_found(answer: Answer) -> bool:
  return _NOT_FOUND.search(answer.stderr) is not None and not _is_of_network(answer)


def _is_of_network(answer: Answer) -> bool:
  """Whether gcloud's own words report a network error; quoted text is the user's names."""
  return _NETWORK.search(re.sub(r"'[^']*'", "", answer.stderr)) is not None


def _require_credentials(answer: Answer) -> None:
  if not answer.ok and _CREDENTIALS.search(answer.stderr) and not _is_of_network(answer):
    raise NoCredentials("gcloud has no valid credentials: run `gcloud auth login`, then "
                        "`python -m launch.watch` with the same --out and --experiment")
