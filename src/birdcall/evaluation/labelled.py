"""Read soundscapes that people have labelled, and predict them.

Two layouts are read: the competition's example files (a row for every 5 seconds, and annotations
with times), and recordings with Raven selection tables beside them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError, probe_audio
from birdcall.config import SEGMENT_SECONDS
from birdcall.data.targets import MIN_OVERLAP_SECONDS
from birdcall.evaluation.predictions import LabelledPredictions, PredictionCache
from birdcall.inference.engine import open_recording
from birdcall.inference.ensemble import Ensemble
from birdcall.inference.events import Event
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.tables import read_raven_table
from birdcall.inference.windows import count_segments
from birdcall.kaggle.test_set import (
    AUDIO_SUFFIXES,
    CompetitionFile,
    find_audio,
    raven_tables_of,
    read_annotations,
    read_labelled_soundscapes,
)
from birdcall.storage.files import digest_files
from birdcall.taxonomy import all_species, find_species

logger = logging.getLogger(__name__)

_TIME_TOLERANCE = 1e-6  # seconds
_ROW_COLUMNS = ["recording", "seconds", "birds"]
_ANNOTATION_COLUMNS = ["recording", "onset", "offset", "ebird_code"]


class _TimedLabel(Protocol):
    """An event of `inference.events`, a simulated event, or a row of a table of annotations."""

    onset: float  # seconds from the start of its recording
    offset: float
    ebird_code: str


@dataclass
class Truth:
    """The labels of soundscapes.

    paths: the file of each recording. rows: ``recording``, ``seconds`` (the segment's end),
    ``birds`` (known codes, none for nocall). annotations: ``recording``, ``onset``, ``offset``,
    ``ebird_code``. annotated: the recordings whose annotations are complete, perhaps without any.
    foreign: counts of the labels that are no known species; they count as no bird.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    rows: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=_ROW_COLUMNS))
    annotations: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=_ANNOTATION_COLUMNS)
    )
    annotated: list[str] = field(default_factory=list)
    foreign: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class LabelledSoundscapes:
    """Labelled soundscapes with the predictions of all members.

    predictions: each recording is a group. frames: `SegmentPredictions` with ``frames``
    of the recordings whose annotations are complete. annotations, foreign, paths: see `Truth`.
    """

    predictions: LabelledPredictions
    annotations: pd.DataFrame
    frames: Mapping[str, SegmentPredictions]
    foreign: Counter[str]
    paths: Mapping[str, Path]


def known_species(classes: Sequence[str]) -> list[str]:
    """Return the species of the truth: the classes first, then all others of the competition."""
    return list(dict.fromkeys((*classes, *(species.ebird_code for species in all_species()))))


def predict_labelled(
    ensemble: Ensemble,
    folders: Sequence[Path],
    *,
    cache_folder: Path | None = None,
    progress: bool = False,
) -> LabelledSoundscapes | None:
    """Predict the labelled soundscapes in ``folders``; None if there are none.

    A soundscape whose recording is missing or does not decode is left out with a warning. Segments
    that nobody has labelled are predicted and not scored.
    """
    if not folders:
        return None
    species = known_species(ensemble.classes)
    truth = read_truth(folders, species)
    if not truth.paths:
        return None
    sources = {name: open_recording(path) for name, path in truth.paths.items()}
    cache = PredictionCache(cache_folder, "labelled", digest_files(truth.paths.values()))
    predictions: dict[str, SegmentPredictions] = {}
    tables, labels = [], []
    for name, item in cache.predict(ensemble, sources, progress=progress).items():
        if isinstance(item, AudioError):
            logger.warning("%s; this labelled soundscape is left out", item)
            continue
        predictions[name] = item
        truth_of_segments, is_labelled = _label_recording(truth, name, item.n_segments, species)
        tables.append(segment_table(name, item.n_segments, is_labelled=is_labelled, group=name))
        labels.append(truth_of_segments)
    if not predictions:
        return None
    annotated = {name: sources[name] for name in truth.annotated if name in predictions}
    frames = cache.predict_frames(ensemble, annotated) if annotated else {}
    annotations = truth.annotations[truth.annotations["recording"].isin(list(predictions))]
    return LabelledSoundscapes(
        predictions=LabelledPredictions(
            segments=pd.concat(tables, ignore_index=True),
            truth=np.concatenate(labels),
            predictions=SegmentPredictions.concatenate(list(predictions.values())),
            member_names=tuple(member.name for member in ensemble.members),
            classes=ensemble.classes,
        ),
        annotations=annotations.reset_index(drop=True),
        frames={name: replace(predictions[name], frames=array) for name, array in frames.items()},
        foreign=truth.foreign,
        paths=truth.paths,
    )


