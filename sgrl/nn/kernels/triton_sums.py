"""Triton kernels over all samples at once, for `triton_layer.py`. Imports triton.

Letters as in `triton_kernels.py`; K = T * B samples. The rows of a neuron are in groups: group 0
are the keys, n + 1 the n-th dimension of the slots. A group of some samples is a tile [MP, KB], MP
being M made a power of two, so that sums over groups stay within a thread. In products there are
GP groups, 1 + N made a power of two, one below the other.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def inputs_of(
    states,
    x,
    sources,
    flat,
    run,
    tile,
    k,
    T,
    num_flat,
    B: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    CB: tl.constexpr,
):
    """A tile [CB, KB] of what a neuron reads: L numbers in tiles of CB columns, then E others.

    The column after the L numbers is 1, for the bias.
    """
    L: tl.constexpr = P * N
    READ_TILES: tl.constexpr = (L + CB) // CB
    column = tile * CB + tl.arange(0, CB)
    e = (tile - READ_TILES) * CB + tl.arange(0, CB)
    is_read = column < L
    source = tl.load(sources + flat * P + column // N, mask=is_read, other=0).to(tl.int32)
    known = (k < T * B)[None, :]
    at = states + ((k // B).to(tl.int64) * num_flat * (N * B) + k % B)[None, :]
    at += (source * (N * B) + (column % N) * B)[:, None]
    inputs = tl.load(at, mask=known & is_read[:, None], other=0.0)
    at = x + (run * (T * B) + k).to(tl.int64)[None, :] * E + e[:, None]
    inputs += tl.load(at, mask=known & ((e >= 0) & (e < E))[:, None], other=0.0)
    return tl.where((column == L)[:, None] & known, inputs + 1.0, inputs)


@triton.jit(do_not_specialize=("T",))
@no_type_check
def predict(
    prediction,  # [T, F, N, B], written
    states,  # [T+1, F, N, B]
    attention,  # [T, F, M, B]
    x,  # [S, T, B, E]
    predictor_h,  # [F, M*N, L]
    predictor_x,  # [S, X, M*N, E]
    predictor_bias,  # [F, M, N]
    sources,  # [F, P]
    T,
    B: tl.constexpr,
    W: tl.constexpr,
    X: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    MP: tl.constexpr,
    NP: tl.constexpr,
    KB: tl.constexpr,
    CB: tl.constexpr,
):
    """Predictions of one neuron for a tile of samples."""
    flat = tl.program_id(0)
    num_flat = tl.num_programs(0)
    run = flat // W
    w = flat % W
    L: tl.constexpr = P * N
    READ_TILES: tl.constexpr = (L + CB) // CB
    dtype: tl.constexpr = states.dtype.element_ty
    k = tl.program_id(1) * KB + tl.arange(0, KB)
    row = tl.arange(0, NP * MP)[:, None]
    is_row = (row // MP < N) & (row % MP < M)
    place = (row % MP) * N + row // MP
    guess = tl.zeros((NP * MP, KB), dtype)
    tiles = READ_TILES + tl.where(w < X, (E + CB - 1) // CB, 0)
    for tile in tl.range(0, tiles, num_stages=1):
        inputs = inputs_of(states, x, sources, flat, run, tile, k, T, num_flat, B, P, N, E, CB)
        column = (tile * CB + tl.arange(0, CB))[None, :]
        e = column - READ_TILES * CB
        at = predictor_h + (flat * (M * N) + place) * L + column
        weight = tl.load(at, mask=is_row & (column < L), other=0.0)
        at = predictor_bias + flat * (M * N) + place + column * 0
        weight += tl.load(at, mask=is_row & (column == L), other=0.0)
        at = predictor_x + ((run * X + w) * (M * N) + place) * E + e
        weight += tl.load(at, mask=is_row & (e >= 0) & (e < E), other=0.0)
        guess = tl.dot(weight, inputs, guess, input_precision=PRECISION, out_dtype=dtype)
    known = (k < T * B)[None, :]
    past = ((k // B).to(tl.int64) * num_flat + flat)[None, :]
    at = attention + past * (M * B) + (row % MP) * B + (k % B)[None, :]
    guess *= tl.load(at, mask=known & is_row, other=0.0)
    made = tl.sum(tl.reshape(guess, (NP, MP, KB)), axis=1)
    n = tl.arange(0, NP)[:, None]
    at = prediction + past * (N * B) + n * B + (k % B)[None, :]
    tl.store(at, made, mask=known & (n < N))


@triton.jit
@no_type_check
def load_groups(start, mask, N: tl.constexpr, B: tl.constexpr):
    """The N tiles of something that neurons have for each dimension."""
    tiles = ()
    for n in tl.static_range(N):
        tiles += (tl.load(start + n * B, mask=mask, other=0.0),)
    return tiles


@triton.jit
@no_type_check
def dot_groups(one, other, N: tl.constexpr):
    """Sums over dimensions of products."""
    total = one[0] * other[0]
    for n in tl.static_range(1, N):
        total += one[n] * other[n]
    return total


@triton.jit
@no_type_check
def row_gradients(feedback, a, y, h, N: tl.constexpr):
    """Gradients of a neuron's rows by group: of the scores, then of what is within tanh."""
    value = dot_groups(y, feedback, N) - dot_groups(h, feedback, N)
    rows = (a * value,)
    for n in tl.static_range(N):
        rows += ((1.0 - y[n] * y[n]) * a * feedback[n],)
    return rows


