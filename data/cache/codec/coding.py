"""How the blocks of a cache are coded: what writer and reader must share."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.cache.codec.levels import STEPS, Levels
from data.cache.codec.rank_tables import Tables
from data.cache.selection import Selection

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Coding:
    """Tables and selection of a cache; `codec` is one of `levels.CODECS`."""

    tables: Tables
    selection: Selection
    codec: str

    @cached_property
    def levels(self) -> Levels | None:
        """The levels of the log-probabilities; None where they stand as float32."""
        return None if self.codec == "lossless" else Levels(STEPS[self.codec])

    @property
    def members(self) -> list[str]:
        """Suffixes of the members, in their order."""
        selection = self.selection
        optional = {"entries.zst": selection.top_k > 0, "log_probs.zst": True, "samples.zst": selection.draws > 0}
        return ["json", "tokens.zst", *(name for name, there in optional.items() if there)]

    def order_of(self, tokens: Array) -> Array:
        """The rows of id planes: positions after frequent tokens first, whose gaps are of one kind."""
        return np.argsort(np.minimum(self.tables.rank_of.take(tokens), 65535).astype(np.uint16), kind="stable")
