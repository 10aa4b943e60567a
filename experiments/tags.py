"""Tags of values that must agree wherever they are in a graph. `--config=tag:RowLength=1024` sets them all.

Base functions attach them (`experiments/base/distill.py`). The library itself does not use them.
"""

import fiddle as fdl


class RowLength(fdl.Tag):
    """Positions of a row: of training rows (`collate.row_length`) and of the export's windows (`row_length`)."""


class TopK(fdl.Tag):
    """Teacher entries a position: as many as training and validation read of a cache, and as an export keeps."""


class Interval(fdl.Tag):
    """Steps between validations, and between checkpoints: a checkpoint without a validation cannot be the best."""
