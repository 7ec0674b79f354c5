"""Let every run hear the recordings of the fold that it was not trained on, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.data.dataset import TrainingData
from birdcall.evaluation.prediction_cache import PredictionCache, predict_cached
from birdcall.inference.engine import open_recording
from birdcall.inference.ensemble import Ensemble
from birdcall.storage.files import atomic_path, digest, digest_files
from birdcall.training.validation import VALIDATION_SECONDS

OUTPUTS = ("clipwise", "framewise")
KEYS = ("experiment", "fold", "path", "ebird_code", "seconds", "output")


@dataclass(frozen=True, eq=False)
class OutOfFoldPredictions:
    """What the runs of one experiment heard in the recordings that each held out.

    segments: a row per segment with ``row`` (the recording's place in the data), ``path``,
    ``ebird_code``, ``fold`` and ``seconds`` (the segment's end). clipwise, framewise:
    ``(segments, classes)``.
    """

    experiment: str
    segments: pd.DataFrame
    clipwise: np.ndarray
    framewise: np.ndarray

    def of_recordings(self, n_recordings: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the highest scores of each recording ``(recordings, classes)``, of both outputs.

        NaN for recordings that no run held out.
        """
        rows = self.segments["row"].to_numpy()
        both = []
        for scores in (self.clipwise, self.framewise):
            highest = np.full((n_recordings, scores.shape[1]), -np.inf, np.float32)
            np.maximum.at(highest, rows, scores)
            highest[np.isinf(highest).all(axis=1)] = np.nan
            both.append(highest)
        return both[0], both[1]


def predict_out_of_fold(
    ensemble: Ensemble, data: TrainingData, kept: Path | None = None, progress: bool = False
) -> dict[str, OutOfFoldPredictions]:
    """Let each member hear the first ``VALIDATION_SECONDS`` of the recordings of its fold.

    Members of one fold hear a recording together. Returns the experiments in the members' order.
    Raises AudioError for a recording that does not decode: the audit has seen that it does.
    """
    found: dict[str, list[OutOfFoldPredictions]] = {}
    for member in ensemble.members:
        found.setdefault(member.checkpoint.experiment.name, [])
    for fold in sorted({member.checkpoint.fold for member in ensemble.members}):
        members = [member for member in ensemble.members if member.checkpoint.fold == fold]
        for part in _hear_fold(
            ensemble.for_members(members), fold, data=data, kept=kept, progress=progress
        ):
            found[part.experiment].append(part)
    return {name: _join(parts) for name, parts in found.items()}


def _hear_fold(
    ensemble: Ensemble, fold: int, data: TrainingData, kept: Path | None, progress: bool
) -> list[OutOfFoldPredictions]:
    held_out = np.flatnonzero(data.recordings["fold"] == fold)
    recordings = data.recordings.iloc[held_out]
    paths = {name: data.folder / name for name in recordings["path"]}
    sounds = {name: open_recording(path, VALIDATION_SECONDS) for name, path in paths.items()}
    place = None
    if kept is not None:
        made_from = digest(f"{VALIDATION_SECONDS} {digest_files(paths.values())}")
        place = PredictionCache(kept, f"recordings-fold{fold}", made_from)
    heard = predict_cached(ensemble, sounds, place, progress)
    for scores in heard.values():
        if isinstance(scores, AudioError):
            raise scores
    lengths = [heard[name].clipwise.shape[1] for name in paths]
    segments = pd.DataFrame(
        {
            "row": np.repeat(held_out, lengths),
            "path": np.repeat(recordings["path"].to_numpy(), lengths),
            "ebird_code": np.repeat(recordings["ebird_code"].to_numpy(), lengths),
            "fold": fold,
            "seconds": SEGMENT_SECONDS * np.concatenate([np.arange(1.0, n + 1) for n in lengths]),
        }
    )
    return [
        OutOfFoldPredictions(
            member.checkpoint.experiment.name,
            segments,
            np.concatenate([heard[name].clipwise[order] for name in paths]),
            np.concatenate([heard[name].framewise[order] for name in paths]),
        )
        for order, member in enumerate(ensemble.members)
    ]


def _join(parts: Sequence[OutOfFoldPredictions]) -> OutOfFoldPredictions:
    return replace(
        parts[0],
        segments=pd.concat([part.segments for part in parts], ignore_index=True),
        clipwise=np.concatenate([part.clipwise for part in parts]),
        framewise=np.concatenate([part.framewise for part in parts]),
    )


def write_oof_parquet(
    path: Path, parts: Sequence[OutOfFoldPredictions], classes: Sequence[str]
) -> None:
    """Write every segment and class: `KEYS`, then a column of probabilities per class.

    Each segment has a row for its clipwise and one for its framewise output. Experiments are
    written one after another, so that memory holds one at a time.
    """
    schema = pa.schema(
        [
            ("experiment", pa.string()),
            ("fold", pa.int32()),
            ("path", pa.string()),
            ("ebird_code", pa.string()),
            ("seconds", pa.float32()),
            ("output", pa.string()),
            *((code, pa.float32()) for code in classes),
        ]
    )
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for part in parts:
            for output in OUTPUTS:
                keys = part.segments.assign(experiment=part.experiment, output=output)
                scores = getattr(part, output)
                columns = [
                    *(pa.array(keys[name], schema.field(name).type) for name in KEYS),
                    *(pa.array(scores[:, column]) for column in range(len(classes))),
                ]
                writer.write_table(pa.table(columns, schema=schema))
