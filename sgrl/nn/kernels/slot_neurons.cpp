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
//   Where each sequence's own sums are wanted it is cut into `Group`s of sequences, one after the
//   other.
// Memory comes from the caller as one block, cut up by `Workspace`; nothing is allocated here but
// short lists of row pointers, and there is no global state.

#include "vectors.h"

namespace {

// By step -> by neuron: rows from[t][r], `from_length` apart, of which the first `batch` numbers are
// wanted, become to[r][t * batch + b], one vector of zeros after each.
void gather_steps(real* to, Index to_length, const real* from, Index step_length,
                  Index from_length, Index rows, Index steps, Index batch) {
  // Few rows at a time, since each lies in a page of its own.
  for (Index first = 0; first < rows; first += 36)
    for (Index t = 0; t < steps; ++t)
      for (Index r = first; r < std::min<Index>(rows, first + 36); ++r)
        for (Index b = 0; b < batch; b += V)
          store(to + r * to_length + t * batch + b,
                load(from + t * step_length + r * from_length + b));
  for (Index r = 0; r < rows; ++r) store(to + r * to_length + steps * batch, vec{});
}

// ---------------------------------------------------------------------------------- the layer

}  // namespace

// `native.py` reads the declarations in extern "C" blocks, these structures and the functions at the
// end, and makes its own of them: of Index, std::int32_t, double, arrays of these and pointers.

extern "C" {

// A layer and its parameters, shaped as in `SlotNeurons`; predictor_* are null without predictors.
struct Layer {
  Index neurons, size, parents, slots, external, inputs;  // W, N, P, M, E, X
  double scale;                                           // of the scores
  double noise_std;                                       // of what is added to the outputs
  const Index* parent;                                    // [W][P]
  const real *weight_h, *weight_x, *bias;
  const real *predictor_h, *predictor_x, *predictor_bias;
};

// What `SparseNetPolicy` has around the layer; shapes as in recurrent_policies.py, `actor` as
// `stack` gives.
struct Policy {
  Index observation, features, actions, slots;  // F, D, A, S
  const real *weight_1, *bias_1, *weight_2, *bias_2, *actor, *actor_bias;
};

struct Mixing {
  const real* mixing_weight;  // lambda [W]
  double schedule_beta;
  std::int32_t positive_projection, target_received, mask_predictions, moments, for_predictor;
  std::int32_t unit_gradients;  // the moments are of vectors brought to length 1
  std::int32_t episodes;        // the moments' samples are sequences, not their steps
};

// Gradients of the parameters (null: not wanted); statistics are means over all valid samples,
// moments sums over these or over sequences.
struct Gradients {
  real *weight_h, *weight_x, *bias, *predictor_h, *predictor_x, *predictor_bias;
  double statistics[4];  // predictor_loss, received_grad_norm, mixed_grad_norm, prediction_norm
  double* moments;       // [4][W]: sum |u|^2, sum <w, u>, |sum u|^2, <sum w, sum u>
};

// `SparseMLP`: layers that read the one below, the first one single numbers of the input.
struct Stack {
  Index count, inputs;
  std::int32_t residual;
  const Layer* layers;  // the first one's `parent` is [W][L], all others' [W][P]
};

}  // extern "C"

namespace {

struct Shape {
  Index W, N, P, M, E, X, L, R, T, B, lanes;
  Shape(const Layer& l, Index steps, Index batch)
      : W(l.neurons), N(l.size), P(l.parents), M(l.slots), E(l.external), X(l.inputs), L(P * N),
        R(M + M * N), T(steps), B(batch), lanes(vectors(batch) * V) {}
  Index depth(Index j) const { return L + (j < X ? E : 0); }
  Index state_step() const { return W * N * B + V; }
};

// Samples that the products over all samples take at a time: their rows fit a core's own cache.
constexpr Index chunk_samples = single ? 800 : 400;

struct Workspace {
  real* bias;                                  // [W][R], 0 for the keys
  real *external, *scores;                     // [E][lanes]; [M][lanes]
  real *states, *attention, *slots;            // by step: [T + 1][W * N], [T][W][M], [T][W][M * N]
  // Backward only.
  real *received, *predicted;                  // by step [T][W * N]
  real *states_by_neuron, *inputs_by_neuron, *inputs_gradient;  // [W * N], [E], [E]
  real *ones, *valid, *schedule;               // [K], [K], [T][W]
  real *carried[2];                            // [W * N][lanes]
  real *step_rows;                             // [R][lanes]
  real *panel_slots, *panel_attention, *panel_gradient, *panel_prediction;
  real *panel_rows;                            // all row gradients of a neuron [<= 3 R + M N]
  real *panel_guesses, *panel_weight, *panel_vectors;
  real *sums;                                  // [<= 3 R + M N][L + E + 1]
  real *sums_by_lane;                          // [2 R][L + E + 1][V]
  Index steps_kept, row, panel, chunk;
  Index total;

