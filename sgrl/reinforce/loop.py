"""The plain training loop: REINFORCE on whole episodes, with nothing but PyTorch.

It gives the same numbers as the RLlib algorithm `sgrl.rllib.Reinforce` with the same settings.
"""

import dataclasses
from collections.abc import Iterator

from sgrl.envs.registry import VectorEnv
from sgrl.nn.policy import Policy
from sgrl.reinforce.batch import StepCounts
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.schedules import Schedule, set_learning_rates, value_at
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update


def train(
    policy: Policy,
    env: VectorEnv,
    iterations: int,
    *,
    lr: Schedule = 2e-3,
    predictor_lr: Schedule = 1e-5,
    predictor_optimizer: str = "adam",
    predictor_memory: float = 0.95,
    seed: int = 0,
    entropy_coeff: Schedule | None = None,
    settings: UpdateSettings | None = None,
) -> Iterator[dict[str, float]]:
    """Train a policy; one iteration is one batch of one episode per environment.

    Args:
        policy: to train, in place. On a GPU the process is set up by `prepare_device`, so that a
            run repeats itself bit for bit.
        env: the environments.
        iterations: number of batches.
        lr: learning rate of the policy's parameters: a number, or [env_steps, value] pairs.
        predictor_lr: learning rate of the predictors of synthetic gradients.
        predictor_optimizer: how these learn (docs/predictors.md).
        predictor_memory: weight of the past in what that averages.
        seed: of environments and actions.
        entropy_coeff: weight of the entropy bonus, in place of the settings', as `lr`.
        settings: of each update; the published ones if None.

    Yields:
        One row of metrics an iteration: iteration, so far env_steps (steps really taken),
        padded_env_steps (T an episode, the published axis) and episodes; of the batch success_rate
        (unless the environment knows no success), episode_return_mean, episode_length_mean, and
        those of `update`.

    Example:
        >>> env = make_vector("labyrinth_escape", 20, {})
        >>> actions = action_space_of(env.action_space)  # of whatever kind
        >>> policy = make_policy("sparsenet", env.observation_size, actions)
        >>> for row in train(policy, env, iterations=300):
        ...     print(row["iteration"], row["success_rate"])
    """
    prepare_device(next(policy.parameters()).device)
    rollout = Rollout(env, policy, seed, keep=True)
    counts, settings = StepCounts(), settings or UpdateSettings()
    optimizers = make_optimizers(policy, lr, predictor_lr, predictor_optimizer, predictor_memory)
    for iteration in range(1, iterations + 1):
        batch = rollout.collect()
        set_learning_rates(optimizers, lr, predictor_lr, counts.env_steps)
        if entropy_coeff is not None:
            now = value_at(entropy_coeff, counts.env_steps)
            settings = dataclasses.replace(settings, entropy_coeff=now)
        counts.add(batch)
        measured = update(policy, optimizers, batch, settings)
        yield {
            "iteration": iteration,
            **vars(counts),
            **batch.statistics(),
            **measured,
        }
