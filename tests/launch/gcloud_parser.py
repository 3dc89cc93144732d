"""The real gcloud, asked without an account or network: are these lines accepted, is that its JSON?

gcloud parses the whole line and only then notices that there is no account: exit code 1, with
a message that says so. A line that it does not accept gives 2. It is loaded once for many lines.
"""

import json
import os
import pathlib
import shutil
import subprocess

_IN_GCLOUD = """
import io, json, sys
root, answer = sys.argv[1], sys.stdout
sys.path[:0] = [root + "/lib", root + "/lib/third_party"]
sys.stdout = sys.stderr = said = io.StringIO()  # before the import: gcloud keeps what it finds
from googlecloudsdk import gcloud_main
cli, answers = gcloud_main.CreateCLI([]), []
for line in json.load(sys.stdin):
  said.seek(0)
  said.truncate()
  try:
    cli.Execute(line)
    code = 0
  except SystemExit as end:
    code = end.code
  answers.append([code, said.getvalue()])
print(json.dumps(answers), file=answer)
"""


_DECODE = """
import json, sys
root = sys.argv[1]
sys.path[:0] = [root + "/lib", root + "/lib/third_party"]
from apitools.base.protorpclite import messages
from apitools.base.py import encoding
from googlecloudsdk.generated_clients.apis.tpu.v2 import tpu_v2_messages

def unknown(message):
  found = list(message.all_unrecognized_fields())
  for field in message.all_fields():
    value = getattr(message, field.name)
    for one in value if isinstance(value, (list, messages.FieldList)) else [value]:
      if isinstance(one, messages.Message) and not type(one).__name__.endswith("Value"):
        found += [field.name + "." + name for name in unknown(one)]
  return found

print(json.dumps([unknown(encoding.JsonToMessage(tpu_v2_messages.QueuedResource, text))
                  for text in json.load(sys.stdin)]))
"""


def sdk() -> pathlib.Path | None:
  """The SDK's root, or None where there is no gcloud."""
  gcloud = shutil.which("gcloud")
  root = pathlib.Path(gcloud).resolve().parent.parent if gcloud else None
  return root if root and (root / "lib" / "googlecloudsdk").is_dir() else None


def run_python(script: str, folder: pathlib.Path, **popen) -> str:
  """Runs a script with gcloud's interpreter and libraries, away from anyone's settings."""
  root = sdk()
  python = root / "platform" / "bundledpythonunix" / "bin" / "python3"
  done = subprocess.run(
      [str(python) if python.exists() else "python3", "-S", "-c", script, str(root)],
      text=True, capture_output=True, cwd=folder, timeout=300,
      env={"PATH": os.environ["PATH"], "HOME": str(folder), "CLOUDSDK_CONFIG": str(folder),
           "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
           "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"}, **popen)
  assert done.returncode == 0, done.stderr
  return done.stdout


def unknown_fields(resources: list[dict], folder: pathlib.Path) -> list[list[str]]:
  """Of queued resources as JSON: the fields or values that the SDK's messages do not have."""
  answers = run_python(_DECODE, folder, input=json.dumps([json.dumps(one) for one in resources]))
  return json.loads(answers)


def refused(lines: list[tuple[str, ...]], folder: pathlib.Path) -> list[str]:
  """What gcloud says of those command lines that it does not accept."""
  answers = json.loads(run_python(_IN_GCLOUD, folder,
                                  input=json.dumps([list(line[1:]) for line in lines])))
  return [f"{' '.join(line)}\n{said}" for line, (code, said) in zip(lines, answers, strict=True)
          if not (code == 1 and "do not currently have an active account" in said)]
