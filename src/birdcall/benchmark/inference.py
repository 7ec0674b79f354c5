"""Measure a whole hearing, from mp3 to probabilities, against the kernel that everybody wrote."""

from __future__ import annotations

import heapq
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import soundfile
import soxr
import torch
from torch import Tensor, nn

from birdcall.audio.reading import read_audio
from birdcall.benchmark.timing import peak_megabytes
from birdcall.config import SEGMENT_SECONDS, Experiment, FrontendConfig, require
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import FRONT_END, READING, Ensemble, Member, load_ensemble
from birdcall.inference.windows import ONNX_FILE, export_checkpoint, probe_windows
from birdcall.kaggle.test_set import AUDIO_SUFFIXES, EXAMPLE_AUDIO, TEST_AUDIO
from birdcall.models.checkpoint import Checkpoint, save_checkpoint
from birdcall.models.onnx import is_onnx_installed
from birdcall.models.sed import SEDModel, build_model
from birdcall.prediction.local import Recording, detect_recordings
from birdcall.storage.files import read_table, write_atomically

logger = logging.getLogger(__name__)


NAIVE_BATCH = 8  # windows
MP3_RATE = 22_050  # hertz, mono: as the competition's soundscapes
PEER, OURS = "naive kernel", "birdcall"
N_CLASSES = 264
LOGIT_STD = 0.5  # of a random network's framewise outputs
DAY_SECONDS = 24 * 3600
RESULT_FILE = "result.json"


def benchmark_inference(
    data: Path, folder: Path, *, n_members: int = 5, minutes: float = 10.0, repeats: int = 3
) -> pd.DataFrame:
    """Time one member and ``n_members`` with one front end, end to end; write ``inference.csv``.

    EfficientNet-B0 with a bi-GRU on 64 mels, exported for ONNX Runtime, hears soundscapes of
    together ``minutes``: the data's, as mono mp3. The networks have random weights, which cost what
    trained ones cost. The naive kernel loads each file by librosa for each member, cuts windows of
    five seconds, and takes eight at a time through torchlibrosa and torch. Both sides take turns,
    after one that does not count; a ratio is that of a turn's two times, the median of turns.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sounds = write_soundscapes(data, Path(scratch) / "sounds", minutes)
        seconds = sum(soundfile.info(str(path)).duration for path in sounds.values())
        members = make_members(Path(scratch) / "members", sounds, n_members)
        rows = []
        for count in sorted({1, n_members}):
            ensemble = load_ensemble(members[:count])
            rows.append(_compare(ensemble, sounds, seconds, repeats))
            logger.info("%d members: %.2f x as fast", count, rows[-1]["ratio"])
    table = pd.DataFrame(rows)
    write_atomically(folder / "inference.csv", table.to_csv(index=False))
    return table


def _compare(
    ensemble: Ensemble, sounds: Mapping[str, Path], seconds: float, repeats: int
) -> dict[str, object]:
    naive = NaiveKernel(ensemble.members)
    sides: dict[str, Callable[[], list[np.ndarray]]] = {
        PEER: lambda: naive.hear(sounds),
        OURS: lambda: [scores.clipwise for _, scores in predict_files(ensemble, sounds)],
    }
    said = {name: run() for name, run in sides.items()}  # warm; and what they say is compared
    difference = max(
        float(np.abs(one - two).max()) for one, two in zip(*said.values(), strict=True)
    )
    before = dict(ensemble.costs.seconds)
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            turns[name].append(_time(run))
    # In seconds of a thread's work for one hearing.
    spent = {
        name: (total - before[name]) / repeats for name, total in ensemble.costs.seconds.items()
    }
    others, hourly = spent[READING] + spent[FRONT_END], 3600 / seconds
    model_alone = time_model_alone(ensemble, sounds, repeats)
    ratios = np.divide(turns[PEER], turns[OURS])
    ours = float(np.median(turns[OURS]))
    return {
        "members": len(ensemble.members),
        "naive_x_real_time": round(seconds / float(np.median(turns[PEER])), 1),
        "x_real_time": round(seconds / ours, 1),
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_from": round(float(ratios.min()), 2),
        "ratio_to": round(float(ratios.max()), 2),
        "model_alone_x_real_time": round(seconds / model_alone, 1),
        "added_to_model": round(ours / model_alone - 1, 3),
        # Seconds of a core for an hour of sound: what `benchmark.scale` reckons with.
        "reading_seconds": round(spent[READING] * hourly, 3),
        "front_end_seconds": round(spent[FRONT_END] * hourly, 3),
        "networks_seconds": round((sum(spent.values()) - others) * hourly, 3),
        "largest_difference": difference,
        "runtime": "torch" if ensemble.members[0].export is None else "onnx",
    }


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_model_alone(ensemble: Ensemble, sounds: Mapping[str, Path], repeats: int) -> float:
    """Return the seconds that the networks alone take, on log-mels that are ready, all threads."""
    replica = ensemble.replicas[0]
    (config,) = replica.frontends
    batches = []
    for path in sounds.values():
        windows = cut_by_hand(read_audio(path, config.sample_rate), config.sample_rate)
        with torch.inference_mode():
            log_mels = torch.cat([replica.frontends[config](one[None]) for one in windows])
        batches += log_mels.split(ensemble.batch_windows)

    def detect(batch: Tensor) -> None:
        with torch.inference_mode():
            for network in replica.networks:
                network(batch, ("clipwise", "framewise", "frames"))

    def run() -> None:
        done = wait([replica.threads.submit(detect, batch) for batch in batches]).done
        for one in done:
            one.result()

    run()
    return float(np.median([_time(run) for _ in range(repeats)]))


class NaiveKernel:
    """The inference of most public kernels: member after member, nothing shared or overlapped."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.frontends = [_torchlibrosa_frontend(m.checkpoint.experiment.frontend) for m in members]

    def hear(self, sounds: Mapping[str, Path]) -> list[np.ndarray]:
        """Return the clipwise probabilities ``(members, segments, classes)`` of each sound."""
        return [
            np.stack(
                [
                    self._hear_by(member, frontend, path)
                    for member, frontend in zip(self.members, self.frontends, strict=True)
                ]
            )
            for path in sounds.values()
        ]

    @torch.inference_mode()
    def _hear_by(self, member: Member, frontend: nn.Module, path: Path) -> np.ndarray:
        rate = member.checkpoint.experiment.frontend.sample_rate
        waveform, _ = librosa.load(path, sr=rate, mono=True)
        parts = [
            member.model.detect(frontend(windows)).clipwise.numpy()
            for windows in cut_by_hand(waveform, rate).split(NAIVE_BATCH)
        ]
        return np.concatenate(parts)


