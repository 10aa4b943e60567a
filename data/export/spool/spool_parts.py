"""Parts of a spool: the windows of both caches as safetensors, and the state of the pass behind them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from data.cache.contents import mask_digest, window_digest
from data.corpus.windows import Array, Window
from kd_core.files import damage_as_usage_error, write_bytes

SPLITS: tuple[str, ...] = ("train", "validation")


def part_path(folder: Path, number: int) -> Path:
    """Returns the place of a part."""
    return folder / f"{number:06d}.part"


def _columns(windows: Sequence[Window]) -> dict[str, Array]:
    """Returns windows as arrays, end to end. `*_ends` are the places behind each one."""
    names = [window.document.encode() for window in windows]
    contexts = [np.zeros(0, np.int32) if window.context is None else window.context for window in windows]
    return {
        "positions": np.asarray([window.positions for window in windows], np.int32),
        "starts": np.asarray([window.start for window in windows], np.int64),
        "tokens": np.concatenate([np.zeros(0, np.int32), *(window.token_ids for window in windows)]).astype(np.int32),
        "masks": np.concatenate([np.zeros(0, np.uint8), *(window.loss_mask for window in windows)]).astype(np.uint8),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        # −1 for a window whose teacher reads the same tokens.
        "context_sizes": np.asarray([-1 if w.context is None else len(w.context) for w in windows], np.int32),
        "contexts": np.concatenate([np.zeros(0, np.int32), *contexts]).astype(np.int32),
        "digests": np.frombuffer(b"".join(full_digest(window) for window in windows), np.uint8),
        "mask_digests": np.frombuffer(b"".join(mask_digest(window.loss_mask) for window in windows), np.uint8),
    }


def full_digest(window: Window) -> bytes:
    """Returns the digest of a window, which is also that of its record in the cache."""
    return window_digest(window.start, window.token_ids)


def write_part(folder: Path, number: int, windows: dict[str, list[Window]], state: dict[str, Any]) -> None:
    """Writes a part: windows by split, and the state of the pass behind them."""
    tensors = {f"{split}.{name}": a for split in SPLITS for name, a in _columns(windows[split]).items()}
    write_bytes(part_path(folder, number), save(tensors, {"state": json.dumps(state)}))


def open_part(path: Path) -> Any:
    return safe_open(str(path), "np")


def read_state(path: Path) -> dict[str, Any]:
    """Returns the state that a part was written with."""
    with damage_as_usage_error(path, "a part of a spool", "Delete the spool"), open_part(path) as part:
        return json.loads(part.metadata()["state"])


class Part:
    """The windows of one split in a part, in memory."""

    def __init__(self, path: Path, split: str) -> None:
        with damage_as_usage_error(path, "a part of a spool", "Delete the spool"), open_part(path) as part:
            names = ("positions", "starts", "tokens", "masks", "names", "name_ends", "context_sizes", "contexts")
            arrays: dict[str, Array] = {name: part.get_tensor(f"{split}.{name}") for name in names}
            self.positions, self.starts, self.tokens, self.masks, self.names, self.name_ends = list(arrays.values())[:6]
            self.context_sizes, self.contexts = arrays["context_sizes"], arrays["contexts"]
            # Places behind the masks of each window, and behind its context.  [n]
            self.mask_ends = np.cumsum(self.positions, dtype=np.int64)
            self.context_ends = np.cumsum(np.maximum(self.context_sizes, 0), dtype=np.int64)
            assert len(self.masks) == self.positions.sum(dtype=np.int64) == len(self.tokens) - len(self.positions)

    def window(self, index: int) -> Window:
        """Returns one window. Its arrays are views."""
        T, end = int(self.positions[index]), int(self.mask_ends[index])
        name_start = int(self.name_ends[index - 1]) if index else 0
        size, context_end = int(self.context_sizes[index]), int(self.context_ends[index])
        return Window(
            document=self.names[name_start : self.name_ends[index]].tobytes().decode(),
            start=int(self.starts[index]),
            token_ids=self.tokens[end - T + index : end + index + 1],
            loss_mask=self.masks[end - T : end],
            context=None if size < 0 else self.contexts[context_end - size : context_end],
        )
