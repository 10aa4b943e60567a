"""Can a student of half the layers, distilled on 61k tokens, come near its teacher's distribution?

Command:  make quickstart, or torchrun --nproc-per-node 1 -m launchers.train --config=quickstart
Expected: held-out KL(teacher‖student) from 2.41 to about 1.03 nats, NLL from 6.05 to about 4.53
          (a pilot with AdamW at 4e-4 and batches of 2,048 tokens; cross-entropy alone reached KL 1.29).
Seen:     2026-11-24, 61,438 tokens once, one seed, 8,165 held-out positions: KL 2.164 → 0.833, NLL 5.856 → 4.337,
          top-1 agreement .273 → .486 (teacher's NLL 3.505). KL 0.830 from a lossless cache. Rows of 512 positions
          begin lower than the pilot's.
          2026-11-28, in float32 throughout, on a machine limited to AVX2: KL 0.832, NLL 4.336.
          2026-11-29, the same with documents split by their content: KL 2.434 → 0.827, NLL 6.127 → 4.236,
          agreement .505 (teacher's NLL 3.439).
          KL by learning rate and step size: with 2,048 tokens a step 0.900 at 4e-4 and 0.866 at 6e-4. With 1,024
          tokens 0.834 at 4e-4 (with a last step of rate 0), 0.859 at 6e-4, and 0.834 with betas (0.9, 0.98).
"""

import fiddle as fdl

from data.cache.selection import Selection
from data.corpus.corpus import Corpus
from data.export.teacher_export import TeacherExport
from data.teacher.teacher_layout import TeacherParallel
from experiments.base.distill import distill
from experiments.base.experiment import Experiment
from experiments.tags import RowLength, TopK

# The layers of SmolLM2-135M with the highest influence on this corpus, found by `python -m launchers.importance
# --keep=15 --measure=influence`. Their NLL before training is 6.28 (2,048 tokens in rows of 256, bfloat16). All 30
# layers have 3.73, the 15 that cost most when left out alone (--measure=alone) 6.02, and 15 evenly spaced ones 15.54.
KEEP_LAYERS = (0, 1, 8, 9, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29)


def quickstart() -> fdl.Config[Experiment]:
    """Distils SmolLM2-135M-Instruct into an 81M student: 0.9 forward KL with the tail bucket + 0.1 cross-entropy."""
    config = distill(model="quickstart/teacher", cache="quickstart/cache")
    config.student.keep_layers = KEEP_LAYERS
    config.optimizer.lr = 4e-4
    config.schedule.warmup_steps = 5
    config.checkpoint.every = config.evaluation.every = 20
    config.evaluation.prompts = ("The state of our Union is", "My fellow citizens, the war")
    config.steps = 60
    config.tokens_per_step = 1024
    return config


def quickstart_export() -> fdl.Config[TeacherExport]:
    """Exports 61k training and 8k held-out tokens of State of the Union addresses, top 64 of SmolLM2-135M-Instruct."""
    config = fdl.Config(
        TeacherExport,
        corpus=fdl.Config(Corpus, path="quickstart/corpus"),
        teacher="quickstart/teacher",
        selection=fdl.Config(Selection, top_k=64),
        train_tokens=61_440,
        validation_tokens=8_192,
        shard_bytes=900_000,
        parallel=fdl.Config(TeacherParallel),
    )
    fdl.add_tag(config, "row_length", RowLength)
    fdl.add_tag(config.selection, "top_k", TopK)
    return config
