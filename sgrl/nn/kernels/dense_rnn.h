// GRU and LSTM over time, forward and backward.
//
// What they compute is defined by torch.nn.GRU and torch.nn.LSTM of one layer; native_rnn.py hands
// over torch's memory. Part of slot_neurons.cpp, whose rules hold here.
//
// Letters: H units, E inputs, T steps of B sequences, K samples = T * B.
//
// Layout. The units are the innermost axis, as in torch, but a row is padded to whole vectors: Hp
// numbers, of which those past H are zeros. So is every matrix. A product's weights are then vectors
// of units, and one tile of it does for several sequences. Weights are laid out anew for that, once
// for all steps.
//
// A step's gates are four blocks [Hp] of one row. What the input adds to them and what the state
// before does overlap in all four blocks of an LSTM (input, forget, cell, output), in two of a GRU
// (new from the input, reset, update, new from the state): there the others stay apart.

#pragma once

#include "vectors.h"

extern "C" {

// A layer's parameters as torch has them: weights [3 H or 4 H][E] and [..][H], biases [..].
struct Cells {
  Index units, inputs;
  std::int32_t lstm;
  const real *weight_ih, *weight_hh, *bias_ih, *bias_hh;
};

struct CellGradients {
  real *weight_ih, *weight_hh, *bias_ih, *bias_hh;
};

}  // extern "C"

namespace {

Index padded(Index count) { return vectors(count) * V; }

struct CellShape {
  Index H, E, T, B, Hp, Ep;
  bool lstm;
  // Blocks that the input and the state add to: how many, and for the state the first; torch's
  // blocks in their order.
  Index blocks, first_of_state, input_order[4];
  Index row;  // of gates, no multiple of 4096 bytes

  CellShape(const Cells& c, Index steps, Index batch)
      : H(c.units), E(c.inputs), T(steps), B(batch), Hp(padded(c.units)), Ep(padded(c.inputs)),
        lstm(c.lstm), blocks(lstm ? 4 : 3), first_of_state(lstm ? 0 : 1),
        input_order{lstm ? 0 : 2, lstm ? 1 : 0, lstm ? 2 : 1, 3}, row(4 * Hp + V) {}
};

// Samples whose products are summed up in the registers at a time: packed, they fit the first cache.
constexpr Index depth_at_once = single ? 256 : 128;
// Rows of gates that are multiplied at a time.
constexpr Index rows_at_once = 10 * tile_rows;

// Memory of `add_outer` for results of so many columns.
struct Panels {
  real *left, *right;
  Panels(Cutter& take, Index columns)
      : left(take(depth_at_once * tile_rows)), right(take(depth_at_once * (columns + V))) {}
  Panels() = default;
};

struct CellWorkspace {
  real *weight_x, *weight_h, *bias;      // [E][blocks * Hp], [H][blocks * Hp], [4 * Hp]
  real *states, *cells;                  // [T + 1][B][Hp]; of an LSTM
  real *gates;                           // [T][B][row], after their activations
  // Backward only.
  real *back_x, *back_h;                 // [blocks * Hp][Ep], [..][Hp]: the weights as they are
  real *gradients;                       // [T][B][row], of the gates before their activations
  real *carried_h[2], *carried_c;        // [B][Hp]
  real *inputs, *grad_inputs;            // [K][Ep]
  real *sums, *bias_sums;                // [blocks * Hp][max(Hp, Ep)], [row]
  Panels panels;
  bool keep;
  Index total;

  CellWorkspace(const CellShape& s, bool keep, real* block) : keep(keep) {
    Cutter take(block);
    const Index X = s.blocks * s.Hp, K = s.T * s.B, places = keep ? s.T + 1 : 2;
    weight_x = take(s.E * X);
    weight_h = take(s.H * X);
    bias = take(4 * s.Hp);
    states = take(places * s.B * s.Hp);
    cells = take(s.lstm ? places * s.B * s.Hp : 0);
    gates = take((keep ? K : s.B) * s.row);
    if (keep) {
      back_x = take(X * s.Ep);
      back_h = take(X * s.Hp);
      gradients = take(K * s.row);
      carried_h[0] = take(s.B * s.Hp);
      carried_h[1] = take(s.B * s.Hp);
      carried_c = take(s.B * s.Hp);
      inputs = take(K * s.Ep);
      grad_inputs = take(rows_at_once * s.Ep);
      sums = take(X * std::max(s.Hp, s.Ep));
      bias_sums = take(s.row);
      panels = Panels(take, std::max(s.Hp, s.Ep));
    }
    total = take.total();
  }

