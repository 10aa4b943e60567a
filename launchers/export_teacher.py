"""Run a teacher over a corpus once and keep, for each position, its likeliest tokens: the cache that students train on.

    python -m launchers.export_teacher --config=quickstart_export --out=quickstart/cache
    python -m launchers.export_teacher --config=quickstart_export --config=corpus.path=my/texts --out=my/cache
    python -m launchers.export_teacher --config=chat_export --config=corpus.path=my/chats.jsonl --out=my/cache
    torchrun --nproc-per-node 2 -m launchers.export_teacher --config=quickstart_export --out=quickstart/cache

Writes OUT/train and OUT/validation: tar shards and, last, manifest.json. After an interruption, the same command goes
on with the first missing shard. The bytes are the same, whatever the interruptions and the number of ranks. Finish an
export with the version of this project that began it.

With --extend, complete caches grow by the documents that they lack. Documents are compared by content, not by name. No
old shard is touched.

--config may be repeated: first an export of experiments/, then changes path=value, such as teacher=my/model,
teacher=hub:OWNER/NAME, scorer=transformers, train_tokens=none (all of the corpus), corpus.path=hub:OWNER/NAME,
corpus.text_field=content, corpus.fields={"prompt": "question", "completion": "answer"}, corpus.on_bad_row=skip,
overlap=128, and

    corpus.bos=no corpus.eos=yes                 tokens at the beginning and end of texts (auto: as the tokenizer)
    selection.top_k=32                           entries per position, the same as tag:TopK=32
    tag:RowLength=1024                           positions per window, as in the rows of training
    selection.min_prob=3e-3                      only entries of at least this probability
    selection.mass=0.9                           only as many entries as hold this mass
    selection.top_k=0 selection.draws=12         12 samples instead of entries: smallest caches, forward KL only
    selection.tail_temperatures=(2.0,)           the tail also at temperature 2, for bucket losses there
    scorer=vllm vllm={"tensor_parallel_size": 8}  through vLLM: quantised and MoE teachers (docs/vllm.md)
    scorer=vllm scorer_url=http://HOST:8000 dtype=bfloat16   through a vLLM server that runs, with its dtype
    codec=compact                                4 bytes less per position at twice the (small) error; or lossless
    shard_bytes=100000000                        larger shards: fewer files, more work lost by an interruption
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launchers.cli import app

if TYPE_CHECKING:
    from kd_core.precision import ChosenPrecision

KIND = "TeacherExport"
# Seconds that ranks wait for the one that scores the pilot, or is the last to score. torchrun ends them if it dies.
LONGEST_WAIT = 7 * 86_400.0
app.define_config_flags(KIND)
OUT = flags.DEFINE_string("out", None, "Folder for the caches; required.")
SHARD_BYTES = flags.DEFINE_integer(
    "shard_bytes", None, "About the size of a shard; the same as --config=shard_bytes=…."
)
EXTEND = flags.DEFINE_bool(
    "extend", False, "Add documents that are new to complete caches; old shards stay as they are."
)


def _resolve(export: Any, out: Path, device: Any) -> tuple[Any, "ChosenPrecision"]:
    """Returns the export with the dtype and `batch_rows` of the caches in `out`, else those that suit the device.

    Warns if the dtype is slow.
    """
    from data.export.plan import choose_batch_rows
    from data.export.resume_check import recorded_choices
    from kd_core.precision import choose_precision

    recorded_dtype, recorded_rows = recorded_choices(out)
    chosen = choose_precision(export.dtype, device, recorded_dtype, "cache")
    chosen.warn_if_slow("dtype")
    rows = choose_batch_rows(export, device, recorded_rows)
    return replace(export, dtype=chosen.precision, batch_rows=rows), chosen


def _export(export: Any, out: Path) -> None:
    from data.export import export as export_steps
    from data.export.extend import end_growth, load_growth
    from data.export.plan import make_plans
    from data.export.resume_check import record_or_check_growth, record_or_check_plan
    from kd_core.files import own_folder
    from kd_core.hub import local_folder
    from kd_core.parallel.collectives import run_on_all_ranks
    from kd_core.parallel.world import joined_world
    from launchers.cli.folder_guard import CACHES, refuse_other_kinds

    refuse_other_kinds(out, CACHES, "out")
    local_folder(export.teacher)  # fetched before any rank waits for another
    with joined_world(timeout=LONGEST_WAIT) as world, ExitStack() as stack:
        world.run_on_first(lambda: stack.enter_context(own_folder(out)))
        export, chosen = world.run_on_first(lambda: _resolve(export, out, world.device))
        app.log.info("dtype: %s", chosen)
        bad_rows = export.corpus.bad_rows()
        grow = (lambda: load_growth(out, begin=True)) if EXTEND.value else lambda: None
        plans = world.run_on_first(lambda: make_plans(export, out, grow(), bad_rows))
        if plans and plans[0].texts:
            app.log.info("texts: %s", plans[0].texts)
        take = record_or_check_growth if EXTEND.value else record_or_check_plan
        missing_plans = [plan for plan in plans if not world.run_on_first(lambda plan=plan: take(plan))]
        world.run_on_first(lambda: bad_rows.write(out))
        if EXTEND.value and not plans:
            app.log.info("%s: every document of the corpus is there already", out)
        for plan in plans:
            if plan not in missing_plans:
                app.log.info("%s: already complete, reused", plan.folder)
        model: Any = export_steps.load_teacher(export, world.device) if missing_plans else None
        for plan in missing_plans:
            pilot: list[Any] = []
            world.run_on_first(lambda plan=plan, pilot=pilot: pilot.extend(export_steps.make_tables(plan, model)))
            export_steps.write_missing_shards(plan, model, pilot, world.rank, world.size)
            by_rank = run_on_all_ranks(world, lambda plan=plan: export_steps.read_back(plan, world.rank, world.size))
            manifest = world.run_on_first(lambda plan=plan, read=by_rank: export_steps.write_manifest(plan, read))
            app.log.info("%s", manifest.summary(plan.folder))
        if EXTEND.value:
            world.run_on_first(lambda: end_growth(out))


def main() -> None:
    """Resolves the flags, then lists, prints, checks or exports."""
    sizes = [] if SHARD_BYTES.value is None else [f"shard_bytes={SHARD_BYTES.value}"]
    resolved = app.resolve_flags(KIND, sizes)
    if resolved is None:
        return
    from kd_core.errors import UsageError

    if OUT.value is None:
        raise UsageError("no --out given. Name the folder for the caches: --out=DIR.")
    export = resolved.build()
    if app.FLAGS.dry_run:
        import torch

        from data.export.extend import load_growth
        from data.export.plan import make_plans

        out = Path(OUT.value)
        export, chosen = _resolve(export, out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        print(f"dtype: {chosen}")
        growth = load_growth(out, begin=False) if EXTEND.value else None
        plans = make_plans(export, out, growth)
        if plans and plans[0].texts:
            print(f"texts: {plans[0].texts}")
        for plan in plans:
            positions = sum(window.positions for window in plan.windows)
            scored = sum(int(window.loss_mask.sum()) for window in plan.windows)
            print(
                f"{plan.folder}: {len(plan.windows)} records, {positions} positions ({scored} scored), "
                f"{len(plan.shards)} shards"
            )
        return
    _export(export, Path(OUT.value))


if __name__ == "__main__":
    app.run_command(main, "launchers.export_teacher", __doc__ or "", KIND)
