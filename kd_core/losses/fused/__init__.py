"""Losses fused with the lm_head, so that the logits [N, V] of all positions never exist at once."""
