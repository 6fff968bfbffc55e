#!/usr/bin/env bash
# Installs the build of torch for one kind of device, of the version in container/requirements-cpu.txt.
#   scripts/install_torch.sh PYTHON cpu|cuda|rocm
# First the sources that pip is configured with are asked for that very build, then PyTorch's own index. The plain name
# is never used: on Linux it means several gigabytes of CUDA libraries, whatever the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?a python} kind=${2:?cpu, cuda or rocm}

case $kind in
  cpu)  build=cpu     size="about 200 MB" ;;
  cuda) build=cu130   size="several gigabytes" ;;
  rocm) build=rocm7.2 size="several gigabytes" ;;
  *) echo "install_torch.sh: $kind is none of cpu, cuda, rocm" >&2; exit 2 ;;
esac
version=$(sed -n 's/^torch==//p' container/requirements-cpu.txt)
wanted="$version+$build"

if [ "$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)" = "$wanted" ]; then
  echo "==> torch $wanted is installed"
  exit 0
fi
echo "==> Installing torch $wanted ($size)"
if "$python" -m pip install --quiet --dry-run --no-deps "torch==$wanted" >/dev/null 2>&1; then
  "$python" -m pip install "torch==$wanted"
else
  "$python" -m pip install --index-url "https://download.pytorch.org/whl/$build" "torch==$wanted"
fi
