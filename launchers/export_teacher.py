"""Run a teacher over a corpus once and keep, for each position, its likeliest tokens: the cache that students train on.

    python -m launchers.export_teacher --config=quickstart_export --out=quickstart/cache
    python -m launchers.export_teacher --config=quickstart_export --config=corpus.path=my/texts --out=my/cache
    python -m launchers.export_teacher --config=chat_export --config=corpus.path=my/chats.jsonl --out=my/cache
    torchrun --nproc-per-node 2 -m launchers.export_teacher --config=quickstart_export --out=quickstart/cache
    python -m launchers.export_teacher --config=quickstart_export --out=s3://bucket/caches

Writes OUT/train and OUT/validation: tar shards, an index beside each and, last, manifest.json. OUT is a folder, or a
bucket that can be written. Ranks of several machines need a folder that all of them see, or a bucket. After an
interruption, the same command goes on with the first missing shard. The bytes are the same, whatever the interruptions
and the number of ranks. Finish an export with the version of this project that began it.

A corpus of any size is tokenised once, by parallel processes, into OUT.spool, which is removed when the export is
complete. The teacher scores while a long corpus is tokenised. Rows may hold token ids, and a prompt for the teacher
alone (docs/corpora.md).

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
    spool=/local/disk                            where the tokenised corpus waits (OUT.spool, or /tmp for a URL)
    shard_bytes=100000000                        larger shards: fewer files, more work lost by an interruption
    parallel.tensor_parallel=4                   ranks that share a teacher (docs/large_teachers.md)
    parallel.shard=full                          FSDP, for a teacher that is only too large for memory
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from absl import flags

from launchers.cli import app

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.export.plan import CachePlan
    from kd_core.parallel.world import World
    from kd_core.precision import ChosenPrecision

KIND = "TeacherExport"
# Seconds that ranks wait for the one that scores the pilot, or is the last to score. torchrun ends them if it dies.
LONGEST_WAIT = 7 * 86_400.0
WRITABLE = ("s3://", "gs://", "az://")
app.define_config_flags(KIND)
OUT = flags.DEFINE_string("out", None, "Folder or bucket (s3://…) for the caches; required.")
SHARD_BYTES = flags.DEFINE_integer(
    "shard_bytes", None, "About the size of a shard; the same as --config=shard_bytes=…."
)
EXTEND = flags.DEFINE_bool(
    "extend", False, "Add documents that are new to complete caches; old shards stay as they are."
)
WORLD = flags.DEFINE_integer(
    "world", 1, "With --dry_run: the ranks to lay the teacher out over; none is started.", lower_bound=1
)


def _resolve(export: Any, out: str, device: Any) -> tuple[Any, "ChosenPrecision"]:
    """Returns the export with the dtype, `batch_rows` and scorer of the caches in `out`, else those that suit.

    Warns if the dtype is slow.
    """
    from data.export.resume_check import recorded_choices
    from data.export.teacher_export import choose_batch_rows, choose_scorer
    from kd_core.precision import choose_precision

    recorded_dtype, recorded_rows, recorded_scorer = recorded_choices(out)
    chosen = choose_precision(export.dtype, device, recorded_dtype, "cache")
    chosen.warn_if_slow("dtype")
    rows = choose_batch_rows(export, device, recorded_rows)
    scorer = choose_scorer(export, recorded_scorer)
    return replace(export, dtype=chosen.precision, batch_rows=rows, scorer=scorer), chosen


def _claim(out: str) -> AbstractContextManager[None]:
    """Returns a lock on the folder. Buckets have none: there, exports of one plan write the same bytes."""
    from data.storage.storage import is_url
    from kd_core.files import own_folder
    from launchers.cli.folder_guard import CACHES, refuse_other_kinds

    if is_url(out):
        return nullcontext()
    refuse_other_kinds(Path(out), CACHES, "out")
    return own_folder(Path(out))


def _export(export: Any, out: str) -> None:
    from data.export.extend import end_growth, load_growth
    from data.export.plan import make_plans
    from data.export.resume_check import record_or_check
    from data.export.spool.pass_state import part_states
    from data.export.spool.spool_folder import remove_spool, spool_users
    from data.export.tokenize_beside import tokenize_beside
    from data.storage.storage import storage_at
    from kd_core.hub import local_folder
    from kd_core.parallel.world import joined_world

    local_folder(export.teacher)  # fetched before any rank waits for another
    with joined_world(timeout=LONGEST_WAIT) as world, ExitStack() as stack:
        world.run_on_first(lambda: stack.enter_context(_claim(out)))
        users = stack.enter_context(spool_users(out)) if world.local_rank == 0 else None
        export, chosen = world.run_on_first(lambda: _resolve(export, out, world.device))
        app.log.info("dtype: %s", chosen)
        bad_rows = export.corpus.bad_rows()
        grow = (lambda: load_growth(out, begin=True)) if EXTEND.value else lambda: None
        plans = world.run_on_first(lambda: make_plans(export, out, grow(), bad_rows, wait=False))
        if plans and plans[0].texts:
            app.log.info("texts: %s", plans[0].texts)
        missing_plans = [
            plan for plan in plans if not world.run_on_first(lambda plan=plan: record_or_check(plan, record=False))
        ]
        world.run_on_first(lambda: bad_rows.write(storage_at(out)))
        if EXTEND.value and not plans:
            app.log.info("%s: every document of the corpus is there already", out)
        for plan in plans:
            if plan not in missing_plans:
                app.log.info("%s: already complete, reused", plan.folder)
        stack.enter_context(tokenize_beside(missing_plans, out, starts=world.local_rank == 0))
        _write_caches(export, missing_plans, world)
        if missing_plans and missing_plans[0].is_streamed:
            bad_rows.bad = [row for state in part_states(missing_plans[0].windows.folder) for row in state.bad]
            world.run_on_first(lambda: bad_rows.write(storage_at(out)))
        world.barrier()
        if plans and users and users.is_last():
            remove_spool(plans[0].windows.folder, out)
        if EXTEND.value:
            world.run_on_first(lambda: end_growth(out))


def _write_caches(export: Any, plans: "Sequence[CachePlan]", world: "World") -> None:
    """Scores, writes and reads back what is missing of each cache, then writes its manifest."""
    from data.export import export as export_steps
    from data.export.receipts import write_manifest
    from data.export.repeatability import measure_spread, record_scoring
    from data.export.resume_check import record_or_check
    from data.teacher.teacher_memory import rank_holding
    from kd_core.hub import local_folder
    from kd_core.parallel.collectives import assert_ranks_agree, run_on_all_ranks

    if not plans:
        return
    if export.parallel.is_set:  # what does not fit is reported once, before any rank loads its part
        place = local_folder(export.teacher), plans[0].teacher.scorer, export.parallel
        world.run_on_first(lambda: rank_holding(*place, export.parallel.engine().layout(world.size)))
    world = export.parallel.lay_out(world)
    model = export_steps.load_teacher(export, world.device, world)
    spread = measure_spread(plans[0], model, world)
    layout = world.layout if export.parallel.is_set else f"a whole copy on each of {world.size} ranks"
    app.log.info("teacher: %s; %d positions scored twice differ by %.2g nats at most (KL %.2g)", layout, *spread)
    # Only now, so that a teacher that is refused leaves no plan behind.
    world.run_on_first(lambda: [record_or_check(plan) for plan in plans])
    for plan in plans:
        world.run_on_first(lambda plan=plan: record_scoring(plan, model, spread, world.size))
        pilot = export_steps.score_pilot(plan, model, world)
        write = partial(export_steps.write_missing_shards, plan, model, pilot, world.dp_rank, world.dp_size)
        if export.parallel.is_set:
            write()  # an error ends all ranks, because the others would wait for this one's passes
        else:
            run_on_all_ranks(world, write)
        # Hosts without a common file system have each tokenised the corpus.
        assert_ranks_agree(world, {"windows": str(plan.windows.identity())})
        summary = world.run_on_first(lambda plan=plan: write_manifest(plan).summary(plan.folder))
        app.log.info("%s", summary)


def _describe(export: Any, out: str) -> None:
    """Prints what an export would write. The whole corpus is tokenised for that."""
    import torch

    from data.export.extend import load_growth
    from data.export.plan import make_plans
    from data.teacher.teacher_memory import describe_memory
    from kd_core.hub import local_folder
    from kd_core.precision import dtype_of

    export, chosen = _resolve(export, out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"dtype: {chosen}")
    growth = load_growth(out, begin=False) if EXTEND.value else None
    if export.spool is not None:
        Path(export.spool).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=export.spool) as spool:
        plans = make_plans(replace(export, spool=spool), out, growth)
        if plans and plans[0].texts:
            print(f"texts: {plans[0].texts}")
        for plan in plans:
            scored = sum(int(window.loss_mask.sum()) for window in plan.windows)
            positions = plan.windows.positions.sum()
            print(
                f"{plan.folder}: {len(plan.windows)} records, {positions} positions ({scored} scored), "
                f"{len(plan.shards)} shards"
            )
    if plans:
        teacher, dtype = plans[0].teacher, dtype_of(export.dtype, torch.device("cpu"))
        where = local_folder(export.teacher), teacher.scorer, teacher.vocab_size
        print("teacher:", describe_memory(*where, export.parallel, WORLD.value, dtype))


def main() -> None:
    """Resolves the flags, then lists, prints, checks or exports."""
    sizes = [] if SHARD_BYTES.value is None else [f"shard_bytes={SHARD_BYTES.value}"]
    resolved = app.resolve_flags(KIND, sizes)
    if resolved is None:
        return
    from data.storage.storage import is_url
    from kd_core.errors import UsageError

    if OUT.value is None:
        raise UsageError("no --out given. Name the folder or bucket for the caches: --out=DIR.")
    if is_url(OUT.value) and not OUT.value.startswith(WRITABLE):
        raise UsageError(f"--out={OUT.value}: cannot be written; wanted a folder, s3://, gs:// or az://.")
    export = resolved.build()
    if WORLD.present and not app.FLAGS.dry_run:
        raise UsageError("--world: is for --dry_run; ranks are started by torchrun --nproc-per-node.")
    if app.FLAGS.dry_run:
        _describe(export, OUT.value)
        return
    _export(export, OUT.value)


if __name__ == "__main__":
    app.run_command(main, "launchers.export_teacher", __doc__ or "", KIND)
