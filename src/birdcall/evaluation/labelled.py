"""Read soundscapes that people have labelled, and predict them.

These are the competition's example files (a row for every 5 seconds, and annotations with times),
and what `data.annotations` reads: published collections, Raven, Audacity and CSV tables.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.data.annotations import PUBLISHED, read_annotated_soundscapes
from birdcall.data.audit import measure_recording
from birdcall.data.targets import describe_counts, label_segments
from birdcall.evaluation.predictions import LabelledPredictions, PredictionCache
from birdcall.inference.engine import open_recording
from birdcall.inference.ensemble import Ensemble
from birdcall.inference.predictions import SegmentPredictions
from birdcall.kaggle.test_set import (
    CompetitionFile,
    find_audio,
    list_audio,
    read_annotations,
    read_labelled_soundscapes,
)
from birdcall.storage.files import digest_files, shorten_list, unique_names, utf8_text
from birdcall.taxonomy import UNKNOWN_BIRD, known_species, match_code

logger = logging.getLogger(__name__)

_ROW_COLUMNS = ["recording", "seconds", "birds"]
_ANNOTATION_COLUMNS = ["recording", "onset", "offset", "ebird_code"]


@dataclass
class Truth:
    """The labels of soundscapes.

    paths: the file of each recording. rows: ``recording``, ``seconds`` (the segment's end),
    ``birds`` (known codes, none for nocall). annotations: ``recording``, ``onset``, ``offset``,
    ``ebird_code``. annotated: the recordings whose annotations are complete, perhaps without any.
    foreign: counts of the labels that are no known species; they count as no bird. n_unknown: the
    number of segments that are not scored, since they have a bird that nobody could name.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    rows: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=_ROW_COLUMNS))
    annotations: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=_ANNOTATION_COLUMNS)
    )
    annotated: list[str] = field(default_factory=list)
    foreign: Counter[str] = field(default_factory=Counter)
    n_unknown: int = 0


@dataclass(frozen=True, eq=False)
class LabelledSoundscapes:
    """Labelled soundscapes with the predictions of all members.

    predictions: each recording is a group. frames: `SegmentPredictions` with ``frames``
    of the recordings whose annotations are complete. The other fields: see `Truth`.
    """

    predictions: LabelledPredictions
    annotations: pd.DataFrame
    frames: Mapping[str, SegmentPredictions]
    foreign: Counter[str]
    paths: Mapping[str, Path]
    n_unknown: int = 0


def predict_labelled(
    ensemble: Ensemble,
    folders: Sequence[Path],
    label_column: str | None = None,
    *,
    cache_folder: Path | None = None,
    progress: bool = False,
) -> LabelledSoundscapes | None:
    """Predict the labelled soundscapes in ``folders`` (see `read_truth`); None if there are none.

    A soundscape whose recording is missing or does not decode is left out with a warning. Segments
    that nobody has labelled are predicted and not scored. ValueError where a member was trained on
    the labels of one.
    """
    if not folders:
        return None
    species = known_species(ensemble.classes)
    truth = read_truth(folders, species, label_column)
    if not truth.paths:
        return None
    _refuse_trained_on(ensemble, truth.paths)
    sources = {name: open_recording(path) for name, path in truth.paths.items()}
    cache = PredictionCache(cache_folder, "labelled", digest_files(truth.paths.values()))
    predictions: dict[str, SegmentPredictions] = {}
    rows_of = dict(iter(truth.rows.groupby("recording", sort=False)))
    tables, labels = [], []
    for name, item in cache.predict(ensemble, sources, progress=progress).items():
        if isinstance(item, AudioError):
            logger.warning("%s; this labelled soundscape is left out", item)
            continue
        predictions[name] = item
        truth_of_segments, is_labelled = _label_recording(rows_of[name], item.n_segments, species)
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
        n_unknown=truth.n_unknown,
    )


