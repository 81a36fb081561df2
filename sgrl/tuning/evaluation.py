"""Evaluation apart from training, which an experiment's key `evaluate` switches on.

After every so many iterations a copy of the policy plays episodes that training never sees, once
with actions sampled as in training and once with the likeliest ones. They are the same episodes at
each evaluation, those of `sgrl evaluate --seed SEED` with the trial's seed, with and without
`--greedy`. Training is unaffected: evaluation has its own copy of the policy, environments and
random generators.
"""

from typing import Any

from ray.rllib.algorithms import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID

from sgrl.nn.policy import Policy
from sgrl.reinforce.generators import generators_aside
from sgrl.results.evaluation import play
from sgrl.results.plan import TrialConfig

#: Prefixes of the columns of an evaluation, and whether its actions are the likeliest.
ACTIONS = {"eval": False, "eval_greedy": True}


class Evaluation:
    """The evaluations of one trial.

    Args:
        trial: what it is trained with.
    """

    def __init__(self, trial: TrialConfig) -> None:
        self.settings = trial.evaluate
        self.environment = trial.sections["environment"]
        self.seed = trial.seed
        self.module: Any = None

    def columns(self, algorithm: Any, iteration: int) -> dict[str, float]:
        """Evaluate what an algorithm has learned, where the iteration has an evaluation.

        Returns:
            Columns of metrics.csv; empty where there is no evaluation.
        """
        if self.settings is None or iteration % self.settings.every:
            return {}
        found = {}
        with generators_aside([self.seed, iteration]):
            policy = self._copy(algorithm)
            for prefix, greedy in ACTIONS.items():
                episodes = play(policy, self.environment, self.settings.episodes, self.seed, greedy)
                found[f"{prefix}_return"] = episodes.returns.mean().item()
                if episodes.success is not None:
                    found[f"{prefix}_success_rate"] = episodes.success.double().mean().item()
        return found

    def _copy(self, algorithm: Any) -> Policy:
        """The policy as it is; of RLlib's in a module of its own: the learner may train on."""
        if not isinstance(algorithm, Algorithm):
            return algorithm.policy
        if self.module is None:
            spec = algorithm.config.get_rl_module_spec(spaces=algorithm.spaces)
            self.module = spec.build()
        self.module.set_state(algorithm.learner_group.get_weights()[DEFAULT_MODULE_ID])
        return self.module.policy
