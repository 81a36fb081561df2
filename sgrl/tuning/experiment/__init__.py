"""Experiment files: one YAML in, a validated list of trials out, before Ray is started.

    name: labyrinth_escape               # also the name of the results folder
    algorithm: Reinforce                 # or RLlib's PPO, APPO or IMPALA
    config:                              # sections: AlgorithmConfig methods; keys: their arguments
      environment: {env: labyrinth_escape, env_config: {maze_dims: [6, 6]}}
      training: {lr: {grid: [5.0e-4, 1.0e-3]}}
    methods:                             # the models compared side by side
      gru: {model: {policy: gru}}
      sparsenet: {model: {policy: sparsenet}, config: {training: {lr: 2.0e-3}}}
    seeds: [0, 1, 2]
    stop: {training_iteration: 300}
    checkpoint: {every: 25, keep: 2}
    evaluate: null                       # or {every: 10, episodes: 100}: apart from training
    max_failures: 2                      # restarts of a trial without a new checkpoint in between
    iteration_timeout: null              # seconds after which an iteration counts as hung
    num_threads: 1                       # torch threads of one trial
    concurrency: auto                    # trials at a time: as many as fit, or a number
    track: none                          # where else the curves go: tensorboard, wandb or mlflow
    callbacks: null                      # or a class of your own, as in my_package:MyCallbacks

`{grid: [...]}` anywhere under `config`, `stop` or a method's `model` and `config` sweeps that
value; only a policy is not swept, as a method has one. One trial is one method, one grid point and
one seed. Sections that begin with `x-` are ignored: they hold what YAML aliases repeat.

From the YAML to the trials:

- `load.py`: `load_experiment` and `extend_experiment`, which call all others in turn
- `edits.py`: what `--set`, `--methods`, `--seeds` and `--add` change
- `file.py`: the keys of the file itself, as pydantic models
- `method.py`: a method's model: policy, defaults and backend
- `sections.py`: `config` against RLlib's AlgorithmConfig
- `places.py`: where every key stands, for hints
- `checks.py`: one grid point: its values, environment and RLlib's own checks
- `sgrl.results.plan`: grids and trials, which reading results needs too
- `resources.py`: what the trials hold while they run
"""
