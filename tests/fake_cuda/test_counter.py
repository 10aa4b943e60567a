"""The counter of `benchmarks/gpu` sees what it is there for: waits with their line, launches, FLOPs, bytes, memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import fake_cuda
from benchmarks.gpu.shapes import SMALL, StepShape, make_batch

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(fake_cuda.why_unavailable() is not None, reason=str(fake_cuda.why_unavailable()))


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda.deliberate"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# Text of the line that waits, in the order of the mistakes.
WAITS = (
    "x.sum().item()  # a number", "x[0, 0].cpu()  # a copy", "if (x > 0).any():  # a branch", ".nonzero()  # a shape",
    "torch.cuda.synchronize()  # all", "non_blocking=True)  # pageable",
    "non_blocking=True)  # into pageable",
)  # fmt: skip


def test_each_wait_is_found_once_with_its_line(seen: dict[str, Any]) -> None:
    source = (ROOT / "tests/fake_cuda/deliberate.py").read_text().splitlines()
    added = [wait for wait in seen["waits"]["waits"] if "deliberate.py" in wait["line"]]
    assert len(added) == len(seen["waits"]["waits"]) - len(seen["nothing"]["waits"])
    for wait, text in zip(added, WAITS, strict=True):
        place, _, shown = wait["line"].partition(" ")
        path, number = place.split(":")
        assert path == "tests/fake_cuda/deliberate.py"
        assert source[int(number) - 1].strip() == shown
        assert text in shown
        assert wait["phase"] == "layer forward"


def test_what_does_not_wait_is_no_wait(seen: dict[str, Any]) -> None:
    for name in ("no waits", "launches"):
        assert seen[name]["waits"] == seen["nothing"]["waits"]


def test_twenty_more_launches_are_seen(seen: dict[str, Any]) -> None:
    assert seen["launches"]["launches"] == seen["nothing"]["launches"] + 20


# Launches, FLOPs, bytes of matmuls and bytes of others: [8, 16] @ [16, 32], and [8, 32] of 1,024 bytes, by hand.
COSTS = {
    "mm": [1, 2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32), 0],
    "addmm in place": [1, 2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 2 * 8 * 32), 0],
    "add": [1, 0, 0, 3 * 1024],
    "add an expanded row": [1, 0, 0, 2 * 1024 + 4 * 32],
    "mul in place": [1, 0, 0, 2 * 1024],
    # A cast, 1,024 bytes read and half of that written, and a copy, the other way round.
    "copy": [2, 0, 0, 2 * (1024 + 512)],
    "zero": [1, 0, 0, 1024],
    "view": [0, 0, 0, 0],
    # 32 ids of 8 bytes, and as many numbers of 4 bytes read and written.
    "gather": [1, 0, 0, 32 * 8 + 32 * 4 * 2],
    # 32 ids, 32 values, and 32 numbers read and written.
    "scatter_add": [1, 0, 0, 32 * 8 + 32 * 4 + 2 * 32 * 4],
    "lists": [2, 0, 0, 40 * 2 * 1024],
    # A kernel of the project's own is one launch, whatever it is made of.
    "own kernel": [1, 0, 0, 2 * 1024 + 4 * 8],
}


@pytest.mark.parametrize("operation", COSTS)
def test_costs_of_single_operations(seen: dict[str, Any], operation: str) -> None:
    assert seen["costs"][operation] == COSTS[operation]


def test_memory_holds_weights_moments_and_gradients(seen: dict[str, Any]) -> None:
    arch = SMALL
    width, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    block = arch.hidden_size * (2 * width + 2 * kv + 3 * arch.intermediate_size + 2)
    parameters = arch.num_layers * block + (arch.vocab_size + 1) * arch.hidden_size
    # Four float32 numbers a parameter. The rest is bfloat16 weights, activations of 32 positions, and a chunk's logits.
    assert 16 * parameters < seen["nothing"]["peak"] < 40 * parameters


def test_a_batch_has_the_documents_of_its_shape() -> None:
    shape = StepShape(student="small", rows=3, length=40, documents=4, top_k=5)
    lengths, batch = shape.document_lengths(), make_batch(shape)
    assert batch.topk_token_ids.shape == (3, 40, 5)
    for row, of_row in enumerate(lengths):
        assert sum(of_row) == 40
        assert [batch.document_ids[row].tolist().count(number) for number in range(4)] == of_row
    pairs = sum(sum(range(1, length + 1)) for of_row in lengths for length in of_row)
    assert shape.attention_pairs() == pairs
