"""The lm_head of a Hugging Face folder without its body, for hidden states that another engine computes."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from data.teacher.transformers_scorer import PassThrough, WideLmHead
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.students.huggingface.weights import stored_tensors, weight_files
from kd_core.students.transformers_student.transformers_config import meta_model, read_config


def _read_stored(folder: Path, names: list[str], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Returns the tensor of this shape whose name ends in the first of `names` that the folder holds."""
    files = weight_files(folder)
    stored = {tensor.name: tensor.path for tensor in stored_tensors(files) if tensor.shape == shape}
    for name in names:
        # Multimodal folders put a prefix in front of the language model's names. Extra layers have longer ones.
        if matches := sorted((other for other in stored if f".{other}".endswith(f".{name}")), key=len):
            box = tuple(slice(0, size) for size in shape)
            match = next(tensor for tensor in stored_tensors([stored[matches[0]]]) if tensor.name == matches[0])
            return match.read(box).to(dtype)
    return None


class SeparateHead(torch.nn.Module):
    """Head of a model family of transformers: hidden states to float32 logits over the real vocabulary.

    The family's own code applies scales and soft caps. Its body never has memory.
    """

    def __init__(self, model: Any, width: int, vocab_size: int) -> None:
        super().__init__()
        self.model, self.width, self.vocab_size = model, width, vocab_size

    @classmethod
    def load(cls, folder: Path, vocab_size: int, dtype: torch.dtype, device: torch.device) -> "SeparateHead":
        """Reads the lm_head of a folder.

        Raises:
            UsageError: the folder's lm_head is quantised, of another kind, or not separable from its body.
        """
        config = read_config(folder)
        try:
            model: Any = meta_model(config, folder)
            lm_head: Any = model.get_output_embeddings()
            if not issubclass(type(lm_head), torch.nn.Linear) or model.base_model is model:
                raise TypeError(f"it is a {type(lm_head).__name__}")
            names = [f"{name}.weight" for name, module in model.named_modules() if module is lm_head]
            # A tied head is stored as the embedding, unless the folder has both: then transformers does not tie them.
            embedding = model.get_input_embeddings()
            tied = [f"{name}.weight" for name, module in model.named_modules() if module is embedding]
            names += [".".join(name.split(".")[-2:]) for name in tied if config.tie_word_embeddings]
        except UsageError:
            raise
        except Exception as error:  # each model family raises errors of its own
            raise _inseparable(folder, error) from None
        values = [_read_stored(folder, names, tuple(lm_head.weight.shape), dtype)]
        if lm_head.bias is not None:
            bias_name = names[0].replace("weight", "bias")
            values.append(_read_stored(folder, [bias_name], tuple(lm_head.bias.shape), dtype))
        if any(value is None for value in values):
            raise _inseparable(folder, f"no {names[0]} of shape {tuple(lm_head.weight.shape)}")
        for name, value in zip(("weight", "bias"), values, strict=False):
            setattr(lm_head, name, torch.nn.Parameter(cast(Tensor, value).to(device), requires_grad=False))
        model.set_output_embeddings(WideLmHead(lm_head, vocab_size, World()))
        setattr(model, model.base_model_prefix, PassThrough())
        head = cls(model.eval(), lm_head.in_features, vocab_size)
        try:
            head(torch.zeros(1, head.width, device=device))
        except Exception as error:  # each model family raises errors of its own
            raise _inseparable(folder, error) from None
        return head

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Maps hidden states [n, D] behind the final norm to logits [n, V]."""
        return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]


def _inseparable(folder: Path, reason: object) -> UsageError:
    return UsageError(
        f"{folder}: its lm_head cannot be computed apart from its body ({reason!s:.400}), which scoring through vLLM "
        "in this process needs. Start a server with it, and name that with scorer_url."
    )
