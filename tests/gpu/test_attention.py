"""Attention over packed documents on a GPU, against dense attention in float64, and compiled blocks there."""

import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kd_core.document_lengths import Documents
from kd_core.parallel import engine
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.row_shares import DividedDocuments, RowShare
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.attention import attend
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.student import Student
from tests.kd_core.students.dense_attention import dense_attention, dense_gradients
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def packed(T: int, number: int) -> Tensor:
    """Document ids of two rows on the CPU, cut at random places, the second row padded at its end."""
    starts = torch.zeros(2 * T, dtype=torch.int64)
    starts[random.sample(range(2 * T), number)] = 1
    ids = starts.cumsum(0).view(2, T)
    ids[1, T - T // 5 :] = -1
    return ids


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("number", [0, 6, 200])
@pytest.mark.parametrize(("heads", "width"), [((6, 2), 64), ((4, 4), 128), ((5, 1), 80), ((3, 1), 20)])
def test_attention_inside_documents(
    heads: tuple[int, int], width: int, number: int, window: int | None, dtype: torch.dtype
) -> None:
    """What the kernel takes and what it does not. Errors are relative to the largest value, or to 1."""
    random.seed(0)
    torch.manual_seed(0)
    ids = packed(300, number)
    documents = Documents.from_ids(ids).to(GPU)
    shapes = [(*ids.shape, n, width) for n in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    leaves = [x.to(GPU).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, documents, 0.11, window)
    found = [out, *torch.autograd.grad(out, leaves, grad.to(GPU).transpose(1, 2))]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    numbers = (ids + torch.tensor([[1], [1000]])).flatten()
    left = -1 if window is None else window - 1
    wanted = [dense_attention(*flat, numbers, 0.11, left)[0]]
    wanted += dense_gradients(grad.flatten(0, 1), *flat, numbers, 0.11, left)
    for one, other in zip(found, wanted, strict=True):
        error = (one.transpose(1, 2).flatten(0, 1).cpu().double() - other).abs().max()
        assert error < ROUNDING[dtype] * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("number", [0, 6, 200])
def test_attention_of_slices_of_rows(number: int, window: int | None, dtype: torch.dtype) -> None:
    """Fewer queries than keys, as ranks that divide rows have them, beside whole rows. Here one GPU is every rank."""
    random.seed(0)
    torch.manual_seed(0)
    documents = Documents.from_ids(packed(304, number))
    q, k, v, grad = (torch.randn(2, heads, 304, 64).to(GPU, dtype).requires_grad_() for heads in (6, 2, 2, 6))
    outputs: list[Tensor] = []
    for share in (RowShare(rank, 2, rows=2) for rank in range(2)):
        divided = DividedDocuments.from_documents(documents, share).map(lambda tensor: tensor.to(GPU))
        outputs.append(torch.cat([
            attend(queries, part.keys_of(k), part.keys_of(v), part.documents, 0.11, window)
            for part, queries in zip(divided.slices, share.cut(q, dim=2).chunk(2, dim=2), strict=True)
        ], dim=2))  # fmt: skip
    out, whole = RowShare(0, 2).join(outputs, dim=2), attend(q, k, v, documents.to(GPU), 0.11, window)
    found, wanted = ([x.detach(), *torch.autograd.grad(x, (q, k, v), grad)] for x in (out, whole))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < ROUNDING[dtype] * max(1.0, float(other.abs().max()))


ARCH = Architecture(
    vocab_size=51, hidden_size=128, intermediate_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=512, windows=(None, 40) * 2,
)  # fmt: skip


def evaluated(model: Student, parallel: Parallel, batch: tuple[Tensor, Tensor, Documents]) -> Tensor:
    ids, positions, documents = batch
    with engine.evaluation(model, parallel, World(device=GPU)):
        return model(ids % 51, positions, ids, lambda hidden, _: hidden, documents).clone()


def compiled(_: World, cuda_graphs: bool) -> None:
    """In a process of its own, because torch.compile cannot trace the checks of shapes in annotations."""
    random.seed(0)
    world = World(device=GPU)
    plain = Parallel(precision="bfloat16")
    fast = Parallel(precision="bfloat16", compile=True, cuda_graphs=cuda_graphs)
    models = [parallelize(meta_decoder(ARCH), parallel, world) for parallel in (plain, fast)]
    for model in models:
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.05)
    graphs = 0
    for batch in range(50):
        ids = packed(300, 2 if batch == 0 else random.randint(1, 100))
        documents, ids = Documents.from_ids(ids).to(GPU), ids.to(GPU)
        positions = torch.arange(300, device=GPU).expand(2, 300)
        results: list[list[Tensor]] = []
        for model in models:
            model.zero_grad()
            with plain.autocast(GPU):
                hidden = model(ids % 51, positions, ids, lambda hidden, _: hidden, documents)
            hidden.square().mean().backward()
            results.append([hidden.detach().clone(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for one, other in zip(*results, strict=True):
            assert (one - other).norm() < 0.05 * other.norm()
        # Without gradients, each block reads the output of the one before it.
        if batch % 5 < 2:
            hidden, other = (evaluated(model, plain, (ids, positions, documents)) for model in models)
            assert (hidden - other).norm() < 0.05 * other.norm()
        if batch == 5:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_blocks_over_fifty_packed_batches(cuda_graphs: bool) -> None:
    run_ranks(1, compiled, cuda_graphs)
