"""Parts that do not fit are refused with their path; settings that nothing reads are named, and no others."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fiddle as fdl
import pytest

from data.teacher.choose_scorer import read_teacher_facts
from experiments.base.checks import warn_of_layout
from experiments.base.experiment import Experiment
from experiments.config import config_items
from kd_core.errors import UsageError
from kd_core.students.decoder.rope import LongRopeScaling
from kd_core.students.huggingface.config_json import config_fields, read_architecture
from tests.launchers.command import configs, run
from tests.tiny import Tiny


def _experiment(tiny: Tiny, *items: str) -> Experiment:
    return fdl.build(config_items.resolve_items([*tiny.train_items(), *items], "Experiment").config)


REFUSED = {
    "rows too short": (["tag:RowLength=16"], r"collate.row_length: got 16; shards.path .* has a record of 32"),
    "K above the cache's": (["shards.top_k=9"], r"shards: shards.top_k: got 9; the cache .* holds 8"),
    "K of validation": (["evaluation.shards.top_k=9"], "evaluation.shards: shards.top_k: got 9"),
    "a tail that is not there": (["loss.terms.kd.tail=sampled"], "loss.terms.kd.tail: 'sampled' on a cache of"),
    "a vocabulary": (["student.vocab_size=300"], r"student.vocab_size: got 300; wanted at least the 305 tokens"),
    "no student": (["student.folder=none/there"], "no such folder: student.folder: none/there"),
    "steps too few": (["schedule.constant_steps=9"], "constant_steps 9 is more than steps 6"),
    "a step of half rows": (["tokens_per_step=48"], "multiple of collate.row_length 32"),
    "no such metric": (["checkpoint.best_metric=val/los"], "checkpoint.best_metric: got 'val/los'"),
    "the worst kept": (["checkpoint.best_metric=val/top1_agreement"], "checkpoint.best_mode: got min .* wanted max"),
    "the worst kept, too": (["checkpoint.best_mode=max"], "checkpoint.best_mode: got max for val/loss, .* wanted min"),
}


@pytest.mark.parametrize(("items", "message"), REFUSED.values(), ids=REFUSED)
def test_parts_that_do_not_fit_are_refused_by_path(tiny: Tiny, items: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _experiment(tiny, *items).check()


def test_a_student_of_another_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.teacher, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="shards: .* written with tokenizer"):
        _experiment(tiny, f"student.folder={tmp_path / 'other'}").check()


def test_a_folder_of_caches_in_place_of_one_of_a_mixture_names_what_to_take(tiny: Tiny) -> None:
    caches = tiny.train.parent
    items = [f"cache_mix(first={str(caches)!r}, second={str(caches)!r})", *tiny.train_items()[1:3]]
    config = config_items.resolve_items([*items, f"shards.caches.second.path={caches}"], "Experiment").config
    with pytest.raises(
        UsageError,
        match=rf"shards.caches.second: {caches}: no cache .* some in it. Name one: {tiny.train}, {tiny.validation}\.",
    ):
        fdl.build(config).check()


def test_a_cache_that_is_read_too_often_is_named_with_the_steps_to_set(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    shown = _experiment(tiny).check()["the run"]
    times, rows = re.fullmatch(r"6 steps, .* positions, (.*) epochs of (\d+) rows", shown).groups()  # type: ignore[union-attr]
    epoch = int(rows) / 4  # steps, of 4 rows each
    assert float(times) == pytest.approx(6 / epoch, abs=0.01)
    enough, often = int(16 * epoch), int(16 * epoch) + 1
    _experiment(tiny, f"steps={enough}").check()
    assert "times through" not in caplog.text
    _experiment(tiny, f"steps={often}").check()
    said = f"{often} steps go 16 times through {tiny.train}, a cache of {rows} rows"
    assert said in caplog.text
    assert f"Set steps={round(4 * epoch)}, which goes 4 times through it" in caplog.text


UNUSED = {
    "waiting for nothing": (["shards.prefetch=0", "shards.timeout=5"], "shards.timeout=5.0"),
    "a limit of none": (["shards.max_damaged_blocks=1"], "shards.max_damaged_blocks=1"),
    "samples of none": (["shards.samples=False"], "shards.samples=False"),
    "damage in validation": (["evaluation.shards.on_damage=skip"], "evaluation.shards.on_damage=skip"),
    "scaling by 1": (["loss.terms.kd.temperature_scaling=none"], "loss.terms.kd.temperature_scaling=none"),
    "an end without effect": (
        ["collate.eod_id=0", "collate.reset_position_ids=False", "collate.reset_attention_mask=False"],
        "collate.eod_id=0",
    ),
    "skips where the first stops": (["optimizer.max_skipped=3"], "optimizer.max_skipped=3: the first one stops"),
    "how the best is told": (
        ["checkpoint.keep_best=0", "checkpoint.best_metric=val/kl"],
        "checkpoint.best_metric=val/kl: ",
    ),
    "tokens without prompts": (
        ["evaluation.prompts=()", "evaluation.continuation_tokens=5"],
        "evaluation.continuation_tokens=5: there are no",
    ),
    "positions that none share": (["parallel.sequence_parallel=True"], "parallel.sequence_parallel=True: no ranks"),
    "retries of a folder": (["shards.retry_seconds=5"], "shards.retry_seconds=5.0: "),
    "blocks of a folder": (["shards.block_cache=None"], "shards.block_cache=None: "),
    "the best of one": (["checkpoint.every=4", "evaluation.every=5"], "meet at step 20"),
}


@pytest.mark.parametrize(("items", "message"), UNUSED.values(), ids=UNUSED)
def test_a_setting_that_nothing_reads_is_named(tiny: Tiny, items: list[str], message: str) -> None:
    assert [sentence for sentence in _experiment(tiny, *items).unused() if message in sentence]


def test_the_command_warns_of_it(tiny: Tiny) -> None:
    done = run("launchers.train", *configs([*tiny.train_items(), "shards.samples=False"]), "--dry_run")
    assert "unused: shards.samples=False: " in done.stdout, done.stderr


@pytest.mark.parametrize("items", [[], ["shards.timeout=5"], ["checkpoint.every=6", "evaluation.every=6"]])
def test_settings_that_are_read_are_not(tiny: Tiny, items: list[str]) -> None:
    assert _experiment(tiny, *items).unused() == []


def test_validation_on_what_is_trained_on_is_warned_of(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    _experiment(tiny).check()
    assert not caplog.records
    _experiment(tiny, f"evaluation.shards.path={tiny.train}").check()
    assert f"evaluation.shards.path is shards.path, {tiny.train}: validation on training data" in caplog.text


@pytest.mark.parametrize(("warmup", "is_warned_of"), [(3, False), (4, True)])
def test_a_warm_up_of_more_than_half_the_run_is_warned_of(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, warmup: int, is_warned_of: bool
) -> None:
    _experiment(tiny, f"schedule.warmup_steps={warmup}").check()
    assert (f"the learning rate rises for {warmup} of 6 steps" in caplog.text) == is_warned_of


def test_a_record_longer_than_a_row_names_both_settings_that_go_together(tiny: Tiny) -> None:
    short = _experiment(tiny, "collate.row_length=16", "tokens_per_step=64")
    longest = int(short.shards.manifest.lengths.records.max())
    with pytest.raises(UsageError, match=rf"Set tag:RowLength={longest} and tokens_per_step={2 * longest} here"):
        short.check()
    assert _experiment(tiny, f"tag:RowLength={longest}", f"tokens_per_step={2 * longest}").check()


def test_a_record_longer_than_the_original_context_of_longrope_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.teacher, tmp_path / "phi")
    arch = read_architecture(tiny.teacher)
    ones = (1.0,) * (arch.head_dim // 2)
    scaled = replace(arch, family="phi3", rope_scaling=LongRopeScaling(ones, ones, 16, 1.0))
    (tmp_path / "phi" / "config.json").write_text(json.dumps(config_fields(scaled, 0, 0)))
    with pytest.raises(UsageError, match=r"more than 16 positions, and shards.path .* has a record of 32"):
        _experiment(tiny, f"student.folder={tmp_path / 'phi'}").check()
    assert read_teacher_facts(tmp_path / "phi", "decoder").max_positions == 16


def test_a_mix_is_validated_on_the_held_out_text_of_both(tiny: Tiny) -> None:
    caches = tiny.train.parent
    items = [f"cache_mix(first={str(caches)!r}, second={str(caches)!r}, share=0.7)", *tiny.train_items()[1:3]]
    experiment = fdl.build(config_items.resolve_items(items, "Experiment").config)
    assert {name: shards.path for name, shards in experiment.evaluation.caches.items()} == {
        "first": str(tiny.validation),
        "second": str(tiny.validation),
    }
    assert experiment.shards.weights == {"first": 0.7, "second": 0.3}


@pytest.mark.parametrize(("rows", "ranks", "message"), [(3, 4, "1 of them are idle"), (5, 2, "some wait"), (4, 2, "")])
def test_ranks_without_rows_are_warned_of(
    rows: int, ranks: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_layout(rows, ranks)
    assert bool(caplog.records) == bool(message)
    assert message in caplog.text
