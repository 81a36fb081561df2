"""Shapes are checked against annotations while tests run (conftest.py), and only then."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from sgrl.nn import SparseRNN
from sgrl.nn.mixing import gradient_moments
from sgrl.reinforce import normalize_returns
from sgrl.theory.estimation import total_covariance


def test_a_wrong_shape_fails_and_is_named() -> None:
    """Of a forward pass, of functions of each package; of one axis, or of two that differ."""
    mask = torch.ones(5, 4, dtype=torch.bool)
    with pytest.raises(TypeCheckError, match=r"parameter 'mask'(?s:.*)'T B'(?s:.*)B=3"):
        normalize_returns(torch.zeros(5, 3), mask)
    with pytest.raises(TypeCheckError, match=r"parameter 'mask'(?s:.*)'T B'"):
        normalize_returns(torch.zeros(5, 4), mask.float())
    with pytest.raises(TypeCheckError, match=r"parameter 'x'(?s:.*)'T B E'"):
        SparseRNN(3, 6, 2, 2, 2, 2)(torch.zeros(4, 3))
    with pytest.raises(TypeCheckError, match=r"parameter 's'(?s:.*)D=2"):
        gradient_moments(torch.zeros(5, 3, 2), torch.zeros(5, 3, 1))
    with pytest.raises(TypeCheckError, match=r"parameter 'b'(?s:.*)S=5"):
        total_covariance(torch.zeros(5, 2), torch.zeros(4, 2))


def test_users_have_no_checks() -> None:
    code = (
        "import sys, torch, sgrl.nn.mixing as mixing; "
        "mixing.norm(torch.zeros(2, 3)); print('beartype' in sys.modules, mixing.norm.__code__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ")
    assert "mixing.py" in done.stdout
