"""Triton kernels of the time loops of SparseRNN, for `triton_unroll.py`. Imports triton.

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
def forward_loop(
    states,  # [T+1, F, N, B], the first of them given
    attention,  # [T, F, M, B], written if KEEPS
    slots,  # [T, F, M, N, B], written if KEEPS
    weight,  # [L + 1, R, F], the last column the bias
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
    KEEPS: tl.constexpr,
    WB: tl.constexpr,
    BT: tl.constexpr,
):
    """All steps forward: the program's run and tile of samples are its ids."""
    run = tl.program_id(0)
    num_flat = tl.num_programs(0) * W
    R: tl.constexpr = M + M * N
    L: tl.constexpr = P * N
    dtype = states.dtype.element_ty
    w = tl.arange(0, WB)
    b = tl.program_id(1) * BT + tl.arange(0, BT)
    known = w < W
    flat = run * W + w
    ok = known[:, None] & (b < B)[None, :]
    reads = (w < X)[:, None] & (b < B)[None, :]
    external += run.to(tl.int64) * (X * R * B) * T
    for t in tl.range(0, T, num_stages=1):
        # Scores of the keys, then the slots' sums: the rows of `weight`, in order.
        row = ()
        given = external + (w * (R * B))[:, None] * T + t * B + b[None, :]
        for r in tl.static_range(R):
            row += (tl.load(given + r * B * T, mask=reads, other=0.0),)
        for k in tl.range(0, L + 1, num_stages=1):
            is_read = known & (k < L)
            source = tl.load(sources + flat * P + k // N, mask=is_read, other=0).to(tl.int32)
            at = states + (source * (N * B))[:, None] + (k % N) * B + b[None, :]
            x = tl.load(at, mask=ok & (k < L), other=1.0)
            column = weight + k * R * num_flat + flat
            new = ()
            for r in tl.static_range(R):
                value = tl.load(column + r * num_flat, mask=known, other=0.0)
                new += (row[r] + value[:, None] * x,)
            row = new
        largest = row[0]
        for m in tl.static_range(1, M):
            largest = tl.maximum(largest, row[m])
        total = tl.zeros((WB, BT), dtype)
        share = ()
        for m in tl.static_range(M):
            share += (tl.exp((row[m] - largest) * SCALE),)
            total += share[m]
        states += num_flat * (N * B)
        if KEEPS:
            at = attention + (flat * (M * B))[:, None] + b[None, :]
            for m in tl.static_range(M):
                tl.store(at + m * B, share[m] / total, mask=ok)
            attention += num_flat * (M * B)
        for n in tl.static_range(N):
            output = tl.zeros((WB, BT), dtype)
            for m in tl.static_range(M):
                slot = tanh(row[M + m * N + n])
                if KEEPS:
                    at = slots + (flat * (M * N * B))[:, None] + (m * N + n) * B + b[None, :]
                    tl.store(at, slot, mask=ok)
                output += (share[m] / total) * slot
            tl.store(states + (flat * (N * B))[:, None] + n * B + b[None, :], output, mask=ok)
        if KEEPS:
            slots += num_flat * (M * N * B)
        tl.debug_barrier()
