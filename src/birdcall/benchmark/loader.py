"""Time the reading of training clips: librosa, a seek, the cache, and the loader around them."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import soundfile
import torch

from birdcall.audio.reading import AudioError, iterate_audio, read_audio
from birdcall.config import NO_AUGMENT, SEGMENT_SECONDS, Experiment, replace_nested, require
from birdcall.data.cache import Cache
from birdcall.data.dataset import ClipDataset, ClipReader
from birdcall.data.loader import ClipBatch, FailureCounter, iterate_clips, make_loader
from birdcall.data.noise import find_noise, generate_noise, make_noise
from birdcall.data.recordings import classes_of, read_recordings
from birdcall.data.targets import ClipSampler
from birdcall.experiments import find_experiment
from birdcall.models.sed import SEDModel, build_model
from birdcall.report.style import AMBER, GREEN, GREY, SKY, save_figure, use_style
from birdcall.storage.files import atomic_path, write_atomically
from birdcall.training.step import Detector, batch_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

SMALL = "small_gru"  # the experiment that two cores train
WORKERS = (0, 1, 2, 4)
CROPS = 4  # of one opened recording, where several are compared with one
LIBROSA, LIBROSA_OFFSET = "librosa.load, whole file", "librosa.load, offset="
SEEK, CACHED = "birdcall, seek in the file", "birdcall, cache"
LOADER, TRAINING = "birdcall loader", f"birdcall train, {SMALL}"
COLORS = {LIBROSA: GREY, LIBROSA_OFFSET: AMBER, SEEK: SKY, CACHED: GREEN}

ReadOne = Callable[[str, float], np.ndarray]  # (path, offset in seconds) → waveform (samples,)


class Recordings(NamedTuple):
    """What is read: a table with ``path``, ``seconds``, labels; where it and its cache lie."""

    table: pd.DataFrame
    folder: Path
    cache: Path
    noise_files: list[Path]


@dataclass(frozen=True)
class LoaderSide:
    """One way to run the loader."""

    cached: bool
    workers: int
    augmented: bool
    crops_per_recording: int = 1

    @property
    def experiment(self) -> Experiment:
        small = find_experiment(SMALL)
        augment = small.augment if self.augmented else NO_AUGMENT
        data = {"crops_per_recording": self.crops_per_recording}
        return replace_nested(small, augment=augment, train={"data": data})


def benchmark_loader(
    data: Path,
    output: Path,
    n_recordings: int = 200,
    n_clips: int = 256,
    repeats: int = 3,
    workers: Sequence[int] = WORKERS,
    seed: int = 0,
) -> pd.DataFrame:
    """Time five-second clips at 32 kHz of up to ``n_recordings`` of ``data``; write loader.csv.

    The readers read one clip after another, one of each recording, at the same places. Rows
    "birdcall loader" are epochs of ``n_clips`` in batches; ``start_seconds`` is the time to the
    first batch of the first epoch, which is not counted. "birdcall train" is the small experiment
    on cached clips: ``waiting_share`` of its time goes by waiting for them.
    Medians of ``repeats``; the sides take turns. Files and cache are in the page cache of the
    system. ``max_difference`` is from the full decode at the same place. Also writes loader.png.
    """
    require(
        min(n_recordings, n_clips, repeats) > 0,
        f"n_recordings {n_recordings}, n_clips {n_clips}, repeats {repeats} must be above 0",
    )
    with TemporaryDirectory(prefix="birdcall-") as folder, warnings.catch_warnings():
        # More workers than cores are worth a warning, but here they are the question.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        recordings = prepare_recordings(data, Path(folder), n_recordings, seed)
        reading = time_readers(recordings, make_readers(recordings), repeats, seed)
        loading = time_loaders(recordings, make_sides(workers), n_clips, repeats)
        training = measure_waiting(recordings, workers)
    table = pd.concat([reading, loading, training], ignore_index=True)
    librosa = table.loc[table["side"] == LIBROSA, "clips_per_second"].item()
    table["times_librosa"] = table["clips_per_second"] / librosa
    table["cores"] = os.cpu_count()
    table = table.round(
        {"clips_per_second": 1, "times_librosa": 1, "start_seconds": 4, "waiting_share": 4}
    )
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "loader.csv", index=False)
    save_figure(plot_benchmark(table), output / "loader.png")
    return table


def prepare_recordings(data: Path, folder: Path, n_recordings: int, seed: int) -> Recordings:
    """Choose recordings at least as long as a clip, and cache them below ``folder``."""
    chosen, seconds = [], []
    table = read_recordings(data).sample(frac=1, random_state=seed)
    rate = find_experiment(SMALL).frontend.sample_rate
    cache = Cache(folder / "cache", rate)
    for row, path in zip(table.index, table["path"], strict=True):
        if len(chosen) == n_recordings:
            break
        try:
            cache.write(data, path, iterate_audio(data / path, rate))
        except AudioError as error:
            log.warning("left out: %s", error)
            continue
        length = len(cache.read_crops(data, path, [0], None)[0]) / rate
        if length > SEGMENT_SECONDS:
            chosen.append(row)
            seconds.append(length)
    require(bool(chosen), f"{data}: no recording is longer than {SEGMENT_SECONDS} s")
    table = table.loc[chosen].assign(seconds=seconds)
    noise_files = find_noise(data / "noise") or generate_noise(folder / "noise", rate)
    log.info("%d recordings, %.0f s on average", len(table), table["seconds"].mean())
    return Recordings(table, data, cache.root, noise_files)


# --- one clip after another ----------------------------------------------------------------------


def make_readers(recordings: Recordings) -> dict[str, ReadOne]:
    """Return every way to read one clip, by its name."""
    import librosa

    rate = find_experiment(SMALL).frontend.sample_rate
    n_samples = SEGMENT_SECONDS * rate

    def load(path: str, offset: float) -> np.ndarray:
        start = round(offset * rate)
        return librosa.load(recordings.folder / path, sr=rate)[0][start : start + n_samples]

    def load_offset(path: str, offset: float) -> np.ndarray:
        file = recordings.folder / path
        return librosa.load(file, sr=rate, offset=offset, duration=SEGMENT_SECONDS)[0]

    def read(reader: ClipReader, path: str, offset: float) -> np.ndarray:
        return reader(path, rate, [offset], SEGMENT_SECONDS)[0]

    seek = partial(read, _reader(recordings, cached=False))
    cached = partial(read, _reader(recordings, cached=True))
    return {LIBROSA: load, LIBROSA_OFFSET: load_offset, SEEK: seek, CACHED: cached}


def _reader(recordings: Recordings, cached: bool) -> ClipReader:
    return ClipReader(recordings.folder, recordings.cache if cached else recordings.cache / "none")


def time_readers(
    recordings: Recordings, readers: dict[str, ReadOne], repeats: int, seed: int
) -> pd.DataFrame:
    """Time every reader on a clip of each recording, after comparing it with the full decode."""
    generator = np.random.default_rng(seed)
    spare = recordings.table["seconds"].to_numpy() - SEGMENT_SECONDS
    offsets = generator.random(len(spare)) * spare
    clips = list(zip(recordings.table["path"], offsets, strict=True))
    differences = _compare(recordings.folder, readers, clips)  # the warm-up, too
    seconds = np.zeros((len(readers), repeats))
    for repeat in range(repeats):
        for path, offset in clips:  # the sides take turns: a busy machine slows all of them
            for row, read in enumerate(readers.values()):
                began = time.perf_counter()
                read(path, offset)
                seconds[row, repeat] += time.perf_counter() - began
        log.info("reading, run %d of %d done", repeat + 1, repeats)
    return pd.DataFrame(
        {
            "side": list(readers),
            "clips_per_second": len(clips) / np.median(seconds, axis=1),
            "max_difference": differences,
        }
    )


def _compare(
    folder: Path, readers: dict[str, ReadOne], clips: Sequence[tuple[str, float]]
) -> list[float]:
    """Return each reader's largest difference from the full decode at the same place."""
    rate = find_experiment(SMALL).frontend.sample_rate
    differences = dict.fromkeys(readers, 0.0)
    for path, offset in clips:
        whole, start = read_audio(folder / path, rate), round(offset * rate)
        for name, read in readers.items():
            clip = read(path, offset)
            n_samples = min(len(clip), SEGMENT_SECONDS * rate)  # librosa's can be a sample off
            difference = np.abs(clip[:n_samples] - whole[start : start + n_samples]).max()
            differences[name] = max(differences[name], float(difference))
    return list(differences.values())


