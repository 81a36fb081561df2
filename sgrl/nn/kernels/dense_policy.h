// Whole steps of the policies with GRU or LSTM cells, and their backward pass: the encoder before
// the cells, the actor behind them. Defined by encoder.py; part of slot_neurons.cpp.
//
// Letters and padding as in dense_rnn.h.

#pragma once

#include "dense_rnn.h"

extern "C" {

// What a policy has around its cells: two linear layers before, three behind.
struct DensePolicy {
  Index observation, features, hidden, actions;  // F, D, units of the actor's layers, A
  const real *weight_1, *bias_1, *weight_2, *bias_2;
  const real *weight_3, *bias_3, *weight_4, *bias_4, *weight_5, *bias_5;
};

struct DenseGradients {
  real *weight_1, *bias_1, *weight_2, *bias_2;
  real *weight_3, *bias_3, *weight_4, *bias_4, *weight_5, *bias_5;
};

}  // extern "C"

namespace {

// Memory that the layers' backward passes share.
struct LinearSums {
  real *back, *sums, *bias;
  Panels panels;

  LinearSums(Cutter& take, Index largest, Index widest)
      : back(take(largest)), sums(take(largest)), bias(take(widest)), panels(take, widest) {}
  LinearSums() = default;
};

// A linear layer's weights transposed [in][row] and its bias, and what came out of it, [T][B][row]
// where it is kept, else [B][row].
struct Linear {
  Index in, out, row;
  real *weight, *bias, *output;

  Linear(Cutter& take, Index in, Index out, Index samples)
      : in(in), out(out), row(padded(out)), weight(take(in * row)), bias(take(row)),
        output(take(samples * row)) {}

  void lay_out(const real* from, const real* from_bias) {
    transpose<true>(weight, row, from, in, out, in);
    pad_rows(bias, row, from_bias, 1, out);
  }
  void apply(Index batch, const real* x, Index x_step, real* to) const {
    for (Index b = 0; b < batch; ++b) std::copy_n(bias, row, to + b * row);
    add_product(batch, in, x, x_step, list_weights(weight, in, row), row, to, row);
  }
  // From the gradient of the outputs [samples][row]: those of the parameters, where the inputs are
  // x [samples][padded(in)], and those of the inputs in the same shape, unless it is null.
  void backward(Index samples, const real* gradient, const real* x, const real* from,
                real* grad_weight, real* grad_bias, real* grad_x, const LinearSums& w) const {
    const Index in_row = padded(in);
    std::fill(w.sums, w.sums + out * in_row, real(0));
    add_outer(samples, out, gradient, row, in_row, x, w.sums, w.panels);
    unpad_rows(grad_weight, w.sums, in_row, out, in);
    sum_rows(samples, gradient, row, row, w.bias);
    std::copy_n(w.bias, out, grad_bias);
    if (!grad_x) return;
    pad_rows(w.back, in_row, from, out, in);
    const Rows back = list_weights(w.back, out, in_row);
    std::fill(grad_x, grad_x + samples * in_row, real(0));
    for (Index first = 0; first < samples; first += rows_at_once)
      add_product(std::min(rows_at_once, samples - first), out, gradient + first * row, row, back,
                  in_row, grad_x + first * in_row, in_row);
  }
};

struct DenseWorkspace {
  Index steps_kept;  // T, or 1
  Linear first, second, third, fourth, last;
  real* scales;  // [T][B], of the norm
  // Backward only.
  real *observations, *gradients[2];
  LinearSums sums;
  Index total;

