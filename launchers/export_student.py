"""Write the student of a run as a Hugging Face folder: its best, its last or any step, finished or not.

    python -m launchers.export_student --student=runs/quickstart --step=best --out=my/student
    python -m launchers.export_student --student=runs/quickstart --step=30 --dtype=bfloat16 --out=my/student
    python -m launchers.export_student --student=runs/quickstart/checkpoints/step_00000030 --out=my/student

A run's own export/ is float32, of its last step or its best (checkpoint.export). --student may be a run, also one that
was stopped or is still training, a checkpoint, or a Hugging Face folder, for example to store it in another dtype.
Adapters are merged, and written to OUT/adapter/ as well. --out is a new folder, which appears complete or not at all.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from absl import flags

from launchers.cli import app
from launchers.cli.folder_guard import refuse_full_folder

if TYPE_CHECKING:
    from kd_core.precision import Dtype

STUDENT = flags.DEFINE_string("student", None, "A run, a checkpoint of one, or a Hugging Face folder; required.")
STEP = flags.DEFINE_string(
    "step", None, "Of a run: best, last, or a number; default last (without checkpoints: its export/)."
)
OUT = flags.DEFINE_string("out", None, "The new folder; required.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "How the weights are stored.")


def main() -> None:
    """Finds and loads the student, and writes it to --out."""
    from kd_core.errors import UsageError

    if STUDENT.value is None or OUT.value is None:
        raise UsageError("wanted --student=RUN_DIR and --out=DIR.")
    import torch

    from experiments.config.saved_students import find_student, load_student, recorded_chat_format
    from kd_core.students.huggingface.save import save_pretrained
    from kd_core.training.checkpoints.checkpoint import newest
    from kd_core.training.run_folder import RunFolder

    source, out = Path(STUDENT.value), Path(OUT.value)
    refuse_full_folder(out)
    folder = find_student(source, STEP.value or ("last" if newest(RunFolder(source).checkpoints) else None))
    model, tokenizer_folder = load_student(folder, torch.device("cpu"))
    dtype = cast("Dtype", DTYPE.value)
    save_pretrained(model, out, tokenizer_folder, chat=recorded_chat_format(folder), dtype=dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {folder}, {parameters / 1e6:.1f}M parameters in {dtype}")


if __name__ == "__main__":
    app.run_command(main, "launchers.export_student", __doc__ or "")
