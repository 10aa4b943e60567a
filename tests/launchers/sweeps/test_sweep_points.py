"""Sweeps resolved against their experiments: identities, names, and what is refused."""

from pathlib import Path
from typing import Any, cast

import fiddle as fdl
import numpy as np
import pytest

from experiments.base.sweep_definition import Axis, Sweep, fiddled, grid, seeds, tied
from experiments.config import config_items, find_sweep
from experiments.config.sweep_points import Point, point_label, resolve_points, short_names, swept_paths
from experiments.half_depth import quickstart, quickstart_export
from kd_core.errors import UsageError
from kd_core.losses.term_weights import Linear
from kd_core.training.lr_schedule import WarmupCosine
from kd_core.training.optimizer import AdamW
from launchers.sweeps.point_results import Row, group_by_seed
from launchers.sweeps.sweep_folder import Status, SweepFolder
from tests.launchers.command import configs, run
from tests.tiny import Tiny


def _points(sweep: Sweep, *items: str) -> list[Point]:
    return resolve_points(sweep, items, "study")


def _shorter(config: fdl.Config[Any]) -> None:
    config.steps = 30


def test_a_point_is_the_experiment_that_the_command_line_would_give() -> None:
    points = _points(Sweep(quickstart) * grid("shards.top_k", [1, 8]) * grid("optimizer.lr", [1]), "steps=7")
    for point, k in zip(points, (1, 8), strict=True):
        items = ["quickstart", "steps=7", f"shards.top_k={k}", "optimizer.lr=1"]
        assert point.record == config_items.record_json(config_items.resolve_items(items, "Experiment").config)
        assert len(point.id) == 12
        assert point.tokens == 7 * 1024


def test_a_tag_sets_all_that_carry_it_as_the_command_line_would() -> None:
    points = _points(Sweep(quickstart) * grid("tag:TopK", [4, 8]) * grid("tag:RowLength", [256]))
    for point, k in zip(points, (4, 8), strict=True):
        items = ["quickstart", f"tag:TopK={k}", "tag:RowLength=256"]
        assert point.record == config_items.record_json(config_items.resolve_items(items, "Experiment").config)
        assert point_label(point, swept_paths(points)) == f"tag:TopK={k} tag:RowLength=256"


def test_a_fiddler_of_the_command_line_makes_another_base_for_every_point() -> None:
    points = _points(Sweep(quickstart) * grid("steps", [7, 9]), "fiddler:short(steps=5)")
    for point, steps in zip(points, (7, 9), strict=True):
        items = ["quickstart", "fiddler:short(steps=5)", f"steps={steps}"]
        assert point.record == config_items.record_json(config_items.resolve_items(items, "Experiment").config)


def test_an_identity_is_a_function_of_what_is_trained_alone() -> None:
    one = _points(Sweep(quickstart) * grid("steps", [30]) * grid("seed", [1]))
    other = _points(Sweep(quickstart) * grid("seed", [0, 1]), "steps=30")
    assert one[0].id == other[1].id != other[0].id
    assert _points(Sweep(quickstart) * fiddled(_shorter) * grid("seed", [1]))[0].id == one[0].id


def test_points_are_averaged_that_differ_in_their_seed_alone() -> None:
    rates = [0.1234567, 0.12345678]  # differ beyond the digits that a short form shows
    points = _points(Sweep(quickstart) * grid("optimizer.lr", rates) * seeds(2))
    rows = [Row(point, "finished", {"val/kl": float(i)}) for i, point in enumerate(points)]
    assert [(group.n, group.means["val/kl"].mean) for group in group_by_seed(rows, ["val/kl"])] == [(2, 0.5), (2, 2.5)]
    assert [group.n for group in group_by_seed(rows[:3], ["val/kl"])] == [2, 1]


