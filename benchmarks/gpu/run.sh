#!/usr/bin/env bash
# One GPU in about six minutes: tests on it first, then all figures (`make gpu`). The status is that of the tests.
# WHEELS is a folder of wheels that the machine lacks. benchmarks/README.md says which. Results are in OUT. Arguments are
# those of device.py. With KD_TEST_DEVICE=cpu, `--device cpu --tiny` tries all of it without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)} wheels=${WHEELS:-build/wheels} out=${OUT:-build/gpu}
mkdir -p "$out"
# Else numbers of an earlier run would stand on the page.
rm -f "$out/numbers.jsonl" "$out/results.md"
export PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/gpu-site "$wheels"/*.whl || exit
    export PYTHONPATH=$PWD/build/gpu-site
fi
"$python" -c 'import xdist' 2>/dev/null && workers="-n auto --maxprocesses 8"
# Warnings of other versions of libraries are no failures here.
timeout -s INT -k 20 150 "$python" -m pytest -p tests.gpu.losses_on_device -m gpu tests/gpu tests/kd_core/losses tests/benchmarks \
    -o filterwarnings= --maxfail 5 ${workers:-} 2>&1 | tee "$out/tests.txt"
status=$?
# Liger-Kernel's kernels in CuTe, where their libraries are installed.
"$python" -c 'import cutlass, tvm_ffi' 2>/dev/null && export LIGER_KERNEL_IMPL=${LIGER_KERNEL_IMPL:-cutedsl}
# A kernel that hangs must not hold the machine.
timeout -s INT -k 20 330 "$python" -m benchmarks.gpu.device --out "$out" "$@" || status=$?
nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,power.draw --format=csv >"$out/gpu.txt"
exit $status
