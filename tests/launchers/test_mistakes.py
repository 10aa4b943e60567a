"""Mistakes that users make on a command line and in experiment files: each is one message that names the right place,
without a traceback, with the nearest name where there is one.
"""

import sys
from pathlib import Path

import fiddle as fdl
import pytest

from experiments.config import catalog, config_items
from launchers.cli import app
from tests.launchers.command import configs, run
from tests.tiny import Tiny

FILE = '''"""A user's file."""
import fiddle as fdl

from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from kd_core.training.lr_schedule import WarmupCosine


def mine(lr: float = 1e-3) -> fdl.Config[Experiment]:
    """Mine."""
    config = quickstart()
    config.optimizer.lr = lr
    {line}
    return config


def changed(config: fdl.Config[Experiment], factor: float) -> None:
    """A fiddler."""
    config.optimizer.lr *= factor
'''
ON_THE_COMMAND_LINE = {
    "no experiment": ([], "no --config given. Name an experiment"),
    "a name mistyped": (["quickstrat"], "no such experiment in experiments/. Did you mean 'quickstart'?"),
    "an export in its place": (["quickstart_export"], "It is an export: python -m launchers.export_teacher"),
    "a fiddler in its place": (["nemo_aligner"], "It is a fiddler of an experiment: --config=fiddler:nemo_aligner"),
    "a value first": (["steps=3"], "the first --config must name an experiment"),
    "a second experiment": (["quickstart", "sampled"], "only the first --config names an experiment"),
    "an unknown form": (["quickstart", "fidler:short"], "unknown form 'fidler:'. Did you mean 'fiddler:'?"),
    "a fiddler mistyped": (["quickstart", "fiddler:nemo_alinger"], "Did you mean 'nemo_aligner'?"),
    "a fiddler's argument": (["quickstart", "fiddler:short(step=1)"], "no argument 'step'. Did you mean 'steps'?"),
    "its type": (["quickstart", "fiddler:short(steps='two')"], "steps: got 'two', wanted int."),
    "an argument that is missing": (["quickstart", "fiddler:cache"], "'folder' has no default. Give it: (folder=…)."),
    "an argument by place": (["cache_mix(0.5)"], "0.5 is an argument without a name. Wanted cache_mix(NAME=0.5)."),
    "a tag mistyped": (["quickstart", "tag:RowLenght=64"], "no such tag in experiments/. Did you mean 'RowLength'?"),
    "a tag without a value": (["quickstart", "tag:RowLength"], "no value. Wanted tag:RowLength=value."),
    "a tag's type": (["quickstart", "tag:RowLength=long"], "collate.row_length: got 'long', wanted int."),
    "a path mistyped": (["quickstart", "optimizer.lrr=1"], "optimizer has no 'lrr'. Did you mean 'lr'?"),
    "half a path": (["quickstart", "kd.weight=1"], "Did you mean 'loss.terms.kd.weight'?"),
    "text for a number": (["quickstart", "steps=many"], "--config=steps=many: got 'many', wanted int."),
    "half a step": (["quickstart", "steps=1.5"], "got '1.5', wanted int."),
    "one of two": (["quickstart", "optimizer.betas=0.9"], "got '0.9', wanted tuple[float, float]."),
    "a part": (
        ["quickstart", "optimizer=AdamW"],
        "optimizer is a part, not a value. Set one of its values: optimizer.",
    ),
    "no such run": (["run:no/such/run"], "no/such/run/config.json: no such file, wanted the config.json of a run."),
    "no such tail": (["quickstart", "loss.terms.kd.tail=bucket"], "(At loss.terms['kd'] in the config.)"),
    "a loss that makes no sense": (
        ["quickstart", "loss.terms.kd.divergence=reverse_kl", "loss.terms.kd.tail=truncated"],
        "Use tail 'tail_bucket'",
    ),
    "a parameter of another loss": (["quickstart", "loss.terms.kd.beta=0.1"], "jsd does"),
    "a weight below nothing": (["quickstart", "loss.terms.kd.weight=-1.0"], "loss.terms.kd.weight: got -1.0; wanted"),
    "a rate of nothing": (["quickstart", "optimizer.lr=0"], "optimizer.lr: got 0.0; wanted more than 0"),
    "a beta above one": (
        ["quickstart", "optimizer.betas=(0.9,1.5)"],
        "optimizer.betas: got (0.9, 1.5); wanted 0 to",
    ),
    "a decay below nothing": (["quickstart", "optimizer.weight_decay=-1"], "optimizer.weight_decay: got -1.0; wanted"),
    "a clip below nothing": (
        ["quickstart", "optimizer.clip_norm=-1"],
        "optimizer.clip_norm: got -1.0; wanted at least",
    ),
    "a warm-up below nothing": (["quickstart", "schedule.warmup_steps=-3"], "schedule.warmup_steps: got -3; wanted"),
    "a seed below nothing": (["quickstart", "seed=-1"], "seed: got -1; wanted at least 0."),
    "an id below nothing": (["quickstart", "collate.eod_id=-5"], "collate.eod_id: got -5; wanted at least 0"),
    "a path as Python has it": (["quickstart", "loss.terms['kd'].weight=1"], "Did you mean 'loss.terms.kd.weight'?"),
    "large letters": (["quickstart", "STEPS=3"], "Did you mean 'steps'?"),
    "all weights nothing": (["pretraining", "loss.terms.kd.weight=0.0"], "every weight is 0"),
    "a warm-up longer than the run": (["quickstart", "steps=4"], "warmup_steps 5 is more than steps 4"),
    "no such precision": (["quickstart", "parallel.precision=fp16"], "wanted one of auto, float32, bfloat16"),
}
IN_A_FILE = {
    "an attribute mistyped": ("config.optimizr.lr = 1.0", "experiments/user_file.py:13: AttributeError: No parameter "
                              "'optimizr' is there. Did you mean 'optimizer'?"),
    "a value mistyped": ("config.optimizer.lrate = 1.0", "experiments/user_file.py:13: AttributeError: No parameter "
                         "named 'lrate' exists"),
    "a term mistyped": ('config.loss.terms["kdd"].weight = 1.0', "user_file.py:13: KeyError: 'kdd' Did you mean 'kd'?"),
    "a wrong type": ('config.steps = "many"', "experiments/user_file.py:13: steps: got 'many', wanted int."),
    "a wrong part": ("config.optimizer = fdl.Config(WarmupCosine)", "user_file.py:13: optimizer: got WarmupCosine, "
                     "wanted Optimizer."),
    "a part without its value": ("del config.steps", "steps: not set, and has no default; wanted int."),
    "a name that is not there": ("config.steps = stepz", "user_file.py:13: NameError: name 'stepz' is not defined"),
    "an error of its own": ("config.steps = 1 // 0", "experiments/user_file.py:13: ZeroDivisionError: "),
    "an import that fails": ("import kd_core.loses", "user_file.py:13: ModuleNotFoundError: No module named "
                             "'kd_core.loses'"),
    "a term as an attribute": ("config.loss.terms.kd.weight = 1.0", "user_file.py:13: AttributeError: 'dict' object "
                               "has no attribute 'kd' It is a dictionary: ['kd']."),
    "an argument of a part": ('config.loss.terms["kd"] = fdl.Config(WarmupCosine, warmup=1)', "unexpected keyword "
                              "argument 'warmup' Did you mean 'warmup_steps'?"),
    "an object for its config": ("config.optimizer = config.optimizer.__fn_or_cls__()", "user_file.py:13: optimizer: "
                                 "got AdamW(lr=0.0004"),
    "a function without a name": ("config.evaluation.metrics = (lambda view: view.student_label,)", "user_file.py:13: "
                                  "evaluation.metrics: got (<function mine.<locals>.<lambda>"),
    "code of another package": ("import textwrap; config.evaluation.metrics = (textwrap.dedent,)", "wanted "
                                "functions that stand in a file of experiments/"),
    "a number of numpy": ("import numpy; config.optimizer.lr = numpy.sqrt(4e-6)", "which no record of a run can hold; "
                          "wanted Python's own numbers, 0.002."),
    "nothing returned": ("config = None", "experiments/user_file.py:9: mine returned None, wanted "
                         "fdl.Config[Experiment]. Is there no `return config` at its end?"),
    "a part returned": ("config = config.loss", "mine returned fdl.Config[Objective], wanted fdl.Config[Experiment]."),
    "an end of its own": ("raise SystemExit(3)", "experiments/user_file.py:13: ended the program (3)."),
    "a parenthesis": ("config.steps = (3", "experiments/user_file.py:13 cannot be read: '(' was never closed."),
}  # fmt: skip


