"""Take a whole season's recordings through all steps, and measure what each step costs."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import torch

from birdcall.benchmark.scale import BUSY_SHARE, MACHINES, InferenceCosts, Machine
from birdcall.config import SEGMENT_SECONDS, replace_nested, require
from birdcall.data.cache import RecordingCache
from birdcall.data.dataset import TrainingData, load_training_data
from birdcall.demo.writer import SoundBank, write_season
from birdcall.evaluation.predict import recordings_cache
from birdcall.experiments import find_experiment
from birdcall.inference.ensemble import Member
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import SINGLE_SEGMENT
from birdcall.models.checkpoint import Checkpoint, fold_name, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.storage.files import read_table, write_atomically
from birdcall.taxonomy import all_species
from birdcall.training.distributed import DistributedContext
from birdcall.training.log import read_log
from birdcall.training.resume import conditions_of
from birdcall.training.runs import train_run
from birdcall.training.step import VALIDATION_SECONDS
from birdcall.training.trainer import Run, RunOptions

logger = logging.getLogger(__name__)

# --- names ----------------------------------------------------------------------------------------

_N_COMPETITION, _N_SEASON = 21_375, 43_934  # recordings; the season is with its extension
_FEWEST, _MOST = 9, 100  # recordings of a species in the competition
_N_RECORDISTS = 2_000
_WITH_BACKGROUND = 0.3  # share of the recordings that list another species
_TABLE_COLUMNS = ("filename", "ebird_code", "background_codes")


def season_names(path: Path | None = None) -> pd.DataFrame:
    """Return the season's recordings: filename, ebird_code, background_codes and recordist.

    From a CSV with the first three (codes apart by spaces), or made up: 43,934 recordings of 264
    species, 9 to 100 of each in the competition, and an extension that is as uneven as the real
    one. Recordists are made up, a few of whom have many recordings. ValueError for another file.
    """
    generator = np.random.default_rng(0)
    names = _make_names(generator) if path is None else read_table(path, _TABLE_COLUMNS)
    names = names[list(_TABLE_COLUMNS)].sort_values(["ebird_code", "filename"], ignore_index=True)
    weights = 1 / (np.arange(_N_RECORDISTS) + 10)
    numbers = generator.choice(_N_RECORDISTS, len(names), p=weights / weights.sum())
    return names.assign(recordist=[f"Recordist {number:04}" for number in numbers])


def _make_names(generator: np.random.Generator) -> pd.DataFrame:
    codes = [species.ebird_code for species in all_species()]
    quantiles = (np.arange(len(codes)) + 0.5) / len(codes)
    # Most species have all the 100 that xeno-canto's download was limited to.
    in_competition = (_FEWEST + (_MOST - _FEWEST) * np.minimum(1, 1.6 * quantiles) ** 0.75).round()
    uneven = np.exp([1.2 * NormalDist().inv_cdf(quantile) for quantile in quantiles])
    more = uneven / uneven.sum() * (_N_SEASON - in_competition.sum())
    ends = np.cumsum(in_competition + more).round().astype(int)
    counts = generator.permutation(np.diff(ends, prepend=0))
    ebird_codes = np.repeat(codes, counts)
    background = generator.choice(codes, len(ebird_codes))
    background[generator.random(len(ebird_codes)) > _WITH_BACKGROUND] = ""
    filenames = [f"XC{100_000 + number}.mp3" for number in range(len(ebird_codes))]
    return pd.DataFrame(
        dict(zip(_TABLE_COLUMNS, (filenames, ebird_codes, background), strict=True))
    )


def select_names(names: pd.DataFrame, n_recordings: int) -> pd.DataFrame:
    """Return so many of the recordings: one of each species first, the others evenly."""
    is_first = ~names["ebird_code"].duplicated()
    order = [*np.flatnonzero(is_first), *np.flatnonzero(~is_first)]
    n_first = min(int(is_first.sum()), n_recordings)
    others = np.linspace(n_first, len(names) - 1, n_recordings - n_first).round().astype(int)
    chosen = [*order[:n_first], *(order[position] for position in others)]
    return names.iloc[sorted(chosen)].reset_index(drop=True)


# --- what a process costs -------------------------------------------------------------------------

_LOOK_EVERY_SECONDS, _POLL_SECONDS = 0.25, 0.01


@dataclass(frozen=True)
class Usage:
    """What a command and its child processes took; memory: all of theirs together, at once."""

    seconds: float
    cpu_seconds: float
    peak_gigabytes: float
    was_killed: bool = False


def measure_command(
    command: Sequence[str], log: Path, kill_when: Callable[[], bool] | None = None
) -> Usage:
    """Run a command in a new process and measure it; SIGKILL it once ``kill_when`` says so.

    Memory is counted on Linux alone (NaN elsewhere), four times a second. Its output goes to
    ``log``. RuntimeError with the end of the log where the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    cpu: dict[int, float] = {}
    peak, killed = 0.0, False
    before, start = _children_seconds(), time.perf_counter()
    with log.open("wb") as file:
        # A session of its own, by which its children are known.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            while process.poll() is None:
                seconds, n_bytes = _look_at_session(process.pid)
                cpu |= seconds
                peak = max(peak, n_bytes / 1e9)
                next_look = time.monotonic() + _LOOK_EVERY_SECONDS
                while process.poll() is None and time.monotonic() < next_look:
                    if kill_when is not None and not killed and kill_when():
                        process.kill()
                        killed = process.wait() == -signal.SIGKILL
                    time.sleep(_POLL_SECONDS)
            wall_seconds = time.perf_counter() - start
            while killed and _look_at_session(process.pid)[0]:
                time.sleep(_LOOK_EVERY_SECONDS)  # its workers end by themselves
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode and not killed:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{tail}")
    # The system has added up those who ended by themselves, of the others the last look counts.
    cpu_seconds = max(sum(cpu.values()), _children_seconds() - before)
    return Usage(wall_seconds, cpu_seconds, peak or float("nan"), killed)


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _look_at_session(session: int) -> tuple[dict[int, float], int]:
    """Return CPU seconds by process of a session, and the bytes of memory that it has."""
    seconds, n_pages = {}, 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has just ended
            continue
        fields = text.rpartition(")")[2].split()  # from the third on, see proc(5)
        if int(fields[3]) == session and fields[0] != "Z":
            ticks = int(fields[11]) + int(fields[12])
            seconds[int(entry.name)] = ticks / os.sysconf("SC_CLK_TCK")
            n_pages += int(fields[21])
    return seconds, n_pages * os.sysconf("SC_PAGE_SIZE")


