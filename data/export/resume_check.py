"""Whose a cache's folder is: the plan that is written beside it, or none yet; and whether it is complete."""

from pathlib import Path
from typing import Any

from data.cache.manifest import PLAN_BEGINS, PLAN_ENDS, read_manifest
from data.export.extend import GROWING, SPLITS
from data.export.plan import CachePlan
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, read_json, write_json
from kd_core.json_fields import check_text

# What may differ between the exports that a cache grew by: all else decides what its records are.
MAY_GROW = (
    *("corpus", "windows", "windows_masks", "tokens", "seed", "validation_share"),
    *("shard_bytes", "block_positions", "batch_rows"),
)


def _around_texts(name: str, before: Any, now: Any) -> str:
    """Returns what to set where an export differs in what stands around texts."""
    setting = {PLAN_BEGINS: "bos", PLAN_ENDS: "eos"}.get(name)
    return f" It is as before with corpus.{setting}={'yes' if before else 'no'}." if setting and before != now else ""


def recorded_dtype(out: Path) -> str | None:
    """Returns the teacher's dtype of the caches that were begun in `out`. None where there are none.

    Raises:
        UsageError: the plan beside them is damaged.
    """
    path = out / SPLITS[0] / "plan.json"
    if not path.exists():
        return None
    with damage_as_usage_error(path, "the plan of an export"):
        return check_text(read_json(path, "the plan of an export")["dtype"], "dtype")


def claim(plan: CachePlan) -> bool:
    """Write the plan beside the cache to be, or check that it is the same; True where the cache is complete.

    Raises:
        UsageError: the folder holds an export of another plan.
    """
    path = plan.folder / "plan.json"
    plan.folder.mkdir(parents=True, exist_ok=True)
    for half_written in plan.folder.glob("*.partial"):
        half_written.unlink()
    if not path.exists():
        write_json(path, plan.plan)
    found = read_json(path, "the plan of an export")
    # Before plans named their windows, documents were split by their names; before they named the real vocabulary,
    # padding took probability; before they named the loss masks, a cache could be finished with others. Such a cache is
    # reused if it is complete.
    unknown = {"windows", "vocab_size", "windows_masks"} & set(plan.plan) - set(found)
    names = sorted({*found, *plan.plan} - unknown)
    differing = [name for name in names if found.get(name) != plan.plan.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"{plan.folder}: holds an export with another {name} ({found.get(name)}; now {plan.plan.get(name)})."
            f"{_around_texts(name, found.get(name), plan.plan.get(name))} "
            "Name another --out, delete the folder, or add documents that are new to it with --extend."
        )
    ended = (plan.folder / "manifest.json").exists()
    manifest = read_manifest(plan.folder) if ended else None
    missing = [each.name for each in manifest.shards if not (plan.folder / each.name).exists()] if manifest else []
    if unknown and (missing or not manifest):
        raise UsageError(
            f"{plan.folder}: holds part of an export that an earlier version began, which divided documents into train "
            "and validation in another way, gave probability to padding, or did not record which labels are scored. "
            "Finish it with that version, name another --out, or delete the folder."
        )
    if manifest and missing and len(manifest.plans) > 1:
        raise UsageError(
            f"{plan.folder / missing[0]}: no such shard, in a cache that has grown since its first export, which "
            "would make a cache without what was added. Restore the shard."
        )
    if missing:
        (plan.folder / "manifest.json").unlink()
    return ended and not missing


def claim_growth(plan: CachePlan) -> bool:
    """Check that a cache can grow by a plan; True where it has already.

    Raises:
        UsageError: the export differs in what may not.
    """
    assert plan.grown_from
    before, now = plan.grown_from.plans[-1], read_manifest(plan.folder)
    for half_written in plan.folder.glob("*.partial"):
        half_written.unlink()
    for name in sorted({*before, *plan.plan} - set(MAY_GROW)):
        if before.get(name) != plan.plan.get(name):
            raise UsageError(
                f"{plan.folder}: was exported with another {name} ({before.get(name)}; now {plan.plan.get(name)})."
                f"{_around_texts(name, before.get(name), plan.plan.get(name))} "
                "A cache grows with the settings that it has; name another --out for others."
            )
    path = plan.folder / GROWING
    if not path.exists():
        write_json(path, plan.plan)
    if read_json(path, "the plan of a growth") != plan.plan:
        raise UsageError(
            f"{plan.folder}: is growing already, by another corpus or other settings. Finish that export first, by its "
            f"own command; or give it up: delete {path}, the shards that the manifest does not name, and growth.json."
        )
    return len(now.plans) > len(plan.grown_from.plans)
