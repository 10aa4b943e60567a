"""Does a student learn to answer from conversations, scored on the assistant's turns alone?

Command:  python -m launchers.export_teacher --config=chat_export --config=corpus.path=my/chats --out=my/cache
Expected: a cache whose scored positions are the assistant's; the rest is context for the teacher and the student.
Seen:     nothing yet: the quick start brings no conversations along.
"""

import fiddle as fdl

from data.export.plan import TeacherExport
from experiments.quickstart import quickstart_export


def chat_export() -> fdl.Config[TeacherExport]:
    """Conversations (`messages`, or prompt and completion) through the teacher's chat template; longer ones overlap."""
    config = quickstart_export()
    config.corpus.path = "chats.jsonl"
    config.train_tokens = None
    config.validation_tokens = 65_536
    config.row_length = 2048
    config.overlap = 512
    return config
