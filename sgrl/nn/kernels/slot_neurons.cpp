// The compiled CPU core: slot neurons unrolled over time, forward and backward, in one thread.
//
// `native.py` compiles this file once per machine and precision (REAL is float or double) and
// calls the functions of the last section through ctypes. What they compute is defined by the
// plain loop in `recurrent.py`; docs/native_core.md explains how this file does it.
//
// Letters: W neurons of size N read P parents each, L = P * N numbers; the first X of them also
// read E external inputs. M slots, R = M + M * N rows of stacked weights (M keys, then the
// matrices). T steps of B sequences, K samples = steps * B.
//
// Layout. The samples are the innermost axis everywhere, so that softmax, tanh and all products
// work on vectors of samples and a parent's state is a contiguous row. Two forms:
// - by step, [T][rows][B]: what the loop over time writes and reads. Rows follow each other
//   without gaps and are written in rising order in whole vectors: what spills over a row's end
//   is overwritten by the next row, and each step ends with one vector of slack. Lanes past a
//   row's end therefore hold other numbers, which are computed on but never looked at.
// - by neuron, [rows][K]: what the products over all samples read, rows padded to whole vectors.
// Memory comes from the caller as one block, cut up by `Workspace`; nothing is allocated here but
// short lists of row pointers, and there is no global state.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#ifndef REAL
#define REAL float
#endif

namespace {

using real = REAL;
using Index = std::int64_t;
constexpr bool single = sizeof(real) == 4;

// ------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int V = vector_bytes / sizeof(real);

using integer = std::conditional_t<single, std::int32_t, std::int64_t>;
typedef real vec __attribute__((vector_size(vector_bytes)));
typedef integer ivec __attribute__((vector_size(vector_bytes)));
typedef real vec_anywhere __attribute__((vector_size(vector_bytes), aligned(sizeof(real)), may_alias));

inline vec load(const real* from) { return *reinterpret_cast<const vec_anywhere*>(from); }
inline void store(real* to, vec value) { *reinterpret_cast<vec_anywhere*>(to) = value; }
inline vec splat(real value) { return value - vec{}; }

Index vectors(Index count) { return (count + V - 1) / V; }
// Row length of a matrix by neuron: whole vectors, one of slack, and no multiple of 4096 bytes
// (rows that far apart would share a few cache lines).
Index row_length(Index count) {
  Index length = (vectors(count) + 1) * V;
  return length * sizeof(real) % 1024 == 0 ? length + V : length;
}

// p(r) = exp(r) - 1 by Taylor for |r| <= log(2) / 2, to the precision of the type.
inline vec exp_minus_one_near_zero(vec r) {
  constexpr int degree = single ? 7 : 13;
  constexpr double inverse[] = {1.0, 1.0 / 2, 1.0 / 3, 1.0 / 4, 1.0 / 5, 1.0 / 6, 1.0 / 7,
                                1.0 / 8, 1.0 / 9, 1.0 / 10, 1.0 / 11, 1.0 / 12, 1.0 / 13};
  double coefficient[degree];
  coefficient[0] = 1;
  for (int i = 1; i < degree; ++i) coefficient[i] = coefficient[i - 1] * inverse[i];
  vec sum = splat(real(coefficient[degree - 1]));
  for (int i = degree - 2; i >= 0; --i) sum = sum * r + real(coefficient[i]);
  return sum * r;
}

struct Exponential {
  vec power, rest;  // exp(x) = power * (1 + rest)
};

// For x <= 0; below the least normal number it stays there. NaN stays NaN.
inline Exponential exponential(vec x) {
  constexpr real least = single ? real(-87) : real(-708);
  constexpr real magic = single ? real(12582912.0) : real(6755399441055744.0);  // 1.5 * 2^23, 2^52
  constexpr real ln2_high = single ? real(0.693359375) : real(6.93147180369123816490e-01);
  constexpr real ln2_low = single ? real(-2.12194440e-4) : real(1.90821492927058770002e-10);
  x = x < least ? splat(least) : x;
  const vec shifted = x * real(1.4426950408889634) + magic;
  const vec count = shifted - magic;  // the nearest whole number
  const vec r = (x - count * ln2_high) - count * ln2_low;
  const ivec exponent = reinterpret_cast<ivec>(shifted) << (single ? 23 : 52);
  const vec power = reinterpret_cast<vec>(exponent + reinterpret_cast<ivec>(splat(1)));
  return {power, exp_minus_one_near_zero(r)};
}

inline vec exp_of_negative(vec x) {
  const Exponential e = exponential(x);
  return e.power + e.power * e.rest;
}

// tanh|x| = -m / (m + 2) with m = exp(-2|x|) - 1, relative precision kept near zero.
inline vec tanh(vec x) {
  const ivec sign = reinterpret_cast<ivec>(x) & reinterpret_cast<ivec>(splat(real(-0.0)));
  const vec magnitude = reinterpret_cast<vec>(reinterpret_cast<ivec>(x) ^ sign);
  const Exponential e = exponential(magnitude * real(-2));
  const vec m = e.power * e.rest + (e.power - 1);
  // 1 / d by Newton's iteration, for d in (1, 2]: cheaper than a division.
  const vec d = m + 2;
  vec inverse = real(24.0 / 17) - real(8.0 / 17) * d;
  for (int i = 0; i < (single ? 3 : 4); ++i) inverse += inverse * (1 - d * inverse);
  return reinterpret_cast<vec>(reinterpret_cast<ivec>(-m * inverse) ^ sign);
}

inline vec square_root(vec x) {
  for (int i = 0; i < V; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// Two vectors as blocks of 2 * H lanes: `lower` takes the lower halves of a's blocks and of b's,
// `upper` the upper halves; a's stay or move to the lower, b's to the upper halves of the result.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif
template <int H, int... I>
inline vec lower(vec a, vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (I & H ? V + I - H : I)...);
}
template <int H, int... I>
inline vec upper(vec a, vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (I & H ? V + I : I + H)...);
}
using Lanes = std::make_integer_sequence<int, V>;

// Lane i of the result is the sum over lanes of values[i], for V vectors.
template <int H = V / 2>
inline vec sum_lanes(const vec* values) {
  if constexpr (H == 0) {
    return values[0];
  } else {
    vec half[H];
    for (int i = 0; i < H; ++i)
      half[i] = lower<H>(values[i], values[i + H], Lanes{}) +
                upper<H>(values[i], values[i + H], Lanes{});
    return sum_lanes<H / 2>(half);
  }
}

// Swap rows and columns of V vectors.
template <int H = V / 2>
inline void transpose_block(vec* values) {
  if constexpr (H > 0) {
    for (int i = 0; i < V; ++i)
      if (!(i & H)) {
        const vec a = values[i], b = values[i + H];
        values[i] = lower<H>(a, b, Lanes{});
        values[i + H] = upper<H>(a, b, Lanes{});
      }
    transpose_block<H / 2>(values);
  }
}

inline double sum(vec value) {
  double total = 0;
  for (int i = 0; i < V; ++i) total += value[i];
  return total;
}

// ------------------------------------------------------------------------------------ products

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_rows = 14, dot_rows = 6, dot_columns = 4;  // 32 vector registers
#else
constexpr int tile_rows = 6, dot_rows = 3, dot_columns = 4;  // 16
#endif

// Cut `count` rows into tiles of at most `most`, as equal as can be, and call f(first, size).
template <class F>
inline void for_tiles(Index count, int most, F f) {
  const Index tiles = (count + most - 1) / most;
  for (Index i = 0, first = 0; i < tiles; ++i) {
    const Index size = count / tiles + (i < count % tiles);
    f(first, size);
    first += size;
  }
}

// Matrix [rows][depth] in the order in which `multiply` reads it: tile by tile, each [depth][size].
// Element (r, d) is taken from `from[r * row_step + d * depth_step]`.
void pack(real* to, const real* from, Index rows, Index depth, Index row_step, Index depth_step,
          Index all_depth = 0, Index skip = 0) {
  if (!all_depth) all_depth = depth;
  for_tiles(rows, tile_rows, [&](Index first, Index size) {
    real* tile = to + first * all_depth + skip * size;
    for (Index d = 0; d < depth; ++d)
      for (Index r = 0; r < size; ++r)
        tile[d * size + r] = from[(first + r) * row_step + d * depth_step];
  });
}

// One tile: out[r] = bias[r] + sum over d of a[d][r] * b[d], S rows, C vectors from `column` on;
// without bias it is added to what out holds.
template <int S, int C>
void multiply_tile(Index depth, const real* a, const real* const* b, Index column,
                   real* const* out, const real* bias) {
  vec total[S][C];
#pragma GCC unroll 16
  for (int r = 0; r < S; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c)
      total[r][c] = bias ? splat(bias[r]) : load(out[r] + column + c * V);
  for (Index d = 0; d < depth; ++d, a += S) {
    vec row[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) row[c] = load(b[d] + column + c * V);
#pragma GCC unroll 16
    for (int r = 0; r < S; ++r) {
      const vec weight = splat(a[r]);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) total[r][c] += weight * row[c];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < S; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) store(out[r] + column + c * V, total[r][c]);
}

using MultiplyTile = void (*)(Index, const real*, const real* const*, Index, real* const*,
                              const real*);

template <int C, int... S>
constexpr MultiplyTile choose_multiply(Index size, std::integer_sequence<int, S...>) {
  constexpr MultiplyTile table[] = {multiply_tile<S + 1, C>...};
  return table[size - 1];
}

// out[rows][columns] = bias + packed matrix [rows][depth] times b[depth][columns], or added to out
// if bias is null. b and out are lists of rows, whole vectors of which are read and written: the
// last columns first, since only they spill into the next row.
void multiply(Index rows, Index depth, const real* packed, const real* const* b, Index columns,
              real* const* out, const real* bias) {
  constexpr auto sizes = std::make_integer_sequence<int, tile_rows>{};
  for (Index stop = vectors(columns), first; stop > 0; stop = first) {
    first = stop % 2 ? stop - 1 : stop - 2;
    for_tiles(rows, tile_rows, [&](Index row, Index size) {
      const MultiplyTile run =
          first + 2 == stop ? choose_multiply<2>(size, sizes) : choose_multiply<1>(size, sizes);
      run(depth, packed + row * depth, b, first * V, out + row, bias ? bias + row : nullptr);
    });
  }
}

// One tile: out[r][c] += sum over samples of a[r] * b[c].
template <int S, int C>
void dot_tile(Index count, const real* a, Index a_length, const real* const* b, Index offset,
              real* out, Index out_length) {
  vec total[(S * C + V - 1) / V * V] = {};
  const real* rows[C];
  for (int c = 0; c < C; ++c) rows[c] = b[c] + offset;
  for (Index k = 0; k < count * V; k += V) {
    vec column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = load(rows[c] + k);
#pragma GCC unroll 6
    for (int r = 0; r < S; ++r) {
      const vec row = load(a + r * a_length + k);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r * C + c] += row * column[c];
    }
  }
  for (int i = 0; i < S * C; i += V) {
    const vec sums = sum_lanes(total + i);
    for (int lane = 0; lane < std::min(V, S * C - i); ++lane)
      out[(i + lane) / C * out_length + (i + lane) % C] += sums[lane];
  }
}

