// What all of the compiled core is made of: vectors, products of matrices, memory.
//
// REAL is float or double. Arrays are read and written in whole vectors, past the end of a row, too;
// what lies there is computed on but never looked at.

#pragma once

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
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i)
      half[i] = lower<H>(values[i], values[i + H], Lanes{}) +
                upper<H>(values[i], values[i + H], Lanes{});
    return sum_lanes<H / 2>(half);
  }
}

// Every lane becomes the sum of all lanes that are a multiple of `apart` from it, a power of two.
template <int H, int... I>
inline vec exchange(vec a, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, a, (I ^ H)...);
}
template <int H = V / 2>
inline vec fold_lanes(vec value, Index apart) {
  if constexpr (H > 0) {
    if (H >= apart) return fold_lanes<H / 2>(value + exchange<H>(value, Lanes{}), apart);
  }
  return value;
}

// Swap rows and columns of V vectors.
template <int H = V / 2>
inline void transpose_block(vec* values) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
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

// <a, b> of two arrays.
inline double inner(const real* a, const real* b, Index count) {
  vec lanes = {};
  Index i = 0;
  for (; i + V <= count; i += V) lanes += load(a + i) * load(b + i);
  double total = sum(lanes);
  for (; i < count; ++i) total += double(a[i]) * b[i];
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

// One tile: out[r] = bias[r] + sum over d of a[r][d] * b[d], S rows, C vectors from `column` on;
// without bias it is added to what out holds. Rows of a are `step` apart, or, transposed, columns.
template <int S, int C, bool transposed>
void multiply_tile(Index depth, const real* a, Index step, const real* const* b, Index column,
                   real* const* out, const real* bias) {
  vec total[S][C];
#pragma GCC unroll 16
  for (int r = 0; r < S; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c)
      total[r][c] = bias ? splat(bias[r]) : load(out[r] + column + c * V);
  for (Index d = 0; d < depth; ++d, a += transposed ? step : 1) {
    vec row[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) row[c] = load(b[d] + column + c * V);
#pragma GCC unroll 16
    for (int r = 0; r < S; ++r) {
      const vec weight = splat(transposed ? a[r] : a[r * step]);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) total[r][c] += weight * row[c];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < S; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) store(out[r] + column + c * V, total[r][c]);
}

using MultiplyTile = void (*)(Index, const real*, Index, const real* const*, Index, real* const*,
                              const real*);

template <int C, bool transposed, int... S>
constexpr MultiplyTile choose_multiply(Index size, std::integer_sequence<int, S...>) {
  constexpr MultiplyTile table[] = {multiply_tile<S + 1, C, transposed>...};
  return table[size - 1];
}

// out[rows][columns] = bias + a[rows][depth] times b[depth][columns], or added to out if bias is
// null; `transposed`: a is [depth][rows]. The rows of a are `step` apart. b and out are lists of
// rows, whole vectors of which are read and written: the last columns first, since only they spill
// into the next row.
template <bool transposed = false>
void multiply(Index rows, Index depth, const real* a, Index step, const real* const* b,
              Index columns, real* const* out, const real* bias) {
  constexpr auto sizes = std::make_integer_sequence<int, tile_rows>{};
  for (Index stop = vectors(columns), first; stop > 0; stop = first) {
    first = stop % 2 ? stop - 1 : stop - 2;
    for_tiles(rows, tile_rows, [&](Index row, Index size) {
      const MultiplyTile tile = first + 2 == stop ? choose_multiply<2, transposed>(size, sizes)
                                                  : choose_multiply<1, transposed>(size, sizes);
      tile(depth, a + row * (transposed ? 1 : step), step, b, first * V, out + row,
           bias ? bias + row : nullptr);
    });
  }
}

// The same of a matrix whose rows follow each other.
template <bool transposed = false>
void multiply(Index rows, Index depth, const real* a, const real* const* b, Index columns,
              real* const* out, const real* bias) {
  multiply<transposed>(rows, depth, a, transposed ? rows : depth, b, columns, out, bias);
}

// One tile: out[r][c] += sum over samples of a[r] * b[c].
template <int S, int C>
void dot_tile(Index count, const real* a, Index a_length, const real* const* rows, real* out,
              Index out_length) {
  vec total[(S * C + V - 1) / V * V] = {};
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

using DotTile = void (*)(Index, const real*, Index, const real* const*, real*, Index);

template <int... I>
constexpr DotTile choose_dot(Index rows, Index columns, std::integer_sequence<int, I...>) {
  constexpr DotTile table[] = {dot_tile<I / dot_columns + 1, I % dot_columns + 1>...};
  return table[(rows - 1) * dot_columns + columns - 1];
}

// out[rows][columns] += a[rows][samples] times the transpose of b, a list of `columns` rows. Past
// the last sample a must hold zeros up to a whole vector, and b finite numbers.
void dot(Index rows, Index columns, Index samples, const real* a, Index a_length,
         const real* const* b, real* out) {
  constexpr auto shapes = std::make_integer_sequence<int, dot_rows * dot_columns>{};
  for_tiles(rows, dot_rows, [&](Index row, Index row_count) {
    for_tiles(columns, dot_columns, [&](Index column, Index column_count) {
      choose_dot(row_count, column_count, shapes)(vectors(samples), a + row * a_length, a_length,
                                                  b + column, out + row * columns + column,
                                                  columns);
    });
  });
}

// One tile: out[r][c] = sum over vectors of a[r] * b[c], added to what out holds if `add`.
template <int S, int C>
void lanes_tile(Index count, const real* a, Index a_length, const real* const* rows, real* out,
                Index out_length, bool add) {
  vec total[S][C];
#pragma GCC unroll 6
  for (int r = 0; r < S; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      total[r][c] = add ? load(out + (r * out_length + c) * V) : vec{};
  for (Index k = 0; k < count * V; k += V) {
    vec column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = load(rows[c] + k);
#pragma GCC unroll 6
    for (int r = 0; r < S; ++r) {
      const vec row = load(a + r * a_length + k);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] += row * column[c];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < S; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + (r * out_length + c) * V, total[r][c]);
}

using LanesTile = void (*)(Index, const real*, Index, const real* const*, real*, Index, bool);

template <int... I>
constexpr LanesTile choose_lanes(Index rows, Index columns, std::integer_sequence<int, I...>) {
  constexpr LanesTile table[] = {lanes_tile<I / dot_columns + 1, I % dot_columns + 1>...};
  return table[(rows - 1) * dot_columns + columns - 1];
}

// As `dot`, but without the sum over lanes: out is [rows][columns] vectors.
void dot_lanes(Index rows, Index columns, Index samples, const real* a, Index a_length,
               const real* const* b, real* out, bool add) {
  constexpr auto shapes = std::make_integer_sequence<int, dot_rows * dot_columns>{};
  for_tiles(rows, dot_rows, [&](Index row, Index row_count) {
    for_tiles(columns, dot_columns, [&](Index column, Index column_count) {
      choose_lanes(row_count, column_count, shapes)(vectors(samples), a + row * a_length, a_length,
                                                    b + column,
                                                    out + (row * columns + column) * V, columns,
                                                    add);
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
  for (Index next = 0; next < columns; next += V) {
    // The last block overlaps the one before, so that whole vectors can be read.
    const Index c = columns < V ? 0 : std::min(next, columns - V);
    const Index width = std::min<Index>(V, columns);
    for (Index r = 0; r < rows; r += V) {
      const Index height = std::min<Index>(V, rows - r);
      const real* row = from + r * from_length + c;
      if (width == V) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) block[i] = i < height ? load(row + i * from_length) : vec{};
      } else {
        for (Index i = 0; i < V; ++i) {
          block[i] = vec{};
          if (i < height) std::memcpy(&block[i], row + i * from_length, width * sizeof(real));
        }
      }
      transpose_block(block);
      real* to_row = to + c * to_length + r;
      if (width == V && (pad || height == V)) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) store(to_row + i * to_length, block[i]);
      } else {
        for (Index i = 0; i < width; ++i) {
          if (pad || height == V)
            store(to_row + i * to_length, block[i]);
          else
            std::memcpy(to_row + i * to_length, &block[i], height * sizeof(real));
        }
      }
    }
  }
}

// -------------------------------------------------------------------------------------- memory

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

// Rows of a matrix [count][length] one after the other.
void list_rows(std::vector<real*>& rows, real* first, Index count, Index length) {
  rows.resize(count);
  for (Index r = 0; r < count; ++r) rows[r] = first + r * length;
}

}  // namespace
