"""Find soundscapes to train on; hold the labels that models or people made of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError, hash_parts
from birdcall.config import SEGMENT_SECONDS, Experiment, StudentConfig, require
from birdcall.data.audit import Measurement, measure_recording
from birdcall.data.cache import RecordingCache
from birdcall.data.targets import IGNORE_TARGET, PRESENT, StrongTargets
from birdcall.inference.windows import FRAME_SECONDS
from birdcall.storage.files import atomic_path, digest, find_files, readable_sound, shorten_list
from birdcall.storage.store import DAMAGED, read_arrays, write_arrays
from birdcall.taxonomy import UNKNOWN_BIRD

logger = logging.getLogger(__name__)

_EMPTY_WEIGHT = 0.1  # of a clip without labels among those that are drawn by their largest label


def require_folders(folders: Iterable[Path], kind: str = "soundscapes") -> None:
    """Raise FileNotFoundError for a folder that is not there, before other work."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of {kind}")


def find_unlabelled(
    folder: Path, recordings: pd.DataFrame, labelled: Sequence[Path], store: Path | None = None
) -> dict[str, Measurement]:
    """Decode the soundscapes below ``folder``, by name, and cache them in the folder ``store``.

    What cannot be read whole, or is there twice, is left out and named in the log. ValueError where
    one is among the ``recordings``, or shares sound with a labelled soundscape: all sound below the
    folders ``labelled``.
    """
    cache = None if store is None else RecordingCache(folder, store)
    paths = readable_sound(find_files(folder), "an unlabelled soundscape")
    by_hash: dict[str, Measurement] = {}
    for path in paths:
        item = measure_recording(folder, path.relative_to(folder).as_posix(), cache)
        if item.error or item.audio_hash in by_hash:
            reason = item.error or f"the same as {by_hash[item.audio_hash].path}"
            logger.warning("%s is left out: %s", path, reason)
        else:
            by_hash[item.audio_hash] = item
    if not by_hash:
        raise FileNotFoundError(f"{folder}: no sound in this folder of soundscapes can be read")
    of_hash = dict(zip(recordings["sha256"], recordings["path"], strict=True))
    known = [
        f"{item.path} is the recording {of_hash[item.sha256]}"
        for item in by_hash.values()
        if item.sha256 in of_hash
    ]
    parts: dict[int, Path] = {}  # of labelled soundscapes
    for folder_of_labelled in labelled:
        for path in readable_sound(find_files(folder_of_labelled), "a labelled soundscape"):
            try:
                parts |= dict.fromkeys(hash_parts(path), path)
            except AudioError as error:
                logger.warning("%s; whether soundscapes overlap with it is not known", error)
    for item in by_hash.values() if parts else ():
        if shared := hash_parts(folder / item.path) & parts.keys():
            known.append(f"{item.path} has sound of {min(parts[part] for part in shared)}")
    require(
        not known,
        f"soundscapes to learn from have labels to score with: {shorten_list(known)}; remove "
        "them, or scores would be of sound that was trained on",
    )
    return {item.path: item for item in by_hash.values()}


# --- soft labels ---


def scale_probabilities(probabilities: np.ndarray, config: StudentConfig) -> np.ndarray:
    """Return soft labels ``(segments, classes)`` from 0 to 1, without the cap on their sum."""
    reference = np.quantile(probabilities.max(axis=1), config.reference_quantile)
    return np.minimum(1, probabilities / max(reference, config.min_reference)) ** config.power


@dataclass(frozen=True)
class CollapseLimits:
    """What soft labels must keep to: students of a collapsed teacher learn its mistake."""

    min_probability: float = 0.01  # that becomes a label of 1; below, the members name nothing
    max_class_share: float = 0.8  # of all labels; above, they name one species
    # Labels of a segment together, and at most so many of the classes; above, they name all.
    max_mean_sum: float = 10.0
    max_sum_share: float = 0.5
    # Of the previous round's number of species, below which the labels drift to few of them.
    min_kept_share: float = 0.5


