"""Every experiment, export and fiddler of experiments/ builds, and its values are those of its golden text.

After a wanted change: `make golden`, and read the diff.
"""

import os
from pathlib import Path

import fiddle as fdl
import pytest

from launchers import catalog, config_items
from launchers.catalog import Entry

GOLDEN = Path(__file__).parent.parent / "golden"
BASES = [entry for entry in catalog.entries() if entry.kind not in (catalog.FIDDLER, catalog.SWEEP)]


def _values(entry: Entry) -> str:
    resolved = config_items.resolve([entry.name], entry.kind)
    return "".join(line.split("  # ")[0] + "\n" for line in config_items.describe(resolved).splitlines())


@pytest.mark.parametrize("entry", BASES, ids=lambda entry: entry.name)
def test_it_builds_and_equals_its_golden_text(entry: Entry) -> None:
    fdl.build(entry.function()())
    path = GOLDEN / f"{entry.name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(_values(entry))
    assert path.read_text() == _values(entry), "values changed: if that is wanted, run `make golden` and read the diff"


@pytest.mark.parametrize("entry", BASES, ids=lambda entry: entry.name)
def test_it_has_a_summary_and_a_record_that_gives_it_back(entry: Entry, tmp_path: Path) -> None:
    assert entry.summary.endswith(".")
    config = entry.function()()
    (tmp_path / "config.json").write_text(config_items.record(config))
    back = config_items.load_record(tmp_path / "config.json")
    assert back == config_items.frozen(config)
    assert config_items.record(back) == config_items.record(config)


def test_every_golden_text_has_its_config() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {entry.name for entry in BASES}
