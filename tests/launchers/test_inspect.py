"""`launchers.inspect`: shows a cache, writes its page, verifies it, and refuses in one message."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.cache.inspection.readable import (
    escape_unprintable,
    fit_to_width,
    id_to_text,
    readable_positions,
    terminal_width,
    tokenizer_folders,
)
from data.cache.selection import Selection
from launchers.reports.records_page import PageTables, html_page, terminal_lines
from tests.forks import ENVIRONMENT, ROOT
from tests.launchers.command import run
from tests.tiny import Tiny, write_caches


def test_it_shows_what_is_there_with_words_of_the_tokenizer_beside_the_cache(tiny: Tiny, tmp_path: Path) -> None:
    page = tmp_path / "cache.html"
    done = run("launchers.inspect", str(tiny.train), "--records=2", f"--html={page}")
    assert done.returncode == 0, done.stderr
    for wanted in (
        "texts begin with no BOS",
        "top 8",
        "KL(original‖decoded)",
        "teacher NLL",
        "ids of entries",
        "K = 1",
        "record 00000001",
    ):
        assert wanted in done.stdout
    every = int(re.search(r"^  all +([\d,]+)", done.stdout, re.MULTILINE)[1].replace(",", ""))
    assert every == sum(path.stat().st_size for path in tiny.train.iterdir())
    assert re.search(r"^ +0  The +(young|old|loud) +\d\.\d\d   (young|old|loud) \d+%", done.stdout, re.MULTILINE)
    assert "record 00000019" in page.read_text()


def test_of_conversations_it_does_not_say_what_texts_begin_with_and_skipped_rows_are_counted(
    tiny: Tiny, tmp_path: Path
) -> None:
    cache = shutil.copytree(tiny.train, tmp_path / "cache")
    manifest = json.loads((cache / "manifest.json").read_text())
    (plan,) = manifest["plans"]
    plan["chat_template"] = "0" * 64
    plan["corpus"]["skipped"] = {"not JSON": 2, "no field that is known": 1, "by others": "x"}
    manifest["statistics"]["teacher_nll"] = 1.25
    (cache / "manifest.json").write_text(json.dumps(manifest))
    shown = run("launchers.inspect", str(cache), "--records=0").stdout
    assert "texts begin with" not in shown
    assert re.search(r"^  teacher NLL +\d\.\d+ nats over all positions, 1\.2500 over scored positions$", shown, re.M)
    assert re.search(r"^  plan +train of .* seed 0; 3 rows skipped: 2 not JSON, 1 no field that is known$", shown, re.M)


def test_without_a_tokenizer_it_shows_ids_and_another_one_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    cache = shutil.copytree(tiny.train, tmp_path / "a" / "b" / "cache")
    manifest = json.loads((cache / "manifest.json").read_text())
    for teacher, named in (("gone/teacher", "in gone/teacher, the teacher's folder"), ("unknown", "beside the cache")):
        (cache / "manifest.json").write_text(json.dumps({**manifest, "made": {**manifest["made"], "teacher": teacher}}))
        done = run("launchers.inspect", str(cache))
        assert re.search(r"^ +0  #\d+ +#\d+ +", done.stdout, re.MULTILINE)
        told = (
            f"ids, not text: the tokenizer {manifest['tokenizer'][:12]}… is not {named}. Name its folder with --token"
        )
        assert told in done.stdout
    given = run("launchers.inspect", str(cache), f"--tokenizer={tiny.teacher}")
    assert re.search(r"^ +0  The +", given.stdout, re.MULTILINE)
    other = tmp_path / "other"
    other.mkdir()
    text = (tiny.teacher / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"content": "<end>"', '"content": "<fin>"').replace('"<end>":', '"<fin>":')
    )
    refused = run("launchers.inspect", str(cache), f"--tokenizer={other}")
    assert refused.returncode == 1
    assert "the cache was written with" in refused.stderr


def test_a_cache_that_was_moved_is_shown_as_text_a_screen_or_two_of_it(tiny: Tiny, tmp_path: Path) -> None:
    """Made with a teacher that is where it was; with one that is named from a folder above the cache."""
    cache = shutil.copytree(tiny.train, tmp_path / "a" / "cache")
    longest = max(record.positions for record in tiny.records())
    done = run("launchers.inspect", str(cache))
    assert re.search(r"^ +0  The +", done.stdout, re.MULTILINE)
    assert len(done.stdout.splitlines()) < 60
    assert f"… {longest - 20} more positions: --positions=0" in done.stdout
    shutil.copytree(tiny.teacher, tmp_path / "models" / "big")
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["made"]["teacher"] = "models/big"
    (cache / "manifest.json").write_text(json.dumps(manifest))
    done = run("launchers.inspect", str(cache), "--positions=0", "--records=2")
    assert re.search(r"^ +0  The +", done.stdout, re.MULTILINE)
    assert re.search(rf"^ +{longest - 1}  ", done.stdout, re.MULTILINE)
    assert "more positions" not in done.stdout
    (tmp_path / "models" / "big" / "tokenizer.json").write_text("{}")
    assert "ids, not text: " in run("launchers.inspect", str(cache)).stdout


def test_a_teacher_of_the_hub_is_looked_for_where_it_was_fetched_to(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not [place for place in tokenizer_folders(tiny.train, "hub:some/body") if place.is_relative_to(tmp_path)]
    fetched = tmp_path / "models--some--body"
    shutil.copytree(tiny.teacher, fetched / "snapshots" / "abc")
    (fetched / "refs").mkdir()
    (fetched / "refs" / "main").write_text("abc")
    assert next(iter(tokenizer_folders(tiny.train, "hub:some/body"))) == fetched / "snapshots" / "abc"


@pytest.mark.parametrize(
    "selection", [Selection(top_k=0, draws=6), Selection(top_k=3, draws=4, tail_temperatures=(2.0,))]
)
def test_samples_are_shown(tiny: Tiny, tmp_path: Path, selection: Selection) -> None:
    write_caches(tiny.export(selection=selection), tmp_path)
    done = run("launchers.inspect", str(tmp_path / "train"))
    assert done.returncode == 0, done.stderr
    assert f"{selection.draws} draws" in done.stdout
    assert re.search(r"samples +\d\.\d\d a position", done.stdout)


def test_verify_says_that_all_is_well_or_all_that_is_not(tiny: Tiny, tmp_path: Path) -> None:
    cache = shutil.copytree(tiny.train, tmp_path / "cache")
    done = run("launchers.inspect", "--verify", str(cache))
    assert done.returncode == 0, done.stdout
    assert re.search(r"whole; verified \d+ bytes, 30 records, 688 positions in .* MB/s", done.stdout)
    data = bytearray((cache / "shard-000001.tar").read_bytes())
    data[700] ^= 4
    (cache / "shard-000001.tar").write_bytes(data)
    (cache / "shard-000002.tar").unlink()
    done = run("launchers.inspect", str(cache), "--verify")
    assert done.returncode == 1
    assert "shard-000001.tar, block 0: sha256" in done.stdout
    assert "shard-000002.tar: cannot be read" in done.stdout
    assert "Traceback" not in done.stderr


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    for arguments, status, message in (
        ((), 2, "no CACHE given"),
        ((str(tmp_path), "more"), 2, "unexpected argument 'more'"),
        ((str(tmp_path),), 1, "manifest.json: no such file"),
        ((str(tmp_path), "--verify"), 1, "manifest.json: no such file"),
        ((str(tmp_path), "--records=-1"), 2, "--records"),
    ):
        done = run("launchers.inspect", *arguments)
        assert done.returncode == status
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_folder_of_caches_names_them(tiny: Tiny) -> None:
    done = run("launchers.inspect", str(tiny.train.parent))
    assert done.returncode == 1
    assert f"Name one: {tiny.train}, {tiny.validation}." in done.stderr


def test_a_reader_that_goes_away_is_no_error(tiny: Tiny) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "launchers.inspect", str(tiny.train)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT, check=False)
    os.close(write)
    assert done.returncode == 0
    assert b"rror" not in done.stderr


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}


def test_nothing_of_a_cache_becomes_html_or_moves_the_cursor(tiny: Tiny) -> None:
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>\x1b[2J\u202e\ud800'
    record = replace(tiny.records()[0], document=evil)
    page = html_page(
        PageTables(evil, [("teacher", evil)], [(evil, 1, 1.0)], [(evil, 0.5)]),
        [record],
        lambda _: escape_unprintable(evil),
        3,
    )
    page.encode()
    found = _Tags()
    found.feed(page)
    assert not {"script", "img", "link", "a"} & found.tags
    assert found.names <= {"charset", "lang", "http-equiv", "content", "class", "style", "tabindex"}
    assert "http://" not in page
    assert "https://" not in page
    for line in terminal_lines(record, lambda _: escape_unprintable(evil), 3, 90):
        assert line.isprintable()
        assert terminal_width(line) <= 90


@pytest.mark.parametrize("width", [10, 40, 57, 100, 300])
def test_a_table_fits_the_terminal(tiny: Tiny, width: int) -> None:
    wide = lambda token: "東京" * (token % 5)  # noqa: E731
    assert all(terminal_width(line) <= max(width, 40) for line in terminal_lines(tiny.records()[0], wide, 5, width))


def test_fit_counts_wide_characters_twice() -> None:
    assert fit_to_width("東京", 6) == "東京  "
    assert fit_to_width("東京東京", 6) == "東京… "
    assert fit_to_width("abc", 2) == "a…"


def test_alternatives_are_the_likeliest_and_the_rest_is_what_is_left(tiny: Tiny) -> None:
    record = tiny.records()[3]
    for at, spot in enumerate(readable_positions(record, id_to_text(None), 3)):
        probs = np.sort(np.exp(record.topk_log_probs[at].astype(np.float64)))[::-1]
        assert [prob for _, prob in spot.alternatives] == pytest.approx(probs[:3])
        assert spot.rest == pytest.approx(1 - probs[:3].sum())
        assert spot.label == f"#{record.token_ids[at + 1]}"
        assert spot.surprise == -record.label_log_prob[at]
