"""Which scorer speaks for a teacher: our decoder where it covers the family, transformers where it does not."""

import logging
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.export.huggingface import NO_EXTRA, HuggingFaceScorer, read_config
from data.export.teacher import DecoderScorer, Scorer
from kd_core.errors import UsageError
from kd_core.files import read_json
from kd_core.students.families import read_architecture
from kd_core.students.starts import Pretrained, build

SCORERS = ("auto", "decoder", "transformers")
log = logging.getLogger("kd")


class TeacherFacts(NamedTuple):
    """What a plan needs of a teacher before it is loaded; `max_positions` None: it names no limit."""

    scorer: str
    vocab_size: int
    max_positions: int | None
    architecture: dict[str, Any]


def _through_transformers(folder: Path) -> TeacherFacts:
    config = read_config(folder)
    limit = getattr(config, "max_position_embeddings", None)
    known = {"model_type": config.model_type, "vocab_size": int(config.vocab_size)}
    return TeacherFacts("transformers", int(config.vocab_size), limit, known)


def read_facts(folder: Path, scorer: str) -> TeacherFacts:
    """The facts of a teacher, with the scorer that `scorer` (one of `SCORERS`) stands for.

    Raises:
        UsageError: the folder holds no model, or none that the scorer can score.
    """
    if scorer == "transformers":
        return _through_transformers(folder)
    try:
        arch = read_architecture(folder)
    except UsageError as reason:
        read_json(folder / "config.json", "a Hugging Face model configuration")
        if scorer == "decoder":
            raise
        if find_spec("transformers") is None:
            raise UsageError(f"{reason} Scoring it with transformers {NO_EXTRA}") from None
        facts = _through_transformers(folder)
        log.info("%s: scored with transformers, for our decoder does not cover it", reason)
        return facts
    return TeacherFacts("decoder", arch.vocab_size, arch.max_positions, asdict(arch))


def load_scorer(folder: Path, scorer: str, dtype: torch.dtype, device: torch.device) -> Scorer:
    """The teacher in `folder`, ready to score."""
    if read_facts(folder, scorer).scorer == "transformers":
        return HuggingFaceScorer.load(folder, dtype, device)
    return DecoderScorer(build(Pretrained(str(folder)), device, seed=0).to(dtype).eval())
