"""The --config items: what they set, and one message for every mistake."""

import json
from pathlib import Path

import fiddle as fdl
import pytest

from experiments.config import config_items
from experiments.config.config_items import resolve_items
from experiments.config.paths import set_value
from kd_core.errors import UsageError
from kd_core.training.lr_schedule import WarmupCosine


def _lines(*items: str) -> list[str]:
    return config_items.describe(resolve_items(["quickstart", *items], "Experiment")).splitlines()


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("steps=7", "steps", 7),
        ("set:optimizer.lr=3", "optimizer.lr", 3.0),
        ("optimizer.betas=(0.8, 0.99)", "optimizer.betas", (0.8, 0.99)),
        ("student.keep_layers=[1, 2]", "student.keep_layers", (1, 2)),
        ("student.keep_layers=none", "student.keep_layers", None),
        ("student.folder=a/b", "student.folder", "a/b"),
        ("student.folder='12'", "student.folder", "12"),
        ("student.folder=12", "student.folder", "12"),
        ("loss.terms.kd.tail=renormalized", "loss.terms.kd.tail", "renormalized"),
        ("shards.top_k=8", "shards.top_k", 8),
    ],
)
def test_a_value_is_set_and_who_set_it_is_known(item: str, path: str, value: object) -> None:
    assert any(line.startswith(f"{path} = {value!r}  # --config={item}") for line in _lines(item))


def test_a_value_of_python_is_checked_as_one_of_text_and_a_part_is_copied() -> None:
    config = resolve_items(["quickstart"], "Experiment").config
    set_value(config, "optimizer.lr", 1, "here")
    schedule = fdl.Config(WarmupCosine, warmup_steps=3)
    set_value(config, "schedule", schedule, "here")
    schedule.warmup_steps = 9
    assert (config.optimizer.lr, config.schedule.warmup_steps) == (1.0, 3)
    for path, value, message in (
        ("optimizer.lr", "fast", "here: got 'fast', wanted float"),
        ("optimizer", schedule, "here: got a WarmupCosine, wanted Optimizer"),
        ("optimizer", 3, "optimizer is a part"),
        ("optimizer.lrr", 3, "Did you mean 'lr'"),
    ):
        with pytest.raises(UsageError, match=message):
            set_value(config, path, value, "here")


def test_defaults_and_the_experiments_own_values_name_their_place() -> None:
    lines = _lines()
    assert "optimizer.eps = 1e-08  # default of AdamW" in lines
    assert any(line.startswith("steps = ") and "# experiments/half_depth.py:" in line for line in lines)


def test_later_items_win() -> None:
    assert "steps = 9  # --config=steps=9" in _lines("steps=7", "steps=9")


MISTAKES = [
    (["quickstrat"], "Did you mean 'quickstart'"),
    (["quickstart_export"], "no such experiment"),
    (["steps=3"], "first --config must name an experiment"),
    (["fiddler:x"], "first --config must name an experiment"),
    (["quickstart", "quickstart"], "only the first --config names an experiment"),
    (["quickstart(lr=3)"], "no argument 'lr'. It takes none"),
    (["quickstart(lr=)"], "cannot be read"),
    (["quickstart(3)"], "cannot be read"),
    (["quickstart", "optimzer.lr=1"], "Did you mean 'optimizer'"),
    (["quickstart", "optimizer.lrr=1"], "optimizer has no 'lrr'. Did you mean 'lr'"),
    (["quickstart", "loss.terms.kdd.weight=1"], "loss.terms has no 'kdd'. Did you mean 'kd'"),
    (["quickstart", "steps.x=1"], "steps has no 'x'"),
    (["quickstart", "steps=foo"], "got 'foo', wanted int"),
    (["quickstart", "steps=1.5"], "got '1.5', wanted int"),
    (["quickstart", "steps=true"], "got 'true', wanted int"),
    (["quickstart", "optimizer.lr=fast"], "wanted float"),
    (["quickstart", "optimizer.betas=0.9"], "wanted tuple"),
    (["quickstart", "student.keep_layers=(1, 'a')"], "wanted tuple"),
    (["quickstart", "optimizer=AdamW"], "optimizer is a part, not a value"),
    (["quickstart", "loss.terms=none"], "loss.terms is a part"),
    (["quickstart", "fiddler:nothing"], "no such fiddler"),
    (["run:no/such/run"], "no such file"),
    (["config_file:pyproject.toml"], "no such file|not a record"),
]


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize(("items", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_message(items: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_items(items, "Experiment")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("loss.terms.kd.tail=foo", "wanted one of renormalized"),
        ("loss.chunk_tokens=0", "loss.chunk_tokens"),
        ("tokens_per_step=1000", "multiple of collate.row_length"),
        ("steps=0", "steps: got 0"),
        ("schedule.warmup_steps=1000", "more than steps"),
        ("parallel.recompute=every:0", "wanted none, full, every:N"),
        ("parallel.tensor_parallel=0", "parallel.tensor_parallel: got 0"),
        ("parallel.precision=float8", "wanted one of auto, float32, bfloat16"),
        ("checkpoint.every=0", "checkpoint.every: got 0"),
        ("evaluation.every=0", "evaluation.every"),
        ("collate.padding=never", "wanted one of row_length, longest"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_when_built(item: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fdl.build(resolve_items(["quickstart", item], "Experiment").config)


def test_a_record_cannot_name_code_that_is_not_ours(tmp_path: Path) -> None:
    record = json.loads(config_items.record_json(resolve_items(["quickstart"], "Experiment").config))
    text = json.dumps(record).replace('"module": "kd_core.students.starts.start"', '"module": "subprocess"')
    text = text.replace('"name": "Pretrained"', '"name": "check_output"')
    assert "subprocess" in text
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="so it was not loaded"):
        resolve_items([f"run:{tmp_path}"], "Experiment")


def test_a_record_is_described_like_the_experiment_that_it_holds(tmp_path: Path) -> None:
    config = resolve_items(["quickstart", "steps=7"], "Experiment").config
    (tmp_path / "config.json").write_text(config_items.record_json(config))
    back = config_items.describe(resolve_items([f"run:{tmp_path}", "seed=3"], "Experiment")).splitlines()
    assert f"steps = 7  # --config=run:{tmp_path}" in back
    assert "seed = 3  # --config=seed=3" in back
    values = [line.split("  # ")[0] for line in back if not line.startswith("seed")]
    assert values == [line.split("  # ")[0] for line in _lines("steps=7") if not line.startswith("seed")]


def test_the_fiddler_for_caches_changes_where_and_not_what_is_read() -> None:
    items = ["quickstart", "shards.top_k=16", "evaluation.shards.top_k=9", 'fiddler:cache(folder="x")']
    config = config_items.resolve_items(items, "Experiment").config
    assert (config.shards.path, config.shards.top_k) == ("x/train", 16)
    assert (config.evaluation.shards.path, config.evaluation.shards.top_k) == ("x/validation", 9)
    mixed = config_items.resolve_items(["cache_mix", 'fiddler:cache(folder="x")'], "Experiment").config
    assert mixed.shards.path == "x/train"
