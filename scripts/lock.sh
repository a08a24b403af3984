#!/bin/sh
# Resolves pyproject.toml into constraints.txt: every extra, every platform, Python 3.11 to 3.13 in one file, with the
# SHA-256 of every file that may be installed.
#
#   sh scripts/lock.sh              keeps the versions that still fit, adds what pyproject.toml newly asks for
#   sh scripts/lock.sh --upgrade    the newest of everything; run `make test-all` before committing that
#
# No header, annotation or index is written: whose registry this was resolved against is nobody's business.
set -eu
cd "$(dirname "$0")/.."
fresh=.cache/constraints.txt
mkdir -p .cache
cp constraints.txt "$fresh" 2>/dev/null || true
# --universal forks where Pythons need different versions (JAX stopped supporting 3.11 at 0.10.2).
.venv/bin/uv pip compile pyproject.toml --quiet --python .venv/bin/python --python-version 3.11 --universal --all-extras \
  --generate-hashes --no-header --no-annotate "$@" --output-file "$fresh"
if grep -vE '^ *--hash=sha256:[0-9a-f]{64}( \\)?$' "$fresh" | grep -nE ':/[/]|^ *-|[[:space:]]@[[:space:]]'; then
  echo "lock: the lines above hold an address or an option; constraints.txt is left as it was" >&2
  exit 1
fi
versions() { grep -v ' --hash=' "$1" | sed 's/ \\$//'; }
versions constraints.txt >.cache/constraints.before
versions "$fresh" | diff .cache/constraints.before - >&2 && echo "lock: nothing changed" >&2 || true
mv "$fresh" constraints.txt
