"""Time log-mel by librosa, torchlibrosa, nnAudio and birdcall on the same clips, side by side."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from birdcall.audio.frontend import LogMel, power_to_db
from birdcall.audio.reading import AudioError, crop_or_pad, probe_audio, read_audio
from birdcall.config import SEGMENT_SECONDS, FrontendConfig, require
from birdcall.data.recordings import read_recordings
from birdcall.report.style import AMBER, GREEN, GREY, SKY, save_figure, use_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

CONFIGS = (FrontendConfig(), FrontendConfig(n_fft=2048, hop_length=512, n_mels=128))
BATCH_SIZE = 16
# The sides take turns after so many clips, so that a busy machine slows all of them. Not fewer: for
# some milliseconds after its turn the idle threads of a side still keep the cores busy.
ROUND_CLIPS = 256
COMPARED_CLIPS = 64
HEARD_DB = -80.0  # differences count above this
LIBROSA, TORCHLIBROSA, OURS = "librosa", "torchlibrosa", "birdcall"
COLORS = {LIBROSA: GREY, TORCHLIBROSA: AMBER, "nnAudio": SKY, OURS: GREEN}


class Side(NamedTuple):
    """One way to turn clips (batch, samples) into log_mel (batch, frames, n_mels), in batches."""

    implementation: str
    device: str
    batch_size: int
    transform: Callable[[np.ndarray], np.ndarray]

    def batches(self, clips: np.ndarray) -> list[np.ndarray]:
        starts = range(0, len(clips), self.batch_size)
        return [clips[start : start + self.batch_size] for start in starts]

    def run(self, clips: np.ndarray) -> np.ndarray:
        return np.concatenate([self.transform(batch) for batch in self.batches(clips)])


def benchmark_frontend(
    data: Path,
    output: Path,
    n_clips: int = 1000,
    repeats: int = 5,
    configs: Sequence[FrontendConfig] = CONFIGS,
    seed: int = 0,
) -> pd.DataFrame:
    """Time every side on ``n_clips`` five-second clips of ``data``; write frontend.csv and .png.

    A row per configuration, implementation, device and batch size: median ``seconds`` of
    ``repeats`` runs over all clips, transfers to and from the GPU included and warm-up not,
    ``max_difference_db`` from librosa above -80 dB, and how many times faster than librosa and than
    batched torchlibrosa on the same device.
    """
    require(n_clips > 0 and repeats > 0, f"n_clips {n_clips} and repeats {repeats} must be above 0")
    rates = {config.sample_rate for config in configs}
    require(len(rates) == 1, f"configs have sample rates {sorted(rates)}; give one")
    clips = read_clips(data, n_clips, rates.pop(), seed)
    tables = [_benchmark_config(clips, config, repeats) for config in configs]
    table = pd.concat(tables, ignore_index=True)
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "frontend.csv", index=False)
    save_figure(plot_benchmark(table), output / "frontend.png")
    return table


def read_clips(data: Path, n_clips: int, sample_rate: int, seed: int = 0) -> np.ndarray:
    """Read clips (n_clips, samples) of five seconds: the first of each recording, then the second.

    Recordings come in random order. Where all of them have fewer clips, these are used again.
    """
    recordings = read_recordings(data).sample(frac=1, random_state=seed)
    paths = [data / path for path in recordings["path"][:n_clips]]
    n_samples = SEGMENT_SECONDS * sample_rate
    clips: list[np.ndarray] = []
    for path, offset_seconds in _offsets(paths):
        if len(clips) == n_clips:
            break
        try:
            waveform = _read_clip(path, sample_rate, offset_seconds)
        except AudioError as error:
            log.warning("left out: %s", error)
        else:
            clips.append(crop_or_pad(waveform, n_samples))
    require(bool(clips), f"{data}: none of {len(paths)} recordings can be read")
    if len(clips) < n_clips:
        log.warning("%s has only %d clips, used again to make %d", data, len(clips), n_clips)
    return np.stack([clips[i % len(clips)] for i in range(n_clips)])


def _offsets(paths: list[Path]) -> Iterator[tuple[Path, int]]:
    """Yield (path, seconds): the first five seconds of all, the next of all that have them, ..."""
    yield from ((path, 0) for path in paths)
    lengths = {path: _seconds(path) for path in paths}
    for offset in range(SEGMENT_SECONDS, int(max(lengths.values())), SEGMENT_SECONDS):
        yield from ((path, offset) for path in paths if lengths[path] >= offset + SEGMENT_SECONDS)


def _seconds(path: Path) -> float:
    try:
        return probe_audio(path).seconds
    except AudioError:
        return 0.0


def _read_clip(path: Path, sample_rate: int, offset_seconds: int) -> np.ndarray:
    whole = _seconds(path) < SEGMENT_SECONDS  # too short for a clip: read it to its end
    return read_audio(path, sample_rate, offset_seconds, None if whole else SEGMENT_SECONDS)


# --- the sides -----------------------------------------------------------------------------------


def make_sides(config: FrontendConfig) -> list[Side]:
    """Build librosa and what else is installed, on the CPU and on CUDA where there is one."""
    sides = [Side(LIBROSA, "cpu", 1, _librosa(config))]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        makers = {OURS: lambda config: _Channel(LogMel(config))}
        if find_spec("torchlibrosa"):
            makers[TORCHLIBROSA] = _torchlibrosa
        for name, make in makers.items():
            transform = _on_device(make(config), device)
            for batch_size in (1, BATCH_SIZE):  # one clip at a time is how the article does it
                sides.append(Side(name, device, batch_size, transform))
        if find_spec("nnAudio"):
            sides.append(Side("nnAudio", device, BATCH_SIZE, _on_device(_NNAudio(config), device)))
    return sides


def _librosa(config: FrontendConfig) -> Callable[[np.ndarray], np.ndarray]:
    import librosa

    def transform(clips: np.ndarray) -> np.ndarray:
        mel = librosa.feature.melspectrogram(
            y=clips[0], sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length,
            n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, pad_mode="reflect",
        )  # fmt: skip
        return librosa.power_to_db(mel, top_db=None).T[None]

    return transform


def _torchlibrosa(config: FrontendConfig) -> nn.Module:
    from torchlibrosa.stft import LogmelFilterBank, Spectrogram

    to_log_mel = LogmelFilterBank(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels,
        fmin=config.fmin, fmax=config.fmax, top_db=None,
    )  # fmt: skip
    spectrogram = Spectrogram(n_fft=config.n_fft, hop_length=config.hop_length)
    return _Channel(nn.Sequential(spectrogram, to_log_mel))


class _Channel(nn.Module):
    """The only channel of a front end's image."""

    def __init__(self, frontend: nn.Module) -> None:
        super().__init__()
        self.frontend = frontend

    def forward(self, waveform: Tensor) -> Tensor:
        return self.frontend(waveform)[:, 0]


