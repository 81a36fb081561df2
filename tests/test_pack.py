"""Runs trained as a pack: each gets the numbers that it would get by itself."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sgrl.envs.registry import make_device, make_vector
from sgrl.nn.actions import Box, MultiDiscrete
from sgrl.nn.kernels import triton_unroll
from sgrl.nn.policy import Policy
from sgrl.nn.registry import make_policy
from sgrl.nn.sgprop import Mixing
from sgrl.nn.stacked import StackedSparseNet
from sgrl.reinforce.loop import train
from sgrl.reinforce.pack import Pack, RunSettings
from sgrl.reinforce.update import UpdateSettings

NUM_ENVS, ITERATIONS = 5, 4
CONFIGS = {
    "labyrinth_escape": {"maze_dims": [6, 6], "episode_length": 20},
    "labyrinth_explore": {"maze_dims": [6, 6], "episode_length": 12},
    "mnist_bandit": {},
}
SPARSE = {"num_neurons": 24, "num_parents": 4, "num_slots": 3, "num_input_neurons": 6}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgprop": ("sparsenet", SPARSE | {"mixing_weight": 0.8}),
    "sgprop, other settings": (
        "sparsenet",
        SPARSE
        | {
            "mixing_rule": "running_raw",
            "positive_projection": True,
            "mask_predictions": True,
            "predictor_target": "received",
            "mixing_weight": 0.5,
        },
    ),
    "sgprop, episodes": (
        "sparsenet",
        SPARSE | {"mixing_rule": "running_episodes", "mixing_weight": 0.5},
    ),
    "sgprop, fixed": ("sparsenet", SPARSE | {"adaptive": False, "mixing_weight": 0.5}),
    "backprop": ("sparsenet", SPARSE | {"propagation": "backprop"}),
    "gru": ("gru", {"hidden_size": 16}),
    "lstm": ("lstm", {"hidden_size": 16, "value_head": True}),
    "mlp": ("mlp", {"hidden_size": 16}),
}
FEED_FORWARD = {"num_layers": 3, "num_neurons": 20, "num_parents": 3, "num_slots": 3}
OF_BANDIT: dict[str, tuple[str, dict[str, Any]]] = {
    "bandit, sgprop": ("sparse_mlp", FEED_FORWARD | {"neuron_size": 4}),
    "bandit, sgprop on mixtures": (
        "sparse_mlp",
        FEED_FORWARD | {"residual": False, "predictor_target": "mixed", "mixing_rule": "running"},
    ),
    "bandit, backprop": ("sparse_mlp", FEED_FORWARD | {"propagation": "backprop"}),
    "bandit, dense": ("dense", {"num_layers": 2, "hidden_size": 16}),
}
POLICIES |= OF_BANDIT
RUNS = [
    RunSettings(3, 1e-3, 1e-4, UpdateSettings(0.9, 0.02, 0.05)),
    RunSettings(0, 4e-3, 1e-3, UpdateSettings(0.95, 0.0, None)),
    RunSettings(1, 2e-3, 1e-4, UpdateSettings(0.99, 0.01, 0.5)),
]


def policies_of(
    kind: str, runs: Sequence[RunSettings], dtype: torch.dtype = torch.float64, **numbers: Any
) -> list[Policy]:
    name, settings = POLICIES[kind]
    env = env_of(kind)
    vector = make_vector(env, 1, CONFIGS[env])
    return [
        make_policy(
            name,
            vector.observation_size,
            vector.num_actions,
            seed=run.seed,
            dtype=dtype,
            **settings | {key: values[index] for key, values in numbers.items()},
        )
        for index, run in enumerate(runs)
    ]


def env_of(kind: str) -> str:
    return "mnist_bandit" if kind in OF_BANDIT else "labyrinth_escape"


def pack_of(
    policies: Sequence[Policy],
    runs: Sequence[RunSettings],
    env: str | None = None,
    device: str = "cpu",
    capture: bool | None = None,
) -> Pack:
    env = env or ("labyrinth_escape" if policies[0].observation_size < 100 else "mnist_bandit")
    return Pack(
        policies, make_device(env, len(runs), NUM_ENVS, CONFIGS[env], device), runs, capture
    )


def unnormalized(runs: Sequence[RunSettings], two_phase: bool = False) -> list[RunSettings]:
    # Means and deviations of returns are in float32 (as rewards are), and round in their order.
    return [
        RunSettings(
            r.seed,
            r.lr,
            r.predictor_lr,
            UpdateSettings(
                r.update.gamma, r.update.entropy_coeff, r.update.grad_clip, False, two_phase
            ),
        )
        for r in runs
    ]


CASES = [
    *((kind, env, False) for kind in POLICIES if kind not in OF_BANDIT for env in [*CONFIGS][:2]),
    *((kind, "labyrinth_escape", True) for kind in ("sgprop", "gru")),
    *((kind, "mnist_bandit", False) for kind in OF_BANDIT),
]


@pytest.mark.parametrize(("kind", "env", "normalize"), CASES)
def test_stacked_equals_separate(kind: str, env: str, normalize: bool) -> None:
    """Float64, rows to 1e-9 of training; where returns are normalised, to float32's rounding."""
    runs = RUNS if normalize else unnormalized(RUNS, two_phase=kind in OF_BANDIT)
    tolerance = {"rtol": 1e-9, "atol": 1e-14} if not normalize else {"rtol": 1e-4, "atol": 1e-5}
    numbers = {}
    if kind in OF_BANDIT and "sgprop" in kind:
        numbers = {"mixing_momentum": [0.9, 0.5, 0.8]}
    if kind.startswith("sgprop"):
        numbers = {"mixing_momentum": [0.9, 0.5, 0.8], "schedule_beta": [0.1, 0.3, 0.0]}
    policies = policies_of(kind, runs, **numbers)
    pack = pack_of(policies, runs, env)
    rows = [pack.train() for _ in range(ITERATIONS)]
    before = [{n: v.clone() for n, v in p.state_dict().items()} for p in policies]
    for index, (run, policy) in enumerate(zip(runs, policies, strict=True)):
        vector = make_vector(env, NUM_ENVS, CONFIGS[env])
        separate = train(
            policy,
            vector,
            ITERATIONS,
            lr=run.lr,
            predictor_lr=run.predictor_lr,
            seed=run.seed,
            settings=run.update,
        )
        for row, packed in zip(separate, rows, strict=True):
            assert packed[index].keys() == row.keys()
            for column, value in row.items():
                expected = torch.tensor(value, dtype=torch.float64)
                found = torch.tensor(packed[index][column], dtype=torch.float64)
                torch.testing.assert_close(found, expected, msg=f"{run} {column}", **tolerance)
    unstacked = policies_of(kind, runs, **numbers)
    for policy, state in zip(unstacked, before, strict=True):
        assert all(torch.equal(policy.state_dict()[name], value) for name, value in state.items())
    pack.unstack(unstacked)
    for policy, trained in zip(unstacked, policies, strict=True):
        for name, value in policy.state_dict().items():
            torch.testing.assert_close(value, trained.state_dict()[name], msg=name, **tolerance)