def test_equal_values_are_one_point_whenever_they_are_run() -> None:
    for path, one, other in (
        ("loss.terms.kd.weight", 1, 1.0),
        ("optimizer.weight_decay", 0.0, -0.0),
        ("optimizer.lr", 1, np.int64(1)),
        ("steps", 7, np.int32(7)),
    ):
        points = [_points(Sweep(quickstart) * grid(path, [value]))[0] for value in (one, other)]
        assert points[0].id == points[1].id, path


def test_more_values_leave_the_points_there_as_they_are() -> None:
    few, more = (_points(Sweep(quickstart) * grid("shards.top_k", range(1, n)) * seeds(n)) for n in (3, 5))
    assert {point.id for point in few} < {point.id for point in more}


def test_a_value_may_be_a_part_or_a_function() -> None:
    schedules = [fdl.Config(WarmupCosine, warmup_steps=n) for n in (2, 7)]
    points = _points(Sweep(quickstart) * grid("schedule", schedules) * fiddled(None, _shorter))
    assert [point.config.schedule.warmup_steps for point in points] == [2, 2, 7, 7]
    assert [point.steps for point in points] == [60, 30, 60, 30]
    assert (
        point_label(points[3], swept_paths(points)) == "schedule=WarmupCosine(warmup_steps=7) fiddler:change=_shorter"
    )
    points[0].config.schedule.warmup_steps = 3
    assert schedules[0].warmup_steps == points[1].config.schedule.warmup_steps == 2


def test_names_are_as_short_as_they_can_be() -> None:
    names = short_names(["loss.terms.kd.weight", "loss.terms.sft.weight", "seed", "shards.top_k"])
    assert list(names.values()) == ["kd.weight", "sft.weight", "seed", "top_k"]
    assert short_names(["steps", "schedule.steps"]) == {"steps": "steps", "schedule.steps": "schedule.steps"}


def _hides(config: fdl.Config[Any]) -> None:
    config.seed = 5


def _misspells(config: fdl.Config[Any]) -> None:
    config.optimizer.lrr = 1.0


def _misspelt() -> fdl.Config[Any]:
    config = quickstart()
    _misspells(config)
    return config


def _of_another_type(config: fdl.Config[Any]) -> None:
    config.steps = "many"


