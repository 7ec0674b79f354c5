"""Write soundscape pages of labelled soundscapes: what was named beside what is true."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.inference.engine import End, Piece, hear, open_recording
from birdcall.inference.ensemble import MEMBER_FRAMES
from birdcall.inference.events import RecordingDetector
from birdcall.inference.tables import Event
from birdcall.report.soundscape import SoundscapePageWriter
from birdcall.storage.files import inside

if TYPE_CHECKING:
    from birdcall.evaluation.labelled import Labelled
    from birdcall.evaluation.scoring import Evaluation

logger = logging.getLogger(__name__)

PAGES_FOLDER = "soundscapes"
N_PAGES = 20


def labelled_table(evaluation: Evaluation) -> pd.DataFrame:
    """Return a row per labelled soundscape, the worst first.

    Columns: recording, rows, f1 (row-wise), birds (true ones, over rows), found, false.
    """
    scores = evaluation.labelled.scores
    named = scores.decide(evaluation.decision)
    truth = scores.labelled_truth
    rows = pd.DataFrame(
        {
            "recording": scores.recordings,
            "rows": 1,
            "f1": row_f1_scores(truth, named),
            "birds": truth.sum(axis=1),
            "found": (truth & named).sum(axis=1),
            "false": (named & ~truth).sum(axis=1),
        }
    )
    how = {"rows": "sum", "f1": "mean", "birds": "sum", "found": "sum", "false": "sum"}
    table = rows.groupby("recording", sort=True).agg(how).reset_index()
    return table.sort_values("f1", kind="stable").reset_index(drop=True)


def fullest(evaluation: Evaluation, recordings: Sequence[str]) -> str | None:
    """Return which of the soundscapes has most birds."""
    if not recordings:
        return None
    table = labelled_table(evaluation).set_index("recording")
    return str(table.loc[list(recordings), "birds"].idxmax())


def write_labelled_pages(
    folder: Path, evaluation: Evaluation, n_pages: int = N_PAGES
) -> dict[str, Path]:
    """Write pages of the ``n_pages`` worst soundscapes; return the first page of each.

    Members hear them again, for their outputs over time are too many to be kept.
    """
    labelled, heard = evaluation.labelled, evaluation.heard
    if labelled is None or n_pages == 0:
        return {}
    chosen = labelled_table(evaluation)["recording"].head(n_pages)
    ensemble = heard.ensemble
    sounds = {name: open_recording(labelled.paths[name]) for name in chosen}
    members = tuple(member.name for member in ensemble.members)
    page_writer = SoundscapePageWriter(
        folder=folder,
        decision=evaluation.decision,
        classes=ensemble.classes,
        members=members,
        home="../report.html",
    )
    detector = RecordingDetector(evaluation.decision, ensemble.classes)
    pages = {}
    with closing(hear(ensemble, sounds, ("frames", MEMBER_FRAMES))) as pieces:
        for name, item in pieces:
            if isinstance(item, Piece):
                page_writer.add(item)
                detector.add(item)
                continue
            if isinstance(item, End):
                path = labelled.paths[name]
                truth = true_events(labelled, name)
                decided = detector.finish(item.seconds)
                # Names of recordings need not have a suffix: that of the file tells them apart.
                page = f"{name}{path.suffix}"
                inside(folder, page)
                pages[name] = page_writer.finish(
                    page, path, seconds=item.seconds, decided=decided, labels=truth, truth=truth
                )
            else:
                logger.warning("%s; it has no page", item)
                page_writer.forget()
            detector = RecordingDetector(evaluation.decision, ensemble.classes)
    return pages


def true_events(labelled: Labelled, recording: str) -> list[Event]:
    """Return what sings in a soundscape: annotations, or rows where there are no times."""
    if recording in labelled.frames:
        own = labelled.annotations[labelled.annotations["recording"] == recording]
        return [Event(one.ebird_code, one.onset, one.offset) for one in own.itertuples()]
    scores = labelled.scores
    own = (scores.segments["recording"] == recording).to_numpy()
    ends = scores.segments["seconds"].to_numpy(float)[own]
    return [
        Event(scores.classes[column], float(ends[row] - SEGMENT_SECONDS), float(ends[row]))
        for row, column in zip(
            *np.nonzero(scores.truth[own][:, : len(scores.classes)]), strict=True
        )
    ]
