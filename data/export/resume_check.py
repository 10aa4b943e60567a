"""Checks before an export starts or resumes: does the cache's folder belong to this plan, and is it complete?"""

from pathlib import Path
from typing import Any, cast

from data.cache.manifest import MANIFEST_FILE, PLAN_BEGINS, PLAN_ENDS, Manifest, read_manifest
from data.export.extend import GROWING_FILE, SPLITS, read_object, write_object
from data.export.plan import PLAN_FILE, CachePlan
from data.storage.storage import child, storage_at
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error
from kd_core.json_fields import check_integer, check_text

# Fields of the plan that may differ between the exports that extend one cache. All others decide what its records hold.
END_FIELDS = ("windows", "windows_masks", "windows_contexts")
MAY_GROW = (
    *("corpus", *END_FIELDS, "tokens", "seed", "validation_share", "draw"),
    *("shard_bytes", "block_positions", "batch_rows"),
)


def _setting_hint(name: str, before: Any, now: Any) -> str:
    """Returns which setting restores the tokens that were added around texts before, or an empty text."""
    setting = {PLAN_BEGINS: "bos", PLAN_ENDS: "eos"}.get(name)
    return f" It is as before with corpus.{setting}={'yes' if before else 'no'}." if setting and before != now else ""


def _corpus_path(manifest: Manifest | None) -> str:
    """Returns where the corpora of a complete cache were, or an empty text if that is not recorded."""
    paths = manifest.made.get("corpora") if manifest else None
    return ", ".join(map(str, paths)) if isinstance(paths, list) else ""


def recorded_choices(out: Path | str) -> tuple[str | None, int | None, str | None]:
    """Returns the teacher's dtype, `batch_rows` and scorer of the caches that were begun in `out`, or None without any.

    Raises:
        UsageError: the plan in their folder is damaged.
    """
    storage = storage_at(child(out, SPLITS[0]))
    if storage.size(PLAN_FILE) is None:
        return None, None, None
    with damage_as_usage_error(storage.url(PLAN_FILE), "the plan of an export"):
        plan = read_object(storage, PLAN_FILE, "the plan of an export")
        rows = check_integer(plan["batch_rows"], "batch_rows", 1, 1 << 31) if "batch_rows" in plan else None
        scorer = check_text(plan["scorer"], "scorer") if "scorer" in plan else None
        return check_text(plan["dtype"], "dtype"), rows, scorer


def _without_end(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the plan of a long corpus without what its end has added."""
    left = {name: value for name, value in stored.items() if name not in END_FIELDS}
    corpus = left.get("corpus")
    if isinstance(corpus, dict):
        left["corpus"] = {name: value for name, value in cast(dict[str, Any], corpus).items() if name != "skipped"}
    return left


def _another_plan(
    plan: CachePlan, stored: dict[str, Any], differing: list[str], manifest: Manifest | None
) -> UsageError:
    """Returns the error of a folder that holds an export of another plan."""
    name = differing[0]
    before, now = stored.get(name), plan.identity.get(name)
    if name == "corpus" and (path := _corpus_path(manifest)) not in ("", plan.export.corpus.path):
        before, now = path, plan.export.corpus.path
    may_grow = set(differing) <= set(MAY_GROW)
    choices = (
        "delete the folder, or add documents that are new to it with --extend" if may_grow else "or delete the folder"
    )
    return UsageError(
        f"{plan.folder}: holds an export with another {name} ({before}; now {now})."
        f"{_setting_hint(name, before, now)} Choose another --out, {choices}."
    )


def record_or_check(plan: CachePlan, *, record: bool = True) -> bool:
    """Does `record_or_check_growth` of a cache that is extended, and `record_or_check_plan` of a new one."""
    return (record_or_check_growth if plan.grown_from else record_or_check_plan)(plan, record=record)


def record_or_check_plan(plan: CachePlan, *, record: bool = True) -> bool:
    """Writes the plan into the cache's folder, or checks that the plan there is the same.

    Removes half-written files. Removes also the manifest if a shard that it names or its index is missing, so that the
    export makes them again.

    Args:
        plan: the plan.
        record: False only checks, so that a start that is refused leaves no plan in the way of another one.

    Returns:
        True where the cache is complete.

    Raises:
        UsageError: the folder holds an export of another plan, or one that cannot be continued.
    """
    plan.storage.clean()
    names = set(plan.storage.names())
    is_new = PLAN_FILE not in names
    if is_new and record:
        write_object(plan.storage, PLAN_FILE, plan.identity)
    stored = plan.identity if is_new else read_object(plan.storage, PLAN_FILE, "the plan of an export")
    # Plans of earlier versions lack some fields. Without `windows`, documents were split by their names. Without
    # `vocab_size`, padding took probability. Without `windows_masks`, a cache could be finished with other loss masks.
    # Without `draw`, a long corpus was split and drawn as a whole. Such a cache is reused only if it is complete.
    unknown = {"windows", "vocab_size", "windows_masks", "draw"} & set(plan.identity) - set(stored)
    stored = _without_end(stored) if plan.is_streamed else stored
    settings = sorted({*stored, *plan.identity} - unknown, key=lambda name: (name != "corpus", name))
    differing = [name for name in settings if stored.get(name) != plan.identity.get(name)]
    manifest = read_manifest(plan.folder) if MANIFEST_FILE in names else None
    if differing:
        raise _another_plan(plan, stored, differing, manifest)
    missing = [file for shard in manifest.shards for file in shard.files if file not in names] if manifest else []
    if unknown and (missing or not manifest):
        raise UsageError(
            f"{plan.folder}: holds part of an export that an earlier version began, which divided documents into train "
            "and validation in another way, gave probability to padding, or did not record which labels are scored. "
            "Finish it with that version, name another --out, or delete the folder."
        )
    if manifest and missing and len(manifest.plans) > 1:
        raise UsageError(
            f"{plan.storage.url(missing[0])}: no such file, in a cache that has grown since its first export, which "
            "would make a cache without what was added. Restore the file."
        )
    if missing:
        plan.storage.delete(MANIFEST_FILE)
    return manifest is not None and not missing


def record_or_check_growth(plan: CachePlan, *, record: bool = True) -> bool:
    """Checks that a cache can be extended by a plan, and records the plan in its folder unless `record` is False.

    Returns:
        True where the cache has already been extended by it.

    Raises:
        UsageError: the plan differs from the cache's in more than `MAY_GROW`, or another extension is under way.
    """
    assert plan.grown_from
    before, now = plan.grown_from.plans[-1], read_manifest(plan.folder)
    plan.storage.clean()
    names = set(plan.storage.names())
    for name in sorted({*before, *plan.identity} - set(MAY_GROW)):
        if before.get(name) != plan.identity.get(name):
            raise UsageError(
                f"{plan.folder}: was exported with another {name} ({before.get(name)}; now {plan.identity.get(name)})."
                f"{_setting_hint(name, before.get(name), plan.identity.get(name))} "
                "A cache grows with the settings that it has; name another --out for others."
            )
    is_new = GROWING_FILE not in names
    if is_new and record:
        write_object(plan.storage, GROWING_FILE, plan.identity)
    if not is_new and read_object(plan.storage, GROWING_FILE, "the plan of a growth") != plan.identity:
        raise UsageError(
            f"{plan.folder}: is already growing, by another corpus or other settings. Finish that export first, with "
            "its own command, or abandon it: delete growing.json, the shards that the manifest does not name, and "
            "growth.json."
        )
    return len(now.plans) > len(plan.grown_from.plans)
