"""Greedy continuations are those of plain decoding, whoever holds the student."""

from dataclasses import replace

import torch

from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.generation import continue_greedily
from tests.ranks import run_ranks
from tests.tiny import Tiny

FLOAT32 = Parallel(precision="float32")
PROMPTS = [[5, 40, 7], [260], [100, 90, 80, 70, 261, 3, 9]]
TOKENS = 6


def plainly(model: Decoder, prompt: list[int]) -> list[int]:
    """A prompt by itself, the whole logits of a whole pass for each token."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))
            ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_prompts_of_any_length_together_are_continued_as_each_alone(tiny: Tiny) -> None:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    wanted = [plainly(model, prompt) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in wanted}) > 1
    assert continue_greedily(model, PROMPTS, TOKENS, FLOAT32, World()) == wanted


def on_ranks(world: World, folder: str, wanted: list[list[int]]) -> None:
    layouts = [
        replace(FLOAT32, shard="full"),
        replace(FLOAT32, tensor_parallel=2),
        replace(FLOAT32, tensor_parallel=2, sequence_parallel=True),
    ]
    for parallel in layouts:
        laid_out = world.with_layout(parallel.layout(world.size))
        start = Pretrained(folder)
        model = parallelize(start.build_on_meta(), parallel, laid_out)
        start.fill(model, 0)
        assert continue_greedily(model, PROMPTS, TOKENS, parallel, laid_out) == wanted, parallel
        assert all(p.grad is None for p in model.parameters())


def test_ranks_continue_as_one_process(tiny: Tiny) -> None:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    run_ranks(2, on_ranks, str(tiny.teacher), continue_greedily(model, PROMPTS, TOKENS, FLOAT32, World()))