@triton.jit
@no_type_check
def padded(rows, N: tl.constexpr, GP: tl.constexpr):
    """Groups with zeros after them, GP in all."""
    for _ in tl.static_range(GP - N - 1):
        rows += (rows[0] * 0.0,)
    return rows


@triton.jit
@no_type_check
def one_below_the_other(tiles, start: tl.constexpr, count: tl.constexpr):
    """The tiles [rows, KB] from start on, as one [count * rows, KB]."""
    if count == 1:
        return tiles[start]
    else:
        above = one_below_the_other(tiles, start, count // 2)
        below = one_below_the_other(tiles, start + count // 2, count // 2)
        both = tl.permute(tl.join(above, below), (2, 0, 1))
        return tl.reshape(both, (2 * above.shape[0], above.shape[1]))


@triton.jit(do_not_specialize=("T",))
@no_type_check
def sums_over_samples(
    grad_h,  # [F, R, L], written, and so are all gradients of parameters
    grad_x,  # [S, X, R, E]
    grad_bias,  # [F, M, N]
    grad_predictor_h,  # [F, M*N, L], if MIXES
    grad_predictor_x,  # [S, X, M*N, E], if MIXES
    grad_predictor_bias,  # [F, M, N], if MIXES
    parts,  # [F, tiles of columns, 8], written: see `triton_layer.Sums`
    states,  # [T+1, F, N, B]
    attention,  # [T, F, M, B]
    slots,  # [T, F, M, N, B]
    x,  # [S, T, B, E]
    mixed,  # [T, F, N, B]
    received,  # [T, F, N, B], if MIXES
    prediction,  # [T, F, N, B], if MIXES
    offered,  # [T, F, N, B], if MEASURES
    valid,  # [S, T, B], 0 at steps that do not count, if MASKS
    factor,  # [S], 2 / number of terms in the predictor's loss, if MIXES
    sources,  # [F, P]
    T,
    B: tl.constexpr,
    W: tl.constexpr,
    X: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    E: tl.constexpr,
    SCALE: tl.constexpr,
    MIXES: tl.constexpr,
    MEASURES: tl.constexpr,
    UNIT: tl.constexpr,
    PROJECTS: tl.constexpr,
    ON_RECEIVED: tl.constexpr,
    MASKS: tl.constexpr,
    MIN_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    MP: tl.constexpr,
    GP: tl.constexpr,
    KB: tl.constexpr,
    CB: tl.constexpr,
):
    """Sums over all samples, of one neuron and one tile of its inputs (see `inputs_of`).

    MEASURES only where MIXES.
    """
    flat = tl.program_id(0)
    tile = tl.program_id(1)
    num_flat = tl.num_programs(0)
    run = flat // W
    w = flat % W
    L: tl.constexpr = P * N
    R: tl.constexpr = M + M * N
    READ_TILES: tl.constexpr = (L + CB) // CB
    if (tile >= READ_TILES) & (w >= X):
        return
    dtype: tl.constexpr = states.dtype.element_ty
    # Kinds of rows: gradients, those of the predictor's rows, those of w and of u.
    KINDS: tl.constexpr = 4 if MEASURES else 2 if MIXES else 1
    m = tl.arange(0, MP)[:, None]
    # The bias counts as an input of the slots, in one of the tiles.
    has_bias = tl.where(tile == READ_TILES - 1, 1.0, 0.0).to(dtype)

    total = tl.zeros((KINDS * GP * MP, CB), dtype)
    if MIXES:
        loss = tl.zeros((MP, KB), dtype)
        norm_r = tl.zeros((MP, KB), dtype)
        norm_m = tl.zeros((MP, KB), dtype)
        norm_p = tl.zeros((MP, KB), dtype)
    if MEASURES:
        u_square = tl.zeros((MP, KB), dtype)
        wu = tl.zeros((MP, KB), dtype)
    for k0 in tl.range(0, T * B, KB, num_stages=1):
        k = k0 + tl.arange(0, KB)
        inputs = inputs_of(states, x, sources, flat, run, tile, k, T, num_flat, B, P, N, E, CB)
        known = (k < T * B)[None, :] & (m < M)
        b = (k % B)[None, :]
        past = ((k // B).to(tl.int64) * num_flat + flat)[None, :]
        # The same for all slots: loaded for each, so that it need not move between threads.
        here = past * (N * B) + b + m * 0
        a = tl.load(attention + past * (M * B) + m * B + b, mask=known, other=0.0)
        y = load_groups(slots + past * (M * N * B) + m * (N * B) + b, known, N, B)
        h = load_groups(states + num_flat * (N * B) + here, known, N, B)
        used = load_groups(mixed + here, known, N, B)
        rows = padded(row_gradients(used, a, y, h, N), N, GP)
        if MIXES:
            counts = known
            if MASKS:
                at = valid + (run * (T * B) + k)[None, :] + m * 0
                counts = tl.load(at, mask=known, other=0) != 0
            got = load_groups(received + here, known, N, B)
            guess = load_groups(prediction + here, known, N, B)
            of_loss = tl.load(factor + run)
            rows_p = (a * 0.0,)
            for n in tl.static_range(N):
                residual = tl.where(counts, guess[n] - (got[n] if ON_RECEIVED else used[n]), 0.0)
                loss += residual * residual
                rows_p += (a * (residual * of_loss),)
            norm = tl.sqrt(dot_groups(got, got, N))
            norm_r += tl.where(counts, norm, 0.0)
            norm_m += tl.where(counts, tl.sqrt(dot_groups(used, used, N)), 0.0)
            norm_p += tl.where(counts, tl.sqrt(dot_groups(guess, guess, N)), 0.0)
            rows += padded(rows_p, N, GP)
        if MEASURES:
            other = load_groups(offered + here, known, N, B)
            square = dot_groups(other, other, N)
            by_other = tl.full((MP, KB), 1.0, dtype)
            by_got = by_other
            if PROJECTS:
                along = tl.maximum(dot_groups(got, other, N), 0.0)
                by_other = along / tl.maximum(square, MIN_NORM)
            if UNIT:
                by_got = 1.0 / tl.maximum(norm, MIN_NORM)
                length = tl.sqrt(square) * by_other
                by_other = by_other / tl.maximum(length, MIN_NORM)
            w_feedback = ()
            u_feedback = ()
            for n in tl.static_range(N):
                w_feedback += (tl.where(counts, got[n] * by_got, 0.0),)
                u_feedback += (tl.where(counts, other[n] * by_other - got[n] * by_got, 0.0),)
            rows_w = row_gradients(w_feedback, a, y, h, N)
            rows_u = row_gradients(u_feedback, a, y, h, N)
            x_square = (tl.sum(inputs * inputs, axis=0) - has_bias)[None, :]
            for i in tl.static_range(N + 1):
                weight = SCALE * SCALE * x_square if i == 0 else has_bias + x_square
                u_square += rows_u[i] * rows_u[i] * weight
                wu += rows_w[i] * rows_u[i] * weight
            rows += padded(rows_w, N, GP) + padded(rows_u, N, GP)
        stack = one_below_the_other(rows, 0, KINDS * GP)
        across = tl.trans(inputs)
        total = tl.dot(stack, across, total, input_precision=PRECISION, out_dtype=dtype)

    if MEASURES:
        kinds = tl.permute(tl.reshape(total, (2, 2, GP * MP, CB)), (2, 3, 0, 1))
        even, odd = tl.split(kinds)
        total, total_w = tl.split(even)
        total_p, total_u = tl.split(odd)
    elif MIXES:
        kinds = tl.permute(tl.reshape(total, (2, GP * MP, CB)), (1, 2, 0))
        total, total_p = tl.split(kinds)
    row = tl.arange(0, GP * MP)[:, None]
    m_of_tile = m
    g = row // MP
    m = row % MP
    column = (tile * CB + tl.arange(0, CB))[None, :]
    e = column - READ_TILES * CB
    is_external = (e >= 0) & (e < E)
    is_slot = (m < M) & (g > 0) & (g <= N)
    is_row = (m < M) & (g <= N)
    r = tl.where(g == 0, m, M + m * N + g - 1)
    one = tl.full((GP * MP, 1), 1.0, dtype)
    scale = tl.where(g == 0, one * SCALE, one)
    reader = run * X + w
    total *= scale
    tl.store(grad_h + (flat * R + r) * L + column, total, mask=is_row & (column < L))
    tl.store(grad_x + (reader * R + r) * E + e, total, mask=is_row & is_external)
    at = grad_bias + flat * (M * N) + r - M + column * 0
    tl.store(at, total, mask=is_slot & (column == L))
    place = parts + (flat * tl.num_programs(1) + tile) * 8
    if MIXES:
        at = grad_predictor_h + (flat * (M * N) + r - M) * L + column
        tl.store(at, total_p, mask=is_slot & (column < L))
        at = grad_predictor_x + (reader * (M * N) + r - M) * E + e
        tl.store(at, total_p, mask=is_slot & is_external)
        at = grad_predictor_bias + flat * (M * N) + r - M + column * 0
        tl.store(at, total_p, mask=is_slot & (column == L))
        # The first slot has them; the others have the same.
        first = m_of_tile == 0
        tl.store(place + 4, tl.sum(tl.where(first, loss, 0.0)))
        tl.store(place + 5, tl.sum(tl.where(first, norm_r, 0.0)))
        tl.store(place + 6, tl.sum(tl.where(first, norm_m, 0.0)))
        tl.store(place + 7, tl.sum(tl.where(first, norm_p, 0.0)))
    if MEASURES:
        # Keys have no bias.
        scale = tl.where((g == 0) & (column == L), 0.0, scale)
        total_w *= scale
        total_u *= scale
        tl.store(place, tl.sum(u_square))
        tl.store(place + 1, tl.sum(wu))
        tl.store(place + 2, tl.sum(tl.sum(total_u * total_u, axis=1)))
        tl.store(place + 3, tl.sum(tl.sum(total_w * total_u, axis=1)))