using DotTile = void (*)(Index, const real*, Index, const real* const*, Index, real*, Index);

template <int... I>
constexpr DotTile choose_dot(Index rows, Index columns, std::integer_sequence<int, I...>) {
  constexpr DotTile table[] = {dot_tile<I / dot_columns + 1, I % dot_columns + 1>...};
  return table[(rows - 1) * dot_columns + columns - 1];
}

// out[rows][columns] += a[rows][samples] times the transpose of b, columns rows of samples from
// `offset` on. Past the last sample a must hold zeros up to a whole vector, and b finite numbers.
void dot(Index rows, Index columns, Index samples, const real* a, Index a_length,
         const real* const* b, Index offset, real* out) {
  constexpr auto shapes = std::make_integer_sequence<int, dot_rows * dot_columns>{};
  for_tiles(rows, dot_rows, [&](Index row, Index row_count) {
    for_tiles(columns, dot_columns, [&](Index column, Index column_count) {
      choose_dot(row_count, column_count, shapes)(vectors(samples), a + row * a_length, a_length,
                                                  b + column, offset, out + row * columns + column,
                                                  columns);
    });
  });
}

// ---------------------------------------------------------------------------- moving numbers

// to[c][r] = from[r][c] for r < rows, c < columns. Only these are read; with `pad` zeros follow in
// each row of `to` up to a whole vector, without it nothing else is written.
template <bool pad>
void transpose(real* to, Index to_length, const real* from, Index from_length, Index rows,
               Index columns) {
  vec block[V];
  for (Index c = 0; c < columns; c += V) {
    const Index width = std::min<Index>(V, columns - c);
    for (Index r = 0; r < rows; r += V) {
      const Index height = std::min<Index>(V, rows - r);
      for (Index i = 0; i < V; ++i) {
        block[i] = vec{};
        const real* row = from + (r + i) * from_length + c;
        if (i < height) {
          if (width == V)
            block[i] = load(row);
          else
            for (Index lane = 0; lane < width; ++lane) block[i][lane] = row[lane];
        }
      }
      transpose_block(block);
      for (Index i = 0; i < width; ++i) {
        real* row = to + (c + i) * to_length + r;
        if (pad || height == V)
          store(row, block[i]);
        else
          for (Index lane = 0; lane < height; ++lane) row[lane] = block[i][lane];
      }
    }
  }
}

