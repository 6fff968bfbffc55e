#!/usr/bin/env bash
# Installs the build of torch for one kind of device, in the version that its lock names; the lock has what it requires.
#   scripts/install_torch.sh PYTHON cpu|cuda|rocm [LOCK]
# Asked in turn: pip's own sources for that very build; for CUDA the same sources for the wheel without a build in its
# name, which on PyPI is the CUDA build for Linux ("===" passes over every other); PyTorch's index. What came is looked at.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?a python} kind=${2:?cpu, cuda or rocm} lock=${3:-container/requirements-$kind.txt}

case $kind in
  cpu)  build=cpu     size="about 200 MB" ;;
  cuda) build=cu130   size="about 500 MB, and 2 GB of CUDA's libraries afterwards" ;;
  rocm) build=rocm7.2 size="several gigabytes" ;;
  *) echo "install_torch.sh: $kind is none of cpu, cuda, rocm" >&2; exit 2 ;;
esac
version=$(sed -n 's/^torch==//p' "$lock")
wanted="$version+$build"
# torch for ROCm requires a triton that PyTorch's index alone has.
options=(--no-deps)
[ "$kind" != rocm ] || options=()

# In a wheel without a build in its name, only this file tells.
installed() {
  "$python" -c 'import runpy, sysconfig
print(runpy.run_path(sysconfig.get_path("platlib") + "/torch/version.py")["__version__"])' 2>/dev/null || true
}
ready() { [ "$(installed)" = "$wanted" ]; }
found() { "$python" -m pip install --quiet --dry-run --no-deps "$1" >/dev/null 2>&1; }
get() { "$python" -m pip install "${options[@]}" "$@"; }

if ready; then
  echo "==> torch $wanted is installed"
  exit 0
fi
echo "==> Installing torch $wanted ($size)"
if found "torch==$wanted"; then get "torch==$wanted"
elif [ "$kind" = cuda ] && found "torch===$version"; then get "torch===$version"; fi
ready || get --index-url "https://download.pytorch.org/whl/$build" "torch==$wanted"
if ! ready; then
  echo "install_torch.sh: torch $(installed) came, not $wanted" >&2
  exit 1
fi
