"""Time log-mel spectrograms of librosa, torchlibrosa, nnAudio and birdcall on the same clips."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import librosa
import numpy as np
import pandas as pd
import soundfile
import torch
from torch import Tensor, nn

from birdcall.audio.filters import crop_or_pad, make_noise
from birdcall.audio.frontend import LogMel, power_to_db
from birdcall.audio.reading import AudioError, probe_audio, read_audio
from birdcall.config import SEGMENT_SECONDS, FrontendConfig, require
from birdcall.data.recordings import read_recordings
from birdcall.report.plots import AMBER, GREEN, GREY, SKY, new_figure, save_figure
from birdcall.storage.files import atomic_path, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_CONFIGS = (FrontendConfig(), FrontendConfig(n_fft=2048, hop_length=512, n_mels=128))
_BATCH_SIZE = 16
# The implementations take turns after this many clips, so that a busy machine slows all of them.
# Not fewer: for some milliseconds after its turn, idle threads of an implementation use the cores.
_CLIPS_PER_TURN = 256
_MP3_RATE = 44_100
_COMPARED_CLIPS = 64
_COMPARED_ABOVE_DB = -80.0
_DECIMALS = {
    "seconds": 4,
    "clips_per_second": 1,
    "times_real_time": 0,
    "times_librosa": 2,
    "times_torchlibrosa": 2,
}
_LIBROSA, _TORCHLIBROSA, _NNAUDIO, _OURS = "librosa", "torchlibrosa", "nnAudio", "birdcall"
_COLORS = {_LIBROSA: GREY, _TORCHLIBROSA: AMBER, _NNAUDIO: SKY, _OURS: GREEN}

_Part = TypeVar("_Part")


def benchmark_frontend(
    data: Path,
    output: Path,
    n_clips: int = 1000,
    repeats: int = 5,
    configs: Sequence[FrontendConfig] = _CONFIGS,
    seed: int = 0,
) -> pd.DataFrame:
    """Time every implementation on five-second clips of ``data``; write frontend.csv and .png.

    A row for each configuration, implementation, device and batch size: median ``seconds`` of
    ``repeats`` runs over all clips, with the transfers to and from the GPU and without the warm-up;
    ``max_difference_db`` from librosa above -80 dB; how many times as fast as librosa, and as
    torchlibrosa in batches on the same device.
    """
    require(n_clips > 0 and repeats > 0, f"n_clips {n_clips} and repeats {repeats} must be above 0")
    rates = {config.sample_rate for config in configs}
    require(len(rates) == 1, f"configs have sample rates {sorted(rates)}; give one")
    clips = read_clips(data, n_clips, rates.pop(), seed)
    parts = [clips[start : start + _CLIPS_PER_TURN] for start in range(0, n_clips, _CLIPS_PER_TURN)]
    tables = []
    for config in configs:
        implementations = make_implementations(config)
        outputs = [np.concatenate(item.run(clips[:_COMPARED_CLIPS])) for item in implementations]
        compared = outputs[0] > _COMPARED_ABOVE_DB  # librosa's; this run was the warm-up
        seconds = time_in_turns([item.run for item in implementations], parts, repeats)
        table = pd.DataFrame(
            [(item.name, item.device, item.batch_size) for item in implementations],
            columns=["implementation", "device", "batch_size"],
        )
        table.insert(0, "config", f"{config.n_fft}/{config.hop_length}/{config.n_mels}")
        table["seconds"] = np.median(seconds, axis=1)
        table["clips_per_second"] = n_clips / table["seconds"]
        table["times_real_time"] = table["clips_per_second"] * SEGMENT_SECONDS
        table["max_difference_db"] = [
            float(np.abs(log_mel - outputs[0])[compared].max(initial=0)) for log_mel in outputs
        ]
        librosa_seconds = table.loc[table["implementation"] == _LIBROSA, "seconds"].item()
        batched = (table["implementation"] == _TORCHLIBROSA) & (table["batch_size"] == _BATCH_SIZE)
        torchlibrosa_seconds = table["device"].map(table[batched].set_index("device")["seconds"])
        table["times_librosa"] = librosa_seconds / table["seconds"]
        table["times_torchlibrosa"] = torchlibrosa_seconds / table["seconds"]
        tables.append(table)
    table = pd.concat(tables, ignore_index=True).round(_DECIMALS)
    table["threads"] = torch.get_num_threads()
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "frontend.csv", index=False)
    save_figure(plot_frontend_speed(table), output / "frontend.png")
    return table


def read_clips(data: Path, n_clips: int, sample_rate: int, seed: int = 0) -> np.ndarray:
    """Read clips (n_clips, samples) of five seconds: the first of each recording, then the second.

    Recordings come in random order. Where all of them have fewer clips, these are used again.
    """
    table = read_recordings(data).sample(frac=1, random_state=seed)
    paths = [data / path for path in table["path"][:n_clips]]
    seconds = dict.fromkeys(paths, 0.0)
    for path in paths:
        with suppress(AudioError):  # the error is logged below
            seconds[path] = probe_audio(path).seconds
    positions = [(path, 0) for path in paths]
    for offset in range(SEGMENT_SECONDS, int(max(seconds.values())), SEGMENT_SECONDS):
        positions += [(path, offset) for path in paths if seconds[path] >= offset + SEGMENT_SECONDS]
    clips: list[np.ndarray] = []
    for path, offset in positions:
        if len(clips) == n_clips:
            break
        is_short = seconds[path] < SEGMENT_SECONDS  # then it is read to its end, and padded
        try:
            waveform = read_audio(path, sample_rate, offset, None if is_short else SEGMENT_SECONDS)
        except AudioError as error:
            logger.warning("left out: %s", error)
        else:
            clips.append(crop_or_pad(waveform, SEGMENT_SECONDS * sample_rate))
    require(bool(clips), f"{data}: none of {len(paths)} recordings can be read")
    if len(clips) < n_clips:
        logger.warning("%s has only %d clips, used again to make %d", data, len(clips), n_clips)
    return np.stack([clips[i % len(clips)] for i in range(n_clips)])


# --- synthetic recordings -------------------------------------------------------------------------


def make_recordings(folder: Path, n_recordings: int, seconds: float, seed: int = 0) -> Path:
    """Write ``n_recordings`` mp3 files of so many seconds and their train.csv; return ``folder``.

    At 44.1 kHz, mono: whistles that sweep, over pink noise. Existing files are not replaced.
    Raises ValueError where train.csv lists other recordings.
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
        raise ValueError(f"{table} lists other recordings; choose another folder for these")
    audio = folder / "train_audio" / "comrav"
    audio.mkdir(parents=True, exist_ok=True)
    n_samples = round(seconds * _MP3_RATE)
    noise = make_noise("pink", n_samples, _MP3_RATE, np.random.default_rng(seed)) / 10
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the encoder runs outside Python's lock
        list(pool.map(partial(_write_recording, audio, noise, seed), names))
    write_atomically(table, "".join(lines))
    return folder


