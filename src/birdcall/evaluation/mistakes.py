"""Predict again what the report shows: the worst mistakes, and the worst labelled soundscapes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from birdcall.audio.reading import AudioError, read_audio
from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.ensemble_decision import EnsembleDecision
from birdcall.evaluation.labelled import LabelledSoundscapes
from birdcall.evaluation.predict import HeldOutPredictions
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.scoring import Evaluation
from birdcall.evaluation.simulated_audio import SoundscapeRenderer
from birdcall.evaluation.simulation import SimulatedSoundscape
from birdcall.evaluation.tables import LABELLED, SIMULATED
from birdcall.inference.decision import average_members
from birdcall.inference.engine import predict_stream
from birdcall.inference.ensemble import Ensemble
from birdcall.inference.events import Event
from birdcall.inference.predictions import OutputOptions, SegmentPredictions
from birdcall.inference.windows import FRAMES_PER_SEGMENT, SINGLE_SEGMENT
from birdcall.kaggle.submission import LoadedPackage
from birdcall.prediction.local import PageObserver, PageWriter
from birdcall.prediction.package import Recording, detect_recordings

logger = logging.getLogger(__name__)

FALSE, MISSED = "predicted, not there", "there, not predicted"
_SAMPLE_RATE = 32_000  # of the waveforms of mistakes
_N_OF_A_KIND = 6  # for each kind of audio and of mistake
_N_PAGES = 20
_OUTPUTS = OutputOptions(frames=True, member_frames=True)


@dataclass(frozen=True)
class Mistake:
    """A row in which a species is predicted and not there, or there and not predicted.

    kind: `FALSE` or `MISSED`. audio: `SIMULATED` or `LABELLED`. start: of the row, seconds. score:
    of a false species its framewise probability; of a missed one its SNR (dB) where that is known,
    else its framewise probability, negated. predicted, true: all species of the row; species: all
    of both, ``ebird_code`` first.
    """

    kind: str
    audio: str
    recording: str
    start: float
    ebird_code: str
    score: float
    predicted: tuple[str, ...]
    true: tuple[str, ...]
    species: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PredictedMistake:
    """A mistake with its waveform and the frames that were predicted again for it.

    waveform: ``(samples,)`` of its row at 32 kHz, or None and the ``reason``. frames:
    ``(1 + members, species, FRAMES_PER_SEGMENT)``, the members' mean first, NaN for species that
    are no class of the members; None without a waveform. events: of the row's species, where their
    times are known.
    """

    mistake: Mistake
    waveform: np.ndarray | None = None
    reason: str = ""
    frames: np.ndarray | None = None
    members: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()


# --- which mistakes -------------------------------------------------------------------------------


def find_mistakes(
    held_out: HeldOutPredictions, ensemble: EnsembleDecision, n_of_a_kind: int = _N_OF_A_KIND
) -> list[Mistake]:
    """Return the worst rows of simulated and of labelled soundscapes, the worst first of each kind.

    Of a species in a recording only the worst row, so that the rows differ. A species that no
    member could learn does not count as missed.
    """
    learnable = held_out.learnable_by(ensemble.experiments)
    # The SNR of each simulated species in each row that contains a part of its event.
    snr_db: dict[tuple[str, int, str], float] = {}
    for event in held_out.events.itertuples():
        first, last = (int(time // SEGMENT_SECONDS) for time in (event.onset, event.offset))
        for row in range(first, last + 1):
            key = (event.recording, row, event.ebird_code)
            snr_db[key] = max(event.snr_db, snr_db.get(key, -np.inf))
    sources = []
    if ensemble.search is not None:
        predicted = ensemble.search.cross_validated
        sources.append((SIMULATED, ensemble.simulated, predicted, snr_db))
    if held_out.labelled is not None:
        predictions = held_out.labelled.predictions
        predicted = predictions.decide(ensemble.decision)
        sources.append((LABELLED, predictions, predicted, {}))
    mistakes = []
    for audio, predictions, predicted, snr_of_row in sources:
        options = {"predicted": predicted, "learnable": learnable, "snr_db": snr_of_row}
        for kind in (FALSE, MISSED):
            mistakes += _rank(kind, audio, predictions, **options)[:n_of_a_kind]
    return mistakes


def _rank(
    kind: str,
    audio: str,
    predictions: LabelledPredictions,
    *,
    predicted: np.ndarray,
    learnable: np.ndarray,
    snr_db: Mapping[tuple[str, int, str], float],
) -> list[Mistake]:
    """Return the mistakes of a kind, the worst of each species and recording, the worst first."""
    truth, classes = predictions.labelled_truth, predictions.classes
    codes = np.array(classes)
    probability = average_members(predictions.framewise)[predictions.labelled]
    segments = predictions.segments[predictions.labelled]
    recordings = segments["recording"].to_numpy()
    starts = segments["seconds"].to_numpy(float) - SEGMENT_SECONDS
    wrong = (predicted & ~truth if kind == FALSE else truth & ~predicted)[:, : len(classes)]
    if kind == MISSED:
        wrong &= learnable
    worst: dict[tuple[str, str], Mistake] = {}
    for row, column in zip(*np.nonzero(wrong), strict=True):
        code, recording = classes[column], str(recordings[row])
        score = float(probability[row, column])
        if kind == MISSED:
            score = snr_db.get((recording, int(starts[row] // SEGMENT_SECONDS), code), -score)
        if (recording, code) not in worst or score > worst[recording, code].score:
            predicted_codes, true_codes = (
                codes[cells[row, : len(classes)]].tolist() for cells in (predicted, truth)
            )
            worst[recording, code] = Mistake(
                kind=kind,
                audio=audio,
                recording=recording,
                start=float(starts[row]),
                ebird_code=code,
                score=score,
                predicted=tuple(predicted_codes),
                true=tuple(true_codes),
                species=tuple(dict.fromkeys([code, *predicted_codes, *true_codes])),
            )
    return sorted(
        worst.values(), key=lambda mistake: (-mistake.score, mistake.recording, mistake.ebird_code)
    )


# --- their audio and frames -----------------------------------------------------------------------


def predict_mistakes(
    held_out: HeldOutPredictions, mistakes: Sequence[Mistake]
) -> Iterator[PredictedMistake]:
    """Yield each mistake with its audio, predicted again by members that did not train on it."""
    ensemble_of_fold = cache(
        lambda fold: held_out.ensemble.for_members(
            [member for member in held_out.ensemble.members if member.checkpoint.fold == fold]
        )
    )
    soundscapes = {soundscape.name: soundscape for soundscape in held_out.soundscapes}
    for mistake in mistakes:
        ensemble = held_out.ensemble
        start, end = mistake.start, mistake.start + SEGMENT_SECONDS
        try:
            if mistake.audio == SIMULATED:
                soundscape = soundscapes[mistake.recording]
                ensemble = ensemble_of_fold(soundscape.fold)
                waveform, waveforms = _render_row(held_out, soundscape, ensemble, mistake)
                events = [Event(e.ebird_code, e.onset, e.offset) for e in soundscape.events]
            else:
                path = held_out.labelled.paths[mistake.recording]
                waveform, waveforms = _read_row(path, ensemble, mistake)
                events = _annotated_events(held_out.labelled, mistake.recording)
        except (AudioError, OSError) as error:
            logger.warning("%s; a mistake is shown without its audio", error)
            yield PredictedMistake(mistake, reason=str(error))
            continue
        yield PredictedMistake(
            mistake=mistake,
            waveform=waveform,
            frames=_predict_frames(ensemble, waveforms, mistake),
            members=tuple(member.name for member in ensemble.members),
            events=tuple(
                replace(event, onset=max(event.onset, start), offset=min(event.offset, end))
                for event in events
                if event.ebird_code in mistake.species
                and event.onset < end
                and event.offset > start
            ),
        )


def _render_row(
    held_out: HeldOutPredictions,
    soundscape: SimulatedSoundscape,
    ensemble: Ensemble,
    mistake: Mistake,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Return the waveform to show, and the members' inputs by sample rate."""
    renderer = SoundscapeRenderer.for_fold(held_out.data, soundscape.fold, held_out.config)
    rates = sorted({_SAMPLE_RATE, *ensemble.sample_rates})
    waveforms = renderer.render(soundscape, rates)
    end = mistake.start + SEGMENT_SECONDS
    rows = {
        rate: waveform[round(mistake.start * rate) : round(end * rate)]
        for rate, waveform in waveforms.items()
    }
    is_alone = ensemble.window_config == SINGLE_SEGMENT
    return rows[_SAMPLE_RATE], rows if is_alone else waveforms


