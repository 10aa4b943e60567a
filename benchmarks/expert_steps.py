"""How long do forward and backward of a student with experts take, beside the same model in transformers?

Command:  OMP_NUM_THREADS=1 python -m benchmarks.expert_steps [--rounds 5] [--experts 16]

Both run in turn on the same random weights and tokens, 4 rows of 512 positions, from tokens to last hidden states and
back. Times are CPU seconds of the process, minima over rounds, so that other work on the machine counts little.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kd_core.students.starts.start import Pretrained, build_student
from kd_core.students.student import Student

SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Experts of a position, and how transformers computes attention: its fastest way for the family.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen3Moe": ({"num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True}, "sdpa"),
    "Mixtral": ({"num_experts_per_tok": 2}, "sdpa"),
    "GptOss": ({"num_experts_per_tok": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "eager"),
}


def models(family: str, experts: int) -> tuple[Student, Any]:
    """Our student and their model of the same weights."""
    settings, attention = FAMILIES[family]
    count = {"num_experts" if family == "Qwen3Moe" else "num_local_experts": experts}
    config = getattr(transformers, f"{family}Config")(**SIZES, **count, **settings)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation=attention)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return build_student(Pretrained(str(Path(folder))), torch.device("cpu"), seed=0), theirs


def cpu_seconds(forward: Callable[[], Tensor], in_bfloat16: bool) -> float:
    """CPU seconds of a forward and a backward pass."""
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        hidden = forward()
    hidden.float().square().mean().backward()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=16)
    asked = parser.parse_args()
    tokens, positions = torch.randint(SIZES["vocab_size"], (4, 512)), torch.arange(512).expand(4, 512)
    print("| family | matmuls | ours, s | transformers, s | ratio |\n|---|---|---|---|---|")
    for family in FAMILIES:
        ours, theirs = models(family, asked.experts)
        forwards = [
            partial(ours, tokens, positions, torch.zeros_like(tokens), lambda hidden, _: hidden),
            lambda model=theirs: model.model(tokens, use_cache=False).last_hidden_state,
        ]
        for in_bfloat16 in (False, True):
            rounds = [[cpu_seconds(forward, in_bfloat16) for forward in forwards] for _ in range(asked.rounds)]
            own, other = (min(seconds) for seconds in zip(*rounds, strict=True))
            name = "bfloat16" if in_bfloat16 else "float32"
            print(f"| {family} | {name} | {own:.2f} | {other:.2f} | {own / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()
