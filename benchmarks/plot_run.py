"""Draws a run's curves for the README.

Command:  python -m benchmarks.plot_run runs/quickstart docs/quickstart.png      (needs the extra `plot`)
"""

import sys
from pathlib import Path

import matplotlib as mpl

from kd_core.training.monitoring.metric_log import read_metrics

mpl.use("Agg")
from matplotlib import pyplot as plt

PANELS = {
    "KL(teacher‖student), nats": [("train/kd_loss", "train"), ("val/kl", "held out")],
    "NLL, nats": [("train/sft_loss", "train"), ("val/nll", "held out"), ("val/teacher_nll", "teacher, held out")],
    "mass on the teacher's top 64": [("train/student_mass", "student"), ("train/teacher_mass", "teacher")],
    "top-1 agreement": [("train/top1_agreement", "train"), ("val/top1_agreement", "held out")],
}


def main() -> None:
    run, target = Path(sys.argv[1]), Path(sys.argv[2])
    lines = read_metrics(run / "metrics.jsonl")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.2), layout="constrained")
    for axis, (title, curves) in zip(axes, PANELS.items(), strict=True):
        for name, label in curves:
            points = [(line["step"], line[name]) for line in lines if name in line]
            style = {"marker": "o"} if name.startswith("val/") else {"alpha": 0.7}
            axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main()