  real* state(const CellShape& s, Index t) const { return place(states, s, t); }
  real* cell(const CellShape& s, Index t) const { return place(cells, s, t); }
  real* gate(const CellShape& s, Index t) const { return gates + (keep ? t * s.B * s.row : 0); }

 private:
  // Before step t; without a record the steps alternate between two places.
  real* place(real* all, const CellShape& s, Index t) const {
    return all + (keep ? t : t % 2) * s.B * s.Hp;
  }
};

// ------------------------------------------------------------------------------------ products

Rows list_weights(const real* first, Index count, Index length) {
  Rows rows(count);
  for (Index r = 0; r < count; ++r) rows[r] = first + r * length;
  return rows;
}

// out[rows][columns] += a[rows][depth] times b; rows of a and out are so far apart.
void add_product(Index rows, Index depth, const real* a, Index a_step, const Rows& b,
                 Index columns, real* out, Index out_step) {
  std::vector<real*> to;
  list_rows(to, out, rows, out_step);
  multiply(rows, depth, a, a_step, b.data(), columns, to.data(), nullptr);
}

// out[rows][columns] += the sum over samples of a[sample][row] b[sample][column]. Rows of b and out
// are `columns` long, a whole number of vectors; those of a are `a_step` apart. Pieces of a and b
// are laid out as the registers take them, so that nothing is read twice from far away.
void add_outer(Index samples, Index rows, const real* a, Index a_step, Index columns,
               const real* b, real* out, const Panels& panels) {
  constexpr auto sizes = std::make_integer_sequence<int, tile_rows>{};
  constexpr Index width = 2 * V;
  const Index count = (columns + width - 1) / width;
  Rows right(count * depth_at_once);
  std::vector<real*> to(tile_rows);
  for (Index first = 0; first < samples; first += depth_at_once) {
    const Index depth = std::min(depth_at_once, samples - first);
    real* next = panels.right;
    for (Index p = 0; p < count; ++p) {
      const Index wide = std::min(width, columns - p * width);
      for (Index k = 0; k < depth; ++k, next += wide) {
        right[p * depth_at_once + k] = next;
        for (Index c = 0; c < wide; c += V)
          store(next + c, load(b + (first + k) * columns + p * width + c));
      }
    }
    for_tiles(rows, tile_rows, [&](Index row, Index size) {
      for (Index k = 0; k < depth; ++k)
        std::copy_n(a + (first + k) * a_step + row, size, panels.left + k * size);
      for (Index p = 0; p < count; ++p) {
        const bool full = columns - p * width >= width;
        for (Index r = 0; r < size; ++r) to[r] = out + (row + r) * columns + p * width;
        (full ? choose_multiply<2, true>(size, sizes) : choose_multiply<1, true>(size, sizes))(
            depth, panels.left, size, right.data() + p * depth_at_once, 0, to.data(), nullptr);
      }
    });
  }
}

// A matrix [rows][columns], or one row, to or from rows that are padded with zeros.
void pad_rows(real* to, Index to_length, const real* from, Index rows, Index columns) {
  for (Index r = 0; r < rows; ++r) {
    std::copy_n(from + r * columns, columns, to + r * to_length);
    std::fill(to + r * to_length + columns, to + (r + 1) * to_length, real(0));
  }
}
void unpad_rows(real* to, const real* from, Index from_length, Index rows, Index columns) {
  for (Index r = 0; r < rows; ++r) std::copy_n(from + r * from_length, columns, to + r * columns);
}

// ------------------------------------------------------------------------------------- forward

inline vec sigmoid(vec x) { return tanh(x * real(0.5)) * real(0.5) + real(0.5); }

// Lays out the weights, and the state before step 0 (null: zeros).
void start_cells(const Cells& c, const CellShape& s, CellWorkspace& w, const real* h_0,
                 const real* c_0) {
  const Index X = s.blocks * s.Hp;
  std::fill(w.bias, w.bias + 4 * s.Hp, real(0));
  for (Index j = 0; j < s.blocks; ++j) {
    const Index from = s.input_order[j] * s.H, state_block = (s.first_of_state + j) * s.Hp;
    transpose<true>(w.weight_x + j * s.Hp, X, c.weight_ih + from * s.E, s.E, s.H, s.E);
    transpose<true>(w.weight_h + j * s.Hp, X, c.weight_hh + j * s.H * s.H, s.H, s.H, s.H);
    for (Index u = 0; u < s.H; ++u) {
      w.bias[j * s.Hp + u] += c.bias_ih[from + u];
      w.bias[state_block + u] += c.bias_hh[j * s.H + u];
    }
  }
  std::fill(w.states, w.states + s.B * s.Hp, real(0));
  if (h_0) pad_rows(w.states, s.Hp, h_0, s.B, s.H);
  if (!s.lstm) return;
  std::fill(w.cells, w.cells + s.B * s.Hp, real(0));
  if (c_0) pad_rows(w.cells, s.Hp, c_0, s.B, s.H);
}

// Step t, from inputs x whose rows are `x_step` apart.
void step_cells(const CellShape& s, CellWorkspace& w, const Rows& weight_x, const Rows& weight_h,
                Index t, const real* x, Index x_step) {
  const Index X = s.blocks * s.Hp, Hp = s.Hp;
  const real* before = w.state(s, t);
  real *after = w.state(s, t + 1), *gates = w.gate(s, t);
  for (Index b = 0; b < s.B; ++b) std::copy_n(w.bias, 4 * Hp, gates + b * s.row);
  add_product(s.B, s.E, x, x_step, weight_x, X, gates, s.row);
  add_product(s.B, s.H, before, Hp, weight_h, X, gates + s.first_of_state * Hp, s.row);
  for (Index b = 0; b < s.B; ++b) {
    real* gate = gates + b * s.row;
    for (Index u = 0; u < Hp; u += V) {
      const Index i = b * Hp + u;
      real *first = gate + u, *second = first + Hp, *third = second + Hp, *fourth = third + Hp;
      if (s.lstm) {
        const vec in = sigmoid(load(first)), forget = sigmoid(load(second));
        const vec value = tanh(load(third)), out = sigmoid(load(fourth));
        const vec cell = forget * load(w.cell(s, t) + i) + in * value;
        store(first, in);
        store(second, forget);
        store(third, value);
        store(fourth, out);
        store(w.cell(s, t + 1) + i, cell);
        store(after + i, out * tanh(cell));
      } else {
        const vec reset = sigmoid(load(second)), update = sigmoid(load(third));
        const vec value = tanh(load(first) + reset * load(fourth));
        store(first, value);
        store(second, reset);
        store(third, update);
        store(after + i, value + update * (load(before + i) - value));
      }
    }
  }
}

// ------------------------------------------------------------------------------------ backward

// Gradients of step t's gates, from that of the state behind it, `now`; `past` becomes what goes
// straight on to the state before. w.carried_c turns from that of the cell behind to the one before.
void gates_backward(const CellShape& s, CellWorkspace& w, Index t, const real* now, real* past) {
  const Index Hp = s.Hp;
  for (Index b = 0; b < s.B; ++b) {
    const real* gate = w.gate(s, t) + b * s.row;
    real* gradient = w.gradients + (t * s.B + b) * s.row;
    for (Index u = 0; u < Hp; u += V) {
      const Index i = b * Hp + u;
      const vec a_1 = load(gate + u), a_2 = load(gate + Hp + u);
      const vec a_3 = load(gate + 2 * Hp + u), a_4 = load(gate + 3 * Hp + u);
      const vec g = load(now + i);
      vec g_1, g_2, g_3, g_4;
      if (s.lstm) {
        const vec curved = tanh(load(w.cell(s, t + 1) + i));
        const vec cell = load(w.carried_c + i) + g * a_4 * (1 - curved * curved);
        g_1 = cell * a_3 * a_1 * (1 - a_1);
        g_2 = cell * load(w.cell(s, t) + i) * a_2 * (1 - a_2);
        g_3 = cell * a_1 * (1 - a_3 * a_3);
        g_4 = g * curved * a_4 * (1 - a_4);
        store(w.carried_c + i, cell * a_2);
        store(past + i, vec{});
      } else {
        g_1 = g * (1 - a_3) * (1 - a_1 * a_1);
        g_2 = g_1 * a_4 * a_2 * (1 - a_2);
        g_3 = g * (load(w.state(s, t) + i) - a_1) * a_3 * (1 - a_3);
        g_4 = g_1 * a_2;
        store(past + i, g * a_3);
      }
      store(gradient + u, g_1);
      store(gradient + Hp + u, g_2);
      store(gradient + 2 * Hp + u, g_3);
      store(gradient + 3 * Hp + u, g_4);
    }
  }
}

// Weights as products going back read them.
void lay_out_back(const Cells& c, const CellShape& s, CellWorkspace& w) {
  std::fill(w.back_x, w.back_x + s.blocks * s.Hp * s.Ep, real(0));
  std::fill(w.back_h, w.back_h + s.blocks * s.Hp * s.Hp, real(0));
  for (Index j = 0; j < s.blocks; ++j) {
    const real* weight_x = c.weight_ih + s.input_order[j] * s.H * s.E;
    pad_rows(w.back_x + j * s.Hp * s.Ep, s.Ep, weight_x, s.H, s.E);
    pad_rows(w.back_h + j * s.Hp * s.Hp, s.Hp, c.weight_hh + j * s.H * s.H, s.H, s.H);
  }
}

// All steps, the last one first; the gradients of the state and cell before step 0 stay in
// w.carried_h[0] and w.carried_c. grad_output [T][B][length]; grad_cell [B][H], of the last, or null.
void cells_backward(const CellShape& s, CellWorkspace& w, const real* grad_output, Index length,
                    const real* grad_cell) {
  const Rows back = list_weights(w.back_h, s.blocks * s.Hp, s.Hp);
  std::fill(w.carried_h[0], w.carried_h[0] + s.B * s.Hp, real(0));
  std::fill(w.carried_c, w.carried_c + s.B * s.Hp, real(0));
  if (grad_cell) pad_rows(w.carried_c, s.Hp, grad_cell, s.B, s.H);
  for (Index t = s.T - 1; t >= 0; --t) {
    real *now = w.carried_h[0], *past = w.carried_h[1];
    for (Index b = 0; b < s.B; ++b) {
      const real* gradient = grad_output + (t * s.B + b) * length;
      for (Index u = 0; u < s.H; ++u) now[b * s.Hp + u] += gradient[u];
    }
    gates_backward(s, w, t, now, past);
    add_product(s.B, s.blocks * s.Hp, w.gradients + t * s.B * s.row + s.first_of_state * s.Hp,
                s.row, back, s.Hp, past, s.Hp);
    std::swap(w.carried_h[0], w.carried_h[1]);
  }
}

// out[column] = the sum over samples of rows `step` apart, for whole vectors of columns.
void sum_rows(Index samples, const real* rows, Index step, Index columns, real* out) {
  for (Index c = 0; c < columns; c += V) {
    vec total = {};
    for (Index first = 0; first < samples; first += depth_at_once) {
      vec sum = {};
      for (Index k = first; k < std::min(samples, first + depth_at_once); ++k)
        sum += load(rows + k * step + c);
      total += sum;
    }
    store(out + c, total);
  }
}

// Gradients of the parameters, sums over all samples; inputs x [K][Ep].
void cell_sums(const CellShape& s, CellWorkspace& w, const real* x, const CellGradients& out) {
  const Index X = s.blocks * s.Hp, K = s.T * s.B;
  const real* of_state = w.gradients + s.first_of_state * s.Hp;
  std::fill(w.sums, w.sums + X * s.Ep, real(0));
  add_outer(K, X, w.gradients, s.row, s.Ep, x, w.sums, w.panels);
  for (Index j = 0; j < s.blocks; ++j)
    unpad_rows(out.weight_ih + s.input_order[j] * s.H * s.E, w.sums + j * s.Hp * s.Ep, s.Ep, s.H,
               s.E);
  std::fill(w.sums, w.sums + X * s.Hp, real(0));
  add_outer(K, X, of_state, s.row, s.Hp, w.states, w.sums, w.panels);
  for (Index j = 0; j < s.blocks; ++j)
    unpad_rows(out.weight_hh + j * s.H * s.H, w.sums + j * s.Hp * s.Hp, s.Hp, s.H, s.H);
  sum_rows(K, w.gradients, s.row, 4 * s.Hp, w.bias_sums);
  for (Index j = 0; j < s.blocks; ++j) {
    std::copy_n(w.bias_sums + j * s.Hp, s.H, out.bias_ih + s.input_order[j] * s.H);
    std::copy_n(w.bias_sums + (s.first_of_state + j) * s.Hp, s.H, out.bias_hh + j * s.H);
  }
}

// Those of the inputs: grad_x, rows `length` apart.
void inputs_backward(const CellShape& s, CellWorkspace& w, real* grad_x, Index length) {
  const Index X = s.blocks * s.Hp, K = s.T * s.B;
  const Rows back = list_weights(w.back_x, X, s.Ep);
  for (Index first = 0; first < K; first += rows_at_once) {
    const Index count = std::min(rows_at_once, K - first);
    std::fill(w.grad_inputs, w.grad_inputs + count * s.Ep, real(0));
    add_product(count, X, w.gradients + first * s.row, s.row, back, s.Ep, w.grad_inputs, s.Ep);
    for (Index k = 0; k < count; ++k)
      std::copy_n(w.grad_inputs + k * s.Ep, std::min(length, s.Ep), grad_x + (first + k) * length);
  }
}

}  // namespace

