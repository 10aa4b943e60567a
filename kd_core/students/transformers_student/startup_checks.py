"""What is found out about a model of transformers by running it: the form of its logits, and what its masks keep apart.

Nothing is taken from a flag alone. A configuration names candidates, and the model's own output decides.
"""

import inspect
import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.students.transformers_student.document_passes import DocumentMode
from kd_core.types import LmHeadForm

if TYPE_CHECKING:
    from kd_core.students.transformers_student.transformers_student import TransformersStudent

log = logging.getLogger("kd")
# Fields of configurations that scale logits, as a factor in some families and as a divisor in others.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
TRIED: tuple[DocumentMode, ...] = ("positions", "masks")
FIRST, SECOND = 9, 7  # tokens of two documents in one row
# Largest relative differences: of logits, of a document's hidden states where the one before it changes, and of them
# against a row of its own, where sums have another order. In bfloat16, one rounding is 0.004, and noise of 0.035 was
# measured. A document that another one sees moved by 0.5.
LOGITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
LEAK, ORDER = {torch.float32: 1e-4, torch.bfloat16: 1e-2}, {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    """Returns the names of a function's arguments."""
    return frozenset(inspect.signature(function).parameters)


def logits_of(hidden: Tensor, weight: Tensor, form: LmHeadForm) -> Float[Tensor, "B T V"]:
    """Returns all logits of a few positions: cap · tanh((scale · hidden · weightᵀ + bias) / cap), in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = form.scale * (hidden.float() @ weight.float().T)
        logits = logits if form.bias is None else logits + form.bias.float()
        logits = logits if form.soft_cap is None else form.soft_cap * torch.tanh(logits / form.soft_cap)
        return logits[..., : form.vocab_size]


def _tolerance(table: dict[torch.dtype, float], device: torch.device) -> float:
    rounds = torch.is_autocast_enabled(device.type)
    return table[torch.bfloat16 if rounds else torch.float32]


def _difference(values: Tensor, expected: Tensor) -> float:
    """Returns the relative difference of two tensors in the L2 norm."""
    return float((values.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def typical_change(values: Tensor, expected: Tensor) -> float:
    """Returns the median over positions [..., T, D] of the relative difference in the L2 norm.

    A later token that is seen moves all positions. Rounding sends single positions to other experts.
    """
    differences = (values.float() - expected.float()).norm(dim=-1)
    return float((differences / expected.float().norm(dim=-1).clamp(min=1e-30)).median())


def refuse_later_tokens(model: object, folder: object, change: float, most: float) -> None:
    """Refuses a model whose earlier positions moved by `change` of their size when a later token changed.

    Raises:
        UsageError: they moved by more than `most`.
    """
    if change > most:
        raise UsageError(
            f"{folder}: {type(model).__name__} attends to later positions (a changed last token moves earlier ones by "
            f"{change:.0e} of their size), so it is no causal language model. Take another folder, or correct "
            "config.json."
        )


def _candidates(config: Any) -> list[LmHeadForm]:
    """Returns the forms that a configuration may mean, what it names before what it leaves out."""

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(value) for value in values if isinstance(value, int | float) and value > 0]

    scales = [scale for value in numbers(SCALES) for scale in (value, 1 / value)]
    caps = [*numbers(SOFT_CAPS), None]
    return [LmHeadForm(scale=scale, soft_cap=cap) for cap, scale in itertools.product(caps, [*scales, 1.0])]


@torch.no_grad()
def find_head_form(student: "TransformersStudent") -> LmHeadForm:
    """Returns the form of the model's logits, which is compared with its own logits of a few tokens.

    Raises:
        UsageError: its logits are of another form.
    """
    vocab_size, weight = student.arch.vocab_size, student.lm_head.weight
    tokens = _tokens(FIRST, 11, vocab_size, weight.device)
    positions = torch.arange(FIRST, device=weight.device)[None]

    def compare(hidden: Tensor, weight: Tensor) -> list[tuple[float, LmHeadForm]]:
        # The model's own pass runs here, inside the student's, where sharded parameters of the head are whole.
        expected = student.theirs(tokens, **_without_cache(student.theirs)).logits[..., :vocab_size]
        bias = student.lm_head_form.bias
        return [
            (
                _difference(
                    logits_of(hidden, weight, LmHeadForm(bias, vocab_size, form.scale, form.soft_cap)), expected
                ),
                form,
            )
            for form in _candidates(student.theirs.config)
        ]

    compared = student(tokens, positions, torch.zeros_like(tokens), compare)
    tolerance = _tolerance(LOGITS, weight.device)
    for difference, form in compared:
        if difference <= tolerance:
            return form
    smallest = min(difference for difference, _ in compared)
    raise UsageError(
        f"{student.folder}: the logits of {type(student.theirs).__name__} are no scaled or capped product of its "
        f"hidden states and its output head (relative difference {smallest:.1e}; wanted at most {tolerance:.0e}). The "
        "loss cannot be computed from them. Take another family."
    )


def _without_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in argument_names(type(model).forward) else {}


def _first(hidden: Tensor, weight: Tensor) -> Tensor:
    del weight
    return hidden


def _tokens(count: int, seed: int, vocab_size: int, device: torch.device) -> Tensor:
    return ((torch.arange(count, device=device) * 37 + seed) % vocab_size)[None]


@torch.no_grad()
def check_causal(student: "TransformersStudent") -> None:
    """Checks that hidden states stay where a later token changes, in a row of one document, at most positions.

    Raises:
        UsageError: they move, so that the model sees the tokens that it would learn to predict.
    """
    vocab_size, device = student.arch.vocab_size, student.lm_head.weight.device
    tokens, positions = _tokens(FIRST, 3, vocab_size, device), torch.arange(FIRST, device=device)[None]
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % vocab_size
    states, others = (student(row, positions, torch.zeros_like(row), _first) for row in (tokens, changed))
    change = typical_change(others[:, :-1], states[:, :-1])
    refuse_later_tokens(student.theirs, student.folder, change, _tolerance(LEAK, device))


@torch.no_grad()
def find_document_mode(student: "TransformersStudent") -> DocumentMode:
    """Returns how documents of a packed row are kept apart, by two documents in one row.

    The second document's hidden states must not move when the first one changes, and must be those of a row of its own.
    """
    vocab_size, device = student.arch.vocab_size, student.lm_head.weight.device

    def states(*documents: Tensor) -> Tensor:
        """Returns the hidden states of the last document of two equal packed rows: some masks need more than one."""
        positions = torch.cat([torch.arange(row.shape[1], device=device) for row in documents])[None]
        ids = torch.cat([torch.full_like(row, number) for number, row in enumerate(documents)], dim=1)
        rows = (values.repeat(2, 1) for values in (torch.cat(documents, dim=1), positions, ids))
        hidden: Tensor = student(*rows, _first)
        return hidden[:, -documents[-1].shape[1] :]

    first, other = (_tokens(FIRST, seed, vocab_size, device) for seed in (3, 8))
    second = _tokens(SECOND, 5, vocab_size, device)
    student.document_mode = "rows"
    alone, name, moves = states(second), type(student.theirs).__name__, dict[DocumentMode, float]()
    for mode in TRIED:
        student.document_mode = mode
        try:
            packed = states(first, second)
            leak, order = _difference(states(other, second), packed), _difference(packed, alone)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            log.debug("student: %s takes no documents by %s (%s)", name, mode, error)
            # A pass that ends early leaves FSDP inside it, where later passes lose gradients. A whole pass ends it.
            student.document_mode = "rows"
            states(second)
            continue
        moves[mode] = max(leak, order)
        if leak <= _tolerance(LEAK, device) and order <= _tolerance(ORDER, device):
            log.info("student: %s keeps documents of packed rows apart by %s", name, mode)
            return mode
    log.warning(
        "student: in %s hidden states of a document in a packed row are not those of it alone (by %.0e of their size), "
        "so each document becomes a row of its own, padded to the longest of its batch. Documents of unlike lengths "
        "cost more for that. Lower parallel.micro_batch_rows if they take too much memory.",
        name, min(moves.values(), default=1.0),
    )  # fmt: skip
    return "rows"
