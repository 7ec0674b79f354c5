"""Find the birds in anyone's recordings: one table of all, Raven selection tables of each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from birdcall.audio import AudioError
from birdcall.decision import Decision
from birdcall.files import write_atomically
from birdcall.inference import Ensemble, detect_events, score_recordings
from birdcall.outputs import Event, write_detections_csv, write_raven_table
from birdcall.soundscapes import AUDIO_SUFFIXES
from birdcall.taxonomy import display_name

logger = logging.getLogger(__name__)


def find_recordings(paths: Sequence[Path]) -> list[Path]:
    """Return the audio files among ``paths`` and below those that are folders, each once."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (item for item in path.rglob("*") if item.is_file())
            found += sorted(item for item in below if item.suffix.lower() in AUDIO_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such recording or folder")
    if not found:
        raise FileNotFoundError(f"{paths[0]}: no recording; known are {', '.join(AUDIO_SUFFIXES)}")
    return list(dict.fromkeys(found))


def predict_recordings(
    paths: Sequence[Path],
    ensemble: Ensemble,
    decision: Decision,
    output: Path,
    *,
    progress: bool = False,
) -> str:
    """Write ``detections.csv``, ``raven/*.selections.txt`` and ``failed.csv``; return a summary.

    A recording that does not decode is listed in ``failed.csv``; it does not stop the others.
    """
    recordings = find_recordings(paths)
    names = {code: display_name(code) for code in ensemble.classes}
    detections: dict[str, list[Event]] = {}
    failed: list[str] = []
    seconds = 0.0
    by_name = {str(path): path for path in recordings}
    heard = score_recordings(ensemble, by_name, decision.window_segments)
    for name, scores in tqdm(heard, total=len(by_name), disable=not progress, unit="recording"):
        if isinstance(scores, AudioError):
            logger.warning("%s", scores)
            failed.append(f'"{name}","{scores.reason}"')
            continue
        seconds += scores.seconds
        detections[name] = detect_events(scores, decision, ensemble.classes)
        table = output / "raven" / f"{len(detections):05d}-{by_name[name].stem}.selections.txt"
        write_raven_table(table, detections[name], names)
    write_detections_csv(output / "detections.csv", detections, names)
    write_atomically(output / "failed.csv", "\n".join(["recording,reason", *failed]) + "\n")
    n_events = sum(map(len, detections.values()))
    return (
        f"{output / 'detections.csv'}: {n_events} detections in {len(detections)} recordings of "
        f"{seconds / 60:.1f} min; {len(failed)} failed"
    )