def segment_table(
    recording: str, n_segments: int, *, is_labelled: np.ndarray | bool, group: str
) -> pd.DataFrame:
    """Return the ``segments`` of `LabelledPredictions` for one recording."""
    return pd.DataFrame(
        {
            "recording": recording,
            "seconds": SEGMENT_SECONDS * np.arange(1.0, n_segments + 1),
            "is_labelled": is_labelled,
            "group": group,
        }
    )


def label_segments(
    events: Iterable[_TimedLabel], species: Sequence[str], n_segments: int
) -> np.ndarray:
    """Return which species are present in each segment, boolean, ``(segments, species)``.

    An event is present in a segment that holds half a second of it, or half of it. The code of each
    event must be in ``species``.
    """
    truth = np.zeros((n_segments, len(species)), dtype=bool)
    column_of = {code: column for column, code in enumerate(species)}
    starts = SEGMENT_SECONDS * np.arange(n_segments)
    for event in events:
        onset, offset = event.onset, event.offset
        overlap = np.minimum(offset, starts + SEGMENT_SECONDS) - np.maximum(onset, starts)
        touches = (onset < starts + SEGMENT_SECONDS) & (offset >= starts)
        enough = min(MIN_OVERLAP_SECONDS, (offset - onset) / 2) - _TIME_TOLERANCE
        truth[touches & (overlap >= enough), column_of[event.ebird_code]] = True
    return truth


def read_truth(folders: Sequence[Path], species: Sequence[str]) -> Truth:
    """Read all labelled soundscapes in ``folders``; ``species`` are the known codes.

    Raises FileNotFoundError for a folder without any, and ValueError for impossible rows and
    selections, naming file and line, or for a recording that is in two folders.
    """
    result = Truth()
    rows, annotations = [], []
    for folder in folders:
        read_folder = _read_raven_folder
        if (folder / CompetitionFile.EXAMPLE_LABELS).is_file():
            read_folder = _read_examples
        truth = read_folder(folder, species)
        for name in truth.paths:
            if name in result.paths:
                raise ValueError(f"{folder}: {name} is in another folder of soundscapes too")
        result.paths |= truth.paths
        result.annotated += truth.annotated
        result.foreign += truth.foreign
        rows.append(truth.rows)
        if len(truth.annotations):
            annotations.append(truth.annotations)
    if rows:
        result.rows = pd.concat(rows, ignore_index=True)
    if annotations:
        result.annotations = pd.concat(annotations, ignore_index=True)
    return result


