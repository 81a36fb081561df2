"""The Triton kernel of the sums over all samples, for `triton_layer.py`. Imports triton.

Letters as in `triton_kernels.py`; MP and GP are M and 1 + N made powers of two.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def row_gradients(feedback, a, y, h, is_key):
    """Gradients of the rows of a neuron: [MP, GP, KB], of group 0 those of the scores.

    feedback and h [1, GP, KB], a [MP, 1, KB], y [MP, GP, KB], 0 in group 0.
    """
    value = tl.sum(y * feedback, axis=1, keep_dims=True)
    value -= tl.sum(h * feedback, axis=1, keep_dims=True)
    return tl.where(is_key, a * value, (1.0 - y * y) * a * feedback)


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
    offered,  # [T, F, N, B], if MIXES
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
    """Sums over all samples, of one neuron and one tile of its inputs.

    Its inputs are the L numbers it reads and 1, for the bias, in tiles of CB columns; then those of
    the external input. The rows are in groups: 0 the keys, n + 1 the n-th dimension of the slots.
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
    m = tl.arange(0, MP)[:, None, None]
    g = tl.arange(0, GP)[None, :, None]
    is_key = g == 0
    column = tile * CB + tl.arange(0, CB)
    is_read = column < L
    is_bias = column == L
    e = (tile - READ_TILES) * CB + tl.arange(0, CB)
    is_external = (e >= 0) & (e < E)
    source = tl.load(sources + flat * P + column // N, mask=is_read, other=0).to(tl.int32)
    # The bias of the slots counts as an input in one of the tiles.
    has_bias = tl.where(tile == READ_TILES - 1, 1.0, 0.0).to(dtype)

    total = tl.zeros((MP * GP, CB), dtype)
    if MIXES:
        total_p = tl.zeros((MP * GP, CB), dtype)
        loss = tl.zeros((KB,), dtype)
        norm_r = tl.zeros((KB,), dtype)
        norm_m = tl.zeros((KB,), dtype)
        norm_p = tl.zeros((KB,), dtype)
    if MEASURES:
        total_w = tl.zeros((MP * GP, CB), dtype)
        total_u = tl.zeros((MP * GP, CB), dtype)
        u_square = tl.zeros((KB,), dtype)
        wu = tl.zeros((KB,), dtype)
    for k0 in tl.range(0, T * B, KB, num_stages=1):
        k = k0 + tl.arange(0, KB)
        known = k < T * B
        b = k % B
        past = (k // B).to(tl.int64) * num_flat + flat  # neurons before, at earlier steps too
        at = states + (past - flat)[:, None] * (N * B) + (source * (N * B))[None, :]
        at += ((column % N) * B)[None, :] + b[:, None]
        inputs = tl.load(at, mask=known[:, None] & is_read[None, :], other=0.0)
        at = x + (run * (T * B) + k).to(tl.int64)[:, None] * E + e[None, :]
        inputs += tl.load(at, mask=known[:, None] & is_external[None, :], other=0.0)
        inputs_1 = tl.where(is_bias[None, :] & known[:, None], 1.0, inputs).to(dtype)

        here = past[None, None, :] * (N * B) + (g - 1) * B + b[None, None, :]
        of_group = (g > 0) & (g <= N) & known[None, None, :]
        at = attention + past[None, None, :] * (M * B) + m * B + b[None, None, :]
        a = tl.load(at, mask=(m < M) & known[None, None, :], other=0.0)
        at = slots + past[None, None, :] * (M * N * B) + (m * N + g - 1) * B + b[None, None, :]
        y = tl.load(at, mask=(m < M) & of_group, other=0.0)
        h = tl.load(states + num_flat * (N * B) + here, mask=of_group, other=0.0)
        used = tl.load(mixed + here, mask=of_group, other=0.0)
        rows = tl.reshape(row_gradients(used, a, y, h, is_key), (MP * GP, KB))
        total = tl.dot(rows, inputs_1, total, input_precision=PRECISION, out_dtype=dtype)
        if MIXES:
            counts = known[None, None, :]
            if MASKS:
                at = valid + run * (T * B) + k
                counts = (tl.load(at, mask=known, other=0) != 0)[None, None, :]
            got = tl.load(received + here, mask=of_group, other=0.0)
            guess = tl.load(prediction + here, mask=of_group, other=0.0)
            residual = tl.where(counts, guess - (got if ON_RECEIVED else used), 0.0)
            rows = a * (residual * tl.load(factor + run))
            rows = tl.reshape(rows, (MP * GP, KB))
            total_p = tl.dot(rows, inputs_1, total_p, input_precision=PRECISION, out_dtype=dtype)
            loss += tl.reshape(tl.sum(residual * residual, axis=1), (KB,))
            norm = tl.sqrt(tl.sum(got * got, axis=1, keep_dims=True))
            norm_r += tl.reshape(tl.where(counts, norm, 0.0), (KB,))
            square = tl.sum(used * used, axis=1, keep_dims=True)
            norm_m += tl.reshape(tl.where(counts, tl.sqrt(square), 0.0), (KB,))
            square = tl.sum(guess * guess, axis=1, keep_dims=True)
            norm_p += tl.reshape(tl.where(counts, tl.sqrt(square), 0.0), (KB,))
        if MEASURES:
            other = tl.load(offered + here, mask=of_group, other=0.0)
            if PROJECTS:
                along = tl.maximum(tl.sum(got * other, axis=1, keep_dims=True), 0.0)
                square = tl.sum(other * other, axis=1, keep_dims=True)
                other = along * other / tl.maximum(square, MIN_NORM)
            if UNIT:
                got = got / tl.maximum(norm, MIN_NORM)
                square = tl.sum(other * other, axis=1, keep_dims=True)
                other = other / tl.maximum(tl.sqrt(square), MIN_NORM)
            rows_w = row_gradients(tl.where(counts, got, 0.0), a, y, h, is_key)
            rows_u = row_gradients(tl.where(counts, other - got, 0.0), a, y, h, is_key)
            x_square = tl.sum(inputs * inputs, axis=1)[None, None, :]
            weight = tl.where(is_key, SCALE * SCALE * x_square, has_bias + x_square)
            u_square += tl.sum(tl.sum(rows_u * rows_u * weight, axis=0), axis=0)
            wu += tl.sum(tl.sum(rows_w * rows_u * weight, axis=0), axis=0)
            rows = tl.reshape(rows_w, (MP * GP, KB))
            total_w = tl.dot(rows, inputs_1, total_w, input_precision=PRECISION, out_dtype=dtype)
            rows = tl.reshape(rows_u, (MP * GP, KB))
            total_u = tl.dot(rows, inputs_1, total_u, input_precision=PRECISION, out_dtype=dtype)

    row = tl.arange(0, MP * GP)[:, None]
    m = row // GP
    g = row % GP
    is_slot = (m < M) & (g > 0) & (g <= N)
    is_row = (m < M) & (g <= N)
    r = tl.where(g == 0, m, M + m * N + g - 1)
    one = tl.full((MP * GP, 1), 1.0, dtype)
    scale = tl.where(g == 0, one * SCALE, one)
    reader = run * X + w
    total *= scale
    at = grad_h + (flat * R + r) * L + column[None, :]
    tl.store(at, total, mask=is_row & is_read[None, :])
    at = grad_x + (reader * R + r) * E + e[None, :]
    tl.store(at, total, mask=is_row & is_external[None, :])
    at = grad_bias + flat * (M * N) + r - M + (column * 0)[None, :]
    tl.store(at, total, mask=is_slot & is_bias[None, :])
    place = parts + (flat * tl.num_programs(1) + tile) * 8
    if MIXES:
        at = grad_predictor_h + (flat * (M * N) + r - M) * L + column[None, :]
        tl.store(at, total_p, mask=is_slot & is_read[None, :])
        at = grad_predictor_x + (reader * (M * N) + r - M) * E + e[None, :]
        tl.store(at, total_p, mask=is_slot & is_external[None, :])
        at = grad_predictor_bias + flat * (M * N) + r - M + (column * 0)[None, :]
        tl.store(at, total_p, mask=is_slot & is_bias[None, :])
        tl.store(place + 4, tl.sum(loss))
        tl.store(place + 5, tl.sum(norm_r))
        tl.store(place + 6, tl.sum(norm_m))
        tl.store(place + 7, tl.sum(norm_p))
    if MEASURES:
        # Keys have no bias.
        scale = tl.where((g == 0) & is_bias[None, :], 0.0, scale)
        total_w *= scale
        total_u *= scale
        tl.store(place, tl.sum(u_square))
        tl.store(place + 1, tl.sum(wu))
        tl.store(place + 2, tl.sum(tl.sum(total_u * total_u, axis=1)))
        tl.store(place + 3, tl.sum(tl.sum(total_w * total_u, axis=1)))
