"""Several runs of REINFORCE trained as one: a pack.

    pack = Pack(policies, make_device("labyrinth_escape", 30, 20, {}, "cuda"), settings)
    for _ in range(300):
        rows = pack.train()                  # one row a run, with the columns of `loop.train`

Every run has its own seed, learning rates and numbers of the update, and gets the numbers that it
would get by itself, up to rounding, whatever it is packed with (docs/gpu.md). A run whose loss or
gradient is no longer finite stays as it was before that update, is marked in `failed`, and the
others go on. On a GPU an iteration is captured once as a CUDA graph, and then replayed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgrl.envs.device import DeviceEnv
from sgrl.nn.actions import Discrete
from sgrl.nn.mixing import mixing_summaries
from sgrl.nn.policy import Policy
from sgrl.nn.stacked import Stacked, StackedActing, StackedSparseNet, misfit
from sgrl.nn.stacked_feedforward import StackedSparseMLP
from sgrl.nn.stacking import stack_policies
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.loss import discounted_returns
from sgrl.reinforce.rollout import MAX_SEED
from sgrl.reinforce.stacked_adam import StackedAdam
from sgrl.reinforce.update import UpdateSettings


@dataclass(frozen=True)
class RunSettings:
    """What one run of a pack has for itself.

    Attributes:
        seed: of environments and actions.
        lr: learning rate of the policy's parameters.
        predictor_lr: learning rate of the predictors of synthetic gradients.
        update: of each update; gamma, entropy_coeff and grad_clip may differ within a pack.

    Raises:
        ValueError: a seed or learning rate that is impossible; one line that names it.
    """

    seed: int = 0
    lr: float = 2e-3
    predictor_lr: float = 1e-5
    update: UpdateSettings = field(default_factory=UpdateSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed must be from 0 to {MAX_SEED - 1}, got {self.seed}")
        for name in ("lr", "predictor_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, got {getattr(self, name)}")


class PackBatch(NamedTuple):
    """One episode of every environment of every run; as `EpisodeBatch` with an axis S."""

    observations: Float[Tensor, "T S B F"]
    actions: Tensor  # int64 [T, S, B]
    rewards: Float[Tensor, "T S B"]
    mask: Bool[Tensor, "T S B"]
    success: Bool[Tensor, "S B"]
    acted: StackedActing


class Pack:
    """S runs of the plain loop (`sgrl.reinforce.loop.train`) as one.

    Args:
        policies: of the runs; see `stack_policies`. They stay as they are until `unstack`.
        env: S x B environments. On a GPU the process is set up by `prepare_device`.
        settings: of the runs.
        capture: whether an iteration is captured as a CUDA graph; None: on a GPU.

    Attributes:
        failed: bool [S], runs that were frozen.

    Raises:
        ValueError: the runs cannot be packed.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        env: DeviceEnv,
        settings: Sequence[RunSettings],
        capture: bool | None = None,
    ) -> None:
        prepare_device(env.device)
        if not len(policies) == len(settings) == env.num_runs:
            raise ValueError(
                f"{len(policies)} policies, {len(settings)} settings and environments of "
                f"{env.num_runs} runs are not a pack: there must be one of each for a run"
            )
        self.settings = settings
        update = settings[0].update
        for run in settings:
            for name in ("normalize_returns", "baseline", "two_phase"):
                if getattr(run.update, name) != getattr(update, name):
                    raise ValueError(f"runs of a pack must have the same {name}")
        if update.baseline != "none":
            raise ValueError('a pack takes no baseline other than "none"')
        if update.two_phase and not policies[0].two_phase:
            raise ValueError(f"two_phase is not for the policy {policies[0].name!r}")
        self.two_phase = update.two_phase
        self.env = env
        self.stacked: Stacked = stack_policies(policies, env.device)
        self._check_fit(policies[0])
        self.capture = env.device.type == "cuda" if capture is None else capture
        self.dtype = next(iter(self.stacked.parameters.values())).dtype
        of_runs = self.stacked.per_run
        self.gamma = torch.tensor([s.update.gamma for s in settings], dtype=torch.float64)
        self.gamma = self.gamma.to(env.device).unsqueeze(1)
        self.entropy_coeff = of_runs([s.update.entropy_coeff for s in settings])
        clips = [s.update.grad_clip for s in settings]
        self.grad_clip = of_runs([float("inf") if clip is None else clip for clip in clips])
        groups = zip(
            ("policy", "predictor"),
            self.stacked.split(),
            (of_runs([s.lr for s in settings]), of_runs([s.predictor_lr for s in settings])),
            strict=True,
        )
        self.optimizers = {name: StackedAdam(part, lr) for name, part, lr in groups if part}
        self.failed = torch.zeros(len(settings), dtype=torch.bool, device=env.device)
        self.batches = 0  # trained on
        self.drawn = 0
        self.env_steps = np.zeros(len(settings), np.int64)
        # As `Rollout` has it.
        mixed = [np.random.SeedSequence([s.seed, 0]).generate_state(1) for s in settings]
        self.generators = [torch.Generator().manual_seed(int(m[0])) for m in mixed]
        self._undrawn = [generator.get_state() for generator in self.generators]
        space = self.stacked.action_space
        shape = (env.episode_length, len(settings), env.num_envs, space.num_outputs)
        self.noise = torch.zeros(shape, dtype=self.dtype, device=env.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.columns: list[str] = []
        self.measured = torch.empty(0)

    def _check_fit(self, policy: Policy) -> None:
        env = self.env
        if policy.observation_size != env.observation_size:
            raise ValueError(
                f"the policies read {policy.observation_size} numbers, but an observation of the "
                f"environments has {env.observation_size}"
            )
        if policy.action_space != Discrete(env.num_actions):
            raise ValueError(
                f"the policies' actions are {policy.action_space}, the environments' "
                f"{Discrete(env.num_actions)}"
            )
        if isinstance(self.stacked, StackedSparseMLP) and env.episode_length > 1:
            raise ValueError(f"policy {policy.name!r} packs for episodes of one step only")

    def draw(self) -> None:
        """Lay out the next episodes and the noise of their actions."""
        env, space = self.env, self.stacked.action_space
        first = [s.seed * env.seed_spacing + self.drawn * env.num_envs for s in self.settings]
        env.load([[seed + e for e in range(env.num_envs)] for seed in first])
        # The next batch may be drawn when this one's state is asked for.
        self._undrawn = [generator.get_state() for generator in self.generators]
        noise = [
            space.noise(env.episode_length, env.num_envs, generator=generator)
            for generator in self.generators
        ]
        drawn = torch.stack(noise, dim=1)
        if self.noise.is_cuda:
            drawn = drawn.pin_memory()
        self.noise.copy_(drawn, non_blocking=True)
        self.drawn += 1

    def train(self) -> list[dict[str, float]]:
        """One iteration of all runs: a batch and an update.

        Returns:
            Of every run the row of metrics that `loop.train` yields. Those of a run that failed
            are of no update.
        """
        if self.drawn == self.batches:
            self.draw()
        with torch.autocast(self.env.device.type, enabled=False):
            if not self.capture:
                self.measured = self.iterate()
            elif self.graph is None:
                self._capture()
            else:
                self.graph.replay()
        self.batches += 1
        if self.capture:  # while the device computes
            self.draw()
        return self._rows()

    def iterate(self) -> Float[Tensor, "S measured"]:
        """The iteration on what was drawn; never waits for the device.

        Returns:
            What was measured, float64: the numbers named in `columns`, then lambda of every neuron.
        """
        batch = self.collect()
        measured = self.update(batch)
        weights = measured.pop("mixing_weight", None)
        measured["env_steps"] = batch.mask.sum((0, 2))
        measured["success_rate"] = batch.success.double().mean(1)
        episodes = self.env.num_envs
        measured["episode_return_mean"] = _sum_of_runs(batch.rewards.double()) / episodes
        measured["episode_length_mean"] = measured["env_steps"].double() / episodes
        self.columns = list(measured)
        table = torch.stack([values.double() for values in measured.values()], dim=1)
        return table if weights is None else torch.cat([table, weights.double()], dim=1)

    @torch.no_grad()
    def collect(self) -> PackBatch:
        """Run every environment once to its end."""
        env, space = self.env, self.stacked.action_space
        acting = self.stacked.start(env.episode_length, env.num_envs)
        observations, actions, rewards, masks = [], [], [], []
        current = env.reset()
        success = torch.zeros_like(env.running)
        for noise in self.noise.unbind():
            mask = env.running
            # Zeros once all episodes of a run have ended, as `EpisodeBatch` has it.
            runs = mask.any(1)
            seen = torch.where(runs.view(-1, 1, 1), current, 0.0)
            observations.append(seen)
            chosen = space.sample(acting.step(seen.to(self.dtype)), noise)
            actions.append(torch.where(runs.view(-1, 1), chosen, 0))
            masks.append(mask)
            current, reward, _, succeeded = env.step(chosen)
            rewards.append(reward)
            success = success | succeeded
        return PackBatch(
            torch.stack(observations),
            torch.stack(actions),
            torch.stack(rewards),
            torch.stack(masks),
            success,
            acting,
        )

    def update(self, batch: PackBatch) -> dict[str, Tensor]:
        """One training step of every run; as `sgrl.reinforce.update.update`.

        Returns:
            What was measured, [S] each or (mixing_weight) [S, W].
        """
        mask = batch.mask
        count = mask.sum((0, 2)).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return _sum_of_runs(torch.where(mask, values, 0.0)) / count

        gamma = self.gamma.to(batch.rewards.dtype)
        returns = discounted_returns(batch.rewards, mask, gamma)
        if self.settings[0].update.normalize_returns:
            centred = returns - mean(returns).unsqueeze(1)
            deviation = mean(centred.square()).sqrt()
            returns = torch.where(mask, centred / (deviation + 1e-8).unsqueeze(1), 0.0)
        output = batch.acted.replay(batch.observations.to(self.dtype), mask)
        space = self.stacked.action_space
        chosen, entropies = space.log_prob_and_entropy(output.logits, batch.actions)
        policy_loss, entropy = -mean(chosen * returns.to(self.dtype)), mean(entropies)
        loss = policy_loss - self.entropy_coeff * entropy

        buffers = [(buffer, buffer.clone()) for buffer in self.stacked.buffers.values()]
        self.failed |= ~torch.isfinite(loss.detach())
        total = loss.sum()
        if self.two_phase and "predictor" in self.optimizers:
            for phase in ("predictor", "policy"):
                for rule in self.stacked.rules:
                    rule.phase = phase  # type: ignore[assignment]
                norm = self._step(total, [phase])
        else:
            norm = self._step(total, list(self.optimizers))
        for rule in self.stacked.rules:
            rule.phase = "joint"
        with torch.no_grad():
            for buffer, before in buffers:
                keeps = self.failed.view(-1, *(1,) * (buffer.dim() - 1))
                buffer.copy_(torch.where(keeps, before, buffer))
            measured = {
                "policy_loss": policy_loss.detach(),
                "entropy": entropy.detach(),
                "grad_norm": norm,
                **self.stacked.statistics(),
            }
            weights = self.stacked.mixing_weights()
            if weights:
                measured["mixing_weight"] = torch.cat(weights, dim=1)
        return measured

    def _step(self, loss: Tensor, groups: Sequence[str]) -> Float[Tensor, " S"]:
        """One backward pass, and the optimizers' steps; returns the policies' gradient norms.

        Without those, the last group's.
        """
        optimizers = {group: self.optimizers[group] for group in groups}
        parameters = {n: p for one in optimizers.values() for n, p in one.parameters.items()}
        found = torch.autograd.grad(
            loss, list(parameters.values()), allow_unused=True, retain_graph=self.two_phase
        )
        with torch.no_grad():
            gradients = {
                name: torch.zeros_like(p) if gradient is None else gradient
                for (name, p), gradient in zip(parameters.items(), found, strict=True)
            }
            norms = {
                group: _norm([gradients[name] for name in optimizer.parameters])
                for group, optimizer in optimizers.items()
            }
            for norm in norms.values():
                self.failed |= ~torch.isfinite(norm)
            for group, optimizer in optimizers.items():
                scale = (self.grad_clip / (norms[group] + 1e-6)).clamp(max=1)
                clipped = {
                    n: gradients[n] * scale.view(-1, *(1,) * (gradients[n].dim() - 1))
                    for n in optimizer.parameters
                }
                optimizer.step(clipped, ~self.failed)
        return norms.get("policy", norm)

    def unstack(self, policies: Sequence[Policy]) -> None:
        """Copy the runs' tensors into policies; see `Stacked.unstack`."""
        self.stacked.unstack(policies)

    def get_state(self, run: int) -> dict[str, Any]:
        """Return all that a run goes on from, on the CPU; its settings and policy kind apart."""
        ahead = self.drawn > self.batches
        generator = self._undrawn[run] if ahead else self.generators[run].get_state()
        return {
            "batches": self.batches,
            "env_steps": int(self.env_steps[run]),
            "generator": generator.clone(),
            "tensors": {
                name: tensor[run].detach().cpu().clone() for name, tensor in self._tensors().items()
            },
        }

    def set_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the runs' `get_state`, wherever each was packed before.

        Raises:
            ValueError: there is not one for each run, one is of another kind of run, or they have
                not made the same number of batches. The pack is as it was.
        """
        if len(states) != len(self.settings):
            raise ValueError(f"{len(states)} states are not one for each of {len(self.settings)}")
        for state in states:
            reason = misfit(state["tensors"], self._tensors())
            if reason is not None:
                raise ValueError(f"a state is none of a run of this pack: {reason}")
        batches = {state["batches"] for state in states}
        if len(batches) > 1:
            raise ValueError(
                f"runs of a pack must be at the same iteration, not at {sorted(batches)}"
            )
        self.batches = self.drawn = batches.pop()
        for run, state in enumerate(states):
            self.env_steps[run] = state["env_steps"]
            self.generators[run].set_state(state["generator"])
            with torch.no_grad():
                for name, tensor in self._tensors().items():
                    tensor[run].copy_(state["tensors"][name])
        self.stacked.connect()
        self.graph = None

    def _tensors(self) -> dict[str, Tensor]:
        """All that an iteration changes, [S, ...] each."""
        tensors = self.stacked.parameters | self.stacked.buffers | {"failed": self.failed}
        for group, optimizer in self.optimizers.items():
            tensors[f"{group}.steps"] = optimizer.steps
            for kind in ("first", "second"):
                moments = getattr(optimizer, kind)
                tensors |= {f"{group}.{kind}.{name}": value for name, value in moments.items()}
        return tensors

    def _capture(self) -> None:
        """Capture an iteration; it is made as well."""
        kept = list(self._tensors().values())
        before = [tensor.detach().clone() for tensor in kept]
        # Libraries set themselves up in a run that is not captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.iterate()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
        del before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.measured = self.iterate()
        self.graph = graph
        graph.replay()

    def _rows(self) -> list[dict[str, float]]:
        env = self.env
        table, weights = self.measured.cpu().tensor_split([len(self.columns)], dim=1)
        measured = dict(zip(self.columns, table.unbind(1), strict=True))
        self.env_steps += measured.pop("env_steps").numpy().astype(np.int64)
        episodes = self.batches * env.num_envs
        counts = {
            "iteration": self.batches,
            "padded_env_steps": episodes * env.episode_length,
            "episodes": episodes,
        }
        if weights.numel():
            of_layers = weights.tensor_split(len(self.stacked.mixing_weights()), dim=1)
            summaries = {"": weights}
            if len(of_layers) > 1 or not isinstance(self.stacked, StackedSparseNet):
                summaries |= {f"layer{index}_": layer for index, layer in enumerate(of_layers)}
            for prefix, values in summaries.items():
                summary = mixing_summaries(values)
                measured |= {f"{prefix}{name}": value for name, value in summary.items()}
        columns = {name: values.tolist() for name, values in measured.items()}
        return [
            counts
            | {"env_steps": int(self.env_steps[run])}
            | {name: values[run] for name, values in columns.items()}
            for run in range(len(self.settings))
        ]


def _sum_of_runs(values: Float[Tensor, "T S B"]) -> Float[Tensor, " S"]:
    """Sum over each run's steps, in an order that is the same however many runs there are."""
    return values.transpose(0, 1).flatten(1).sum(1)


def _norm(gradients: Sequence[Tensor]) -> Float[Tensor, " S"]:
    """Norm of each run's gradients [S, ...]."""
    squares = [gradient.contiguous().flatten(1).square().sum(1) for gradient in gradients]
    return torch.stack(squares, dim=1).sum(1).sqrt()
