"""Choice of a teacher's scorer: our decoder where it covers the model family, else transformers, or vLLM if asked."""

import logging
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from data.teacher.scorer import AnyScorer, DecoderScorer, Scorer
from data.teacher.teacher_layout import WHOLE_COPIES, TeacherParallel
from data.teacher.transformers_scorer import HuggingFaceScorer
from data.teacher.vllm_scorer import load_engine
from data.teacher.vllm_server import connect_scorer, read_server_facts
from data.teacher.vllm_settings import VllmSettings
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from kd_core.files import read_json
from kd_core.hub import NO_EXTRA
from kd_core.parallel.world import World
from kd_core.students.huggingface.weights import stored_architecture
from kd_core.students.transformers_student.transformers_config import read_config

ScorerName = Literal["auto", "decoder", "transformers", "vllm"]
NO_SETTINGS = VllmSettings({})
log = logging.getLogger("kd")


class TeacherFacts(NamedTuple):
    """Facts about a teacher that an export plan needs before the model is loaded.

    `max_positions` is None where the model names no limit. `engine` is what reaches the arithmetic of another engine.
    """

    scorer: str
    vocab_size: int
    max_positions: int | None
    architecture: dict[str, Any]
    engine: dict[str, Any] | None = None


def _through_transformers(folder: Path, tokens: int | None) -> TeacherFacts:
    config = read_config(folder)
    limit, padded_vocab_size = getattr(config, "max_position_embeddings", None), int(config.vocab_size)
    architecture: dict[str, Any] = {"model_type": config.model_type, "vocab_size": padded_vocab_size}
    if tokens is not None and tokens < padded_vocab_size:
        architecture |= {"vocab_size": tokens, "padded_vocab_size": padded_vocab_size}
    return TeacherFacts("transformers", architecture["vocab_size"], limit, architecture)


def _through_vllm(folder: Path, tokens: int | None, settings: VllmSettings) -> TeacherFacts:
    facts = _through_transformers(folder, tokens)._replace(scorer="vllm")
    if settings.url is None:
        longest = settings.engine.get("max_model_len")
        bounds = [limit for limit in (longest, facts.max_positions) if isinstance(limit, int) and limit > 0]
        return facts._replace(engine=settings.recorded(), max_positions=min(bounds, default=None))
    engine, longest = read_server_facts(settings)
    return facts._replace(engine=engine, max_positions=min(longest, facts.max_positions or longest))


def read_teacher_facts(
    folder: Path, scorer: str, tokens: int | None = None, vllm: VllmSettings = NO_SETTINGS
) -> TeacherFacts:
    """Returns the facts of a teacher, with the scorer that `auto` stands for.

    Args:
        scorer: the scorer, or `auto` to choose it by the family.
        tokens: the real vocabulary, which is the size of the teacher's tokenizer. None counts all rows of its lm_head.
        vllm: settings of the scorer `vllm`, whose server is asked.

    Raises:
        UsageError: the folder holds no model, or none that this scorer can score, or a server does not answer.
    """
    if scorer == "vllm":
        return _through_vllm(folder, tokens, vllm)
    if scorer == "transformers":
        return _through_transformers(folder, tokens)
    try:
        arch = stored_architecture(folder)
    except UsageError as reason:
        read_json(folder / "config.json", "a Hugging Face model configuration")
        if scorer == "decoder":
            raise
        if find_spec("transformers") is None:
            raise UsageError(f"{reason} Scoring it with transformers {NO_EXTRA}") from None
        facts = _through_transformers(folder, tokens)
        log.info("%s: scored with transformers, because our decoder does not support it", reason)
        return facts
    if tokens is not None:
        arch = arch.with_tokens(tokens, str(folder))
    return TeacherFacts("decoder", arch.vocab_size, arch.longest_document or arch.max_positions, asdict(arch))


def load_scorer(
    folder: Path,
    scorer: str,
    dtype: torch.dtype,
    device: torch.device,
    parallel: TeacherParallel = WHOLE_COPIES,
    world: World | None = None,
) -> Scorer:
    """Loads the teacher in `folder`, ready to score the vocabulary of its tokenizer.

    Args:
        folder: a Hugging Face folder.
        scorer: the scorer, or `auto`.
        dtype: of the weights.
        device: of this process.
        parallel: the teacher's layout.
        world: the ranks, laid out as `parallel` says, which all load together. None: this process alone.
    """
    world = world or World(device=device)
    tokens = Tokenizer(folder).vocab_size
    facts = read_teacher_facts(folder, scorer, tokens)
    if facts.scorer == "transformers":
        return HuggingFaceScorer.load(folder, dtype, device, tokens, parallel, world)
    # Our decoder always gives ranks whole experts.
    if parallel.expert_parallel and facts.architecture["experts"] is None:
        raise UsageError("parallel.expert_parallel: this teacher has no experts. Leave it out.")
    return DecoderScorer.load(folder, dtype, tokens, parallel, world)


def load_vllm(folder: Path, dtype: torch.dtype, device: torch.device, settings: VllmSettings) -> AnyScorer:
    """Loads the teacher in `folder` into vLLM, or connects to the server that has it."""
    if settings.url:
        return connect_scorer(folder, dtype, device, settings)
    return load_engine(folder, dtype, device, Tokenizer(folder).vocab_size, settings)
