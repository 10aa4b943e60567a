"""Attention over packed documents by the variable-length kernel, whose operator is computed densely in float64 here."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from data.cache.record import Record
from data.stream.collate import Collate
from kd_core.document_lengths import Documents
from kd_core.losses.objective import CrossEntropy, Objective
from kd_core.students.decoder import attention
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.attention import attend
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.student import Student, allocate
from kd_core.training.step import batch_loss
from tests.kd_core.students.dense_attention import Kernel, dense_attention, dense_kernel

WIDTH = 16
ARCH = Architecture(
    vocab_size=51, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=WIDTH,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=512, qk_norm=True,
)  # fmt: skip
# Document ids of rows, with −1 on padding. A packing, one-token documents, a row that is one document, nearly no text.
PACKINGS = {
    "packed": [[0] * 7 + [1] * 30 + [2] * 3, [0] * 39 + [-1]],
    "one token each": [list(range(40)), [0] * 40],
    "mostly padding": [[0] + [-1] * 39, [0] * 20 + [1] * 2 + [-1] * 18],
}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return dense_kernel(monkeypatch)


def inputs(ids: Tensor, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, as a projection to [B, T, H d] lays them out."""
    random = torch.Generator().manual_seed(0)
    shapes = [(*ids.shape, n, WIDTH) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=random).to(dtype).transpose(1, 2) for shape in shapes]


def outputs(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))]


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_kernel_is_asked_for_attention_inside_documents(
    kernel: Kernel, packing: str, heads: tuple[int, int], window: int | None
) -> None:
    ids = torch.tensor(PACKINGS[packing])
    documents = Documents.from_ids(ids)
    tensors = inputs(ids, *heads, torch.bfloat16)
    numbers = (ids + torch.tensor([[1], [100]])).flatten()  # of all rows, none of them in two rows

    def dense(*qkv: Tensor) -> Tensor:
        flat = (x.transpose(1, 2).flatten(0, 1) for x in qkv)
        out, _ = dense_attention(*flat, numbers, 0.3, -1 if window is None else window - 1)
        return out.unflatten(0, ids.shape).transpose(1, 2)

    found = outputs(lambda *qkv: attend(*qkv, documents, 0.3, window), tensors)
    wanted = outputs(dense, tensors)
    assert kernel.calls == [(40, [-1 if window is None else window - 1, 0])]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_loop_over_documents_gives_the_same_as_the_dense_oracle(packing: str, window: int | None) -> None:
    """In float64, which the kernel does not take."""
    ids = torch.tensor(PACKINGS[packing])
    tensors = inputs(ids, 6, 2, torch.float64)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in tensors[:3]]
    numbers = (ids + torch.tensor([[1], [100]])).flatten()
    wanted, _ = dense_attention(*flat, numbers, None, -1 if window is None else window - 1)
    found = attend(*tensors[:3], Documents.from_ids(ids), window=window)
    torch.testing.assert_close(found.transpose(1, 2).flatten(0, 1), wanted, rtol=1e-12, atol=1e-12)


def test_what_the_kernel_does_not_take_goes_by_document(kernel: Kernel) -> None:
    ids = torch.tensor(PACKINGS["packed"])
    documents = Documents.from_ids(ids)
    for dtype in (torch.float32, torch.float64):
        attend(*inputs(ids, 6, 2, dtype)[:3], documents)
    attend(*(x[..., :12].contiguous() for x in inputs(ids, 6, 2, torch.bfloat16)[:3]), documents)
    # Rows of one document have faster kernels, but not with a window.
    whole = Documents.from_ids(torch.zeros_like(ids))
    attend(*inputs(ids, 6, 2, torch.bfloat16)[:3], whole)
    assert not kernel.calls
    attend(*inputs(ids, 6, 2, torch.bfloat16)[:3], whole, window=5)
    assert kernel.calls == [(40, [4, 0])]