# --- the loader ----------------------------------------------------------------------------------


def make_sides(workers: Sequence[int]) -> list[LoaderSide]:
    """List file and cache, without and with augmentation, and several crops of a file."""
    sides = [
        LoaderSide(cached, n, augmented)
        for cached in (False, True)
        for augmented in (False, True)
        for n in workers
    ]
    return sides + [LoaderSide(False, n, False, CROPS) for n in workers]


def time_loaders(
    recordings: Recordings, sides: Sequence[LoaderSide], n_clips: int, repeats: int
) -> pd.DataFrame:
    """Time epochs of every side in turn; their workers live on from one to the next."""
    with ExitStack() as stack:
        runs = [_Run(recordings, side, n_clips) for side in sides]
        for run in runs:
            stack.callback(run.stop)
        starts = [run.run_epoch()[0] for run in runs]
        seconds = np.zeros((len(runs), repeats))
        for repeat in range(repeats):
            for row, run in enumerate(runs):
                seconds[row, repeat] = run.run_epoch()[1]
            log.info("loading, run %d of %d done", repeat + 1, repeats)
    return pd.DataFrame(
        {
            "side": LOADER,
            "source": ["cache" if side.cached else "file" for side in sides],
            "workers": [side.workers for side in sides],
            "augmented": [side.augmented for side in sides],
            "crops_per_recording": [side.crops_per_recording for side in sides],
            "clips_per_second": [run.n_clips for run in runs] / np.median(seconds, axis=1),
            "start_seconds": starts,
        }
    )


