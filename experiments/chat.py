"""Does a student learn to answer from conversations that are scored on the assistant's turns alone?

Command:  python -m launchers.export_teacher --config=chat_export --config=teacher=my/model \\
              --config=corpus.path=my/chats --out=chats/cache
          torchrun --nproc-per-node 1 -m launchers.train --config=chat --config=student.folder=my/model
          A small cache needs fewer steps than the 1,000 here. A warning says how many: --config=steps=…
Expected: a cache whose scored positions are the assistant's. The rest is context for teacher and student.
          The student's held-out KL on the assistant's tokens falls. On plain text nothing is expected.
Seen:     nothing yet: the quick start has no conversations.
"""

import fiddle as fdl

from data.export.teacher_export import TeacherExport
from experiments.base.distill import distill
from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart_export


def chat() -> fdl.Config[Experiment]:
    """Trains a whole model on a cache of conversations: on the assistant's tokens, in rows of 2,048 positions."""
    config = distill(cache="chats/cache")
    config.collate.row_length = 2048
    config.tokens_per_step = 16_384
    config.parallel.micro_batch_rows = 1
    config.optimizer.lr = 5e-5
    return config


def chat_export() -> fdl.Config[TeacherExport]:
    """Exports conversations (`messages`, or prompt and completion) in the teacher's chat template, with an overlap."""
    config = quickstart_export()
    config.corpus.path = "chats.jsonl"
    config.train_tokens = None
    config.validation_tokens = 65_536
    config.row_length = 2048
    config.overlap = 512
    return config
