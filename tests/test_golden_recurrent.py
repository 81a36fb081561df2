"""The recurrent golden cases, on every backend: forward, losses, gradients, lambda, training.

Files come from the folder in SGRL_GOLDEN_DIR, if set, else from tests/golden.
"""

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

from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.sgprop import temporal_schedule
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.loss import discounted_returns, normalize_returns, reinforce_loss
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

CASES = [
    pytest.param(file, backend, id=f"{file.stem}-{backend}")
    for file in golden_files("recurrent_*.npz")
    for backend in BACKENDS
]


@pytest.mark.parametrize(("file", "backend"), CASES)
def test_golden(file: Path, backend: str) -> None:
    case = load_case(file)
    if case.group("trained"):
        check_training(case, backend)
    else:
        check_one_update(case, backend)


def check_one_update(case: Case, backend: str) -> None:
    config, mask = case.config, case["valid_mask"]
    policy = build_policy(case, backend)

    returns = discounted_returns(case["rewards"], mask, config["gamma"])
    assert_close(returns, case["returns"])
    returns = normalize_returns(returns, mask)
    assert_close(returns, case["normalized_returns"])

    output = policy(case["obs"], mask=mask)
    assert_close(output.logits.detach(), case["logits"])
    hidden, _ = policy.core(policy.encoder(case["obs"]))
    assert_close(hidden.detach().view_as(case["hidden"]), case["hidden"])

    neurons = policy.core.neurons
    lambda_before = neurons.mixing_weight.clone()
    if config["mode"] == "sgprop":
        schedule = temporal_schedule(
            lambda_before, policy.core.parents, config["T"], config["beta"]
        )
        assert_close(schedule, case["lambda_schedule"])
        assert_close(_predictions(policy, case["obs"]), case["sg_prediction"])

    terms = reinforce_loss(output.logits, case["actions"], returns, mask, config["entropy_coef"])
    assert_close(terms.policy_loss.item(), case["policy_loss"])
    assert_close(terms.entropy.item(), case["entropy"])
    terms.loss.backward()

    gradients = to_policy_names(policy, case.group("grad"))
    parameters = dict(policy.named_parameters())
    assert set(gradients) == set(parameters)
    for name, parameter in parameters.items():
        assert_close(parameter.grad, gradients[name], what=name)
    if config["mode"] == "sgprop":
        assert_close(policy.core.statistics["predictor_loss"], case["sg_loss"])
    assert_close(neurons.mixing_weight, case["lambda_after"])
    if not config["adaptive"]:
        assert torch.equal(neurons.mixing_weight, lambda_before)


def _predictions(policy: torch.nn.Module, observations: torch.Tensor) -> torch.Tensor:
    """Predictions at every step [T, B, W, N], by the definition."""
    core, h = policy.core, None
    predictions = []
    with torch.no_grad():
        for embedding in policy.encoder(observations):
            if h is None:
                shape = (len(embedding), core.num_neurons, core.neuron_size)
                h = embedding.new_zeros(shape)
            activation = core.neurons(core.neurons.read(h, core.parents, embedding))
            predictions.append(core.neurons.predict(activation))
            h = activation.output
    return torch.stack(predictions)


def check_training(case: Case, backend: str) -> None:
    config = case.config
    policy = build_policy(case, backend)
    optimizers = make_optimizers(policy, config["policy_lr"], config["sg_lr"])
    settings = UpdateSettings(config["gamma"], config["entropy_coef"], config["max_grad_norm"])
    updates = sum(name.startswith("train") and name.endswith("/obs") for name in case.arrays)
    assert updates
    for i in range(updates):
        recorded = case.group(f"train{i}")
        mask = recorded["valid_mask"]
        batch = EpisodeBatch(
            recorded["obs"],
            recorded["actions"],
            recorded["rewards"],
            mask,
            lengths=mask.sum(0),
            success=recorded["dones"].any(0),
        )
        metrics = update(policy, optimizers, batch, settings)
        for name in ("policy_loss", "entropy", "grad_norm"):
            assert_close(metrics[name], recorded[name], what=f"train{i}/{name}")
        assert_close(metrics["predictor_loss"], recorded["sg_loss"], what=f"train{i}/sg_loss")
    trained = to_policy_names(policy, case.group("trained"))
    parameters = dict(policy.named_parameters())
    assert set(trained) == set(parameters)
    for name, parameter in parameters.items():
        assert_close(parameter.detach(), trained[name], atol=ATOL_TRAINED, what=name)
    assert_close(policy.core.neurons.mixing_weight, case["trained_lambda"], atol=ATOL_TRAINED)