class _Run:
    """A loader that serves one epoch after another."""

    def __init__(self, recordings: Recordings, side: LoaderSide, n_clips: int) -> None:
        table, experiment = recordings.table, side.experiment
        data = experiment.train.data
        reader = _reader(recordings, side.cached)
        self.clips = ClipDataset(
            recordings=table,
            classes=classes_of(table),
            experiment=experiment,
            read_clip=reader,
            noise_files=recordings.noise_files,
            noise_store=recordings.cache / "noise" if side.cached else None,
        )
        self.sampler = ClipSampler(
            list(table["ebird_code"]), max(n_clips, data.batch_size), data.sampling,
            experiment.train.seed, crops_per_recording=side.crops_per_recording,
        )  # fmt: skip
        self.loader = make_loader(self.clips, self.sampler, side.workers)
        self.n_clips = len(self.loader) * data.batch_size
        self.failures = FailureCounter(self.clips)
        self.epoch = 0

    def batches(self) -> Iterator[ClipBatch]:
        self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iterate_clips(self.loader, self.failures)

    def run_epoch(self) -> tuple[float, float]:
        """Return the seconds until the first batch, and until the last."""
        began = time.perf_counter()
        batches = self.batches()
        next(batches)
        first = time.perf_counter() - began
        for _ in batches:
            pass
        return first, time.perf_counter() - began

    def stop(self) -> None:
        """End the workers, which live as long as the loader."""
        del self.loader


def measure_waiting(
    recordings: Recordings, workers: Sequence[int], n_batches: int = 12
) -> pd.DataFrame:
    """Train the small experiment on cached clips and say which share of the time it waits."""
    rows = []
    for n in workers:
        side = LoaderSide(cached=True, workers=n, augmented=True)
        batch_size = side.experiment.train.data.batch_size
        run = _Run(recordings, side, (n_batches + 2) * batch_size)
        waiting, seconds = _train(run, side.experiment, n_batches)
        run.stop()
        rows.append(
            {
                "side": TRAINING, "source": "cache", "workers": n, "augmented": True,
                "crops_per_recording": 1, "clips_per_second": n_batches * batch_size / seconds,
                "waiting_share": waiting / seconds,
            }
        )  # fmt: skip
        log.info("training with %d workers done", n)
    return pd.DataFrame(rows)


def _train(run: _Run, experiment: Experiment, n_batches: int) -> tuple[float, float]:
    """Return seconds of waiting and in all, of ``n_batches`` training steps after two others."""
    torch.manual_seed(0)
    model = build_model(experiment, run.clips.targets.shape[1], pretrained=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), experiment.train.optimizer.learning_rate)
    batches = run.batches()
    step = partial(_step, model, optimizer, experiment)
    for batch in islice(batches, 2):  # workers start and the model warms up
        step(batch)
    waiting, began = 0.0, time.perf_counter()
    mark = began
    for batch in islice(batches, n_batches):
        waiting += time.perf_counter() - mark
        step(batch)
        mark = time.perf_counter()
    return waiting, mark - began


