"""Losses, students, parallelism and training: all of a distillation that does not depend on configuration."""
