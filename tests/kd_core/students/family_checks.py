"""Comparisons of a student with transformers, each as the largest relative error over all values."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from kd_core.students.decoder.decoder import Decoder
from kd_core.students.decoder.lora_layers import adapted_layers
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, build_student
from tests.kd_core.students.models import CPU, load, rows, their_model

# Documents of packed rows, also of one position and longer than any window.
CUTS = [[1, 9, 30], [22, 18]]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Comparison:
    """A random model of transformers, and the student that is read from its folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.theirs = folder, their_model(name)
        self.theirs.save_pretrained(folder / "theirs")
        self.tokens, self.positions, self.documents = rows()
        with torch.no_grad():
            self.wanted = self.theirs(self.tokens).logits

    @functools.cached_property
    def ours(self) -> Decoder:
        return load(self.folder / "theirs")

    @torch.no_grad()
    def _error_of(self, model: Decoder, wanted: Tensor) -> float:
        return relative(model(self.tokens, self.positions, self.documents), wanted)

    def _reload(self, folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def logits(self) -> float:
        return self._error_of(self.ours, self.wanted)

    def gradients(self) -> float:
        """Of every weight, by the names of the folder: folders whose weights are gradients are compared."""
        weights = torch.randn(self.wanted.shape, generator=torch.Generator().manual_seed(3))
        ours, theirs = load(self.folder / "theirs"), copy.deepcopy(self.theirs)
        (ours(self.tokens, self.positions, self.documents) * weights).sum().backward()
        (theirs(self.tokens).logits * weights).sum().backward()
        with torch.no_grad():
            for parameter in [*ours.parameters(), *theirs.parameters()]:
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
        save_pretrained(ours, self.folder / "gradients", self.folder / "theirs")
        theirs.save_pretrained(self.folder / "their gradients")
        found, wanted = (
            load_file(self.folder / name / "model.safetensors") for name in ("gradients", "their gradients")
        )
        assert found.keys() == wanted.keys()
        # Keys without RoPE have biases that do not matter: gradients which are zero but for rounding.
        least = 1e-3 * max(float(gradient.abs().max()) for gradient in wanted.values())
        return max(
            float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), least)
            for name, gradient in wanted.items()
        )

    @torch.no_grad()
    def packed(self) -> float:
        """Against each document alone."""
        positions = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in CUTS])
        documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(cut)]) for cut in CUTS])
        alone = [
            torch.cat([self.theirs(part[None]).logits[0] for part in row.split(cut)])
            for row, cut in zip(self.tokens, CUTS, strict=True)
        ]
        return relative(self.ours(self.tokens, positions, documents), torch.stack(alone))

    @torch.no_grad()
    def cached(self) -> float:
        """As a generation computes them: a pass over the first positions, then one over each further one."""
        cache, outputs = self.ours.new_cache(40), list[Tensor]()
        for first, end in ((0, 33), *((at, at + 1) for at in range(33, 40))):
            part = slice(first, end)
            outputs.append(
                self.ours(self.tokens[:, part], self.positions[:, part], self.documents[:, part], cache=cache)
            )
        return relative(torch.cat(outputs, dim=1), self.wanted)

    def folder_in(self) -> float:
        """From several files."""
        self.theirs.save_pretrained(self.folder / "sharded", max_shard_size="10KB")
        assert len(list((self.folder / "sharded").glob("model-*.safetensors"))) > 2
        return self._error_of(load(self.folder / "sharded"), self.wanted)

    @torch.no_grad()
    def folder_out(self) -> float:
        """Into several files, which transformers reads as a model of the same class, and the student again."""
        save_pretrained(self.ours, self.folder / "ours", self.folder / "theirs", max_file_bytes=20_000)
        assert len(list((self.folder / "ours").glob("model-*.safetensors"))) > 2
        again = self._reload(self.folder / "ours")
        assert type(again) is type(self.theirs)
        assert load(self.folder / "ours").arch == self.ours.arch
        return relative(again(self.tokens).logits, self.wanted)

    @torch.no_grad()
    def lora(self) -> float:
        """Adapters on all linear layers: PEFT's logits on its own base, and ours from the adapter's folder."""
        start = LoraStart(Pretrained(str(self.folder / "theirs")), ("*_proj",), rank=3, alpha=5.0)
        ours, generator = build_student(start, CPU, seed=0).eval(), torch.Generator().manual_seed(5)
        for layer in adapted_layers(ours).values():
            layer.lora_B.normal_(0, 0.2, generator=generator)
        save_pretrained(ours, self.folder / "adapted", self.folder / "theirs")
        adapter = self.folder / "adapted" / "adapter"
        theirs = peft.PeftModel.from_pretrained(self._reload(self.folder / "theirs"), adapter).eval()
        wanted = theirs(self.tokens).logits
        assert relative(self.wanted, wanted) > 0.01
        again = build_student(replace(start, adapter=str(adapter)), CPU, seed=1).eval()
        return max(self._error_of(model, wanted) for model in (ours, again))


CHECKS: dict[str, Callable[[Comparison], float]] = {
    "logits": Comparison.logits,
    "gradients": Comparison.gradients,
    "packed": Comparison.packed,
    "folder in": Comparison.folder_in,
    "folder out": Comparison.folder_out,
    "LoRA": Comparison.lora,
}
