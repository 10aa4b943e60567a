"""Estimates how long losses and steps take on an H100 and an H200 at least, from their counts on fake CUDA tensors.

    python -m benchmarks.gpu.roofline --out benchmarks/results/DATE-roofline.md

A part of a step takes the longer of two times: what the device computes, and what the host launches. The device
multiplies at its peak and moves the bytes of all other operations at the full bandwidth of its memory, one after the
other. Nothing reaches these rates, so every number is an estimate of the least. `device.py` fills the last column.
"""

import argparse
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.shapes import LossShape, StepShape

LAUNCH_SECONDS = 5e-6


class Device(NamedTuple):
    """Peaks of a device: bfloat16 FLOPs a second without sparsity, and bytes a second of its memory."""

    name: str
    flops: float
    bandwidth: float


# nvidia.com/en-us/data-center/h100 (SXM: 1,979 TFLOPS with sparsity, half without) and …/h200.
DEVICES = (Device("H100", 989e12, 3.35e12), Device("H200", 989e12, 4.8e12))

LOSSES = {
    "loss, KD + CE": LossShape(),
    "loss, CE": LossShape(objective="CE"),
    "loss, KD + CE, chunk 256": LossShape(chunk=256),
    **{
        f"loss, {name}": LossShape(objective=name)
        for name in ("reverse KL + CE", "JSD + CE", "KD at temperature 2 + CE", "uniform tail + CE")
    },
}
STEPS = {
    "1B step, 4 rows of 4,096, 8 documents each": StepShape("1B", 4, 4096, documents=8, chunk=4096),
    "quick start's step": StepShape(),
}
ROWS: dict[str, LossShape | StepShape] = {**LOSSES, **STEPS}


NOTE = """`python -m benchmarks.gpu.roofline`. **These are estimates from counts on fake CUDA tensors, and no
measurements.** The peaks are {3:.0f} TFLOP/s in bfloat16, and {0.bandwidth:.3g} B/s (H100 SXM) or {1.bandwidth:.3g} B/s
(H200), by NVIDIA's pages of both, and {2:.0f} µs a launch. No kernel reaches them, so each time is the least. The loss
has N = 8,192, V = 151,936, D = 4,096, K = 64, bfloat16, forward and backward, chunks of 2,048. Steps are KD + CE with
AdamW. GiB are the peak of a step with weights and moments, and of a loss over its inputs."""


class Estimate(NamedTuple):
    """Seconds of a row on one device: of its parts, and of the whole. `model_flops` counts nothing twice."""

    matmul: float
    memory: float
    launch: float
    total: float
    model_flops: float


def attention_flops(shape: StepShape) -> tuple[float, float]:
    """Returns FLOPs of the model's attention in a step, and of its kernels, which compute scores again backward."""
    arch = shape.architecture
    # Forward, a pair of query and key takes 2 · d for its score and 2 · d for its value, in each head and layer.
    forward = 4.0 * shape.attention_pairs() * arch.num_heads * arch.head_dim * arch.num_layers
    return 3 * forward, 3.5 * forward


def estimate(shape: StepShape | LossShape, phases: Mapping[str, Mapping[str, float]], device: Device) -> Estimate:
    """Returns the least that the counted phases take on a device."""
    model_attention, attention = attention_flops(shape) if isinstance(shape, StepShape) else (0.0, 0.0)
    matmul = {
        name: max(phase["flops"] / device.flops, phase["matmul_bytes"] / device.bandwidth)
        for name, phase in phases.items()
    }
    memory = {name: phase["bytes"] / device.bandwidth for name, phase in phases.items()}
    launch = {name: phase["launches"] * LAUNCH_SECONDS for name, phase in phases.items()}
    # A phase waits for its launches where they take longer than its work.
    total = sum(max(matmul[name] + memory[name], launch[name]) for name in phases) + attention / device.flops
    model_flops = sum(phase["flops"] for phase in phases.values()) + model_attention
    return Estimate(
        sum(matmul.values()) + attention / device.flops, sum(memory.values()), sum(launch.values()), total, model_flops
    )


def count() -> dict[str, Any]:
    """Returns the counts of all rows by name, from a process of its own."""
    steps, losses = ([json.dumps([asdict(row) for row in rows.values()])] for rows in (STEPS, LOSSES))
    command = [sys.executable, "-m", "benchmarks.gpu.counts", "--each", *steps, "--losses", *losses]
    counts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return dict(zip([*LOSSES, *STEPS], [*counts["losses"], *counts["steps"]], strict=True))


HEADER = (
    "| what | device | matmul ms | memory ms | launches | launch ms | estimate ms | MFU at most | GiB | measured ms |"
)


def table(counts: Mapping[str, Any]) -> str:
    """Returns the estimates as a Markdown table with an empty column for what a device measures."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for name, row_counts in counts.items():
        for device in DEVICES:
            seconds = estimate(ROWS[name], row_counts["phases"], device)
            mfu = seconds.model_flops / seconds.total / device.flops
            lines.append(
                f"| {name} | {device.name} | {1e3 * seconds.matmul:.1f} | {1e3 * seconds.memory:.1f} "
                f"| {row_counts['launches']['all']:,} | {1e3 * seconds.launch:.1f} | {1e3 * seconds.total:.1f} "
                f"| {mfu:.0%} | {row_counts['peak_bytes'] / 2**30:.1f} |  |"
            )
    return "\n".join(lines)


def fill(estimates: str, gpu: str, measured: Mapping[str, float]) -> str:
    """Writes measured milliseconds into the last column of a table, in the rows of the device that a GPU's name has."""

    def filled(line: str) -> str:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        is_row = len(cells) == HEADER.count("|") - 1 and cells[0] in measured and cells[1] in gpu.split()
        return re.sub(r"\|[^|]*\|$", f"| {measured[cells[0]]:.1f} |", line) if is_row else line

    return "\n".join(map(filled, estimates.split("\n")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file, in place of the standard output")
    out = parser.parse_args().out
    text = table(count())
    if out is None:
        print(text)
        return
    paragraph = textwrap.fill(NOTE.format(*DEVICES, LAUNCH_SECONDS * 1e6, DEVICES[0].flops / 1e12), 120)
    out.write_text(f"# Roofline of losses and steps, {out.name[:10]}\n\n{paragraph}\n\n{text}\n")


if __name__ == "__main__":
    main()
