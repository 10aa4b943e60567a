"""A cache as a Hugging Face data set, and back: the same records, in documented columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from data.cache.manifest import read_manifest
from data.cache.record import UNUSED, Record
from data.cache.selection import Selection
from data.importers import write_dataset as module
from data.importers.facts import read_facts
from data.importers.formats.formats import read_lines_of
from data.importers.import_cache import import_cache
from data.importers.settings import ImportSettings
from data.importers.write_dataset import columns_of, write_dataset
from kd_core.errors import UsageError
from tests.launchers.command import run
from tests.tiny import Tiny, bytes_of, write_caches


@pytest.fixture(scope="module")
def drawn(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of everything that can be kept: entries of several widths, samples, a tail at another temperature."""
    out = tmp_path_factory.mktemp("drawn")
    selection = Selection(top_k=6, mass=0.9, draws=5, tail_temperatures=(2.0,))
    write_caches(tiny.export(selection=selection), out)
    return out / "train"


def _by_id(ids: np.ndarray, logs: np.ndarray) -> list[list[tuple[int, float]]]:
    """The entries of each position that are used, by rising id."""
    rows = zip(ids.tolist(), logs.tolist(), strict=True)
    return [sorted(entry for entry in zip(*row, strict=True) if entry[1] > UNUSED) for row in rows]


def _same(found: Record, wanted: Record) -> None:
    assert (found.document, found.start) == (wanted.document, wanted.start)
    for name in ("token_ids", "loss_mask", "tail_log_prob", "label_log_prob"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
    assert _by_id(found.topk_token_ids, found.topk_log_probs) == _by_id(wanted.topk_token_ids, wanted.topk_log_probs)
    assert _by_id(*found.samples()) == _by_id(*wanted.samples())
    assert found.tempered_tails.keys() == wanted.tempered_tails.keys()
    for temperature, tail in wanted.tempered_tails.items():
        assert found.tempered_tails[temperature].tolist() == tail.tolist()


@pytest.mark.parametrize("kind", ["top k", "drawn"])
def test_a_cache_comes_back_as_it_was(tiny: Tiny, drawn: Path, tmp_path: Path, kind: str) -> None:
    cache = tiny.train if kind == "top k" else drawn
    manifest = read_manifest(cache)
    write_dataset(str(cache), tmp_path / "set")
    facts = read_facts(str(tmp_path / "set"))
    job = ImportSettings("huggingface", str(tmp_path / "set"), facts.vocab_size, facts.tokenizer, codec="lossless")
    again = import_cache(job, tmp_path / "again")
    for name in ("vocab_size", "tokenizer", "teacher", "selection", "unknown"):
        assert getattr(again, name) == getattr(manifest, name), name
    wanted = tiny.records(cache)
    for found, record in zip(tiny.records(tmp_path / "again"), wanted, strict=True):
        _same(found, record)
    assert {tau for record in wanted for tau in record.tempered_tails} == set(manifest.selection.tail_temperatures)


def test_its_columns_are_what_the_card_says(drawn: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Read by pyarrow alone."""
    write_dataset(str(drawn), tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["README.md", "cache.json", "data"]
    (path,) = (tmp_path / "set" / "data").iterdir()
    assert path.name == "train-00000-of-00001.parquet"
    table = parquet.read_table(path)
    card = (tmp_path / "set" / "README.md").read_text()
    assert card.startswith("---\nconfigs:\n- config_name: default\n")
    assert "path: data/train-*.parquet" in card
    for column in table.schema:
        assert f"| `{column.name}` |" in card
    assert [column.name for column in columns_of(read_manifest(drawn))] == table.schema.names
    record, row = tiny.records(drawn)[0], table.slice(0, 1).to_pylist()[0]
    assert row["token_ids"] == record.token_ids.tolist()
    # Probabilities of a position sum to 1, entries and tail together.
    total = sum(np.exp(row["topk_log_probs"][0])) + np.exp(row["tail_log_prob"][0])
    assert total == pytest.approx(1, abs=1e-5)
    assert len(row["sampled_token_ids"]) == len(row["tail_log_prob_at_2"]) == record.positions


def test_hugging_faces_library_reads_it(drawn: Path, tiny: Tiny, tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    write_dataset(str(drawn), tmp_path / "set")
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "arrow"))
    assert len(rows) == len(tiny.records(drawn))
    assert rows[1]["token_ids"] == tiny.records(drawn)[1].token_ids.tolist()


def test_interruptions_change_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_POSITIONS", 200)
    write_dataset(str(tiny.train), tmp_path / "whole")
    wanted = bytes_of(tmp_path / "whole")
    assert len([name for name in wanted if name.endswith(".parquet")]) > 2
    written = [0]
    values = module._values  # pyright: ignore[reportPrivateUsage]

    def interrupted(*arguments: Any) -> Any:
        written[0] += 1
        if written[0] % 150 == 0:
            raise KeyboardInterrupt
        return values(*arguments)

    monkeypatch.setattr(module, "_values", interrupted)
    for _ in range(20):
        try:
            write_dataset(str(tiny.train), tmp_path / "set")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "set" / "README.md").exists()
    assert written[0] > 150
    assert bytes_of(tmp_path / "set") == wanted
    with pytest.raises(UsageError, match="exists already"):
        write_dataset(str(tiny.train), tmp_path / "set")


def test_a_flipped_bit_of_a_data_set_is_named(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(str(tiny.train), tmp_path / "set")
    (path,) = (tmp_path / "set" / "data").iterdir()
    job = ImportSettings("huggingface", str(tmp_path / "set"), read_manifest(tiny.train).vocab_size, "unknown")
    with caplog.at_level("INFO", "kd"):
        list(read_lines_of(job))
    assert "left out: 1 .md" in caplog.text, "cache.json is read"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(UsageError, match=f"{path.name}: .*(checksum|CRC)"):
        list(read_lines_of(job))


def test_the_command_writes_and_reads_a_data_set(tiny: Tiny, tmp_path: Path) -> None:
    done = run("launchers.convert", "--to=huggingface", f"--source={tiny.train}", f"--out={tmp_path / 'set'}")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'set'}: {len(tiny.records())} records in 1 files, with a card" in done.stderr
    for flags, message in (
        ([f"--out={tmp_path / 'more'}", "--codec=lossless", "--model=m"], "--model, --codec: not for --to=huggingface"),
        (
            ["--out=s3://bucket/set"],
            "--out: got a URL; convert writes folders. Copy the folder to the bucket afterwards",
        ),
    ):
        done = run("launchers.convert", "--to=huggingface", f"--source={tiny.train}", *flags)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    back = [f"--source={tmp_path / 'set'}", f"--out={tmp_path / 'cache'}"]
    done = run("launchers.convert", "--format=huggingface", *back)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "cache").tokenizer == read_manifest(tiny.train).tokenizer
    facts = tmp_path / "set" / "cache.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "version": 2}))
    done = run("launchers.convert", "--format=huggingface", *back[:1], f"--out={tmp_path / 'other'}")
    assert done.returncode
    assert "cache.json: format and version are" in done.stderr
