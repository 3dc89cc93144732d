#!/bin/bash
# Runs at every boot of a TPU VM, as root. All that it does can be done again: a machine that
# was rebooted goes on, one that was made anew begins from the last checkpoint.
set -uo pipefail
code=@CODE@
sha256=@SHA256@
work=@WORK@
python=@PYTHON@
delete=(@DELETE@)

home=${MOE_JAX_HOME:-/var/lib/moe_jax}
mkdir -p "$home"
exec 9>"$home/lock"
flock --nonblock 9 || { echo "another start-up script is at work"; exit 0; }
exec >>"$home/log.txt" 2>&1
echo "==== $(date --utc +%FT%TZ) $(hostname)"

fetch() {  # SOURCE TARGET
  case $1 in
    gs://*) gcloud storage cp "$1" "$2" ;;
    *) cp "$1" "$2" ;;
  esac
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
  python3 -m pip install --quiet --target="$home/uv" uv==0.13.9 || return
  "$home/uv/bin/uv" venv --quiet --clear --python=3.12 "$home/venv" || return
  "$home/uv/bin/uv" pip sync --quiet --python="$python" --require-hashes "$lock" || return
  cp "$lock" "$home/installed.txt"  # last: an interrupted installation is done again
}

attempt() {
  unpack && install && cd "$home/$sha256" || return
  "$python" -m launch.host --work="$work"
}

# As long as the machine is there it tries again: a network that is late, a package index that is
# busy. The launcher gives up on a machine that does not report.
pause=${MOE_JAX_PAUSE:-10}
while true; do
  attempt
  ended=$?
  if [ "$ended" = 0 ]; then break; fi
  echo "ended with $ended; once more in $pause s"
  sleep "$pause"
done
if [ "${#delete[@]}" -gt 0 ]; then
  "${delete[@]}"
fi