@dataclass(frozen=True)
class LabelStatistics:
    """How soft labels are distributed, scaled as `StudentConfig` has it by default."""

    probability: float  # that becomes a label of 1
    largest_class: str
    largest_share: float  # of the largest class, of all labels
    n_species: float  # exp(entropy of the mean label): so many species in equal shares
    mean_sum: float  # of a segment's labels
    n_classes: int

    @classmethod
    def of(cls, probabilities: np.ndarray, classes: Sequence[str]) -> LabelStatistics:
        """Measure ``probabilities`` ``(segments, classes)``."""
        config = StudentConfig()
        labels = scale_probabilities(probabilities, config)
        share = labels.mean(axis=0) / max(labels.mean(axis=0).sum(), 1e-9)
        entropy = -np.sum(share * np.log(np.maximum(share, 1e-12)))
        return cls(
            probability=float(np.quantile(probabilities.max(axis=1), config.reference_quantile)),
            largest_class=classes[int(share.argmax())],
            largest_share=float(share.max()),
            n_species=float(np.exp(entropy)),
            mean_sum=float(labels.sum(axis=1).mean()),
            n_classes=len(classes),
        )

    def require_no_collapse(
        self, source: str, limits: CollapseLimits, previous: LabelStatistics | None = None
    ) -> None:
        """Raise ValueError where the labels of ``source`` name nothing, one species or all.

        Also where they drift to few species since the ``previous`` round.
        """
        max_sum = min(limits.max_mean_sum, limits.max_sum_share * self.n_classes)
        reason = ""
        if self.probability < limits.min_probability:
            reason = f"they name nothing, their high probabilities are {self.probability:.2g}"
        elif self.largest_share > limits.max_class_share:
            reason = f"{self.largest_share:.0%} of them are {self.largest_class}"
        elif self.mean_sum > max_sum:
            reason = f"they name {self.mean_sum:.1f} of {self.n_classes} species in a mean segment"
        elif previous and self.n_species < limits.min_kept_share * previous.n_species:
            reason = (
                f"they are as varied as {self.n_species:.1f} species in equal shares, and were as "
                f"{previous.n_species:.1f} in the round before"
            )
        require(
            not reason,
            f"the labels of {source} have collapsed: {reason}; nothing is written: train longer, "
            "or name other experiments",
        )

    def __str__(self) -> str:
        return (
            f"{self.mean_sum:.2f} species per segment, as varied as {self.n_species:.1f} in equal "
            f"shares; most is {self.largest_class}, {self.largest_share:.0%}"
        )


# --- labels of an ensemble ---


PEOPLE = "people"  # in place of a network, for the labels of tables
_ARRAYS = ("probabilities", "soundscape", "events")


def network_of(experiment: Experiment) -> str:
    """Return a digest of front end and network: runs that differ in training only share it."""
    return digest(json.dumps([asdict(experiment.frontend), asdict(experiment.model)]))


@dataclass(frozen=True, eq=False)
class SoundscapeLabels:
    """What an ensemble predicts for the segments of soundscapes that nobody has labelled.

    Each site's background is taken off: see `inference.background.remove_background`.
    probabilities: ``(families, segments, classes)``, the mean of the members of one network each.
    soundscape: ``(segments,)``, index in ``soundscapes``.
    Or what PEOPLE have labelled. Then probabilities are 0 or 1, IGNORE_TARGET in segments without
    labels, and ``events`` has a row per event: soundscape, class (-1: any, see UNKNOWN_BIRD),
    onset and offset in seconds.
    """

    folder: Path
    classes: tuple[str, ...]
    soundscapes: list[dict]  # name below the folder, seconds, size, audio_hash; has_times
    members: list[dict]  # name, experiment, network, weights_sha256
    families: list[str]  # the `network_of` each
    round: int  # 1: of members that were trained without such labels
    statistics: dict  # see `LabelStatistics`
    probabilities: np.ndarray
    soundscape: np.ndarray
    events: np.ndarray | None = None

    def write(self, path: Path) -> None:
        """Write the labels as one safetensors file, whole or not at all."""
        values = {name: value for name, value in vars(self).items() if name not in _ARRAYS}
        with atomic_path(path) as temporary:
            arrays = {name: getattr(self, name) for name in _ARRAYS}
            arrays = {name: array for name, array in arrays.items() if array is not None}
            write_arrays(temporary, arrays, values | {"folder": str(self.folder.resolve())})

    @classmethod
    def read(cls, path: Path, classes: Sequence[str]) -> SoundscapeLabels:
        """Read what `write` wrote; errors name the file, or the soundscape that has changed."""
        if not path.is_file():
            advice = "`birdcall pseudo-label --soundscapes` makes them"
            raise FileNotFoundError(f"{path}: no such labels of soundscapes; {advice}")
        try:
            arrays, values = read_arrays(path)
            folder, known = Path(values.pop("folder")), tuple(values.pop("classes"))
            labels = cls(folder=folder, classes=known, **values, **arrays)
        except (OSError, *DAMAGED) as error:
            raise ValueError(f"{path}: not a file of soundscape labels: {error}") from error
        require(known == tuple(classes), f"{path}: labels of other classes than those of the data")
        for item in labels.soundscapes:
            file = folder / item["name"]
            if not file.is_file() or file.stat().st_size != item["size"]:
                raise FileNotFoundError(
                    f"{file} is not there as when {path} was made; label the soundscapes again"
                )
        return labels

    def cache_sound(self, store: Path) -> None:
        """Decode the soundscapes that are not yet cached in the folder ``store``.

        From there a clip is read in a fifth of the time that a seek in a long mp3 takes. What
        cannot be read is left to the training, which names it.
        """
        cache = RecordingCache(self.folder, store)
        names = [item["name"] for item in self.soundscapes]
        missing = [name for name in names if not cache.path(name).is_file()]
        if missing:
            logger.info("%d of %d soundscapes are decoded: %s", len(missing), len(names), store)
        for name in missing:
            measure_recording(self.folder, name, cache)

    @property
    def digest(self) -> str:
        """Return a digest of what a training learns from the labels, wherever the files lie."""
        described = json.dumps([self.soundscapes, self.members, self.round])
        events = b"" if self.events is None else self.events.tobytes()
        return digest(described.encode() + self.probabilities.tobytes() + events)

    def teachers_of(self, experiment: Experiment) -> np.ndarray:
        """Return which families may teach ``experiment``, boolean ``(families,)``; or ValueError.

        Not its own: neither members of its name, nor of its network under another name.
        """
        own = {item["network"] for item in self.members if item["experiment"] == experiment.name}
        is_teacher = ~np.isin(self.families, [*own, network_of(experiment)])
        require(
            bool(is_teacher.any()),
            f"{experiment.name} would learn from its own predictions: all members that labelled "
            "soundscapes are of this experiment or have its network; label with another one",
        )
        return is_teacher