def _refuse_trained_on(ensemble: Ensemble, paths: Mapping[str, Path]) -> None:
    """Raise ValueError where a member was trained on the labels of a soundscape to score."""
    trained_on: dict[str, str] = {}
    for member in ensemble.members:
        hashes = member.checkpoint.trained_on.get("annotated") or ()
        trained_on |= dict.fromkeys(hashes, member.name)
    for path in paths.values() if trained_on else ():
        audio_hash = measure_recording(path.parent, path.name, None).audio_hash
        if audio_hash in trained_on:
            raise ValueError(
                f"{path}: {trained_on[audio_hash]} was trained on the labels of this soundscape; "
                "it cannot be scored on it"
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


def read_truth(
    folders: Sequence[Path], species: Sequence[str], label_column: str | None = None
) -> Truth:
    """Read all labelled soundscapes in ``folders``; ``species`` are the known codes.

    A recording is named by its path in its folder without suffix; where two have one name, the
    second gets a number. A file that is in two folders counts once. ``label_column``: of
    tables, see `read_raven_table`. Raises FileNotFoundError for a folder without any, and
    ValueError for impossible rows and selections, naming file and line.
    """
    truths = [
        _read_examples(folder, species)
        if (folder / CompetitionFile.EXAMPLE_LABELS).is_file()
        else _read_annotated(folder, species, label_column)
        for folder in {path.resolve(): path for path in folders}.values()
    ]
    first: dict[Path, tuple[int, str]] = {}  # number of the folder and name, by real path
    for number, truth in enumerate(truths):
        for name, path in truth.paths.items():
            first.setdefault(path.resolve(), (number, name))
    unique = unique_names([name for _, name in first.values()])
    name_of = dict(zip(first.values(), unique, strict=True))
    result = Truth()
    rows: list[pd.DataFrame] = []
    annotations: list[pd.DataFrame] = []
    for number, truth in enumerate(truths):
        names = {name: name_of[number, name] for name in truth.paths if (number, name) in name_of}
        result.paths |= {new: truth.paths[name] for name, new in names.items()}
        result.annotated += [names[name] for name in truth.annotated if name in names]
        result.foreign += truth.foreign
        result.n_unknown += truth.n_unknown
        for parts, table in ((rows, truth.rows), (annotations, truth.annotations)):
            renamed = table.assign(recording=table["recording"].map(names))
            parts.append(renamed[renamed["recording"].notna()])
    for name, parts in (("rows", rows), ("annotations", annotations)):
        if parts := [part for part in parts if len(part)]:
            setattr(result, name, pd.concat(parts, ignore_index=True))
    return result


def _label_recording(
    rows: pd.DataFrame, n_segments: int, species: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the truth ``(segments, species)`` of a recording, and which segments are labelled.

    rows: of `Truth`. Labels beyond the end of the recording are left out, with a warning.
    """
    recording = rows["recording"].iloc[0]
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
    if others := [name for name in PUBLISHED if (folder / name).is_file()]:
        message = "%s: the competition's examples are read, not %s: give it in a folder of its own"
        logger.warning(message, folder, shorten_list(others))
    rows = read_labelled_soundscapes(folder, species)
    audio = folder / CompetitionFile.EXAMPLE_AUDIO
    paths = {}
    listed = list_audio(audio)
    for name in dict.fromkeys(rows["filename"]):
        path = find_audio(audio, name, listed)
        if path is None:
            logger.warning("%s: no recording of this labelled soundscape; left out", audio / name)
        else:
            paths[name] = path
    annotations = pd.DataFrame(columns=_ANNOTATION_COLUMNS)
    if (folder / CompetitionFile.EXAMPLE_ANNOTATIONS).is_file():
        annotations = read_annotations(folder).rename(columns={"filename": "recording"})
    codes = annotations["ebird_code"].map(lambda label: match_code(label, species))
    is_known = codes.notna()
    in_annotations = Counter(annotations.loc[~is_known, "ebird_code"])
    annotations["ebird_code"] = codes
    if in_annotations:
        message = "%s: labels that are no class and count as no bird: %s"
        source = folder / CompetitionFile.EXAMPLE_ANNOTATIONS
        logger.warning(message, source, describe_counts(in_annotations))
    in_rows = Counter(label for labels in rows["foreign_labels"] for label in labels)
    return Truth(
        paths=paths,
        rows=rows.rename(columns={"filename": "recording"})[_ROW_COLUMNS],
        annotations=annotations.loc[is_known, _ANNOTATION_COLUMNS],
        annotated=[name for name in annotations["recording"].unique() if name in paths],
        foreign=in_rows | in_annotations,  # both files describe the same audio: no sum
    )


def _read_annotated(folder: Path, species: Sequence[str], label_column: str | None) -> Truth:
    """Read recordings that tables label.

    A segment with a bird that nobody could name may have any species. It has no row, so that it is
    scored for none; and the annotations of its recording are not complete.
    """
    truth = Truth()
    soundscapes = read_annotated_soundscapes(folder, species, label_column)
    paths = [item.path.relative_to(folder).with_suffix("").as_posix() for item in soundscapes]
    rows, annotations = [], []
    for name, item in zip(unique_names(list(map(utf8_text, paths))), soundscapes, strict=True):
        columns = [*species, UNKNOWN_BIRD]
        present = label_segments(item.events.itertuples(), columns, len(item.labelled))
        is_unknown = present[:, -1] & item.labelled
        truth.foreign += item.foreign
        truth.n_unknown += int(is_unknown.sum())
        scored = np.flatnonzero(item.labelled & ~is_unknown)
        if not len(scored):
            logger.warning("%s: no segment has known labels; it is left out", item.path)
            continue
        truth.paths[name] = item.path
        birds = (tuple(species[column] for column in np.flatnonzero(present[n])) for n in scored)
        rows += zip(repeat(name), SEGMENT_SECONDS * (scored + 1.0), birds, strict=False)
        if item.has_times:
            known = item.events[item.events["ebird_code"] != UNKNOWN_BIRD]
            annotations.append(known.assign(recording=name)[_ANNOTATION_COLUMNS])
            truth.annotated += [name] * (not is_unknown.any())
    if not truth.paths:
        raise FileNotFoundError(f"{folder}: no labelled soundscape can be read")
    truth.rows = pd.DataFrame(rows, columns=_ROW_COLUMNS)
    if annotations:
        truth.annotations = pd.concat(annotations, ignore_index=True)
    if truth.n_unknown:
        message = "%s: %d segments have a bird that nobody could name (%s) and are not scored"
        logger.warning(message, folder, truth.n_unknown, UNKNOWN_BIRD)
    return truth
