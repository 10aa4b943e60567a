"""Every file below a folder is read or counted: links, hidden files, closed folders, names of any bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.corpus.corpus import Corpus
from data.folders import find_files
from kd_core.errors import UsageError
from tests.forks import ROOT


def _names(corpus: Path) -> list[str]:
    return [document.name for document in Corpus(str(corpus)).documents()]


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")


def test_links_to_folders_are_followed_once_and_loops_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = tmp_path / "corpus"
    _write(corpus, "a.txt", "deep/b.txt", "z.txt")
    _write(tmp_path, "elsewhere/c.txt", "elsewhere/more/d.md", "beside.txt")
    (corpus / "linked").symlink_to("../elsewhere")
    (corpus / "again").symlink_to(tmp_path / "elsewhere" / "more")  # read by this name, for it comes first
    (corpus / "here").symlink_to(".")
    (corpus / "deep" / "up").symlink_to("../..")
    (tmp_path / "elsewhere" / "back").symlink_to(corpus / "deep")
    (corpus / "one.txt").symlink_to(tmp_path / "beside.txt")
    with caplog.at_level("INFO", logger="kd"):
        assert _names(corpus) == ["a.txt", "again/d.md", "deep/b.txt", "linked/c.txt", "one.txt", "z.txt"]
    assert f"corpus {corpus}: 4 left out: 4 link to a folder that is already read" in caplog.text
    caplog.clear()
    linked = tmp_path / "link"
    linked.symlink_to(corpus)
    assert _names(linked) == _names(corpus)


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(
        tmp_path,
        "a.txt",
        "b.PDF",
        "c.pdf",
        "d.docx",
        "Makefile",
        ".git/x.txt",
        ".hidden.txt",
        "n/.ipynb_checkpoints/a.txt",
    )
    os.mkfifo(tmp_path / "pipe.txt")
    with caplog.at_level("INFO", logger="kd"):
        assert _names(tmp_path) == ["a.txt"]
    assert "8 left out: 3 hidden, 2 .pdf, 1 .docx, 1 device or pipe, 1 without an ending" in caplog.text
    caplog.clear()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UsageError, match=r"has no .txt, .* It has 3 hidden, 2 .pdf"):
        _names(tmp_path)
    _write(tmp_path, ".cache/corpus/a.txt")
    assert _names(tmp_path / ".cache") == ["corpus/a.txt"]  # what is named is no copy that somebody hid


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt")
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"/b: a link to something that does not exist"):
        _names(tmp_path)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", "closed/b.txt")
    (tmp_path / "closed").chmod(0)
    handle, path = os.pipe(), tmp_path
    while path != path.parent and path != Path("/tmp"):  # noqa: S108 (where pytest's own folders begin)
        path.chmod(path.stat().st_mode | 0o055)
        path = path.parent
    (tmp_path / "closed").chmod(0)
    process = os.fork()
    if process == 0:  # a user like any other, where this one may read everything
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            find_files(tmp_path, lambda path: path.suffix == ".txt")
            os.write(handle[1], b"no error")
        except UsageError as error:
            os.write(handle[1], str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    (tmp_path / "closed").chmod(0o755)
    assert (
        os.read(handle[0], 4096)
        .decode()
        .endswith("closed: the folder cannot be read (Permission denied). Make it readable, or move it away.")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_names_that_are_not_utf8_are_read_under_printable_names_in_every_locale(tmp_path: Path) -> None:
    for name in (b"a.txt", "ö.txt".encode(), "ö.txt".encode("latin-1")):
        (tmp_path / os.fsdecode(name)).write_text("x")
    (tmp_path / "rows.jsonl").write_text('{"text": "ö"}', encoding="utf-8")
    wanted = ["a.txt", "rows.jsonl:1", "ö.txt", "\\xf6.txt"]
    assert _names(tmp_path) == wanted
    script = (
        "import json, locale, sys; from data.corpus.corpus import Corpus; corpus = Corpus(sys.argv[1]);"
        "print(json.dumps([[d.name for d in corpus.documents()], corpus.identity(), locale.getpreferredencoding()]))"
    )
    for settings, encoding in ({}, "UTF-8"), ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ANSI"):
        command = [sys.executable, "-c", script, str(tmp_path)]
        environment = {**os.environ, "LC_ALL": "C.UTF-8", **settings, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        names, identity, shown = json.loads(done.stdout)
        assert (names, identity) == (wanted, Corpus(str(tmp_path)).identity())
        assert encoding in shown
    (tmp_path / "broken.jsonl").write_text("no rows")
    with pytest.raises(UsageError, match=r"broken.jsonl:1: not JSON"):
        _names(tmp_path)
