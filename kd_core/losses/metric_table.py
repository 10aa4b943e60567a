"""Every metric that a run logs: what it is called, which way is better, and where it is shown.

A metric's sum is computed in `fused/loss_metrics.py`, and everything else about it is its row here. Metrics are logged
per scored token, as GROUP/NAME in `metrics.jsonl` and TensorBoard. Losses of single terms, `TERM_loss`, have no row.
"""

from typing import Literal, NamedTuple

from kd_core.losses.calibration import GAP_NAMES, TEMPERATURE_NLL_NAMES

# What computes a metric, from cheap to costly: `entries` is `teacher_metric_sums`, which reads the teacher's entries
# alone, `vocabulary` is `metric_sums`, which comes with the softmax over the vocabulary, and `evaluation` is a function
# of `EXTRA_METRICS`, which needs more passes and is left out in training. `elsewhere` is a term of the objective, or
# comes from other sums or from the loop.
Pass = Literal["entries", "vocabulary", "evaluation", "elsewhere"]
Subject = Literal["text", "teacher", "both"]


class MetricRow(NamedTuple):
    """A metric.

    `groups` are the prefixes under which it is logged. `subject` says what it depends on: `text` and the student alone,
    the `teacher` and its cache alone, or both. `brief` metrics stand in log lines and first in tables. `sums` are the
    sums that it is computed from, where these are not one sum of its own name.
    """

    name: str
    title: str
    unit: str
    better: Literal["min", "max"] | None
    page: str
    chart: str
    groups: tuple[str, ...] = ("val",)
    computed: Pass = "elsewhere"
    subject: Subject = "both"
    brief: bool = False
    sums: tuple[str, ...] = ()


BOTH = ("train", "val")
LOSSES, DISTRIBUTION, OPTIMISATION, SPEED = "Losses", "Distribution", "Optimisation", "Speed and data"
NLL_CHART, KL_CHART, ENTROPY_CHART = "NLL, held out", "KL and reverse KL, held out", "entropies"
MASS_CHART, AGREEMENT_CHART = "masses on the teacher's entries", "agreement"
BEST_TEMPERATURE = "temperature that would calibrate it"
ROWS = (
    MetricRow("loss", "objective", "nats per token", "min", LOSSES, "objective", BOTH, brief=True),
    MetricRow("nll", "NLL", "nats per token", "min", LOSSES, NLL_CHART, subject="text", brief=True),
    MetricRow("perplexity", "perplexity", "", "min", LOSSES, "perplexity", subject="text"),
    MetricRow("bits_per_byte", "bits per byte", "", "min", LOSSES, "bits per byte", subject="text"),
    MetricRow("teacher_nll", "teacher's NLL", "nats per token", None, LOSSES, NLL_CHART, subject="teacher"),
    MetricRow("kl", "KL(teacher‖student)", "nats per token", "min", LOSSES, KL_CHART, brief=True),
    MetricRow("reverse_kl", "KL(student‖teacher)", "nats per token", "min", LOSSES, KL_CHART),
    MetricRow(
        "renormalized_kl", "KL on the teacher's entries alone", "nats per token", "min", LOSSES, KL_CHART, brief=True
    ),
    MetricRow(
        "teacher_cross_entropy", "cross-entropy to the teacher's samples", "nats per token", "min", LOSSES, KL_CHART,
        brief=True,
    ),
    MetricRow(
        "top1_agreement", "likeliest token is the teacher's", "", "max", DISTRIBUTION, AGREEMENT_CHART, BOTH,
        "vocabulary", brief=True,
    ),
    MetricRow(
        "top5_agreement", "likeliest token is among the teacher's five", "", "max", DISTRIBUTION, AGREEMENT_CHART,
        computed="evaluation",
    ),
    MetricRow(
        "topk_agreement", "likeliest token is among the teacher's entries", "", None, DISTRIBUTION, AGREEMENT_CHART,
        BOTH, "vocabulary",
    ),
    MetricRow(
        "acceptance", "Σ min(p, q) on the entries (accepted, at least)", "", "max", DISTRIBUTION, "acceptance", BOTH,
        "vocabulary",
    ),
    MetricRow(
        "student_entropy", "student's entropy", "nats", None, DISTRIBUTION, ENTROPY_CHART, computed="evaluation",
        subject="text",
    ),
    MetricRow(
        "teacher_entropy", "teacher's entropy (at least)", "nats", None, DISTRIBUTION, ENTROPY_CHART, BOTH, "entries",
        "teacher",
    ),
    MetricRow(
        "student_mass", "student mass on the teacher's entries", "", None, DISTRIBUTION, MASS_CHART, BOTH, "vocabulary"
    ),
    MetricRow("teacher_mass", "teacher mass on them", "", None, DISTRIBUTION, MASS_CHART, BOTH, "entries", "teacher"),
    MetricRow(
        "label_in_support", "label is one of them", "", None, DISTRIBUTION, MASS_CHART, BOTH, "entries", "teacher"
    ),
    MetricRow(
        "ece", "expected calibration error", "", "min", DISTRIBUTION, "calibration error", computed="evaluation",
        subject="text", brief=True, sums=GAP_NAMES,
    ),
    MetricRow(
        "temperature", BEST_TEMPERATURE, "", None, DISTRIBUTION, BEST_TEMPERATURE, computed="evaluation",
        subject="text", sums=TEMPERATURE_NLL_NAMES,
    ),
    MetricRow("tokens", "positions", "", None, SPEED, "scored tokens of a step", ("train",), subject="teacher"),
    MetricRow("lr", "learning rate", "", None, OPTIMISATION, "learning rate", ("train",)),
    MetricRow("grad_norm", "gradient norm", "", None, OPTIMISATION, "gradient norm", ("train",)),
    MetricRow("skipped_steps", "skipped steps", "", None, OPTIMISATION, "skipped steps", ("train",)),
    MetricRow("tokens_per_second", "tokens a second", "1/s", "max", SPEED, "tokens a second", ("speed",)),
    MetricRow(
        "data_wait_share", "share of time waiting for data", "", "min", SPEED, "share of time waiting for data",
        ("speed",),
    ),
    MetricRow("step_seconds", "time of a step", "s", "min", SPEED, "seconds", ("speed",)),
    MetricRow("data_wait_seconds", "time that it waited for data", "s", "min", SPEED, "seconds", ("speed",)),
    MetricRow("memory_gib", "memory", "GiB", "min", SPEED, "memory, GiB", ("speed",)),
    MetricRow("damaged_blocks", "damaged blocks", "", "min", SPEED, "damaged blocks", ("data",)),
)  # fmt: skip
METRICS = {row.name: row for row in ROWS}
TEACHER_METRICS = tuple(row.name for row in ROWS if row.computed == "entries")
STUDENT_METRICS = tuple(row.name for row in ROWS if row.computed == "vocabulary")
# Metrics that cost too much for a training step, with the names of their sums.
EXTRA_METRIC_SUMS = {row.name: row.sums or (row.name,) for row in ROWS if row.computed == "evaluation"}
BRIEF = tuple(row.name for row in ROWS if row.brief)
