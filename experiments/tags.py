"""Tags: marks of values that must agree, wherever they stand in a graph. `--config=tag:RowLength=1024` sets them all.

A base function puts them on (`experiments/base/distill.py`); the library does not know them.
"""

import fiddle as fdl


class RowLength(fdl.Tag):
    """Positions of a row: of training's rows (`collate.row_length`), and of the export's windows (`row_length`)."""


class TopK(fdl.Tag):
    """Teacher's entries a position: what training and validation read of a cache, and what an export keeps."""


class Interval(fdl.Tag):
    """Steps between validations, and between checkpoints: a checkpoint without a validation cannot be the best."""