# --- steps ----------------------------------------------------------------------------------------

_EXPERIMENTS = ("small_plain", "small_gru", "small_attention", "small_gru_attention")
_EXPERIMENTS += ("small_gru_clean", "small_gru_bf16", "small_attention_normed")
_N_FOLDS = 5  # so 35 members
# Of the members: a few thousand weights, as their predictions are random.
_TINY = {"backbone": "test_byobnet", "backbone_options": (), "temporal_size": 16}
_TRAINED, _N_STEPS = "small_plain", 20
_TRAINING, _EVALUATE = f"train, {_N_STEPS} steps", "evaluate"
_RESULTS = "season.csv"
_KILLED_SHARE = 0.25  # of the audit, when it is killed
_JOURNAL_LINE_BYTES = 500  # more or less
_N_REPEATS = 10  # how much longer the sounds are that show what an hour of sound costs
_AUDIT, _LONG_AUDIT = "audit --cache", f"audit --cache, {_N_REPEATS} x as long"


@dataclass(frozen=True)
class _Season:
    """The folders of a data set of so many recordings."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def folds(self) -> Path:
        return self.folder / "folds.csv"

    def load(self) -> TrainingData:
        return load_training_data(
            self.data,
            folds=self.folds,
            audit=self.output / "audit.csv",
            cache=self.output / "cache",
        )

    def run(
        self, step: str, *options: str | Path, kill_when: Callable[[], bool] | None = None
    ) -> Usage:
        """Run a command of birdcall with these folders in a new process."""
        command = [sys.executable, "-m", "birdcall", step, "--data", self.data]
        command += ["--output", self.output, *options]
        log = self.folder / "logs" / f"{step}.log"
        return measure_command([str(part) for part in command], log, kill_when)

    def call(self, function: Callable[[str], None]) -> Usage:
        """Call a function of this module with the folder, in a new process."""
        name = function.__name__
        code = f"import sys; from {__name__} import {name}; {name}(sys.argv[1])"
        command = [sys.executable, "-c", code, str(self.folder)]
        return measure_command(command, self.folder / "logs" / f"{name}.log")

    def n_bytes(self) -> int:
        """Return the bytes of all results."""
        paths = (path for path in self.folder.rglob("*") if self.data not in path.parents)
        return sum(path.stat().st_size for path in paths if path.is_file())

    def audit(self) -> tuple[Usage, dict[str, int]]:
        """Audit, killed after a quarter, and resume; return the cost of both, and what is resumed.

        finished: recordings in the journal when it is killed. again: of those, decoded again.
        """
        journal = self.output / "audit.journal"
        n_recordings = len(read_table(self.data / "train.csv", ["filename"]))
        n_bytes = _KILLED_SHARE * n_recordings * _JOURNAL_LINE_BYTES
        usages = [
            self.run(
                *("audit", "--cache"),
                kill_when=lambda: journal.is_file() and journal.stat().st_size >= n_bytes,
            )
        ]
        require(usages[0].was_killed, f"the audit of {n_recordings} recordings ended unkilled")
        lines = journal.read_bytes().split(b"\n")[1:-1]  # complete ones, without the fingerprint
        names = [json.loads(line)["key"]["path"] for line in lines]
        cache = RecordingCache(self.data, self.output / "cache")
        written = {name: cache.path(name).stat().st_mtime_ns for name in names}
        usages.append(self.run("audit", "--cache"))
        again = [name for name in names if cache.path(name).stat().st_mtime_ns != written[name]]
        return Usage(
            seconds=sum(usage.seconds for usage in usages),
            cpu_seconds=sum(usage.cpu_seconds for usage in usages),
            peak_gigabytes=max(usage.peak_gigabytes for usage in usages),
        ), {"finished": len(names), "again": len(again)}


def _train_shortly(folder: str) -> None:
    """Train a few steps on all folds but the first, and validate on that."""
    season = _Season(Path(folder))
    data = {"clips_per_epoch": _N_STEPS * find_experiment(_TRAINED).train.data.batch_size}
    experiment = replace_nested(find_experiment(_TRAINED), train={"epochs": 1, "data": data})
    train_run(Run(experiment, 0, season.output / "training"), season.load(), RunOptions())


def _store_runs(season: _Season) -> None:
    """Write runs of all experiments and folds, and random predictions of what each held out."""
    data, device = season.load(), torch.device("cpu")
    column_of = {code: column for column, code in enumerate(data.classes)}
    for fold in data.folds:
        held_out = data.split(fold)[1]
        paths = {name: data.folder / name for name in held_out["path"]}
        cache = recordings_cache(season.output / "predictions", fold, paths.values())
        n_rows, generator = len(held_out), np.random.default_rng(fold)
        common = generator.normal(-6, 1.2, (n_rows, len(data.classes))).astype(np.float32)
        common[np.arange(n_rows), held_out["ebird_code"].map(column_of)] += 5
        for number, name in enumerate(_EXPERIMENTS):
            experiment = replace_nested(find_experiment(name), model=_TINY)
            torch.manual_seed(1000 * number + fold)
            model = build_model(experiment, len(data.classes)).eval()
            conditions = conditions_of(
                *(data, experiment, None, device), distributed=DistributedContext()
            )
            saved = save_checkpoint(
                season.output / "runs" / name / fold_name(fold),
                model,
                Checkpoint(experiment, data.classes, fold, trained_on=conditions),
            )
            noise = generator.normal(0, 0.8, (2, *common.shape)).astype(np.float32)
            clipwise, framewise = 1 / (1 + np.exp(-(common + noise)))
            predictions = SegmentPredictions(
                clipwise[None],
                framewise[None],
                starts=tuple(range(n_rows)),  # the sounds are shorter than a segment
                recording_seconds=tuple(held_out["seconds"]),
            )
            by_name = dict(zip(paths, predictions.split(), strict=True))
            cache.write(Member(saved.name, model, saved), SINGLE_SEGMENT, by_name)


def measure_season(season: _Season, hours: float, kernel: Path) -> Iterator[dict[str, object]]:
    """Take a data set through all steps; yield a row of each with its cost.

    Columns: step, recordings, hours (of sound), bytes (of new results on disk), those of `Usage`,
    finished and again (of an audit that was killed, see `_Season.audit`).
    """
    n_recordings = len(read_table(season.data / "train.csv", ["filename"]))
    n_bytes = 0

    def row_of(step: str, usage: Usage | None = None, **resumed: int) -> dict[str, object]:
        nonlocal n_bytes
        n_before, n_bytes = n_bytes, season.n_bytes()
        row = {"step": step, "recordings": n_recordings, "hours": hours}
        row |= {"bytes": n_bytes - n_before, **(asdict(usage) if usage else {}), **resumed}
        logger.info(", ".join(f"{name} {value}" for name, value in row.items()))
        return row

    usage, resumed = season.audit()
    yield row_of(_AUDIT, usage, **resumed)
    options = ("--folds", season.folds, "--n-folds", str(_N_FOLDS))
    usage = season.run("folds", *options)
    yield row_of("folds", usage)
    yield row_of(_TRAINING, season.call(_train_shortly))
    _store_runs(season)
    yield row_of("stored predictions")
    # A first evaluation simulates soundscapes and predicts them, as many as for few recordings.
    for step in ("evaluate, first", _EVALUATE):
        yield row_of(step, season.run("evaluate", "--folds", season.folds))
    build = ("--build", season.folder / "build", "--script", kernel)
    yield row_of("package", season.run("package", *build))


def benchmark_season(
    data: Path, folder: Path, kernel: Path, *, names: Path | None, sizes: Sequence[int]
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Measure the steps for some sizes of a season, each in a new process; return two tables.

    ``data``: a data folder whose sound is repeated, at lengths of about a second. ``names``: see
    `season_names`. ``kernel``: the script of the submission. The data sets are written to
    ``folder``/season, one after another, and deleted; ``season.csv`` beside it has a row per step
    and size (see `measure_season` and `compare_sizes`), ``season_machines.csv`` what the real
    season takes on known machines (None for small sizes). ValueError for more recordings than
    there are names.
    """
    table = season_names(names)
    for size in sizes:
        require(0 < size <= len(table), f"a size is {size}; there are {len(table)} names")
    bank, rows = SoundBank(data), []
    for size in sorted(set(sizes)):
        season = _Season(folder / "season" / str(size))
        shutil.rmtree(season.folder, ignore_errors=True)
        chosen = select_names(table, size)
        hours = write_season(season.data, chosen, bank)
        for row in measure_season(season, hours, kernel):
            rows.append(row)
            write_atomically(folder / _RESULTS, compare_sizes(rows).to_csv(index=False))
        if size == min(sizes):
            clips_per_second = read_log(season.output / "training")[-1].clips_per_second
            shutil.rmtree(season.folder)
            hours = write_season(season.data, chosen, bank, _N_REPEATS)
            usage = season.run("audit", "--cache")
            rows.append({"step": _LONG_AUDIT, "recordings": size, "hours": hours})
            rows[-1] |= {"bytes": season.n_bytes(), **asdict(usage)}
        shutil.rmtree(season.folder)
        compared = compare_sizes(rows)
        write_atomically(folder / _RESULTS, compared.to_csv(index=False))
    if max(sizes) < _MIN_ESTIMATED:
        logger.warning("nothing is estimated for the season: no size is %d or more", _MIN_ESTIMATED)
        return compared, None
    costs = SeasonCosts.of(compared, clips_per_second)
    machines = pd.DataFrame([costs.estimate(machine) for machine in MACHINES])
    write_atomically(folder / "season_machines.csv", machines.to_csv(index=False))
    return compared, machines


