"""The settings of a cache's codec that its writer and its readers share."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.cache.codec.levels import STEPS, Codec, Levels
from data.cache.codec.rank_tables import RankTables
from data.cache.selection import Selection

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Coding:
    """Rank tables, selection and codec of a cache."""

    tables: RankTables
    selection: Selection
    codec: Codec

    @cached_property
    def levels(self) -> Levels | None:
        """Returns the levels of the log-probabilities, or None where they are stored as float32."""
        return None if self.codec == "lossless" else Levels(STEPS[self.codec])

    @property
    def members(self) -> list[str]:
        """Returns the suffixes of a block's members, in the order of the tar."""
        selection = self.selection
        # A cache without top-K entries or without samples has no member for them.
        optional = {"entries.zst": selection.top_k > 0, "log_probs.zst": True, "samples.zst": selection.draws > 0}
        return ["json", "tokens.zst", *(name for name, is_stored in optional.items() if is_stored)]

    def order_of(self, tokens: Array) -> Array:
        """Returns the order of positions in the planes of ids, as indices [N].

        Positions after frequent tokens come first. Their gaps have similar statistics, so they compress together.
        """
        # Sort stably by min(global rank of the input token, 65535): uint16 keys are sorted by radix.  [N]
        return np.argsort(np.minimum(self.tables.rank_of.take(tokens), 65535).astype(np.uint16), kind="stable")
