#!/bin/sh
# Makes .venv with the pinned set of packages; returns at once when it is there.
#
#   sh scripts/bootstrap.sh [extra ...]      extras of pyproject.toml, added to those installed before
#   PYTHON=/path/to/python make test         with that interpreter
#
# Wants nothing but a Python that runs (3.11 to 3.13, with its venv module) and a package registry.
set -eu
cd "$(dirname "$0")/.."
venv=.venv
python=$venv/bin/python
stamp=$venv/bootstrap.stamp            # written last: what a finished environment was made from, and its extras
unfinished=$venv/bootstrap.unfinished  # there while packages are being installed, so after an interruption too
lock=.cache/bootstrap.lock

say() { echo "bootstrap: $*" >&2; }

main() {
  inputs=$({ pwd; cat pyproject.toml constraints.txt; grep '^__version__' bigjax/__init__.py; } | cksum)
  ready "$@" && return
  take_lock
  ready "$@" && return                 # another call made it meanwhile
  began=$(date +%s)
  if ! "$python" -m pip --version >/dev/null 2>&1 || other_python_wanted; then
    find_python
    say "Python $version ($found) makes $venv"
    "$found" -m venv --clear "$venv"
  fi
  extras=$({ sed -n 2p "$stamp" 2>/dev/null || true; echo "$@"; } | tr -s ' ' '\n' | sort -u | xargs)
  again=""; [ ! -e "$unfinished" ] || again=yes
  : >"$unfinished"
  rm -f "$stamp"
  say "installing the pinned packages${extras:+ with extras: $extras} (1 to 2 GB the first time, mostly TensorFlow)"
  packages=".${extras:+[$(echo "$extras" | tr ' ' ',')]}"
  with_uv || { say "uv did not do it, trying pip"; with_pip; } ||
    { say "failed: the last lines above say why. What was fetched is kept: the same command goes on from there."; exit 1; }
  printf '%s\n%s\n' "$inputs" "$extras" >"$stamp"
  rm -f "$unfinished"
  say "ready after $(($(date +%s) - began)) s"
}

# Is everything asked for installed already?
ready() {
  [ -x "$python" ] && [ -e "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$inputs" ] || return 1
  for extra in "$@"; do
    case " $(sed -n 2p "$stamp") " in *" $extra "*) ;; *) return 1 ;; esac
  done
  ! other_python_wanted
}

other_python_wanted() {
  [ -n "${PYTHON:-}" ] || return 1
  probe "$PYTHON" || wrong_python
  wanted=$version
  ! probe "$python" || [ "$version" != "$wanted" ]
}

# 3.12 first: every recorded figure was taken with it. 3.13 resolves to the same packages; 3.11 gets an older JAX.
find_python() {
  if [ -n "${PYTHON:-}" ]; then
    found=$PYTHON
    probe "$found" && return
    wrong_python
  fi
  tried=""
  for minor in 12 13 11; do
    for found in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python3 \
      "${XDG_DATA_HOME:-$HOME/.local/share}/uv/python/cpython-3.$minor".*/bin/python3 python3 python; do
      probe "$found" && [ "$version" = "3.$minor" ] && return
      tried="$tried  $found: $reason
"
    done
  done
  say "found no Python 3.11, 3.12 or 3.13 that runs. Install one (3.12 is tested best), or name it: PYTHON=/path/to/python3.12 make ..."
  printf '%s' "$tried" | grep -v 'not found$' | sort -u >&2
  exit 2
}

wrong_python() {
  say "PYTHON=$PYTHON: $reason. Name a Python 3.11, 3.12 or 3.13, or unset PYTHON."
  exit 2
}

# Sets `version`, or else `reason`. Only running an interpreter tells: a pyenv shim is on the PATH and exits with 127.
probe() {
  reason="not found"
  command -v "$1" >/dev/null 2>&1 || return 1
  version=$("$1" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] < (3, 14):
  sys.exit("is Python " + version)
try:
  import ensurepip, venv
except ImportError as error:
  sys.exit("has no %s module (on Debian: apt install python%s-venv)" % (error.name, version))
print(version)' 2>&1) && reason="is Python $version" && return
  reason="does not run, exit code $?"
  case $version in "is "* | "has "*) reason=$version ;; esac
  return 1
}

# Several times faster than pip, but it neither reads pip's settings (a company's own index) nor runs everywhere.
# It holds what it fetches against the hashes in constraints.txt.
with_uv() {
  if ! [ -x "$venv/bin/uv" ]; then
    mkdir -p .cache
    sed -n '/^uv==/,/[^\\]$/p' constraints.txt >.cache/uv.txt
    "$python" -m pip install -q --disable-pip-version-check --require-hashes -r .cache/uv.txt || return 1
  fi
  quiet=-q; [ ! -t 2 ] || quiet=""
  # Compiled here once: where PYTHONDONTWRITEBYTECODE is set (containers), TensorFlow would take 20 s to import, not 7.
  "$venv/bin/uv" pip install $quiet --python "$python" --compile-bytecode ${again:+--reinstall} \
    -c constraints.txt --build-constraint constraints.txt -e "$packages"
}

# Pip takes hashes for all packages or for none, and has none of this one: it works out which it needs, fetches these by
# their hashes, and then links this one.
with_pip() {
  pip="$python -m pip --disable-pip-version-check -q"
  mkdir -p .cache
  sed 's/ \\$//; /^ *--hash=/d' constraints.txt >.cache/versions.txt
  $pip install --dry-run --ignore-installed --report .cache/needed.json -c .cache/versions.txt -e "$packages" &&
    "$python" -c '
import json, re
plain = lambda name: re.sub("[-_.]+", "-", name).lower()
needed = {plain(i["metadata"]["name"]) for i in json.load(open(".cache/needed.json"))["install"]}
pins = re.split("\n(?=[^ ])", open("constraints.txt").read().strip())
print(*(p for p in pins if plain(p.partition("==")[0]) in needed), sep="\n")' >.cache/needed.txt &&
    $pip install ${again:+--ignore-installed} --require-hashes --no-deps -r .cache/needed.txt &&
    $pip install --no-deps -e .
}

# One call at a time; a lock whose owner is gone is taken over.
take_lock() {
  mkdir -p .cache
  told=""
  until mkdir "$lock" 2>/dev/null; do
    owner=$(cat "$lock/pid" 2>/dev/null || true)
    if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then
      rm -rf "$lock"
      continue
    fi
    [ -n "$told" ] || say "waiting for process ${owner:-?}, which is setting up here (if there is none: rm -r $lock)"
    told=yes
    sleep 1
  done
  echo $$ >"$lock/pid"
  trap 'rm -rf "$lock"' EXIT
  trap 'exit 130' INT TERM
}

main "$@"
