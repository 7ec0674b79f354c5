"""Read soundscapes that people have labelled, and let members hear them.

Two layouts are known: the competition's example files (a row for every 5 seconds, and annotations
with times), and recordings with Raven selection tables beside them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError, probe_audio
from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.prediction_cache import (
    PredictionCache,
    predict_cached,
    predict_frames_cached,
)
from birdcall.evaluation.predictions import (
    LabelledPredictions,
    segment_table,
    truth_from_intervals,
)
from birdcall.inference.engine import open_recording
from birdcall.inference.ensemble import Ensemble
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.tables import read_raven_table
from birdcall.inference.windows import count_segments
from birdcall.kaggle.test_set import (
    AUDIO_SUFFIXES,
    EXAMPLE_ANNOTATIONS,
    EXAMPLE_LABELS,
    example_audio_folder,
    find_audio,
    raven_tables_of,
    read_annotations,
    read_labelled_soundscapes,
)
from birdcall.storage.files import digest_files
from birdcall.taxonomy import find_species

logger = logging.getLogger(__name__)

ANNOTATION_COLUMNS = ["recording", "onset", "offset", "ebird_code"]


@dataclass
class Truth:
    """What is known of labelled soundscapes.

    paths: of each recording. rows: ``recording``, ``seconds`` (the segment's end), ``birds`` (known
    codes, none for nocall). annotations: `ANNOTATION_COLUMNS`. timed: the recordings of which they
    tell all, though it be nothing. foreign: labels that are no known species, and how often; they
    count as no bird.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    rows: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["recording", "seconds", "birds"])
    )
    annotations: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=ANNOTATION_COLUMNS)
    )
    timed: list[str] = field(default_factory=list)
    foreign: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labelled soundscapes as an ensemble heard them.

    scores: each recording is a group of its own. frames: of the timed recordings, with all of
    `SegmentPredictions`. annotations, foreign, paths: see `Truth`.
    """

    scores: LabelledPredictions
    annotations: pd.DataFrame
    frames: Mapping[str, SegmentPredictions]
    foreign: Counter[str]
    paths: Mapping[str, Path]


def predict_labelled(
    ensemble: Ensemble,
    folders: Sequence[Path],
    known: Sequence[str],
    kept: Path | None = None,
    progress: bool = False,
) -> Labelled | None:
    """Let the members hear the labelled soundscapes in ``folders``; None if there are none.

    known: species of the truth, beginning with the classes. A soundscape whose recording is missing
    or does not decode is left out and named in the log, and so are labels beyond the end of their
    recording. Segments of a recording that nobody has labelled are heard and not scored.
    """
    truth = read_truth(folders, known)
    if not truth.paths:
        return None
    sounds = {name: open_recording(path) for name, path in truth.paths.items()}
    place = None
    if kept is not None:
        place = PredictionCache(kept, "labelled", digest_files(truth.paths.values()))
    heard = {}
    for name, scores in predict_cached(ensemble, sounds, place, progress).items():
        if isinstance(scores, AudioError):
            logger.warning("%s; this labelled soundscape is left out", scores)
        else:
            heard[name] = scores
    if not heard:
        return None
    annotations = truth.annotations[truth.annotations["recording"].isin(list(heard))]
    timed = {name: sounds[name] for name in truth.timed if name in heard}
    frames = predict_frames_cached(ensemble, timed, place) if timed else {}
    return Labelled(
        scores=_gather(truth.rows, heard, known, ensemble),
        annotations=annotations.reset_index(drop=True),
        frames={name: replace(heard[name], frames=one) for name, one in frames.items()},
        foreign=truth.foreign,
        paths=truth.paths,
    )


def read_truth(folders: Sequence[Path], known: Sequence[str]) -> Truth:
    """Read all labelled soundscapes in ``folders``.

    Raises FileNotFoundError for a folder without any, ValueError naming file and line for rows and
    selections that cannot be meant so, or for a recording that two folders have.
    """
    parts = []
    for folder in folders:
        if (folder / EXAMPLE_LABELS).is_file():
            parts.append(_read_examples(folder, known))
        else:
            parts.append(_read_raven_folder(folder, known))
    together = Truth()
    for folder, part in zip(folders, parts, strict=True):
        for name in part.paths:
            if name in together.paths:
                raise ValueError(f"{folder}: {name} is in another folder of soundscapes too")
        together.paths |= part.paths
        together.timed += part.timed
        together.foreign += part.foreign
    if parts:
        together.rows = pd.concat([part.rows for part in parts], ignore_index=True)
        annotations = [part.annotations for part in parts if len(part.annotations)]
        if annotations:
            together.annotations = pd.concat(annotations, ignore_index=True)
    return together


def _read_examples(folder: Path, known: Sequence[str]) -> Truth:
    rows = read_labelled_soundscapes(folder, known)
    audio = example_audio_folder(folder)
    paths = {name: find_audio(audio, name) for name in dict.fromkeys(rows["filename"])}
    for name in [name for name, path in paths.items() if path is None]:
        logger.warning("%s: no recording of this labelled soundscape; left out", audio / name)
    annotations = pd.DataFrame(columns=ANNOTATION_COLUMNS)
    if (folder / EXAMPLE_ANNOTATIONS).is_file():
        annotations = read_annotations(folder).rename(columns={"filename": "recording"})
    timed = [name for name in annotations["recording"].unique() if paths.get(name) is not None]
    is_known = annotations["ebird_code"].isin(list(known))
    in_annotations = Counter(annotations.loc[~is_known, "ebird_code"])
    _log_foreign(folder / EXAMPLE_ANNOTATIONS, in_annotations)
    in_rows = Counter(label for labels in rows["foreign_labels"] for label in labels)
    return Truth(
        paths={name: path for name, path in paths.items() if path is not None},
        rows=rows.rename(columns={"filename": "recording"})[["recording", "seconds", "birds"]],
        annotations=annotations.loc[is_known, ANNOTATION_COLUMNS],
        timed=timed,
        foreign=in_rows | in_annotations,  # both files tell of the same sounds: no sum
    )


def _read_raven_folder(folder: Path, known: Sequence[str]) -> Truth:
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
        selections = _read_selections(tables, seconds, known, truth.foreign)
        truth.paths[name] = path
        n_segments = count_segments(round(seconds * 1000), 1000)
        rows.append(_rows_of(name, n_segments, selections, known))
        annotations.append(selections.assign(recording=name)[ANNOTATION_COLUMNS])
    if not truth.paths:
        raise FileNotFoundError(
            f"{folder}: neither {EXAMPLE_LABELS} nor a recording with a Raven selection table"
        )
    truth.rows = pd.concat(rows, ignore_index=True)
    truth.annotations = pd.concat(annotations, ignore_index=True)
    truth.timed = list(truth.paths)
    _log_foreign(folder, truth.foreign)
    return truth


def _log_foreign(place: Path, foreign: Counter[str]) -> None:
    if foreign:
        named = ", ".join(f"{label} {count}" for label, count in foreign.most_common())
        logger.warning("%s: labels that are no class and count as no bird: %s", place, named)


def _read_selections(
    tables: Sequence[Path], seconds: float, known: Sequence[str], foreign: Counter[str]
) -> pd.DataFrame:
    """Return the known birds of a recording's tables: onset, offset, ebird_code."""
    found = []
    for table in tables:
        for event in read_raven_table(table):
            code = _code_of(event.ebird_code, known)
            if code is None:
                foreign[event.ebird_code] += 1
            elif event.onset >= seconds:
                logger.warning(
                    "%s: a selection at %g s is after the end of its recording (%g s); left out",
                    *(table, event.onset, seconds),
                )
            else:
                found.append((event.onset, min(event.offset, seconds), code))
    return pd.DataFrame(found, columns=["onset", "offset", "ebird_code"])


