"""Files of a corpus: those of a folder that are its documents, and data sets of the hub (extra `hf`)."""

import fnmatch
import functools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data.corpus.file_rows import FORMATS, TEXTS, reader_of
from data.corpus.table_rows import saved_files
from data.folders import FolderFiles, files_below
from data.text_lines import PACKED
from kd_core.errors import UsageError
from kd_core.files import printable
from kd_core.hub import HUB, NO_EXTRA

HUB_CORPUS = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:(?P<part>.+))?", re.ASCII)
CARDS = ("readme.md", "readme.markdown")  # what describes a data set
DESCRIPTIONS = ("dataset_dict.json", "dataset_infos.json", "dataset_info.json")


class _Snapshot(NamedTuple):
    """A data set of the hub in the hub's own cache, and the pattern of those of its files that are wanted."""

    folder: Path
    pattern: str | None


def _pattern(part: str) -> str:
    """Returns the part of a data set as a pattern: of a folder, all that is in it."""
    return part if any(sign in part for sign in "*?[") or reader_of(Path(part)) else f"{part.rstrip('/')}/*"


@functools.lru_cache
def _snapshot(corpus: str) -> _Snapshot:
    """Fetch a data set, once a process. Without the hub it is what was fetched before, if that is whole.

    Raises:
        UsageError: the hub does not give it.
    """
    wanted = HUB_CORPUS.fullmatch(corpus.removeprefix(HUB))
    if wanted is None:
        raise UsageError(f"corpus {corpus}: wanted {HUB}OWNER/NAME, with @REVISION or :FOLDER behind it at will.")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"corpus {corpus}: a hub id {NO_EXTRA}") from None
    pattern = _pattern(wanted["part"]) if wanted["part"] else None
    patterns = [pattern] if pattern else [f"*{ending}" for ending in FORMATS]
    try:
        name, revision = wanted["name"], wanted["revision"]
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except Exception as error:  # the client raises its own, the network's and the cache's
        raise UsageError(f"corpus {corpus}: not to be had from the hub ({error!s:.400}).") from None
    return _Snapshot(Path(folder), pattern)


def local_corpus(corpus: str) -> Path:
    """The file or folder of a corpus: its path, or where `hub:OWNER/NAME` was fetched to.

    Raises:
        UsageError: the hub does not give it.
    """
    return _snapshot(corpus).folder if corpus.startswith(HUB) else Path(corpus)


def corpus_files(corpus: str) -> FolderFiles:
    """The files of a corpus, and what is left out.

    Raises:
        UsageError: none is read, or one cannot be reached.
    """
    root = local_corpus(corpus)
    if root.is_file():
        return FolderFiles(root.parent, [root])
    if not root.is_dir():
        raise UsageError(
            f"corpus {printable(Path(corpus))}: does not exist. Name a folder, a file, or {HUB}OWNER/NAME."
        )
    pattern = _snapshot(corpus).pattern if corpus.startswith(HUB) else None
    saved = functools.cache(saved_files)

    def is_wanted(path: Path) -> bool:
        if reader_of(path) is None or path.name in DESCRIPTIONS:
            return False
        if pattern and not fnmatch.fnmatch(str(path.relative_to(root)), pattern):
            return False
        names = saved(path.parent)
        return names is None or path.name in names

    found = files_below(root, is_wanted)
    texts = Counter(path.parent for path in found.files if path.name.lower().endswith(tuple(TEXTS)))
    if corpus.startswith(HUB) or texts.total() < len(found.files):
        # Beside rows, a README that is the one text of its folder is no document but tells of them.
        cards = [path for path in found.files if path.name.lower() in CARDS and texts[path.parent] == 1]
        found.files = [path for path in found.files if path not in cards]
        found.left_out.update({"README of a data set": len(cards)} if cards else {})
    if not found.files:
        *endings, last = (ending for ending in FORMATS if not ending.endswith(tuple(PACKED)))
        others = f" It has {found.summary()}." if found.left_out else ""
        raise UsageError(
            f"corpus {printable(Path(corpus))}: has no {', '.join(endings)} or {last} file (text and rows also as "
            f"{', '.join(PACKED)}).{others} Name a folder of them, or one such file."
        )
    return found
