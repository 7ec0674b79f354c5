"""Use a staged package from Python: ``birdcall.load_package(path)``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.inference.decision import Decision, average_members
from birdcall.inference.engine import open_recording, predict_stream
from birdcall.inference.ensemble import Ensemble, default_device
from birdcall.inference.events import Event, EventDetector
from birdcall.inference.predictions import OutputOptions, SegmentPredictions
from birdcall.inference.tables import DETECTION_COLUMNS, detection_rows
from birdcall.kaggle.submission import open_package, require_all_members
from birdcall.prediction.local import find_recordings
from birdcall.taxonomy import display_name

logger = logging.getLogger(__name__)

_Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class PackagePredictions:
    """What a package predicts for recordings.

    segments: a row for each 5-second segment, indexed by ``recording``, ``onset`` and ``offset``
    (seconds); a column of probabilities for each ebird_code. events: a row for each detected event,
    with the columns of ``detections.csv``. failed: why a recording has no rows, by its path.
    """

    segments: pd.DataFrame
    events: pd.DataFrame
    failed: Mapping[str, str]


class Package:
    """Trained members and their decision, as ``birdcall package`` has staged them."""

    def __init__(self, ensemble: Ensemble, decision: Decision) -> None:
        self.ensemble, self.decision = ensemble, decision

    def __repr__(self) -> str:
        names = ", ".join(member.name for member in self.ensemble.members)
        return f"Package({len(self.classes)} classes, members: {names})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the ebird codes of the species, in the order of the columns of predictions."""
        return self.ensemble.classes

    def predict(self, paths: _Paths) -> PackagePredictions:
        """Predict recordings, folders of recordings and globs; as ``birdcall predict`` does.

        A probability is the mean over the members of the calibrated clipwise probability. A
        recording that cannot be decoded is logged and listed in ``failed``; the others are
        predicted. Raises FileNotFoundError where a path matches no recording.
        """
        calibration = self.decision.calibration

        def probabilities(predictions: SegmentPredictions) -> np.ndarray:
            clipwise, framewise = predictions.clipwise, predictions.framewise
            if calibration is not None:
                clipwise, _ = calibration.apply(clipwise, framewise)
            return average_members(clipwise)

        segments, events, failed = self._run(paths, OutputOptions(frames=True), probabilities)
        codes = {event.ebird_code for found in events.values() for event in found}
        rows = detection_rows(events, {code: display_name(code) for code in codes})
        return PackagePredictions(
            segments=_segment_table(segments, self.classes),
            events=pd.DataFrame(rows, columns=list(DETECTION_COLUMNS)),
            failed=failed,
        )

    def embed(self, paths: _Paths) -> pd.DataFrame:
        """Return the embedding of each segment: the members' features, one member after another.

        Rows are indexed as in `PackagePredictions.segments`, columns are numbered. The reasons of
        recordings that cannot be decoded are in ``attrs["failed"]``, by path.
        """
        outputs = OutputOptions(embedding=True)
        segments, _, failed = self._run(paths, outputs, lambda predictions: predictions.embedding)
        n_features = next(iter(segments.values())).shape[1] if segments else 0
        table = _segment_table(segments, range(n_features))
        table.attrs["failed"] = failed
        return table

    def _run(
        self,
        paths: _Paths,
        outputs: OutputOptions,
        values_of: Callable[[SegmentPredictions], np.ndarray],
    ) -> tuple[dict[str, np.ndarray], dict[str, list[Event]], dict[str, str]]:
        """Return values ``(segments, columns)``, events (if frames are asked for) and failures.

        Frames are not stored: memory grows only with the number of segments.
        """
        recordings = find_recordings([paths] if isinstance(paths, str | Path) else list(paths))
        sources = {str(recording.path): open_recording(recording.path) for recording in recordings}
        segments: dict[str, np.ndarray] = {}
        events: dict[str, list[Event]] = {}
        failed: dict[str, str] = {}
        parts: list[np.ndarray] = []
        detector = EventDetector(self.decision, self.classes)
        with closing(predict_stream(self.ensemble, sources, outputs)) as stream:
            for path, item in stream:
                if isinstance(item, SegmentPredictions):
                    parts.append(values_of(item))
                    if outputs.frames:
                        detector.add(item)
                    continue
                if isinstance(item, AudioError):
                    logger.warning("%s", item)
                    failed[path] = item.reason
                else:
                    segments[path] = np.concatenate(parts)
                    events[path] = detector.finish(item.seconds)
                parts, detector = [], EventDetector(self.decision, self.classes)
        return segments, events, failed


def load_package(path: str | Path, device: torch.device | str | None = None) -> Package:
    """Load the dataset folder that ``birdcall package`` wrote (``kernels/build/dataset``).

    ``device``: the default is the GPU if there is one. Raises ValueError or FileNotFoundError where
    a file is missing or is not as packaged.
    """
    ensemble, decision, refused = open_package(Path(path), device or default_device())
    require_all_members(refused)
    return Package(ensemble, decision)


def _segment_table(
    segments: Mapping[str, np.ndarray], columns: Sequence[str] | range
) -> pd.DataFrame:
    index = [
        (path, float(SEGMENT_SECONDS * number), float(SEGMENT_SECONDS * (number + 1)))
        for path, values in segments.items()
        for number in range(len(values))
    ]
    values = np.concatenate(list(segments.values())) if segments else np.empty((0, len(columns)))
    names = ["recording", "onset", "offset"]
    return pd.DataFrame(
        values, index=pd.MultiIndex.from_tuples(index, names=names), columns=list(columns)
    )
