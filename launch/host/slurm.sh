#!/bin/bash
# One task of the array: unpacks the code once, trains this task's share on its nodes.
set -uo pipefail
code=@CODE@
sha256=@SHA256@
folder=@FOLDER@
python=@PYTHON@

home=${code%.tar.gz}
if [ ! -d "$home" ]; then
  echo "$sha256  $code" | sha256sum --check --quiet || exit 1
  partial=$(mktemp -d "$home.XXXXXX") || exit 1
  tar --extract --gzip --file="$code" --directory="$partial" || exit 1
  # Another task may have been faster: then this copy is not needed.
  mv --no-target-directory "$partial" "$home" 2>/dev/null || rm -rf "$partial"
fi
cd "$home" || exit 1
srun --kill-on-bad-exit=1 "$python" -m launch.host --work="$folder/$SLURM_ARRAY_TASK_ID/work.json"
code=$?
if [ "$code" = 75 ]; then  # told to stop, and saved: there is more to do
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
