"""Every experiment, export, fiddler and tag of experiments/ builds, and its values are those of its golden text.

After a wanted change: `make golden`, and read the diff.
"""

import os
from dataclasses import replace
from pathlib import Path

import fiddle as fdl
import pytest

from experiments.base.experiment import Experiment
from experiments.config import catalog, config_items, frozen_records
from experiments.config.catalog import Entry
from experiments.config.paths import walk
from kd_core.errors import UsageError
from kd_core.files import write_json
from kd_core.students.huggingface.config_json import config_fields, read_architecture
from tests.tiny import Tiny

GOLDEN = Path(__file__).parent.parent / "golden"
BASES = [entry for entry in catalog.entries() if entry.kind in catalog.WORDS]
FIDDLERS = [entry for entry in catalog.entries() if entry.kind == catalog.FIDDLER]
TAGS = [entry for entry in catalog.entries() if entry.kind == catalog.TAG]
ARGUMENTS = {
    "cache": '(folder="other/cache")',
    "transformers_student": '(folder="other/model")',
}  # of fiddlers whose arguments have no defaults
LARGE = ("gpus8", "nodes64")


def _without_places(text: str) -> str:
    return "".join(line.split("  # ")[0] + "\n" for line in text.splitlines())


def _check_golden(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, "values changed: if that is wanted, run `make golden` and read the diff"


@pytest.mark.parametrize("entry", BASES, ids=lambda entry: entry.name)
def test_it_builds_and_equals_its_golden_text(entry: Entry) -> None:
    resolved = config_items.resolve_items([entry.name], entry.kind)
    fdl.build(resolved.config)
    _check_golden(entry.name, _without_places(config_items.describe(resolved)))


@pytest.mark.parametrize("entry", FIDDLERS, ids=lambda entry: entry.name)
def test_a_fiddler_changes_what_its_golden_text_says(entry: Entry) -> None:
    items = ["quickstart", "steps=2000"]
    changed = config_items.resolve_items([*items, f"fiddler:{entry.name}{ARGUMENTS.get(entry.name, '')}"], entry.takes)
    fdl.build(changed.config)
    _check_golden(
        f"fiddler_{entry.name}",
        _without_places(config_items.differences(config_items.resolve_items(items, entry.takes), changed)),
    )


@pytest.mark.parametrize("entry", TAGS, ids=lambda entry: entry.name)
def test_a_tag_is_carried_and_set_everywhere_at_once(entry: Entry) -> None:
    items = ["quickstart", f"tag:{entry.name}=256"]
    places = [
        place for place in walk(config_items.resolve_items(items, "Experiment").config) if entry.load() in place.tags
    ]
    assert places
    assert {place.value for place in places} == {256}


@pytest.mark.parametrize("entry", [*BASES, *FIDDLERS, *TAGS], ids=lambda entry: entry.name)
def test_it_has_a_summary(entry: Entry) -> None:
    assert entry.summary.endswith(".")


@pytest.mark.parametrize("entry", BASES, ids=lambda entry: entry.name)
def test_its_record_gives_it_back(entry: Entry, tmp_path: Path) -> None:
    config = entry.load()()
    (tmp_path / "config.json").write_text(config_items.record_json(config))
    back = frozen_records.load_record(tmp_path / "config.json")
    assert back == config_items.freeze(config)
    assert config_items.record_json(back) == config_items.record_json(config)


def test_a_record_with_a_setting_that_is_no_more_loads_without_it(tmp_path: Path) -> None:
    """Another setting takes its name, and comes back with its default."""
    wanted = config_items.record_json(config_items.resolve_items(["cache_mix"], "Experiment").config)
    assert wanted.count("on_damage") > 4
    (tmp_path / "config.json").write_text(wanted.replace("on_damage", "shuffle_shards"))
    assert config_items.record_json(frozen_records.load_record(tmp_path / "config.json")) == wanted
    (tmp_path / "config.json").write_text(wanted.replace("on_damage", "shuffle_rows"))
    with pytest.raises(UsageError, match="Shards takes no 'shuffle_rows'"):
        frozen_records.load_record(tmp_path / "config.json")


@pytest.mark.parametrize("name", LARGE)
def test_a_dry_run_of_a_large_recipe_names_the_folders_that_are_missing(name: str) -> None:
    experiment: Experiment = fdl.build(config_items.resolve_items([name], "Experiment").config)
    with pytest.raises(UsageError) as error:
        experiment.check()
    for folder in ("student.folder: models/student-1b", "shards.path: caches/teacher-8b/train", "evaluation.shards"):
        assert folder in str(error.value)


@pytest.mark.parametrize(("name", "ranks", "layout"), [
    ("gpus8", 8, "8 ranks: 1 replicas × 8 shards × 1 tensor-parallel"),
    ("nodes64", 512, "512 ranks: 64 replicas × 8 shards × 1 tensor-parallel"),
])  # fmt: skip
def test_a_dry_run_of_a_large_recipe_tells_what_a_rank_holds(
    name: str, ranks: int, layout: str, tiny: Tiny, tmp_path: Path
) -> None:
    """A student of a billion parameters, without its weights, on the tiny caches."""
    arch = replace(read_architecture(tiny.teacher), hidden_size=2048, intermediate_size=8192, num_layers=16,
                   num_heads=32, num_kv_heads=8, head_dim=64)  # fmt: skip
    write_json(tmp_path / "config.json", config_fields(arch, 0, 0))
    (tmp_path / "tokenizer.json").write_bytes((tiny.teacher / "tokenizer.json").read_bytes())
    items = [f"student.folder={tmp_path}", f"shards.path={tiny.train}", f"evaluation.shards.path={tiny.validation}"]
    experiment: Experiment = fdl.build(config_items.resolve_items([name, *items], "Experiment").config)
    told = experiment.check(ranks)
    assert told["layout"] == layout
    assert "holds 121.72M parameters (0.487 GB in float32) and 0.974 GB of moments. A step adds" in told["a rank"]


def test_every_golden_text_has_its_config() -> None:
    wanted = {entry.name for entry in BASES} | {f"fiddler_{entry.name}" for entry in FIDDLERS}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == wanted
