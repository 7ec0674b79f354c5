"""Time inference from mp3 to probabilities against a simple public kernel; measure its memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import librosa
import numpy as np
import pandas as pd
import soundfile
import torch
from torch import Tensor, nn

from birdcall.audio.reading import read_audio
from birdcall.benchmark.frontend import peak_megabytes, time_in_turns, torchlibrosa_frontend
from birdcall.config import SEGMENT_SECONDS, Experiment, FrontendConfig, require
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import FRONT_END, READING, Ensemble, Member, load_ensemble
from birdcall.inference.windows import ONNX_FILE, export_checkpoint, probe_windows
from birdcall.kaggle.submission import LoadedPackage
from birdcall.kaggle.test_set import CompetitionFile
from birdcall.models.checkpoint import (
    Checkpoint,
    is_onnx_installed,
    open_export,
    save_checkpoint,
)
from birdcall.models.export import mark_bfloat16
from birdcall.models.sed import SEDModel, build_model
from birdcall.prediction.package import Recording, detect_recordings
from birdcall.report.plots import BLUE, GREY, ORANGE, new_figure
from birdcall.storage.files import find_files, is_sound, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_NAIVE_BATCH = 8  # windows
_MP3_RATE = 22_050  # hertz, mono: as the competition's soundscapes
_WAV_RATE = 8_000  # hertz: a day is 0.7 GB
_N_CLASSES = 264
_DAY_SECONDS = 24 * 3600
_RESULT_FILE = "result.json"
_LOGIT_STD = 0.5  # of a random network's framewise outputs


def benchmark_inference(
    data: Path,
    folder: Path,
    *,
    n_members: int = 5,
    minutes: float = 10.0,
    repeats: int = 3,
    experiment: Experiment | None = None,
    in_bfloat16: bool = False,
) -> pd.DataFrame:
    """Time one member and ``n_members`` with one front end, end to end; write ``inference.csv``.

    EfficientNet-B0 with a bi-GRU on 64 mels (or ``experiment``), exported for ONNX Runtime,
    predicts ``minutes`` of the data's soundscapes as mono mp3. The networks have random weights,
    which cost as much as trained weights. The naive kernel loads each file by librosa for each
    member, cuts windows of five seconds, and runs eight at a time through torchlibrosa and torch.
    Both take turns, after one that does not count; a ratio is that of a turn's two times, the
    median of the turns. ``in_bfloat16``: by OpenVINO, whatever that changes in labels, which mean
    nothing here; ValueError where OpenVINO cannot run them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_soundscapes(data, Path(scratch) / "soundscapes", minutes)
        seconds = sum(soundfile.info(str(path)).duration for path in paths.values())
        members = make_members(Path(scratch) / "members", paths, n_members, experiment)
        if in_bfloat16:
            for member in members:
                mark_bfloat16(member / ONNX_FILE, "for a benchmark")
                if fault := open_export(member / ONNX_FILE).bfloat16_fault:
                    raise ValueError(fault)
        rows = []
        for count in sorted({1, n_members}):
            rows.append(_compare(load_ensemble(members[:count]), paths, seconds, repeats))
            logger.info("%d members: %.2f x as fast", count, rows[-1]["ratio"])
    table = pd.DataFrame(rows)
    write_atomically(folder / "inference.csv", table.to_csv(index=False))
    return table


def _compare(
    ensemble: Ensemble, paths: Mapping[str, Path], seconds: float, repeats: int
) -> dict[str, object]:
    frontends = [
        torchlibrosa_frontend(member.checkpoint.experiment.frontend) for member in ensemble.members
    ]
    predict_naive = partial(predict_naively, ensemble.members, frontends)
    pairs = zip(predict_naive(paths), predict_files(ensemble, paths), strict=True)
    # The warm-up, too.
    difference = max(float(np.abs(naive - ours.clipwise).max()) for naive, (_, ours) in pairs)
    require(not ensemble.fallen_back, "a runtime fails, so that nothing can be timed")
    before = dict(ensemble.costs.seconds)
    functions = [predict_naive, lambda paths: list(predict_files(ensemble, paths))]
    naive_seconds, our_seconds = time_in_turns(functions, [paths], repeats)
    # Seconds of one thread for all recordings once.
    spent = {
        name: (total - before[name]) / repeats for name, total in ensemble.costs.seconds.items()
    }
    networks = sum(spent.values()) - spent[READING] - spent[FRONT_END]
    hourly = 3600 / seconds
    networks_alone = _time_networks_alone(ensemble, paths, repeats)
    ratios = naive_seconds / our_seconds
    return {
        "members": len(ensemble.members),
        "naive_x_real_time": round(seconds / float(np.median(naive_seconds)), 1),
        "x_real_time": round(seconds / float(np.median(our_seconds)), 1),
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_from": round(float(ratios.min()), 2),
        "ratio_to": round(float(ratios.max()), 2),
        "model_alone_x_real_time": round(seconds / networks_alone, 1),
        "added_to_model": round(float(np.median(our_seconds)) / networks_alone - 1, 3),
        # Seconds of a core for an hour of audio, from which `benchmark_scale` estimates.
        "reading_seconds": round(spent[READING] * hourly, 3),
        "front_end_seconds": round(spent[FRONT_END] * hourly, 3),
        "networks_seconds": round(networks * hourly, 3),
        "largest_difference": difference,
        "runtime": ensemble.members[0].runtime_identity,
    }