  Workspace(const Shape& s, bool keep, real* block) {
    Cutter take(block);
    steps_kept = keep ? s.T : 1;
    const Index K = s.T * s.B;
    row = row_length(K + s.B);  // the states before the first step are there too
    chunk = std::max<Index>(1, std::min(s.T, chunk_samples / s.B));
    // Chunks of equal length.
    chunk = (s.T + (s.T + chunk - 1) / chunk - 1) / ((s.T + chunk - 1) / chunk);
    panel = row_length(chunk * s.B);
    bias = take(s.W * s.R);
    external = take(s.E * s.lanes);
    scores = take(s.M * s.lanes);
    states = take((keep ? s.T + 1 : 2) * s.state_step());
    attention = take(steps_kept * s.W * s.M * s.B);
    slots = take(steps_kept * s.W * s.M * s.N * s.B);
    if (keep) {
      received = take(s.T * s.state_step());
      predicted = take(s.T * s.state_step());
      states_by_neuron = take(s.W * s.N * row);
      inputs_by_neuron = take(s.E * row);
      inputs_gradient = take(s.E * row);
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
      panel_vectors = take(3 * s.N * panel);
      panel_weight = take(panel);
      sums = take((3 * s.R + s.M * s.N) * (s.L + s.E + 1));
      sums_by_lane = take(2 * s.R * (s.L + s.E + 1) * V);
    }
    total = take.total();
  }
};

using Rows = std::vector<const real*>;

// ------------------------------------------------------------------------------------- forward

// Bias of all rows of a layer [W][R]: 0 for the keys.
void spread_bias(const Layer& layer, const Shape& s, real* to) {
  const Index MN = s.M * s.N;
  for (Index j = 0; j < s.W; ++j, to += s.R) {
    std::fill(to, to + s.M, real(0));
    std::copy(layer.bias + j * MN, layer.bias + (j + 1) * MN, to + s.M);
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

// All neurons of a layer: attention [W][M][B], slots [W][M * N][B] and output [W * N][B], from
// inputs that `list(j, rows)` names. `scores` is [M][lanes] to work in.
template <class List>
void layer_forward(const Layer& layer, const Shape& s, const real* bias, real* scores,
                   real* attention, real* slots, real* output, List list) {
  Rows read(s.L + s.E);
  std::vector<real*> rows(s.R);
  for (Index m = 0; m < s.M; ++m) rows[m] = scores + m * s.lanes;
  for (Index j = 0; j < s.W; ++j) {
    list(j, read.data());
    for (Index i = 0; i < s.M * s.N; ++i) rows[s.M + i] = slots + i * s.B;
    multiply(s.R, s.L, layer.weight_h + j * s.R * s.L, read.data(), s.B, rows.data(),
             bias + j * s.R);
    if (j < s.X)
      multiply(s.R, s.E, layer.weight_x + j * s.R * s.E, read.data() + s.L, s.B, rows.data(),
               nullptr);
    activate(s, real(layer.scale), scores, attention, slots, output);
    attention += s.M * s.B;
    slots += s.M * s.N * s.B;
    output += s.N * s.B;
  }
}

// Rows that neuron j reads from its parents' states [W * N][length].
void list_parents(const Layer& layer, const Shape& s, Index j, const real* states, Index length,
                  const real** rows) {
  for (Index p = 0; p < s.P; ++p)
    for (Index n = 0; n < s.N; ++n)
      *rows++ = states + (layer.parent[j * s.P + p] * s.N + n) * length;
}

// Adds noise [B][W * N], its rows `noise_length` apart, to states [W * N][length].
void add_noise(const Layer& layer, const Shape& s, const real* noise, Index noise_length,
               Index batch, real* states, Index length) {
  for (Index i = 0; i < s.W * s.N; ++i)
    for (Index b = 0; b < batch; ++b)
      states[i * length + b] += real(layer.noise_std) * noise[b * noise_length + i];
}

// Step t of all neurons, from the states before it, the inputs in w.external and the noise [B][W * N]
// (null: none).
void step_forward(const Layer& layer, const Shape& s, Workspace& w, Index t, const real* noise) {
  const bool keep = w.steps_kept == s.T;  // otherwise states alternate between two places
  const real* before = w.states + (keep ? t : t % 2) * s.state_step();
  real* after = w.states + (keep ? t + 1 : (t + 1) % 2) * s.state_step();
  const Index kept = keep ? t : 0;
  layer_forward(layer, s, w.bias, w.scores,
                w.attention + kept * s.W * s.M * s.B, w.slots + kept * s.W * s.M * s.N * s.B,
                after, [&](Index j, const real** rows) {
                  list_parents(layer, s, j, before, s.B, rows);
                  for (Index e = 0; e < s.E; ++e) rows[s.L + e] = w.external + e * s.lanes;
                });
  if (noise) add_noise(layer, s, noise, s.W * s.N, s.B, after, s.B);
}

// h_0 [B][W * N] (null: zeros) becomes the state before step 0.
void start_forward(const Layer& layer, const Shape& s, Workspace& w, const real* h_0) {
  const Index WN = s.W * s.N;
  spread_bias(layer, s, w.bias);
  std::fill(w.states, w.states + s.state_step(), real(0));
  if (h_0) transpose<false>(w.states, s.B, h_0, WN, s.B, WN);
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
  real *observations, *features, *zeros, *products;  // [F], [D], 2 A S rows of [lanes]
  Index total;

  PolicyWorkspace(const Policy& p, const Shape& s, real* block) {
    Cutter take(block);
    observations = take(p.observation * s.lanes);
    features = take(p.features * s.lanes);
    zeros = take(2 * p.actions * p.slots);
    products = take(2 * p.actions * p.slots * s.lanes);
    total = take.total();
  }
};

// Linear, layer norm, linear, leaky ReLU: observations [B][F] -> w.external [E][lanes].
void encode(const Policy& p, const Shape& s, const Workspace& w, PolicyWorkspace& q,
            const real* observations) {
  std::vector<real*> rows, features, out;
  list_rows(rows, q.observations, p.observation, s.lanes);
  list_rows(features, q.features, p.features, s.lanes);
  list_rows(out, w.external, s.E, s.lanes);
  transpose<true>(q.observations, s.lanes, observations, p.observation, s.B, p.observation);
  multiply(p.features, p.observation, p.weight_1, rows.data(), s.B, features.data(), p.bias_1);
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
  multiply(s.E, p.features, p.weight_2, features.data(), s.B, out.data(), p.bias_2);
  for (real* row : out) {
    for (Index b = 0; b < s.B; b += V) {
      const vec value = load(row + b);
      store(row + b, value < 0 ? value * real(0.01) : value);
    }
    // The bias stands there too, and what follows the last sample spills into the next neuron row.
    std::fill(row + s.B, row + s.lanes, real(0));
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
  multiply(2 * AS, WN, p.actor, states.data(), s.B, products.data(), q.zeros);
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
// `length` (feedback: of feedback_length). Without `output`, which noise may hide, it is made again.
inline void row_gradients(const Shape& s, real scale, real* out, Index out_length,
                          const real* feedback, Index feedback_length, const real* attention,
                          const real* slots, Index length, const real* const* output,
                          Index column) {
  vec mean = {};  // sum_k a_k v_k = <g, output>
  if (output)
    for (Index n = 0; n < s.N; ++n)
      mean += load(feedback + n * feedback_length + column) * load(output[n] + column);
  else
    for (Index m = 0; m < s.M; ++m)
      for (Index n = 0; n < s.N; ++n)
        mean += load(attention + m * length + column) *
                load(feedback + n * feedback_length + column) *
                load(slots + (m * s.N + n) * length + column);
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

// Sequences [first, first + count), which lie together by neuron: step t of all of them at
// `offset + t * count`, and after the last step as many places more.
struct Group {
  Index first, count, offset;
};

// All sequences; or, where each one's own sums are wanted, as many as a vector has lanes, or half as
// many and so on for the last ones: a lane then never sees more than one of a group.
std::vector<Group> make_groups(const Shape& s, bool by_lane) {
  std::vector<Group> groups;
  for (Index first = 0, count = by_lane ? V : s.B; first < s.B; first += count) {
    while (first + count > s.B) count /= 2;
    groups.push_back({first, count, first * (s.T + 1)});
  }
  return groups;
}

bool sums_episodes(const Mixing* mixing) {
  return mixing && mixing->moments && mixing->episodes;
}

// What the products over all samples read, by neuron.
void arrange_samples(const Shape& s, Workspace& w, const std::vector<Group>& groups,
                     const real* x, const std::uint8_t* mask) {
  const Index K = s.T * s.B;
  for (const Group& g : groups)
    gather_steps(w.states_by_neuron + g.offset, w.row, w.states + g.first, s.state_step(), s.B,
                 s.W * s.N, s.T + 1, g.count);
  if (s.X) {
    if (groups.size() == 1) {
      transpose<true>(w.inputs_by_neuron, w.row, x, s.E, K, s.E);
      for (Index e = 0; e < s.E; ++e)
        store(w.inputs_by_neuron + e * w.row + vectors(K) * V, vec{});
    } else {
      std::fill(w.inputs_by_neuron, w.inputs_by_neuron + s.E * w.row, real(0));
      for (const Group& g : groups)
        for (Index t = 0; t < s.T; ++t)
          transpose<false>(w.inputs_by_neuron + g.offset + t * g.count, w.row,
                           x + (t * s.B + g.first) * s.E, s.E, g.count, s.E);
    }
    std::fill(w.inputs_gradient, w.inputs_gradient + s.E * w.row, real(0));
  }
  std::fill(w.ones, w.ones + w.row, real(1));
  std::fill(w.valid, w.valid + w.row, real(0));
  for (const Group& g : groups)
    for (Index t = 0; t < s.T; ++t)
      for (Index b = 0; b < g.count; ++b)
        w.valid[g.offset + t * g.count + b] = !mask || mask[t * s.B + g.first + b];
}

// Gradient of the inputs from by neuron to [T][B][E].
void write_inputs_gradient(const Shape& s, const Workspace& w, const std::vector<Group>& groups,
                           real* grad_x) {
  if (groups.size() == 1) {
    transpose<false>(grad_x, s.E, w.inputs_gradient, w.row, s.E, s.T * s.B);
    return;
  }
  for (const Group& g : groups)
    for (Index t = 0; t < s.T; ++t)
      transpose<false>(grad_x + (t * s.B + g.first) * s.E, s.E,
                       w.inputs_gradient + g.offset + t * g.count, w.row, s.E, g.count);
}

// The rows that neuron j reads, by neuron: its parents' states before, its external inputs.
void list_inputs(const Layer& layer, const Shape& s, const Workspace& w, Index j, Rows& rows) {
  rows.resize(s.depth(j));
  list_parents(layer, s, j, w.states_by_neuron, w.row, rows.data());
  for (Index e = s.L; e < s.depth(j); ++e)
    rows[e] = w.inputs_by_neuron + (e - s.L) * w.row;
}

// Steps [first, first + steps) of a group's `batch` sequences from `sequence` on; `offset` by
// neuron.
struct Chunk {
  Index first, steps, sequence, batch, offset, samples;
};

template <class F>
void for_chunks(const Shape& s, const Workspace& w, const std::vector<Group>& groups, F f) {
  for (const Group& g : groups) {
    // As many samples as a chunk of all sequences has, at most; of equal length.
    const Index most = std::min(s.T, w.chunk * s.B / g.count), count = (s.T + most - 1) / most;
    const Index length = (s.T + count - 1) / count;
    for (Index first = 0; first < s.T; first += length) {
      const Index steps = std::min(length, s.T - first);
      f(Chunk{first, steps, g.first, g.count, g.offset + first * g.count, steps * g.count});
    }
  }
}

// Predictions s of one neuron [N][length] from its attention and the rows it reads; `guesses` are
// M * N rows to work in.
void predict(const Layer& layer, const Shape& s, Index j, const real* const* inputs,
             const real* attention, Index length, Index samples,
             real* const* guesses, real* prediction) {
  const Index MN = s.M * s.N;
  multiply(MN, s.L, layer.predictor_h + j * MN * s.L, inputs, samples, guesses,
           layer.predictor_bias + j * MN);
  if (j < s.X)
    multiply(MN, s.E, layer.predictor_x + j * MN * s.E, inputs + s.L, samples, guesses, nullptr);
  for (Index k = 0; k < samples; k += V)
    for (Index n = 0; n < s.N; ++n) {
      vec sum = {};
      for (Index m = 0; m < s.M; ++m)
        sum += load(attention + m * length + k) * load(guesses[m * s.N + n] + k);
      store(prediction + n * length + k, sum);
    }
}

// Predictions of every neuron at every step, into w.predicted.
void predict_all(const Layer& layer, const Shape& s, Workspace& w,
                 const std::vector<Group>& groups) {
  Rows inputs, shifted;
  std::vector<real*> guesses;
  list_rows(guesses, w.panel_guesses, s.M * s.N, w.panel);
  for (Index j = 0; j < s.W; ++j) {
    list_inputs(layer, s, w, j, inputs);
    for_chunks(s, w, groups, [&](Chunk c) {
      shifted = inputs;
      for (const real*& row : shifted) row += c.offset;
      gather_steps(w.panel_attention, w.panel,
                   w.attention + (c.first * s.W + j) * s.M * s.B + c.sequence, s.W * s.M * s.B,
                   s.B, s.M, c.steps, c.batch);
      predict(layer, s, j, shifted.data(), w.panel_attention, w.panel,
              c.samples, guesses.data(), w.panel_prediction);
      for (Index t = 0; t < c.steps; ++t)
        for (Index n = 0; n < s.N; ++n) {
          const real* from = w.panel_prediction + n * w.panel + t * c.batch;
          real* to = w.predicted + (c.first + t) * s.state_step() + (j * s.N + n) * s.B +
                     c.sequence;
          // What spills over reaches rows that other groups have written, and will not again.
          if (groups.size() > 1)
            std::memcpy(to, from, c.batch * sizeof(real));
          else
            for (Index b = 0; b < s.B; b += V) store(to + b, load(from + b));
        }
    });
  }
}

// Back through time: the gradient received at every state, into w.received, and that of h_0.
void carry_back(const Layer& layer, const Shape& s, Workspace& w, const Mixing* mixing,
                const std::uint8_t* mask, const real* grad_output, real* grad_h0) {
  const Index WN = s.W * s.N;
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
                      w.slots + (t * s.W + j) * s.M * s.N * s.B, s.B,
                      layer.noise_std > 0 ? nullptr : output.data(), b);
      for (Index p = 0; p < s.P; ++p)
        for (Index n = 0; n < s.N; ++n)
          to[p * s.N + n] = before + (layer.parent[j * s.P + p] * s.N + n) * s.lanes;
      multiply<true>(s.L, s.R, layer.weight_h + j * s.R * s.L, rows.data(), s.B, to.data(),
             nullptr);
    }
  }
  if (grad_h0) transpose<false>(grad_h0, WN, now, s.lanes, WN, s.B);
}

// What a neuron's row gradients are made from, rows of `length`; zeros follow the last sample.
struct Samples {
  Index count, length;
  const real *attention, *slots;        // [M], [M * N]
  const real *gradient, *prediction;    // received g and s [N]
  const real *weight, *valid;           // lambda; 1 or 0
  const real *slope;                    // [N] of a residual layer: 1 - tanh^2; else null
  const real* const* output;            // [N]; null where only noisy ones are kept
  const real* const* inputs;            // the rows that the neuron reads, `depth` of them
  Index depth;
};

// Stacked rows of a neuron, as `fill_rows` writes and `dot` reads them: [M N] predictor, [R]
// policy, and with moments [R] of w and [R] of u = s - w.
struct Stacked {
  Index policy, w, u, end;
  Stacked(const Shape& s, const Mixing* mixing)
      : policy(mixing ? s.M * s.N : 0), w(policy + s.R), u(w + s.R),
        end(mixing && mixing->moments ? u + s.R : w) {}
};

// Sums over samples; statistics over all neurons, the rest of one.
struct Sums {
  vec residual_square = {}, true_length = {}, mixed_length = {}, guess_length = {};
  vec u_square = {}, wu = {};
};

// Row gradients of one neuron for some samples, into `rows` (of x.length), and what is measured on
// the way. `vectors` is [3 N][x.length] to work in; its first N rows become the mixed gradients.
void fill_rows(const Shape& s, real scale, const Mixing* mixing, real per_term, const Samples& x,
               real* rows, real* vectors, Sums& sums) {
  const Stacked at(s, mixing);
  const Index length = x.length;
  real *mixed_rows = vectors, *w_rows = vectors + s.N * length, *u_rows = w_rows + s.N * length;
  const auto rows_of = [&](const real* feedback, Index first, Index k) {
    row_gradients(s, scale, rows + first * length, length, feedback, length, x.attention, x.slots,
                  length, x.output, k);
  };
  const auto slope = [&](Index n, Index k) {
    return x.slope ? load(x.slope + n * length + k) : splat(1);
  };
  for (Index k = 0; k < x.count; k += V) {
    if (!mixing) {
      for (Index n = 0; n < s.N; ++n) {
        const vec g = load(x.gradient + n * length + k);
        store(mixed_rows + n * length + k, g);
        store(w_rows + n * length + k, g * slope(n, k));
      }
      rows_of(w_rows, at.policy, k);
      continue;
    }
    const vec valid = load(x.valid + k);
    vec weight = load(x.weight + k);
    if (mixing->mask_predictions) weight = valid > 0 ? weight : splat(1);
    const vec factor = substitute_factor(s, mixing->positive_projection, x.gradient, length,
                                         x.prediction, length, k);
    // Squared lengths: of the vectors, and of those that lambda is estimated from.
    vec g_square = {}, p_square = {}, mixed_square = {}, w_square = {}, s_square = {};
    for (Index n = 0; n < s.N; ++n) {
      const vec g = load(x.gradient + n * length + k), p = load(x.prediction + n * length + k);
      const vec mixed = weight * g + (1 - weight) * (factor * p);
      store(mixed_rows + n * length + k, mixed);
      store(w_rows + n * length + k, mixed * slope(n, k));
      const vec sloped_g = g * slope(n, k), sloped_s = factor * p * slope(n, k);
      g_square += g * g;
      p_square += p * p;
      mixed_square += mixed * mixed;
      w_square += sloped_g * sloped_g;
      s_square += sloped_s * sloped_s;
      // An invalid step has no target. Chosen, not multiplied: it may hold infinities.
      vec residual = p - (mixing->target_received ? g : mixed);
      residual = valid > 0 ? residual : vec{};
      sums.residual_square += residual * residual;
      if (mixing->for_predictor)
        for (Index m = 0; m < s.M; ++m)
          store(rows + (m * s.N + n) * length + k,
                per_term * residual * load(x.attention + m * length + k));
    }
    sums.true_length += valid > 0 ? square_root(g_square) : vec{};
    sums.mixed_length += valid > 0 ? square_root(mixed_square) : vec{};
    sums.guess_length += valid > 0 ? square_root(p_square) : vec{};
    rows_of(w_rows, at.policy, k);
    if (!mixing->moments) continue;
    vec shrink_w = splat(1), shrink_s = splat(1);
    if (mixing->unit_gradients) {
      shrink_w = 1 / at_least(square_root(w_square), real(1e-12));
      shrink_s = 1 / at_least(square_root(s_square), real(1e-12));
    }
    for (Index n = 0; n < s.N; ++n) {
      const vec w = load(x.gradient + n * length + k) * slope(n, k) * shrink_w;
      const vec p = factor * load(x.prediction + n * length + k) * slope(n, k) * shrink_s;
      store(w_rows + n * length + k, valid > 0 ? w : vec{});
      store(u_rows + n * length + k, valid > 0 ? p - w : vec{});
    }
    rows_of(w_rows, at.w, k);
    rows_of(u_rows, at.u, k);
    if (mixing->episodes) continue;
    vec x_square = {};
    for (Index d = 0; d < x.depth; ++d) {
      const vec input = load(x.inputs[d] + k);
      x_square += input * input;
    }
    // (1 + |x|^2) <t, t'> + |x|^2 <dq, dq'>, the scale being in the key rows already.
    vec key_uu = {}, key_wu = {}, slot_uu = {}, slot_wu = {};
    for (Index r = 0; r < s.R; ++r) {
      const vec u = load(rows + (at.u + r) * length + k);
      const vec both = u * load(rows + (at.w + r) * length + k);
      (r < s.M ? key_uu : slot_uu) += u * u;
      (r < s.M ? key_wu : slot_wu) += both;
    }
    sums.u_square += x_square * (key_uu + slot_uu) + slot_uu;
    sums.wu += x_square * (key_wu + slot_wu) + slot_wu;
  }
}

// Neuron j's results, from the products of its stacked rows with what it reads and, last, with 1:
// [rows][depth + 1].
void write_results(const Shape& s, const Mixing* mixing, Index j, const real* products,
                   const Sums& sums, Gradients& out) {
  const Stacked at(s, mixing);
  const Index MN = s.M * s.N, depth = s.depth(j), columns = depth + 1;
  const auto copy = [&](Index first, Index count, Index from, Index length, real* to) {
    for (Index r = 0; r < count; ++r)
      std::copy_n(products + (first + r) * columns + from, length, to + (j * count + r) * length);
  };
  if (out.weight_h) {
    copy(at.policy, s.R, 0, s.L, out.weight_h);
    if (j < s.X) copy(at.policy, s.R, s.L, s.E, out.weight_x);
    copy(at.policy + s.M, MN, depth, 1, out.bias);
  }
  if (out.predictor_h) {
    copy(0, MN, 0, s.L, out.predictor_h);
    if (j < s.X) copy(0, MN, s.L, s.E, out.predictor_x);
    copy(0, MN, depth, 1, out.predictor_bias);
  }
  if (at.end == at.w) return;
  double square_sum_u = 0, sums_wu = 0;
  for (Index r = 0; r < s.R; ++r) {
    const real *w = products + (at.w + r) * columns, *u = products + (at.u + r) * columns;
    const Index count = r < s.M ? depth : columns;  // keys have no bias
    square_sum_u += inner(u, u, count);
    sums_wu += inner(w, u, count);
  }
  out.moments[j] = sum(sums.u_square);
  out.moments[s.W + j] = sum(sums.wu);
  out.moments[2 * s.W + j] = square_sum_u;
  out.moments[3 * s.W + j] = sums_wu;
}

// Adds one neuron's sums to the statistics and starts them anew.
void collect(Sums& sums, double* statistics) {
  statistics[0] += sum(sums.residual_square);
  statistics[1] += sum(sums.true_length);
  statistics[2] += sum(sums.mixed_length);
  statistics[3] += sum(sums.guess_length);
  sums = Sums{};
}

void take_means(const Shape& s, double num_valid, double* statistics) {
  for (int i = 0; i < 4; ++i) statistics[i] /= num_valid * s.W * (i ? 1 : s.N);
}

// Of a group of `count` sequences: adds their parameter gradients w and u = s - w, of one neuron, to
// `products`, and the moments of each to `sums`. `by_lane` is [2 R][columns][V], keys first, the
// last column the bias.
void sum_episodes(const Shape& s, const Stacked& at, Index count, Index columns,
                  const real* by_lane, real* products, Sums& sums) {
  const real share = real(count) / V;  // each sequence has so many lanes, all of them alike
  for (Index r = 0; r < s.R; ++r) {
    const real *w_row = by_lane + r * columns * V, *u_row = w_row + s.R * columns * V;
    const Index end = r < s.M ? columns - 1 : columns;  // keys have no bias
    vec u_square = {}, wu = {};
    for (Index first = 0; first < end; first += V) {
      const Index width = std::min<Index>(V, end - first);
      vec w[V] = {}, u[V] = {};
      for (Index i = 0; i < width; ++i) {
        w[i] = load(w_row + (first + i) * V);
        u[i] = load(u_row + (first + i) * V);
        const vec of_one = fold_lanes(u[i], count);
        u_square += of_one * of_one;
        wu += fold_lanes(w[i], count) * of_one;
      }
      const vec w_sums = sum_lanes(w), u_sums = sum_lanes(u);
      for (Index i = 0; i < width; ++i) {
        products[(at.w + r) * columns + first + i] += w_sums[i];
        products[(at.u + r) * columns + first + i] += u_sums[i];
      }
    }
    sums.u_square += u_square * share;
    sums.wu += wu * share;
  }
}

// Everything that is a sum over all samples, once the received gradients are known: neuron by
// neuron, chunk by chunk, all row gradients of a neuron stacked so that one product serves all.
void sum_samples(const Layer& layer, const Shape& s, Workspace& w,
                 const std::vector<Group>& groups, const Mixing* mixing, bool needs_x,
                 Gradients& out) {
  const Index MN = s.M * s.N;
  const Stacked at(s, mixing);
  const bool episodes = sums_episodes(mixing);
  double num_valid = 0;
  for (Index k = 0; k < w.row; ++k) num_valid += w.valid[k];
  num_valid = std::max(num_valid, 1.0);
  const real per_term = real(2 / (num_valid * s.W * s.N));
  Rows inputs, shifted, output(s.N);
  std::vector<real*> rows, inputs_gradient;
  list_rows(rows, w.panel_rows + at.policy * w.panel, s.R, w.panel);
  std::fill(out.statistics, out.statistics + 4, 0.0);
  for (Index j = 0; j < s.W; ++j) {
    list_inputs(layer, s, w, j, inputs);
    const Index depth = s.depth(j);
    inputs.push_back(w.ones);
    std::fill(w.sums, w.sums + at.end * (depth + 1), real(0));
    Sums sums;
    for_chunks(s, w, groups, [&](Chunk c) {
      const Index first = c.first * s.W + j;
      const Index state = c.first * s.state_step() + j * s.N * s.B + c.sequence;
      const auto gather = [&](real* to, const real* from, Index step_length, Index rows) {
        gather_steps(to, w.panel, from, step_length, s.B, rows, c.steps, c.batch);
      };
      gather(w.panel_attention, w.attention + first * s.M * s.B + c.sequence, s.W * s.M * s.B,
             s.M);
      gather(w.panel_slots, w.slots + first * MN * s.B + c.sequence, s.W * MN * s.B, MN);
      gather(w.panel_gradient, w.received + state, s.state_step(), s.N);
      if (mixing) {
        gather(w.panel_prediction, w.predicted + state, s.state_step(), s.N);
        for (Index t = 0; t < c.steps; ++t)
          for (Index b = 0; b < c.batch; b += V)
            store(w.panel_weight + t * c.batch + b, splat(w.schedule[(c.first + t) * s.W + j]));
        // Lanes past the last sample count as zeros below: they must not hold NaN.
        store(w.panel_weight + c.samples, vec{});
      }
      for (Index n = 0; n < s.N; ++n)
        output[n] = w.states_by_neuron + (j * s.N + n) * w.row + c.offset + c.batch;
      shifted = inputs;
      for (const real*& row : shifted) row += c.offset;
      const Samples samples{c.samples, w.panel, w.panel_attention, w.panel_slots, w.panel_gradient,
                            w.panel_prediction, w.panel_weight, w.valid + c.offset, nullptr,
                            layer.noise_std > 0 ? nullptr : output.data(), shifted.data(), depth};
      fill_rows(s, real(layer.scale), mixing, per_term, samples, w.panel_rows, w.panel_vectors,
                sums);
      dot(episodes ? at.w : at.end, depth + 1, c.samples, w.panel_rows, w.panel, shifted.data(),
          w.sums);
      if (episodes) {
        dot_lanes(2 * s.R, depth + 1, c.samples, w.panel_rows + at.w * w.panel, w.panel,
                  shifted.data(), w.sums_by_lane, c.first > 0);
        if (c.first + c.steps == s.T)
          sum_episodes(s, at, c.batch, depth + 1, w.sums_by_lane, w.sums, sums);
      }
      if (j < s.X && needs_x) {
        list_rows(inputs_gradient, w.inputs_gradient + c.offset, s.E, w.row);
        multiply<true>(s.E, s.R, layer.weight_x + j * s.R * s.E, rows.data(), c.samples,
                 inputs_gradient.data(), nullptr);
      }
    });
    write_results(s, mixing, j, w.sums, sums, out);
    collect(sums, out.statistics);
  }
  take_means(s, num_valid, out.statistics);
}

// -------------------------------------------------------------------------- feed-forward stack

struct StackWorkspace {
  std::vector<real*> bias;                        // [W][R], 0 for the keys
  std::vector<real*> states, output;              // [inputs or W * N][lanes], by layer
  std::vector<real*> attention, slots;            // [W][M], [W][M * N]
  real* scores;
  // Backward only.
  real *gradient[2];                              // [inputs or W * N]
  real *guesses, *prediction, *weight, *valid, *slope;
  real *rows, *vectors, *ones, *zeros, *sums;
  real *read, *read_by_sample;                    // [L + 1][lanes], [lanes][read_row]
  Index read_row;
  Index total;

  StackWorkspace(const Stack& k, const Shape& s, bool keep, real* block) {
    Cutter take(block);
    const Index MN = s.M * s.N, WN = s.W * s.N, wide = std::max(k.inputs, WN);
    const Index length = s.lanes;
    for (Index l = 0; l < k.count; ++l) bias.push_back(take(s.W * s.R));
    states.push_back(take(k.inputs * length));
    for (Index l = 0; l < k.count; ++l) {
      const bool again = !keep && l;  // without a record the layers share their memory
      states.push_back(!keep && l > 1 ? states[l - 1] : take(WN * length));
      output.push_back(again ? output[0] : take(WN * length));
      attention.push_back(again ? attention[0] : take(s.W * s.M * length));
      slots.push_back(again ? slots[0] : take(s.W * MN * length));
    }
    scores = take(s.M * length);
    if (keep) {
      gradient[0] = take(wide * length);
      gradient[1] = take(wide * length);
      guesses = take(MN * length);
      prediction = take(s.N * length);
      weight = take(length);
      valid = take(length);
      slope = take(s.N * length);
      rows = take((3 * s.R + MN) * length);
      vectors = take(3 * s.N * length);
      ones = take(length);
      zeros = take(3 * s.R + MN);
      read_row = (s.L + V) / V * V;
      read = take((s.L + 1) * length);
      read_by_sample = take(length * read_row);
      sums = take((3 * s.R + MN) * (s.L + 1));
    }
    total = take.total();
  }
};

// A shape whose batch fills whole vectors: all rows are then as long as their lanes.
Shape stack_shape(const Stack& k, Index batch) {
  return Shape(k.layers[0], 1, vectors(batch) * V);
}

// The rows that neuron j of layer l reads.
void list_stack_inputs(const Stack& k, const Shape& s, Index l, Index j, const real* below,
                       const real** rows) {
  const Layer& layer = k.layers[l];
  if (l)
    list_parents(layer, s, j, below, s.lanes, rows);
  else
    for (Index i = 0; i < s.L; ++i) rows[i] = below + layer.parent[j * s.L + i] * s.lanes;
}

// noise [B][count][W * N] or null; it is added to the layers' states.
void stack_forward(const Stack& k, const Shape& s, StackWorkspace& w, const real* noise,
                   Index batch) {
  for (Index l = 0; l < k.count; ++l) {
    layer_forward(k.layers[l], s, w.bias[l], w.scores, w.attention[l], w.slots[l],
                  w.output[l], [&](Index j, const real** rows) {
                    list_stack_inputs(k, s, l, j, w.states[l], rows);
                  });
    const bool residual = k.residual && l;
    for (Index i = 0; i < s.W * s.N * s.lanes; i += V) {
      const vec output = load(w.output[l] + i);
      store(w.states[l + 1] + i, residual ? tanh(output) + load(w.states[l] + i) : output);
    }
    if (noise)
      add_noise(k.layers[l], s, noise + l * s.W * s.N, k.count * s.W * s.N, batch,
                w.states[l + 1], s.lanes);
  }
}

// One layer going back: the gradient of its state, `now`, becomes that of what it reads, `below`
// (null: not wanted).
void layer_backward(const Stack& k, const Shape& s, StackWorkspace& w, const Mixing* mixing,
                    Index l, Index batch, const real* now, real* below, Gradients& out) {
  const Layer& layer = k.layers[l];
  const Stacked at(s, mixing);
  const Index MN = s.M * s.N, length = s.lanes;
  const bool residual = k.residual && l;
  const real per_term = real(2.0 / (double(batch) * s.W * s.N));
  // What nobody wants is left out of the products.
  const Index first = out.predictor_h ? 0 : at.policy, end = out.weight_h ? at.end : at.policy;
  Rows inputs(s.L + 1), output(s.N), policy_rows(s.R);
  Rows by_sample(length);
  std::vector<real*> guesses, sums_rows, to(s.L);
  list_rows(guesses, w.guesses, MN, length);
  list_rows(sums_rows, w.sums, at.end, s.L + 1);
  for (Index b = 0; b < length; ++b) by_sample[b] = w.read_by_sample + b * w.read_row;
  for (Index r = 0; r < s.R; ++r) policy_rows[r] = w.rows + (at.policy + r) * length;
  inputs[s.L] = w.ones;
  std::fill(out.statistics, out.statistics + 4, 0.0);
  if (below) std::fill(below, below + (l ? s.W * s.N : k.inputs) * length, real(0));
  for (Index j = 0; j < s.W; ++j) {
    list_stack_inputs(k, s, l, j, w.states[l], inputs.data());
    const real* attention = w.attention[l] + j * s.M * length;
    if (mixing) {
      predict(layer, s, j, inputs.data(), attention, length, length, guesses.data(),
              w.prediction);
      for (Index n = 0; n < s.N; ++n)  // zeros after the last sample
        for (Index b = batch; b < length; ++b) w.prediction[n * length + b] = 0;
      std::fill(w.weight, w.weight + length, mixing->mixing_weight[j]);
    }
    for (Index n = 0; n < s.N; ++n) {
      output[n] = w.output[l] + (j * s.N + n) * length;
      if (residual)
        for (Index b = 0; b < length; b += V) {
          const vec branch = tanh(load(output[n] + b));
          store(w.slope + n * length + b, 1 - branch * branch);
        }
    }
    const Samples samples{length, length, attention, w.slots[l] + j * MN * length,
                          now + j * s.N * length, w.prediction, w.weight, w.valid,
                          residual ? w.slope : nullptr, output.data(), inputs.data(), s.L};
    Sums sums;
    fill_rows(s, real(layer.scale), mixing, per_term, samples, w.rows, w.vectors, sums);
    if (first < end) {
      // The samples are few: too few for `dot`, which ends with a sum over lanes.
      for (Index i = 0; i <= s.L; ++i)
        std::copy_n(inputs[i], length, w.read + i * length);
      transpose<true>(w.read_by_sample, w.read_row, w.read, length, s.L + 1, length);
      multiply(end - first, length, w.rows + first * length, by_sample.data(), s.L + 1,
               sums_rows.data() + first, w.zeros);
      write_results(s, mixing, j, w.sums, sums, out);
    }
    collect(sums, out.statistics);
    if (!below) continue;
    if (residual)
      for (Index i = 0; i < s.N * length; i += V) {
        real* row = below + j * s.N * length + i;
        store(row, load(row) + load(w.vectors + i));
      }
    for (Index i = 0; i < s.L; ++i)
      to[i] = below + (inputs[i] - w.states[l]);
    multiply<true>(s.L, s.R, layer.weight_h + j * s.R * s.L, policy_rows.data(), length,
             to.data(), nullptr);
  }
  take_means(s, batch, out.statistics);
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
// starts from h_0 [B][W * N] (null: zeros); the others must follow in order, on the same block. noise
// is as long as out, or null.
void sgrl_forward(const Layer* layer, Index steps, Index batch, std::int32_t keep, Index first,
                  Index stop, const real* x, const real* h_0, const real* noise, real* out,
                  real* block) {
  const Shape s(*layer, steps, batch);
  Workspace w(s, keep, block);
  if (first == 0) start_forward(*layer, s, w, h_0);
  for (Index t = first; t < stop; ++t) {
    if (s.X) transpose<true>(w.external, s.lanes, x + (t - first) * s.B * s.E, s.E, s.B, s.E);
    const Index place = (t - first) * s.B * s.W * s.N;
    step_forward(*layer, s, w, t, noise ? noise + place : nullptr);
    write_states(s, w, t, out + place);
  }
}

Index sgrl_policy_workspace(const Policy* policy, const Layer* layer, Index batch) {
  return PolicyWorkspace(*policy, Shape(*layer, 1, batch), nullptr).total;
}

// Step `t` of an unroll from the zero state, the policy's other parts with it: observations [B][F]
void sgrl_policy_act(const Policy* policy, const Layer* layer, Index steps, Index batch,
                     std::int32_t keep, Index t, const real* observations, const real* noise,
                     real* x, real* states, real* logits, real* block, real* policy_block) {
  const Shape s(*layer, steps, batch);
  const Policy& p = *policy;
  Workspace w(s, keep, block);
  PolicyWorkspace q(p, s, policy_block);
  if (t == 0) {
    const Index rows = 2 * p.actions * p.slots;
    start_forward(*layer, s, w, nullptr);
    std::fill(q.zeros, q.zeros + rows, real(0));
  }
  encode(p, s, w, q, observations);
  transpose<false>(x, s.E, w.external, s.lanes, s.E, s.B);
  step_forward(*layer, s, w, t, noise);
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
  const std::vector<Group> groups = make_groups(s, sums_episodes(mixing));
  Workspace w(s, true, block);
  arrange_samples(s, w, groups, x, mask);
  if (mixing) {
    make_schedule(*layer, s, *mixing, w.schedule);
    predict_all(*layer, s, w, groups);
  }
  carry_back(*layer, s, w, mixing, mask, grad_output, grad_h0);
  sum_samples(*layer, s, w, groups, mixing, grad_x, *out);
  if (grad_x) write_inputs_gradient(s, w, groups, grad_x);
}

Index sgrl_stack_workspace(const Stack* stack, Index batch, std::int32_t keep) {
  return StackWorkspace(*stack, stack_shape(*stack, batch), keep, nullptr).total;
}

// x [B][inputs] and noise [B][layers][W * N] (or null) -> out [B][W * N], `piece` samples at a time
// (all of them if to be kept).
void sgrl_stack_forward(const Stack* stack, Index batch, Index piece, std::int32_t keep,
                        const real* x, const real* noise, real* out, real* block) {
  const Shape s = stack_shape(*stack, piece);
  StackWorkspace w(*stack, s, keep, block);
  for (Index l = 0; l < stack->count; ++l)
    spread_bias(stack->layers[l], s, w.bias[l]);
  const Index inputs = stack->inputs, WN = s.W * s.N;
  for (Index first = 0; first < batch; first += piece) {
    const Index count = std::min(piece, batch - first);
    for (Index i = 0; i < inputs && count < s.lanes; ++i)
      std::fill(w.states[0] + i * s.lanes + count, w.states[0] + (i + 1) * s.lanes, real(0));
    transpose<false>(w.states[0], s.lanes, x + first * inputs, inputs, count, inputs);
    stack_forward(*stack, s, w, noise ? noise + first * stack->count * WN : nullptr, count);
    transpose<false>(out + first * WN, WN, w.states[stack->count], s.lanes, WN, count);
  }
}

// Backward of all layers after a forward that kept its record in `block`. mixing and out: one for
// each layer (mixing null under backprop); grad_output [B][W * N] -> grad_x [B][inputs] (or null).
void sgrl_stack_backward(const Stack* stack, Index batch, const Mixing* mixing,
                         const real* grad_output, real* grad_x, Gradients* out, real* block) {
  const Shape s = stack_shape(*stack, batch);
  StackWorkspace w(*stack, s, true, block);
  const Index WN = s.W * s.N;
  std::fill(w.ones, w.ones + s.lanes, real(1));
  std::fill(w.zeros, w.zeros + 3 * s.R + s.M * s.N, real(0));
  for (Index b = 0; b < s.lanes; ++b) w.valid[b] = b < batch;
  real *now = w.gradient[0], *below = w.gradient[1];
  transpose<true>(now, s.lanes, grad_output, WN, batch, WN);
  for (Index l = stack->count - 1; l >= 0; --l, std::swap(now, below))
    layer_backward(*stack, s, w, mixing ? mixing + l : nullptr, l, batch, now,
                   l || grad_x ? below : nullptr, out[l]);
  if (grad_x) transpose<false>(grad_x, stack->inputs, now, s.lanes, stack->inputs, batch);
}

}  // extern "C"

#include "dense_policy.h"
