"""Selection of what a cache stores of the teacher's distribution: top entries, tail mass, label and samples.

At each position, from the logits z over the real vocabulary:

    log Z       = log Σ_v e^(z_v)
    entries     = the top K ids with z_v − log Z, cut by `min_prob` and `mass`
    tail        = log Σ_v∉entries e^(z_v) − log Z
    tail at τ   = log Σ_v∉entries e^(z_v/τ) − (log Z)/τ = log Σ_v∉entries p_v^(1/τ)
    samples     = draws from the tail's distribution, with the logarithms of their importance weights

The tail is summed over the tokens outside the entries, never computed as 1 − Σp, so it keeps its digits where the
entries hold nearly everything. One softmax in place gives its log-sum-exp as (largest logit − largest
log-probability). On a CPU this is many times faster than `torch.logsumexp`, which meets denormal numbers on peaked
rows. It also leaves the distribution within the tail in the place of the logits, and samples are drawn from that.

The largest logit of the tail is the one behind the entries in falling order. So two passes read the whole vocabulary:
one for the largest logits, and the softmax.

The ranks of a sharded teacher each hold logits of a slice of the vocabulary. They exchange candidates and sums, and all
have the same scores (`vocab_slices.py`). With one slice, which is the whole vocabulary, nothing is exchanged.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.vocab_slices import WHOLE_VOCAB, WholeVocab

UNUSED = -torch.inf
BLOCK = 32  # adjacent ids whose largest logit is found first
RUN = 256  # adjacent ids that a draw first chooses between as one
LOWEST_EXPONENT = -80.0  # e^−80 vanishes beside 1, and exponentials of smaller numbers are slow (denormal)


class TeacherScores(NamedTuple):
    """Selected values of the teacher's distribution at N positions, in nats. An entry or sample of −inf is unused."""

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    tail_log_prob: Float[Tensor, " N"]
    label_log_prob: Float[Tensor, " N"]
    tempered_tails: Float[Tensor, "N temperatures"]
    sampled_ids: Int[Tensor, "N S"]
    sampled_log_weights: Float[Tensor, "N S"]


def select_entries(
    logits: Float[Tensor, "n V"],
    labels: Int[Tensor, " n"],
    selection: Selection,
    uniforms: Float[Tensor, "n S"],
    vocab: WholeVocab = WHOLE_VOCAB,
) -> TeacherScores:
    """Computes the scores of n positions from their logits, which are overwritten.

    Args:
        logits: of the ids of this process's slice of the vocabulary.
        labels: the token that follows each position.
        selection: what is kept.
        uniforms: numbers in [0, 1) that decide the draws.
        vocab: the slice, by default the whole vocabulary.
    """
    # The top entries [n, K], the label's logit, and the largest logit of this slice's tail [n].
    largest = largest_logits(logits, min(selection.top_k + 1, logits.shape[1]))
    candidates = vocab.merge(logits, largest, labels, selection.top_k)
    values, ids, label, tail_largest, tail_column = candidates
    vocab.remove_(logits, candidates)
    # Tails at further temperatures need the logits, which the softmax is about to overwrite.  [n] each
    tempered = [_log_sum_exp(logits, tail_largest, temperature) for temperature in selection.tail_temperatures]
    # log Σ_tail e^z = max z − log max softmax(z). From here on `logits` holds probabilities within the slice's tail.
    slice_tail = tail_largest - torch.softmax(logits, dim=1, out=logits).gather(1, tail_column[:, None])[:, 0].log()
    # Log-sums of the whole tail.  [n] each
    tail, *tempered = vocab.log_sums([slice_tail, *tempered])
    # log Z over the whole vocabulary turns everything into log-probabilities: Σ p^(1/τ) = Σ e^(z/τ) / Z^(1/τ).
    normaliser = torch.logaddexp(values.logsumexp(dim=1), tail)  # [n]
    log_probs, tail = values - normaliser[:, None], tail - normaliser
    tempered = [
        log_sum - normaliser / temperature
        for log_sum, temperature in zip(tempered, selection.tail_temperatures, strict=True)
    ]
    cut = None
    if not selection.fixed:
        # Entries outside the limits go back to the tail: `cut` has their log-probabilities, −inf elsewhere.  [n, K]
        cut = torch.where(is_within_limits(log_probs, selection), UNUSED, log_probs)
        log_probs = torch.where(cut > UNUSED, UNUSED, log_probs)
        tail = torch.logaddexp(tail, cut.logsumexp(dim=1))
        tempered = [
            torch.logaddexp(tempered_tail, (cut / temperature).logsumexp(dim=1))
            for tempered_tail, temperature in zip(tempered, selection.tail_temperatures, strict=True)
        ]
    if selection.draws and not (vocab.is_whole and cut is None):
        # Rescale the distribution within the slice's tail to the whole tail.  [n, V]
        logits.mul_((slice_tail - normaliser - tail).exp()[:, None])
    if selection.draws and cut is not None:
        vocab.put_back_(logits, ids, (cut - tail[:, None]).exp())
    # A sample's weight within the tail, times the tail's mass.  [n, S]
    samples, weights = _draw(logits, uniforms, selection.proposal_temperature, vocab)
    return TeacherScores(
        ids,
        log_probs,
        tail,
        label - normaliser,
        torch.stack(tempered, dim=1) if tempered else tail.new_empty(len(tail), 0),
        samples,
        weights + tail[:, None],
    )


