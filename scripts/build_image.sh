#!/usr/bin/env bash
# Builds one image with whatever container engine there is.
#   scripts/build_image.sh cpu|cuda|rocm [options of docker build]
# A closed machine passes, for example: --build-arg BASE_IMAGE=mine --build-context wheelhouse=DIRECTORY
#   --network none --build-arg PIP_NO_INDEX=1, or --secret id=pip_conf,src=... --secret id=ca_bundle,src=...
# At the end it says what the image weighs, and fails where that is more than its kind may: REPORT_ARGS="--limit 8" for
# a larger base, "--json FILE" for a program (scripts/image_report.py).
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?cpu, cuda or rocm}
shift

case $kind in
  cpu)  options=(-f Dockerfile.cuda --build-arg TORCH=cpu --build-arg CUDA_VERSION=) ;;
  cuda) options=(-f Dockerfile.cuda) ;;
  rocm) options=(-f Dockerfile.rocm) ;;
  *) echo "build_image.sh: $kind is none of cpu, cuda, rocm" >&2; exit 2 ;;
esac
engine=$(command -v docker || command -v podman || true)
if [ -z "$engine" ] || ! "$engine" info >/dev/null 2>&1; then
  echo "no container engine: install and start Docker or Podman to build the image" >&2
  exit 1
fi
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' serving/__init__.py)
revision=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
echo "==> Building weir:$kind"
DOCKER_BUILDKIT=1 "$engine" build "${options[@]}" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
  --tag "weir:$kind" "$@" .
python=.venv/bin/python
[ -x $python ] || python=python3
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  # shellcheck disable=SC2086 # several options
  "$python" -m scripts.image_report "weir:$kind" --engine "$(basename "$engine")" ${REPORT_ARGS:-}
else
  echo "no size report: that needs Python 3.11" >&2
fi
