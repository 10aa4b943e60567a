import hashlib
import logging
import math
import re
from pathlib import Path

import pytest
import torch

from kd_core.errors import UsageError
from kd_core.files import read_json, write_json
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.async_saver import Saver
from kd_core.training.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointContent,
    Progress,
    delete_superseded,
    lock_for_reading,
    newest_undamaged,
)
from kd_core.training.checkpoints.checkpoint_state import run_state
from kd_core.training.monitoring.hang_watchdog import Pulse
from kd_core.training.optimizer import AdamW
from tests.tiny import Tiny


def _student(tiny: Tiny) -> tuple[Decoder, torch.optim.Optimizer]:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    return model, AdamW().build(model)


def _step(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()


def _write(tiny: Tiny, root: Path, *steps: int) -> None:
    model, optimizer = _student(tiny)
    for step in steps:
        _step(model, optimizer)
        content = CheckpointContent(run_state(model, optimizer), Progress(step, 4 * step), {}, "the record")
        checkpoint.write(root, content, World(), None)


def test_parameters_and_moments_come_back_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    model, optimizer = _student(tiny)
    _step(model, optimizer)
    content = CheckpointContent(run_state(model, optimizer), Progress(7, 28, 1.5, 2, 3), {}, "the record")
    folder = checkpoint.write(tmp_path, content, World(), None)
    fresh, other = _student(tiny)
    assert checkpoint.load(folder, fresh, other) == Progress(7, 28, 1.5, 2, 3)
    assert (folder / "config.json").read_text() == "the record"
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[ours][name], other.state[theirs][name])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_saving_changes_nothing_of_the_run_and_training_on_changes_nothing_of_what_is_saved(
    tiny: Tiny, tmp_path: Path, asynchronous: bool
) -> None:
    def trained(root: Path | None) -> list[torch.Tensor]:
        model, optimizer = _student(tiny)
        with Saver(root or tmp_path / "none", Checkpoint(asynchronous=asynchronous), "", World(), Pulse()) as saver:
            for step in range(4):
                if root:
                    saver.save(Progress(step, step), model, optimizer)
                _step(model, optimizer)
        return list(model.parameters())

    for ours, theirs in zip(trained(tmp_path / "saved"), trained(None), strict=True):
        assert torch.equal(ours, theirs)
    model, optimizer = _student(tiny)
    for _ in range(3):
        _step(model, optimizer)
    fresh, other = _student(tiny)
    assert checkpoint.load(tmp_path / "saved" / "step_00000003", fresh, other) == Progress(3, 3)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(optimizer.state[ours]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"])


def test_of_checkpoints_written_in_a_row_each_is_whole_and_the_policy_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    model, optimizer = _student(tiny)
    with Saver(tmp_path, Checkpoint(keep_newest=2, keep_best=1), "", World(), Pulse()) as saver:
        for step, metric in enumerate((3.0, 1.0, None, 2.0, None)):
            _step(model, optimizer)
            saver.save(Progress(step, step, metric), model, optimizer)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [1, 3, 4]
    assert not any(checkpoint.find_damage(path) for path in tmp_path.iterdir())


def test_an_error_of_the_writing_thread_is_raised_in_the_training_by_name(tiny: Tiny, tmp_path: Path) -> None:
    model, optimizer = _student(tiny)
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    saver = Saver(tmp_path / "checkpoints", Checkpoint(), "", World(), Pulse())
    saver.save(Progress(1, 1), model, optimizer)
    with pytest.raises(UsageError, match="checkpoints"):
        saver.wait()


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "step_00000009.partial").mkdir()
    assert newest_undamaged(tmp_path, World()) is None
    delete_superseded(tmp_path, Checkpoint(keep_newest=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 1)])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, mode: str, best: int) -> None:
    for step, metric in [(0, math.nan), (1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)]:
        (tmp_path / f"step_{step:08d}").mkdir()
        write_json(tmp_path / f"step_{step:08d}" / "progress.json", vars(Progress(step, step, metric)))
    delete_superseded(tmp_path, Checkpoint(keep_newest=2, keep_best=1, best_mode=mode))
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [best, 4, 5]


def test_one_that_is_being_read_is_not_deleted(tiny: Tiny, tmp_path: Path) -> None:
    _write(tiny, tmp_path, 1, 2, 3)
    with lock_for_reading(tmp_path / "step_00000001"):
        delete_superseded(tmp_path, Checkpoint(keep_newest=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    assert checkpoint.find_damage(tmp_path / "step_00000001") == []
    delete_superseded(tmp_path, Checkpoint(keep_newest=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def _truncate(folder: Path) -> None:
    payload = next(folder.glob("*.safetensors"))
    payload.write_bytes(payload.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    payload = next(folder.glob("*.safetensors"))
    content = bytearray(payload.read_bytes())
    content[len(content) // 2] ^= 1
    payload.write_bytes(content)


DAMAGE = {
    "has .* bytes instead of": _truncate,
    "has bytes that differ from those written": _flip,
    "tensors_00000.safetensors is missing": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "progress.json has": lambda folder: (folder / "progress.json").write_text("{}"),
    "files.json: no such file": lambda folder: (folder / "files.json").unlink(),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_newest_is_named_and_the_one_before_is_taken(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, said: str
) -> None:
    _write(tiny, tmp_path, 3, 6)
    DAMAGE[said](tmp_path / "step_00000006")
    with pytest.raises(UsageError, match=said):
        checkpoint.load_model(tmp_path / "step_00000006", _student(tiny)[0])
    with caplog.at_level(logging.ERROR, "kd"):
        assert newest_undamaged(tmp_path, World()) == tmp_path / "step_00000003"
    assert re.search(rf"step_00000006 is damaged: .*{said}", caplog.text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000006.damaged"]


def test_where_none_is_whole_the_run_does_not_begin_anew(tiny: Tiny, tmp_path: Path) -> None:
    _write(tiny, tmp_path, 3)
    _flip(tmp_path / "step_00000003")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"step_00000003\.damaged, and no whole checkpoint is left"):
            newest_undamaged(tmp_path, World())


def test_the_hashes_are_those_of_the_files(tiny: Tiny, tmp_path: Path) -> None:
    _write(tiny, tmp_path, 1)
    folder = tmp_path / "step_00000001"
    wanted = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "files.json"
    }
    assert read_json(folder / "files.json", "hashes") == wanted


def test_another_student_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    _write(tiny, tmp_path, 1)
    other = build_student(Pretrained(str(tiny.teacher), keep_layers=(0, 2)), torch.device("cpu"), seed=0)
    with pytest.raises(UsageError, match="is of another student"):
        checkpoint.load(tmp_path / "step_00000001", other, AdamW().build(other))
