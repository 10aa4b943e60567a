"""A study of what a byte of the cache buys: how much of the teacher is kept, and what becomes of the rest."""

import fiddle as fdl

from data.export.teacher_export import TeacherExport
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
    """Exports the quick start's training positions as one of top_4, top_8, likely, draws_6, draws_12 or draws_50."""
    if kind not in KINDS:
        raise UsageError(f"storage_export: got {kind!r}; wanted one of {', '.join(KINDS)}.")
    config = quickstart_export()
    for name, value in KINDS[kind].items():
        setattr(config.selection, name, value)
    config.validation_tokens = 512  # not read: all runs validate on the quick start's own held-out cache
    return config


def storage() -> Sweep:
    """Compares quality over bytes: top-k, thresholds and draws of several sizes, and treatments of the tail.

    First:    for kind in top_4 top_8 likely draws_6 draws_12 draws_50; do python -m launchers.export_teacher \\
                  --config="storage_export(kind='$kind')" --out=quickstart/storage/$kind; done
    Then:     python -m launchers.sweep --sweep=storage --backend=local --jobs=2
              python -m benchmarks.plot_storage sweeps/storage experiments/studies/results/storage
    Expected: Draws are unbiased, so 12 of them (14 bytes) end within a hundredth of a nat of the top 64 with the bucket
              (96 bytes), and 6 draws (10 bytes) not far behind, above the top 8 with the bucket (19 bytes). For the
              top 8, which hold .70 of the mass, the bucket is the best treatment. Truncation and a tail given to the
              label are biased. Renormalisation ignores the mass outside and loses most in NLL, also at 64.
    Seen:     2026-11-25, 8,165 held-out positions, 3 seeds, 106 minutes on two cores beside other work, at 2 minutes a
              point without it (`results/storage/`).

                  kept         bytes a position   KL            NLL
                  64 entries   96                 .836 ± .006   4.334 ± .007
                  p ≥ 3e-3     46                 .842 ± .006   4.348 ± .011
                  50 draws     32                 .846 ± .016   4.319 ± .005
                  top 8        19                 .894 ± .013   4.419 ± .013
                  12 draws     14                 .882 ± .033   4.362 ± .030
                  top 4        12                 .946 ± .012   4.469 ± .009
                  6 draws      10                 .920 ± .030   4.406 ± .022

              Draws are not measurably behind the next larger top-k in KL, and ahead of it in NLL. They cost more than
              expected: n draws cost about ½ / n nats of KL, so 12 are .05 behind the top 64, not .01.
              For the top 8, the bucket has the least KL, as expected. Giving the tail to the label has the least NLL
              (4.358 ± .014, with a calibration error of .062 against .035), which was not expected. KL and NLL of the
              others: truncated .961 and 4.561, with the best agreement of the five (.479 ± .007, bucket .471 ± .007).
              An even tail 1.219 and 4.784. Renormalised 1.440 and 4.872. With 64 entries it still has 1.147 and 4.576,
              worse in both than labels alone (1.041 and 4.336). Only its agreement is better (.481 against .447).
    """
    paths, tails = zip(*RUNS, strict=True)
    runs = zipped({"shards.path": [f"{path}/train" for path in paths], "loss.terms.kd.tail": tails})
    labels_alone = zipped({"loss.terms.kd.weight": [0.0], "loss.terms.sft.weight": [1.0]})
    return Sweep(by_the_epoch) * seeds(3) * runs + Sweep(by_the_epoch) * seeds(3) * labels_alone
