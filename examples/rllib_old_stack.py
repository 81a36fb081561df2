"""GRU, LSTM and SparseNet as models of RLlib's old API stack, in a grid search, with one report.

The three `RecurrentNetwork`s of `sgrl.rllib.recurrent_network` train under PPO, each a trial of
`tune.grid_search`. Tune's folder is read as Tune leaves it: the script ends with the page that
`sgrl report` makes of it. Prints the mean return of each, and SparseNet's mean mixing weight.

    python examples/rllib_old_stack.py

Takes about two minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
from ray import tune
from torch import nn

import sgrl
from sgrl.analysis.report import write_report
from sgrl.rllib import PPOConfig


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the trained SparseNet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=10, help="of PPO")
    parser.add_argument("--batch", type=int, default=1600, help="environment steps an iteration")
    parser.add_argument("--steps", type=int, default=80, help="of an episode, at most")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder")
    options = parser.parse_args(arguments)

    config = (
        PPOConfig()
        .api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
        .environment("labyrinth_escape", env_config={"episode_length": options.steps})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=20, batch_mode="complete_episodes")
        .training(
            lr=5e-4,
            predictor_lr=1e-5,
            train_batch_size=options.batch,
            minibatch_size=options.batch,
            num_epochs=2,
            model={
                "custom_model": tune.grid_search(["sgrl_gru", "sgrl_lstm", "sgrl_sparsenet"]),
                "max_seq_len": options.steps,
            },
        )
        .debugging(seed=0, log_level="ERROR")
    )
    results = tune.Tuner(
        "sgrl_PPO",
        param_space=config,
        run_config=tune.RunConfig(
            name="old_stack_example",
            storage_path=str(options.results.absolute()),
            stop={"training_iteration": options.iterations},
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            verbose=0,
        ),
    ).fit()
    for result in results:
        model = result.config["model"]["custom_model"]
        print(f"{model}: return {result.metrics['env_runners']['episode_return_mean']:.2f}")
        if model == "sgrl_sparsenet":
            policy = sgrl.load_policy(result.checkpoint.path)
    print(f"written: {write_report([results.experiment_path])}")
    weights = [b for name, b in policy.named_buffers() if name.endswith("mixing_weight")]
    print(f"mean lambda {torch.cat(weights).mean().item():.3f}")
    return policy


if __name__ == "__main__":
    main()
