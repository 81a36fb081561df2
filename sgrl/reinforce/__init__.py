"""Full-episode REINFORCE without Ray: batch, rollout, loss, update, and a plain training loop."""

from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.loop import train
from sgrl.reinforce.loss import discounted_returns, normalize_returns, reinforce_loss
from sgrl.reinforce.rollout import Rollout, action_space_of
from sgrl.reinforce.update import NonFiniteLoss, UpdateSettings, make_optimizers, update

__all__ = [
    "EpisodeBatch",
    "NonFiniteLoss",
    "Rollout",
    "UpdateSettings",
    "action_space_of",
    "discounted_returns",
    "make_optimizers",
    "normalize_returns",
    "prepare_device",
    "reinforce_loss",
    "train",
    "update",
]
