"""A fake Cloud TPU: queued resources follow scripted timelines on a virtual clock.

`FakeCloud.run` answers gcloud's command lines in this process. It knows how long each resource
really had machines, against which a launcher's account is checked.
"""

import dataclasses
import json

from launch.remote import Answer

DELETION_SECONDS = 60.0

# gcloud appends it to what it says of every 401, 403 and 404.
ACCOUNT = ("This command is authenticated as me@example.com which is the active account specified "
           "by the [core/account] property")


@dataclasses.dataclass
class Resource:
  """A queued resource. `timeline` lists (seconds after its creation, state, initiator, error)."""

  name: str
  zone: str
  project: str
  labels: dict
  created: float
  timeline: list
  deleted: float | None = None

  def state_at(self, now):
    """Returns (state, initiator, error), or None once it is gone."""
    if self.deleted is not None and now >= self.deleted:
      return None if now >= self.deleted + DELETION_SECONDS else ("DELETING", "USER", None)
    found = ("ACCEPTED", None, None)
    for seconds, *event in self.timeline:
      if now >= self.created + seconds:
        found = tuple(event)
    return found

  def held(self, now):
    """Returns the seconds for which it had machines, up to `now`."""
    end = now if self.deleted is None else min(now, self.deleted)
    times = [(self.created + seconds, state) for seconds, state, *_ in self.timeline]
    total = 0.0
    for (start, state), (stop, _) in zip(times, [*times[1:], (end, None)], strict=True):
      if state in ("ACTIVE", "SUSPENDING"):
        total += max(0.0, min(stop, end) - start)
    last = self.state_at(end - 1e-6) if self.deleted is not None else None
    if last and last[0] in ("ACTIVE", "SUSPENDING"):  # machines go with the deletion's end
      total += max(0.0, min(now, self.deleted + DELETION_SECONDS) - self.deleted)
    return total

  def message(self, now):
    """Returns the resource as gcloud prints it."""
    state, initiator, error = self.state_at(now)
    told = {"state": state}
    if initiator:
      told["stateInitiator"] = initiator
    if error:
      told["failedData"] = {"error": {"code": 8, "message": error}}
    parent = f"projects/{self.project}/locations/{self.zone}"
    return {
        "name": f"{parent}/queuedResources/{self.name}", "state": told,
        "createTime": "2026-01-01T00:00:00Z",
        "tpu": {"nodeSpec": [{"nodeId": self.name, "parent": parent, "node": {
            "labels": self.labels, "acceleratorType": "v6e-8",
            "runtimeVersion": "v2-alpha-tpuv6e"}}]}}


class FakeCloud:
  """A cloud that answers gcloud's commands.

  Attributes:
    now: the virtual clock.
    commands: all commands that were run.
    past: resources that are gone.
  """

  def __init__(self, timelines, on_command=None):
    """`timelines(name, zone, attempt)` returns a Resource's timeline, or an error's text."""
    self.now = 1000.0
    self.commands, self.past, self.present = [], [], {}
    self._timelines, self._on_command = timelines, on_command
    self.created = 0

  def clock(self):
    return self.now

  def run(self, command):
    self._sweep()
    self.commands.append(tuple(command))
    if self._on_command is not None:
      answer = self._on_command(command)
      if answer is not None:
        return answer
    if command[3] != "queued-resources":
      return Answer(0, "{}", "")
    flags = dict(word.partition("=")[::2] for word in command[5:] if word.startswith("--"))
    verb, name, zone = command[4], command[5], flags["--zone"]
    if verb == "list":
      return Answer(0, json.dumps([one.message(self.now) for one in self.present.values()
                                   if one.zone == zone]), "")
    if verb == "create":
      return self._create(name, zone, flags)
    found = self.present.get((name, zone))
    if found is None:
      return Answer(1, "", f"ERROR: (gcloud) NOT_FOUND: Resource '{name}' was not found. "
                    + ACCOUNT)
    if verb == "delete":
      if found.deleted is None:
        found.deleted = self.now
      return Answer(0, "", "")
    return Answer(0, json.dumps(found.message(self.now)), "")

  def _create(self, name, zone, flags):
    if (name, zone) in self.present:
      return Answer(1, "", f"ERROR: (gcloud) ALREADY_EXISTS: Resource '{name}' already exists")
    self.created += 1
    timeline = self._timelines(name, zone, self.created)
    if isinstance(timeline, str):
      return Answer(1, "", f"ERROR: (gcloud) {timeline}")
    key, _, value = flags["--labels"].partition("=")
    self.present[name, zone] = Resource(name, zone, flags["--project"], {key: value}, self.now,
                                        timeline)
    return Answer(0, "", "")

  def _sweep(self):
    for key, one in list(self.present.items()):
      if one.state_at(self.now) is None:
        self.past.append(self.present.pop(key))

  def active(self):
    """Returns the resources that have machines now."""
    self._sweep()
    return [one for one in self.present.values()
            if one.state_at(self.now)[0] in ("ACTIVE", "SUSPENDING")]

  def held(self):
    """Returns the seconds with machines, summed over all resources that ever existed."""
    self._sweep()
    return sum(one.held(self.now) for one in [*self.past, *self.present.values()])
