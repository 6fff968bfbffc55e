#!/usr/bin/env bash
# Compiles what the image is to have beyond wheels that can be had: called while an image is built.
#   scripts/build_kernels.sh PYTHON none|flash-attn WHEELS TARGET
# WHEELS has torch's requirements; TARGET gets the wheels made here, and with `none` stays empty.
# Variables: FLASH_ATTN_VERSION, FLASH_ATTN_CUDA_ARCHS (such as "80;90"), MAX_JOBS (compilers at once, each takes GBs).
set -euo pipefail
python=${1:?a python} kernels=${2:?none or flash-attn} wheels=${3:?a directory} target=${4:?a directory}

fail() { echo "build_kernels.sh: $*" >&2; exit 1; }

mkdir -p "$target"
case $kernels in
  none) exit 0 ;;
  flash-attn) ;;
  *) fail "KERNELS=$kernels is neither none nor flash-attn" ;;
esac

export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
[ -x "$CUDA_HOME/bin/nvcc" ] || fail "flash-attn needs nvcc: build with --build-arg BUILD_IMAGE=nvidia/cuda:VERSION-devel-..."
"$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
cuda=$("$python" -c 'import torch; print(torch.version.cuda or "none")')
release=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
[ "${cuda%%.*}" = "${release%%.*}" ] || fail "nvcc is of CUDA $release, torch of $cuda"
if ! { command -v g++ && [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; } >/dev/null; then
  apt-get update && apt-get install --yes --no-install-recommends g++ python3-dev
fi

"$python" -m pip install --quiet ninja psutil
PATH=$(dirname "$python"):$PATH  # without ninja to be found there, one file is compiled after the other
work=$(mktemp -d)
# pip asks the source for its metadata, which is all that runs without a device to compile for.
FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE "$python" -m pip download --quiet --no-deps --no-binary :all: \
  --no-build-isolation --dest "$work" "flash-attn==$FLASH_ATTN_VERSION"
tar -xzf "$work"/*.tar.gz -C "$work"
source=$(dirname "$work"/*/setup.py)
# torch's headers are C++20 since 2.13; this version of flash-attn still asks for C++17.
sed -i 's/-std=c++17/-std=c++20/' "$source/setup.py"
FLASH_ATTENTION_FORCE_BUILD=TRUE "$python" -m pip wheel --verbose --no-deps --no-build-isolation \
  --wheel-dir "$target" "$source"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$target" einops==0.8.2
rm -rf "$work"
