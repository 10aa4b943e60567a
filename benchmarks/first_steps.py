"""The quick start on a small part of its corpus: do its training steps cost what their matmuls cost?

    make ordinary                                   # as CI runs it, on an ordinary x86-64 machine's instructions
    python -m benchmarks.first_steps --folder=build/first_steps

Runs all four stages of `launchers.quickstart` with 4,096 training positions and three steps, and divides the fastest
step by the step's own matmuls in float32 at the machine's best rate, measured before and after. The bar is far above
what a good step costs, and far below what emulated bfloat16 costs. Exit status 1 means that it was missed.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.throughput import arithmetic, matmul_rate
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder

MOST_TIMES = 5.0
ROWS, LENGTH, STEPS = 2, 512, 3
EXPORT = ["train_tokens=4096", "validation_tokens=1024"]
TRAINING = [f"steps={STEPS}", "schedule.warmup_steps=1"]


def quickstart(folder: Path) -> RunFolder:
    """Runs the command, and returns the folder of a run that began anew."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    flags = [*(f"--export_config={item}" for item in EXPORT), *(f"--config={item}" for item in TRAINING)]
    places = [f"--folder={folder}", f"--run_dir={run}"]
    subprocess.run([sys.executable, "-m", "launchers.quickstart", *flags, *places], check=True)
    return RunFolder(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/first_steps"))
    folder: Path = parser.parse_args().folder
    before = matmul_rate(ROWS * LENGTH, "float32")
    run = quickstart(folder)
    rate = max(before, matmul_rate(ROWS * LENGTH, "float32"))
    lines = read_metrics(run.path / "metrics.jsonl")
    seconds = [line["speed/step_seconds"] for line in lines if "speed/step_seconds" in line]
    assert len(seconds) == STEPS, seconds
    matmuls = arithmetic(ROWS, LENGTH) / rate
    times = min(seconds) / matmuls
    print(
        f"\n{run.precision()}: a step takes {min(seconds):.2f} s, its matmuls in float32 {matmuls:.2f} s "
        f"({rate / 1e9:.0f} GFLOP/s): {times:.2f} times, at most {MOST_TIMES:g}"
    )
    raise SystemExit(int(times > MOST_TIMES))


if __name__ == "__main__":
    main()
