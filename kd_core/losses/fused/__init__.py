"""The losses through the output head, without all N × V logits."""