class SoundscapeTargets:
    """Targets of clips that start with a segment of a soundscape.

    A clip's soft label is the highest of its segments; where they exceed ``max_sum`` together, they
    are reduced in proportion. The labels of people are hard: see `StrongTargets`. Clips are drawn
    in proportion to their largest label, clips without labels as if it were ``_EMPTY_WEIGHT``.
    """

    def __init__(self, labels: SoundscapeLabels, experiment: Experiment) -> None:
        self.config = experiment.train.student
        self.clip_seconds = experiment.train.data.clip_seconds
        self.labels = labels
        mean = labels.probabilities[labels.teachers_of(experiment)].mean(axis=0)
        self.strong = None if labels.events is None else _strong_targets(labels)
        of_segments = mean if self.strong else scale_probabilities(mean, self.config)
        n_segments = np.bincount(labels.soundscape, minlength=len(labels.soundscapes))
        self.first = np.cumsum(n_segments) - n_segments  # of each soundscape
        n_in_clip = max(1, math.ceil(self.clip_seconds / SEGMENT_SECONDS))
        number = np.arange(len(of_segments)) - self.first[labels.soundscape]
        last = n_segments[labels.soundscape] - 1
        # A soundscape shorter than a clip has one clip, from its start.
        is_start = number <= np.maximum(0, last + 1 - n_in_clip)
        self.segments = np.flatnonzero(is_start & (of_segments.max(axis=1) != IGNORE_TARGET))
        targets = of_segments[self.segments]
        for step in range(1, n_in_clip):
            later = np.minimum(number[self.segments] + step, last[self.segments])
            targets = np.maximum(
                targets, of_segments[self.first[labels.soundscape[self.segments]] + later]
            )
        total = np.maximum(targets.sum(axis=1, keepdims=True), 1e-9)
        self.targets = (targets * np.minimum(1, self.config.max_sum / total)).astype(np.float32)
        largest = np.maximum(self.targets.max(axis=1), _EMPTY_WEIGHT)
        self.cumulative = np.cumsum(largest, dtype=np.float64)

    def draw(self, generator: np.random.Generator) -> tuple[int, float, np.ndarray]:
        """Return index of the soundscape, start in seconds and target ``(classes,)`` of a clip."""
        drawn = generator.random() * self.cumulative[-1]
        clip = int(np.searchsorted(self.cumulative, drawn, side="right"))
        segment = self.segments[min(clip, len(self.segments) - 1)]
        soundscape = int(self.labels.soundscape[segment])
        start = float(SEGMENT_SECONDS * (segment - self.first[soundscape]))
        spare = min(SEGMENT_SECONDS, self.labels.soundscapes[soundscape]["seconds"] - start)
        start += generator.random() * max(0.0, spare - self.clip_seconds)
        target = self.targets[min(clip, len(self.segments) - 1)]
        if self.strong is not None:
            found = self.strong.find(soundscape, start, self.clip_seconds)
            target = np.zeros_like(target) if found is None else found
        return soundscape, start, target

    def find_frames(self, soundscape: int, start: float) -> np.ndarray | None:
        """Return the targets of a clip's frames ``(classes, frames)``; None: they are not known."""
        if self.strong is None or not self.labels.soundscapes[soundscape]["has_times"]:
            return None
        n_frames = round(self.clip_seconds / FRAME_SECONDS)
        return self.strong.find_frames(soundscape, start, n_frames, FRAME_SECONDS)


def _strong_targets(labels: SoundscapeLabels) -> StrongTargets:
    """Return the targets of clips of soundscapes that people have labelled."""
    soundscape, column, onset, offset = labels.events.T
    codes = np.array([*labels.classes, UNKNOWN_BIRD], dtype=object)  # -1 is the last
    names = [item["name"] for item in labels.soundscapes]
    table = pd.DataFrame(
        {
            "filename": np.array(names, dtype=object)[soundscape.astype(int)],
            "ebird_code": codes[column.astype(int)],
            "onset": onset,
            "offset": offset,
            "state": PRESENT,
        }
    )
    return StrongTargets(pd.DataFrame({"filename": names}), labels.classes, table)
