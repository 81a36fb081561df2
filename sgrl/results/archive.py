"""Archives: a finished sweep in a few small files, fit for a repository.

An archive is a folder with the sweep's experiment.yaml, provenance.json and summary.csv as they
were, and

- `metrics.parquet`: the rows of all trials; what trials are judged by in double precision, all
  else in single precision, which is what training computes in;
- `trials.json`: configuration, final state and starts of every trial;
- `<trial>/checkpoints/NNNNNN/`: final policies of chosen trials, at the paths where the sweep had
  them, `policy.safetensors` and `policy.json` only.

Everything that reads results reads an archive too: `sgrl.results.locations.reading` unpacks it into
a folder of the usual kind. An archive cannot be resumed.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sgrl.commands import command
from sgrl.files import write_text
from sgrl.results import tune_folder
from sgrl.results.checkpoints import newest_valid_checkpoint, write_checkpoint
from sgrl.results.folder import OVER, SweepFolder, TrialFolder
from sgrl.results.metrics import (
    COLUMNS,
    EVALUATION_COLUMNS,
    INTEGER_COLUMNS,
    MEASURES,
    Row,
    read_metrics,
    write_rows,
)
from sgrl.results.plan import ExperimentError, planned_trials
from sgrl.results.provenance import read_starts
from sgrl.results.storage import StorageError, is_archive
from sgrl.yaml_files import dump_yaml

FORMAT = 1
#: Columns kept in double precision: with them, scores and steps to a threshold stay what they are.
DOUBLE = (*MEASURES, *EVALUATION_COLUMNS, "episode_length_mean")
#: What starts of many trials have in common.
WHERE = ("versions", "core", "revision", "machine")


class ArchiveError(StorageError):
    """An archive cannot be written or read; the message is one line."""


class ArchivedTrial(NamedTuple):
    """One trial of an archive.

    Attributes:
        name: of the trial, as its folder was called.
        config: what config.yaml said.
        status: what status.json said.
        starts: what provenance.json said, see `sgrl.results.provenance.record_start`.
        rows: what metrics.csv said, in the precision of the archive.
    """

    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    starts: list[dict[str, Any]]
    rows: list[Row]


def write_archive(
    sweep: Path, out: Path, policies: Collection[str] = (), half: bool = False
) -> list[str]:
    """Pack a finished sweep.

    Args:
        sweep: its folder.
        out: the archive's folder, which must not hold anything else.
        policies: trials whose final policy goes along.
        half: whether their weights are kept as float16, in half the space: to act with, not to
            repeat numbers with.

    Returns:
        One line for each folder left out because it is not one of the sweep's trials.

    Raises:
        ArchiveError: the folder holds no sweep, a trial is missing or not over, a policy is
            missing, or `out` holds other files.
    """
    if tune_folder.is_tune_folder(sweep):
        with tempfile.TemporaryDirectory(prefix="sgrl-") as home:
            copy = Path(home) / sweep.resolve().name
            tune_folder.unpack(sweep, copy)
            return write_archive(copy, out, policies, half)
    folder = SweepFolder(sweep)
    folders = folder.trials()
    if not folders or is_archive(sweep):
        raise ArchiveError(f"{sweep} holds no sweep: give a folder such as results/quickstart")
    left_out: list[str] = []
    # Results without an experiment are taken as they are.
    with contextlib.suppress(ExperimentError):
        names = {trial.name for trial in planned_trials(folder.experiment)}
        for problem in folder.problems(names):
            if problem.partition(":")[0] in names:
                raise ArchiveError(f"{sweep} is not whole: {problem}")
            left_out.append(problem)
        folders = [trial for trial in folders if trial.name in names]
    trials = [_read_trial(trial) for trial in folders]
    for trial in trials:
        if trial.status.get("state") not in OVER:
            again = f"go on with {command('sgrl', 'resume', sweep)}"
            if not folder.experiment.is_file():
                again = tune_folder.RESTORE
            raise ArchiveError(f"{trial.name} is not over: {again}")
    for name in policies:
        if name not in {trial.name for trial in trials}:
            raise ArchiveError(f"{sweep} has no trial {name!r}")
    if out.exists() and any(out.iterdir()) and not is_archive(out):
        raise ArchiveError(f"{out} holds something else: give another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    packed = SweepFolder(out)
    _copy_kept(folder, packed)
    for name in policies:
        _copy_policy(folder.trial(name), packed.trial(name), half)
    pq.write_table(
        _table(trials),
        packed.archived_metrics,
        compression="zstd",
        compression_level=19,
        use_dictionary=["trial"],
        use_byte_stream_split=True,
    )
    # Last: with it, the folder is an archive.
    write_text(packed.archived_trials, _trials_json(trials))
    return left_out


def read_archive(archive: Path) -> list[ArchivedTrial]:
    """The trials of an archive, in the order of their names.

    Raises:
        ArchiveError: it cannot be read, or its files do not belong together.
    """
    if not is_archive(archive):
        raise ArchiveError(f"{archive} is no archive: make one with {command('sgrl', 'archive')}")
    packed = SweepFolder(archive)
    try:
        content = json.loads(packed.archived_trials.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ArchiveError(f"{archive} has the unknown format {content['format']}")
        machines = content["machines"]
        rows = _rows_by_trial(pq.read_table(packed.archived_metrics))
        trials = [
            ArchivedTrial(
                trial["config"]["name"],
                trial["config"],
                trial["status"],
                [
                    {key: value for key, value in start.items() if key != "machine"}
                    | machines[start["machine"]]
                    for start in trial["starts"]
                ],
                rows.pop(trial["config"]["name"], []),
            )
            for trial in content["trials"]
        ]
    except ArchiveError:
        raise
    except (OSError, KeyError, TypeError, IndexError, json.JSONDecodeError, pa.ArrowException) as e:
        reason = " ".join(str(e).split())
        raise ArchiveError(f"{archive} is damaged: {type(e).__name__}: {reason}") from None
    if rows:
        raise ArchiveError(
            f"{archive} is damaged: {packed.archived_trials.name} lacks the trial "
            f"{next(iter(rows))}"
        )
    return trials


def unpack(archive: Path, folder: Path) -> None:
    """Lay an archive out as the folder of a sweep, checkpoints aside.

    Raises:
        ArchiveError: as `read_archive`.
    """
    trials = read_archive(archive)
    folder.mkdir(parents=True, exist_ok=True)
    sweep = SweepFolder(folder)
    _copy_kept(SweepFolder(archive), sweep)
    for trial in trials:
        home = sweep.trial(trial.name)
        home.path.mkdir()
        home.config.write_text(dump_yaml(trial.config), encoding="utf-8")
        home.status.write_text(json.dumps(trial.status), encoding="utf-8")
        home.provenance.write_text(json.dumps(trial.starts), encoding="utf-8")
        write_rows(home.metrics, trial.rows)


def _copy_kept(source: SweepFolder, target: SweepFolder) -> None:
    """Copy what an archive holds of a sweep as it is."""
    for file in (source.experiment, source.provenance, source.summary, source.rounds):
        if file.is_file():
            shutil.copyfile(file, target.path / file.name)


def _read_trial(folder: TrialFolder) -> ArchivedTrial:
    return ArchivedTrial(
        folder.name,
        folder.read_config(),
        folder.read_status(),
        read_starts(folder.provenance),
        read_metrics(folder.metrics),
    )


def _trials_json(trials: Iterable[ArchivedTrial]) -> str:
    """One line a trial. Versions and machines of the starts are listed once and numbered."""
    machines: list[dict[str, Any]] = []
    lines = []
    for trial in trials:
        starts = []
        for start in trial.starts:
            where: dict[str, Any] = {key: start[key] for key in WHERE if key in start}
            if where not in machines:
                machines.append(where)
            rest = {key: value for key, value in start.items() if key not in where}
            starts.append({**rest, "machine": machines.index(where)})
        lines.append(json.dumps({"config": trial.config, "status": trial.status, "starts": starts}))
    listed = ",\n".join(json.dumps(machine) for machine in machines)
    return (
        f'{{"format": {FORMAT},\n"machines": [\n{listed}\n],\n'
        '"trials": [\n' + ",\n".join(lines) + "\n]}\n"
    )


def _table(trials: Iterable[ArchivedTrial]) -> pa.Table:
    """All rows, in the order of the trials; a column that a trial lacks is null there."""
    trials = list(trials)
    rows = [row for trial in trials for row in trial.rows]
    names = [trial.name for trial in trials for _ in trial.rows]
    arrays: dict[str, pa.Array] = {"trial": pa.array(names, pa.string()).dictionary_encode()}
    for column in dict.fromkeys(name for row in rows for name in row):
        whole = column in INTEGER_COLUMNS
        # A whole number that is empty is null too: so is all of an axis that a trial lacks.
        null = np.array(
            [column not in row or (whole and math.isnan(row[column])) for row in rows], bool
        )
        values = [0 if empty else row[column] for empty, row in zip(null, rows, strict=True)]
        kind = np.int64 if whole else np.float64 if column in DOUBLE else np.float32
        arrays[column] = pa.array(np.array(values, kind), mask=null)
    return pa.table(arrays)


def _rows_by_trial(table: pa.Table) -> dict[str, list[Row]]:
    by_trial: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_trial.setdefault(row.pop("trial"), []).append(row)
    rows: dict[str, list[Row]] = {}
    for name, read in by_trial.items():
        had = [c for c in read[0] if c in COLUMNS or any(row[c] is not None for row in read)]
        rows[name] = [{c: math.nan if row[c] is None else row[c] for c in had} for row in read]
    return rows


def in_archive(column: str, value: float) -> float:
    """A number of metrics.csv as an archive keeps it."""
    single = column not in INTEGER_COLUMNS and column not in DOUBLE
    return float(np.float32(value)) if single else value


def _copy_policy(source: TrialFolder, target: TrialFolder, half: bool) -> None:
    from safetensors.torch import load_file, save_file

    from sgrl.nn.registry import DESCRIPTION_FILE, WEIGHTS_FILE

    checkpoint, _ = newest_valid_checkpoint(source.checkpoints)
    if checkpoint is None:
        raise ArchiveError(f"{source.checkpoints} holds no whole checkpoint")

    def save(directory: Path) -> None:
        shutil.copyfile(checkpoint / DESCRIPTION_FILE, directory / DESCRIPTION_FILE)
        state = load_file(checkpoint / WEIGHTS_FILE)
        if half:
            for name, value in state.items():
                # Statistics of observations may be too large for it.
                if value.is_floating_point() and not name.startswith("normalizer."):
                    state[name] = value.half()
        save_file(state, directory / WEIGHTS_FILE)

    try:
        write_checkpoint(target.checkpoints, int(checkpoint.name), save, keep=1)
    except OSError as error:
        raise ArchiveError(f"{checkpoint} holds no policy: {error}") from None
