#!/usr/bin/env bash
# One GPU in about six minutes: tests on it first, then all figures (`make gpu`). The status is that of the tests.
# WHEELS is a folder of wheels that the machine lacks. benchmarks/README.md says which. Results are in OUT. Arguments are
# those of device.py. With KD_TEST_DEVICE=cpu, `--device cpu --tiny` tries all of it without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} wheels=${WHEELS:-build/wheels} out=${OUT:-build/gpu}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/gpu-site "$wheels"/*.whl || exit
    export PYTHONPATH=$PWD/build/gpu-site
fi
"$python" -c 'import xdist' 2>/dev/null && workers="-n auto --maxprocesses 8"
# Warnings of other versions of libraries are no failures here.
timeout 150 "$python" -m pytest -p tests.gpu.losses_on_device -m gpu tests/gpu tests/kd_core/losses tests/benchmarks \
    -o filterwarnings= --maxfail 5 ${workers:-} 2>&1 | tee "$out/tests.txt"
status=$?
# Else cuDNN makes a plan for each new length of a document, which takes longer than a step.
TORCH_CUDNN_SDPA_DEPRIORITIZED=1 "$python" -m benchmarks.gpu.device --out "$out" "$@" || status=$?
nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,power.draw --format=csv >"$out/gpu.txt"
exit $status