def _torchlibrosa_frontend(config: FrontendConfig) -> nn.Module:
    from torchlibrosa.stft import LogmelFilterBank, Spectrogram

    spectrogram = Spectrogram(n_fft=config.n_fft, hop_length=config.hop_length)
    log_mel = LogmelFilterBank(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels,
        fmin=config.fmin, fmax=config.fmax, ref=1.0, amin=1e-10, top_db=None,
    )  # fmt: skip
    return nn.Sequential(spectrogram, log_mel).eval()


def cut_by_hand(waveform: np.ndarray, sample_rate: int) -> Tensor:
    """Return the segments ``(segments, samples)`` of a waveform, the last one padded."""
    n_samples = SEGMENT_SECONDS * sample_rate
    return torch.from_numpy(np.pad(waveform, (0, -len(waveform) % n_samples))).view(-1, n_samples)


# --- what is heard, and by whom -------------------------------------------------------------------


def write_soundscapes(data: Path, folder: Path, minutes: float) -> dict[str, Path]:
    """Write the data's soundscapes as mono mp3, again and again until they last so long."""
    sources = [
        path
        for name in (TEST_AUDIO, EXAMPLE_AUDIO)
        for path in sorted((data / name).glob("*"))
        if path.suffix.lower() in AUDIO_SUFFIXES
    ]
    if not sources:
        raise FileNotFoundError(f"{data}: no soundscapes in {TEST_AUDIO} or {EXAMPLE_AUDIO}")
    folder.mkdir(parents=True)
    left, number, written = round(60 * minutes * MP3_RATE), 0, {}
    while left > 0:
        path = folder / f"{number:04}.mp3"
        waveform = read_audio(sources[number % len(sources)], MP3_RATE)[:left]
        soundfile.write(path, waveform, MP3_RATE)
        written[path.stem] = path
        left -= len(waveform)
        number += 1
    return written


def benchmarked_experiment() -> Experiment:
    """Return EfficientNet-B0 + bi-GRU on 64 mels at 100 frames a second."""
    experiment = find_experiment("efficientnet_b0_gru_attention")
    model = replace(experiment.model, temporal="gru")
    return replace(experiment, name="benchmark_b0", frontend=FrontendConfig(), model=model)


def make_members(folder: Path, sounds: Mapping[str, Path], n_members: int) -> list[Path]:
    """Write checkpoints of random networks whose normalisation has seen the sounds, and exports."""
    experiment = benchmarked_experiment()
    rate = experiment.frontend.sample_rate
    heard = [cut_by_hand(read_audio(one, rate), rate)[:2] for one in list(sounds.values())[:6]]
    windows = torch.cat([*heard, probe_windows(rate)])  # what the export is checked with, too
    folders = []
    for number in range(n_members):
        torch.manual_seed(number)
        model = build_model(experiment, N_CLASSES)
        spread_outputs(model, windows)
        classes = tuple(f"bird{one}" for one in range(N_CLASSES))
        place = folder / f"fold{number}"
        save_checkpoint(place, model, Checkpoint(experiment, classes, number))
        if is_onnx_installed():
            export_checkpoint(place, place / ONNX_FILE)
        folders.append(place)
    return folders


