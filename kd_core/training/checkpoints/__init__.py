"""Checkpoints of a run: their contents, and how they are written, read and checked."""