// By step -> by neuron: rows from[t][r][B], r < rows, become to[r][t * B + b], one vector of zeros
// after each.
void gather_steps(real* to, Index to_length, const real* from, Index step_length, Index rows,
                  Index steps, Index batch) {
  // Few rows at a time, since each lies in a page of its own.
  for (Index first = 0; first < rows; first += 36)
    for (Index t = 0; t < steps; ++t)
      for (Index r = first; r < std::min<Index>(rows, first + 36); ++r)
        for (Index b = 0; b < batch; b += V)
          store(to + r * to_length + t * batch + b, load(from + t * step_length + r * batch + b));
  for (Index r = 0; r < rows; ++r) store(to + r * to_length + steps * batch, vec{});
}

// ---------------------------------------------------------------------------------- the layer

}  // namespace

extern "C" {

// A layer and its parameters, shaped as in `SlotNeurons`; predictor_* are null without predictors.
struct Layer {
  Index neurons, size, parents, slots, external, inputs;  // W, N, P, M, E, X
  double scale;                                           // of the scores
  const Index* parent;                                    // [W][P]
  const real *weight_h, *weight_x, *bias;
  const real *predictor_h, *predictor_x, *predictor_bias;
};

// What `SparseNetPolicy` has around the layer; shapes as in policies.py, `actor` as `stack` gives.
struct Policy {
  Index observation, features, actions, slots;  // F, D, A, S
  const real *weight_1, *bias_1, *weight_2, *bias_2, *actor, *actor_bias;
};

struct Mixing {
  const real* mixing_weight;  // lambda [W]
  double schedule_beta;
  std::int32_t positive_projection, target_received, mask_predictions, moments;
};

}  // extern "C"

namespace {

struct Shape {
  Index W, N, P, M, E, X, L, R, T, B, lanes;
  Shape(const Layer& l, Index steps, Index batch)
      : W(l.neurons), N(l.size), P(l.parents), M(l.slots), E(l.external), X(l.inputs), L(P * N),
        R(M + M * N), T(steps), B(batch), lanes(vectors(batch) * V) {}
  Index depth(Index j) const { return L + (j < X ? E : 0); }
  // Where neuron j's packed matrix of so many rows begins.
  Index packed(Index j, Index rows) const { return rows * (j * L + std::min(j, X) * E); }
  Index state_step() const { return W * N * B + V; }
};

// Cuts arrays from a block of memory, each with slack for whole vectors at its end; without a
// block it only counts. Under the address sanitizer a closed gap follows each.
struct Cutter {
  real *begin, *next;

  explicit Cutter(real* block) : begin(block), next(block) {}

  real* operator()(Index count) {
    real* array = next;
    next += (count + 2 * V - 1) / V * V + V;
#if defined(__SANITIZE_ADDRESS__)
    if (begin) {
      __asan_unpoison_memory_region(array, (next - array + 2 * V) * sizeof(real));
      __asan_poison_memory_region(next, 2 * V * sizeof(real));
    }
    next += 2 * V;
#endif
    return array;
  }
  Index total() const { return next - begin; }
};

// Samples that the products over all samples take at a time: their rows fit a core's own cache.
constexpr Index chunk_samples = single ? 800 : 400;

struct Workspace {
  real *forward_weights, *forward_bias;        // packed; [W][R], 0 for the keys
  real *external, *scores;                     // [E][lanes]; [M][lanes]
  real *states, *attention, *slots;            // by step: [T + 1][W * N], [T][W][M], [T][W][M * N]
  // Backward only.
  real *backward_weights, *external_weights, *predictor_weights;
  real *received, *predicted;                  // by step [T][W * N]
  real *states_by_neuron, *inputs_by_neuron, *inputs_gradient;  // [W * N], [E], [E]
  real *state_squares, *input_squares, *ones, *valid, *schedule;  // [W][K], [K] x 3, [T][W]
  real *carried[2];                            // [W * N][lanes]
  real *step_rows;                             // [R][lanes]
  real *panel_slots, *panel_attention, *panel_gradient, *panel_prediction;
  real *panel_rows;                            // all row gradients of a neuron [<= 3 R + M N]
  real *panel_guesses, *panel_weight;
  real *sums;                                  // [<= 3 R + M N][L + E + 1]
  Index steps_kept, row, states_row, panel, chunk;
  Index total;