@torch.no_grad()
def spread_outputs(model: SEDModel, windows: Tensor) -> None:
    """Make a random network say different things of different windows, as a trained one does.

    Else all probabilities would be alike, and no comparison would notice a mistake.
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
    detection.weight *= LOGIT_STD / logits.std(dim=(0, 2))[:, None, None]
    logits = detection(model.features(model.frontend(windows)))
    detection.bias -= logits.mean(dim=(0, 2))


# --- memory ---------------------------------------------------------------------------------------


def benchmark_memory(
    data: Path, folder: Path, *, short_seconds: float = 600.0, long_seconds: float = DAY_SECONDS
) -> pd.DataFrame:
    """Say how much memory it takes to find the birds of a short and of a long recording.

    Each is heard in a process of its own, as `predict` does, by one member of
    `benchmark_inference`; writes ``memory.csv``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sounds = write_soundscapes(data, Path(scratch) / "sounds", short_seconds / 60)
        (member,) = make_members(Path(scratch) / "members", sounds, 1)
        rows = []
        for seconds in (short_seconds, long_seconds):
            path = Path(scratch) / "long.wav"
            write_long(path, list(sounds.values()), seconds)
            code = f"from {__name__} import hear_long as run; run(*__import__('sys').argv[1:])"
            subprocess.run(
                [sys.executable, "-c", code, str(path), str(member), scratch], check=True
            )
            result = json.loads((Path(scratch) / RESULT_FILE).read_text(encoding="utf-8"))
            rows.append({"hours": round(seconds / 3600, 2), **result})
    table = pd.DataFrame(rows)
    write_atomically(folder / "memory.csv", table.to_csv(index=False))
    return table


def write_long(path: Path, sources: Sequence[Path], seconds: float, rate: int = 8000) -> None:
    """Write a recording of so many seconds, block by block: the sources one after another."""
    waveforms = [soxr.resample(read_audio(one, MP3_RATE), MP3_RATE, rate) for one in sources]
    waveform = np.concatenate(waveforms)
    left = round(seconds * rate)
    with soundfile.SoundFile(path, "w", rate, 1, subtype="PCM_U8") as file:
        while left > 0:
            file.write(waveform[:left])
            left -= len(waveform)


def predict_long(path: str, member: str, folder: str) -> None:
    """Find the birds of one recording; leave in ``folder`` the highest memory that it took."""
    ensemble = load_ensemble([Path(member)])
    decision = Decision(0.6, 0.6, neighbour_weight=0.25, recording_threshold=0.7)
    start = time.perf_counter()
    ((_, detected),) = detect_recordings([Recording(Path(path), "long")], ensemble, decision)
    result = {
        "peak_megabytes": round(peak_megabytes(), 1),
        "x_real_time": round(detected.seconds / (time.perf_counter() - start), 1),
        "events": len(detected.events),
    }
    write_atomically(Path(folder) / RESULT_FILE, json.dumps(result))


# --- scale ---


HIDDEN_HOURS = 25.0  # 150 soundscapes of ten minutes
LIMIT_SECONDS = 2 * 3600.0
MP3_MEGABYTES_PER_HOUR = 28.8  # 64 kbit/s
ROW_BYTES = 20.0  # of a detection in a Parquet shard: `predict` on the demo, 607 of them
BUSY = 0.9  # of a core's time, beside what is counted: waiting, Python


