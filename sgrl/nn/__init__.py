"""Networks of sgrl: a library of its own, torch only.

`SparseRNN` is used like `torch.nn.GRU` and `SparseMLP` like an `nn.Sequential`, under any
optimizer and any RL library; `SyntheticGradient` brings synthetic-gradient propagation to any
other network; `make_policy` builds the policies that are compared.
Synthetic-gradient propagation happens inside the network's backward pass, so any algorithm that
calls `loss.backward()` trains it.
"""

from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.registry import POLICIES, Policy, load_policy, make_policy, save_policy
from sgrl.nn.synthetic_gradient import SyntheticGradient

__all__ = [
    "POLICIES",
    "Policy",
    "SparseMLP",
    "SparseRNN",
    "SyntheticGradient",
    "load_policy",
    "make_policy",
    "save_policy",
]
