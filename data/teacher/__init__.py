"""Windows → logits → what the cache keeps of them."""