def compare_sizes(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """Return the table of all steps, by step and size, with three columns more.

    seconds_per_1000: wall time of a thousand recordings. added_per_1000: CPU seconds that each
    thousand takes beyond those of the size before, which is without the start of Python. growth:
    that relative to the size before; 1 is linear.
    """
    table = pd.DataFrame(rows).drop(columns="was_killed", errors="ignore")
    order = {step: number for number, step in enumerate(table["step"].unique())}
    table = table.sort_values(
        ["step", "recordings"],
        key=lambda column: column.map(order) if column.name == "step" else column,
        ignore_index=True,
    )
    by_step = table.groupby("step", sort=False)
    thousands = table["recordings"] / 1000
    table["seconds_per_1000"] = table["seconds"] / thousands
    added = by_step["cpu_seconds"].diff() / by_step["recordings"].diff() * 1000
    table["added_per_1000"] = added
    table["growth"] = added / added.groupby(table["step"]).shift()
    return table.round(3)


# --- the real season ------------------------------------------------------------------------------

_MIN_ESTIMATED = 1000  # recordings; fewer take less time than Python's start
_RECORDING_SECONDS = 52.6  # mean length: 72 GB of wav at 32 kHz for the competition's 21,375
_CACHE_BYTES = 64_000  # a second
_MP3_BYTES = 16_000
_TRAINING_PER_INFERENCE = 3  # a step's backward pass takes twice the forward pass
# What `benchmark inference` measured for EfficientNet-B0 with a GRU, see docs/scale.md.
_INFERENCE = InferenceCosts(reading=1.6, front_end=1.2, network=3.5)


@dataclass(frozen=True)
class SeasonCosts:
    """Seconds of a core.

    recording, hour: that the audit takes for a recording, and for each hour of its sound. tables:
    of folds and evaluation, which run on one core. package: of 35 members. clip: a training clip of
    ``small_plain``.
    """

    recording: float
    hour: float
    tables: float
    package: float
    clip: float
    n_recordings: int = _N_SEASON

    @classmethod
    def of(cls, table: pd.DataFrame, clips_per_second: float) -> SeasonCosts:
        """Return the costs by `compare_sizes`; what grows is scaled to the whole season."""
        largest = table.groupby("step").last()
        short = table[table["step"] == _AUDIT].iloc[0]
        long = largest.loc[_LONG_AUDIT]
        hour = (long["cpu_seconds"] - short["cpu_seconds"]) / (long["hours"] - short["hours"])
        audit = largest.loc[_AUDIT]
        n_recordings = audit["recordings"]
        tables = largest.loc[["folds", _EVALUATE]]
        # With a single size all of it is taken to grow.
        growing = tables["added_per_1000"].fillna(1000 * tables["cpu_seconds"] / n_recordings)
        n_thousands = max(0, _N_SEASON - n_recordings) / 1000
        return cls(
            recording=(audit["cpu_seconds"] - hour * audit["hours"]) / n_recordings,
            hour=hour,
            tables=(tables["cpu_seconds"] + n_thousands * growing.clip(lower=0)).sum(),
            package=largest.loc["package", "cpu_seconds"],
            clip=torch.get_num_threads() / clips_per_second,
        )

    def estimate(self, machine: Machine) -> dict[str, object]:
        """Return hours, and gigabytes on disk, for the real season on a machine.

        epoch_minutes: a clip of each recording in four of five folds, ``small_plain`` on cores;
        EfficientNet-B0 on GPUs. predict_hours: the first 30 s of each held-out recording with seven
        members.
        """
        cores, n = machine.cores * BUSY_SHARE, self.n_recordings
        hours = n * _RECORDING_SECONDS / 3600
        n_clips = n * (1 - 1 / _N_FOLDS)
        epoch_seconds = n_clips * self.clip / cores
        if machine.gpus:
            speed = machine.gpus * machine.gpu_x_real_time / _TRAINING_PER_INFERENCE
            epoch_seconds = n_clips * SEGMENT_SECONDS / speed
        held_out_hours = n * VALIDATION_SECONDS / 3600
        predict = held_out_hours * machine.seconds_per_hour(_INFERENCE, len(_EXPERIMENTS))
        return {
            "machine": machine.name,
            "audit_hours": round((self.recording * n + self.hour * hours) / cores / 3600, 2),
            "epoch_minutes": round(epoch_seconds / 60, 1),
            "predict_hours": round(predict / 3600, 2),
            "tables_minutes": round(self.tables / 60, 1),
            "package_minutes": round(self.package / 60, 1),
            "mp3_gigabytes": round(3600 * hours * _MP3_BYTES / 1e9),
            "cache_gigabytes": round(3600 * hours * _CACHE_BYTES / 1e9),
        }
