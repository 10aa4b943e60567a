"""Teachers through transformers (extra `hf`): hub ids, and every causal language model that it knows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from data.export.teacher import CHUNK_TOKENS
from kd_core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WANTED_FILES = ["*.json", "*.jinja", "*.safetensors"]
HUB = "hub:"
NO_EXTRA = "needs the extra: pip install 'kd-workspace[hf]'."


def local_folder(teacher: str) -> Path:
    """The folder of a teacher: its name, or where `hub:OWNER/NAME` was fetched to, in the hub's own cache.

    A hub id is marked as one, so that a mistyped path never fetches somebody's model.

    Raises:
        UsageError: the hub does not give it.
    """
    if not teacher.startswith(HUB):
        if not Path(teacher).is_dir():
            raise UsageError(f"teacher {teacher}: no such folder. Wanted one, or {HUB}OWNER/NAME for a hub id.")
        return Path(teacher)
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"teacher {teacher}: a hub id {NO_EXTRA}") from None
    try:
        return Path(snapshot_download(teacher.removeprefix(HUB), allow_patterns=WANTED_FILES))
    except Exception as error:  # the client raises its own, the network's and the cache's
        raise UsageError(f"teacher {teacher}: not to be had from the hub ({error}).") from None


def read_config(folder: Path) -> "PretrainedConfig":
    """transformers' configuration of the language model in `folder` (for one of several parts: of its text).

    Raises:
        UsageError: no transformers here, or it does not know the model.
    """
    try:
        from transformers import AutoConfig  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"{folder}: scoring with transformers {NO_EXTRA}") from None
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder}: transformers cannot read its config.json ({error}).") from None


def _widen_lm_head(model: "PreTrainedModel") -> None:
    """Makes the output head compute float32 logits, and leaves a tied embedding in the model's dtype."""
    head: Any = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.weight.dtype == torch.float32:
        return
    for name, parameter in list(head.named_parameters(recurse=False)):
        setattr(head, name, torch.nn.Parameter(parameter.detach().float(), requires_grad=False))
    head.register_forward_pre_hook(lambda _, inputs: tuple(each.float() for each in inputs))


class HuggingFaceScorer(NamedTuple):
    """Any causal language model of transformers; the logits of a whole batch exist at once.

    `vocab_size` is the configuration's: a head may be padded beyond it, and the padding takes no probability.
    """

    model: "PreTrainedModel"
    vocab_size: int

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> "HuggingFaceScorer":
        """Load from safetensors alone: no pickle, no code of the folder's own.

        Raises:
            UsageError: transformers has no such causal language model, or weights are missing.
        """
        config = read_config(folder)
        from transformers import AutoModelForCausalLM, logging  # noqa: PLC0415 (an extra)

        logging.disable_progress_bar()  # each rank would show its own
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UsageError(f"{folder}: transformers cannot load it as a causal language model ({error}).") from None
        model, found = loaded
        # transformers would fill them with random numbers and warn.
        absent = sorted([*found["missing_keys"], *found["mismatched_keys"]], key=str)
        if absent:
            raise UsageError(
                f"{folder}: {len(absent)} weights are missing or of another shape, the first is {absent[0]}. "
                "Fetch the folder again."
            )
        model = model.to(device).eval()
        _widen_lm_head(model)
        return cls(model, int(config.vocab_size))

    @property
    def device(self) -> torch.device:
        """Where its tokens are to lie."""
        return self.model.device

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        """See `Scorer`. Padding stands on the right, where causal attention never looks: no mask is needed."""
        del document_ids
        out = self.model(input_ids=tokens, use_cache=False).logits
        for chunk in rearrange(out, "B T V -> (B T) V").split(CHUNK_TOKENS):
            yield chunk[:, : self.vocab_size].float().contiguous()
