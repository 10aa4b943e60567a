"""Where a corpus lies: which files of a folder are its documents, and data sets of the hub (extra `hf`)."""

import fnmatch
import functools
import logging
import re
from pathlib import Path

from data.export.huggingface import HUB, NO_EXTRA
from data.export.rows import FORMATS, TEXTS, reader_of
from data.export.tables import saved_files
from data.folders import FolderFiles, files_below
from data.text_lines import PACKED
from kd_core.errors import UsageError
from kd_core.files import printable

log = logging.getLogger("kd")
HUB_CORPUS = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:(?P<part>.+))?", re.ASCII)
CARDS = ("readme.md", "readme.markdown")  # what describes a data set
SAVED = "dataset_dict.json"


def _pattern(part: str) -> str:
    """Of a folder, all that is in it."""
    return part if any(sign in part for sign in "*?[") or reader_of(Path(part)) else f"{part.rstrip('/')}/*"


@functools.lru_cache
def _snapshot(corpus: str) -> tuple[Path, str | None]:
    """The folder of a hub data set in the hub's own cache, fetched once a process; and the pattern of its files."""
    wanted = HUB_CORPUS.fullmatch(corpus.removeprefix(HUB))
    if wanted is None:
        raise UsageError(f"corpus {corpus}: wanted {HUB}OWNER/NAME, with @REVISION or :FOLDER behind it at will.")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"corpus {corpus}: a hub id {NO_EXTRA}") from None
    pattern = _pattern(wanted["part"]) if wanted["part"] else None
    fetch = functools.partial(
        snapshot_download,
        wanted["name"],
        repo_type="dataset",
        revision=wanted["revision"],
        allow_patterns=[pattern] if pattern else [f"*{ending}" for ending in FORMATS] + ["*.json"],
    )
    return Path(fetch()), pattern


def local_corpus(corpus: str) -> Path:
    """The file or folder of a corpus: its path, or where `hub:OWNER/NAME` was fetched to.

    Raises:
        UsageError: the hub does not give it.
    """
    return _snapshot(corpus)[0] if corpus.startswith(HUB) else Path(corpus)


def corpus_files(corpus: str, root: Path) -> FolderFiles:
    """The files of a folder that are read, and what is left out.

    Raises:
        UsageError: none is read, or one cannot be reached.
    """
    pattern = _snapshot(corpus)[1] if corpus.startswith(HUB) else None
    saved = functools.cache(saved_files)

    def is_wanted(path: Path) -> bool:
        if reader_of(path) is None or path.name == SAVED:
            return False
        if pattern and not fnmatch.fnmatch(str(path.relative_to(root)), pattern):
            return False
        names = saved(path.parent)
        return names is None or path.name in names

    found = files_below(root, is_wanted)
    rows = [path for path in found.files if not path.name.lower().endswith(tuple(TEXTS))]
    if rows:  # beside rows, a README is no document but tells of them
        cards = [path for path in found.files if path.name.lower() in CARDS]
        found.files = [path for path in found.files if path not in cards]
        found.left_out.update({"README of a data set": len(cards)} if cards else {})
    if not found.files:
        *endings, last = (ending for ending in FORMATS if not ending.endswith(tuple(PACKED)))
        others = f" It has {found.summary()}." if found.left_out else ""
        raise UsageError(
            f"corpus {printable(root)}: has no {', '.join(endings)} or {last} file (text and rows also as "
            f"{', '.join(PACKED)}).{others} Name a folder of them, or one such file."
        )
    return found
