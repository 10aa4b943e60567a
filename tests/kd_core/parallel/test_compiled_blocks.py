"""Compiled blocks over packed batches: how many graphs are made, and what is refused.

Graphs are made in a process of their own, because torch.compile cannot trace the checks of shapes in annotations.
"""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.parallel import engine
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import _compile_blocks, parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from tests.kd_core.students.dense_attention import dense_kernel
from tests.ranks import run_ranks

ARCH = Architecture(
    vocab_size=51, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=512,
)  # fmt: skip
COMPILED = Parallel(precision="bfloat16", compile=True)


def traced(by_kernel: bool) -> None:
    """torch.compile traces, with gradients, and runs what it traced as it is. Compiling it would take minutes."""
    torch.compile = partial(torch.compile, backend="aot_eager" if by_kernel else "eager")
    if by_kernel:
        dense_kernel(pytest.MonkeyPatch())
    random.seed(0)


def student() -> Decoder:
    model = parallelize(meta_decoder(ARCH), COMPILED, World())
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    assert isinstance(model, Decoder)
    return model


def packed(T: int, number: int) -> Tensor:
    """Document ids of two rows, cut at random places."""
    starts = torch.zeros(2 * T, dtype=torch.int64)
    starts[random.sample(range(2 * T), number)] = 1
    return starts.cumsum(0).view(2, T)


def run(model: Decoder, ids: Tensor, is_training: bool) -> list[Tensor]:
    """Hidden states, and the gradients of a training pass."""
    tokens, positions = ids % ARCH.vocab_size, torch.arange(ids.shape[1]).expand_as(ids)

    def hidden_states() -> Tensor:
        return model(tokens, positions, ids, lambda hidden, _: hidden, Documents.from_ids(ids))

    if not is_training:
        with engine.evaluation(model, COMPILED, World()):
            return [hidden_states()]
    model.zero_grad()
    with COMPILED.autocast(torch.device("cpu")):
        hidden = hidden_states()
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def fifty_batches(_: World, by_kernel: bool) -> None:
    traced(by_kernel)
    model = student()
    # Twice, because the second size of anything makes the graph for all sizes.
    for T, number, is_training in (
        (160, 2, True), (160, 90, True), (160, 9, False), (160, 90, False), (136, 4, True), (136, 70, False)
    ):  # fmt: skip
        run(model, packed(T, number), is_training)
    graphs, frames = counters["stats"]["unique_graphs"], counters["frames"]["total"]
    for batch in range(50):
        is_training = batch % 5 != 4
        T = 160 if batch % 7 else random.randint(130, 159)
        run(model, packed(T, random.randint(2, 100)), is_training)
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert counters["frames"]["total"] == frames
    # With the kernel, a block is one graph.
    assert bool(counters["graph_break"]) != by_kernel


@pytest.mark.parametrize("by_kernel", [False, True])
def test_fifty_packed_batches_make_no_graph_after_the_first_ones(by_kernel: bool) -> None:
    """By a loop over documents, and by the kernel inside the graph, with evaluation and a second length in between."""
    run_ranks(1, fifty_batches, by_kernel)


def same_values(_: World, by_kernel: bool) -> None:
    traced(by_kernel)
    ids = packed(160, 12)
    model = student()
    compiled = run(model, ids, is_training=True)
    for block in model.layers:
        del block.run  # its own function is left
    for one, other in zip(compiled, run(model, ids, is_training=True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_compiled_blocks_compute_what_blocks_compute(by_kernel: bool) -> None:
    run_ranks(1, same_values, by_kernel)


def test_cuda_graphs_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"parallel\.cuda_graphs: .*parallel\.compile=true"):
        Parallel(cuda_graphs=True)
    with pytest.raises(UsageError, match=r"parallel\.cuda_graphs: got recompute=full"):
        Parallel(cuda_graphs=True, compile=True, recompute="full")
    with pytest.raises(UsageError, match=r"parallel\.cuda_graphs: got a student on cpu"):
        parallelize(meta_decoder(ARCH), replace(COMPILED, cuda_graphs=True), World())


def test_a_pass_is_one_generation_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = list[bool]()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(True))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = student()
    run(model, packed(24, 2), is_training=False)
    assert not marks
    _compile_blocks(model, cuda_graphs=True, world=World(device=torch.device("cuda", 0)))
    for number, is_training in enumerate((True, False, False), 1):
        run(model, packed(24, 2), is_training)
        assert len(marks) == number