def _write_recording(audio: Path, noise: np.ndarray, seed: int, name: str) -> None:
    if (audio / name).exists():
        return
    generator = np.random.default_rng((seed, int(name[2:-4])))
    waveform = np.roll(noise, int(generator.integers(len(noise))))
    for _ in range(len(noise) // _MP3_RATE):  # a whistle for each second
        n_samples = int(generator.uniform(0.1, 0.8) * _MP3_RATE)
        low, high = generator.uniform(1_500, 8_000, 2)
        phase = 2 * np.pi * np.cumsum(np.linspace(low, high, n_samples)) / _MP3_RATE
        start = int(generator.integers(max(1, len(noise) - n_samples)))
        whistle = np.sin(phase) * np.hanning(n_samples) * generator.uniform(0.02, 0.3)
        waveform[start : start + n_samples] += whistle[: len(noise) - start].astype(np.float32)
    with atomic_path(audio / name) as temporary:
        soundfile.write(temporary, waveform, _MP3_RATE, format="MP3")


# --- implementations ------------------------------------------------------------------------------


class _Implementation(NamedTuple):
    """A function from clips (batch, samples) to log_mel (batch, frames, n_mels), in batches."""

    name: str
    device: str
    batch_size: int
    transform: Callable[[np.ndarray], np.ndarray]

    def run(self, clips: np.ndarray) -> list[np.ndarray]:
        """Return the log_mel of each batch."""
        starts = range(0, len(clips), self.batch_size)
        return [self.transform(clips[start : start + self.batch_size]) for start in starts]


def make_implementations(config: FrontendConfig) -> list[_Implementation]:
    """Build librosa and the installed others, on the CPU and on CUDA where there is a GPU."""
    implementations = [_Implementation(_LIBROSA, "cpu", 1, partial(_librosa_log_mel, config))]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        frontends: dict[str, nn.Module] = {_OURS: LogMel(config)}
        if find_spec("torchlibrosa"):
            frontends[_TORCHLIBROSA] = torchlibrosa_frontend(config)
        for name, frontend in frontends.items():
            frontend = frontend.eval().to(device)
            transform = partial(_run, frontend, device, lambda log_mel: log_mel[:, 0])
            for batch_size in (1, _BATCH_SIZE):  # one clip at a time, as the article does it
                implementations.append(_Implementation(name, device, batch_size, transform))
        if find_spec("nnAudio"):
            from nnAudio.features import MelSpectrogram

            mel = MelSpectrogram(
                sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length,
                n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, verbose=False,
            ).eval().to(device)  # fmt: skip
            transform = partial(_run, mel, device, lambda mel: power_to_db(mel).transpose(1, 2))
            implementations.append(_Implementation(_NNAUDIO, device, _BATCH_SIZE, transform))
    return implementations


def _librosa_log_mel(config: FrontendConfig, clips: np.ndarray) -> np.ndarray:
    """Return librosa's log_mel of a batch of one clip."""
    mel = librosa.feature.melspectrogram(
        y=clips[0], sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length,
        n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, pad_mode="reflect",
    )  # fmt: skip
    return librosa.power_to_db(mel, top_db=None).T[None]


def _run(
    module: nn.Module, device: str, convert: Callable[[Tensor], Tensor], clips: np.ndarray
) -> np.ndarray:
    with torch.inference_mode():  # .cpu() waits for the GPU
        return convert(module(torch.from_numpy(clips).to(device))).cpu().numpy()


def torchlibrosa_frontend(config: FrontendConfig) -> nn.Module:
    """Return torchlibrosa's front end: waveform (batch, samples) to (batch, 1, frames, n_mels)."""
    from torchlibrosa.stft import LogmelFilterBank, Spectrogram

    spectrogram = Spectrogram(n_fft=config.n_fft, hop_length=config.hop_length)
    log_mel = LogmelFilterBank(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels,
        fmin=config.fmin, fmax=config.fmax, top_db=None,
    )  # fmt: skip
    return nn.Sequential(spectrogram, log_mel).eval()


# --- time and memory ------------------------------------------------------------------------------


def time_in_turns(
    functions: Sequence[Callable[[_Part], object]], parts: Sequence[_Part], repeats: int
) -> np.ndarray:
    """Return the seconds (functions, repeats) that each function takes for all parts.

    The functions take turns after each part, so that a busy machine slows all of them.
    """
    seconds = np.zeros((len(functions), repeats))
    for repeat in range(repeats):
        for part in parts:
            for index, function in enumerate(functions):
                start = time.perf_counter()
                function(part)
                seconds[index, repeat] += time.perf_counter() - start
        left = seconds.sum() / (repeat + 1) * (repeats - repeat - 1)
        logger.info("run %d of %d done, %.0f s left", repeat + 1, repeats, left)
    return seconds


def peak_megabytes() -> float:
    """Return the most memory that this process has had at once.

    Linux has two figures. This is the one of the process itself; the other (``ru_maxrss``) starts
    at the peak of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- figures --------------------------------------------------------------------------------------


def plot_frontend_speed(table: pd.DataFrame) -> Figure:
    """Draw clips per second, a panel for each configuration."""
    columns = ["implementation", "device", "batch_size"]
    order = table.groupby(columns)["clips_per_second"].mean().sort_values().index
    panels = list(table.groupby("config", sort=False))
    figure = new_figure(6.2 * len(panels), 1.6 + 0.45 * len(order))
    axes_of_panels = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (config, rows) in zip(axes_of_panels, panels, strict=True):
        rows = rows.set_index(columns).loc[order].reset_index()
        size = rows["batch_size"].map({1: "one by one"}).fillna(f"batches of {_BATCH_SIZE}")
        bars = axes.barh(
            rows["implementation"] + ", " + rows["device"].str.upper() + ", " + size,
            rows["clips_per_second"],
            color=rows["implementation"].map(_COLORS),
        )
        label_speeds(axes, bars, rows)
        axes.margins(x=0.35)
        n_fft, hop_length, n_mels = config.split("/")
        axes.set_title(f"n_fft {n_fft}, hop_length {hop_length}, {n_mels} mel bins")
        axes.set_xlabel("five-second clips per second  (× librosa)")
    figure.suptitle(f"From waveform to log-mel, {table['threads'].iloc[0]} CPU threads")
    return figure


def label_speeds(axes: Axes, bars: BarContainer, rows: pd.DataFrame) -> None:
    """Write clips per second, and how many times librosa's they are, beside each bar."""
    speeds = zip(rows["clips_per_second"], rows["times_librosa"], strict=True)
    axes.bar_label(bars, [f"{speed:,.0f}  ({times:.1f}×)" for speed, times in speeds], padding=4)
