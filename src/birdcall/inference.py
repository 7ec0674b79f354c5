"""Listen to soundscapes with an ensemble: the same code for kernel, validation and `predict`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from birdcall.audio import AudioError, probe_audio, read_audio
from birdcall.checkpoint import Checkpoint, load_model, require_same_classes
from birdcall.config import NOCALL, SEGMENT_SECONDS, FrontendConfig, require
from birdcall.decision import Decision, calibrate, decide, decide_recordings, label_rows
from birdcall.models import SEDModel
from birdcall.outputs import Event, frames_to_events, write_submission
from birdcall.soundscapes import find_audio, find_test_audio_folder, read_test_rows

logger = logging.getLogger(__name__)

# sample rates → the same sound at each: waveforms (samples,); raises AudioError
ReadWaveforms = Callable[[Sequence[int]], dict[int, np.ndarray]]

BATCH_SEGMENTS = 16  # heard at once: fills two cores, and a GPU's memory never
FRAMES_PER_SEGMENT = 50  # of `SegmentScores.frames`: finer than any member's own frames


@dataclass(frozen=True)
class Member:
    """One trained model of an ensemble."""

    name: str
    model: SEDModel
    checkpoint: Checkpoint


@dataclass(frozen=True)
class SegmentScores:
    """What the members heard in each segment of one recording.

    clipwise, framewise: ``(members, segments, classes)`` probabilities; framewise is the highest of
    the segment's frames. frames: ``(classes, segments * FRAMES_PER_SEGMENT)``, the members' mean
    over time. seconds: length of the recording.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    frames: np.ndarray
    seconds: float


