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
    Seen:     `experiments/studies/results/narrow_students/results.md` (2026-11-30, two cores of an Intel Xeon with AMX,
              bfloat16, means over three seeds ± half of the 95% interval). Fewer channels alone end nearest, .039 below
              fewer layers. So the expectation was wrong: the mixture begins lowest and ends in between.

                                KL before      KL            NLL          agreement
                  fewer layers      2.437   .831 ± .024   4.248 ± .022   .502 ± .007
                  fewer channels    2.169   .792 ± .003   4.180 ± .033   .534 ± .005
                  mixture           1.910   .821 ± .016   4.218 ± .011   .508 ± .001

              A hidden size of 512 is no multiple of 9 attention heads, which transformers 5 does not load. 504 is one.
    """
    starts = zipped({"student.folder": FOLDERS, "student.keep_layers": [KEEP_LAYERS, None, None]})
    return Sweep(by_the_epoch) * seeds(3) * starts
