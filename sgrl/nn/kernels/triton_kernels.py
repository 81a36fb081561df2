"""Triton kernels of the time loops of SparseRNN, for `triton_layer.py`. Imports triton.

S runs are stacked: neuron j of run s has the index s * W + j in all tensors, F = S * W of them.
A program of a time loop owns all neurons of one run for a tile of samples, so that a barrier among
its own threads is all that separates the steps. A thread owns one neuron and a few samples and
holds all rows of them in registers; it sums everything one after the other. The order of its sums
depends neither on the tile nor on how many runs there are.

Letters: W neurons of size N, P parents, M slots, R = M + M*N rows of the stacked weights, L = P*N
numbers read, X input neurons, T steps, B samples; WB and BT are the tile of a program.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def tanh(x):
    """Compute tanh to the last digits of its type, relative to 1 and (in float32) to itself."""
    magnitude = tl.abs(x)
    shrunk = tl.exp(-2.0 * magnitude)
    y = (1.0 - shrunk) / (1.0 + shrunk)
    if x.dtype != tl.float64:
        # The difference above has lost the last digits of small values; their series has not.
        square = magnitude * magnitude
        series = 0.13333333333333333 + square * (-0.05396825396825397)
        series = 1.0 + square * (-0.3333333333333333 + square * series)
        y = tl.where(magnitude < 0.15, magnitude * series, y)
    return tl.where(x < 0, -y, y)


@triton.jit
@no_type_check
def rows_of(
    states,  # [F, N, B] that are read
    weight,  # [L + 1, rows, W] of the run, the last column the bias
    external,  # [X, rows, T, B] of the run, at its step
    sources,
    flat,
    w,
    b,
    ok,
    reads,
    T,
    rows: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """Products of every row of the weights with what its neuron reads: a tuple of tiles."""
    known = w < W
    row = ()
    for r in tl.static_range(rows):
        row += (tl.load(external + r * B * T, mask=reads, other=0.0),)
    # What is read is asked for a round ahead, and where it is two rounds ahead.
    source = tl.load(sources + flat * P, mask=known, other=0).to(tl.int32)
    x = tl.load(states + (source * (N * B))[:, None] + b[None, :], mask=ok, other=0.0)
    source = tl.load(sources + flat * P + 1 // N, mask=known & (P * N > 1), other=0).to(tl.int32)
    for k in tl.range(0, P * N + 1, num_stages=1):
        column = weight + k * (rows * W) + w
        # All loads before all sums: they wait for memory together.
        value = ()
        for r in tl.static_range(rows):
            value += (tl.load(column + r * W, mask=known, other=0.0),)
        at = states + (source * (N * B))[:, None] + ((k + 1) % N) * B + b[None, :]
        following = tl.load(at, mask=ok & (k + 1 < P * N), other=1.0)
        at = sources + flat * P + (k + 2) // N
        source = tl.load(at, mask=known & (k + 2 < P * N), other=0).to(tl.int32)
        new = ()
        for r in tl.static_range(rows):
            new += (row[r] + value[r][:, None] * x,)
        row = new
        x = following
    return row


@triton.jit(do_not_specialize=("T",))
@no_type_check
def forward_loop(
    states,  # [T+1, F, N, B], the first of them given
    attention,  # [T, F, M, B], written
    slots,  # [T, F, M, N, B], written
    weight,  # [S, L + 1, R, W], the last column the bias
    external,  # [S, X, R, T, B], what weight_x makes of the input
    sources,  # [F, P]
    T,
    B: tl.constexpr,
    W: tl.constexpr,
    X: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    SCALE: tl.constexpr,
    WB: tl.constexpr,
    BT: tl.constexpr,
):
    """All steps forward."""
    run = tl.program_id(0)
    num_flat = tl.num_programs(0) * W
    R: tl.constexpr = M + M * N
    w = tl.arange(0, WB)
    b = tl.program_id(1) * BT + tl.arange(0, BT)
    flat = tl.where(w < W, run * W + w, -1)
    ok = (w < W)[:, None] & (b < B)[None, :]
    reads = (w < X)[:, None] & (b < B)[None, :]
    weight += run * ((P * N + 1) * R * W)
    external += run.to(tl.int64) * (X * R * B) * T
    for t in tl.range(0, T, num_stages=1):
        given = external + (w * (R * B))[:, None] * T + t * B + b[None, :]
        row = rows_of(states, weight, given, sources, flat, w, b, ok, reads, T, R, B, W, P, N)
        largest = row[0]
        for m in tl.static_range(1, M):
            largest = tl.maximum(largest, row[m])
        total = tl.zeros((WB, BT), states.dtype.element_ty)
        share = ()
        for m in tl.static_range(M):
            share += (tl.exp((row[m] - largest) * SCALE),)
            total += share[m]
        states += num_flat * (N * B)
        at = attention + (flat * (M * B))[:, None] + b[None, :]
        for m in tl.static_range(M):
            tl.store(at + m * B, share[m] / total, mask=ok)
        attention += num_flat * (M * B)
        for n in tl.static_range(N):
            output = tl.zeros((WB, BT), states.dtype.element_ty)
            for m in tl.static_range(M):
                slot = tanh(row[M + m * N + n])
                at = slots + (flat * (M * N * B))[:, None] + (m * N + n) * B + b[None, :]
                tl.store(at, slot, mask=ok)
                output += (share[m] / total) * slot
            tl.store(states + (flat * (N * B))[:, None] + n * B + b[None, :], output, mask=ok)
        slots += num_flat * (M * N * B)
        tl.debug_barrier()


@triton.jit
@no_type_check
def sum_over_children(
    carried,  # [F, P, N, B]: what each neuron's edges carry back
    edges,  # [F, C]: the edges that read a neuron, in order; then F * P
    flat,
    b,
    ok,
    C,
    num_edges,
    dtype: tl.constexpr,
    WB: tl.constexpr,
    BT: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
):
    """What the children of every neuron pass back to it: a tuple of N tiles."""
    total = ()
    for _ in tl.static_range(N):
        total += (tl.zeros((WB, BT), dtype),)
    for c in tl.range(0, C, num_stages=1):
        edge = tl.load(edges + flat * C + c, mask=flat >= 0, other=num_edges).to(tl.int32)
        at = carried + (edge * (N * B))[:, None] + b[None, :]
        reads = (edge < num_edges)[:, None] & ok
        new = ()
        for n in tl.static_range(N):
            new += (total[n] + tl.load(at + n * B, mask=reads, other=0.0),)
        total = new
    return total


@triton.jit(do_not_specialize=("C", "T"))
@no_type_check
def backward_loop(
    received,  # [T, F, N, B], written if MIXES
    mixed,  # [T, F, N, B], written
    grad_rows,  # [S, X, R, T, B], written
    grad_h0,  # [F, N, B], written
    scratch,  # [2, F, P, N, B]: for what edges carry back, at one step and the next
    gradient,  # [T, F, N, B], of the states after each step
    states,  # [T+1, F, N, B]
    attention,  # [T, F, M, B]
    slots,  # [T, F, M, N, B]
    weight,  # [S, L + 1, R, W]
    offered,  # [T, F, N, B], predictions to be mixed in, if MIXES
    schedule,  # [T, F], lambda, if MIXES
    valid,  # [S, T, B], 0 at steps that are masked, if MASKS
    sources,  # [F, P]
    edges,  # [F, C]
    C,
    T,
    B: tl.constexpr,
    W: tl.constexpr,
    X: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    SCALE: tl.constexpr,
    MIXES: tl.constexpr,
    PROJECTS: tl.constexpr,
    MASKS: tl.constexpr,
    MIN_NORM: tl.constexpr,
    WB: tl.constexpr,
    BT: tl.constexpr,
):
    """All steps backward."""
    run = tl.program_id(0)
    num_flat = tl.num_programs(0) * W
    R: tl.constexpr = M + M * N
    dtype: tl.constexpr = states.dtype.element_ty
    w = tl.arange(0, WB)
    b = tl.program_id(1) * BT + tl.arange(0, BT)
    known = w < W
    flat = tl.where(known, run * W + w, -1)
    ok = known[:, None] & (b < B)[None, :]
    first = (w < X)[:, None] & (b < B)[None, :]
    here = (flat * (N * B))[:, None] + b[None, :]
    weight += run * ((P * N + 1) * R * W)
    grad_rows += run.to(tl.int64) * (X * R * B) * T
    for back in tl.range(0, T, num_stages=1):
        t = T - 1 - back
        # Neurons of all steps before.
        past = num_flat.to(tl.int64) * t
        now = past * (N * B) + here
        before = scratch + ((back + 1) % 2) * (num_flat * (P * N * B))
        after = scratch + (back % 2) * (num_flat * (P * N * B))
        # Nothing was passed back to the last step.
        carried = sum_over_children(
            before, edges, flat, b, ok & (back > 0), C, num_flat * P, dtype, WB, BT, N, B
        )
        feedback = ()
        for n in tl.static_range(N):
            feedback += (tl.load(gradient + now + n * B, mask=ok, other=0.0) + carried[n],)
        if MIXES:
            share = tl.load(schedule + past + flat, mask=known, other=1.0)[:, None] + tl.zeros(
                (WB, BT), dtype
            )
            if MASKS:
                at = valid + (run * T + t) * B + b
                share = tl.where((tl.load(at, mask=b < B, other=0) != 0)[None, :], share, 1.0)
            guess = ()
            along = tl.zeros((WB, BT), dtype)
            square = tl.zeros((WB, BT), dtype)
            for n in tl.static_range(N):
                tl.store(received + now + n * B, feedback[n], mask=ok)
                guess += (tl.load(offered + now + n * B, mask=ok, other=0.0),)
                along += feedback[n] * guess[n]
                square += guess[n] * guess[n]
            along = tl.maximum(along, 0.0)
            square = tl.maximum(square, MIN_NORM)
            new = ()
            for n in tl.static_range(N):
                if PROJECTS:
                    new += ((1.0 - share) * (along * guess[n] / square) + share * feedback[n],)
                else:
                    new += ((1.0 - share) * guess[n] + share * feedback[n],)
            feedback = new
        through = tl.zeros((WB, BT), dtype)
        for n in tl.static_range(N):
            tl.store(mixed + now + n * B, feedback[n], mask=ok)
            through += feedback[n] * tl.load(
                states + num_flat * (N * B) + now + n * B, mask=ok, other=0.0
            )
        # Gradients of the rows: of the scores (times their scale), then of what is within tanh.
        of_keys = ()
        of_slots = ()
        for m in tl.static_range(M):
            at = attention + past * (M * B) + (flat * (M * B))[:, None] + m * B + b[None, :]
            a = tl.load(at, mask=ok, other=0.0)
            value = -through
            for n in tl.static_range(N):
                at = slots + past * (M * N * B) + (flat * (M * N * B))[:, None] + b[None, :]
                y = tl.load(at + (m * N + n) * B, mask=ok, other=0.0)
                value += feedback[n] * y
                of_slots += ((1.0 - y * y) * a * feedback[n],)
                at = grad_rows + (w * (R * B))[:, None] * T + t * B + b[None, :]
                tl.store(at + (M + m * N + n) * B * T, of_slots[m * N + n], mask=first)
            at = grad_rows + (w * (R * B))[:, None] * T + t * B + b[None, :]
            tl.store(at + m * B * T, a * value, mask=first)
            of_keys += (a * value * SCALE,)
        row = of_keys + of_slots
        for k in tl.range(0, P * N, num_stages=1):
            column = weight + k * (R * W) + w
            # All loads before all sums: they wait for memory together.
            entry = ()
            for r in tl.static_range(R):
                entry += (tl.load(column + r * W, mask=known, other=0.0),)
            passed = entry[0][:, None] * row[0]
            for r in tl.static_range(1, R):
                passed += entry[r][:, None] * row[r]
            at = after + (flat * (P * N * B))[:, None] + k * B + b[None, :]
            tl.store(at, passed, mask=ok)
        tl.debug_barrier()
    after = scratch + ((T - 1) % 2) * (num_flat * (P * N * B))
    carried = sum_over_children(after, edges, flat, b, ok, C, num_flat * P, dtype, WB, BT, N, B)
    for n in tl.static_range(N):
        tl.store(grad_h0 + here + n * B, carried[n], mask=ok)


@triton.jit(do_not_specialize=("C", "T"))
@no_type_check
def schedule_loop(
    schedule,  # [T, F], written
    mixing_weight,  # [F], lambda
    edges,  # [F, C]
    beta,  # [F]
    C,
    T,
    W: tl.constexpr,
    P: tl.constexpr,
    WB: tl.constexpr,
):
    """Lambda of a run at all steps."""
    run = tl.program_id(0)
    num_flat = tl.num_programs(0) * W
    w = tl.arange(0, WB)
    flat = tl.where(w < W, run * W + w, -1)
    share = tl.load(mixing_weight + flat, mask=w < W, other=1.0)
    step = tl.load(beta + flat, mask=w < W, other=0.0)
    schedule += num_flat * (T - 1)
    tl.store(schedule + flat, share, mask=w < W)
    tl.debug_barrier()
    for _ in tl.range(1, T, num_stages=1):
        distrust = tl.zeros((WB,), share.dtype)
        count = tl.zeros((WB,), share.dtype)
        for c in tl.range(0, C, num_stages=1):
            edge = tl.load(edges + flat * C + c, mask=w < W, other=num_flat * P)
            reads = edge < num_flat * P
            distrust += 1.0 - tl.load(schedule + edge // P, mask=reads, other=1.0)
            count += tl.where(reads, 1.0, 0.0)
        share = tl.minimum(share + step * distrust / tl.maximum(count, 1.0), 1.0)
        schedule -= num_flat
        tl.store(schedule + flat, share, mask=w < W)
        tl.debug_barrier()