  Workspace(const Shape& s, bool keep, real* block) {
    Cutter take(block);
    steps_kept = keep ? s.T : 1;
    const Index K = s.T * s.B;
    row = row_length(K);
    states_row = row_length(K + s.B);
    chunk = std::max<Index>(1, std::min(s.T, chunk_samples / s.B));
    // Chunks of equal length.
    chunk = (s.T + (s.T + chunk - 1) / chunk - 1) / ((s.T + chunk - 1) / chunk);
    panel = row_length(chunk * s.B);
    forward_weights = take(s.packed(s.W, s.R));
    forward_bias = take(s.W * s.R);
    external = take(s.E * s.lanes);
    scores = take(s.M * s.lanes);
    states = take((keep ? s.T + 1 : 2) * s.state_step());
    attention = take(steps_kept * s.W * s.M * s.B);
    slots = take(steps_kept * s.W * s.M * s.N * s.B);
    if (keep) {
      backward_weights = take(s.W * s.R * s.L);
      external_weights = take(s.X * s.R * s.E);
      predictor_weights = take(s.packed(s.W, s.M * s.N));
      received = take(s.T * s.state_step());
      predicted = take(s.T * s.state_step());
      states_by_neuron = take(s.W * s.N * states_row);
      inputs_by_neuron = take(s.E * row);
      inputs_gradient = take(s.E * row);
      state_squares = take(s.W * row);
      input_squares = take(row);
      ones = take(row);
      valid = take(row);
      schedule = take(s.T * s.W);
      carried[0] = take(s.W * s.N * s.lanes);
      carried[1] = take(s.W * s.N * s.lanes);
      step_rows = take(s.R * s.lanes);
      panel_slots = take(s.M * s.N * panel);
      panel_attention = take(s.M * panel);
      panel_gradient = take(s.N * panel);
      panel_prediction = take(s.N * panel);
      panel_rows = take((3 * s.R + s.M * s.N) * panel);
      panel_guesses = take(s.M * s.N * panel);
      panel_weight = take(panel);
      sums = take((3 * s.R + s.M * s.N) * (s.L + s.E + 1));
    }
    total = take.total();
  }
};

using Rows = std::vector<const real*>;

// ------------------------------------------------------------------------------------- forward

void pack_forward(const Layer& layer, const Shape& s, Workspace& w) {
  const Index MN = s.M * s.N;
  for (Index j = 0; j < s.W; ++j) {
    real* to = w.forward_weights + s.packed(j, s.R);
    const Index depth = s.depth(j);
    pack(to, layer.weight_h + j * s.R * s.L, s.R, s.L, s.L, 1, depth);
    if (j < s.X) pack(to, layer.weight_x + j * s.R * s.E, s.R, s.E, s.E, 1, depth, s.L);
    real* bias = w.forward_bias + j * s.R;
    std::fill(bias, bias + s.M, real(0));
    std::copy(layer.bias + j * MN, layer.bias + (j + 1) * MN, bias + s.M);
  }
}

// One neuron's scores [M][lanes] (overwritten) and pre-activations (in `slots`) -> its attention
// [M][B], slots [M * N][B] and output [N][B].
void activate(const Shape& s, real scale, real* scores, real* attention, real* slots,
              real* output) {
  // Elementwise, so the rows may as well be one long one, without lanes that nobody looks at.
  for (Index i = 0; i < s.M * s.N * s.B; i += V) store(slots + i, tanh(load(slots + i)));
  for (Index column = s.lanes - V; column >= 0; column -= V) {
    vec largest = load(scores + column) * scale;
    for (Index m = 1; m < s.M; ++m) {
      const vec score = load(scores + m * s.lanes + column) * scale;
      largest = score > largest ? score : largest;
    }
    vec total = {};
    for (Index m = 0; m < s.M; ++m) {
      real* score = scores + m * s.lanes + column;
      const vec weight = exp_of_negative(load(score) * scale - largest);
      store(score, weight);
      total += weight;
    }
    const vec share = 1 / total;
    for (Index m = 0; m < s.M; ++m) {
      const vec weight = load(scores + m * s.lanes + column) * share;
      store(scores + m * s.lanes + column, weight);
      store(attention + m * s.B + column, weight);
    }
    for (Index n = 0; n < s.N; ++n) {
      vec sum = {};
      for (Index m = 0; m < s.M; ++m)
        sum += load(scores + m * s.lanes + column) * load(slots + (m * s.N + n) * s.B + column);
      store(output + n * s.B + column, sum);
    }
  }
}

// Step t of all neurons, from the states before it and the inputs in w.external.
void step_forward(const Layer& layer, const Shape& s, Workspace& w, Index t) {
  const bool keep = w.steps_kept == s.T;  // otherwise states alternate between two places
  const real* before = w.states + (keep ? t : t % 2) * s.state_step();
  real* after = w.states + (keep ? t + 1 : (t + 1) % 2) * s.state_step();
  Rows read(s.L + s.E);
  std::vector<real*> rows(s.R);
  for (Index e = 0; e < s.E; ++e) read[s.L + e] = w.external + e * s.lanes;
  for (Index m = 0; m < s.M; ++m) rows[m] = w.scores + m * s.lanes;
  for (Index j = 0; j < s.W; ++j) {
    const Index at = (keep ? t : 0) * s.W + j;
    real* slots = w.slots + at * s.M * s.N * s.B;
    for (Index i = 0; i < s.M * s.N; ++i) rows[s.M + i] = slots + i * s.B;
    for (Index p = 0; p < s.P; ++p)
      for (Index n = 0; n < s.N; ++n)
        read[p * s.N + n] = before + (layer.parent[j * s.P + p] * s.N + n) * s.B;
    multiply(s.R, s.depth(j), w.forward_weights + s.packed(j, s.R), read.data(), s.B, rows.data(),
             w.forward_bias + j * s.R);
    activate(s, real(layer.scale), w.scores, w.attention + at * s.M * s.B, slots,
             after + j * s.N * s.B);
  }
}

// h_0 [B][W * N] (null: zeros) becomes the state before step 0.
void start_forward(const Layer& layer, const Shape& s, Workspace& w, const real* h_0) {
  const Index WN = s.W * s.N;
  pack_forward(layer, s, w);
  std::fill(w.states, w.states + s.state_step(), real(0));
  if (h_0)
    transpose<false>(w.states, s.B, h_0, WN, s.B, WN);
}

// to[b][r] = states after step t.
void write_states(const Shape& s, const Workspace& w, Index t, real* to) {
  const Index WN = s.W * s.N;
  const real* after = w.states + (w.steps_kept == s.T ? t + 1 : (t + 1) % 2) * s.state_step();
  transpose<false>(to, WN, after, s.B, WN, s.B);
}

// -------------------------------------------------------------------------------------- acting

// Memory of the parts of a policy around the layer.
struct PolicyWorkspace {
  real *weights_1, *weights_2, *actor;            // packed
  real *observations, *features, *zeros, *products;  // [F], [D], 2 A S rows of [lanes]
  Index total;

