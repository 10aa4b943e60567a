"""Teachers as scorers: windows → logits → what a cache stores of each position."""