def _code_of(label: str, known: Sequence[str]) -> str | None:
    """Return the species of a label, which may be a code or a name; None if it is not known."""
    if label in known:
        return label
    species = find_species(label)
    return species.ebird_code if species and species.ebird_code in known else None


def _rows_of(
    name: str, n_segments: int, selections: pd.DataFrame, known: Sequence[str]
) -> pd.DataFrame:
    columns = [known.index(code) for code in selections["ebird_code"]]
    intervals = selections[["onset", "offset"]].to_numpy(float)
    truth = truth_from_intervals(intervals, columns, (n_segments, len(known)))
    birds = [tuple(known[column] for column in np.flatnonzero(row)) for row in truth]
    return pd.DataFrame(
        {
            "recording": name,
            "seconds": SEGMENT_SECONDS * np.arange(1.0, n_segments + 1),
            "birds": pd.Series(birds, dtype=object),
        }
    )


def _gather(
    rows: pd.DataFrame,
    heard: Mapping[str, SegmentPredictions],
    known: Sequence[str],
    ensemble: Ensemble,
) -> LabelledPredictions:
    """Lay what was heard and what is known side by side."""
    parts, truths = [], []
    column = {code: place for place, code in enumerate(known)}
    for name, scores in heard.items():
        n_segments = scores.clipwise.shape[1]
        own = rows[rows["recording"] == name]
        places = (own["seconds"].to_numpy(float) / SEGMENT_SECONDS).round().astype(int) - 1
        beyond = int((places >= n_segments).sum())
        if beyond:
            logger.warning("%s: %d labelled rows lie beyond its end; left out", name, beyond)
        truth = np.zeros((n_segments, len(known)), dtype=bool)
        is_labelled = np.zeros(n_segments, dtype=bool)
        for place, birds in zip(places, own["birds"], strict=True):
            if place < n_segments:
                is_labelled[place] = True
                truth[place, [column[code] for code in birds]] = True
        if not is_labelled.all():
            logger.warning(
                "%s: %d of its %d segments are not labelled and not scored",
                *(name, int((~is_labelled).sum()), n_segments),
            )
        truths.append(truth)
        parts.append(segment_table(name, n_segments, is_labelled=is_labelled, group=name))
    names = list(heard)
    return LabelledPredictions(
        segments=pd.concat(parts, ignore_index=True),
        truth=np.concatenate(truths),
        clipwise=np.concatenate([heard[name].clipwise for name in names], axis=1),
        framewise=np.concatenate([heard[name].framewise for name in names], axis=1),
        member_names=tuple(member.name for member in ensemble.members),
        classes=ensemble.classes,
    )