def _read_row(
    path: Path, ensemble: Ensemble, mistake: Mistake
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Return the same as `_render_row` of a labelled soundscape; its last row may be shorter."""
    is_alone = ensemble.window_config == SINGLE_SEGMENT
    rows = {}
    for rate in {_SAMPLE_RATE, *(ensemble.sample_rates if is_alone else ())}:
        try:
            rows[rate] = read_audio(path, rate, mistake.start, float(SEGMENT_SECONDS))
        except AudioError:
            rows[rate] = read_audio(path, rate, mistake.start)
    if is_alone:
        return rows[_SAMPLE_RATE], rows
    return rows[_SAMPLE_RATE], {rate: read_audio(path, rate) for rate in ensemble.sample_rates}


def _predict_frames(
    ensemble: Ensemble, waveforms: Mapping[int, np.ndarray], mistake: Mistake
) -> np.ndarray:
    """Return ``(1 + members, species, FRAMES_PER_SEGMENT)`` of the mistake's row."""
    source = {"": lambda rates: {rate: waveforms[rate] for rate in rates}}
    stream = predict_stream(ensemble, source, _OUTPUTS)
    predictions = SegmentPredictions.concatenate(
        [item for _, item in stream if isinstance(item, SegmentPredictions)]
    )
    frames = np.concatenate([predictions.frames[None], predictions.member_frames])
    is_alone = ensemble.window_config == SINGLE_SEGMENT
    first = 0 if is_alone else round(mistake.start / SEGMENT_SECONDS)
    frames = frames[:, :, first * FRAMES_PER_SEGMENT : (first + 1) * FRAMES_PER_SEGMENT]
    column = {code: index for index, code in enumerate(ensemble.classes)}
    unknown = np.full((len(frames), frames.shape[2]), np.nan, np.float32)
    return np.stack(
        [frames[:, column[code]] if code in column else unknown for code in mistake.species],
        axis=1,
    )


def _annotated_events(labelled: LabelledSoundscapes, recording: str) -> list[Event]:
    annotations = labelled.annotations[labelled.annotations["recording"] == recording]
    return [Event(row.ebird_code, row.onset, row.offset) for row in annotations.itertuples()]


# --- labelled soundscapes -------------------------------------------------------------------------


def write_labelled_pages(
    held_out: HeldOutPredictions,
    evaluation: Evaluation,
    pages: PageWriter,
    n_pages: int = _N_PAGES,
) -> dict[str, Path]:
    """Write the worst labelled soundscapes by ``pages``; return the first page of each.

    All members predict them again: frames of each member would be too many to store.
    """
    labelled = held_out.labelled
    if labelled is None or n_pages == 0:
        return {}
    paths = {name: labelled.paths[name] for name in evaluation.soundscapes["recording"]}
    # The name of a soundscape may lack a suffix: that of its file tells pages apart.
    names = {f"{name}{path.suffix}": name for name, path in list(paths.items())[:n_pages]}
    recordings = [Recording(paths[name], page) for page, name in names.items()]
    truth = {paths[name]: _true_events(labelled, name) for name in names.values()}
    observer = PageObserver(pages, truth)
    package = LoadedPackage(held_out.ensemble, evaluation.ensemble.decision)
    for recording, result in detect_recordings(recordings, package, [observer], _OUTPUTS):
        if result.reason:
            logger.warning("%s: %s; it has no page", recording.path, result.reason)
    return {names[page]: path for page, path in observer.first_pages.items()}


def _true_events(labelled: LabelledSoundscapes, recording: str) -> list[Event]:
    """Return the events of a labelled soundscape: annotations, or rows where there are no times."""
    if recording in labelled.frames or recording in set(labelled.annotations["recording"]):
        return _annotated_events(labelled, recording)
    predictions = labelled.predictions
    is_here = (predictions.segments["recording"] == recording).to_numpy()
    ends = predictions.segments["seconds"].to_numpy(float)[is_here]
    truth = predictions.truth[is_here][:, : len(predictions.classes)]
    return [
        Event(predictions.classes[column], float(ends[row] - SEGMENT_SECONDS), float(ends[row]))
        for row, column in zip(*np.nonzero(truth), strict=True)
    ]
