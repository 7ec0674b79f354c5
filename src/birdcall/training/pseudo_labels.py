"""Make pseudo-labels of recordings, by runs that held them out, and of unlabelled soundscapes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS, PseudoLabelConfig
from birdcall.data.dataset import TrainingData
from birdcall.data.folds import TRAINING_ONLY
from birdcall.data.targets import (
    PRESENT,
    STRONG_LABEL_COLUMNS,
    UNCERTAIN,
    write_strong_labels,
)
from birdcall.inference.decision import average_members
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import Ensemble, load_ensemble
from birdcall.inference.events import Event, frames_to_events
from birdcall.inference.predictions import (
    SegmentPredictions,
)
from birdcall.inference.windows import FRAME_SECONDS, FRAMES_PER_SEGMENT, WindowConfig
from birdcall.training.resume import read_runs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PseudoLabelSummary:
    """How many labels were confirmed and changed; a label counts once for each recording."""

    n_recordings: int
    n_unchanged: int  # recordings without pseudo-labels: in the fold of no run, or not readable
    primary: dict[str, int]  # labels that are confirmed, uncertain, dropped
    secondary: dict[str, int]
    added: dict[str, int]  # species that were not listed: present, uncertain
    primary_share: float  # of the recordings' time, in which the primary species is present

    @classmethod
    def of(
        cls, labels: pd.DataFrame, recordings: pd.DataFrame, config: PseudoLabelConfig
    ) -> PseudoLabelSummary:
        """Compare pseudo-labels with the labels of ``recordings``.

        A primary label that is predicted nowhere, and present around its best frame, is uncertain.
        """
        is_confirmed = (labels["state"] == PRESENT) & (
            labels["probability"] >= config.present_threshold
        )
        best = is_confirmed.groupby([labels["filename"], labels["ebird_code"]]).any()
        states = best.map({True: "confirmed", False: "uncertain"}).to_dict()
        recordings_with = recordings[recordings["filename"].isin(labels["filename"])]
        primary = set(zip(recordings_with["filename"], recordings_with["ebird_code"], strict=True))
        secondary = recordings_with[["filename", "secondary_codes"]].explode("secondary_codes")
        secondary = set(secondary.dropna().itertuples(index=False, name=None))

        counts = []
        for given in (primary, secondary):
            results = [states.get(label, "dropped") for label in given]
            names = ("confirmed", "uncertain", "dropped")
            counts.append({name: results.count(name) for name in names})
        added = [state for label, state in states.items() if label not in primary | secondary]
        present = labels.merge(recordings_with[["filename", "ebird_code"]])
        present = present[present["state"] == PRESENT]
        present_seconds = (present["offset"] - present["onset"]).sum()
        return cls(
            n_recordings=len(recordings_with),
            n_unchanged=len(recordings) - len(recordings_with),
            primary=counts[0],
            secondary=counts[1],
            added={PRESENT: added.count("confirmed"), UNCERTAIN: added.count("uncertain")},
            primary_share=float(present_seconds / max(recordings_with["seconds"].sum(), 1e-9)),
        )

    def __str__(self) -> str:
        given = "; ".join(
            f"{kind} labels: " + ", ".join(f"{n} {name}" for name, n in counts.items())
            for kind, counts in (("primary", self.primary), ("secondary", self.secondary))
        )
        return (
            f"{self.n_recordings} recordings with pseudo-labels, {self.n_unchanged} unchanged; "
            f"{given}; not listed: {self.added[PRESENT]} added, {self.added[UNCERTAIN]} uncertain; "
            f"primary species present in {self.primary_share:.0%} of the time"
        )


def write_pseudo_labels(
    runs: Sequence[Path],
    data: TrainingData,
    path: Path,
    *,
    config: PseudoLabelConfig = PseudoLabelConfig(),
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> PseudoLabelSummary:
    """Write strong labels (see `targets.STRONG_LABEL_COLUMNS`) of ``data`` to a CSV file.

    ``runs`` are folders with checkpoints. Each recording is predicted as a whole, and only by runs
    that did not train on its fold. A recording in the fold of no run, or that cannot be read, is
    not in the table and keeps its labels. Raises ValueError as `read_runs`.
    """
    by_fold: dict[int, list[Path]] = {}
    for run, checkpoint in zip(runs, read_runs(runs, data), strict=True):
        by_fold.setdefault(checkpoint.fold, []).append(run)
    recordings = data.recordings.set_index("filename")
    is_held_out = recordings["fold"].isin(by_fold)
    if not is_held_out.all():
        names = {TRAINING_ONLY: f"{TRAINING_ONLY} (in every training part)"}
        missing = sorted(set(recordings["fold"][~is_held_out]))
        folds = ", ".join(str(names.get(fold, fold)) for fold in missing)
        n_unchanged = int((~is_held_out).sum())
        logger.warning(
            "no run held out fold %s: %d recordings keep their labels", folds, n_unchanged
        )
    rows: list[tuple[str, str, float, float, str, float]] = []
    results = _predict_held_out(by_fold, data, device)
    n_held_out = int(is_held_out.sum())
    for name, result in tqdm(results, total=n_held_out, disable=not progress, unit="recording"):
        if isinstance(result, AudioError):
            logger.warning("%s; its labels stay unchanged", result)
            continue
        given = (recordings["ebird_code"][name], *recordings["secondary_codes"][name])
        for event, state in find_label_intervals(result, given, data.classes, config):
            offset = min(event.offset, round(result.seconds, 3))
            rows.append((name, event.ebird_code, event.onset, offset, state, event.confidence))
    labels = pd.DataFrame(rows, columns=list(STRONG_LABEL_COLUMNS))
    write_strong_labels(path, labels)
    return PseudoLabelSummary.of(labels, data.recordings, config)


def _predict_held_out(
    by_fold: dict[int, list[Path]], data: TrainingData, device: torch.device | str
) -> Iterator[tuple[str, SegmentPredictions | AudioError]]:
    """Yield the filename and the predictions of each held-out recording, fold by fold.

    With long windows: context helps (6th place).
    """
    for fold in sorted(by_fold):
        recordings = data.recordings[data.recordings["fold"] == fold]
        files = zip(recordings["filename"], recordings["path"], strict=True)
        paths = {filename: data.folder / path for filename, path in files}
        yield from predict_files(load_with_context(by_fold[fold], device), paths)


def load_with_context(runs: Sequence[Path], device: torch.device | str) -> Ensemble:
    """Load ``runs`` with windows as long as their shortest training clip."""
    ensemble = load_ensemble(runs, device)
    configs = [member.checkpoint.experiment.train.data for member in ensemble.members]
    clip_seconds = min(config.clip_seconds for config in configs)
    return ensemble.with_windows(WindowConfig(max(1, int(clip_seconds // SEGMENT_SECONDS))))


def find_label_intervals(
    predictions: SegmentPredictions,
    given: Sequence[str],
    classes: Sequence[str],
    config: PseudoLabelConfig,
) -> list[tuple[Event, str]]:
    """Return the intervals in which a species is PRESENT or UNCERTAIN, by species and time.

    ``predictions`` are of one recording, with frames; ``given``: its labels, the primary label
    first. An interval where a species is present lies within an uncertain interval, which ends
    where the probability is below the uncertain threshold. For a species that is not given, frames
    count up to the clipwise probability, and the thresholds are higher.
    """
    n_frames = max(1, round(predictions.seconds / FRAME_SECONDS))
    clipwise = average_members(predictions.clipwise).T
    clipwise = np.repeat(clipwise, FRAMES_PER_SEGMENT, axis=1)[:, :n_frames]
    frames = predictions.frames[:, :n_frames]
    is_given = np.array([code in given for code in classes])
    frames = np.where(is_given[:, None], frames, np.minimum(frames, clipwise))
    thresholds = {
        PRESENT: np.where(is_given, config.present_threshold, config.added_threshold),
        UNCERTAIN: np.where(is_given, config.uncertain_threshold, config.present_threshold),
    }
    intervals = []
    for state, threshold in thresholds.items():
        events = frames_to_events(
            frames, classes, FRAME_SECONDS, threshold, max_gap_seconds=config.max_gap_seconds
        )
        intervals += [(event, state) for event in events]
    predicted = {event.ebird_code for event, state in intervals if state == PRESENT}
    missed = [code for code in given if code not in predicted]
    intervals = [(event, state) for event, state in intervals if event.ebird_code not in missed]
    for code in missed:
        of_species = frames[list(classes).index(code)]
        intervals += _intervals_of_missed(of_species, code, code == given[0], config)
    return sorted(intervals, key=lambda item: (item[0].ebird_code, item[0].onset, item[1]))


def _intervals_of_missed(
    frames: np.ndarray, code: str, is_primary: bool, config: PseudoLabelConfig
) -> list[tuple[Event, str]]:
    """Return the intervals of a given label that no frame of the recording is high enough for.

    Models that miss a species cannot tell where it is absent: it is uncertain in the whole
    recording, or absent if every frame is below ``uncertain_threshold``. The primary species is
    certainly in the recording: it counts as present around its best frame.
    """
    seconds, highest = round(len(frames) * FRAME_SECONDS, 6), round(float(frames.max()), 6)
    intervals = []
    if is_primary or highest >= config.uncertain_threshold:
        intervals.append((Event(code, 0.0, seconds, highest), UNCERTAIN))
    if is_primary:
        half = config.anchor_seconds / 2
        middle = (float(frames.argmax()) + 0.5) * FRAME_SECONDS
        middle = min(middle, seconds - half)
        onset = max(0.0, middle - half)
        offset = min(seconds, onset + config.anchor_seconds)
        intervals.append((Event(code, round(onset, 6), round(offset, 6), highest), PRESENT))
    return intervals
