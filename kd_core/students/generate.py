"""Greedy continuations, to look at what a model says. Short prompts: every token costs a whole forward pass."""

import torch
from torch import Tensor

from kd_core.students.decoder import Decoder


@torch.no_grad()
def continue_greedily(model: Decoder, prompt: list[int], tokens: int) -> list[int]:
    """The `tokens` likeliest next tokens, one after the other."""

    def last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden[:, -1] @ weight[: model.arch.vocab_size].t()

    ids = torch.tensor([prompt], device=model.embed_tokens.weight.device)
    for _ in range(tokens):
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        last = model(ids, positions, torch.zeros_like(ids), last_logits)
        ids = torch.cat([ids, last.argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()
