"""GRU, LSTM and SparseNet compared by a plain Tuner (new API stack).

One `Tuner` over three models, without an experiment file. `ResultsCallback` makes its folder one
that `sgrl status`, `report` and `compare` read; run again after it was killed, the script restores
what there is and goes on. Prints the success rate of each trial, and SparseNet's mean mixing
weight.

    python examples/tune_gru_lstm_sparsenet.py
    sgrl report results/tune_example

Takes about a minute on two cores.
"""

import argparse
from pathlib import Path

import torch
from ray import tune
from torch import nn

import sgrl
from sgrl.rllib import ReinforceConfig
from sgrl.tuning.callback import ResultsCallback, trial_name


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the trained SparseNet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=30, help="of each trial")
    parser.add_argument("--steps", type=int, default=80, help="of an episode, at most")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder")
    options = parser.parse_args(arguments)
    folder = options.results.absolute() / "tune_example"

    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), "Reinforce", restart_errored=True)
    else:
        models = [
            {"policy": "gru"},
            {"policy": "lstm"},
            {"policy": "sparsenet", "propagation": "sgprop"},
        ]
        config = (
            ReinforceConfig()
            .environment("labyrinth_escape", env_config={"episode_length": options.steps})
            .rl_module(model_config=tune.grid_search(models))
        )
        tuner = tune.Tuner(
            "Reinforce",
            param_space=config,
            tune_config=tune.TuneConfig(trial_dirname_creator=trial_name),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                stop={"training_iteration": options.iterations},
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=10, num_to_keep=2, checkpoint_at_end=True
                ),
                callbacks=[ResultsCallback()],
                verbose=0,
            ),
        )
    for result in tuner.fit():
        print(f"{Path(result.path).name}: success rate {result.metrics['sgrl']['success_rate']}")
        if result.config["_model_config"]["policy"] == "sparsenet":
            policy = sgrl.load_policy(result.checkpoint.path)
    weights = [b for name, b in policy.named_buffers() if name.endswith("mixing_weight")]
    print(f"mean lambda {torch.cat(weights).mean().item():.3f}")
    return policy


if __name__ == "__main__":
    main()