def student() -> Decoder:
    model = allocate(meta_decoder(replace(ARCH, windows=(None, 5))), torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def test_a_student_gives_the_same_with_the_kernel_as_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to bfloat16's rounding: no document is mixed with another, and lengths that come with a batch are used."""
    ids = torch.tensor(PACKINGS["packed"])
    tokens, positions = torch.randint(51, ids.shape), torch.arange(40).expand(2, 40)
    model = student()

    def run(documents: Documents | None) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(tokens, positions, ids, lambda hidden, _: hidden, documents)
        hidden.square().sum().backward()
        return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    by_document = run(None)
    kernel = dense_kernel(monkeypatch)
    by_kernel = run(Documents.from_ids(ids))
    assert kernel.calls == [(40, [-1, 0]), (40, [4, 0])]
    for one, other in zip(by_kernel, by_document, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


def test_a_batch_with_lengths_needs_no_value_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where reading a value raises, with the shapes and gradients that the operator declares."""
    monkeypatch.setattr(attention, "KERNEL_DEVICES", ("meta",))
    meta = torch.device("meta")
    documents = Documents.from_ids(torch.tensor(PACKINGS["packed"])).to(meta)
    tokens = torch.zeros(2, 40, dtype=torch.int64, device=meta)
    model = meta_decoder(replace(ARCH, windows=(None, 5))).to(torch.bfloat16)
    hidden = model(tokens, tokens, tokens, lambda hidden, _: hidden, documents)
    assert hidden.shape == (2, 40, 48)
    hidden.sum().backward()
    with pytest.raises(NotImplementedError, match="no data"):
        model(tokens, tokens, tokens)


def test_a_batch_brings_its_lengths_through_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the collate to attention. The loop over documents has the same bits as without them."""
    sizes = ((7, 30, 3), (39,))
    random = torch.Generator().manual_seed(0)

    def record(positions: int) -> Record:
        ids = torch.randint(51, (positions + 1,), generator=random).numpy()
        return Record(
            name="", document="", start=0, token_ids=ids, loss_mask=np.ones(positions, bool),
            topk_token_ids=ids[1:, None].astype(np.int32), topk_log_probs=np.full((positions, 1), -0.5, np.float32),
            tail_log_prob=np.full(positions, math.log1p(-math.exp(-0.5)), np.float32),
            label_log_prob=np.full(positions, -0.5, np.float32),
        )  # fmt: skip

    batch = Collate(row_length=40)([[record(size) for size in row] for row in sizes])
    assert batch.documents is not None
    assert batch.documents.lengths == (7, 30, 3, 39, 1)
    moved = batch.to(torch.device("meta"))
    assert moved.documents is not None
    assert moved.documents.cu_seqlens.device.type == "meta"
    model = student()
    by_ids = batch_loss(model, replace(batch, documents=None), Objective({"ce": CrossEntropy()}), 1.0)
    monkeypatch.setattr(Documents, "from_ids", None)
    by_lengths = batch_loss(model, batch, Objective({"ce": CrossEntropy()}), 1.0)
    assert torch.equal(by_ids.total, by_lengths.total)


class OtherFamily(Student):
    """A family that knows nothing of lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.arch, self.layers, self.lm_head = ARCH, torch.nn.ModuleList(), torch.nn.Linear(51, 51, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens, 51).float()

    def context(self, position_ids: Tensor, document_ids: Tensor | None) -> Tensor:
        assert document_ids is not None
        self.seen = document_ids
        return position_ids

    def last_hidden(self, x: Tensor) -> Tensor:
        return x


def test_a_family_that_reads_ids_gets_them() -> None:
    ids = torch.tensor(PACKINGS["packed"])
    model = OtherFamily()
    hidden = model(ids % 51, ids, ids, lambda hidden, _: hidden, Documents.from_ids(ids))
    assert hidden.shape == (2, 40, 51)
    assert model.seen is ids
