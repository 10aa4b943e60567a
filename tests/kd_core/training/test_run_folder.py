"""Folders of runs that people have tidied, copied in part, or laid on other disks by links."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_core.errors import UsageError
from kd_core.files import new_folder, new_folder_target, write_text
from kd_core.parallel.world import World
from kd_core.students.huggingface.save import is_complete_export, save_pretrained
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.monitoring.metric_log import MetricLog
from kd_core.training.run_folder import RunFolder, attempt_facts
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of several files of weights."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    save_pretrained(model, folder, tiny.teacher, max_file_bytes=50_000)
    return folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-70])


HALVES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "half a config": lambda folder: _cut(folder / "config.json"),
    "half a tokenizer": lambda folder: _cut(folder / "tokenizer.json"),
    "no weights": lambda folder: [path.unlink() for path in folder.glob("model*")],
    "no index": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "a file of weights less": lambda folder: max(folder.glob("*.safetensors")).unlink(),
    "half a file of weights": lambda folder: _cut(max(folder.glob("*.safetensors"))),
    "an empty file of weights": lambda folder: max(folder.glob("*.safetensors")).write_bytes(b""),
    "an empty adapter": lambda folder: (folder / "adapter").mkdir(),
}


@pytest.mark.parametrize("half", HALVES)
def test_half_an_export_is_no_finished_run(exported: Path, tmp_path: Path, half: str) -> None:
    shutil.copytree(exported, tmp_path / "run" / "export")
    run = RunFolder(tmp_path / "run")
    assert run.is_finished
    (run.export / "README.md").write_text("notes that a user has added")
    assert run.is_finished
    HALVES[half](run.export)
    assert not run.is_finished


def test_a_file_or_a_link_to_nowhere_is_no_export(tmp_path: Path) -> None:
    assert not is_complete_export(tmp_path / "export")
    (tmp_path / "export").symlink_to(tmp_path / "nowhere")
    assert not is_complete_export(tmp_path / "export")
    (tmp_path / "file").touch()
    assert not is_complete_export(tmp_path / "file")


def _begin(run: RunFolder) -> str:
    return run.begin_attempt(attempt_facts(World(), {})).name


def test_an_attempt_takes_the_next_number_whatever_was_deleted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert [_begin(run), _begin(run), _begin(run)] == ["001", "002", "003"]
    shutil.rmtree(tmp_path / "attempts" / "001")
    assert _begin(run) == "004"
    shutil.rmtree(tmp_path / "attempts" / "003")
    assert [path.name for path in run.attempts()] == ["002", "004"]
    assert _begin(run) == "005"
    shutil.rmtree(tmp_path / "attempts")
    assert _begin(run) == "001"


def test_other_things_among_the_attempts_are_none_of_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    _begin(run)
    for name in ("003", "notes.txt", "002.bak", "²"):
        (tmp_path / "attempts" / name).write_text("a file")
    (tmp_path / "attempts" / "1_old").mkdir()
    assert [path.name for path in run.attempts()] == ["001"]
    assert _begin(run) == "004"
    (tmp_path / "attempts" / "005").mkdir()  # a kill has left it without its facts
    assert run.last_facts()["commit"]
    (tmp_path / "attempts" / "999").mkdir()
    assert _begin(run) == "1000"
    assert run.attempts()[-1].name == "1000", "by number, not by text"


def _log(folder: Path, resume_step: int | None, steps: range) -> None:
    with MetricLog(folder, resume_step) as log:
        for step in steps:
            log.add(step, {"train/loss": float(step)})


@pytest.mark.parametrize("linked", ["", "tensorboard", "run"])
def test_a_step_has_one_event_also_behind_links(tmp_path: Path, linked: str) -> None:
    run = tmp_path / "run"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").touch()
    if linked == "run":
        run.symlink_to("elsewhere")
    else:
        run.mkdir()
        if linked:
            (run / "tensorboard").symlink_to(tmp_path / "elsewhere")
    for resume_step, steps in ((None, range(1, 7)), (4, range(5, 7)), (6, range(7, 9))):
        _log(run, resume_step, steps)
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        seen = [each.step for each in events.Scalars("train/loss")]
        assert seen == list(range(1, steps.stop))
    assert (tmp_path / "elsewhere" / "mine.txt").exists()


def test_a_new_folder_behind_a_link_is_made_there_and_nothing_is_deleted_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name, target in itertools.product(("a", "b"), ("there", "missing")):
        if target == "there":
            (tmp_path / "disk" / f"{name}_{target}").mkdir()
        link = tmp_path / f"{name}_{target}"
        link.symlink_to(tmp_path / "disk" / f"{name}_{target}")
        with new_folder(link) as partial:
            (partial / "file").write_text(json.dumps(name))
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "disk" / f"{name}_{target}").iterdir()] == ["file"]
        with pytest.raises(UsageError, match=f"{link}: is a link to .* which holds something"), new_folder(link):
            raise AssertionError
        assert (link / "file").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="a file stands there"):
        new_folder_target(tmp_path / "file")


def test_a_record_that_a_kill_left_with_the_text_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the run's steps were raised, and its record keeps code, which nothing but training loads."""
    run, texts = RunFolder(tmp_path), {steps: f"steps = {steps}  # --config=steps={steps}\n" for steps in (10, 20, 30)}
    assert run.claim("ten", texts[10]) == {}
    assert run.claim("twenty", texts[20]) == {"steps": "10 there, 20 now"}
    attempt = run.begin_attempt({})
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.training.run_folder.write_text", _killed_at(run.path, 2))
        with pytest.raises(KeyboardInterrupt):
            run.change_record(attempt, "twenty", texts[20])
    assert (run.record(), run.settings_text()) == ("twenty", texts[10])
    assert run.claim("twenty", texts[20]) == {}
    assert run.settings_text() == texts[20]
    assert run.claim("thirty", texts[30]) == {"steps": "20 there, 30 now"}


def _killed_at(folder: Path, number: int) -> Callable[[Path, str], None]:
    """A writer that is killed at the file of that number in `folder`."""
    written = itertools.count(1)

    def write(path: Path, text: str) -> None:
        if path.parent == folder and next(written) == number:
            raise KeyboardInterrupt
        write_text(path, text)

    return write
