"""What every column holds of the CSV files that sweeps and reports write.

The names that figures and tables give to columns come from here, and so does docs/metrics.md.
"""

from typing import NamedTuple

from sgrl.markdown import markdown_table
from sgrl.results.folder import SweepFolder, TrialFolder


class Column(NamedTuple):
    """One column.

    Attributes:
        name: in figures and tables.
        line: what it holds.
    """

    name: str
    line: str


#: metrics.csv, a row an iteration, in the order of the file. Of layers, and of evaluations, there
#: may be none.
METRICS = {
    "iteration": Column("iteration", "1, 2, ... without gaps."),
    "env_steps": Column(
        "environment steps", "Steps that the environments really took in training so far."
    ),
    "padded_env_steps": Column(
        "environment steps, padding included",
        "Batches times environments times T so far: the published axis; empty for algorithms that "
        "pad nothing.",
    ),
    "episodes": Column("episodes", "Training episodes that have ended so far."),
    "success_rate": Column(
        "success rate",
        "Share of the iteration's training episodes that succeeded; empty where the environment "
        "knows no success.",
    ),
    "episode_return_mean": Column(
        "episode return", "Mean undiscounted return of the iteration's training episodes."
    ),
    "episode_length_mean": Column(
        "episode length", "Mean steps of the iteration's training episodes."
    ),
    "eval_reward": Column(
        "test reward",
        "Mean return of the evaluation of RLlib's section `config.evaluation`, of the bandit on "
        "test images without flipped rewards; empty between evaluations.",
    ),
    "policy_loss": Column(
        "policy loss",
        "Of `Reinforce`, minus the mean over valid steps of log probability times return; the "
        "entropy bonus is not in it.",
    ),
    "entropy": Column(
        "entropy", "Mean entropy of the action distribution over valid steps, in nats."
    ),
    "grad_norm": Column(
        "gradient norm",
        "L2 norm of the gradient of the policy's parameters (predictors apart) before clipping.",
    ),
    "predictor_loss": Column(
        "predictor loss",
        "Mean squared error of the predictions of the gradient, over samples, neurons and their "
        "dimensions; summed over layers.",
    ),
    "received_grad_norm": Column(
        "received gradient",
        "Mean length of g, the gradient that a neuron receives for one sample, over samples and "
        "neurons.",
    ),
    "mixed_grad_norm": Column(
        "mixed gradient",
        "Mean length of lambda g + (1 - lambda) s, which the neuron uses and passes on.",
    ),
    "prediction_norm": Column(
        "predicted gradient", "Mean length of s, the neuron's prediction of g."
    ),
    **{
        f"mixing_weight_{key}": Column(
            f"mixing weight, {words}", f"{words.capitalize()} of lambda over all neurons."
        )
        for key, words in {
            "mean": "mean",
            "min": "minimum",
            "p25": "lower quartile",
            "median": "median",
            "p75": "upper quartile",
            "max": "maximum",
        }.items()
    },
    "layerL_mixing_weight_mean": Column(
        "mixing weight of a layer, mean",
        "The same of layer L alone (0, 1, ...), and likewise `_min`, `_p25`, `_median`, `_p75` and "
        "`_max`; where layers mix, except in a recurrent SparseNet.",
    ),
    "value_loss": Column(
        "value loss",
        "Of PPO, APPO and IMPALA: mean squared error of the value head (APPO and IMPALA: half of "
        "it), in the iteration's last minibatch.",
    ),
    "kl": Column(
        "KL divergence",
        "Of PPO and APPO: mean of KL(policy that acted, policy now) over the last minibatch's "
        "steps, before its update.",
    ),
    "clip_fraction": Column(
        "clip fraction",
        "Of PPO: share of the last minibatch's steps whose probability ratio is outside of 1 -+ "
        "clip_param.",
    ),
    "explained_variance": Column(
        "explained variance",
        "Of PPO: 1 - variance of (target - value) / variance of the value targets, over the last "
        "minibatch's steps.",
    ),
    "eval_success_rate": Column(
        "success rate in evaluation",
        "Success rate of the evaluation that the key `evaluate` asks for, actions sampled; empty "
        "between evaluations, like the three that follow.",
    ),
    "eval_return": Column(
        "episode return in evaluation", "Mean return of the same episodes, actions sampled."
    ),
    "eval_greedy_success_rate": Column(
        "success rate in evaluation, likeliest actions", "Success rate with the likeliest actions."
    ),
    "eval_greedy_return": Column(
        "episode return in evaluation, likeliest actions", "Mean return with the likeliest actions."
    ),
    "iteration_seconds": Column(
        "seconds", "Wall time of the iteration's training; the key `evaluate` is not counted."
    ),
}

