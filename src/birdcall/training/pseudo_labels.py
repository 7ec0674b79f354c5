"""Say where in each recording its birds are heard, by models that never trained on it (stage 2)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS, require, require_share
from birdcall.data.dataset import TrainingData
from birdcall.data.targets import PRESENT, STRONG_LABEL_COLUMNS, UNCERTAIN, write_strong_labels
from birdcall.inference.decision import average_members
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import Ensemble, load_ensemble
from birdcall.inference.events import Event, frames_to_events
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import FRAME_SECONDS, FRAMES_PER_SEGMENT, WindowConfig
from birdcall.models.checkpoint import read_checkpoint, require_same_classes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PseudoLabelConfig:
    """From which probabilities on a bird is heard; the members' mean counts.

    After the 6th place's third stage: a clip's label is the recording's AND what a frame of the
    clip says. Unlike there a label is not dropped at once below the threshold.
    """

    # The 6th place has a model for each threshold from 0.3 to 0.7; this is their middle.
    present_threshold: float = 0.5
    # Below that a given label is left out of the loss: birds behind are quiet, and what is quiet is
    # what the models miss. Only where they are sure that there is nothing it is taken away: on the
    # demo 7 of 10 species that are not in a recording stay below 0.05 in all of it, and 1 of 20
    # that are listed.
    uncertain_threshold: float = 0.05
    # A bird that nobody has listed: the 6th place adds those above 0.9. Those in between are left
    # out of the loss. The clip must say so as well as the frame: attention pooling alone has many
    # false frames.
    added_threshold: float = 0.9
    # A pause within a song is no absence; nor is one of the network's frames, which are this long.
    max_gap_seconds: float = 0.6
    # Where the primary label is heard nowhere: around its best frame, as long as a segment.
    anchor_seconds: float = 5.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name.endswith("_threshold"):
                require_share(item.name, getattr(self, item.name))
        require(
            self.uncertain_threshold <= self.present_threshold <= self.added_threshold,
            f"uncertain_threshold {self.uncertain_threshold}, present_threshold "
            f"{self.present_threshold} and "
            f"added_threshold {self.added_threshold} must not fall in this order",
        )
        require(self.max_gap_seconds >= 0, f"max_gap_seconds is {self.max_gap_seconds}; give >= 0")
        require(self.anchor_seconds > 0, f"anchor_seconds is {self.anchor_seconds}; give > 0")


@dataclass(frozen=True)
class PseudoLabelSummary:
    """What became of the labels, each counted once for a recording."""

    n_recordings: int
    n_kept: int  # recordings whose labels stay as they are: no run has held them out
    primary: dict[str, int]
    secondary: dict[str, int]
    added: dict[str, int]  # to HEARD; UNSURE ones are left out of the loss
    primary_share: float  # of the recordings' time in which the primary label is heard

    def __str__(self) -> str:
        given = "; ".join(
            f"{name}: {counts['confirmed']} confirmed, {counts['uncertain']} uncertain, "
            f"{counts['dropped']} dropped"
            for name, counts in (("primary", self.primary), ("secondary", self.secondary))
        )
        return (
            f"{self.n_recordings} recordings relabelled, {self.n_kept} as they were; {given}; "
            f"not listed: {self.added[PRESENT]} added, {self.added[UNCERTAIN]} uncertain; "
            f"primary heard in {self.primary_share:.0%} of the time"
        )


def write_pseudo_labels(
    folders: Sequence[Path],
    data: TrainingData,
    path: Path,
    config: PseudoLabelConfig = PseudoLabelConfig(),
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> PseudoLabelSummary:
    """Write to ``path`` where the labels of ``data`` are heard by the runs in ``folders``."""
    timed = make_pseudo_labels(folders, data, config=config, device=device, progress=progress)
    write_strong_labels(path, timed)
    return summarise_labels(timed, data.recordings, config)


def make_pseudo_labels(
    folders: Sequence[Path],
    data: TrainingData,
    config: PseudoLabelConfig = PseudoLabelConfig(),
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> pd.DataFrame:
    """Return strong labels (see `targets.STRONG_LABEL_COLUMNS`) of all recordings held out.

    Each recording is heard whole, and only by members that did not train on its fold. Those in the
    fold of no member, and those that cannot be read, are not in the table and keep their labels.
    """
    rows: list[tuple[str, str, float, float, str, float]] = []
    n_used = len(held_out_recordings(folders, data))
    names = ("filename", "ebird_code", "secondary_codes")
    given = {
        filename: (primary, *secondary)
        for filename, primary, secondary in zip(*map(data.recordings.get, names), strict=True)
    }
    heard = _hear_held_out(folders, data, device)
    for filename, scores in tqdm(heard, total=n_used, disable=not progress, unit="recording"):
        if isinstance(scores, AudioError):
            logger.warning("%s; its labels stay as they are", scores)
            continue
        for event, state in find_label_intervals(scores, given[filename], data.classes, config):
            offset = min(event.offset, round(scores.seconds, 3))
            row = (filename, event.ebird_code, event.onset, offset, state, event.confidence)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(STRONG_LABEL_COLUMNS))


def held_out_recordings(folders: Sequence[Path], data: TrainingData) -> pd.DataFrame:
    """Return the recordings in the folds of the runs in ``folders``; warn of the other folds."""
    checkpoints = [read_checkpoint(folder) for folder in folders]
    for folder, checkpoint in zip(folders, checkpoints, strict=True):
        require_same_classes(folder, checkpoint, data.classes)
        if checkpoint.fold not in data.folds:
            known = ", ".join(map(str, data.folds))
            raise ValueError(f"{folder}: of fold {checkpoint.fold}; the data's folds are {known}")
    held_out = data.recordings["fold"].isin({one.fold for one in checkpoints})
    if not held_out.all():
        missing = sorted(set(data.recordings["fold"][~held_out]))
        logger.warning(
            "no run has held out fold %s: %d recordings keep their labels",
            *(", ".join(map(str, missing)), int((~held_out).sum())),
        )
    return data.recordings[held_out]


def _hear_held_out(
    folders: Sequence[Path], data: TrainingData, device: torch.device | str
) -> Iterator[tuple[str, SegmentPredictions | AudioError]]:
    """Yield the filename and the scores of each held-out recording, fold by fold."""
    by_fold: dict[int, list[Path]] = {}
    for folder in folders:
        by_fold.setdefault(read_checkpoint(folder).fold, []).append(folder)
    for fold in sorted(by_fold):
        ensemble = load_ensemble(by_fold[fold], device)
        recordings = data.recordings[data.recordings["fold"] == fold]
        places = zip(recordings["filename"], recordings["path"], strict=True)
        paths = {filename: data.folder / path for filename, path in places}
        yield from predict_files(ensemble.with_windows(_listening(ensemble)), paths)


def _listening(ensemble: Ensemble) -> WindowConfig:
    """Return windows of the members' shortest training clip: context helps (6th place)."""
    clips = [member.checkpoint.experiment.train.data.clip_seconds for member in ensemble.members]
    return WindowConfig(max(1, int(min(clips) // SEGMENT_SECONDS)))


def find_label_intervals(
    scores: SegmentPredictions,
    given: Sequence[str],
    classes: Sequence[str],
    config: PseudoLabelConfig,
) -> list[tuple[Event, str]]:
    """Return each stretch in which a bird is HEARD or UNSURE, by species and time.

    ``given``: the recording's labels, the primary one first; see `_unheard_stretches` for those
    that are heard nowhere. A heard stretch lies within an unsure one that reaches as far as the
    bird may be heard. A species that is not given needs the clip's word too, and is heard from
    ``added_threshold`` on.
    """
    n_frames = max(1, round(scores.seconds / FRAME_SECONDS))
    frames = scores.frames[:, :n_frames]
    is_given = np.isin(np.asarray(classes, dtype=object), np.asarray(given, dtype=object))
    clipwise = np.repeat(average_members(scores.clipwise).T, FRAMES_PER_SEGMENT, axis=1)[
        :, :n_frames
    ]
    frames = np.where(is_given[:, None], frames, np.minimum(frames, clipwise))
    limits = {
        PRESENT: np.where(is_given, config.present_threshold, config.added_threshold),
        UNCERTAIN: np.where(is_given, config.uncertain_threshold, config.present_threshold),
    }
    found = [
        (event, state)
        for state, limit in limits.items()
        for event in frames_to_events(
            frames, classes, FRAME_SECONDS, limit, max_gap_seconds=config.max_gap_seconds
        )
    ]
    heard = {event.ebird_code for event, state in found if state == PRESENT}
    unheard = [code for code in given if code not in heard]
    found = [one for one in found if one[0].ebird_code not in unheard]
    for code in unheard:
        own = frames[list(classes).index(code)]
        found += _unheard_stretches(own, code, code == given[0], config)
    return sorted(found, key=lambda one: (one[0].ebird_code, one[0].onset, one[1]))


def _unheard_stretches(
    frames: np.ndarray, code: str, is_primary: bool, config: PseudoLabelConfig
) -> list[tuple[Event, str]]:
    """Return where a given label counts that no frame of the recording reaches the threshold for.

    Who misses the bird cannot say where it is not: all of the recording is unsure, unless every
    frame is below ``uncertain_threshold``. The primary label is there for certain: it counts as
    present around its best frame.
    """
    seconds, highest = round(len(frames) * FRAME_SECONDS, 6), round(float(frames.max()), 6)
    stretches = []
    if is_primary or highest >= config.uncertain_threshold:
        stretches.append((Event(code, 0.0, seconds, highest), UNCERTAIN))
    if is_primary:
        middle = (float(frames.argmax()) + 0.5) * FRAME_SECONDS
        onset = max(
            0.0, min(middle, seconds - config.anchor_seconds / 2) - config.anchor_seconds / 2
        )
        offset = min(seconds, onset + config.anchor_seconds)
        stretches.append((Event(code, round(onset, 6), round(offset, 6), highest), PRESENT))
    return stretches


def summarise_labels(
    timed: pd.DataFrame, recordings: pd.DataFrame, config: PseudoLabelConfig
) -> PseudoLabelSummary:
    """Count what became of the labels of ``recordings``.

    A primary label that is heard nowhere, and only counts as heard somewhere, is unsure here.
    """
    confirmed = (timed["state"] == PRESENT) & (timed["probability"] >= config.present_threshold)
    best = confirmed.groupby([timed["filename"], timed["ebird_code"]]).any()
    states = best.map({True: PRESENT, False: UNCERTAIN}).to_dict()
    strong_labels = recordings[recordings["filename"].isin(timed["filename"])]
    labels = {"primary": set(), "secondary": set()}
    for filename, primary, secondary in zip(
        strong_labels["filename"],
        strong_labels["ebird_code"],
        strong_labels["secondary_codes"],
        strict=True,
    ):
        labels["primary"].add((filename, primary))
        labels["secondary"] |= {(filename, code) for code in secondary}
    counts = {
        kind: {
            "confirmed": sum(states.get(label) == PRESENT for label in given),
            "uncertain": sum(states.get(label) == UNCERTAIN for label in given),
            "dropped": sum(label not in states for label in given),
        }
        for kind, given in labels.items()
    }
    listed = labels["primary"] | labels["secondary"]
    others = [state for label, state in states.items() if label not in listed]
    primaries = timed.merge(strong_labels[["filename", "ebird_code"]])
    heard = primaries[primaries["state"] == PRESENT]
    return PseudoLabelSummary(
        n_recordings=len(strong_labels),
        n_kept=len(recordings) - len(strong_labels),
        primary=counts["primary"],
        secondary=counts["secondary"],
        added={state: others.count(state) for state in (PRESENT, UNCERTAIN)},
        primary_share=float(
            (heard["offset"] - heard["onset"]).sum() / max(strong_labels["seconds"].sum(), 1e-9)
        ),
    )
