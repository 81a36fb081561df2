"""How far gradients of a real network are from the true one, and what mixing in would save.

For a policy on its task: the true gradient g* under backprop, estimated from a large sample, and
per neuron the mean squared error of the mean of n samples under backprop and under sgprop
(Lemma 1), the best mixing weight (equation 18), and how much of what a neuron is told by the
network above it could know from its own inputs (condition B). A sample is one image or one whole
episode.

Neuron i receives the gradient g (layers above mix with their present lambda), predicts s, and its
parameter gradients, of keys, matrices and biases together, are of four kinds:

    received w (from g), synthetic s, mixed m = lambda w + (1 - lambda) s, and backprop b,
    which it would receive if nothing were mixed anywhere: g* = E[b]

One sample's parameter gradient is a linear function of its feedback, and `isometry` has the inner
products: <w, w'> = <g E, g' E> with a matrix E of N rows. So none is formed for a single sample,
but where an episode's is a sum over time; what is formed is each shard's mean, for the chosen
neurons.

What can follow an image on the bandit is enumerated, not drawn: all guesses and rewards with their
probabilities. Mean and variance of an image's gradients are exact, and only images are sampled. A
whole finite population can be given as one shard, with probabilities; then all numbers are exact.

Squared norms of means, |E w|^2 or Bias^2, are estimated from products between different shards
of the sample, which makes them unbiased (and, where they are small, at times negative). Intervals
are the percentile bootstrap's over shards: `RESAMPLES` times, as many shards are drawn with
replacement, the same for all neurons; products of a shard with itself are left out there too.

Source: the paper, Sections 3 and 4.
"""

from sgrl.theory.probe.bounds import measure_bounds
from sgrl.theory.probe.run import NUM_SHARDS, Report, check_settings, fresh_policy, probe

__all__ = ["NUM_SHARDS", "Report", "check_settings", "fresh_policy", "measure_bounds", "probe"]