#: summary.csv, a row a trial.
SUMMARY = {
    "trial": "Name of the trial and of its folder.",
    "method": "Its method.",
    "...": "A column for every swept value, by the last part of its key.",
    "seed": "Its seed.",
    "state": "pending, running, interrupted, completed, failed, stopped (early) or skipped.",
    "iterations": "Rows of its table of metrics.",
    "final_MEASURE": "Final score; MEASURE is success_rate, eval_reward or episode_return_mean.",
    "auc": "Area under that measure's curve over `env_steps`, divided by its span.",
    "reason": "Why it failed, was stopped or skipped.",
}

#: comparison.csv, a row a method and point of the swept values.
COMPARISON = {
    "method": "The method, followed by the swept values.",
    "trials": "Its completed trials, which the scores are of.",
    "failed": "Trials that failed.",
    "stopped": "Trials that a schedule stopped early.",
    "skipped": "Trials that the results of others made needless.",
    "unfinished": "Trials that are none of these.",
    "final_MEASURE": "Mean final score over trials.",
    "auc": "Mean AUC over trials. What follows is there of both scores, here as SCORE.",
    "SCORE_sem": "Standard error of that mean.",
    "SCORE_iqm": "Interquartile mean.",
    "SCORE_median": "Median.",
    "SCORE_median_ci_low": "Lower limit of its 95% interval; empty with fewer than five seeds.",
    "SCORE_median_ci_high": "Upper limit.",
    "x": "The axis that the AUC is taken over.",
}

#: pairs.csv, a row a pair of methods, each at its best learning rate.
PAIRS = {
    "first": "One method.",
    "second": "The other.",
    "tasks": "Points of the other swept values at which both have completed trials.",
    "first_trials": "Completed trials of the first.",
    "second_trials": "Completed trials of the second.",
    "fewest_seeds": "Fewest trials of a method in a task.",
    "difference": "Of the mean AUCs, first less second, averaged over tasks.",
    "probability": "That a run of the first has the higher AUC, ties counting half.",
    "probability_ci_low": "Lower limit of its 95% interval.",
    "probability_ci_high": "Upper limit.",
    "p": "Two-sided p-value of the rank test.",
    "smallest_p": "Smallest p that so many seeds can give.",
    "detectable_difference": "Smallest true difference that is found with power 0.8.",
    "confounded_by": "What else differs between the methods, or nothing.",
    "seeds_needed": "With `--plan D`, seeds a method and task that find a difference of D.",
    "p_holm": "p corrected for the number of pairs by Holm's method.",
    "verdict": "differs, no difference or cannot tell, with its reason.",
    "x": "The axis that the AUC is taken over.",
}


def columns_page() -> str:
    """Return the tables of all columns in Markdown, as docs/metrics.md holds them."""
    head = ("column", "name", "what it holds")
    rows = [(f"`{key}`", column.name, column.line) for key, column in METRICS.items()]
    sweep, trial = SweepFolder(""), TrialFolder("")
    parts = [f"## {trial.metrics.name}: a row an iteration\n\n" + markdown_table(head, rows)]
    for title, table in {
        f"{sweep.summary.name}: a row a trial": SUMMARY,
        f"{sweep.comparison.name}: a row a method and swept point": COMPARISON,
        f"{sweep.pairs.name}: a row a pair of methods": PAIRS,
    }.items():
        lines = [(f"`{key}`", line) for key, line in table.items()]
        parts.append(f"## {title}\n\n" + markdown_table(("column", "what it holds"), lines))
    return "\n".join(parts)
