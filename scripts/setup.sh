#!/usr/bin/env bash
# Make .venv and install the pinned dependencies: `run` for using deltaw, `dev` for working on it. `peers` makes
# .venv-peers, with what deltaw is measured beside.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
[ "$1" != peers ] || venv=.venv-peers

find_python() {
    for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name" && return
        fi
    done
    echo "deltaw needs Python 3.11 or newer; PYTHON=/path/to/python make ... names one." >&2
    exit 2
}

pip() { $venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }

# Without an NVIDIA GPU the processor build of torch is enough, and brings no gigabytes of CUDA libraries. It is on
# torch's own index; an index of yours that has it, or has only one build, is asked first.
install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)" != Linux ]; then
        pip install -c constraints.txt torch
    else
        pip install -c constraints.txt "torch==$version+cpu" 2>/dev/null ||
            pip install "torch==$version+cpu" --index-url https://download.pytorch.org/whl/cpu
    fi
}

# The chat page is tested in a real browser. Playwright drives the distribution's own: its downloads need a host of their own.
install_chromium() {
    command -v chromium >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing Chromium, in which the chat page is tested"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends chromium >/dev/null && return
    fi
    echo "The chat page is tested in Chromium, which is not here (on Debian: apt-get install chromium)."
}

if [ ! -x $venv/bin/python ]; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv $venv || { echo "This Python cannot make environments (on Debian: apt install python3-venv)." >&2; exit 2; }
fi
case "$1" in
run)
    echo "Installing deltaw and its dependencies"
    pip install "pip>=25.1"
    install_torch
    pip install -c constraints.txt -e ".[eval,serve]"
    [ -e deltaw/kernels/built/native.so ] || echo "No C++ compiler (GCC or Clang): torch does the native kernels' work, more slowly."
    ;;
dev)
    echo "Installing what tests need"
    pip install -c constraints.txt --group dev
    install_chromium
    ;;
peers)
    echo "Installing the peers"
    pip install "pip>=25.1"
    install_torch
    pip install -c constraints.txt --group peers
    ;;
esac
touch "$venv/.$1"
