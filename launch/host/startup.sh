#!/bin/bash
# Runs at every boot of a TPU VM, as root. All that it does can be done again: a machine that
# was rebooted goes on, one that was made anew begins from the last checkpoint.
set -uo pipefail
code=@CODE@
sha256=@SHA256@
work=@WORK@
python=@PYTHON@
delete=(@DELETE@)
# What may be spent (null: no limit), by how many slices, what this one costs, and the seconds in
# which it saves and ends. A later submission writes another limit into the file.
max_cost_usd=@USD@
slices=@SLICES@
usd_per_second=@RATE@
margin=@MARGIN@
limit=@LIMIT@

home=${MOE_JAX_HOME:-/var/lib/moe_jax}
mkdir -p "$home"
[ -s "$home/began" ] || date +%s >"$home/began"
export MOE_JAX_AT_WORK=$home/at_work  # made by the agent when it begins: from then on it counts
exec 9>"$home/lock"
flock --nonblock 9 || { echo "another start-up script is running"; exit 0; }
exec >>"$home/log.txt" 2>&1
echo "==== $(date --utc +%FT%TZ) $(hostname)"

fetch() {  # SOURCE TARGET
  case $1 in
    gs://*) timeout 600 gcloud storage cp "$1" "$2" ;;
    *) cp "$1" "$2" ;;
  esac
}

# Seconds that are left for a part of what may be spent, as timeout takes them: 0 is for ever.
# Nothing is printed when they are over.
seconds_left() {  # PARTS
  local usd
  fetch "$limit" "$home/limit.json" >/dev/null 2>&1
  usd=$(sed -nE 's/.*"max_cost_usd": *([0-9.e+-]+|null).*/\1/p' "$home/limit.json" 2>/dev/null)
  awk -v usd="${usd:-$max_cost_usd}" -v parts="$1" -v rate="$usd_per_second" -v margin="$margin" \
      -v age="$(($(date +%s) - $(cat "$home/began")))" 'BEGIN {
    if (usd == "null" || rate == 0) { print 0; exit }
    left = int(usd / parts / rate - margin - age)
    if (left > 0) print left }'
}

unpack() {
  [ -d "$home/$sha256" ] && return
  fetch "$code" "$home/code.tar.gz" || return
  echo "$sha256  $home/code.tar.gz" | sha256sum --check --quiet || return
  rm -rf "$home/unpacked" && mkdir "$home/unpacked" || return
  tar --extract --gzip --file="$home/code.tar.gz" --directory="$home/unpacked" || return
  mv "$home/unpacked" "$home/$sha256"
}

install() {
  [ -n "$python" ] && return
  python=$home/venv/bin/python
  lock=$home/$sha256/launch/requirements-tpu.txt
  cmp --silent "$lock" "$home/installed.txt" && return
  export HOME=${HOME:-/root} UV_PYTHON_INSTALL_DIR=$home/python
  # The image's own Python is older than 3.11; uv brings one.
  timeout 1200 python3 -m pip install --quiet --target="$home/uv" uv==0.13.9 || return
  timeout 1200 "$home/uv/bin/uv" venv --quiet --clear --python=3.12 "$home/venv" || return
  timeout 1200 "$home/uv/bin/uv" pip sync --quiet --python="$python" --require-hashes "$lock" ||
    return
  cp "$lock" "$home/installed.txt"  # last: an interrupted installation is done again
}

attempt() {
  unpack && install && cd "$home/$sha256" || return
  timeout --kill-after="$margin" "$(seconds_left 1)" "$python" -m launch.host --work="$work"
}

# As long as the machine is there it tries again: a network that is late, a package index that is
# busy. The launcher gives up on a machine that does not report; where none lives, and while no
# agent counts what all slices cost, the machine does so when its own has cost its share.
pause=${MOE_JAX_PAUSE:-10}
while true; do
  parts=$slices
  if [ -e "$MOE_JAX_AT_WORK" ]; then parts=1; fi
  if [ -z "$(seconds_left "$parts")" ]; then
    echo "spending would exceed --max_cost_usd: ending the slice"
    break
  fi
  attempt
  ended=$?
  if [ "$ended" = 0 ]; then break; fi
  echo "ended with exit code $ended; retrying in $pause s"
  sleep "$pause"
done
if [ "${#delete[@]}" -gt 0 ]; then
  until timeout 600 "${delete[@]}"; do sleep "$pause"; done  # until then it costs
fi