def _time_networks_alone(ensemble: Ensemble, paths: Mapping[str, Path], repeats: int) -> float:
    """Return the seconds of the networks alone, on computed log-mels, with all threads."""
    replica = ensemble.replicas[0]
    (config,) = replica.frontends
    batches = []
    for path in paths.values():
        windows = _cut_segments(read_audio(path, config.sample_rate), config.sample_rate)
        with torch.inference_mode():
            log_mels = torch.cat([replica.frontends[config](window[None]) for window in windows])
        batches += log_mels.split(ensemble.batch_windows)

    def predict(batch: Tensor) -> None:
        with torch.inference_mode():
            for network in replica.networks:
                network(batch, ("clipwise", "framewise", "frames"))

    predict_all = [lambda batches: list(replica.threads.map(predict, batches))]
    seconds = time_in_turns(predict_all, [batches], 1 + repeats)
    return float(np.median(seconds[:, 1:]))  # the first run is the warm-up


@torch.inference_mode()
def predict_naively(
    members: Sequence[Member], frontends: Sequence[nn.Module], paths: Mapping[str, Path]
) -> list[np.ndarray]:
    """Return the clipwise probabilities ``(members, segments, classes)`` of each recording.

    As most public kernels do it: member after member, nothing shared or overlapped. ``frontends``
    are the members' front ends of torchlibrosa.
    """
    results = []
    for path in paths.values():
        by_member = []
        for member, frontend in zip(members, frontends, strict=True):
            rate = member.checkpoint.experiment.frontend.sample_rate
            waveform, _ = librosa.load(path, sr=rate, mono=True)
            batches = _cut_segments(waveform, rate).split(_NAIVE_BATCH)
            parts = [member.model.detect(frontend(batch)).clipwise.numpy() for batch in batches]
            by_member.append(np.concatenate(parts))
        results.append(np.stack(by_member))
    return results


def _cut_segments(waveform: np.ndarray, sample_rate: int) -> Tensor:
    """Return the segments ``(segments, samples)`` of a waveform, the last one padded."""
    n_samples = SEGMENT_SECONDS * sample_rate
    return torch.from_numpy(np.pad(waveform, (0, -len(waveform) % n_samples))).view(-1, n_samples)


# --- recordings and members -----------------------------------------------------------------------


def write_soundscapes(data: Path, folder: Path, minutes: float) -> dict[str, Path]:
    """Write the data's soundscapes as mono mp3, repeated until they last ``minutes``."""
    sources = [
        path
        for name in (CompetitionFile.TEST_AUDIO, CompetitionFile.EXAMPLE_AUDIO)
        for path in filter(is_sound, find_files(data / name))
    ]
    if not sources:
        raise FileNotFoundError(
            f"{data}: no soundscapes in {CompetitionFile.TEST_AUDIO} or "
            f"{CompetitionFile.EXAMPLE_AUDIO}"
        )
    folder.mkdir(parents=True)
    left, written = round(60 * minutes * _MP3_RATE), {}
    while left > 0:
        source = sources[len(written) % len(sources)]
        path = folder / f"{len(written):04}.mp3"
        waveform = read_audio(source, _MP3_RATE)[:left]
        soundfile.write(path, waveform, _MP3_RATE)
        written[path.stem] = path
        left -= len(waveform)
    return written


def make_members(
    folder: Path, paths: Mapping[str, Path], n_members: int, experiment: Experiment | None = None
) -> list[Path]:
    """Write checkpoints of random networks, and their exports; return their folders.

    ``experiment``: by default EfficientNet-B0 with a bi-GRU on 64 mels at 100 frames per second.
    Batch normalisation takes its statistics from the recordings.
    """
    if experiment is None:
        experiment = find_experiment("efficientnet_b0_gru_attention")
        model_config = replace(experiment.model, temporal="gru")
        experiment = replace(
            experiment, name="benchmark_b0", frontend=FrontendConfig(), model=model_config
        )
    rate = experiment.frontend.sample_rate
    segments = [
        _cut_segments(read_audio(path, rate), rate)[:2] for path in list(paths.values())[:6]
    ]
    windows = torch.cat([*segments, probe_windows(rate)])  # the check of the export uses these, too
    folders = []
    for number in range(n_members):
        torch.manual_seed(number)
        model = build_model(experiment, _N_CLASSES)
        spread_outputs(model, windows)
        classes = tuple(f"bird{index}" for index in range(_N_CLASSES))
        member = folder / f"fold{number}"
        save_checkpoint(member, model, Checkpoint(experiment, classes, number))
        if is_onnx_installed():
            export_checkpoint(member, member / ONNX_FILE)
        folders.append(member)
    return folders