def test_rules_on_episodes_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the Triton kernels would serve, stacked layers run in torch."""
    monkeypatch.setattr(triton_unroll, "serves", lambda layer: True)
    pair = [policies_of("sgprop, episodes", RUNS[:2]), policies_of("sgprop", RUNS[:2])]
    stacked, fused = (StackedSparseNet(policies, torch.device("cpu")) for policies in pair)
    assert fused.fused
    assert not stacked.fused
    mixing = Mixing(stacked.policy.settings, stacked.rule, None, {})
    x, h_0 = torch.zeros(2, 3, 5, 7), torch.zeros(2, 5, 24, 6)
    with pytest.raises(ValueError, match="know no rule on episodes: use torch_unroll"):
        triton_unroll.unroll(stacked.layer(), mixing, stacked.schedule, x, h_0, None)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_run_does_not_depend_on_its_pack(kind: str) -> None:
    """Bitwise, in float32: alone, beside others, and in another place among them."""
    found = []
    for order in ([0], [0, 1, 2], [2, 1, 0], [1, 0]):
        runs = [RUNS[index] for index in order]
        pack = pack_of(policies_of(kind, runs, torch.float32), runs)
        rows = [pack.train()[order.index(0)] for _ in range(ITERATIONS)]
        trained = policies_of(kind, runs, torch.float32)
        pack.unstack(trained)
        found.append((rows, trained[order.index(0)].state_dict()))
    rows, state = found[0]
    for other_rows, other_state in found[1:]:
        assert other_rows == rows
        assert all(torch.equal(value, state[name]) for name, value in other_state.items())


@pytest.mark.parametrize("kind", ["sgprop, other settings", "lstm", "bandit, sgprop on mixtures"])
def test_resumed_alone_and_in_other_packs(kind: str) -> None:
    """Bitwise, in float32; also where the next batch was drawn when the state was asked for."""
    pack = pack_of(policies_of(kind, RUNS, torch.float32), RUNS)
    before = [pack.train() for _ in range(2)]
    states = [pack.get_state(run) for run in range(len(RUNS))]
    pack.draw()
    assert [s["generator"].tolist() for s in states] == [
        pack.get_state(run)["generator"].tolist() for run in range(len(RUNS))
    ]
    rows = [pack.train() for _ in range(2)]
    for order in ([1], [2, 0], [0, 1, 2]):
        runs = [RUNS[index] for index in order]
        # From other weights: the state holds them.
        others = policies_of(kind, [RunSettings(seed=7 + index) for index in order], torch.float32)
        again = pack_of(others, runs)
        again.set_state([states[index] for index in order])
        for continued in rows:
            assert again.train() == [continued[index] for index in order]
    later = pack.get_state(0)
    assert later["batches"] == 4
    assert later["env_steps"] == rows[-1][0]["env_steps"] > before[-1][0]["env_steps"]
    with pytest.raises(ValueError, match=r"same iteration, not at \[2, 4\]"):
        again.set_state([later, states[1], states[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["sgprop", "gru"])
def test_a_run_that_diverges_is_frozen(kind: str, dtype: torch.dtype) -> None:
    """Nothing of it is touched, nor of the others; not after its state was moved either."""

    def bad(policies: list[Policy]) -> list[Policy]:
        with torch.no_grad():
            policies[1].actor.get_parameter("b" if kind == "sgprop" else "4.bias").fill_(torch.inf)
        return policies

    good = pack_of(policies_of(kind, RUNS, dtype), RUNS)
    pack = pack_of(bad(policies_of(kind, RUNS, dtype)), RUNS)
    for _ in range(2):
        expected, rows = good.train(), pack.train()
        assert [rows[0], rows[2]] == [expected[0], expected[2]]
    moved = pack_of(policies_of(kind, RUNS, dtype), RUNS)
    moved.set_state([pack.get_state(run) for run in range(len(RUNS))])
    expected = good.train()
    for one in (pack, moved):
        assert one.train()[2] == expected[2]
        assert one.failed.tolist() == [False, True, False]
        trained = policies_of(kind, RUNS, dtype)
        one.unstack(trained)
        untouched = bad(policies_of(kind, RUNS, dtype))[1].state_dict()
        assert all(torch.equal(v, untouched[n]) for n, v in trained[1].state_dict().items())


def test_what_cannot_be_packed_is_refused() -> None:
    runs = RUNS[:2]
    one, _ = policies_of("sgprop", runs)
    with pytest.raises(ValueError, match="same policy"):
        pack_of([one, policies_of("gru", runs)[0]], runs)
    with pytest.raises(ValueError, match="same num_slots"):
        pack_of(policies_of("sgprop", runs, num_slots=[2, 3]), runs)
    with pytest.raises(ValueError, match="same sizes and type"):
        pack_of([one, policies_of("sgprop", runs, torch.float32)[1]], runs)
    with pytest.raises(ValueError, match="shuffle_predictions does not stack"):
        pack_of(policies_of("sgprop", runs, shuffle_predictions=[True, True]), runs)
    with pytest.raises(ValueError, match="normalize_observations does not stack"):
        pack_of(policies_of("gru", runs, normalize_observations=[True, True]), runs)
    with pytest.raises(ValueError, match="neuron_noise does not stack"):
        pack_of(policies_of("sgprop", runs, neuron_noise=[0.1, 0.1]), runs)
    with pytest.raises(ValueError, match="one of each"):
        pack_of([one], runs)
    baseline = RunSettings(update=UpdateSettings(baseline="batch_mean"))
    with pytest.raises(ValueError, match="same baseline"):
        pack_of(policies_of("gru", runs), [runs[0], baseline])
    with pytest.raises(ValueError, match="no baseline other than"):
        pack_of(policies_of("gru", runs), [baseline, baseline])
    two_phase = RunSettings(update=UpdateSettings(two_phase=True))
    with pytest.raises(ValueError, match="two_phase is not for the policy 'sparsenet'"):
        pack_of(policies_of("sgprop", runs), [two_phase, two_phase])
    for name, value in (("seed", -1), ("seed", 2**30), ("lr", -1e-3), ("predictor_lr", math.nan)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            RunSettings(**{name: value})


def test_policies_that_were_changed_are_refused() -> None:
    """What is stacked is what their classes make; also where another than the first is changed."""

    def refused(kind: str, change: Callable[[Policy], object], match: str) -> None:
        policies = policies_of(kind, RUNS)
        change(policies[1])
        with pytest.raises(ValueError, match=match):
            pack_of(policies, RUNS)

    def replace(policy: Policy) -> None:
        policy.core[1] = torch.nn.ReLU()

    def soften(policy: Policy) -> None:
        policy.actor[1].negative_slope = 0.2

    def add_hook(policy: Policy) -> None:
        policy.actor.register_forward_hook(lambda module, inputs, output: 2 * output)

    refused("mlp", replace, "'mlp' does not stack: core.1 was replaced or changed, or has hooks")
    refused("gru", soften, "actor.1 was replaced or changed")
    for kind in ("lstm", "sgprop", "bandit, sgprop", "bandit, dense"):
        refused(kind, add_hook, "actor was replaced or changed, or has hooks")
    refused("gru", lambda p: p.encoder.requires_grad_(False), r"encoder.0.weight requires no grad")


def test_policies_that_do_not_fit_the_environments_are_refused() -> None:
    env, runs = make_device("labyrinth_escape", 2, 1), RUNS[:2]

    def refused(name: str, sizes: Sequence[tuple[int, Any]], match: str, **settings: Any) -> None:
        policies = [make_policy(name, *size, **settings) for size in sizes]
        with pytest.raises(ValueError, match=match):
            Pack(policies, env, runs)

    refused("gru", [(57, 4)] * 2, "read 57 numbers, but an observation of the .* has 56")
    refused("gru", [(56, 3)] * 2, r"actions are Discrete\(size=3\), the .* Discrete\(size=4\)")
    refused("gru", [(56, Box(2))] * 2, r"actions are Box\(size=2\), the environments'")
    refused("gru", [(56, 4), (56, MultiDiscrete((2, 2)))], "same action_space")
    refused("sparse_mlp", [(56, 4), (55, 4)], "same observation_size")
    refused("sparse_mlp", [(56, 4)] * 2, "'sparse_mlp' packs for episodes of one step only")


def test_what_is_not_of_the_runs_is_refused() -> None:
    """By `set_state` and `unstack`, which then change nothing."""
    pack, other, double = (
        pack_of(policies_of(kind, RUNS, dtype), RUNS)
        for kind, dtype in (
            ("sgprop", torch.float32),
            ("backprop", torch.float32),
            ("sgprop", torch.float64),
        )
    )
    own, others, doubles = (
        [one.get_state(run) for run in range(3)] for one in (pack, other, double)
    )
    before = pack.train()
    states = [pack.get_state(run) for run in range(3)]
    for given, match in (
        (own[:2], "2 states are not one for each of 3"),
        ([], "0 states are not"),
        ([own[0], *others[1:]], "predictor_h is missing"),
        ([own[0], *doubles[1:]], r"weight is \[128, 56\] float64, not \[128, 56\] float32"),
    ):
        with pytest.raises(ValueError, match=match):
            pack.set_state(given)
    with pytest.raises(ValueError, match="predictor_h is unknown"):
        other.set_state(own)
    for policies, match in (
        (policies_of("sgprop", RUNS[:2]), "2 policies are not one for each of 3 runs"),
        (policies_of("gru", RUNS, torch.float32), "'gru' is none of these runs': .* is missing"),
        (policies_of("sgprop", RUNS), "float64, not"),
    ):
        kept = [value.clone() for policy in policies for value in policy.state_dict().values()]
        with pytest.raises(ValueError, match=match):
            pack.unstack(policies)
        now = [value for policy in policies for value in policy.state_dict().values()]
        assert all(map(torch.equal, now, kept))
    continued = pack.train()
    pack.set_state(states)
    assert pack.train() == continued != before


@pytest.mark.parametrize("kind", ["sgprop", "gru"])
def test_packs_compute_in_their_own_precision(kind: str) -> None:
    """Whatever autocast and torch's default type say."""
    expected = pack_of(policies_of(kind, RUNS, torch.float32), RUNS).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pack_of(policies_of(kind, RUNS, torch.float32), RUNS).train() == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert pack_of(policies_of(kind, RUNS, torch.float32), RUNS).train() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "kind", ["sgprop", "backprop", "gru", "lstm", "mlp", "bandit, sgprop", "bandit, dense"]
)
def test_packs_on_cuda(kind: str) -> None:
    """A captured iteration is bitwise one that is not, repeats itself, and is near the CPU's."""
    rows = {}
    for name, device, capture in (
        ("graph", "cuda", True),
        ("again", "cuda", True),
        ("eager", "cuda", False),
        ("cpu", "cpu", False),
    ):
        pack = pack_of(policies_of(kind, RUNS), RUNS, device=device, capture=capture)
        rows[name] = [pack.train() for _ in range(ITERATIONS)]
    assert rows["graph"] == rows["again"] == rows["eager"]
    for packed, expected in zip(rows["graph"], rows["cpu"], strict=True):
        for row, of_cpu in zip(packed, expected, strict=True):
            for column, value in row.items():
                assert value == pytest.approx(of_cpu[column], rel=1e-4, abs=1e-5), column


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "num_envs=20" in code
    exec(compile(code.replace("num_envs=20", "num_envs=1"), "docs/gpu.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == [
        f"{seed} {lr} {iteration}"
        for iteration in (1, 2)
        for seed in (0, 10_000, 20_000)
        for lr in (1e-3, 2e-3)
    ]
