from pathlib import Path

import pytest
import torch

from kd_core.errors import UsageError
from kd_core.files import write_json
from kd_core.parallel.mesh import World
from kd_core.students.starts import Pretrained, build
from kd_core.training import checkpoint
from kd_core.training.checkpoint import Checkpoint, Progress
from kd_core.training.optimizer import AdamW
from tests.tiny import Tiny


def _moved(tiny: Tiny) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = build(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    optimizer = AdamW().build(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    return model, optimizer


def test_parameters_and_moments_come_back_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    model, optimizer = _moved(tiny)
    checkpoint.save(tmp_path, Progress(7, 28, 1.5), model, optimizer, World())
    fresh = build(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    other = AdamW().build(fresh)
    assert checkpoint.load(tmp_path / "step_00000007", fresh, other) == Progress(7, 28, 1.5)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[ours][name], other.state[theirs][name])


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "step_00000009.partial").mkdir()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.keep_some(tmp_path, Checkpoint())
    assert list(tmp_path.iterdir()) == []


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, metric in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)]:
        (tmp_path / f"step_{step:08d}").mkdir()
        write_json(tmp_path / f"step_{step:08d}" / "progress.json", vars(Progress(step, step, metric)))
    checkpoint.keep_some(tmp_path, Checkpoint(keep_newest=2, keep_best=1))
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [2, 4, 5]


def test_a_damaged_checkpoint_is_named(tiny: Tiny, tmp_path: Path) -> None:
    model, optimizer = _moved(tiny)
    checkpoint.save(tmp_path, Progress(1, 4), model, optimizer, World())
    payload = next((tmp_path / "step_00000001").glob("*.distcp"))
    payload.write_bytes(payload.read_bytes()[:100])
    with pytest.raises(UsageError, match="step_00000001: cannot be read"):
        checkpoint.load(tmp_path / "step_00000001", model, optimizer)