class Ensemble:
    """Members that hear the same windows: one decode, and one log-mel per distinct front end."""

    def __init__(self, members: Sequence[Member], device: torch.device | str = "cpu") -> None:
        require(len(members) > 0, "an ensemble needs at least one member")
        for member in members[1:]:
            require_same_classes(
                Path(member.name), member.checkpoint, members[0].checkpoint.classes
            )
        self.device = torch.device(device)
        self.members = list(members)
        for member in self.members:
            member.model.to(self.device).eval()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.members[0].checkpoint.classes

    @property
    def sample_rates(self) -> tuple[int, ...]:
        return tuple(sorted({m.model.frontend.config.sample_rate for m in self.members}))

    def score(self, waveforms: Mapping[int, np.ndarray], window_segments: int = 1) -> SegmentScores:
        """Score a recording given as ``{sample_rate: waveform (samples,)}``, for `sample_rates`."""
        rate, waveform = next(iter(waveforms.items()))
        n_segments = count_segments(len(waveform), rate)
        windows = {
            rate: split_windows(waveforms[rate], rate, window_segments, n_segments)
            for rate in self.sample_rates
        }
        n_windows = len(windows[rate])
        step = max(1, BATCH_SEGMENTS // window_segments)
        batches = [
            self._score_batch(
                {rate: window[start : start + step] for rate, window in windows.items()},
                window_segments,
            )
            for start in range(0, n_windows, step)
        ]
        clipwise, framewise, frames = (
            torch.cat(parts, dim=1).cpu().numpy() for parts in zip(*batches, strict=True)
        )
        return SegmentScores(
            clipwise[:, :n_segments],
            framewise[:, :n_segments],
            frames[:, : n_segments * FRAMES_PER_SEGMENT],
            len(waveform) / rate,
        )

    @torch.inference_mode()
    def _score_batch(
        self, windows: Mapping[int, np.ndarray], window_segments: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `SegmentScores` holds, of one batch of windows."""
        log_mels: dict[FrontendConfig, Tensor] = {}
        clipwise, framewise, frames = [], [], []
        for member in self.members:
            frontend = member.model.frontend
            if frontend.config not in log_mels:
                waveform = torch.from_numpy(windows[frontend.config.sample_rate])
                log_mels[frontend.config] = frontend(waveform.to(self.device))
            output = member.model.detect(log_mels[frontend.config])
            peaks = functional.adaptive_max_pool1d(output.framewise, window_segments)
            clipwise.append(output.clipwise.repeat_interleave(window_segments, dim=0))
            framewise.append(peaks.transpose(1, 2).flatten(0, 1))
            n_frames = window_segments * FRAMES_PER_SEGMENT
            frames.append(functional.interpolate(output.framewise, n_frames, mode="nearest"))
        mean_frames = torch.stack(frames).mean(dim=0).transpose(0, 1).flatten(1)
        return torch.stack(clipwise), torch.stack(framewise), mean_frames


def count_segments(n_samples: int, sample_rate: int) -> int:
    """Return how many segments a recording has; the last one may be padded, and there is one."""
    return max(1, -(-n_samples // (SEGMENT_SECONDS * sample_rate)))


def split_windows(
    waveform: np.ndarray, sample_rate: int, window_segments: int, n_segments: int
) -> np.ndarray:
    """Cut a waveform ``(samples,)`` into ``(windows, window samples)``, zero-padding the last.

    A window is ``window_segments`` whole segments, so no segment is ever split between windows.
    """
    n_samples = window_segments * SEGMENT_SECONDS * sample_rate
    n_windows = -(-n_segments // window_segments)
    padded = np.zeros(n_windows * n_samples, dtype=np.float32)
    kept = waveform[: len(padded)]
    padded[: len(kept)] = kept
    return padded.reshape(n_windows, n_samples)


def load_ensemble(folders: Sequence[Path], device: torch.device | str = "cpu") -> Ensemble:
    """Load the checkpoints in ``folders`` as one ensemble; their classes must agree."""
    members = []
    for folder in folders:
        model, checkpoint = load_model(folder)
        members.append(Member(checkpoint.name, model, checkpoint))
    return Ensemble(members, device)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def score_recordings(
    ensemble: Ensemble,
    paths: Mapping[str, Path],
    window_segments: int = 1,
    limit_seconds: float | None = None,
) -> Iterator[tuple[str, SegmentScores | AudioError]]:
    """Score recordings in order, the first ``limit_seconds`` of each; see `score_sounds`."""
    sounds = {name: partial(read_waveforms, path, limit_seconds) for name, path in paths.items()}
    return score_sounds(ensemble, sounds, window_segments)


def score_sounds(
    ensemble: Ensemble, sounds: Mapping[str, ReadWaveforms], window_segments: int = 1
) -> Iterator[tuple[str, SegmentScores | AudioError]]:
    """Score sounds in order, reading the next one while the members hear this one.

    What does not decode yields its `AudioError`: the caller decides what that means.
    """

    def read(name: str) -> dict[int, np.ndarray] | AudioError:
        try:
            return sounds[name](ensemble.sample_rates)
        except AudioError as error:
            return error

    names = list(sounds)
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(read, names[0]) if names else None
        for position, name in enumerate(names):
            waveforms = pending.result()
            if position + 1 < len(names):
                pending = reader.submit(read, names[position + 1])
            if isinstance(waveforms, AudioError):
                yield name, waveforms
                continue
            yield name, ensemble.score(waveforms, window_segments)


def read_waveforms(
    path: Path, limit_seconds: float | None, sample_rates: Sequence[int]
) -> dict[int, np.ndarray]:
    """Return a recording, or its first ``limit_seconds``, at each of the sample rates."""
    is_long = limit_seconds is not None and probe_audio(path).seconds > limit_seconds
    duration = limit_seconds if is_long else None
    return {rate: read_audio(path, rate, duration_seconds=duration) for rate in sample_rates}


@dataclass(frozen=True)
class SubmissionSummary:
    """How a submission came about; what the kernel's last log line says."""

    n_rows: int
    n_rows_with_birds: int
    n_members: int
    failed: tuple[str, ...]  # audio_ids without a score; their rows say nocall
    seconds: float
    audio_seconds: float

    def __str__(self) -> str:
        return (
            f"{self.n_rows} rows, {self.n_rows_with_birds} with birds; {self.n_members} members; "
            f"{len(self.failed)} recordings failed; {self.seconds:.1f} s, "
            f"{self.audio_seconds / max(self.seconds, 1e-9):.0f} x real time"
        )


def write_nocall(data: Path, submission: Path) -> pd.DataFrame:
    """Write a valid submission without any bird; return the rows of ``test.csv``."""
    rows = read_test_rows(data)
    write_submission(submission, list(rows["row_id"]), [NOCALL] * len(rows))
    return rows


def write_predictions(
    data: Path, ensemble: Ensemble, decision: Decision, submission: Path
) -> SubmissionSummary:
    """Label every row of ``test.csv`` and write the submission, in the order of ``test.csv``.

    A valid all-nocall file is written first, so that whatever happens later one exists. Recordings
    that are missing or do not decode keep nocall; each is named in the log.
    """
    start = time.perf_counter()
    rows = write_nocall(data, submission)
    require(
        decision.classes in ((), ensemble.classes),
        f"the decision is for other classes: {len(decision.classes)}, the members have "
        f"{len(ensemble.classes)}, or in another order",
    )
    row_ids = list(rows["row_id"])
    labels = dict.fromkeys(row_ids, NOCALL)
    folder = find_test_audio_folder(data)
    paths, failed = _find_recordings(folder, list(dict.fromkeys(rows["audio_id"])))
    by_recording = dict(tuple(rows.groupby("audio_id", sort=False)))
    audio_seconds = 0.0
    for name, scores in score_recordings(ensemble, paths, decision.window_segments):
        if isinstance(scores, AudioError):
            logger.warning("%s; its rows say nocall", scores)
            failed.append(name)
            continue
        audio_seconds += scores.seconds
        recording = by_recording[name]
        decided = label_recording(scores, list(recording["seconds"]), decision, ensemble.classes)
        labels.update(zip(recording["row_id"], decided, strict=True))
    write_submission(submission, row_ids, list(labels.values()))
    n_birds = sum(label != NOCALL for label in labels.values())
    elapsed = time.perf_counter() - start
    return SubmissionSummary(
        len(row_ids),
        n_birds,
        len(ensemble.members),
        tuple(failed),
        elapsed,
        audio_seconds,
    )


def _find_recordings(
    folder: Path | None, names: Sequence[str]
) -> tuple[dict[str, Path], list[str]]:
    if folder is None:
        logger.warning("test_audio is not there: every row says nocall")
        return {}, list(names)
    found = {name: find_audio(folder, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    for name in missing:
        logger.warning("%s: no recording of this audio_id; its rows say nocall", folder / name)
    return {name: path for name, path in found.items() if path is not None}, missing


def label_recording(
    scores: SegmentScores,
    seconds: Sequence[float],
    decision: Decision,
    classes: Sequence[str],
) -> list[str]:
    """Label a recording's rows, given their ``seconds`` (the segment's end; NaN: whole file).

    A row beyond the end of the recording says nocall.
    """
    by_segment = label_rows(decide(scores.clipwise, scores.framewise, decision), classes)
    whole = decide_recordings(scores.clipwise, scores.framewise, decision)
    by_file = label_rows(whole, classes)[0]
    labels = []
    for end in seconds:
        if np.isnan(end):
            labels.append(by_file)
            continue
        segment = round(end / SEGMENT_SECONDS) - 1
        labels.append(by_segment[segment] if segment < len(by_segment) else NOCALL)
    return labels


def detect_events(scores: SegmentScores, decision: Decision, classes: Sequence[str]) -> list[Event]:
    """Say from when to when each bird is heard: the decided segments, narrowed to loud frames.

    Every bird of a row has an event in it: where the members' mean over time stays below the frame
    threshold, its highest frames count.
    """
    chosen = decide(scores.clipwise, scores.framewise, decision).T
    frames = scores.frames
    if decision.calibration is not None:
        scale, offset = decision.calibration.frame_scale, decision.calibration.frame_offset
        frames = calibrate(frames.T, scale, offset).T
    frames = frames.reshape(*chosen.shape, FRAMES_PER_SEGMENT)
    threshold = np.minimum(frames.max(axis=2), decision.frame_threshold)
    active = (frames >= threshold[:, :, None]) & chosen[:, :, None]
    heard = np.where(active, frames, 0.0).reshape(len(classes), -1)
    last = round(scores.seconds / SEGMENT_SECONDS * FRAMES_PER_SEGMENT)
    return frames_to_events(
        heard[:, :last] if last else heard,
        classes,
        SEGMENT_SECONDS / FRAMES_PER_SEGMENT,
        np.finfo(np.float32).tiny,
        max_gap_seconds=0.5,
    )
