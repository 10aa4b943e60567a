"""Chooses the layers and widths of a pruned student, and the layers of one of as many parameters at full width."""

from collections.abc import Callable
from typing import NamedTuple

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.families.registry import family_decoder
from kd_core.students.layer_importance import Drop, LayerwiseText, Measure, choose_layers, top_layers
from kd_core.students.width_importance import check_prunable, measure_widths
from kd_core.students.width_selection import WidthSelection, select_widths

BATCH_TOKENS = 2048  # of one pass that measures widths


class PruningRequest(NamedTuple):
    """Sizes of a student of fewer layers and widths.

    Args:
        arch: the model's architecture with the student's widths, of all layers.
        layers: the layers to keep, or how many.
        measure: how layers are chosen.
    """

    arch: Architecture
    layers: tuple[int, ...] | int
    measure: Measure

    @property
    def num_layers(self) -> int:
        return self.layers if isinstance(self.layers, int) else len(self.layers)


def count_parameters(arch: Architecture, num_layers: int) -> int:
    """Returns the parameters of a student with this many layers of an architecture. Tied ones count once."""
    model = family_decoder(arch.with_layers(tuple(range(num_layers))))
    return sum(parameter.numel() for parameter in model.parameters())


def layers_of_equal_size(arch: Architecture, parameters: int) -> int:
    """Returns how many layers of full width come nearest to a number of parameters, from 1 to all."""
    return min(range(1, arch.num_layers + 1), key=lambda count: abs(count_parameters(arch, count) - parameters))


def choose_pruning(
    text: LayerwiseText,
    request: PruningRequest,
    report_drop: Callable[[Drop], None],
    report_tokens: Callable[[int], object],
) -> tuple[WidthSelection, tuple[int, ...]]:
    """Returns what the student keeps, and the layers of a student of as many parameters that loses layers alone.

    Layers are measured first, and widths in a pass through the layers that stay.

    Raises:
        UsageError: the model has a module whose widths cannot be cut.
    """
    check_prunable(text.model)
    arch = text.model.arch
    alone = layers_of_equal_size(arch, count_parameters(request.arch, request.num_layers))
    scores, _ = choose_layers(text, request.measure, min(alone, request.num_layers), report_drop)
    layers = top_layers(scores, request.layers) if isinstance(request.layers, int) else request.layers
    batches = text.tokens.split(max(1, BATCH_TOKENS // text.tokens.shape[1]))
    importance = measure_widths(text.model, layers, batches, report_tokens)
    return select_widths(importance, text.model, request.arch, layers), top_layers(scores, alone)
