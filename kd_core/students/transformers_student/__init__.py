"""Students of any family that transformers has: a model of its own behind the interface of a student."""
