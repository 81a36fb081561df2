"""A trial's config.yaml: what it is trained with, and what of that may still change."""

import contextlib

from sgrl.files import write_text
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.plan import Trial, TrialConfig
from sgrl.results.storage import display
from sgrl.tuning.cluster import SweepError
from sgrl.tuning.experiment.method import as_recorded, with_defaults
from sgrl.tuning.experiment.resources import may_move
from sgrl.yaml_files import dump_yaml

# What a trial's numbers do not depend on may change from one start to the next.
CHANGEABLE = {"stop", "checkpoint", "max_failures", "iteration_timeout", "callbacks"}


def check_config(folder: TrialFolder, trial: Trial) -> bool:
    """Refuse to change what a trial's first iterations were trained with.

    The resolved backend and the threads count; the processes that it computes in may change, and
    what it is packed with, if anything.

    Returns:
        Whether the file says just that already.

    Raises:
        SweepError: something else has changed.
    """
    if not folder.config.is_file():
        return False
    before, config = folder.read_config(), trial.as_dict()
    if before == config:
        return True
    # A setting that is newer than the sweep was what it now is by default.
    with contextlib.suppress(KeyError, TypeError):
        before["model"] = with_defaults(as_recorded(before["model"]))
        # Of older trials on GPUs, which left it to each process.
        if before["model"].get("backend") == "auto":
            before["model"]["backend"] = trial.config.model["backend"]
    changeable = CHANGEABLE | ({"pack"} & before.keys() & config.keys())
    for key in sorted((before.keys() | config.keys()) - changeable):
        if before.get(key) != config.get(key):
            if key == "config" and may_move(TrialConfig.from_dict(before), trial.config):
                continue
            experiment = SweepFolder(folder.path.parent).experiment
            raise SweepError(
                f"{display(folder.config)} says {key}: {before.get(key)}, {experiment.name} says "
                f"{config.get(key)}: undo the change or start another sweep with --name"
            )
    return False


def write_config(folder: TrialFolder, trial: Trial) -> bool:
    """Write a trial's config.yaml; whether another one was there before, of other processes."""
    before = folder.read_config() if folder.config.is_file() else {}
    config = trial.as_dict()
    if before != config:
        folder.path.mkdir(exist_ok=True)
        write_text(folder.config, dump_yaml(config))
    return before.get("config", config["config"]) != config["config"]