@torch.no_grad()
def spread_outputs(model: SEDModel, windows: Tensor) -> None:
    """Make a random network predict different probabilities for different windows.

    Otherwise all probabilities would be alike, and no comparison would notice a mistake.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all passes
    for _ in range(3):
        model.train()(windows)
    detection = model.eval().head.detection
    features = model.features(model.frontend(windows))
    features = features - features.mean(dim=(0, 2), keepdim=True)
    logits = detection(features) - detection.bias[:, None]
    detection.weight *= _LOGIT_STD / logits.std(dim=(0, 2))[:, None, None]
    logits = detection(model.features(model.frontend(windows)))
    detection.bias -= logits.mean(dim=(0, 2))


# --- memory ---------------------------------------------------------------------------------------


def benchmark_memory(
    data: Path, folder: Path, *, short_seconds: float = 600.0, long_seconds: float = _DAY_SECONDS
) -> pd.DataFrame:
    """Measure the memory of detecting birds in a short and a long recording.

    A new process predicts each recording, as `predict` does, with one member of
    `benchmark_inference`. Writes ``memory.csv``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_soundscapes(data, Path(scratch) / "soundscapes", short_seconds / 60)
        (member,) = make_members(Path(scratch) / "members", paths, 1)
        waveform = np.concatenate([read_audio(path, _WAV_RATE) for path in paths.values()])
        rows = []
        for seconds in (short_seconds, long_seconds):
            path = Path(scratch) / "long.wav"
            left = round(seconds * _WAV_RATE)
            with soundfile.SoundFile(path, "w", _WAV_RATE, 1, subtype="PCM_U8") as file:
                while left > 0:  # the soundscapes again and again
                    file.write(waveform[:left])
                    left -= len(waveform)
            code = f"import sys; from {__name__} import _predict_long; _predict_long(*sys.argv[1:])"
            subprocess.run(
                [sys.executable, "-c", code, str(path), str(member), scratch], check=True
            )
            result = json.loads((Path(scratch) / _RESULT_FILE).read_text(encoding="utf-8"))
            rows.append({"hours": round(seconds / 3600, 2), **result})
    table = pd.DataFrame(rows)
    write_atomically(folder / "memory.csv", table.to_csv(index=False))
    return table


def _predict_long(path: str, member: str, folder: str) -> None:
    """Detect the birds of a recording; write the peak memory of the process into ``folder``."""
    ensemble = load_ensemble([Path(member)])
    decision = Decision(0.6, 0.6, neighbour_weight=0.25, recording_threshold=0.7)
    start = time.perf_counter()
    package = LoadedPackage(ensemble, decision)
    ((_, detected),) = detect_recordings([Recording(Path(path), "long")], package)
    result = {
        "peak_megabytes": round(peak_megabytes(), 1),
        "x_real_time": round(detected.seconds / (time.perf_counter() - start), 1),
        "events": len(detected.events),
    }
    write_atomically(Path(folder) / _RESULT_FILE, json.dumps(result))


# --- the figure -----------------------------------------------------------------------------------


def plot_inference_speed(table: pd.DataFrame) -> Figure:
    """Draw how much faster than real time inference is, from the table of `benchmark_inference`."""
    figure = new_figure(8, 3.2)
    axes = figure.add_subplot()
    bars_of = (
        ("naive_x_real_time", "simple public kernel", GREY, ""),
        ("x_real_time", "birdcall", BLUE, "//"),
        ("model_alone_x_real_time", "the networks alone", ORANGE, ".."),
    )
    for index, (column, label, color, hatch) in enumerate(bars_of):
        positions = np.arange(len(table)) + 0.27 * (1 - index)
        bars = axes.barh(
            positions, table[column], 0.25, color=color, label=label, hatch=hatch, ec="white"
        )
        axes.bar_label(bars, [f"{value:,.0f} ×" for value in table[column]], padding=4)
    names = [f"{n} member{'s' if n > 1 else ''}" for n in table["members"]]
    axes.set_yticks(range(len(table)), names)
    axes.margins(x=0.15)
    axes.set_xlabel("× real time, from mp3 to probabilities")
    figure.legend(loc="outside upper center", ncols=3)
    return figure
