"""Scoring by a teacher on a device: the top-k of all positions against a bare forward pass with the lm_head."""

from functools import partial

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import LLAMA_1B, LLAMA_8B, SMALL, matmul_weights
from benchmarks.gpu.training import random_student
from data.cache.selection import Selection
from data.teacher.scorer import DecoderScorer, score_rows
from data.teacher.select import select_entries
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World

PART = "export"


def run(session: Session) -> None:
    length, top_k = (32, 8) if session.tiny else (512, 64)
    teachers = {"1B": LLAMA_1B, "8B": LLAMA_8B}
    if session.tiny:
        teachers = dict.fromkeys(teachers, SMALL)
    for name, arch in teachers.items():
        model = random_student(arch, Parallel(), World(device=session.device)).eval()
        for dtype, rows in ((torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 16)):
            label = f"{name} teacher, {str(dtype).removeprefix('torch.')}, {rows} rows"
            scorer = DecoderScorer(model.to(dtype))
            session.attempt(PART, label, partial(_measure, session, label, scorer, (rows, length), top_k))
        del model, scorer
    logits = torch.randn(16 if session.tiny else 256, teachers["1B"].vocab_size, device=session.device)
    labels, draws = torch.zeros(len(logits), dtype=torch.int64, device=session.device), logits.new_zeros(len(logits), 0)
    selection = Selection(top_k=top_k)
    session.record(
        PART, f"selection of {len(logits)} positions",
        ms=session.milliseconds(lambda: select_entries(logits.clone(), labels, selection, draws)),
        topk_ms=session.milliseconds(lambda: logits.topk(top_k)),
    )  # fmt: skip


def _measure(session: Session, label: str, scorer: DecoderScorer, shape: tuple[int, int], top_k: int) -> None:
    """Records scoring, with results copied to the host, beside the forward pass and the logits alone."""
    (rows, length), arch = shape, scorer.model.arch
    tokens = torch.randint(arch.vocab_size, (rows, length + 1), device=session.device)
    documents = torch.zeros(rows, length, dtype=torch.int64, device=session.device)
    draws = torch.zeros(rows * length, 0, dtype=torch.float64, device=session.device)
    selection = Selection(top_k=top_k)

    def score() -> None:
        for values in score_rows(scorer, tokens, documents, selection, draws):
            values.cpu()

    @torch.no_grad()
    def forward() -> None:
        for _ in scorer.logits(tokens[:, :-1], documents):
            pass

    ms, bare = session.milliseconds(score, 3, 1), session.milliseconds(forward, 3, 1)
    flops = 2.0 * rows * length * matmul_weights(arch)
    session.record(
        PART, label, ms=ms, forward_ms=bare, ratio=ms / bare,
        tokens_s=rows * length / ms * 1e3, **session.mfu(flops, ms),
    )  # fmt: skip