  DenseWorkspace(const DensePolicy& p, const CellShape& s, bool keep, Cutter take)
      : steps_kept(keep ? s.T : 1), first(take, p.observation, p.features, steps_kept * s.B),
        second(take, p.features, s.E, steps_kept * s.B), third(take, s.H, p.hidden, steps_kept * s.B),
        fourth(take, p.hidden, p.hidden, steps_kept * s.B),
        last(take, p.hidden, p.actions, steps_kept * s.B), scales(take(steps_kept * s.B)) {
    if (keep) {
      const Index K = s.T * s.B;
      Index largest = 0, widest = 0;
      for (const Linear* layer : {&first, &second, &third, &fourth, &last}) {
        largest = std::max(largest, layer->out * padded(layer->in));
        widest = std::max({widest, padded(layer->in), layer->row});
      }
      observations = take(K * padded(p.observation));
      for (real*& gradient : gradients)
        gradient = take(K * std::max({first.row, second.row, third.row, last.row, s.Hp}));
      sums = LinearSums(take, largest, widest);
    }
    total = take.total();
  }

  // Where a layer writes step t.
  real* output(const Linear& layer, const CellShape& s, Index t) const {
    return layer.output + (steps_kept > 1 ? t * s.B * layer.row : 0);
  }
  real* scale(const CellShape& s, Index t) const { return scales + (steps_kept > 1 ? t * s.B : 0); }

  void lay_out(const DensePolicy& p) {
    first.lay_out(p.weight_1, p.bias_1);
    second.lay_out(p.weight_2, p.bias_2);
    third.lay_out(p.weight_3, p.bias_3);
    fourth.lay_out(p.weight_4, p.bias_4);
    last.lay_out(p.weight_5, p.bias_5);
  }
};

constexpr real slope = real(0.01);  // of the leaky units

void leak(real* values, Index count) {
  for (Index i = 0; i < count; i += V) {
    const vec value = load(values + i);
    store(values + i, value < 0 ? value * slope : value);
  }
}

// The gradient before leaky units from the one behind; a unit's output has the sign of its input.
void leak_backward(real* gradient, const real* output, Index count) {
  for (Index i = 0; i < count; i += V) {
    const vec g = load(gradient + i);
    store(gradient + i, load(output + i) > 0 ? g : g * slope);
  }
}

// Layer norm without parameters, of rows of `count` numbers that zeros follow; scales [batch] is
// what each row was multiplied with.
void normalise(real* rows, Index count, Index length, Index batch, real* scales) {
  vec known = {};  // the last vector's lanes that hold numbers
  for (int lane = 0; lane < V; ++lane) known[lane] = count - (length - V) > lane;
  for (Index b = 0; b < batch; ++b) {
    real* row = rows + b * length;
    vec sums = {}, squares = {};
    for (Index i = 0; i < length; i += V) sums += load(row + i);
    const real mean = real(sum(sums) / count);
    for (Index i = 0; i < length; i += V) {
      vec difference = load(row + i) - mean;
      if (i + V == length) difference *= known;
      store(row + i, difference);
      squares += difference * difference;
    }
    scales[b] = real(1 / std::sqrt(sum(squares) / count + 1e-5));
    for (Index i = 0; i < length; i += V) store(row + i, load(row + i) * scales[b]);
  }
}

// The gradient before the norm from the one behind, whose result was `rows`. Lanes past `count`
// come out as anything finite: the caller does not look at them.
void normalise_backward(real* gradients, const real* rows, Index count, Index length, Index samples,
                        const real* scales) {
  for (Index k = 0; k < samples; ++k) {
    real* gradient = gradients + k * length;
    const real* row = rows + k * length;
    vec sums = {}, along = {};
    for (Index i = 0; i < length; i += V) {
      sums += load(gradient + i);
      along += load(gradient + i) * load(row + i);
    }
    const real mean = real(sum(sums) / count), slant = real(sum(along) / count);
    for (Index i = 0; i < length; i += V)
      store(gradient + i, (load(gradient + i) - mean - load(row + i) * slant) * scales[k]);
  }
}

}  // namespace

// ----------------------------------------------------------------------------------- interface