class _NNAudio(nn.Module):
    """nnAudio's mel spectrogram in dB."""

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        from nnAudio.features import MelSpectrogram

        self.mel = MelSpectrogram(
            sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length,
            n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, verbose=False,
        )  # fmt: skip

    def forward(self, waveform: Tensor) -> Tensor:
        return power_to_db(self.mel(waveform)).transpose(1, 2)


def _on_device(module: nn.Module, device: str) -> Callable[[np.ndarray], np.ndarray]:
    module = module.eval().to(device)

    def transform(clips: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(clips).to(device)).cpu().numpy()  # .cpu() waits for it

    return transform


# --- measuring -----------------------------------------------------------------------------------


def _benchmark_config(clips: np.ndarray, config: FrontendConfig, repeats: int) -> pd.DataFrame:
    sides = make_sides(config)
    differences = _compare(sides, clips[:COMPARED_CLIPS])  # the warm-up, too
    seconds = time_sides(sides, clips, repeats)
    name = f"{config.n_fft}/{config.hop_length}/{config.n_mels}"
    table = pd.DataFrame(
        {
            "config": name,
            "implementation": [side.implementation for side in sides],
            "device": [side.device for side in sides],
            "batch_size": [side.batch_size for side in sides],
            "seconds": np.median(seconds, axis=1),
        }
    )
    table["clips_per_second"] = len(clips) / table["seconds"]
    table["times_real_time"] = table["clips_per_second"] * SEGMENT_SECONDS
    table["max_difference_db"] = differences
    librosa = table.loc[table["implementation"] == LIBROSA, "seconds"].item()
    batched = (table["implementation"] == TORCHLIBROSA) & (table["batch_size"] == BATCH_SIZE)
    torchlibrosa = table[batched].set_index("device")["seconds"]
    table["times_librosa"] = librosa / table["seconds"]
    table["times_torchlibrosa"] = table["device"].map(torchlibrosa) / table["seconds"]
    table["threads"] = torch.get_num_threads()
    decimals = {"seconds": 4, "clips_per_second": 1, "times_real_time": 0}
    return table.round(decimals | {"times_librosa": 2, "times_torchlibrosa": 2})


