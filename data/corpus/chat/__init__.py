"""Conversations: checked, rendered by the teacher's chat template, the assistant's tokens found."""