extern "C" {

Index sgrl_dense_workspace(const DensePolicy* policy, const Cells* cells, Index steps, Index batch,
                           std::int32_t keep) {
  return DenseWorkspace(*policy, CellShape(*cells, steps, batch), keep, Cutter(nullptr)).total;
}

// Step `t` of an unroll from the zero state: observations [B][F] -> states [B][H], logits [B][A].
void sgrl_dense_act(const DensePolicy* policy, const Cells* cells, Index steps, Index batch,
                    std::int32_t keep, Index t, const real* observations, real* states,
                    real* logits, real* block, real* policy_block) {
  const CellShape s(*cells, steps, batch);
  const DensePolicy& p = *policy;
  CellWorkspace w(s, keep, block);
  DenseWorkspace q(p, s, keep, Cutter(policy_block));
  const Index X = s.blocks * s.Hp;
  if (t == 0) {
    start_cells(*cells, s, w, nullptr, nullptr);
    q.lay_out(p);
  }
  real *features = q.output(q.first, s, t), *x = q.output(q.second, s, t);
  q.first.apply(s.B, observations, p.observation, features);
  normalise(features, p.features, q.first.row, s.B, q.scale(s, t));
  q.second.apply(s.B, features, q.first.row, x);
  leak(x, s.B * q.second.row);
  step_cells(s, w, list_weights(w.weight_x, s.E, X), list_weights(w.weight_h, s.H, X), t, x,
             q.second.row);
  unpad_rows(states, w.state(s, t + 1), s.Hp, s.B, s.H);
  real *one = q.output(q.third, s, t), *two = q.output(q.fourth, s, t);
  q.third.apply(s.B, w.state(s, t + 1), s.Hp, one);
  leak(one, s.B * q.third.row);
  q.fourth.apply(s.B, one, q.third.row, two);
  leak(two, s.B * q.fourth.row);
  real* outputs = q.output(q.last, s, t);
  q.last.apply(s.B, two, q.fourth.row, outputs);
  unpad_rows(logits, outputs, q.last.row, s.B, p.actions);
}

// Backward of all steps, which were kept in the two blocks; observations [T][B][F] as then.
// grad_logits [T][B][A], grad_states [T][B][H] (or null: none but through the logits) and grad_cell
// [B][H] (or null) -> gradients of all parameters.
void sgrl_dense_backward(const DensePolicy* policy, const Cells* cells, Index steps, Index batch,
                         const real* observations, const real* grad_logits,
                         const real* grad_states, const real* grad_cell, DenseGradients* out,
                         CellGradients* of_cells, real* block, real* policy_block) {
  const CellShape s(*cells, steps, batch);
  const DensePolicy& p = *policy;
  CellWorkspace w(s, true, block);
  DenseWorkspace q(p, s, true, Cutter(policy_block));
  const Index K = s.T * s.B;
  real *here = q.gradients[0], *there = q.gradients[1];
  pad_rows(here, q.last.row, grad_logits, K, p.actions);
  q.last.backward(K, here, q.fourth.output, p.weight_5, out->weight_5, out->bias_5, there, q.sums);
  leak_backward(there, q.fourth.output, K * q.fourth.row);
  q.fourth.backward(K, there, q.third.output, p.weight_4, out->weight_4, out->bias_4, here, q.sums);
  leak_backward(here, q.third.output, K * q.third.row);
  q.third.backward(K, here, w.state(s, 1), p.weight_3, out->weight_3, out->bias_3, there, q.sums);
  if (grad_states)
    for (Index k = 0; k < K; ++k)
      for (Index u = 0; u < s.H; ++u) there[k * s.Hp + u] += grad_states[k * s.H + u];

  lay_out_back(*cells, s, w);
  cells_backward(s, w, there, s.Hp, grad_cell);
  cell_sums(s, w, q.second.output, *of_cells);
  inputs_backward(s, w, here, s.Ep);

  leak_backward(here, q.second.output, K * q.second.row);
  q.second.backward(K, here, q.first.output, p.weight_2, out->weight_2, out->bias_2, there, q.sums);
  normalise_backward(there, q.first.output, p.features, q.first.row, K, q.scales);
  pad_rows(q.observations, padded(p.observation), observations, K, p.observation);
  q.first.backward(K, there, q.observations, p.weight_1, out->weight_1, out->bias_1, nullptr,
                   q.sums);
}

}  // extern "C"
