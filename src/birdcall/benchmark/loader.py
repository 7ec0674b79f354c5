"""Time reading training clips: by librosa, a seek, the cache, the loader, and in a training."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import librosa
import numpy as np
import pandas as pd
import torch

from birdcall.audio.filters import generate_noise
from birdcall.audio.reading import AudioError, iterate_audio, read_audio
from birdcall.benchmark.frontend import label_speeds, time_in_turns
from birdcall.config import NO_AUGMENT, SEGMENT_SECONDS, Experiment, replace_nested, require
from birdcall.data.cache import CropRequest, RecordingCache
from birdcall.data.clips import ClipDataset
from birdcall.data.dataset import TrainingData
from birdcall.data.loader import ClipBatch, FailureCounter, iterate_clips, make_loader
from birdcall.data.noise import find_noise
from birdcall.data.recordings import classes_of, read_recordings
from birdcall.data.targets import ClipSampler
from birdcall.experiments import find_experiment
from birdcall.models.sed import build_model
from birdcall.report.plots import AMBER, GREEN, GREY, SKY, new_figure, save_figure
from birdcall.storage.files import write_atomically
from birdcall.training.step import BatchLoss
from birdcall.training.trainer import Run, RunOptions, Training, start_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_EXPERIMENT = find_experiment("small_gru")  # two cores train it
_RATE = _EXPERIMENT.frontend.sample_rate
_BATCH_SIZE = _EXPERIMENT.train.data.batch_size
_WORKERS = (0, 1, 2, 4)
_LOADER_SETTINGS: tuple[dict[str, Any], ...] = (
    {"cached": False, "augmented": False},
    {"cached": False, "augmented": True},
    {"cached": True, "augmented": False},
    {"cached": True, "augmented": True},
    {"cached": False, "augmented": False, "crops_per_recording": 4},
)
_STORED_BATCHES = 8  # of different clips, so that no step repeats the one before
_WARM_UP_STEPS = 4  # before each timing: batches that wait in a queue must not count as speed
_LIBROSA, _LIBROSA_OFFSET = "librosa.load, whole file", "librosa.load, offset="
_SEEK, _CACHE = "birdcall, seek in the file", "birdcall, cache"
_LOADER, _TRAINING = "birdcall loader", f"birdcall train, {_EXPERIMENT.name}"
_COLORS = {_LIBROSA: GREY, _LIBROSA_OFFSET: AMBER, _SEEK: SKY, _CACHE: GREEN}

# A path and an offset in seconds.
_ClipPosition = tuple[str, float]
_ReadClip = Callable[[_ClipPosition], np.ndarray]


def benchmark_loader(
    data: Path,
    output: Path,
    n_recordings: int = 200,
    n_clips: int = 256,
    repeats: int = 3,
    workers: Sequence[int] = _WORKERS,
    n_training_batches: int = 12,
    seed: int = 0,
) -> pd.DataFrame:
    """Time five-second clips at 32 kHz of up to ``n_recordings`` of ``data``; write loader.csv.

    The readers read one clip after another, one of each recording, at the same positions. Rows
    "birdcall loader" are epochs of ``n_clips`` in batches; ``start_seconds`` is the time to the
    first batch of the first epoch, which is not counted. "birdcall train" is the small experiment
    on cached clips: ``waiting_share`` is the share of its time in which it waits for them.
    Medians of ``repeats``; all take turns. Files and cache are in the page cache of the system.
    ``max_difference`` is from the full decode at the same position. Also writes loader.png.
    """
    require(
        min(n_recordings, n_clips, repeats) > 0,
        f"n_recordings {n_recordings}, n_clips {n_clips}, repeats {repeats} must be above 0",
    )
    with TemporaryDirectory(prefix="birdcall-") as folder, warnings.catch_warnings():
        # More workers than cores cause a warning; here they are compared on purpose.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        recordings = LoaderRecordings.prepare(data, Path(folder), n_recordings, seed)
        readers = {
            _LIBROSA: partial(_load_by_librosa, data, False),
            _LIBROSA_OFFSET: partial(_load_by_librosa, data, True),
            _SEEK: partial(_read_crop, recordings.files),
            _CACHE: partial(_read_crop, recordings.cached),
        }
        reading = time_readers(recordings, readers, repeats, seed)
        with ExitStack() as stack:
            runs = []
            for settings in _LOADER_SETTINGS:
                for n_workers in workers:
                    runs.append(LoaderRun(recordings, n_clips, workers=n_workers, **settings))
                    stack.callback(runs[-1].stop)
            loading = time_loaders(runs, repeats)
        training = _measure_waiting(recordings, workers, n_training_batches)
    table = pd.concat([reading, loading, training], ignore_index=True)
    librosa_speed = table.loc[table["side"] == _LIBROSA, "clips_per_second"].item()
    table["times_librosa"] = table["clips_per_second"] / librosa_speed
    table["cores"] = os.cpu_count()
    table = table.round(
        {"clips_per_second": 1, "times_librosa": 1, "start_seconds": 4, "waiting_share": 4}
    )
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "loader.csv", index=False)
    save_figure(plot_loader_speed(table), output / "loader.png")
    return table


@dataclass(frozen=True)
class LoaderRecordings:
    """The recordings that are read: a table with ``path``, ``seconds`` and labels; two readers."""

    table: pd.DataFrame
    folder: Path
    files: RecordingCache  # without any stored recording: it reads the files
    cached: RecordingCache
    noise_files: list[Path]

    @classmethod
    def prepare(cls, data: Path, folder: Path, n_recordings: int, seed: int) -> LoaderRecordings:
        """Choose recordings longer than a clip, and cache them below ``folder``."""
        chosen, seconds = [], []
        table = read_recordings(data).sample(frac=1, random_state=seed)
        cache = RecordingCache(data, folder / "cache", _RATE)
        for row, path in zip(table.index, table["path"], strict=True):
            if len(chosen) == n_recordings:
                break
            try:
                cache.write(path, iterate_audio(data / path, _RATE))
            except AudioError as error:
                logger.warning("left out: %s", error)
                continue
            length = len(cache(CropRequest(path, _RATE))[0]) / _RATE
            if length > SEGMENT_SECONDS:
                chosen.append(row)
                seconds.append(length)
        require(bool(chosen), f"{data}: no recording is longer than {SEGMENT_SECONDS} s")
        table = table.loc[chosen].assign(seconds=seconds)
        noise_files = find_noise(data / "noise") or generate_noise(folder / "noise", _RATE)
        logger.info("%d recordings, %.0f s on average", len(table), table["seconds"].mean())
        files = RecordingCache(data, cache.folder / "none")
        return cls(
            table, data, files=files, cached=RecordingCache(data, cache.folder),
            noise_files=noise_files,
        )  # fmt: skip


# --- one clip after another -----------------------------------------------------------------------


def _load_by_librosa(folder: Path, seek: bool, position: _ClipPosition) -> np.ndarray:
    """Load a clip: seek to it in the file, or cut it out of the whole recording."""
    path, offset = position
    if seek:
        return librosa.load(folder / path, sr=_RATE, offset=offset, duration=SEGMENT_SECONDS)[0]
    start = round(offset * _RATE)
    waveform, _ = librosa.load(folder / path, sr=_RATE)
    return waveform[start : start + SEGMENT_SECONDS * _RATE]


def _read_crop(reader: RecordingCache, position: _ClipPosition) -> np.ndarray:
    path, offset = position
    return reader(CropRequest(path, _RATE, (offset,), SEGMENT_SECONDS))[0]


def time_readers(
    recordings: LoaderRecordings, readers: Mapping[str, _ReadClip], repeats: int, seed: int
) -> pd.DataFrame:
    """Time every reader on a clip of each recording, after comparing it with the full decode.

    ``max_difference`` is the largest difference of a reader's clip from the same part of the whole
    recording.
    """
    generator = np.random.default_rng(seed)
    spare = recordings.table["seconds"].to_numpy() - SEGMENT_SECONDS
    offsets = generator.random(len(spare)) * spare
    positions = list(zip(recordings.table["path"], offsets, strict=True))
    differences = dict.fromkeys(readers, 0.0)
    for path, offset in positions:  # the warm-up, too
        whole, start = read_audio(recordings.folder / path, _RATE), round(offset * _RATE)
        for name, read in readers.items():
            clip = read((path, offset))
            n_samples = min(len(clip), SEGMENT_SECONDS * _RATE)  # librosa's can be a sample off
            difference = np.abs(clip[:n_samples] - whole[start : start + n_samples]).max()
            differences[name] = max(differences[name], float(difference))
    seconds = time_in_turns(list(readers.values()), positions, repeats)
    return pd.DataFrame(
        {
            "side": list(readers),
            "clips_per_second": len(positions) / np.median(seconds, axis=1),
            "max_difference": list(differences.values()),
        }
    )


# --- the loader -----------------------------------------------------------------------------------


class LoaderRun:
    """A loader that serves epochs of ``n_clips``, with its settings.

    cached: clips are read from the cache, not from the files. workers: processes of the loader.
    """

    def __init__(
        self,
        recordings: LoaderRecordings,
        n_clips: int,
        *,
        cached: bool,
        workers: int,
        augmented: bool,
        crops_per_recording: int = 1,
    ) -> None:
        self.source = "cache" if cached else "file"
        self.workers, self.augmented = workers, augmented
        self.crops_per_recording = crops_per_recording
        self.experiment = replace_nested(
            _EXPERIMENT,
            augment=_EXPERIMENT.augment if augmented else NO_AUGMENT,
            train={
                "data": {
                    "crops_per_recording": crops_per_recording,
                    "clips_per_epoch": max(n_clips, _BATCH_SIZE),
                }
            },
        )
        table = recordings.table
        data = TrainingData(
            folder=recordings.folder,
            recordings=table,
            classes=classes_of(table),
            read_crops=recordings.cached if cached else recordings.files,
            noise_files=recordings.noise_files,
            noise_store=recordings.cached.folder / "noise" if cached else None,
        )
        self.clips = ClipDataset(data, self.experiment)
        self.sampler = ClipSampler(table, self.experiment.train.data, self.experiment.train.seed)
        self.loader = make_loader(self.clips, self.sampler, workers)
        self.n_clips = len(self.loader) * _BATCH_SIZE
        self.failures = FailureCounter(self.clips)
        self.epoch = 0

    def batches(self) -> Iterator[ClipBatch]:
        self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iterate_clips(self.loader, self.failures)

    def run_epoch(self) -> tuple[float, float]:
        """Return the seconds until the first batch, and until the last."""
        start = time.perf_counter()
        batches = self.batches()
        next(batches)
        first = time.perf_counter() - start
        for _ in batches:
            pass
        return first, time.perf_counter() - start

    def stop(self) -> None:
        """End the workers, which live as long as the loader."""
        del self.loader


def time_loaders(runs: Sequence[LoaderRun], repeats: int) -> pd.DataFrame:
    """Time epochs of every run in turn; the workers live on from one epoch to the next."""
    starts = [run.run_epoch()[0] for run in runs]
    seconds = np.zeros((len(runs), repeats))
    for repeat in range(repeats):
        for index, run in enumerate(runs):
            seconds[index, repeat] = run.run_epoch()[1]
        logger.info("loading, run %d of %d done", repeat + 1, repeats)
    return pd.DataFrame(
        {
            "side": _LOADER,
            "source": [run.source for run in runs],
            "workers": [run.workers for run in runs],
            "augmented": [run.augmented for run in runs],
            "crops_per_recording": [run.crops_per_recording for run in runs],
            "clips_per_second": [run.n_clips for run in runs] / np.median(seconds, axis=1),
            "start_seconds": starts,
        }
    )


def _measure_waiting(
    recordings: LoaderRecordings, workers: Sequence[int], n_batches: int
) -> pd.DataFrame:
    """Train the small experiment on cached clips; measure the share of time that it waits."""
    rows = []
    for n in workers:
        n_clips = (n_batches + 2) * _BATCH_SIZE
        run = LoaderRun(recordings, n_clips, cached=True, workers=n, augmented=True)
        torch.manual_seed(0)
        n_classes = run.clips.targets.shape[1]
        model = build_model(run.experiment, n_classes, pretrained=False).train()
        learning_rate = run.experiment.train.optimizer.learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
        batch_loss = BatchLoss(model, run.experiment, torch.device("cpu"))
        step = partial(_train_batch, batch_loss, optimizer)
        waiting, seconds = time_waiting(run.batches(), step, n_batches)
        run.stop()
        rows.append(
            {
                "side": _TRAINING, "source": "cache", "workers": n, "augmented": True,
                "crops_per_recording": 1, "clips_per_second": n_batches * _BATCH_SIZE / seconds,
                "waiting_share": waiting / seconds,
            }
        )  # fmt: skip
        logger.info("training with %d workers done", n)
    return pd.DataFrame(rows)


def time_waiting(
    batches: Iterator[ClipBatch], step: Callable[[ClipBatch], None], n_batches: int
) -> tuple[float, float]:
    """Return seconds of waiting and in all, of ``n_batches`` steps after two for warm-up."""
    for batch in islice(batches, 2):  # workers start and the model warms up
        step(batch)
    waiting, start = 0.0, time.perf_counter()
    mark = start
    for batch in islice(batches, n_batches):
        waiting += time.perf_counter() - mark
        step(batch)
        mark = time.perf_counter()
    return waiting, mark - start


def _train_batch(batch_loss: BatchLoss, optimizer: torch.optim.Optimizer, batch: ClipBatch) -> None:
    loss = batch_loss(batch, epoch=0, position=0)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# --- training -------------------------------------------------------------------------------------


def benchmark_training(
    data: TrainingData, experiment: Experiment, folder: Path, *, n_steps: int = 40, repeats: int = 5
) -> pd.DataFrame:
    """Time steps of ``experiment`` with and without loading and augmentation; write training.csv.

    Two settings: one process on one core (as each run of `make demo`), and a process with loader
    workers on all cores. Both trainings take turns of ``n_steps``, so that a slow minute of the
    machine slows both. Columns: clips per second of each (medians), their ratio (median, lowest,
    highest of the turns), and the share of time in which the augmented training waits for clips.
    """
    n_cores = torch.get_num_threads()
    train_part, _ = data.split(data.folds[0])
    rows = []
    try:
        for setting, threads, workers in (
            ("a run on each core", 1, 0),
            ("a run on all cores", n_cores, max(1, n_cores - 1)),
        ):
            torch.set_num_threads(threads)
            n_clips = (_WARM_UP_STEPS + n_steps) * (repeats + 1) * experiment.train.data.batch_size
            endless = replace_nested(
                experiment, train={"epochs": 1, "data": {"clips_per_epoch": n_clips}}
            )
            trainings = []
            for variant, n in ((endless, workers), (replace(endless, augment=NO_AUGMENT), 0)):
                run, options = Run(variant, data.folds[0], folder), RunOptions(workers=n)
                trainings.append(start_training(run, data, train_part, options))
            augmented, stored = trainings
            stored.loader.sampler.set_epoch(0)
            batches = list(islice(stored.loader, _STORED_BATCHES))
            stored.loader = _StoredBatches(stored.loader.sampler, batches)
            row = {"setting": setting, "threads": threads, "workers": workers}
            rows.append(row | _compare(augmented, stored, n_steps, repeats))
    finally:
        torch.set_num_threads(n_cores)
    table = pd.DataFrame(rows)
    write_atomically(folder / "training.csv", table.to_csv(index=False))
    return table


@dataclass(frozen=True)
class _StoredBatches:
    """Stands in for a DataLoader: repeats a few batches that are in memory."""

    sampler: ClipSampler
    batches: list[ClipBatch]

    def __iter__(self) -> Iterator[ClipBatch]:
        return cycle(self.batches)


def _compare(augmented: Training, stored: Training, n_steps: int, repeats: int) -> dict[str, float]:
    trainings = [(training.progress, training.steps()) for training in (augmented, stored)]
    speeds = np.zeros((repeats + 1, len(trainings)))
    waiting = []
    for turn in range(repeats + 1):
        for index, (progress, steps) in enumerate(trainings):
            for _ in range(_WARM_UP_STEPS):
                next(steps)
            progress.seconds = progress.waiting = 0.0
            before, start = progress.n_clips, time.perf_counter()
            for _ in range(n_steps):
                next(steps)
            speeds[turn, index] = (progress.n_clips - before) / (time.perf_counter() - start)
        waiting.append(augmented.progress.waiting / augmented.progress.seconds)
        logger.info("turn %d of %d done", turn, repeats)
    augmented_speed, stored_speed = speeds[1:].T  # the first turn is the warm-up
    ratio = augmented_speed / stored_speed
    return {
        "augmented_clips_per_second": round(float(np.median(augmented_speed)), 1),
        "ready_clips_per_second": round(float(np.median(stored_speed)), 1),
        "ratio": round(float(np.median(ratio)), 3),
        "ratio_low": round(float(ratio.min()), 3),
        "ratio_high": round(float(ratio.max()), 3),
        "waiting_share": round(float(np.median(waiting[1:])), 3),
    }


# --- the figure -----------------------------------------------------------------------------------


def plot_loader_speed(table: pd.DataFrame) -> Figure:
    """Draw clips per second, of the readers and of the loader."""
    figure = new_figure(13, 4.6)
    readers, loaders = figure.subplots(1, 2)
    rows = table[table["side"].isin(_COLORS)].iloc[::-1]
    bars = readers.barh(rows["side"], rows["clips_per_second"], color=rows["side"].map(_COLORS))
    label_speeds(readers, bars, rows)
    readers.set_xscale("log")
    readers.margins(x=0.3)
    readers.set_title("One clip after another, one process")
    readers.set_xlabel("five-second clips per second  (× librosa.load of the file)")
    figure.suptitle(f"From recording to training clip, {table['cores'].iloc[0]} CPU cores")
    settings = ["source", "augmented", "crops_per_recording"]
    groups = list(table[table["side"] == _LOADER].groupby(settings, sort=False))
    width = 0.8 / len(groups)
    for number, ((source, augmented, crops), group) in enumerate(groups):
        label = f"{source}, {'augmented' if augmented else 'plain'}"
        label += f", {crops:.0f} crops of each opened" if crops > 1 else ""
        positions = np.arange(len(group)) + (number - (len(groups) - 1) / 2) * width
        bars = loaders.bar(
            positions, group["clips_per_second"], width, label=label, edgecolor="white",
            color=_COLORS[_CACHE if source == "cache" else _SEEK],
            hatch="///" if augmented else "..." if crops > 1 else "",
        )  # fmt: skip
        loaders.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
    loaders.set_yscale("log")
    loaders.set_xticks(np.arange(len(group)), [f"{n:.0f}" for n in group["workers"]])
    loaders.margins(y=0.2)
    loaders.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    loaders.set_ylim(top=loaders.get_ylim()[1] * 4)  # room for the legend
    loaders.set_title("The loader, batches of 32")
    loaders.set_xlabel("workers (0: in the training process)")
    loaders.set_ylabel("five-second clips per second")
    return figure
