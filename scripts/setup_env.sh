#!/usr/bin/env bash
# Makes .venv ready: a Python, the build of torch for this machine, the locked requirements, this project.
# Safe to run again: what is installed already is left alone. TORCH=cpu|cuda|rocm overrules what is detected.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

say() { echo "==> $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  for name in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null && recent "$name"; then echo "$name"; return; fi
  done
  fail "no Python 3.11 or newer was found. Install one (Debian, Ubuntu: apt install python3 python3-venv; Fedora: dnf install python3; macOS: brew install python), or name it: make setup PYTHON=/path/to/python3"
}

detect_torch() {
  if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then echo cuda
  elif [ -d /opt/rocm ] || command -v rocminfo >/dev/null; then echo rocm
  else echo cpu
  fi
}

if ! { [ -x $python ] && recent $python && $python -m pip --version >/dev/null 2>&1; }; then
  found=$(find_python)
  say "Creating .venv with $("$found" --version)"
  rm -rf .venv
  "$found" -m venv .venv || { rm -rf .venv; fail "$found cannot make virtual environments; Debian and Ubuntu: apt install python3-venv"; }
fi

kind=${TORCH:-$(detect_torch)}
say "Device: $kind (overrule it with TORCH=cpu, cuda or rocm)"
scripts/install_torch.sh $python "$kind"

say "Installing the locked requirements (about 130 packages)"
$python -m pip install -r "container/requirements-$kind.txt" -r container/requirements-dev.txt

say "Installing this project into .venv"
$python -m pip install --quiet --no-deps --no-build-isolation --editable .
if ! $python -c 'import sys; from serving.layers.cpu_kernels import compiled_library; sys.exit(compiled_library() is None)'
then say "No C compiler: bfloat16 on a CPU runs without our kernels, slower. Install gcc, then: make -B setup"
fi
say "Ready: .venv/bin/weir --help, or make serve"
