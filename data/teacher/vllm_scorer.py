"""Teachers through vLLM in this process: hidden states behind the final norm, then our own head and selection.

    windows ─ vLLM, runner "pooling" ─► hidden states [n, D] ─ SeparateHead ─► float32 logits [n, V]

vLLM hands out no logits, and its log-probabilities of a bfloat16 model come from logits that are rounded to bfloat16.
Hidden states with a head of our own serve every selection, and no logit is rounded.
"""

import atexit
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.teacher.hidden_states import HiddenStateScorer
from data.teacher.separate_head import SeparateHead
from data.teacher.vllm_settings import NO_VLLM, VllmSettings
from kd_core.errors import UsageError

# One process schedules requests in a fixed order, so that the same rows give the same bits.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
# Room on a GPU for the head and a chunk of logits beside vLLM's share.
DEFAULTS: dict[str, Any] = {"enforce_eager": True, "gpu_memory_utilization": 0.85, "seed": 0}


def load_engine(
    folder: Path, dtype: torch.dtype, device: torch.device, vocab_size: int, settings: VllmSettings
) -> HiddenStateScorer:
    """Loads a model that vLLM runs in this process, or in workers of its own with tensor parallelism.

    It is read from safetensors alone: no pickle, and no code from the folder.

    Raises:
        UsageError: vLLM is not installed or cannot load the model, or this is one of several ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError(
            f"scorer: vllm in this process runs on one rank; got {dist.get_world_size()}. Start the export without "
            'torchrun, with vllm={"tensor_parallel_size": N} for N GPUs, or name a server with scorer_url.'
        )
    head = SeparateHead.load(folder, vocab_size, dtype, device)
    for name, value in {**ENVIRONMENT, **(CPU_ENVIRONMENT if device.type == "cpu" else {})}.items():
        os.environ.setdefault(name, value)
    try:
        vllm, config = importlib.import_module("vllm"), importlib.import_module("vllm.config")
    except ImportError as error:
        raise UsageError(f"{NO_VLLM} ({error!s:.200})") from None
    alone = settings.engine.get("tensor_parallel_size", 1) == 1
    arguments = {**DEFAULTS, **({"distributed_executor_backend": "uni"} if alone else {}), **settings.engine}
    pooler = config.PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False)
    # One thread makes the engine and calls it: its kernels on a CPU count on the OpenMP threads of that thread.
    owner = ThreadPoolExecutor(1)
    make_engine = partial(
        vllm.LLM, str(folder), runner="pooling", pooler_config=pooler, dtype=str(dtype).removeprefix("torch."),
        load_format="safetensors", trust_remote_code=False, enable_prefix_caching=False, **arguments,
    )  # fmt: skip
    try:
        engine = owner.submit(make_engine).result()
    except Exception as error:  # each model family and setting raises errors of its own
        raise UsageError(
            f"{folder}: vLLM cannot load it with {settings.engine} ({error!s:.600}). The log above has more."
        ) from None
    atexit.register(engine.llm_engine.engine_core.shutdown)
    parameters = vllm.PoolingParams(task="token_embed", use_activation=False)
    encode = partial(engine.encode, pooling_params=parameters, use_tqdm=False, pooling_task="token_embed")

    def states(rows: list[list[int]]) -> list[Tensor]:
        prompts = [{"prompt_token_ids": row} for row in rows]
        return [output.outputs.data for output in owner.submit(encode, prompts).result()]

    return HiddenStateScorer(states, head, device)
