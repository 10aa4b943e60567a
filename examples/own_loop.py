"""A training loop of your own: a transformers model, a teacher cache, `fused_loss`, an optimiser, and nothing else.

    python examples/own_loop.py STUDENT_FOLDER CACHE/train

All of ours that it imports is the library's public surface (docs/library.md). It needs transformers (extra `hf`).
"""

import sys
from itertools import islice

import torch
from transformers import AutoModelForCausalLM

from data.stream.collate import Collate
from data.stream.source import Shards
from data.stream.stream import training_steps
from kd_core.losses.fused.loss import fused_loss
from kd_core.losses.objective import CrossEntropy, Distillation, Objective


def train(student: str, cache: str, steps: int = 20, rows_per_step: int = 8, row_length: int = 512) -> list[float]:
    """Trains the student on the cache, and returns the loss of each step in nats per scored token."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
    objective = Objective({"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)})
    batches = training_steps(Shards(cache), Collate(row_length), rows_per_step=rows_per_step, micro_batch=2)
    losses: list[float] = []
    for micro_batches in islice(batches, steps):
        scored = sum(int(batch.loss_mask.sum()) for batch in micro_batches)
        losses.append(0.0)
        for batch in micro_batches:
            # Positions restart with each packed document, by which transformers keeps attention inside documents.
            output = model.base_model(batch.tokens, position_ids=batch.position_ids, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)  # [N, D]
            loss = fused_loss(hidden, model.lm_head.weight, *batch.targets(), objective, scale=1 / scored)
            loss.total.backward()
            losses[-1] += float(loss.total.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


if __name__ == "__main__":
    for step, nats in enumerate(train(*sys.argv[1:3]), start=1):
        print(f"step {step}: {nats:.4f} nats per token")
