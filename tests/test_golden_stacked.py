"""The recurrent golden cases through a stack of runs, of which the others are something else."""

from pathlib import Path

import pytest
import torch
from golden_cases import (
    ATOL_TRAINED,
    Case,
    assert_close,
    build_policy,
    golden_files,
    load_case,
    to_policy_names,
)
from torch import Tensor

from sgrl.envs.registry import make_device
from sgrl.nn.recurrent_policies import SparseNetPolicy
from sgrl.nn.stacked import StackedActing
from sgrl.nn.stacking import stack_policies
from sgrl.reinforce.loss import normalize_returns, reinforce_loss
from sgrl.reinforce.pack import Pack, PackBatch, RunSettings
from sgrl.reinforce.update import UpdateSettings

#: The place of the case among the runs.
PLACE, RUNS = 1, 3


@pytest.mark.parametrize("file", golden_files("recurrent_*.npz"), ids=lambda file: file.stem)
def test_golden(file: Path) -> None:
    case = load_case(file)
    if case.group("trained"):
        check_training(case)
    else:
        check_one_update(case)


def policies_of(case: Case) -> list[SparseNetPolicy]:
    policies = []
    for run in range(RUNS):
        policy = build_policy(case, "torch")
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1 + run - PLACE)
            parents = policy.core.parents
            parents.copy_((parents + run - PLACE) % policy.core.num_neurons)
        policies.append(policy)
    return policies


def stacked(value: Tensor) -> Tensor:
    """[T, B, ...] of the case -> [T, S, B, ...]: the others' are in another order."""
    return torch.stack([value.roll(run - PLACE, dims=1) for run in range(RUNS)], dim=1)


def check_one_update(case: Case) -> None:
    policies = policies_of(case)
    stack = stack_policies(policies)
    mask = stacked(case["valid_mask"])
    output = stack(stacked(case["obs"]), mask)
    assert_close(output.logits[:, PLACE].detach(), case["logits"])
    returns = normalize_returns(case["returns"], case["valid_mask"])
    loss = torch.zeros(())
    for run in range(RUNS):
        terms = reinforce_loss(
            output.logits[:, run],
            stacked(case["actions"])[:, run],
            stacked(returns)[:, run],
            mask[:, run],
            case.config["entropy_coef"],
        )
        loss = loss + terms.loss
        if run == PLACE:
            assert_close(terms.policy_loss.item(), case["policy_loss"])
    gradients = to_policy_names(policies[PLACE], case.group("grad"))
    found = torch.autograd.grad(loss, list(stack.parameters.values()))
    for name, gradient in zip(stack.parameters, found, strict=True):
        assert_close(gradient[PLACE], gradients[name], what=name)
    if case.config["mode"] == "sgprop":
        assert_close(stack.statistics()["predictor_loss"][PLACE], case["sg_loss"])
    weight = stack.buffers["core.neurons.mixing_weight"][PLACE]
    assert_close(weight, case["lambda_after"])


def check_training(case: Case) -> None:
    config = case.config
    settings = UpdateSettings(config["gamma"], config["entropy_coef"], config["max_grad_norm"])
    run = RunSettings(0, config["policy_lr"], config["sg_lr"], settings)
    updates = sum(name.startswith("train") and name.endswith("/obs") for name in case.arrays)
    recorded = [case.group(f"train{i}") for i in range(updates)]
    length, batch_size = recorded[0]["actions"].shape
    env = make_device("labyrinth_escape", RUNS, batch_size, {"episode_length": length})
    policies = policies_of(case)
    # Its batches are recorded: no environment is stepped.
    env.observation_size = policies[0].observation_size
    env.num_actions = policies[0].num_actions
    pack = Pack(policies, env, [run] * RUNS)
    for i, of_case in enumerate(recorded):
        batch = PackBatch(
            stacked(of_case["obs"]),
            stacked(of_case["actions"]),
            stacked(of_case["rewards"]),
            stacked(of_case["valid_mask"]),
            torch.zeros(RUNS, batch_size, dtype=torch.bool),
            StackedActing(pack.stacked, length, batch_size),
        )
        measured = pack.update(batch)
        for name in ("policy_loss", "entropy", "grad_norm"):
            assert_close(measured[name][PLACE], of_case[name], what=f"train{i}/{name}")
        assert_close(measured["predictor_loss"][PLACE], of_case["sg_loss"])
    pack.unstack(policies)
    trained = to_policy_names(policies[PLACE], case.group("trained"))
    for name, parameter in policies[PLACE].named_parameters():
        assert_close(parameter.detach(), trained[name], atol=ATOL_TRAINED, what=name)
    weight = policies[PLACE].core.neurons.mixing_weight
    assert_close(weight, case["trained_lambda"], atol=ATOL_TRAINED)