def _message(items: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a mistake: from the flags' items to the built graph, through its own guard."""
    with pytest.raises(SystemExit) as exit_info, app.guard("train"):
        fdl.build(config_items.resolve_items(items, "Experiment").config)
    assert exit_info.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("train: error: ")
    assert "Traceback" not in said
    assert said.count("\n") == 1, "one message, on one line"
    return said


@pytest.mark.parametrize(("items", "wanted"), ON_THE_COMMAND_LINE.values(), ids=ON_THE_COMMAND_LINE)
def test_a_mistake_on_the_command_line(items: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wanted in _message(items, capsys)


def _write(folder: Path, line: str, name: str = "user_file") -> None:
    (folder / f"{name}.py").write_text(FILE.replace("{line}", line))
    sys.modules.pop(f"experiments.{name}", None)


@pytest.mark.parametrize(("line", "wanted"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_a_mistake_in_an_experiment_file(
    user_folder: Path, line: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(user_folder, line)
    assert wanted in _message(["mine"], capsys)


@pytest.mark.parametrize("annotation", ["", " -> Experiment"])
def test_a_function_that_does_not_say_what_it_gives(
    user_folder: Path, annotation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = FILE.replace("{line}", "pass").replace(" -> fdl.Config[Experiment]", annotation)
    (user_folder / "user_file.py").write_text(text)
    given = annotation.removeprefix(" -> ") or "nothing"
    said = f"experiments/user_file.py:9 has a function mine that is annotated to return {given}; wanted -> fdl.Config["
    assert said in _message(["mine"], capsys)


@pytest.mark.parametrize("annotation", ["fiddle.Config[Experiment]", "'fdl.Config[Experiment]'", "Config[Experiment]"])
def test_an_annotation_may_be_written_in_other_ways(user_folder: Path, annotation: str) -> None:
    text = FILE.replace("{line}", "pass").replace("fdl.Config[Experiment]", annotation)
    (user_folder / "user_file.py").write_text(text)  # is read as text; imports do not matter
    assert "mine" in {entry.name for entry in catalog.entries() if entry.kind == "Experiment"}


def test_a_users_file_is_found_and_its_values_name_its_lines(user_folder: Path) -> None:
    _write(user_folder, "config.steps = 7")
    resolved = config_items.resolve_items(["mine(lr=2e-3)", "fiddler:changed(factor=2.0)"], "Experiment")
    lines = config_items.describe(resolved).splitlines()
    assert "steps = 7  # experiments/user_file.py:13" in lines
    assert "optimizer.lr = 0.004  # experiments/user_file.py:19, --config=fiddler:changed(factor=2.0)" in lines
    base = config_items.resolve_items(["mine(lr=2e-3)"], "Experiment")
    assert config_items.differences(base, resolved) == (
        "optimizer.lr = 0.004  (was 0.002)  # experiments/user_file.py:19, --config=fiddler:changed(factor=2.0)\n"
    )


def test_of_a_users_metric_nobody_else_knows_what_is_best(user_folder: Path, tiny: Tiny) -> None:
    text = FILE.replace("{line}", "config.evaluation.metrics = (disagreement,)")
    (user_folder / "user_file.py").write_text(f"{text}\n\ndef disagreement(view):\n    return -view.student_label\n")
    sys.modules.pop("experiments.user_file", None)
    items = ["mine", *tiny.train_items()[1:], "checkpoint.best_metric=val/disagreement"]
    for mode in ("min", "max"):
        fdl.build(config_items.resolve_items([*items, f"checkpoint.best_mode={mode}"], "Experiment").config).check()


def test_a_copy_that_an_editor_keeps_is_not_read(user_folder: Path) -> None:
    _write(user_folder, "pass")
    (user_folder / ".copies").mkdir()
    _write(user_folder / ".copies", "pass")
    assert config_items.resolve_items(["mine"], "Experiment").name == "mine"


def test_an_item_on_two_lines_is_one_line_of_the_record(user_folder: Path) -> None:
    _write(user_folder, "pass")
    resolved = config_items.resolve_items(["mine", "student.keep_layers=(0, 1,\n 8)"], "Experiment")
    assert "student.keep_layers = (0, 1, 8)  # --config=student.keep_layers=(0, 1, 8)\n" in config_items.describe(
        resolved
    )


def test_a_broken_file_hides_its_own_names_alone(user_folder: Path) -> None:
    _write(user_folder, "config.steps = (3")
    assert config_items.resolve_items(["quickstart"], "Experiment").name == "quickstart"
    assert "experiments/user_file.py:13 cannot be read" in catalog.format_listing("Experiment")


def test_a_name_that_stands_twice_is_refused(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(user_folder, "pass")
    _write(user_folder, "pass", "user_other")
    assert "stands in experiments.user_file and experiments.user_other" in _message(["mine"], capsys)


def test_a_fiddler_of_experiments_is_refused_for_an_export(user_folder: Path) -> None:
    _write(user_folder, "pass")
    assert "fiddler:changed" in catalog.format_listing("Experiment")
    assert "fiddler:changed" not in catalog.format_listing("TeacherExport")


@pytest.mark.parametrize(
    ("items", "flags", "wanted"),
    [
        (["quickstrat"], [], "Did you mean 'quickstart'?"),
        (["quickstart", "optimizer.lrr=1"], ["--print_config"], "Did you mean 'lr'?"),
        (["gpus8"], ["--dry_run"], "no such folder: student.folder: models/student-1b"),
        (["quickstart"], ["--diff", "--base=quickstrat"], "Did you mean 'quickstart'?"),
        (["quickstart"], ["--world=8"], "--world: is for --dry_run"),
        (["quickstart"], ["--max_time_per_run=abc", "--dry_run"], "got the time 'abc'"),
        (["quickstart"], ["--base=sampled"], "--base=sampled: is for --diff, which is not given."),
        (["quickstart"], ["--confg=steps=3"], "unknown flag --confg. Did you mean 'config'?"),
    ],
)
def test_the_command_itself_says_it_once(items: list[str], flags: list[str], wanted: str, in_tmp: Path) -> None:
    done = run("launchers.train", *configs(items), *flags, cwd=in_tmp)
    assert done.returncode != 0
    assert done.stderr.startswith("train: error: ")
    assert wanted in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


def test_an_export_to_what_cannot_be_written_is_refused(in_tmp: Path) -> None:
    done = run("launchers.export_teacher", "--config=quickstart_export", "--out=hf://datasets/a/b", cwd=in_tmp)
    assert done.returncode == 1
    assert "--out=hf://datasets/a/b: cannot be written; wanted a folder, s3://, gs:// or az://." in done.stderr
    assert list(in_tmp.iterdir()) == []


def test_diff_of_the_command() -> None:
    done = run("launchers.train", "--config=quickstart", "--config=steps=61", "--config=set:seed=0", "--diff")
    assert done.stdout == "steps = 61  (was 60)  # --config=steps=61\n", done.stderr
    done = run("launchers.train", "--config=sampled", "--diff", "--base=quickstart")
    assert [line.split("  #")[0] for line in done.stdout.splitlines()] == [
        "shards.path = 'quickstart/sampled/train'  (was 'quickstart/cache/train')",
        "loss.terms.kd.tail = 'sampled'  (was 'tail_bucket')",
    ]
