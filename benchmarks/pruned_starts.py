"""How students of one size begin: of fewer layers, of fewer channels, or of both, with and without scaled norms.

    python -m benchmarks.pruned_starts quickstart/teacher quickstart/corpus [rows]

Rows of 256 tokens begin documents of the corpus, spread evenly. Importances come from every second one, and the NLL
from the others, in bfloat16. Sizes are those of SmolLM2-135M at about 81M parameters.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.stream.plain_rows import plain_rows, text_document
from kd_core.students.layer_importance import LayerwiseText, block_influence, nll_with_layers, top_layers
from kd_core.students.starts.choose_pruning import count_parameters
from kd_core.students.starts.pruned_start import PrunedStart
from kd_core.students.starts.start import Pretrained, StudentInit, build_student
from kd_core.students.width_importance import measure_widths
from kd_core.students.width_selection import narrower, select_widths

LENGTH, BATCH = 256, 4
# Layers, and what becomes narrower.
SIZES: Sequence[tuple[int, dict[str, int | None]]] = (
    (15, {}),
    (30, {"intermediate_size": 512}),
    (30, {"hidden_size": 512, "intermediate_size": 704}),
    (30, {"hidden_size": 448, "intermediate_size": 960}),
    (20, {"hidden_size": 544, "intermediate_size": 1152}),
    (20, {"intermediate_size": 1024}),
    (20, {"num_kv_heads": 2, "intermediate_size": 1184}),
    (20, {"num_kv_heads": 1, "intermediate_size": 1360}),
    (21, {"num_heads": 6, "intermediate_size": 1072}),
)


@torch.no_grad()
def main() -> None:
    """Prints a row of the table for each size."""
    teacher, corpus = map(Path, sys.argv[1:3])
    count, paths = int(sys.argv[3]) if len(sys.argv) > 3 else 32, sorted(corpus.iterdir())
    documents = (text_document(path, teacher) for path in paths[:: max(1, len(paths) // count)])
    rows = torch.cat([plain_rows([document], [LENGTH], LENGTH) for document in documents])
    measured, held_out = rows[::2], rows[1::2]

    def load(start: StudentInit, tokens: torch.Tensor) -> LayerwiseText:
        return LayerwiseText(build_student(start, torch.device("cpu"), 0, dtype=torch.bfloat16).eval(), tokens)

    def nll(start: StudentInit) -> float:
        text = load(start, held_out)
        return nll_with_layers(text, range(text.model.arch.num_layers))

    text = load(Pretrained(str(teacher)), measured)
    arch, influence = text.model.arch, block_influence(text)
    importances = {
        layers: measure_widths(text.model, top_layers(influence, layers), measured.split(BATCH), lambda _: None)
        for layers in {layers for layers, _ in SIZES}
    }
    print(f"{measured.numel()} tokens measured, {held_out.numel()} held out, NLL of the teacher ", end="")
    print(f"{nll(Pretrained(str(teacher))):.3f}\n\n| layers | narrower | parameters | NLL | norms not scaled |")
    print("|---|---|---|---|---|")
    for layers, widths in SIZES:
        narrow = narrower(arch, widths)
        selection = select_widths(importances[layers], text.model, narrow, top_layers(influence, layers))
        scaled = nll(PrunedStart(str(teacher), selection))
        plain = nll(PrunedStart(str(teacher), replace(selection, factors={}))) if selection.factors else None
        sizes = ", ".join(f"{name} {size}" for name, size in widths.items()) or "nothing"
        parameters = count_parameters(narrow, layers) / 1e6
        unscaled = "" if plain is None else f"{plain:.3f}"
        print(f"| {layers} | {sizes} | {parameters:.1f}M | {scaled:.3f} | {unscaled} |", flush=True)


if __name__ == "__main__":
    main()
