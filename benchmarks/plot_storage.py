"""Draws quality over bytes a position, and writes its table: what the study `storage` asks.

Command:  python -m benchmarks.plot_storage sweeps/storage experiments/studies/results/storage

Needs the extra `plot`. Reads the sweep's summary.csv and the manifests of the caches that its points trained on, which
must be where they were; bytes are those of shards and tables. Writes curve.md and curve.png into the folder.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

from data.cache.manifest import read_manifest
from launchers.reports import text_tables

mpl.use("Agg")
from matplotlib import pyplot as plt

METRICS = {
    "val/kl": "KL(teacher‖student), nats",
    "val/nll": "NLL, nats",
    "val/top1_agreement": "top-1 agreement",
}
CACHE, TAIL = "shards.path", "loss.terms.kd.tail"
TAILS = {"tail_bucket": "o", "sampled": "D", "renormalized": "v", "truncated": "s", "residual_to_label": "P",
         "uniform_tail": "X"}  # fmt: skip


class Kept(NamedTuple):
    """A kind of cache under a tail treatment, with means and half intervals over seeds."""

    cache: str
    tail: str
    bytes: float
    entries: float
    means: dict[str, tuple[float, float]]


def read(summary: Path) -> list[Kept]:
    """All groups, the smallest cache first; without a cache, nothing is stored."""
    found: list[Kept] = []
    for row in csv.DictReader(summary.open()):
        means = {name: (float(row[name]), float(row[f"{name} ±"])) for name in METRICS}
        if not row[CACHE]:
            found.append(Kept("labels alone", "", 0.0, 0.0, means))
            continue
        manifest = read_manifest(Path(row[CACHE]))
        words = manifest.selection.words()
        found.append(Kept(words, row[TAIL], manifest.bytes / manifest.positions, manifest.statistics["entries"], means))
    return sorted(found, key=lambda kept: (kept.bytes, kept.means["val/kl"]))


def table(found: list[Kept]) -> str:
    """Markdown, a line each."""
    lines = [
        [
            kept.cache,
            kept.tail or "cross-entropy",
            f"{kept.bytes:.1f}",
            f"{kept.entries:.1f}",
            *(f"{kept.means[name][0]:.4f} ± {kept.means[name][1]:.4f}" for name in METRICS),
        ]
        for kept in found
    ]
    return text_tables.format_markdown(["kept", "tail", "bytes a position", "entries", *METRICS], lines)


def draw(found: list[Kept], target: Path) -> None:
    """A panel a metric; a tail treatment by its mark, joined where it is of several sizes."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 4.2), layout="constrained")
    for axis, (name, title) in zip(axes, METRICS.items(), strict=True):
        for tail, mark in TAILS.items():
            of_tail = [kept for kept in found if kept.tail == tail]
            if not of_tail:
                continue
            means, halves = zip(*(kept.means[name] for kept in of_tail), strict=True)
            axis.errorbar([kept.bytes for kept in of_tail], means, halves, label=tail, marker=mark, capsize=3, lw=1)
        for kept in found:
            if not kept.tail:
                mean, half = kept.means[name]
                axis.axhspan(mean - half, mean + half, color="0.6", alpha=0.3, label=f"{kept.cache}: 0 bytes")
        axis.set_xscale("log")
        axis.set_xticks([5, 10, 20, 50, 100], labels=["5", "10", "20", "50", "100"])
        axis.set_xlabel("bytes a position")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(target, dpi=90)


def main() -> None:
    """Read, write, draw."""
    sweep, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = read(sweep / "summary.csv")
    out.mkdir(parents=True, exist_ok=True)
    (out / "curve.md").write_text(table(found) + "\n")
    draw(found, out / "curve.png")
    print(table(found))


if __name__ == "__main__":
    main()
