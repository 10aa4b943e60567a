"""Triton kernels over rows of logits [n, V], one program a row. `logit_operators.py` launches them.

    mark_support     finds the columns of the entries and the label, and takes the entries out of the row
    reduce_tail      statistics of what is left, at several temperatures, in one read
    write_dlogits    the gradient by the product hidden @ weight.T, over the product's own memory

The row holds the product x. A logit is z = cap · tanh((scale · x + bias) / cap), made where it is read, so that soft
cap, scale and bias cost no pass. x = −inf marks the support. `form` holds scale and cap (0 stands for none).
Running sums are kept per lane, so an element costs one exponential a temperature. The largest logit m is kept apart
from the mass Σ e^((z − m) / τ): their sum m / τ + log mass would lose digits (arXiv 1805.02867 has the recurrence).
"""
# Triton reads no annotations of arguments but its own.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import triton
import triton.language as tl

# Stands for the largest of no logits. Differences to it are finite, which −inf − −inf is not. A power of two is the
# same number in float32 and float64.
LOWEST = tl.constexpr(-(2.0**100))


@triton.jit
def _logit(x, bias_ptr, columns, inside, form_ptr, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Returns z of products x at some columns."""
    z = x * tl.load(form_ptr)
    if BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if CAP:
        # tanh by an exponential that cannot overflow.
        cap = tl.load(form_ptr + 1)
        decay = tl.exp(-2.0 * tl.abs(z) / cap)
        tanh = (1.0 - decay) / (1.0 + decay)
        z = cap * tl.where(z < 0, -tanh, tanh)
    return z


@triton.jit
def mark_support_kernel(
    x_ptr, row_stride, columns_ptr, in_shard_ptr, bias_ptr, form_ptr, logits_ptr,
    slots_ptr, SPECIAL: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    lane = tl.arange(0, WIDTH)
    # Entries 0 … K − 1, and the label at K.
    K: tl.constexpr = SPECIAL - 1
    inside = lane < SPECIAL
    places = row * SPECIAL + lane
    columns = tl.load(columns_ptr + places, mask=inside, other=0)
    in_shard = tl.load(in_shard_ptr + places, mask=inside, other=0) != 0
    x = tl.load(x_ptr + columns, mask=in_shard, other=0.0)
    z = _logit(x, bias_ptr, columns, in_shard, form_ptr, BIAS, CAP)
    tl.store(logits_ptr + places, tl.where(in_shard, z, 0.0), mask=inside)
    # Every entry writes its number at its column. The number that is read back stands for all entries of the id.
    is_entry = in_shard & (lane < K)
    tl.debug_barrier()
    tl.store(x_ptr + columns, lane.to(x_ptr.dtype.element_ty), mask=is_entry)
    tl.debug_barrier()
    slot = tl.load(x_ptr + columns, mask=is_entry, other=0.0).to(tl.int32)
    # The label's slot: that of its entry, or K outside the support.
    label_column = tl.max(tl.where(lane == K, columns, 0), 0)
    of_label = tl.max(tl.where(is_entry & (columns == label_column), slot, -1), 0)
    of_label = tl.where(of_label < 0, K, of_label)
    slot = tl.where(lane == K, of_label, slot)
    # Slot K + 1 collects what another shard holds.
    tl.store(slots_ptr + places, tl.where(in_shard, slot, SPECIAL).to(tl.int64), mask=inside)
    tl.debug_barrier()
    tl.store(x_ptr + columns, tl.full([WIDTH], float("-inf"), x_ptr.dtype.element_ty), mask=is_entry)


@triton.jit(do_not_specialize=["n"])  # the last chunk has any number of rows
def reduce_tail_kernel(
    x_ptr, row_stride, V: tl.constexpr, n, bias_ptr, form_ptr, inverse_ptr, top_ptr,
    mass_ptr, sum_ptr, spread_ptr, T: tl.constexpr, TEMPERATURES: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr, SPREAD: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    dtype = x_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    temperature = tl.arange(0, TEMPERATURES)
    inverse = tl.load(inverse_ptr + temperature, mask=temperature < T, other=1.0)[:, None]
    # Per lane: the largest logit so far, and per temperature Σ e^((z − top) / τ).
    top = tl.full([BLOCK], LOWEST, dtype)
    mass = tl.zeros([TEMPERATURES, BLOCK], dtype)
    # Σ z, and of one temperature Σ (top − z) e^((z − top) / τ), whose terms are not negative.
    added = tl.zeros([BLOCK], dtype)
    spread = tl.zeros([BLOCK], dtype)
    for start in range(0, V, BLOCK):
        columns = start + lane
        x = tl.load(x_ptr + columns, mask=columns < V, other=float("-inf"))
        live = x != float("-inf")
        z = _logit(tl.where(live, x, 0.0), bias_ptr, columns, columns < V, form_ptr, BIAS, CAP)
        z = tl.where(live, z, LOWEST)
        if SUM:
            added += tl.where(live, z, 0.0)
        # A larger logit takes the place of `top` and scales down what was added up, else it is scaled itself.
        grows = z > top
        step = tl.abs(z - top)
        decay = tl.exp(-step[None, :] * inverse)
        if SPREAD:
            scaled = tl.sum(decay, 0)
            moved = scaled * (spread + step * tl.sum(mass, 0))
            spread = tl.where(grows, moved, spread + tl.where(live, step * scaled, 0.0))
        mass = tl.where(grows[None, :], mass * decay + 1.0, mass + tl.where(live[None, :], decay, 0.0))
        top = tl.maximum(top, z)
    # Lanes to one: top is the largest of all, and sums are scaled to it.
    largest = tl.max(top, 0)
    exists = largest > LOWEST
    step = largest - top
    decay = tl.exp(-step[None, :] * inverse)
    if SPREAD:
        tl.store(spread_ptr + row, tl.sum(tl.sum(decay, 0) * (spread + step * tl.sum(mass, 0)), 0))
    if SUM:
        tl.store(sum_ptr + row, tl.sum(added, 0))
    tl.store(top_ptr + row, tl.where(exists, largest, float("-inf")))
    tl.store(mass_ptr + temperature * n + row, tl.where(exists, tl.sum(mass * decay, 1), 1.0), mask=temperature < T)


@triton.jit
def _tail_gradient(z, row, n, inverse_ptr, top, factor_ptr, T: tl.constexpr):
    """Returns Σ over temperatures of factor · e^((z − top) / τ)."""
    gradient = tl.zeros_like(z)
    for t in tl.static_range(T):
        inverse = tl.load(inverse_ptr + t)
        gradient += tl.load(factor_ptr + t * n + row) * tl.exp(tl.minimum(z - top, 0.0) * inverse)
    return gradient


@triton.jit
def _through_form(gradient, z, form_ptr, CAP: tl.constexpr):
    """Returns the gradient by the product x of a gradient by the logit z."""
    if CAP:
        # d/dx of c · tanh(x / c) is 1 − tanh²(x / c).
        tanh = z / tl.load(form_ptr + 1)
        gradient *= 1.0 - tanh * tanh
    return gradient * tl.load(form_ptr)


@triton.jit(do_not_specialize=["n"])  # the last chunk has any number of rows
def write_dlogits_kernel(
    x_ptr, row_stride, out_ptr, out_stride, V: tl.constexpr, n, bias_ptr, form_ptr,
    inverse_ptr, top_ptr, factor_ptr, offset_ptr, columns_ptr, slots_ptr,
    logits_ptr, values_ptr, T: tl.constexpr, SPECIAL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    out_ptr += row * out_stride
    lane = tl.arange(0, BLOCK)
    # Without a tail every factor is 0, whatever stands for its largest logit.
    top = tl.load(top_ptr + row)
    top = tl.where(top == float("-inf"), 0.0, top)
    offset = tl.load(offset_ptr + row)
    for start in range(0, V, BLOCK):
        columns = start + lane
        x = tl.load(x_ptr + columns, mask=columns < V, other=float("-inf"))
        live = x != float("-inf")
        z = _logit(tl.where(live, x, 0.0), bias_ptr, columns, columns < V, form_ptr, BIAS, CAP)
        gradient = _tail_gradient(z, row, n, inverse_ptr, top, factor_ptr, T) + offset
        gradient = _through_form(gradient, z, form_ptr, CAP)
        # Narrower numbers lie in front of those that are still to be read, but for the first block.
        tl.debug_barrier()
        tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=columns < V)
    tl.debug_barrier()
    # Set the columns of the entries and of the label. A label outside the support is part of the tail.
    special = tl.arange(0, WIDTH)
    inside = special < SPECIAL
    places = row * SPECIAL + special
    slot = tl.load(slots_ptr + places, mask=inside, other=SPECIAL)
    z = tl.load(logits_ptr + places, mask=inside, other=0.0)
    gradient = tl.where(slot == SPECIAL - 1, _tail_gradient(z, row, n, inverse_ptr, top, factor_ptr, T), 0.0)
    gradient += tl.load(values_ptr + places, mask=inside, other=0.0) + offset
    gradient = _through_form(gradient, z, form_ptr, CAP)
    columns = tl.load(columns_ptr + places, mask=inside, other=0)
    tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside & (slot < SPECIAL))


@triton.jit
def scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    # A factor of 1 reads and writes nothing.
    if factor != 1.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x_ptr + places, tl.load(x_ptr + places, mask=places < size) * factor, mask=places < size)
