"""A study of where a student of 81M parameters loses its weights: in layers, in widths, or in both."""

from experiments.base.sweep_definition import Sweep, seeds, zipped
from experiments.half_depth import KEEP_LAYERS
from experiments.studies.objectives import by_the_epoch

FOLDERS = ("quickstart/teacher", "quickstart/narrow", "quickstart/narrow_and_short")


def narrow_students() -> Sweep:
    """Does a student of fewer channels end nearer to the teacher than one of fewer layers, of as many parameters?

    First:    python -m launchers.prune --teacher=quickstart/teacher --cache=quickstart/cache/train \\
                  --hidden_size=512 --intermediate_size=704 --out=quickstart/narrow
              python -m launchers.prune --teacher=quickstart/teacher --cache=quickstart/cache/train \\
                  --layers=20 --num_kv_heads=2 --intermediate_size=1184 --out=quickstart/narrow_and_short
    Then:     python -m launchers.sweep --sweep=narrow_students --backend=local --jobs=1
    Expected: The mixture begins lowest: NLL 5.4, against 5.8 for fewer channels alone and 5.9 for fewer layers alone
              (`benchmarks/pruned_starts.py`). It ends nearest to the teacher, with a KL at least .03 below that of
              fewer layers (.827 in `quickstart`). Training narrows the distances at the start, so fewer channels alone
              end within .03 of fewer layers alone.
    Seen:     not trained yet. Before training, on 2,048 held-out positions of a smaller cache of the same corpus
              (2026-11-30, `launchers.evaluate`; teacher's NLL 3.472):

                  fewer layers      NLL 5.698   KL 2.056
                  fewer channels    NLL 5.657   KL 2.004
                  mixture           NLL 5.403   KL 1.804
    """
    starts = zipped({"student.folder": FOLDERS, "student.keep_layers": [KEEP_LAYERS, None, None]})
    return Sweep(by_the_epoch) * seeds(3) * starts
