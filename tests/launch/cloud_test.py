"""What gcloud's answers mean, in the words in which gcloud 528 gives them."""

import pytest

from launch import cloud
from launch.backends.gcloud import Options
from launch.remote import Answer
from tests.launch.fake_cloud import ACCOUNT

OPTIONS = Options("p", ("us-east5-b",), "v6e-8")
NOT_FOUND = f"ERROR: (gcloud.describe) NOT_FOUND: Resource 'p/q' was not found. {ACCOUNT}"
FORBIDDEN = f"ERROR: (gcloud.describe) PERMISSION_DENIED: tpu.nodes.get denied. {ACCOUNT}"
NO_NETWORK = ("ERROR: (gcloud.describe) There was a problem refreshing your current auth tokens: "
              "HTTPSConnectionPool(host='oauth2.googleapis.com', port=443): Max retries exceeded "
              "(Caused by NameResolutionError(...)) Please run: $ gcloud auth login")
CRASHED = "ERROR: gcloud crashed (FileNotFoundError): [Errno 2] No such file or directory: 'x'"
LOGGED_OUT = ("ERROR: (gcloud.describe) You do not currently have an active account selected. "
              "Please run: $ gcloud auth login")
EXPIRED = ("ERROR: (gcloud.describe) There was a problem refreshing your current auth tokens: "
           "('invalid_grant: Token has been expired or revoked.'). Please run: $ gcloud auth login")


def look(said):
  return cloud.describe("q", OPTIONS, "us-east5-b", "me", lambda command: Answer(1, "", said))


def test_what_is_not_there_is_not_taken_for_a_missing_login():
  assert look(NOT_FOUND) is None
  assert look(NOT_FOUND.replace("p/q", "p/timeout-unreachable-0")) is None
  assert cloud.delete("q", OPTIONS, "us-east5-b", lambda command: Answer(1, "", NOT_FOUND)) is None


@pytest.mark.parametrize("said", [FORBIDDEN, NO_NETWORK, CRASHED,
                                  "ERROR: gcloud crashed (ServerNotFoundError): no DNS"])
def test_what_says_nothing_of_the_resource_is_asked_again(said):
  with pytest.raises(cloud.Unclear):
    look(said)


@pytest.mark.parametrize("said", [LOGGED_OUT, EXPIRED])
def test_only_a_person_can_log_in(said):
  for ask in (look, lambda said: cloud.create_error(Answer(1, "", said)),
              lambda said: cloud.delete("q", OPTIONS, "z", lambda command: Answer(1, "", said))):
    with pytest.raises(cloud.NoCredentials):
      ask(said)


def test_a_refused_deletion_is_told():
  error = cloud.delete("q", OPTIONS, "us-east5-b", lambda command: Answer(1, "", FORBIDDEN))
  assert "PERMISSION_DENIED" in error


@pytest.mark.parametrize("said, again", [
    ("RESOURCE_EXHAUSTED: Quota limit 'TPUV6E' has been exceeded. Limit: 500 in zone us-east5-b.",
     False),
    ("HTTPError 503: Service Unavailable", True), ("'status': 504", True), ('"code": 500', True),
    ("UNAVAILABLE: try later", True), ("INTERNAL: oops", True),
    ("INVALID_ARGUMENT: there are 502 of them", False)])
def test_a_number_in_a_sentence_is_no_code(said, again):
  assert cloud.create_error(Answer(1, "", f"ERROR: (gcloud.create) {said}"))[1] == again
