"""What short runs learn is what it was when their rows were recorded (see `reference_runs.py`)."""

import csv
import json
import math
from collections import defaultdict

import pytest
import torch
from reference_runs import MACHINE, ROWS, learning_row, machine, runs

#: Iterations over which float64 is the same on every processor: rounding errors grow.
ON_ANY_MACHINE = 3
RUNS = dict(runs())

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    # RLlib makes its vector of environments under one id, again and again.
    pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning"),
]


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str], list[dict[str, float]]]:
    """Rows by run and type of numbers."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with ROWS.open() as file:
        for line in csv.DictReader(file):
            of_run = rows[line["run"], line["dtype"]]
            if len(of_run) < int(line["iteration"]):
                of_run.append({})
            of_run[-1][line["column"]] = float(line["value"])
    return rows


def test_every_run_is_recorded(recorded: dict) -> None:
    assert {name for name, _ in recorded} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_rows_are_those_recorded(name: str, recorded: dict) -> None:
    """float64 to 1e-9 anywhere; both types bitwise on the kind of processor that recorded them."""
    same_machine = machine() == json.loads(MACHINE.read_text())
    for dtype in (torch.float64, torch.float32) if same_machine else (torch.float64,):
        rows = [learning_row(row) for row in RUNS[name](dtype)]
        expected = recorded[name, str(dtype).removeprefix("torch.")]
        if same_machine:
            assert rows == expected, dtype
            continue
        for row, before in zip(rows[:ON_ANY_MACHINE], expected, strict=False):
            assert row.keys() == before.keys()
            for column, value in row.items():
                assert math.isclose(value, before[column], rel_tol=1e-9), column
