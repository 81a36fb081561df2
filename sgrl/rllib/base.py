"""What our configs and algorithms have in common, whoever drives them: a sweep, Tune or a script.

A config made from a plain dict, as YAML and Tune's `param_space` hold it, takes `model_config`. A
checkpoint, whoever saves it, holds the policy as `policy.safetensors` and `policy.json` beside
RLlib's own files, so that `sgrl.load_policy` and the `sgrl` command read it.
"""

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pyarrow import fs
from ray.rllib.algorithms import Algorithm, AlgorithmConfig
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.rl_module import RLModule, RLModuleSpec

from sgrl.nn.registry import Policy, save_policy
from sgrl.reinforce.generators import generators_aside
from sgrl.rllib.module import PolicyModule

#: Where a checkpoint of the new API stack has the module.
MODULE = "/".join(
    (COMPONENT_LEARNER_GROUP, COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID)
)


#: Parts of a state, as RLlib's `get_state` takes their names.
Components = str | Collection[str] | None


class PolicyConfig(AlgorithmConfig):
    """To be put before an algorithm's config."""

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Return the spec of `PolicyModule`."""
        return RLModuleSpec(module_class=PolicyModule)

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> Self:
        """Set settings by their names; `model_config` is the one that `rl_module` sets."""
        renamed = {"model_config": "_model_config"}
        return super().update_from_dict({renamed.get(k, k): v for k, v in config_dict.items()})


class PolicyCheckpoints(Algorithm):
    """To be put before an algorithm: its checkpoints hold the policy, if it trains one of ours.

    Attributes:
        config_class: of the algorithm's settings.
    """

    config_class: ClassVar[type[AlgorithmConfig]]

    @classmethod
    def get_default_config(cls) -> AlgorithmConfig:
        """Return the default settings."""
        return cls.config_class()

    def save_to_path(
        self,
        path: str | Path | None = None,
        *,
        filesystem: fs.FileSystem | None = None,
        **kwargs: Any,
    ) -> str:
        """Save as RLlib does, and the policy (new API stack).

        Args:
            path: an absolute folder, or an address; a new folder if None.
            filesystem: the one that `path` lies in; told from `path` if None.
            **kwargs: RLlib's own.

        Returns:
            The path within the filesystem.
        """
        if filesystem is None:
            filesystem, path = fs.FileSystem.from_uri(str(path or tempfile.mkdtemp()))
        saved = super().save_to_path(path, filesystem=filesystem, **kwargs)
        module = f"{saved}/{MODULE}"
        if filesystem.get_file_info(module).type == fs.FileType.Directory:
            # Read back, since APPO and IMPALA train on in another thread. Initial weights may come
            # from generators that training draws from.
            with generators_aside(None):
                policy = getattr(RLModule.from_checkpoint(module, filesystem), "policy", None)
            self._save_policy(policy, saved, filesystem)
        return saved

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save as RLlib does, and the policy."""
        super().save_checkpoint(checkpoint_dir)  # on the new API stack by `save_to_path`
        if not self.config.enable_rl_module_and_learner:
            policy = getattr(getattr(self.get_policy(), "model", None), "policy", None)
            self._save_policy(policy, str(checkpoint_dir), fs.LocalFileSystem())

    def _save_policy(self, policy: Any, directory: str, filesystem: fs.FileSystem) -> None:
        if not isinstance(policy, Policy):
            return  # a module of the user's own
        environment = {"env": str(self.config.env), "env_config": dict(self.config.env_config)}
        # What JSON does not know is only to be read.
        environment = json.loads(json.dumps(environment, default=str))
        with tempfile.TemporaryDirectory(prefix="sgrl-") as folder:
            save_policy(policy, folder, environment=environment, iteration=self.iteration)
            fs.copy_files(folder, directory, destination_filesystem=filesystem)
