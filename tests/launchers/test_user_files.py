"""Experiments in any file: run, swept, run again from the record alone when the file has been edited or is gone."""

import json
from pathlib import Path

import pytest

from experiments.config import config_items, find_sweep, user_files
from kd_core.errors import UsageError
from tests.launchers.command import configs, run, values
from tests.tiny import Tiny

FILE = """import math
from pathlib import Path

import fiddle as fdl
from torch import Tensor

from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from experiments.base.sweep_definition import Sweep, grid
from kd_core.losses.sparse_view import SparseView
from shares import HALF

Path("code_ran").touch()


def surer(view: SparseView) -> Tensor:
    return view.student_label > math.log(HALF)


def mine(lr: float = 1e-3) -> fdl.Config[Experiment]:
    config = quickstart()
    config.optimizer.lr = lr
    config.evaluation.metrics = (surer,)
    return config


def plain() -> fdl.Config[Experiment]:
    return quickstart()


def halved(config: fdl.Config[Experiment], times: int = 1) -> None:
    config.optimizer.lr /= 2**times


def rates() -> Sweep:
    return Sweep(mine) * grid("optimizer.lr", [1e-3, 2e-3])
"""


@pytest.fixture
def file(in_tmp: Path) -> Path:
    """A file and one beside it, in a folder of their own; the test runs in another one."""
    folder = in_tmp / "elsewhere"
    folder.mkdir()
    (folder / "shares.py").write_text("HALF = 0.5\n")
    (folder / "my-study.py").write_text(FILE)
    return folder / "my-study.py"


def test_an_experiment_and_a_fiddler_of_a_file_are_named_as_others_are(file: Path) -> None:
    items = [f"{file}:mine(lr=0.004)", f"fiddler:{file}:halved(times=2)", "steps=7"]
    resolved = config_items.resolve_items(items, "Experiment")
    assert resolved.name == "mine"
    assert resolved.config.optimizer.lr == pytest.approx(1e-3)
    assert resolved.config.steps == 7
    assert [metric.__name__ for metric in resolved.config.evaluation.metrics] == ["surer"]
    assert "my-study.py:" in config_items.describe(resolved)


def test_a_record_keeps_texts_only_where_the_graph_has_code_of_them(file: Path) -> None:
    kept = json.loads(config_items.record_json(config_items.resolve_items([f"{file}:mine"], "Experiment").config))
    texts = {name: (file.parent / name).read_text() for name in ("my-study.py", "shares.py")}
    assert kept["user_files"] == [{"main": "my-study.py", "texts": texts}]
    of_file, of_ours = (
        config_items.record_json(config_items.resolve_items([name], "Experiment").config)
        for name in (f"{file}:plain", "quickstart")
    )
    assert of_file == of_ours


def test_an_edited_file_is_another_module_and_so_is_one_whose_neighbour_is_edited(file: Path) -> None:
    names = [user_files.read(file).module]
    (file.parent / "shares.py").write_text("HALF = 0.25\n")
    names.append(user_files.read(file).module)
    file.write_text(FILE + "\n")
    names.append(user_files.read(file).module)
    assert len(set(names)) == 3
    assert all(name.startswith("user_files.my_study_") for name in names)


MISTAKES = {
    "no such file": ("nowhere.py:mine", "nowhere.py is no Python file"),
    "no such function": ("{file}:mien", "no function 'mien' there. Did you mean 'mine'?"),
    "no function named": ("{file}", "names no function of the file"),
    "an argument that it has not": ("{file}:mine(rate=1)", "no argument 'rate'"),
    "a sweep in its place": ("{file}:rates", "returned an object of Sweep, wanted fdl.Config[Experiment]"),
}


@pytest.mark.parametrize(("item", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(file: Path, item: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        config_items.resolve_items([item.format(file=file)], "Experiment")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "where"), [("def f(:\n", "broken.py:1: "), ("\nimport no_such_module\n", "broken.py:2: ModuleNotFound")]
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(in_tmp: Path, text: str, where: str) -> None:
    (in_tmp / "broken.py").write_text(text)
    with pytest.raises(UsageError, match=where):
        config_items.resolve_items(["broken.py:f"], "Experiment")


def test_a_sweep_of_a_file_has_points_with_its_code(file: Path) -> None:
    name, function = find_sweep.find_sweep(f"{file}:rates")
    assert name == "rates"
    assert len(function()) == 2
    with pytest.raises(UsageError, match="Did you mean 'rates'"):
        find_sweep.find_sweep(f"{file}:rate")


@pytest.mark.parametrize("path", ["../shares.py", "/etc/shares.py", "data.py", "launchers/cli/app.py", "a b.py"])
def test_a_record_names_no_file_that_would_be_in_the_way_of_another(path: str) -> None:
    with pytest.raises(ValueError, match="not a file beside"):
        user_files.parse_user_files([{"main": "mine.py", "texts": {"mine.py": "", path: ""}}], "config.json")


def test_what_is_recorded_runs_again_and_nothing_but_training_runs_it(tiny: Tiny, file: Path, in_tmp: Path) -> None:
    ran = in_tmp / "code_ran"
    items = [f"{file}:mine", *tiny.train_items(2)[1:], "schedule.warmup_steps=1", "checkpoint.every=1"]
    done = run("launchers.train", *configs(items), "--run_dir=first")
    assert done.returncode == 0, done.stderr
    assert ran.exists()
    assert (in_tmp / "first/attempts/001/user_files/my-study.py").read_text() == FILE
    ran.unlink()

    for module, *arguments in (
        ("launchers.evaluate", "--student=first/checkpoints/step_00000002", f"--cache={tiny.validation}"),
        ("launchers.compare", "first"),
    ):
        done = run(module, *arguments)
        assert done.returncode == 0, done.stderr
        assert not ran.exists()

    file.write_text(FILE.replace("HALF)", "HALF / 2)"))
    done = run("launchers.train", *configs(items), "--run_dir=first")
    assert "code of my-study.py is " in done.stderr
    (file.parent / "shares.py").unlink()
    ran.unlink()
    done = run("launchers.train", "--config=run:first", "--run_dir=again")
    assert done.returncode == 0, done.stderr
    assert ran.exists()
    assert "the same bits are expected" in done.stderr
    assert f"{file} was edited" in done.stderr
    assert f"{file.parent}/shares.py is gone; the recorded text runs" in done.stderr
    assert values(in_tmp / "again") == values(in_tmp / "first")
    assert any("val/surer" in line for line in values(in_tmp / "again"))
    dry = run("launchers.train", "--config=run:again", "--dry_run")
    assert f"{file} was edited" in dry.stdout  # though that run's own code came out of a record