// ----------------------------------------------------------------------------------- interface

extern "C" {

// Numbers of type REAL that the block of memory must hold; `keep` for a backward pass later.
Index sgrl_cells_workspace(const Cells* cells, Index steps, Index batch, std::int32_t keep) {
  return CellWorkspace(CellShape(*cells, steps, batch), keep, nullptr).total;
}

// Steps [first, stop) of an unroll of `steps`: x [stop - first][B][E] -> out [..][B][H]. Step 0
// starts from h_0 and c_0 [B][H] (null: zeros); the others must follow in order, on the same block.
// c_n (or null) becomes the last cell.
void sgrl_cells_forward(const Cells* cells, Index steps, Index batch, std::int32_t keep,
                        Index first, Index stop, const real* x, const real* h_0, const real* c_0,
                        real* out, real* c_n, real* block) {
  const CellShape s(*cells, steps, batch);
  CellWorkspace w(s, keep, block);
  const Index X = s.blocks * s.Hp;
  if (first == 0) start_cells(*cells, s, w, h_0, c_0);
  const Rows weight_x = list_weights(w.weight_x, s.E, X), weight_h = list_weights(w.weight_h, s.H, X);
  for (Index t = first; t < stop; ++t) {
    step_cells(s, w, weight_x, weight_h, t, x + (t - first) * s.B * s.E, s.E);
    unpad_rows(out + (t - first) * s.B * s.H, w.state(s, t + 1), s.Hp, s.B, s.H);
  }
  if (c_n) unpad_rows(c_n, w.cell(s, stop), s.Hp, s.B, s.H);
}

// Backward of a whole unroll whose forward kept its record in `block`; x [T][B][E] as then.
// grad_output [T][B][H] and grad_cell [B][H] (or null) -> grad_x, grad_h0, grad_c0 (each may be
// null) and `out`.
void sgrl_cells_backward(const Cells* cells, Index steps, Index batch, const real* x,
                         const real* grad_output, const real* grad_cell, real* grad_x,
                         real* grad_h0, real* grad_c0, CellGradients* out, real* block) {
  const CellShape s(*cells, steps, batch);
  CellWorkspace w(s, true, block);
  lay_out_back(*cells, s, w);
  cells_backward(s, w, grad_output, s.H, grad_cell);
  pad_rows(w.inputs, s.Ep, x, s.T * s.B, s.E);
  cell_sums(s, w, w.inputs, *out);
  if (grad_x) inputs_backward(s, w, grad_x, s.E);
  if (grad_h0) unpad_rows(grad_h0, w.carried_h[0], s.Hp, s.B, s.H);
  if (grad_c0) unpad_rows(grad_c0, w.carried_c, s.Hp, s.B, s.H);
}

}  // extern "C"
