import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_core import files
from kd_core.errors import UsageError
from kd_core.files import is_owned, new_folder, own_folder, read_json, sync_folder, write_text


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "made") as partial:
        (partial / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "made") as partial:
        (partial / "a").write_text("whole")
    assert (tmp_path / "made" / "a").read_text() == "whole"


def test_a_folder_has_one_owner_and_is_free_again_when_it_dies(tmp_path: Path) -> None:
    code = f"""
import time, pathlib
from kd_core.files import own_folder
with own_folder(pathlib.Path({str(tmp_path)!r})):
    print("mine", flush=True)
    time.sleep(100_000)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    assert is_owned(tmp_path)
    assert not is_owned(tmp_path.parent)
    with pytest.raises(UsageError, match=f"another process \\(pid {other.pid}\\)"), own_folder(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    assert not is_owned(tmp_path)
    with own_folder(tmp_path):
        pass


def _refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", _refusing(number))
    monkeypatch.setattr(os, "fsync", _refusing(number))
    monkeypatch.setattr(logging.getLogger("kd"), "propagate", True)
    files._warn_of_no_locks.cache_clear()
    for _ in range(2):
        with own_folder(tmp_path):
            assert not is_owned(tmp_path)
            sync_folder(tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"has no locks ({os.strerror(number)})" in caplog.text


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _refusing(errno.EIO))
    monkeypatch.setattr(os, "fsync", _refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), own_folder(tmp_path):
        pass
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_json_errors_name_the_file_and_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file, wanted a thing"):
        read_json(tmp_path / "x.json", "a thing")
    write_text(tmp_path / "x.json", "[1]")
    with pytest.raises(UsageError, match="holds a list"):
        read_json(tmp_path / "x.json", "a thing")