  PolicyWorkspace(const Policy& p, const Shape& s, real* block) {
    Cutter take(block);
    weights_1 = take(p.features * p.observation);
    weights_2 = take(s.E * p.features);
    actor = take(2 * p.actions * p.slots * s.W * s.N);
    observations = take(p.observation * s.lanes);
    features = take(p.features * s.lanes);
    zeros = take(2 * p.actions * p.slots);
    products = take(2 * p.actions * p.slots * s.lanes);
    total = take.total();
  }
};

// Rows of a matrix [count][length] one after the other.
void list_rows(std::vector<real*>& rows, real* first, Index count, Index length) {
  rows.resize(count);
  for (Index r = 0; r < count; ++r) rows[r] = first + r * length;
}

// Linear, layer norm, linear, leaky ReLU: observations [B][F] -> w.external [E][lanes].
void encode(const Policy& p, const Shape& s, const Workspace& w, PolicyWorkspace& q,
            const real* observations) {
  std::vector<real*> rows, features, out;
  list_rows(rows, q.observations, p.observation, s.lanes);
  list_rows(features, q.features, p.features, s.lanes);
  list_rows(out, w.external, s.E, s.lanes);
  transpose<true>(q.observations, s.lanes, observations, p.observation, s.B, p.observation);
  multiply(p.features, p.observation, q.weights_1, rows.data(), s.B, features.data(), p.bias_1);
  for (Index b = 0; b < s.B; b += V) {
    vec mean = {}, variance = {};
    for (const real* feature : features) mean += load(feature + b);
    mean /= real(p.features);
    for (const real* feature : features) {
      const vec difference = load(feature + b) - mean;
      variance += difference * difference;
    }
    const vec scale = 1 / square_root(variance / real(p.features) + real(1e-5));
    for (real* feature : features) store(feature + b, (load(feature + b) - mean) * scale);
  }
  multiply(s.E, p.features, q.weights_2, features.data(), s.B, out.data(), p.bias_2);
  for (real* row : out)
    for (Index b = 0; b < s.B; b += V) {
      const vec value = load(row + b);
      store(row + b, value < 0 ? value * real(0.01) : value);
    }
}

// Logits [B][A] from the states after step t.
void choose(const Policy& p, const Shape& s, const Workspace& w, PolicyWorkspace& q, Index t,
            real* logits) {
  const Index WN = s.W * s.N, AS = p.actions * p.slots;
  std::vector<real*> states, products;
  list_rows(states, w.states + (w.steps_kept == s.T ? t + 1 : (t + 1) % 2) * s.state_step(), WN,
            s.B);
  list_rows(products, q.products, 2 * AS, s.lanes);
  multiply(2 * AS, WN, q.actor, states.data(), s.B, products.data(), q.zeros);
  for (Index a = 0; a < p.actions; ++a)
    for (Index b = 0; b < s.B; b += V) {
      const real* scores = q.products + a * p.slots * s.lanes + b;
      const real* values = scores + AS * s.lanes;
      vec largest = load(scores), total = {}, sum = {};
      for (Index m = 1; m < p.slots; ++m) {
        const vec score = load(scores + m * s.lanes);
        largest = score > largest ? score : largest;
      }
      for (Index m = 0; m < p.slots; ++m) {
        const vec weight = exp_of_negative(load(scores + m * s.lanes) - largest);
        total += weight;
        sum += weight * (load(values + m * s.lanes) + p.actor_bias[a * p.slots + m]);
      }
      const vec logit = sum / total;
      for (Index lane = 0; lane < std::min<Index>(V, s.B - b); ++lane)
        logits[(b + lane) * p.actions + a] = logit[lane];
    }
}

// ------------------------------------------------------------------------------------ backward

// Gradients of a neuron's scores (before their scale) and pre-activations, rows [R][out_length],
// from that of its output, for the vector of samples at `column`. All arguments are rows of
// `length` (feedback: of feedback_length).
inline void row_gradients(const Shape& s, real scale, real* out, Index out_length,
                          const real* feedback, Index feedback_length, const real* attention,
                          const real* slots, Index length, const real* const* output,
                          Index column) {
  vec mean = {};  // sum_k a_k v_k = <g, output>
  for (Index n = 0; n < s.N; ++n)
    mean += load(feedback + n * feedback_length + column) * load(output[n] + column);
  for (Index m = 0; m < s.M; ++m) {
    const vec weight = load(attention + m * length + column);
    vec value = {};  // v_m = <g, y_m>
    for (Index n = 0; n < s.N; ++n) {
      const vec slot = load(slots + (m * s.N + n) * length + column);
      const vec gradient = load(feedback + n * feedback_length + column);
      value += gradient * slot;
      store(out + (s.M + m * s.N + n) * out_length + column,
            weight * gradient * (1 - slot * slot));
    }
    store(out + m * out_length + column, scale * weight * (value - mean));
  }
}

inline vec at_least(vec x, real least) { return x < least ? splat(least) : x; }

// Where the prediction is mixed in: the factor of max(<g, s>, 0) s / |s|^2 on s (else 1).
inline vec substitute_factor(const Shape& s, bool projects, const real* gradient,
                             Index gradient_length, const real* prediction,
                             Index prediction_length, Index column) {
  if (!projects) return splat(1);
  vec along = {}, square = {};
  for (Index n = 0; n < s.N; ++n) {
    const vec guess = load(prediction + n * prediction_length + column);
    along += load(gradient + n * gradient_length + column) * guess;
    square += guess * guess;
  }
  return at_least(along, 0) / at_least(square, real(1e-12));
}

// Lambda at every step [T][W], see `temporal_schedule` in mixing.py.
void make_schedule(const Layer& layer, const Shape& s, const Mixing& mixing, real* schedule) {
  const real beta = real(mixing.schedule_beta);
  std::vector<real> edges(s.W), total(s.W);
  for (Index i = 0; i < s.W * s.P; ++i) edges[layer.parent[i]] += 1;
  for (Index t = s.T - 1; t >= 0; --t) {
    real* now = schedule + t * s.W;
    if (t == s.T - 1 || beta == 0) {
      std::copy(mixing.mixing_weight, mixing.mixing_weight + s.W, now);
      continue;
    }
    const real* later = now + s.W;
    std::fill(total.begin(), total.end(), real(0));
    for (Index j = 0; j < s.W; ++j)
      for (Index p = 0; p < s.P; ++p) total[layer.parent[j * s.P + p]] += 1 - later[j];
    for (Index j = 0; j < s.W; ++j) {
      const real raised = later[j] + beta * total[j] / std::max(edges[j], real(1));
      now[j] = raised > 1 ? real(1) : raised;
    }
  }
}

// What the products over all samples read, by neuron.
void arrange_samples(const Shape& s, Workspace& w, const real* x,
                     const std::uint8_t* mask) {
  const Index K = s.T * s.B;
  gather_steps(w.states_by_neuron, w.states_row, w.states, s.state_step(), s.W * s.N, s.T + 1,
               s.B);
  for (Index j = 0; j < s.W; ++j)
    for (Index k = 0; k < K; k += V) {
      vec square = {};
      for (Index n = 0; n < s.N; ++n) {
        const vec state = load(w.states_by_neuron + (j * s.N + n) * w.states_row + k);
        square += state * state;
      }
      store(w.state_squares + j * w.row + k, square);
      store(w.state_squares + j * w.row + K, vec{});
    }
  std::fill(w.input_squares, w.input_squares + w.row, real(0));
  if (s.X) {
    transpose<true>(w.inputs_by_neuron, w.row, x, s.E, K, s.E);
    for (Index e = 0; e < s.E; ++e) {
      store(w.inputs_by_neuron + e * w.row + vectors(K) * V, vec{});
      for (Index k = 0; k < K; k += V) {
        const vec input = load(w.inputs_by_neuron + e * w.row + k);
        store(w.input_squares + k, load(w.input_squares + k) + input * input);
      }
    }
    std::fill(w.inputs_gradient, w.inputs_gradient + s.E * w.row, real(0));
  }
  std::fill(w.ones, w.ones + w.row, real(1));
  std::fill(w.valid, w.valid + w.row, real(0));
  for (Index k = 0; k < K; ++k) w.valid[k] = !mask || mask[k];
}

// The rows that neuron j reads, by neuron: its parents' states before, its external inputs.
void list_inputs(const Layer& layer, const Shape& s, const Workspace& w, Index j, Rows& rows) {
  rows.clear();
  for (Index p = 0; p < s.P; ++p)
    for (Index n = 0; n < s.N; ++n)
      rows.push_back(w.states_by_neuron + (layer.parent[j * s.P + p] * s.N + n) * w.states_row);
  if (j < s.X)
    for (Index e = 0; e < s.E; ++e) rows.push_back(w.inputs_by_neuron + e * w.row);
}

// Steps [first, first + steps) of a chunk.
struct Chunk {
  Index first, steps, offset, samples;
};

template <class F>
void for_chunks(const Shape& s, const Workspace& w, F f) {
  for (Index first = 0; first < s.T; first += w.chunk) {
    const Index steps = std::min(w.chunk, s.T - first);
    f(Chunk{first, steps, first * s.B, steps * s.B});
  }
}

// Predictions s of every neuron at every step, into w.predicted.
void predict(const Layer& layer, const Shape& s, Workspace& w) {
  const Index MN = s.M * s.N;
  Rows inputs, shifted;
  std::vector<real*> guesses(MN);
  for (Index i = 0; i < MN; ++i) guesses[i] = w.panel_guesses + i * w.panel;
  for (Index j = 0; j < s.W; ++j) {
    const Index depth = s.depth(j);
    real* packed = w.predictor_weights + s.packed(j, MN);
    pack(packed, layer.predictor_h + j * MN * s.L, MN, s.L, s.L, 1, depth);
    if (j < s.X) pack(packed, layer.predictor_x + j * MN * s.E, MN, s.E, s.E, 1, depth, s.L);
    list_inputs(layer, s, w, j, inputs);
    for_chunks(s, w, [&](Chunk c) {
      shifted = inputs;
      for (const real*& row : shifted) row += c.offset;
      multiply(MN, depth, packed, shifted.data(), c.samples, guesses.data(),
               layer.predictor_bias + j * MN);
      gather_steps(w.panel_attention, w.panel, w.attention + (c.first * s.W + j) * s.M * s.B,
                   s.W * s.M * s.B, s.M, c.steps, s.B);
      for (Index k = 0; k < c.samples; k += V)
        for (Index n = 0; n < s.N; ++n) {
          vec sum = {};
          for (Index m = 0; m < s.M; ++m)
            sum += load(w.panel_attention + m * w.panel + k) * load(guesses[m * s.N + n] + k);
          store(w.panel_prediction + n * w.panel + k, sum);
        }
      for (Index t = 0; t < c.steps; ++t)
        for (Index n = 0; n < s.N; ++n) {
          real* to = w.predicted + (c.first + t) * s.state_step() + (j * s.N + n) * s.B;
          for (Index b = 0; b < s.B; b += V)
            store(to + b, load(w.panel_prediction + n * w.panel + t * s.B + b));
        }
    });
  }
}

// Back through time: the gradient received at every state, into w.received, and that of h_0.
void carry_back(const Layer& layer, const Shape& s, Workspace& w, const Mixing* mixing,
                const std::uint8_t* mask, const real* grad_output, real* grad_h0) {
  const Index WN = s.W * s.N;
  for (Index j = 0; j < s.W; ++j)
    pack(w.backward_weights + j * s.R * s.L, layer.weight_h + j * s.R * s.L, s.L, s.R, 1, s.L);
  Rows rows(s.R), output(s.N);
  std::vector<real*> to(s.L);
  std::vector<real> mixed(s.N * s.lanes), valid(s.lanes);
  for (Index r = 0; r < s.R; ++r) rows[r] = w.step_rows + r * s.lanes;
  real *now = w.carried[0], *before = w.carried[1];
  transpose<true>(now, s.lanes, grad_output + (s.T - 1) * s.B * WN, WN, s.B, WN);
  for (Index t = s.T - 1; t >= 0; --t, std::swap(now, before)) {
    if (t)
      transpose<true>(before, s.lanes, grad_output + (t - 1) * s.B * WN, WN, s.B, WN);
    else
      std::fill(before, before + WN * s.lanes, real(0));
    for (Index b = 0; b < s.B; ++b) valid[b] = !mask || mask[t * s.B + b];
    for (Index j = 0; j < s.W; ++j) {
      real* gradient = now + j * s.N * s.lanes;
      real* received = w.received + t * s.state_step() + j * s.N * s.B;
      for (Index n = 0; n < s.N; ++n)
        for (Index b = 0; b < s.B; b += V)
          store(received + n * s.B + b, load(gradient + n * s.lanes + b));
      const real* feedback = gradient;
      if (mixing) {
        const real* guess = w.predicted + t * s.state_step() + j * s.N * s.B;
        for (Index b = 0; b < s.B; b += V) {
          vec weight = splat(w.schedule[t * s.W + j]);
          if (mixing->mask_predictions) weight = load(&valid[b]) > 0 ? weight : splat(1);
          const vec share = (1 - weight) * substitute_factor(s, mixing->positive_projection,
                                                             gradient, s.lanes, guess, s.B, b);
          for (Index n = 0; n < s.N; ++n)
            store(&mixed[n * s.lanes + b], weight * load(gradient + n * s.lanes + b) +
                                               share * load(guess + n * s.B + b));
        }
        feedback = mixed.data();
      }
      for (Index n = 0; n < s.N; ++n)
        output[n] = w.states + (t + 1) * s.state_step() + (j * s.N + n) * s.B;
      for (Index b = 0; b < s.B; b += V)
        row_gradients(s, real(layer.scale), w.step_rows, s.lanes, feedback, s.lanes,
                      w.attention + (t * s.W + j) * s.M * s.B,
                      w.slots + (t * s.W + j) * s.M * s.N * s.B, s.B, output.data(), b);
      for (Index p = 0; p < s.P; ++p)
        for (Index n = 0; n < s.N; ++n)
          to[p * s.N + n] = before + (layer.parent[j * s.P + p] * s.N + n) * s.lanes;
      multiply(s.L, s.R, w.backward_weights + j * s.R * s.L, rows.data(), s.B, to.data(),
             nullptr);
    }
  }
  if (grad_h0) transpose<false>(grad_h0, WN, now, s.lanes, WN, s.B);
}

// Gradients of the parameters; statistics are means, moments sums over all valid samples.
struct Gradients {
  real *weight_h, *weight_x, *bias, *predictor_h, *predictor_x, *predictor_bias;
  double statistics[4];  // predictor_loss, true_grad_norm, mixed_grad_norm, prediction_norm
  double* moments;       // [4][W]: sum |u|^2, sum <w, u>, |sum u|^2, <sum w, sum u>
};

inline vec length_of(const Shape& s, const real* vectors, Index length, Index column) {
  vec square = {};
  for (Index n = 0; n < s.N; ++n) {
    const vec value = load(vectors + n * length + column);
    square += value * value;
  }
  return square_root(square);
}

// Everything that is a sum over all samples, once the received gradients are known: neuron by
// neuron, chunk by chunk, all row gradients of a neuron stacked so that one product serves all.
void sum_samples(const Layer& layer, const Shape& s, Workspace& w, const Mixing* mixing,
                 bool needs_x, Gradients& out) {
  const Index MN = s.M * s.N, K = s.T * s.B;
  const bool moments = mixing && mixing->moments;
  // Stacked rows: [R] policy, then with moments [R] of w and [R] of u = s - w, then [M N] predictor.
  const Index row_w = s.R, row_u = 2 * s.R, row_predictor = moments ? 3 * s.R : s.R;
  const Index num_rows = row_predictor + (mixing ? MN : 0);
  const real scale = real(layer.scale);
  double num_valid = 0;
  for (Index k = 0; k < K; ++k) num_valid += w.valid[k];
  num_valid = std::max(num_valid, 1.0);
  const double terms = num_valid * s.W * s.N;
  const real per_term = real(2 / terms);
  vec residual_square = {}, true_length = {}, mixed_length = {}, guess_length = {};
  double totals[4] = {};

  Rows inputs, output(s.N);
  std::vector<real*> inputs_gradient(s.E);
  Rows rows(s.R);
  std::vector<real> panel_w(s.N * w.panel), panel_u(s.N * w.panel), panel_mixed(s.N * w.panel);
  for (Index j = 0; j < s.W; ++j) {
    list_inputs(layer, s, w, j, inputs);
    inputs.push_back(w.ones);
    const Index depth = s.depth(j), columns = depth + 1;
    std::fill(w.sums, w.sums + num_rows * columns, real(0));
    vec u_square = {}, wu = {};
    for_chunks(s, w, [&](Chunk c) {
      const Index at = c.first * s.W + j, states_at = c.first * s.state_step() + j * s.N * s.B;
      gather_steps(w.panel_attention, w.panel, w.attention + at * s.M * s.B, s.W * s.M * s.B, s.M,
                   c.steps, s.B);
      gather_steps(w.panel_slots, w.panel, w.slots + at * MN * s.B, s.W * MN * s.B, MN, c.steps,
                   s.B);
      gather_steps(w.panel_gradient, w.panel, w.received + states_at, s.state_step(), s.N, c.steps,
                   s.B);
      for (Index n = 0; n < s.N; ++n)
        output[n] = w.states_by_neuron + (j * s.N + n) * w.states_row + c.offset + s.B;
      const auto rows_of = [&](const real* panel, Index first_row, Index k) {
        row_gradients(s, scale, w.panel_rows + first_row * w.panel, w.panel, panel, w.panel,
                      w.panel_attention, w.panel_slots, w.panel, output.data(), k);
      };
      if (!mixing) {
        for (Index k = 0; k < c.samples; k += V) rows_of(w.panel_gradient, 0, k);
      } else {
        gather_steps(w.panel_prediction, w.panel, w.predicted + states_at, s.state_step(), s.N,
                     c.steps, s.B);
        for (Index t = 0; t < c.steps; ++t)
          for (Index b = 0; b < s.B; b += V)
            store(w.panel_weight + t * s.B + b, splat(w.schedule[(c.first + t) * s.W + j]));
        // Lanes past the last sample count as zeros below: they must not hold NaN.
        store(w.panel_weight + c.samples, vec{});
        for (Index k = 0; k < c.samples; k += V) {
          const vec valid = load(w.valid + c.offset + k);
          vec weight = load(w.panel_weight + k);
          if (mixing->mask_predictions) weight = valid > 0 ? weight : splat(1);
          const vec factor = substitute_factor(s, mixing->positive_projection, w.panel_gradient,
                                               w.panel, w.panel_prediction, w.panel, k);
          vec gradient_square = {}, guess_square = {}, mixed_square = {}, substitute_square = {};
          for (Index n = 0; n < s.N; ++n) {
            const vec g = load(w.panel_gradient + n * w.panel + k);
            const vec p = load(w.panel_prediction + n * w.panel + k);
            const vec substitute = factor * p;
            const vec mixed = weight * g + (1 - weight) * substitute;
            store(&panel_mixed[n * w.panel + k], mixed);
            gradient_square += g * g;
            guess_square += p * p;
            mixed_square += mixed * mixed;
            substitute_square += substitute * substitute;
            // An invalid step has no target. Chosen, not multiplied: it may hold infinities.
            vec residual = p - (mixing->target_received ? g : mixed);
            residual = valid > 0 ? residual : vec{};
            residual_square += residual * residual;
            for (Index m = 0; m < s.M; ++m)
              store(w.panel_rows + (row_predictor + m * s.N + n) * w.panel + k,
                    per_term * residual * load(w.panel_attention + m * w.panel + k));
          }
          const vec gradient_length = square_root(gradient_square);
          true_length += valid > 0 ? gradient_length : vec{};
          mixed_length += valid > 0 ? square_root(mixed_square) : vec{};
          guess_length += valid > 0 ? square_root(guess_square) : vec{};
          rows_of(panel_mixed.data(), 0, k);
          if (!moments) continue;
          const vec shrink_g = 1 / at_least(gradient_length, real(1e-12));
          const vec shrink_s = 1 / at_least(square_root(substitute_square), real(1e-12));
          for (Index n = 0; n < s.N; ++n) {
            const vec g = load(w.panel_gradient + n * w.panel + k) * shrink_g;
            const vec p = factor * load(w.panel_prediction + n * w.panel + k) * shrink_s;
            store(&panel_w[n * w.panel + k], valid > 0 ? g : vec{});
            store(&panel_u[n * w.panel + k], valid > 0 ? p - g : vec{});
          }
          rows_of(panel_w.data(), row_w, k);
          rows_of(panel_u.data(), row_u, k);
          vec x_square = j < s.X ? load(w.input_squares + c.offset + k) : vec{};
          for (Index p = 0; p < s.P; ++p)
            x_square += load(w.state_squares + layer.parent[j * s.P + p] * w.row + c.offset + k);
          // (1 + |x|^2) <t, t'> + |x|^2 <dq, dq'>, the scale being in the key rows already.
          vec key_uu = {}, key_wu = {}, slot_uu = {}, slot_wu = {};
          for (Index r = 0; r < s.R; ++r) {
            const vec u = load(w.panel_rows + (row_u + r) * w.panel + k);
            const vec both = u * load(w.panel_rows + (row_w + r) * w.panel + k);
            (r < s.M ? key_uu : slot_uu) += u * u;
            (r < s.M ? key_wu : slot_wu) += both;
          }
          u_square += x_square * (key_uu + slot_uu) + slot_uu;
          wu += x_square * (key_wu + slot_wu) + slot_wu;
        }
      }
      dot(num_rows, columns, c.samples, w.panel_rows, w.panel, inputs.data(), c.offset, w.sums);
      if (j < s.X && needs_x) {
        for (Index r = 0; r < s.R; ++r) rows[r] = w.panel_rows + r * w.panel;
        for (Index e = 0; e < s.E; ++e)
          inputs_gradient[e] = w.inputs_gradient + e * w.row + c.offset;
        if (c.first == 0)
          pack(w.external_weights, layer.weight_x + j * s.R * s.E, s.E, s.R, 1, s.E);
        multiply(s.E, s.R, w.external_weights, rows.data(), c.samples, inputs_gradient.data(),
                 nullptr);
      }
    });

    const auto copy_sums = [&](Index first, Index count, Index from, Index length, real* to) {
      for (Index r = 0; r < count; ++r)
        std::copy_n(w.sums + (first + r) * columns + from, length, to + r * length);
    };
    copy_sums(0, s.R, 0, s.L, out.weight_h + j * s.R * s.L);
    if (j < s.X) copy_sums(0, s.R, s.L, s.E, out.weight_x + j * s.R * s.E);
    copy_sums(s.M, MN, depth, 1, out.bias + j * MN);
    if (!mixing) continue;
    copy_sums(row_predictor, MN, 0, s.L, out.predictor_h + j * MN * s.L);
    if (j < s.X) copy_sums(row_predictor, MN, s.L, s.E, out.predictor_x + j * MN * s.E);
    copy_sums(row_predictor, MN, depth, 1, out.predictor_bias + j * MN);
    totals[0] += sum(residual_square);
    totals[1] += sum(true_length);
    totals[2] += sum(mixed_length);
    totals[3] += sum(guess_length);
    residual_square = true_length = mixed_length = guess_length = vec{};
    if (!moments) continue;
    double square_sum_u = 0, sums_wu = 0;
    for (Index r = 0; r < s.R; ++r)
      for (Index d = 0; d < (r < s.M ? depth : columns); ++d) {  // keys have no bias
        const double u = w.sums[(row_u + r) * columns + d];
        square_sum_u += u * u;
        sums_wu += u * w.sums[(row_w + r) * columns + d];
      }
    out.moments[j] = sum(u_square);
    out.moments[s.W + j] = sum(wu);
    out.moments[2 * s.W + j] = square_sum_u;
    out.moments[3 * s.W + j] = sums_wu;
  }
  out.statistics[0] = totals[0] / terms;
  for (int i = 1; i < 4; ++i) out.statistics[i] = totals[i] / (num_valid * s.W);
}

}  // namespace