MISTAKES: list[tuple[Sweep, list[str], str]] = [
    (Sweep(quickstart) * grid("seed", [1, 1]), [], r"seed=1\) and \(.*seed=1\) are the same experiment"),
    (Sweep(quickstart, quickstart), [], "are the same experiment"),
    (Sweep(quickstart) * grid("loss.terms.kd.weight", [1, 1.0]), [], r"weight=1\) and \(.*weight=1.0\) are the same"),
    (Sweep(quickstart) * grid("optimizer.weight_decay", [0.0, -0.0]), [], r"=0.0\) and \(.*=-0.0\) are the same"),
    (Sweep(quickstart) * grid("optimizer.betas", [(0, 0.9), (-0.0, 0.9)]), [], "are the same experiment"),
    (
        Sweep(quickstart) * grid("loss.terms.kd.weight", [fdl.Config(Linear, 0, 1), fdl.Config(Linear, 0.0, 1.0)]),
        [],
        "are the same experiment",
    ),
    (Sweep(quickstart) * grid("steps", [60, 30]) + Sweep(quickstart), [], r"steps=60\) and .* the same experiment"),
    (Sweep(quickstart) * seeds(2), ["seed=3"], "--config=seed=3: seed is swept"),
    (Sweep(quickstart) * seeds(2), ["set:seed=3"], "seed is swept"),
    (
        Sweep(quickstart) * grid("collate.row_length", [128, 256]),
        ["tag:RowLength=512"],
        "--config=tag:RowLength=512: collate.row_length is swept",
    ),
    (
        Sweep(quickstart) * grid("tag:RowLength", [128, 256]),
        ["collate.row_length=512"],
        "--config=collate.row_length=512: tag:RowLength is swept",
    ),
    (Sweep(quickstart) * grid("tag:TopK", [8]), ["tag:TopK=8"], "--config=tag:TopK=8: tag:TopK is swept"),
    (
        Sweep(quickstart) * grid("shards.top_k", [4]) * grid("tag:TopK", [8]),
        [],
        "tag:TopK=8 would hide the swept shards.top_k",
    ),
    (
        Sweep(quickstart) * grid("tag:RowLenght", [128]),
        [],
        "--sweep=study: tag:RowLenght=128: no such tag in experiments/. Did you mean 'RowLength'",
    ),
    (Sweep(quickstart) * grid("tag:TopK", ["x"]), [], "--sweep=study: tag:TopK=x: got 'x', wanted int"),
    (Sweep(quickstart) * fiddled(_misspells), [], r"test_sweep_points.py:\d+: .*'lrr'.* Did you mean 'lr'"),
    (Sweep(_misspelt), [], r"--sweep=study: _misspelt: .*test_sweep_points.py:\d+: .*'lrr'.* Did you mean 'lr'"),
    (Sweep(quickstart) * fiddled(_of_another_type), [], r"test_sweep_points.py:\d+: steps: got 'many', wanted int"),
    (
        Sweep(quickstart) * grid("schedule", [fdl.Config(WarmupCosine)]),
        ["schedule.warmup_steps=1"],
        "schedule is swept",
    ),
    (Sweep(quickstart) * seeds(2) * fiddled(_hides), [], "seed=0 was hidden: .* left 5 there"),
    (Sweep(quickstart) * fiddled(_shorter), ["steps=20"], "steps=20 was hidden: .* left 30 there"),
    (
        Sweep(quickstart) * grid("shards.topk", [1]),
        [],
        r"--sweep=study: shards.topk=1: shards has no 'topk'. .*'top_k'",
    ),
    (Sweep(quickstart) * grid("steps", [1.5]), [], "got 1.5, wanted int"),
    (Sweep(quickstart) * grid("steps", [True]), [], "got True, wanted int"),
    (Sweep(quickstart) * grid("optimizer", [1]), [], "optimizer is a part"),
    (Sweep(quickstart) * grid("schedule", [fdl.Config(AdamW)]), [], "got a AdamW, wanted Schedule"),
    (Sweep(quickstart) * tied(("steps", "seed"), ["x"]), [], "got 'x', wanted int"),
    (Sweep(quickstart_export) * seeds(1), [], "gives a TeacherExport, wanted an Experiment"),
    (Sweep(quickstart) * seeds(2), ["quickstart"], "only the first --config names an experiment"),
    (Sweep(), [], "has no points"),
    (Sweep(quickstart) * Axis(()), [], "has no points"),
]


