"""Models by hub ids, `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`, in the hub's own cache (extra `hf`).

The prefix marks a hub id, so that a mistyped path never fetches a model. A process resolves each id once. Processes
of one machine share the cache, and its locks make sure that only one of them fetches a file.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from kd_core.errors import UsageError

HUB = "hub:"
NO_EXTRA = "needs the extra: pip install 'kd-workspace[hf]'."
WANTED_FILES = [
    *("*.json", "*.jinja", "*.safetensors", "*.model", "*.tiktoken", "*.txt"),
    *("LICEN[CS]E*", "COPYING*", "NOTICE*", "*USE_POLICY*"),
]
# Other formats of the same weights, and all subfolders but that of additional chat templates.
UNWANTED_FILES = ["consolidated*", *(f"*/{pattern}" for pattern in WANTED_FILES if pattern != "*.jinja")]


class Snapshot(NamedTuple):
    """A repository at one commit, as the hub's cache holds it."""

    repository: str
    commit: str


@functools.lru_cache
def _fetch(name: str) -> Path:
    """Returns the folder of a hub id in the cache, and fetches what is missing."""
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"{name}: a hub id {NO_EXTRA}") from None
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES
            )
        )
    except Exception as error:  # errors of the client, the network and the cache
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{name}: cannot be downloaded from the hub ({reason:.400}). Look at its name, at your connection and "
            "token (hf auth login), or name a folder."
        ) from None


def resolve_folder(name: str, where: str = "student.folder") -> Path:
    """Returns the folder that a setting names, or the one in the cache for its hub id. `where` is the setting's path.

    Raises:
        UsageError: the hub id cannot be fetched.
    """
    if not name.startswith(HUB):
        return Path(name)
    try:
        return _fetch(name)
    except UsageError as error:
        raise UsageError(f"{where} {error}") from None


def local_folder(name: str, where: str = "teacher") -> Path:
    """Returns the folder of `resolve_folder`, which must exist.

    Raises:
        UsageError: there is no such folder, or the hub id cannot be fetched.
    """
    folder = resolve_folder(name, where)
    if not folder.is_dir():
        raise UsageError(f"{where} {name}: no such folder. Wanted one, or {HUB}OWNER/NAME for a hub id.")
    return folder


def snapshot_of_folder(folder: Path) -> Snapshot | None:
    """Returns the repository and commit of a folder in the hub's cache (models--OWNER--NAME/snapshots/COMMIT)."""
    kind, _, name = folder.parent.parent.name.partition("--")
    if folder.parent.name != "snapshots" or kind != "models":
        return None
    return Snapshot(name.replace("--", "/"), folder.name)


def pin_commit(name: str) -> str:
    """Returns a hub id with the commit that it resolves to, and any other name unchanged."""
    snapshot = snapshot_of_folder(resolve_folder(name)) if name.startswith(HUB) else None
    return f"{HUB}{snapshot.repository}@{snapshot.commit}" if snapshot else name