def _compare(sides: list[Side], clips: np.ndarray) -> list[float]:
    """Return each side's largest difference in dB from the first side, where that is heard."""
    reference = sides[0].run(clips)
    heard = reference > HEARD_DB
    return [float(np.abs(side.run(clips) - reference)[heard].max(initial=0)) for side in sides]


def time_sides(sides: list[Side], clips: np.ndarray, repeats: int) -> np.ndarray:
    """Return seconds (sides, repeats) for all clips; the sides take turns on a few clips each."""
    seconds = np.zeros((len(sides), repeats))
    for repeat in range(repeats):
        for start in range(0, len(clips), ROUND_CLIPS):
            part = clips[start : start + ROUND_CLIPS]
            for row, side in enumerate(sides):
                began = time.perf_counter()
                for batch in side.batches(part):
                    side.transform(batch)
                seconds[row, repeat] += time.perf_counter() - began
        left = seconds.sum() / (repeat + 1) * (repeats - repeat - 1)
        log.info("run %d of %d done, %.0f s left for this setting", repeat + 1, repeats, left)
    return seconds


# --- the plot ------------------------------------------------------------------------------------


def plot_benchmark(table: pd.DataFrame) -> Figure:
    """Draw clips per second, a panel per configuration."""
    use_style()
    from matplotlib.figure import Figure

    side = ["implementation", "device", "batch_size"]
    order = table.groupby(side)["clips_per_second"].mean().sort_values().index
    panels = list(table.groupby("config", sort=False))
    figure = Figure(figsize=(6.2 * len(panels), 1.6 + 0.45 * len(order)), layout="constrained")
    axes_of_panels = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (config, rows) in zip(axes_of_panels, panels, strict=True):
        rows = rows.set_index(side).loc[order].reset_index()
        bars = axes.barh(
            [_label(row) for row in rows.itertuples()],
            rows["clips_per_second"],
            color=rows["implementation"].map(COLORS),
        )
        speeds = zip(rows["clips_per_second"], rows["times_librosa"], strict=True)
        axes.bar_label(
            bars, [f"{speed:,.0f}  ({times:.1f}×)" for speed, times in speeds], padding=4
        )
        axes.margins(x=0.35)
        n_fft, hop_length, n_mels = config.split("/")
        axes.set_title(f"n_fft {n_fft}, hop_length {hop_length}, {n_mels} mel bins")
        axes.set_xlabel("five-second clips per second  (× librosa)")
    figure.suptitle(f"From waveform to log-mel, {table['threads'].iloc[0]} CPU threads")
    return figure


def _label(row: NamedTuple) -> str:
    batches = "one by one" if row.batch_size == 1 else f"batches of {row.batch_size}"
    return f"{row.implementation}, {row.device.upper()}, {batches}"