// ----------------------------------------------------------------------------------- interface

extern "C" {

// Numbers of type REAL that the block of memory must hold; `keep` for a backward pass later.
Index sgrl_workspace(const Layer* layer, Index steps, Index batch, std::int32_t keep) {
  const Shape s(*layer, steps, batch);
  return Workspace(s, keep, nullptr).total;
}

// Steps [first, stop) of an unroll of `steps`: x [stop - first][B][E] -> out [..][B][W * N]. Step 0
// starts from h_0 [B][W * N] (null: zeros); the others must follow in order, on the same block.
void sgrl_forward(const Layer* layer, Index steps, Index batch, std::int32_t keep, Index first,
                  Index stop, const real* x, const real* h_0, real* out, real* block) {
  const Shape s(*layer, steps, batch);
  Workspace w(s, keep, block);
  if (first == 0) start_forward(*layer, s, w, h_0);
  for (Index t = first; t < stop; ++t) {
    if (s.X) transpose<true>(w.external, s.lanes, x + (t - first) * s.B * s.E, s.E, s.B, s.E);
    step_forward(*layer, s, w, t);
    write_states(s, w, t, out + (t - first) * s.B * s.W * s.N);
  }
}

Index sgrl_policy_workspace(const Policy* policy, const Layer* layer, Index batch) {
  return PolicyWorkspace(*policy, Shape(*layer, 1, batch), nullptr).total;
}

// Step `t` of an unroll from the zero state, the policy's other parts with it: observations [B][F]
// -> x [B][E], states [B][W * N], logits [B][A].
void sgrl_act(const Policy* policy, const Layer* layer, Index steps, Index batch,
              std::int32_t keep, Index t, const real* observations, real* x, real* states,
              real* logits, real* block, real* policy_block) {
  const Shape s(*layer, steps, batch);
  const Policy& p = *policy;
  Workspace w(s, keep, block);
  PolicyWorkspace q(p, s, policy_block);
  if (t == 0) {
    const Index D = p.features, WN = s.W * s.N, rows = 2 * p.actions * p.slots;
    start_forward(*layer, s, w, nullptr);
    pack(q.weights_1, p.weight_1, D, p.observation, p.observation, 1);
    pack(q.weights_2, p.weight_2, s.E, D, D, 1);
    pack(q.actor, p.actor, rows, WN, WN, 1);
    std::fill(q.zeros, q.zeros + rows, real(0));
  }
  encode(p, s, w, q, observations);
  transpose<false>(x, s.E, w.external, s.lanes, s.E, s.B);
  step_forward(*layer, s, w, t);
  write_states(s, w, t, states);
  choose(p, s, w, q, t, logits);
}

// Backward of a whole unroll whose forward kept its record in `block`. x [T][B][E] as then; mask
// [T][B] or null; mixing null under backprop. grad_output [T][B][W * N] -> grad_x (or null),
// grad_h0 (or null) and `out`.
void sgrl_backward(const Layer* layer, Index steps, Index batch, const real* x,
                   const std::uint8_t* mask, const Mixing* mixing, const real* grad_output,
                   real* grad_x, real* grad_h0, Gradients* out, real* block) {
  const Shape s(*layer, steps, batch);
  Workspace w(s, true, block);
  arrange_samples(s, w, x, mask);
  if (mixing) {
    make_schedule(*layer, s, *mixing, w.schedule);
    predict(*layer, s, w);
  }
  carry_back(*layer, s, w, mixing, mask, grad_output, grad_h0);
  sum_samples(*layer, s, w, mixing, grad_x, *out);
  if (grad_x) transpose<false>(grad_x, s.E, w.inputs_gradient, w.row, s.E, steps * batch);
}

}  // extern "C"
