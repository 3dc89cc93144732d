"""A fake gcloud for PATH; its TPU VMs are local process groups that run the real start-up script.

    python fake_gcloud.py FOLDER ARGUMENTS...

FOLDER/cloud.json holds the queued resources. On the first one's machine the trainer freezes after
the step that FOLDER/preempt_at.json names, once its last checkpoint is saved; then the machine is
preempted without warning, and its zone has no more capacity. A queued resource advances by one
state each time it is described.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys

# Of the machine that will be taken away: without it a quick run would end before that is noticed.
_STANDSTILL = """
import glob, os, pathlib, signal, sys, threading, time

def stand_still():
  while not hasattr(sys.modules.get("moe_jax.train.profile"), "Profile"):
    time.sleep(0.001)
  profile = sys.modules["moe_jax.train.profile"].Profile
  begin = profile.begin

  def begin_unless_preempted(self, step):
    if step == {step} + 1:
      while not glob.glob({saved!r}):
        time.sleep(0.001)
      pathlib.Path({mark!r}).touch()
      os.kill(os.getpid(), signal.SIGSTOP)
    begin(self, step)

  profile.begin = begin_unless_preempted

if "moe_jax.train" in sys.orig_argv:
  threading.Thread(target=stand_still, daemon=True).start()
"""
_STATES = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def main(folder, command):
  with open(folder / "commands.txt", "a") as log:
    print(json.dumps(command), file=log)
  if command[:3] != ["compute", "tpus", "queued-resources"]:
    print("{}")
    return 0
  with open(folder / "lock", "w") as lock:  # the launcher and a machine may ask at once
    fcntl.flock(lock, fcntl.LOCK_EX)
    return _locked(folder, command)


def _locked(folder, command):
  file = folder / "cloud.json"
  state = json.loads(file.read_text()) if file.exists() else {"created": 0, "resources": {}}
  flags = dict(word.partition("=")[::2] for word in command[5:] if word.startswith("--"))
  code = _answer(folder, state, command[3], command[4], flags)
  file.with_suffix(".new").write_text(json.dumps(state))
  file.with_suffix(".new").replace(file)
  return code


def _answer(folder, state, verb, name, flags):
  resources, zone = state["resources"], flags["--zone"]
  found = resources.get(name)
  if verb == "create":
    if state["created"] and zone == "us-east5-b":
      return _error("RESOURCE_EXHAUSTED: there is no more capacity in the zone us-east5-b")
    if found:
      return _error(f"ALREADY_EXISTS: Resource '{name}' already exists")
    state["created"] += 1
    key, _, value = flags["--labels"].partition("=")
    script = flags["--metadata-from-file"].removeprefix("startup-script=")
    resources[name] = {"zone": zone, "state": "ACCEPTED", "labels": {key: value}, "home": None,
                       "script": pathlib.Path(script).read_text(), "n": state["created"]}
    return 0
  if found is None or found["zone"] != zone:
    return _error(f"NOT_FOUND: Resource '{name}' was not found. This command is authenticated as "
                  "me@example.com which is the active account specified by the [core/account] "
                  "property")
  if verb == "delete":
    _take_machine(found)
    del resources[name]
    return 0
  _advance(folder, found)
  told = {"state": found["state"]}
  if found["state"] == "SUSPENDED":
    told["stateInitiator"] = "SERVICE"
  print(json.dumps({"name": name, "state": told, "tpu": {"nodeSpec": [
      {"nodeId": name, "node": {"labels": found["labels"]}}]}}))
  return 0


def _advance(folder, found):
  if found["state"] in _STATES[:-1]:
    found["state"] = _STATES[_STATES.index(found["state"]) + 1]
    if found["state"] == "ACTIVE":
      _give_machine(folder, found)
  elif found["n"] == 1 and found["state"] == "ACTIVE" and (folder / "stands-still").exists():
    _take_machine(found)
    found["state"] = "SUSPENDED"


def _give_machine(folder, found):
  found["home"] = str(folder / f"machine-{found['n']}")
  script = folder / f"startup-{found['n']}.sh"
  script.write_text(found["script"])
  path = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
  if found["n"] == 1 and (folder / "preempt_at.json").exists():
    path.insert(0, str(folder / "standstill"))
    (folder / "standstill").mkdir()
    (folder / "standstill" / "sitecustomize.py").write_text(_STANDSTILL.format(
        mark=str(folder / "stands-still"), **json.loads((folder / "preempt_at.json").read_text())))
  with open(os.devnull) as null, open(folder / "machines.txt", "a") as log:
    subprocess.Popen(["bash", str(script)], cwd="/", stdin=null, stdout=log, stderr=log,
                     start_new_session=True, env={**os.environ, "MOE_JAX_HOME": found["home"],
                                                  "MOE_JAX_PAUSE": "0.5",
                                                  "PYTHONPATH": ":".join(path)})


def processes_of(home):
  """Returns the ids of a machine's processes, except for this one."""
  mark, found = f"MOE_JAX_HOME={home}".encode(), []
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):  # it ended meanwhile
      if mark in (process / "environ").read_bytes().split(b"\0"):
        found.append(int(process.name))
  return [pid for pid in found if pid != os.getpid()]


def _take_machine(found):
  """Kills a machine's processes without warning, as when its host is lost."""
  if found["home"] is None:
    return
  for pid in processes_of(found["home"]):
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


def _error(text):
  print(f"ERROR: (gcloud.compute.tpus.queued-resources) {text}", file=sys.stderr)
  return 1


if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