def largest_logits(logits: Float[Tensor, "n V"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Returns the k largest logits in falling order, and their ids, as `topk` does.

    Of equal logits on the border, either may be taken. One pass over the vocabulary replaces the several of `topk`.
    """
    n, V = logits.shape
    blocks = V // BLOCK
    if blocks < 2 * k:
        return logits.topk(k)
    # The k blocks of the largest maxima hold the k largest logits: the block of each has a maximum as large as it.
    whole = logits[:, : blocks * BLOCK].view(n, blocks, BLOCK)
    largest_blocks = whole.amax(dim=2).topk(k, sorted=False).indices  # [n, k]
    # Take the k largest of these blocks, and of the ids behind the last whole block.  [n, k · BLOCK + rest]
    in_blocks = largest_blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)
    rest = torch.arange(blocks * BLOCK, V, device=logits.device).expand(n, -1)
    candidates = torch.cat([in_blocks.flatten(1), rest], dim=1)
    values, places = logits.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)


def _log_sum_exp(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """Returns log Σ e^(logit/τ).  [n, V] → [n]"""
    shifted = ((logits - largest[:, None]) / temperature).clamp_(min=LOWEST_EXPONENT).exp_()
    return shifted.sum(dim=1).log() + largest / temperature


def is_within_limits(log_probs: Tensor, selection: Selection) -> Tensor:
    """Returns a mask of the entries that `min_prob` and `mass` keep. Entries are in falling order.  [n, K]"""
    probs = log_probs.double().exp()
    floor = torch.tensor(selection.min_prob, dtype=torch.float64).log()
    # The mass before an entry decides, so that the entry which reaches the limit is in.
    return (log_probs >= floor) & (probs.cumsum(dim=1) - probs < selection.mass)


def _draw(
    tail: Float[Tensor, "n V"], uniforms: Float[Tensor, "n S"], temperature: float, vocab: WholeVocab
) -> tuple[Tensor, Tensor]:
    """Draws S ids from the distribution within the tail. Overwrites `tail` where the temperature t is not 1.

    Returns:
        ids: each drawn id once, in rising order.  [n, S]
        log_weights: the logarithms of their weights, whose expected sum is 1. Behind the last id: −inf.  [n, S]

    With a proposal q ∝ p^(1/t), a draw has weight (p / q) / S.
    """
    n, S = uniforms.shape
    if not S:
        return uniforms.new_zeros((n, 0), dtype=torch.int64), tail.new_zeros((n, 0))
    proposal = tail if temperature == 1 else tail.pow_(1 / temperature)
    drawn, total = _inverse_cdf(proposal, uniforms, vocab)
    # At t = 1 all draws weigh 1 / S: an id that was drawn c times weighs c / S.
    ids, counts = _count_distinct(drawn)
    weights = (counts / S).log()
    if temperature != 1:
        # With w = p^(1/t) and q = w / Σw: p / q = w^t · Σw / w, so log(p / q) = (t − 1) · log w + log Σw.
        chosen = vocab.gather(proposal, ids).double()
        weights = weights + (temperature - 1) * chosen.log() + total.log()[:, None]
    return ids, torch.where(counts > 0, weights, UNUSED).float()


def _inverse_cdf(
    weights: Float[Tensor, "n V"], uniforms: Float[Tensor, "n S"], vocab: WholeVocab
) -> tuple[Tensor, Tensor]:
    """Returns the ids at which the cumulated weights reach `uniforms` of their sum [n, S], and that sum [n].

    Runs are cumulated in float64: over a whole vocabulary, float32 would lose the rare tokens. Slices follow in the
    order of their ids, so a draw differs from that of one slice only where rounding decides between neighbours.
    """
    n, V = weights.shape
    # Sum each run of adjacent ids, then the shorter rest.  [n, runs]
    whole = V // RUN * RUN
    sums = torch.cat([weights[:, :whole].view(n, -1, RUN).sum(dim=2), weights[:, whole:].sum(dim=1)[:, None]], dim=1)
    sums = sums.double()
    # Find the run of each draw, and how much of that run's sum lies before the draw.  [n, S]
    ends = sums.cumsum(dim=1)
    target, is_here, total = vocab.cumulate(ends[:, -1], uniforms.double())
    run = torch.searchsorted(ends, target, right=True).clamp(max=sums.shape[1] - 1)
    remainder = target - (ends - sums).gather(1, run)
    # Read the weights of that run's ids; ids behind the vocabulary weigh 0.  [n, S, RUN]
    index = run[:, :, None] * RUN + torch.arange(RUN, device=weights.device)
    run_weights = weights.gather(1, index.clamp(max=V - 1).flatten(1)).view(index.shape).double()
    run_weights = torch.where(index < V, run_weights, 0.0)
    # Count the ids of the run that end before the draw: the next one is drawn.  [n, S]
    token = (run_weights.cumsum(dim=2) <= remainder[:, :, None]).sum(dim=2)
    # Rounding may point behind a run's last token that has any weight.
    last = RUN - 1 - (run_weights > 0).flip(2).to(torch.uint8).argmax(dim=2)
    return vocab.global_ids(run * RUN + torch.minimum(token, last), is_here), total


def _count_distinct(drawn: Int[Tensor, "n S"]) -> tuple[Tensor, Tensor]:
    """Returns each drawn id once, in rising order, and how often it was drawn. Behind the last id both are 0."""
    # Mark the first of equal neighbours in sorted order, and number the distinct ids of a row.  [n, S]
    ordered = drawn.sort(dim=1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = first.cumsum(dim=1) - 1
    # Equal ids share a place: their ones add up there, and the id is written there.  [n, S]
    counts = torch.zeros_like(ordered).scatter_add_(1, place, torch.ones_like(ordered))
    return torch.zeros_like(ordered).scatter_(1, place, ordered), counts
