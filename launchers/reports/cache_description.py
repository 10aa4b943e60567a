"""Description of a cache in words and figures."""

from typing import Any

from data.cache.inspection.survey import Survey
from data.cache.manifest import Manifest


def describe_cache(manifest: Manifest, survey: Survey) -> list[tuple[str, str]]:
    """Returns the titled lines that describe a cache."""
    audit, selection, n = manifest.audit, manifest.selection, max(1, survey.positions)
    teacher = manifest.teacher
    shape = teacher["architecture"] if isinstance(teacher.get("architecture"), dict) else {}
    layers = f"{shape.get('num_layers')} layers of {shape.get('hidden_size')}, " if "num_layers" in shape else ""
    scored_nll = manifest.statistics["teacher_nll"]
    lines = [
        ("teacher", f"{layers}{teacher.get('dtype', '')}, weights {str(teacher.get('weights'))[:12]}…"),
        ("tokenizer", f"{manifest.tokenizer[:12]}…, vocabulary of {manifest.vocab_size:,}"),
        *_beginnings(manifest),
        ("kept", selection.words() + _further(selection)),
        ("codec", f"{manifest.codec}; KL(original‖decoded) mean {audit.kl_mean:.1e}, worst {audit.kl_worst:.1e} nats"),
        ("", f"mass of the entries off by at most {audit.mass_error:.1e}"),
        ("size", f"{survey.records:,} records, {survey.positions:,} positions ({survey.scored / n:.1%} scored)"),
        ("", f"{len(manifest.shards)} shards, {sum(shard.blocks for shard in manifest.shards)} blocks"),
        ("entries", _spread(survey.entries) if selection.top_k else "none"),
        ("samples", _spread(survey.samples) if selection.draws else "none"),
        ("teacher NLL", f"{survey.nll / n:.4f} nats over all positions, {scored_nll:.4f} over scored positions"),
        ("label is kept", f"at {survey.inside / n:.1%} of all positions"),
    ]
    return [*lines, *(("plan", _plan(plan)) for plan in manifest.plans)]


def _beginnings(manifest: Manifest) -> list[tuple[str, str]]:
    """Returns the line of what texts begin with, or none if the cache may hold no texts or was converted."""
    if ids := manifest.text_begins_with:
        return [("texts begin with", " ".join(map(str, ids)))]
    may_lack_texts = any(plan.get("chat_template", "unknown") is not None for plan in manifest.plans)
    return [] if may_lack_texts else [("texts begin with", "no BOS")]


def _further(selection: Any) -> str:
    drawn = f", drawn at temperature {selection.proposal_temperature:g}" if selection.proposal_temperature != 1 else ""
    tails = ", ".join(f"{t:g}" for t in selection.tail_temperatures)
    return drawn + (f"; tail also at temperature {tails}" if tails else "")


def _spread(spread: Any) -> str:
    return f"{spread.mean:.2f} a position (from {spread.least} to {spread.most})"


def _plan(plan: dict[str, Any]) -> str:
    corpus = plan.get("corpus")
    fingerprint = corpus.get("fingerprint", corpus) if isinstance(corpus, dict) else corpus
    tokens = "all" if plan.get("tokens") is None else plan["tokens"]
    skipped = _skipped(corpus.get("skipped")) if isinstance(corpus, dict) else ""
    return f"{plan.get('split')} of corpus {str(fingerprint)[:12]}…, {tokens} tokens, seed {plan.get('seed')}{skipped}"


def _skipped(counts: Any) -> str:
    """Returns how many rows of the corpus were skipped, and why. Others may have written the counts."""
    named = counts.items() if isinstance(counts, dict) else ()
    numbers = {reason: count for reason, count in named if type(count) is int}
    reasons = ", ".join(f"{count} {reason}" for reason, count in numbers.items())
    return f"; {sum(numbers.values())} rows skipped: {reasons}" if numbers else ""


def part_costs(survey: Survey) -> list[tuple[str, int, float]]:
    """Returns the parts with their bytes and bytes per position, the largest first and the sum last."""
    n = max(1, survey.positions)
    parts = sorted(survey.bytes.items(), key=lambda part: -part[1])
    return [(name, size, size / n) for name, size in [*parts, ("all", survey.total_bytes)]]
