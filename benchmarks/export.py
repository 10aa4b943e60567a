"""What does a teacher's cache cost beside the teacher's bare forward pass with the head?

Command:  python -m benchmarks.export quickstart/teacher quickstart/corpus [repeats [tokens [encoder processes]]]
Prints the median over interleaved repeats of (export of 8,192 + 512 tokens: scoring, encoding, writing, reading back)
against (forward pass and head matmul over the same tokens, all cores, nothing kept), and their ratio.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from einops import rearrange

from data.cache.selection import Selection
from data.corpus.corpus import Corpus
from data.export import export as steps
from data.export.plan import CachePlan, make_plans
from data.export.receipts import write_manifest
from data.export.resume_check import record_or_check_plan
from data.export.teacher_export import TeacherExport
from data.teacher.scorer import DecoderScorer, Scorer
from kd_core.students.decoder.decoder import Decoder

TOKENS = 8192
CHUNK = 256


@torch.no_grad()
def bare_forward(model: Decoder, plans: list[CachePlan], rows: int) -> None:
    """Hidden states and logits of every window, a chunk of positions at a time into one buffer."""
    buffer = torch.empty(CHUNK, model.arch.vocab_size)

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> None:
        for chunk in rearrange(hidden, "B T D -> (B T) D").split(CHUNK):
            torch.mm(chunk, weight.t(), out=buffer[: len(chunk)])

    for plan in plans:
        for start in range(0, len(plan.windows), rows):
            some = plan.windows[start : start + rows]
            T = max(len(window.token_ids) for window in some) - 1
            tokens = torch.zeros(len(some), T, dtype=torch.int64)
            for row, window in enumerate(some):
                tokens[row, : len(window.token_ids) - 1] = torch.from_numpy(window.token_ids[:-1])
            positions = torch.arange(T).expand(len(some), T)
            model(tokens, positions, torch.zeros_like(tokens), head)


def export_once(plans: list[CachePlan], model: Scorer, encoders: int) -> None:
    """All that the command does once plans and teacher are there."""
    for plan in plans:
        record_or_check_plan(plan)
        pilot = steps.make_tables(plan, model)
        steps.write_missing_shards(plan, model, pilot, rank=0, ranks=1, encoders=encoders)
        write_manifest(plan)


def main() -> None:
    teacher, corpus = sys.argv[1:3]
    repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    tokens = int(sys.argv[4]) if len(sys.argv) > 4 else TOKENS
    encoders = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    export = TeacherExport(
        Corpus(corpus),
        teacher,
        train_tokens=tokens,
        validation_tokens=512,
        selection=Selection(64),
        dtype="float32",
        shard_bytes=900_000,
    )
    scorer = steps.load_teacher(export, torch.device("cpu"))
    assert isinstance(scorer, DecoderScorer)
    times: dict[str, list[float]] = {"bare": [], "export": []}
    plans: list[CachePlan] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            plans = make_plans(export, Path(folder) / "caches")
            started = time.perf_counter()
            bare_forward(scorer.model, plans, plans[0].batch_rows)
            between = time.perf_counter()
            export_once(plans, scorer, encoders)
            times["bare"].append(between - started)
            times["export"].append(time.perf_counter() - between)
    scored = sum(len(window.token_ids) - 1 for plan in plans for window in plan.windows)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [e / b for e, b in zip(times["export"], times["bare"], strict=True)]
    kept = f"{export.selection.words()}, codec {export.codec}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {scored} tokens, {kept}")
    print(f"bare forward with head  {medians['bare']:.2f} s   {scored / medians['bare']:.0f} tokens/s")
    print(f"export                  {medians['export']:.2f} s   {scored / medians['export']:.0f} tokens/s")
    print(f"ratio (median of pairs) {statistics.median(ratios):.3f}   (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