def _label_recording(
    truth: Truth, recording: str, n_segments: int, species: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the truth ``(segments, species)`` of a recording, and which segments are labelled.

    Labels beyond the end of the recording are left out, with a warning.
    """
    rows = truth.rows[truth.rows["recording"] == recording]
    indices = (rows["seconds"].to_numpy(float) / SEGMENT_SECONDS).round().astype(int) - 1
    n_beyond = int((indices >= n_segments).sum())
    if n_beyond:
        logger.warning("%s: %d labelled rows lie beyond its end; left out", recording, n_beyond)
    column_of = {code: column for column, code in enumerate(species)}
    labels = np.zeros((n_segments, len(species)), dtype=bool)
    is_labelled = np.zeros(n_segments, dtype=bool)
    for index, birds in zip(indices, rows["birds"], strict=True):
        if index < n_segments:
            is_labelled[index] = True
            labels[index, [column_of[code] for code in birds]] = True
    if not is_labelled.all():
        logger.warning(
            "%s: %d of its %d segments are not labelled and not scored",
            *(recording, int((~is_labelled).sum()), n_segments),
        )
    return labels, is_labelled


def _read_examples(folder: Path, species: Sequence[str]) -> Truth:
    rows = read_labelled_soundscapes(folder, species)
    audio = folder / CompetitionFile.EXAMPLE_AUDIO
    paths = {}
    for name in dict.fromkeys(rows["filename"]):
        path = find_audio(audio, name)
        if path is None:
            logger.warning("%s: no recording of this labelled soundscape; left out", audio / name)
        else:
            paths[name] = path
    annotations = pd.DataFrame(columns=_ANNOTATION_COLUMNS)
    if (folder / CompetitionFile.EXAMPLE_ANNOTATIONS).is_file():
        annotations = read_annotations(folder).rename(columns={"filename": "recording"})
    is_known = annotations["ebird_code"].isin(list(species))
    in_annotations = Counter(annotations.loc[~is_known, "ebird_code"])
    _log_foreign(folder / CompetitionFile.EXAMPLE_ANNOTATIONS, in_annotations)
    in_rows = Counter(label for labels in rows["foreign_labels"] for label in labels)
    return Truth(
        paths=paths,
        rows=rows.rename(columns={"filename": "recording"})[_ROW_COLUMNS],
        annotations=annotations.loc[is_known, _ANNOTATION_COLUMNS],
        annotated=[name for name in annotations["recording"].unique() if name in paths],
        foreign=in_rows | in_annotations,  # both files describe the same audio: no sum
    )


def _read_raven_folder(folder: Path, species: Sequence[str]) -> Truth:
    """Read recordings with tables beside them: each is labelled from its start to its end."""
    truth = Truth()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of labelled soundscapes")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows, annotations = [], []
    for path in [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]:
        name = path.relative_to(folder).with_suffix("").as_posix()
        tables = raven_tables_of(path)
        if not tables:
            logger.warning("%s: no Raven selection table beside it; left out", path)
            continue
        try:
            seconds = probe_audio(path).seconds
        except AudioError as error:
            logger.warning("%s; this labelled soundscape is left out", error)
            continue
        if name in truth.paths:
            raise ValueError(f"{path}: another recording in {folder} is called {name} too")
        events = _read_selections(tables, seconds, species, truth.foreign)
        labels = label_segments(events, species, count_segments(round(seconds * 1000), 1000))
        birds = [tuple(species[column] for column in np.flatnonzero(row)) for row in labels]
        ends = SEGMENT_SECONDS * np.arange(1.0, len(birds) + 1)
        truth.paths[name] = path
        rows += [(name, *row) for row in zip(ends, birds, strict=True)]
        annotations += [(name, event.onset, event.offset, event.ebird_code) for event in events]
    if not truth.paths:
        raise FileNotFoundError(
            f"{folder}: neither {CompetitionFile.EXAMPLE_LABELS} nor a recording with a Raven "
            "selection table"
        )
    truth.rows = pd.DataFrame(rows, columns=_ROW_COLUMNS)
    truth.annotations = pd.DataFrame(annotations, columns=_ANNOTATION_COLUMNS)
    truth.annotated = list(truth.paths)
    _log_foreign(folder, truth.foreign)
    return truth


def _log_foreign(source: Path, foreign: Counter[str]) -> None:
    if foreign:
        counts = ", ".join(f"{label} {count}" for label, count in foreign.most_common())
        logger.warning("%s: labels that are no class and count as no bird: %s", source, counts)


def _read_selections(
    tables: Sequence[Path], seconds: float, species: Sequence[str], foreign: Counter[str]
) -> list[Event]:
    """Return the events of known species in the tables of a recording of ``seconds``.

    A label may be a code or a name; labels of no known species are added to ``foreign``.
    """
    events = []
    for table in tables:
        for event in read_raven_table(table):
            code = event.ebird_code
            if code not in species:
                named = find_species(code)
                code = named.ebird_code if named else None
            if code not in species:
                foreign[event.ebird_code] += 1
            elif event.onset >= seconds:
                logger.warning(
                    "%s: a selection at %g s is after the end of its recording (%g s); left out",
                    *(table, event.onset, seconds),
                )
            else:
                events.append(Event(code, event.onset, min(event.offset, seconds)))
    return events