@dataclass(frozen=True)
class Machine:
    """What hears: cores, and GPUs that hear so many times real time by one network each.

    Without a GPU the cores run the networks too.
    """

    name: str
    cores: int
    gpus: int = 0
    gpu_x_real_time: float = 0.0

    def seconds_per_hour(self, costs: CostMeter, n_members: int) -> float:
        """Return how long an hour of sound takes, all of the machine working side by side."""
        reading = costs.reading
        networks = costs.front_end + n_members * costs.network
        if not self.gpus:
            return (reading + networks) / (self.cores * BUSY)
        on_gpus = 3600 * n_members / (self.gpu_x_real_time * self.gpus)
        # Half of the cores read (`inference`): what takes longer decides.
        return max(reading / (max(1, self.cores // 2) * BUSY), on_gpus)


@dataclass(frozen=True)
class CostMeter:
    """Seconds of a core for an hour of sound; network: of one member."""

    reading: float
    front_end: float
    network: float


def read_costs(path: Path) -> CostMeter:
    """Read the costs from an ``inference.csv``, those of its largest ensemble."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such measurement; `birdcall benchmark inference`")
    columns = ["members", "reading_seconds", "front_end_seconds", "networks_seconds"]
    table = read_table(path, columns)[columns].astype(float)
    row = table.loc[table["members"].idxmax()]
    return CostMeter(
        row["reading_seconds"], row["front_end_seconds"], row["networks_seconds"] / row["members"]
    )


# A T4 has 8.1 TFLOP/s in float32, an H100 51; there five networks took 0.2 s each for an hour of
# sound, most of it spent on starting small kernels. A tenth of that speed is reckoned with.
MACHINES = (
    Machine("two cores", 2),
    Machine("Kaggle: T4 x2, four cores", 4, 2, 1_800.0),
    Machine("16 cores", 16),
)


def hidden_test_table(costs: CostMeter, members: tuple[int, ...] = (1, 5, 13)) -> pd.DataFrame:
    """Return what the hidden test set takes: seconds, and the share of the two hours."""
    rows = []
    for machine in MACHINES:
        for n_members in members:
            seconds = HIDDEN_HOURS * machine.seconds_per_hour(costs, n_members)
            rows.append(
                {
                    "machine": machine.name,
                    "members": n_members,
                    "x_real_time": round(3600 * HIDDEN_HOURS / seconds),
                    "seconds": round(seconds),
                    "share_of_two_hours": round(seconds / LIMIT_SECONDS, 3),
                }
            )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Archive:
    """An archive and who hears it.

    failures_per_day: of each worker. restart_seconds: until a lost worker is back, or another one
    is there. task_hours: of sound in a task, which is lost with its worker.
    """

    hours: float = 1e6
    n_workers: int = 200
    task_hours: float = 16 / 6  # 16 recordings of ten minutes
    failures_per_day: float = 1.0
    restart_seconds: float = 300.0
    detections_per_hour: float = 670.0  # as in the demo

    def __post_init__(self) -> None:
        for name in ("hours", "n_workers", "task_hours"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; give above 0")
        for name in ("failures_per_day", "restart_seconds", "detections_per_hour"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more")


def simulate_archive(
    archive: Archive, seconds_per_hour: float, seed: int = 0
) -> dict[str, float | int]:
    """Hear an archive task by task on workers that are lost at random; return what that takes.

    A worker is lost after an exponentially distributed time; its task goes to the next free one.
    """
    generator = np.random.default_rng(seed)
    n_tasks = int(np.ceil(archive.hours / archive.task_hours))
    task_seconds = archive.task_hours * seconds_per_hour
    day = 86_400.0

    def lifetime() -> float:
        if not archive.failures_per_day:
            return np.inf
        return generator.exponential(day / archive.failures_per_day)

    # (when a worker is free, its number); when it is lost.
    free = [(0.0, number) for number in range(archive.n_workers)]
    heapq.heapify(free)
    lost_at = [lifetime() for _ in range(archive.n_workers)]
    left, n_lost, wasted, end = n_tasks, 0, 0.0, 0.0
    while left:
        now, worker = heapq.heappop(free)
        done = now + task_seconds
        if done <= lost_at[worker]:
            left -= 1
            end = max(end, done)
            heapq.heappush(free, (done, worker))
            continue
        n_lost += 1
        wasted += max(0.0, lost_at[worker] - now)
        back = lost_at[worker] + archive.restart_seconds
        lost_at[worker] = back + lifetime()
        heapq.heappush(free, (back, worker))
    ideal = n_tasks * task_seconds / archive.n_workers
    return {
        "hours": archive.hours,
        "workers": archive.n_workers,
        "tasks": n_tasks,
        "task_minutes": round(task_seconds / 60, 2),
        "days": round(end / day, 2),
        "lost_workers": n_lost,
        "work_done_again": round(wasted / (n_tasks * task_seconds), 5),
        "longer_than_without_failures": round(end / ideal - 1, 4),
        "sound_terabytes": round(archive.hours * MP3_MEGABYTES_PER_HOUR / 1e6, 1),
        "shards_gigabytes": round(archive.hours * archive.detections_per_hour * ROW_BYTES / 1e9, 1),
    }


def benchmark_scale(
    folder: Path, archive: Archive, n_members: int = 5
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the hidden test set on known machines, and an archive on workers of two cores each.

    Reads ``inference.csv`` in ``folder`` and writes ``scale_hidden.csv``, ``scale_archive.csv``.
    """
    costs = read_costs(folder / "inference.csv")
    hidden = hidden_test_table(costs)
    seconds = MACHINES[0].seconds_per_hour(costs, n_members)
    found = pd.DataFrame([simulate_archive(archive, seconds)])
    write_atomically(folder / "scale_hidden.csv", hidden.to_csv(index=False))
    write_atomically(folder / "scale_archive.csv", found.to_csv(index=False))
    return hidden, found