def _step(
    model: SEDModel, optimizer: torch.optim.Optimizer, experiment: Experiment, batch: ClipBatch
) -> None:
    loss = batch_loss(
        model,
        Detector(model),
        batch=batch,
        experiment=experiment,
        epoch=0,
        position=0,
        device=torch.device("cpu"),
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# --- recordings made for the purpose -------------------------------------------------------------


def make_recordings(folder: Path, n_recordings: int, seconds: float, seed: int = 0) -> Path:
    """Write ``n_recordings`` mp3 of so many seconds, and a train.csv of them; return ``folder``.

    At 44.1 kHz, mono: whistles that sweep, over pink noise. Files that are there already stay.
    Raises ValueError where a train.csv of other recordings is.
    """
    require(n_recordings > 0, f"n_recordings is {n_recordings}; it must be above 0")
    require(seconds > SEGMENT_SECONDS, f"seconds is {seconds}; give more than {SEGMENT_SECONDS}")
    names = [f"XC{100_000 + number}.mp3" for number in range(n_recordings)]
    lines = [
        "filename,ebird_code,recordist,primary_label,secondary_labels,rating,duration,"
        "sampling_rate\n"
    ]
    for name in names:
        lines.append(
            f"{name},comrav,A. Bird,Corvus corax_Common Raven,[],4.0,{round(seconds)},44100 (Hz)\n"
        )
    table = folder / "train.csv"
    if table.exists() and not table.read_text("utf-8").startswith("".join(lines[:2])):
        raise ValueError(f"{table} lists other recordings; make these in a folder of their own")
    audio = folder / "train_audio" / "comrav"
    audio.mkdir(parents=True, exist_ok=True)
    n_samples = round(seconds * 44_100)
    noise = make_noise("pink", n_samples, 44_100, np.random.default_rng(seed)) / 10
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the encoder lets other threads work
        list(pool.map(partial(_write_recording, audio, noise, seed), names))
    write_atomically(table, "".join(lines))
    return folder


def _write_recording(audio: Path, noise: np.ndarray, seed: int, name: str) -> None:
    if (audio / name).exists():
        return
    generator = np.random.default_rng((seed, int(name[2:-4])))
    waveform = np.roll(noise, int(generator.integers(len(noise))))
    for _ in range(len(noise) // 44_100):  # one whistle a second
        n_samples = int(generator.uniform(0.1, 0.8) * 44_100)
        low, high = generator.uniform(1_500, 8_000, 2)
        phase = 2 * np.pi * np.cumsum(np.linspace(low, high, n_samples)) / 44_100
        start = int(generator.integers(max(1, len(noise) - n_samples)))
        whistle = np.sin(phase) * np.hanning(n_samples) * generator.uniform(0.02, 0.3)
        waveform[start : start + n_samples] += whistle[: len(noise) - start].astype(np.float32)
    with atomic_path(audio / name) as temporary:
        soundfile.write(temporary, waveform, 44_100, format="MP3")


# --- the plot ------------------------------------------------------------------------------------


def plot_benchmark(table: pd.DataFrame) -> Figure:
    """Draw clips per second, of the readers and of the loader."""
    use_style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    readers, loaders = figure.subplots(1, 2)
    rows = table[table["side"].isin(COLORS)].iloc[::-1]
    colors = rows["side"].map(COLORS)
    bars = readers.barh(rows["side"], rows["clips_per_second"], color=colors)
    speeds = zip(rows["clips_per_second"], rows["times_librosa"], strict=True)
    readers.bar_label(bars, [f"{speed:,.0f}  ({times:.1f}×)" for speed, times in speeds], padding=4)
    readers.set_xscale("log")
    readers.margins(x=0.3)
    readers.set_title("One clip after another, one process")
    readers.set_xlabel("five-second clips per second  (× librosa.load of the file)")
    _plot_loaders(loaders, table[table["side"] == LOADER])
    figure.suptitle(f"From recording to training clip, {table['cores'].iloc[0]} CPU cores")
    return figure


def _plot_loaders(axes: object, rows: pd.DataFrame) -> None:
    groups = list(rows.groupby(["source", "augmented", "crops_per_recording"], sort=False))
    width = 0.8 / len(groups)
    for number, ((source, augmented, crops), group) in enumerate(groups):
        label = f"{source}, {'augmented' if augmented else 'plain'}"
        label += f", {crops:.0f} crops of each opened" if crops > 1 else ""
        color = COLORS[CACHED if source == "cache" else SEEK]
        places = np.arange(len(group)) + (number - (len(groups) - 1) / 2) * width
        hatch = "///" if augmented else "..." if crops > 1 else ""
        bars = axes.bar(
            places, group["clips_per_second"], width, color=color, edgecolor="white",
            hatch=hatch, label=label,
        )  # fmt: skip
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(np.arange(len(group)), [f"{n:.0f}" for n in group["workers"]])
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axes.set_ylim(top=axes.get_ylim()[1] * 4)  # room for the legend
    axes.set_title("The loader, batches of 32")
    axes.set_xlabel("workers (0: in the training process)")
    axes.set_ylabel("five-second clips per second")
