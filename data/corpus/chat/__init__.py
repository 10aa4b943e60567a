"""Chat: conversations are checked, rendered by the teacher's chat template, and the assistant's tokens located."""
