"""What a byte of the cache buys: how much of the teacher is kept, and what becomes of the rest."""

import fiddle as fdl

from data.export.plan import TeacherExport
from experiments.base.sweep_definition import Sweep, seeds, zipped
from experiments.half_depth import quickstart_export
from experiments.studies.objectives import by_the_epoch
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
    Seen:     2026-11-25, 8,165 held-out positions, 3 seeds, 106 minutes on two cores beside other work, at 2 minutes a
              point without it (`results/storage/`). By bytes a position, KL and NLL: 64 entries, 96 bytes, .836 ± .006
              and 4.334 ± .007; p ≥ 3e-3, 46 bytes, .842 ± .006 and 4.348 ± .011; 50 draws, 32 bytes, .846 ± .016 and
              4.319 ± .005; the top 8, 19 bytes, .894 ± .013 and 4.419 ± .013; 12 draws, 14 bytes, .882 ± .033 and
              4.362 ± .030; the top 4, 12 bytes, .946 ± .012 and 4.469 ± .009; 6 draws, 10 bytes, .920 ± .030 and
              4.406 ± .022. So draws are not measurably behind the next larger top-k in KL, and ahead of it in NLL; but
              they cost more than expected: n of them about ½ / n nats of KL, so 12 are .05 behind the top 64, not .01.
              Of the top 8 the bucket has the least KL, as expected. The least NLL has the tail given to the label
              (4.358 ± .014, with a calibration error of .062 against .035), which was not. Truncated: .961 and 4.561,
              with the best agreement of the five (.479 ± .007; bucket .471 ± .007). An even tail: 1.219 and 4.784.
              Renormalised: 1.440 and 4.872, and with 64 entries still 1.147 and 4.576, worse than labels alone (1.041
              and 4.336) in both; only its agreement is better (.481 against .447).
    """
    paths, tails = zip(*RUNS, strict=True)
    runs = zipped({"shards.path": [f"{path}/train" for path in paths], "loss.terms.kd.tail": tails})
    labels_alone = zipped({"loss.terms.kd.weight": [0.0], "loss.terms.sft.weight": [1.0]})
    return Sweep(by_the_epoch) * seeds(3) * runs + Sweep(by_the_epoch) * seeds(3) * labels_alone
