"""Documents of packed rows through a model that is not ours: in one pass of the rows, or as rows of their own."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd_core.document_lengths import Documents

# How documents of packed rows are kept apart:
#   positions   transformers makes masks of positions that begin again
#   masks       the masks are made here, for families that do not hand their positions on
#   rows        each document is a row of its own, for state that runs across positions (Mamba, short convolutions)
DocumentMode = Literal["positions", "masks", "rows"]


def document_masks(config: Any, documents: Documents, like: Float[Tensor, "B T 1"]) -> Any:
    """Returns a causal mask inside documents for each kind of attention, as transformers makes them for generation."""
    from transformers.masking_utils import create_masks_for_generate  # noqa: PLC0415 (an extra)

    # Places count from 0 in each document, which is where transformers ends one and begins the next.  [B, T]
    places = torch.cat([torch.arange(length) for length in documents.lengths]).view(like.shape[:2]).to(like.device)
    return create_masks_for_generate(config, like, None, None, position_ids=places)


def marks_documents(position_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> bool:
    """Checks that positions count on inside documents, and only there. It waits for a device."""
    counts_on = position_ids.diff(dim=1) == 1
    same = document_ids.diff(dim=1) == 0
    padding = document_ids[:, 1:] < 0
    return bool(((counts_on == same) | padding).all())


@dataclass(frozen=True)
class DocumentRows:
    """The documents of B packed rows, each as a row of its own, padded to the longest one.

    Args:
        positions: where each position of a document's row is in the N positions of the packed rows.  [S, L]
        places: where each of the N positions is in the S · L positions of the documents' rows. Padding is at 0.  [N]
    """

    positions: Int[Tensor, "S L"]
    places: Int[Tensor, " N"]

    @classmethod
    def from_ids(cls, documents: Documents, document_ids: Int[Tensor, "B T"]) -> "DocumentRows":
        """Lays out all documents but padding. It waits for a device."""
        device, flat = document_ids.device, document_ids.flatten()
        lengths = torch.tensor(documents.lengths, device=device)
        starts = lengths.cumsum(0) - lengths
        # Padding is a run of ids below 0. A batch of padding alone keeps its first run.  [S]
        is_real = flat[starts] >= 0
        is_real[0] |= ~is_real.any()
        starts, lengths = starts[is_real], lengths[is_real]
        # Position j of a document is at start + j. Behind its end, its last position is repeated, which is causal.
        offsets = torch.arange(int(lengths.max()), device=device)
        positions = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
        places = torch.zeros_like(flat)
        inside = offsets < lengths[:, None]
        places[positions[inside]] = inside.flatten().nonzero().flatten()
        return cls(positions, places)

    def gather(self, values: Int[Tensor, "B T"]) -> Int[Tensor, "S L"]:
        """Returns values of the packed rows in the documents' rows."""
        return values.flatten()[self.positions]

    def scatter(self, states: Tensor, shape: torch.Size) -> Tensor:
        """Returns states [S, L, D] of the documents' rows in packed rows, [B, T, D]. Padding has any state."""
        return states.flatten(0, 1)[self.places].unflatten(0, shape)