@pytest.mark.parametrize(("sweep", "items", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_a_mistake_is_one_message(sweep: Sweep, items: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _points(sweep, *items)


def test_a_value_that_makes_no_sense_is_refused_when_built() -> None:
    (point,) = _points(Sweep(quickstart) * grid("loss.terms.kd.tail", ["none at all"]))
    with pytest.raises(UsageError, match="wanted one of") as caught:
        point.build()
    assert "Fiddle context" not in str(caught.value)


def test_numbers_of_numpy_are_numbers_and_what_no_record_holds_is_the_sweeps_mistake() -> None:
    (one, other) = resolve_points(Sweep(quickstart) * grid("optimizer.lr", np.logspace(-4, -3, 2)), [], "study")
    assert [point.config.optimizer.lr for point in (one, other)] == pytest.approx([1e-4, 1e-3])
    assert one == resolve_points(Sweep(quickstart) * grid("optimizer.lr", [1e-4]), [], "study")[0]
    (pair,) = resolve_points(Sweep(quickstart) * grid("optimizer.betas", [tuple(np.array([0.5, 0.75]))]), [], "study")
    assert [type(beta) for beta in pair.config.optimizer.betas] == [float, float]
    wrong = Sweep(quickstart) * grid("evaluation.metrics", [(lambda view: view.student_label,)])
    with pytest.raises(UsageError, match=r"^--sweep=study: evaluation.metrics=.*which no record of a run can hold"):
        resolve_points(wrong, [], "study")


def test_slurms_flags_are_refused_of_a_local_queue(tmp_path: Path) -> None:
    flags = ["--sweep=objectives", "--backend=local", "--nodes=2", "--partition=gpu", f"--out={tmp_path / 'out'}"]
    done = run("launchers.sweep", *flags)
    assert "--partition, --nodes: for --backend=slurm alone; a local queue has --jobs" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_points_whose_caches_are_missing_are_refused_before_any_starts(
    backend: str, tiny: Tiny, tmp_path: Path
) -> None:
    moved, begun, out = tmp_path / "moved", tmp_path / "begun", tmp_path / "out"
    begun.mkdir()
    (begun / "plan.json").touch()
    study = tmp_path / "study.py"
    study.write_text(
        "from experiments.half_depth import quickstart\n"
        "from experiments.base.sweep_definition import Sweep, grid, seeds\n\n"
        f"def study():\n    paths = {[str(tiny.train), str(moved), str(begun)]}\n"
        "    return Sweep(quickstart) * grid('shards.path', paths) * seeds(2)\n"
    )
    items = [item for item in tiny.train_items()[1:] if not item.startswith("shards.path")]
    points = resolve_points(find_sweep.find_sweep(f"{study}:study")[1](), items, "study")
    flags = [f"--sweep={study}:study", f"--out={out}", f"--backend={backend}", *configs(items)]
    done = run("launchers.sweep", *flags)
    assert done.returncode == 1
    for folder, (one, other) in ((moved, points[2:4]), (begun, points[4:6])):
        assert f"shards.path {folder}, of 2 points: {one.id}, {other.id}" in done.stderr
    assert str(tiny.train) not in done.stderr
    assert not out.exists()
    inside = run("launchers.sweep", *flags, f"--config=evaluation.shards.path={tiny.train.parent}").stderr
    assert f"{tiny.train.parent} (there are some in it: {tiny.train}, {tiny.validation}), of 6 points" in inside

    folder = SweepFolder(out)
    folder.claim("study", points)
    for point in points:
        folder.set_status(point.id, Status("failed", 1))
    assert "6 of 6 points failed" in run("launchers.sweep", *flags[:2], "--backend=local", *flags[3:]).stderr


def test_what_is_no_sweep_is_refused() -> None:
    for wrong, got in ((None, "None"), ([quickstart], "an object of list"), (seeds(2), "an object of Axis")):
        with pytest.raises(UsageError, match=f"--sweep=study: returned {got}, wanted a Sweep"):
            resolve_points(cast(Any, wrong), [], "study")


def test_sweeps_are_found_by_name_and_in_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from experiments.base.sweep_definition import Sweep\n\ndef nothing():\n    return Sweep()\n")
    assert find_sweep.find_sweep("objectives")[0] == "objectives"
    (broken := tmp_path / "broken.py").write_text("x = (\n")
    name, function = find_sweep.find_sweep(f"{file}:nothing")
    assert (name, len(function())) == ("nothing", 0)
    for text, message in (
        ("objectivess", "Did you mean 'objectives'"),
        ("quickstart", "--sweep=quickstart: .* It is an experiment: python -m launchers.train"),
        (f"{file}:nothin", "Did you mean 'nothing'"),
        (f"{broken}:nothing", r"broken.py:1: '\(' was never closed"),
        (f"{file}:Sweep", "no function 'Sweep'"),
        (f"{tmp_path}/other.py:nothing", "is no Python file"),
    ):
        with pytest.raises(UsageError, match=message):
            find_sweep.find_sweep(text)
