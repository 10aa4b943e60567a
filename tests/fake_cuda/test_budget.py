"""A training step on fake CUDA tensors stays within its budget of host waits, launches, bytes and memory.

A change that adds a wait, or 20 launches, fails here. One that saves launches fails too until the budget is lowered,
because a budget with room to spare notices nothing. `python -m benchmarks.gpu.counts` shows what a step does where.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.gpu import fake_cuda
from benchmarks.gpu.shapes import SMALL, StepShape

ROOT = Path(__file__).parent.parent.parent
REASON = fake_cuda.why_unavailable() or (None if importlib.util.find_spec("triton") else "Triton is not installed")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BASE = StepShape(student="small", rows=2, length=64, top_k=8, chunk=32)
CHANGES: dict[str, dict[str, Any]] = {"one document": {}, "packed": {"documents": 3}}
# Launches of a budget that are not used, above which it must be lowered.
ROOM = 20


class Budget(NamedTuple):
    """The most of everything.

    Waits `inside` are between the first forward and the optimiser. The one that is left reads the step's numbers.
    """

    inside: int
    waits: int
    chunk: float
    forward: float
    backward: float
    optimizer: float


# Launches do not depend on the sizes, but for attention and the optimiser. These are the numbers of today.
BUDGETS = {
    "one document": Budget(inside=0, waits=1, chunk=147, forward=33, backward=52, optimizer=6),
    "packed": Budget(inside=0, waits=1, chunk=147, forward=33, backward=54, optimizer=6),
}
# Bytes of all other operations of the loss over those of its matmuls, and GiB over inputs, for N = 8,192, V = 151,936,
# D = 4,096, K = 64 and bfloat16. Three matmuls read and write 30 GB in chunks of 2,048.
LOSS_BYTES, LOSS_GIB = 0.35, 3.67


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(BASE).items()]
    command = [sys.executable, "-m", "benchmarks.gpu.counts", *sizes, "--each", json.dumps([*CHANGES.values()])]
    done = subprocess.run([*command, "--losses", "[{}]"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout)
    return {**dict(zip(CHANGES, counted["steps"], strict=True)), "loss": counted["losses"][0]}


@pytest.mark.parametrize("name", CHANGES)
def test_host_waits(counts: dict[str, Any], name: str) -> None:
    step, budget = counts[name], BUDGETS[name]
    lines = "\n".join(f"{wait['times']} × {wait['reason']}, {wait['line']}" for wait in step["waits_by_line"])
    assert step["waits_inside"] == budget.inside, f"waits of the host between the first forward and optimiser:\n{lines}"
    assert step["waits"] == budget.waits, f"waits of the host:\n{lines}"


@pytest.mark.parametrize("part", ["a chunk", "a layer, forward", "a layer, backward", "optimizer"])
@pytest.mark.parametrize("name", CHANGES)
def test_launches(counts: dict[str, Any], name: str, part: str) -> None:
    field = {"a chunk": "chunk", "optimizer": "optimizer"}.get(part) or part.removeprefix("a layer, ")
    launches, most = counts[name]["launches"][part], getattr(BUDGETS[name], field)
    assert launches <= most, f"more launches ({part}): {counts[name]['operations']}"
    assert launches > most - ROOM, (
        f"fewer launches ({part}): lower the budget, so that it notices the next that is added"
    )


def test_bytes_and_memory_of_the_loss(counts: dict[str, Any]) -> None:
    costs = counts["loss"]["phases"]["loss"]
    share = costs["bytes"] / costs["matmul_bytes"]
    assert 0.8 * LOSS_BYTES < share < LOSS_BYTES
    assert 0.8 * LOSS_GIB < counts["loss"]["peak_bytes"] / 2**30 < LOSS_GIB


def test_operations_are_those_of_the_shape(counts: dict[str, Any]) -> None:
    # 2 per weight and position forward, twice that backward. The loss computes its backward matmuls in its forward.
    arch, phases = SMALL, counts["packed"]["phases"]
    width, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    block = arch.hidden_size * (2 * width + 2 * kv + 3 * arch.intermediate_size)
    assert phases["layer forward"]["flops"] == 2 * BASE.positions * arch.num_layers * block
    assert phases["layer backward"]["flops"] == 2 * phases["layer forward"]["flops"]
    assert phases["loss"]["flops"] == 6 * BASE.positions * arch.vocab_size * arch.hidden_size
    # AdamW reads 16 bytes of a parameter and writes 12, beside its steps.
    parameters = arch.num_layers * (block + 2 * arch.hidden_size) + (arch.vocab_size + 1) * arch.hidden_size
    assert phases["optimizer"]["bytes"] == pytest.approx(28 * parameters, rel=1e-3)
