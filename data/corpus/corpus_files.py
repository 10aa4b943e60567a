"""Files of a corpus: those below a folder that hold its documents, and data sets of the hub (extra `hf`)."""

import fnmatch
import functools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data.corpus.file_rows import READERS, TEXT_READERS, choose_reader
from data.corpus.table_rows import saved_table_files
from data.folders import FolderFiles, find_files
from data.text_lines import PACKED
from kd_core.errors import UsageError
from kd_core.files import printable
from kd_core.hub import HUB, NO_EXTRA

HUB_REFERENCE = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:(?P<part>.+))?", re.ASCII)
README_NAMES = ("readme.md", "readme.markdown")  # data set cards
METADATA_NAMES = ("dataset_dict.json", "dataset_infos.json", "dataset_info.json")


class _Snapshot(NamedTuple):
    """A data set in the hub client's cache, and the pattern of the files to read."""

    folder: Path
    pattern: str | None


def _pattern(part: str) -> str:
    """Returns a pattern for a part of a data set: the part itself if it names files, otherwise all below a folder."""
    return part if any(sign in part for sign in "*?[") or choose_reader(Path(part)) else f"{part.rstrip('/')}/*"


@functools.lru_cache
def _snapshot(corpus: str) -> _Snapshot:
    """Downloads a data set, once a process. Offline it returns an earlier download, if that is complete.

    Raises:
        UsageError: the reference is malformed, or the data set cannot be downloaded.
    """
    reference = HUB_REFERENCE.fullmatch(corpus.removeprefix(HUB))
    if reference is None:
        raise UsageError(f"corpus {corpus}: wanted {HUB}OWNER/NAME, optionally followed by @REVISION or :FOLDER.")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"corpus {corpus}: a hub id {NO_EXTRA}") from None
    pattern = _pattern(reference["part"]) if reference["part"] else None
    patterns = [pattern] if pattern else [f"*{ending}" for ending in READERS]
    try:
        name, revision = reference["name"], reference["revision"]
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except Exception as error:  # from the client, the network and the cache
        raise UsageError(f"corpus {corpus}: cannot be downloaded from the hub ({error!s:.400}).") from None
    return _Snapshot(Path(folder), pattern)


def local_path(corpus: str) -> Path:
    """Returns the file or folder of a corpus: its path, or the download of `hub:OWNER/NAME`.

    Raises:
        UsageError: the data set cannot be downloaded.
    """
    return _snapshot(corpus).folder if corpus.startswith(HUB) else Path(corpus)


def list_corpus_files(corpus: str) -> FolderFiles:
    """Lists the files of a corpus that are read, and counts those that are left out.

    Raises:
        UsageError: there is not a file to read, or one cannot be reached.
    """
    root = local_path(corpus)
    if root.is_file():
        return FolderFiles(root.parent, [root])
    if not root.is_dir():
        raise UsageError(
            f"corpus {printable(Path(corpus))}: does not exist. Name a folder, a file, or {HUB}OWNER/NAME."
        )
    pattern = _snapshot(corpus).pattern if corpus.startswith(HUB) else None
    saved_tables = functools.cache(saved_table_files)

    def is_read(path: Path) -> bool:
        if choose_reader(path) is None or path.name in METADATA_NAMES:
            return False
        if pattern and not fnmatch.fnmatch(str(path.relative_to(root)), pattern):
            return False
        names = saved_tables(path.parent)
        return names is None or path.name in names

    folder = find_files(root, is_read)
    texts = Counter(path.parent for path in folder.files if path.name.lower().endswith(tuple(TEXT_READERS)))
    if corpus.startswith(HUB) or texts.total() < len(folder.files):
        # On the hub and beside files of rows, a README that is the only text of its folder is a card, not a document.
        cards = [path for path in folder.files if path.name.lower() in README_NAMES and texts[path.parent] == 1]
        folder.files = [path for path in folder.files if path not in cards]
        folder.left_out.update({"README of a data set": len(cards)} if cards else {})
    if not folder.files:
        *endings, last = (ending for ending in READERS if not ending.endswith(tuple(PACKED)))
        left_out_note = f" It has {folder.summary()}." if folder.left_out else ""
        raise UsageError(
            f"corpus {printable(Path(corpus))}: has no {', '.join(endings)} or {last} file (text and rows also as "
            f"{', '.join(PACKED)}).{left_out_note} Name a folder of them, or one such file."
        )
    return folder
