"""What four ranks of a 400 MB student hold at most: no rank ever has it whole, from its start to its export."""

import ctypes
import re
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kd_core.files import write_json
from kd_core.losses.objective import CrossEntropy, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.engine import evaluation
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.huggingface.config_json import config_fields
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, Random, StudentInit
from kd_core.students.student import Student
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.checkpoint import CheckpointContent, Progress
from kd_core.training.checkpoints.checkpoint_state import run_state
from kd_core.training.optimizer import AdamW
from kd_core.training.step import batch_loss, train_step
from tests.kd_core.parallel.test_layouts import rows_of
from tests.ranks import run_ranks

ARCH = Architecture(
    vocab_size=64, hidden_size=1024, intermediate_size=2816, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=128,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=64,
)  # fmt: skip
BLOCK = 4 * (4 * 1024**2 + 3 * 1024 * 2816) / 1e6  # 51 MB, of 411
WHOLE = 8 * BLOCK
TENSOR = 4 * 1024 * 2816 / 1e6  # 12 MB
SLACK = 25.0  # of buffers that collectives and allocators keep
MMAP_THRESHOLD = -3  # of glibc's `mallopt`: larger tensors are mapped alone, and given back when they are freed
LAYOUTS = {
    "dp 4": Parallel(precision="float32", shard="full"),
    "dp 2 × tp 2": Parallel(precision="float32", shard="full", tensor_parallel=2),
}


def _resident() -> float:
    """MB of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024 / 1e6  # type: ignore[index]


@contextmanager
def _peak(found: dict[str, float], name: str) -> Generator[None]:
    """The most that is resident inside, above what is there now."""
    before, most, ended = _resident(), [0.0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            most[0] = max(most[0], _resident())
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        most[0] = max(most[0], _resident())
        ended.set()
        thread.join()
        found[name] = max(found.get(name, 0.0), most[0] - before)


def _begun(start: StudentInit, parallel: Parallel, world: World) -> Student:
    model = parallelize(start.build_on_meta(), parallel, world)
    start.fill(model, 0)
    return model


def _life(world: World, root: Path, layout: str) -> None:
    """Each phase of a run, and its peak over the memory before it."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)
    parallel, found = LAYOUTS[layout], dict[str, float]()
    world = world.with_layout(parallel.layout(world.size))
    random = Random(str(root), 1024, 2816, 8, 8, 8)
    with _peak(found, "random"):
        model = _begun(random, parallel, world)
    with _peak(found, "first export"):
        save_pretrained(model, root / layout / "folder", root, first=world.is_first)
    world.barrier()
    del model
    with _peak(found, "LoRA"):
        model = _begun(LoraStart(Pretrained(str(root / layout / "folder")), ("all",), rank=2), parallel, world)
    del model
    with _peak(found, "pretrained"):
        model = _begun(Pretrained(str(root / layout / "folder")), parallel, world)
        optimizer = AdamW().build(model)
    batch, objective = rows_of(0, range(1)), Objective({"sft": CrossEntropy()})
    with _peak(found, "evaluation"), evaluation(model, parallel, world):
        batch_loss(model, batch, objective, 1.0)
    with _peak(found, "step"):
        train_step(
            model, optimizer, [batch], objective=objective, clip_norm=1.0, parallel=parallel, world=world
        )  # fmt: skip
    with _peak(found, "save"):
        content = CheckpointContent(run_state(model, optimizer), Progress(1, 4), {}, "")
        folder = checkpoint.write(root / layout, content, world, None)
    world.barrier()
    with _peak(found, "resume"):
        checkpoint.load(folder, model, optimizer)
    with _peak(found, "best export"):
        checkpoint.load_model(folder, model, world)
        save_pretrained(model, root / layout / "export", root, first=world.is_first)
    own = WHOLE / 4
    bounds = {
        "random": own + TENSOR, "pretrained": own + 4 * TENSOR, "LoRA": own + 4 * TENSOR,
        # One tensor whole, what its collective holds beside it, and its copy for the file.
        "first export": 4 * TENSOR, "best export": 4 * TENSOR,
        "evaluation": 3 * BLOCK,
        # Gradients and two moments of its own, two blocks whole and their gradients.
        "step": 3 * own + 4 * BLOCK,
        "save": 2 * TENSOR,
        "resume": 2 * own + 4 * TENSOR,
    }  # fmt: skip
    print(layout, world.rank, {name: round(peak) for name, peak in found.items()})
    assert all(found[name] < bound + SLACK for name, bound in bounds.items()), (layout, found, bounds)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rank_holds_the_student_whole(layout: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", config_fields(ARCH, 0, 1))
    (tmp_path / "tokenizer.json").write_text("{}")
    run_ranks(4, _life, tmp_path, layout)
