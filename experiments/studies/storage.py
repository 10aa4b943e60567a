"""What a byte of the cache buys: how much of the teacher is kept, and what becomes of the rest."""

import fiddle as fdl

from data.export.plan import TeacherExport
from experiments.quickstart import quickstart_export
from experiments.studies.objectives import by_the_epoch
from experiments.sweep import Sweep, seeds, zipped
from kd_core.errors import UsageError

FOLDER = "quickstart/storage"
KINDS = {
    "top_4": {"top_k": 4},
    "top_8": {"top_k": 8},
    "likely": {"min_prob": 3e-3},
    "draws_6": {"top_k": 0, "draws": 6},
    "draws_12": {"top_k": 0, "draws": 12},
    "draws_50": {"top_k": 0, "draws": 50},
}
RUNS = (
    ("quickstart/cache", "tail_bucket"),
    ("quickstart/cache", "renormalized"),
    (f"{FOLDER}/likely", "tail_bucket"),
    (f"{FOLDER}/top_8", "tail_bucket"),
    (f"{FOLDER}/top_8", "renormalized"),
    (f"{FOLDER}/top_8", "truncated"),
    (f"{FOLDER}/top_8", "residual_to_label"),
    (f"{FOLDER}/top_8", "uniform_tail"),
    (f"{FOLDER}/top_4", "tail_bucket"),
    (f"{FOLDER}/draws_50", "sampled"),
    (f"{FOLDER}/draws_12", "sampled"),
    (f"{FOLDER}/draws_6", "sampled"),
)


def storage_export(kind: str = "top_8") -> fdl.Config[TeacherExport]:
    """The quick start's training positions kept in another way: top_4, top_8, likely, draws_6, draws_12 or draws_50."""
    if kind not in KINDS:
        raise UsageError(f"storage_export: got {kind!r}; wanted one of {', '.join(KINDS)}.")
    config = quickstart_export()
    for name, value in KINDS[kind].items():
        setattr(config.selection, name, value)
    config.validation_tokens = 512  # not read: all are held against the quick start's own held-out cache
    return config


def storage() -> Sweep:
    """Quality over bytes: top-k, thresholds and draws of several sizes, and what is done about the tail.

    First:    for kind in top_4 top_8 likely draws_6 draws_12 draws_50; do python -m launchers.export_teacher \\
                  --config="storage_export(kind='$kind')" --out=quickstart/storage/$kind; done
    Then:     python -m launchers.sweep --sweep=storage --backend=local --jobs=2
              python -m benchmarks.plot_storage sweeps/storage experiments/studies/results/storage
    Expected: Draws are unbiased, so 12 of them (14 bytes) end within a hundredth of a nat of the top 64 with the bucket
              (96 bytes), and 6 draws (10 bytes) not far behind, above the top 8 with the bucket (19 bytes). Of the top
              8, which hold .70 of the mass, the bucket is the best treatment: truncation and a tail given to the label
              are biased, renormalisation is blind to the mass outside and loses most in NLL, also at 64.
    Seen:     not run yet.
    """
    paths, tails = zip(*RUNS, strict=True)
    runs = zipped({"shards.path": [f"{path}/train" for path in paths], "loss.terms.kd.tail": tails})
    labels_alone = zipped({"loss.terms.kd.weight": [0.0], "loss.terms.sft.weight": [1.0]})
    return Sweep(by_the_epoch) * seeds(3) * runs + Sweep(by_the_epoch) * seeds(3) * labels_alone
