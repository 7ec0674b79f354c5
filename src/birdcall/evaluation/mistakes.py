"""Pick the worst mistakes of an evaluation and make them heard again: picture, curves and sound."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from birdcall.audio.reading import AudioError, read_audio
from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.simulated_audio import open_noise, render
from birdcall.evaluation.tables import LABELLED, SIMULATED
from birdcall.inference.decision import combine
from birdcall.inference.engine import Piece, hear
from birdcall.inference.ensemble import MEMBER_FRAMES, Ensemble
from birdcall.inference.tables import Event
from birdcall.inference.windows import FRAMES_PER_SEGMENT, Sound
from birdcall.report.html import SAMPLE_RATE

if TYPE_CHECKING:
    from birdcall.evaluation.labelled import Labelled
    from birdcall.evaluation.predict import HeldOutPredictions
    from birdcall.evaluation.scoring import Evaluation
    from birdcall.evaluation.simulation import SimulatedSoundscape

logger = logging.getLogger(__name__)

FALSE, MISSED = "named, not there", "there, not named"
N_OF_A_KIND = 6  # for each kind of sound and of mistake


@dataclass(frozen=True)
class Mistake:
    """A row in which a species is named that is not there, or the other way round.

    score: of a false bird its framewise probability, of a missed one how sure it should be heard:
    its SNR where that is known, else how little probability it has. named, true: all of the row.
    """

    kind: str
    sound: str
    recording: str
    start: float  # of the row, seconds
    ebird_code: str
    score: float
    named: tuple[str, ...]
    true: tuple[str, ...]

    @property
    def species(self) -> tuple[str, ...]:
        """Return what it is about, the species itself first."""
        return tuple(dict.fromkeys((self.ebird_code, *self.named, *self.true)))


@dataclass(frozen=True, eq=False)
class PredictedMistake:
    """A mistake with its sound.

    waveform: ``(samples,)`` of its row, or None and ``reason``. frames: ``(1 + members, species,
    FRAMES_PER_SEGMENT)``, the mean first, NaN for species that the members do not know; None where
    nothing was heard again. events: of the row's species, where times are known.
    """

    mistake: Mistake
    waveform: np.ndarray | None
    reason: str
    frames: np.ndarray | None
    members: tuple[str, ...]
    events: tuple[Event, ...]


def find_mistakes(evaluation: Evaluation, n_of_a_kind: int = N_OF_A_KIND) -> list[Mistake]:
    """Return the worst rows of simulated and of labelled soundscapes, worst first in each kind.

    Of a species in a recording the worst row only: a page of the same bird teaches nothing.
    """
    found = []
    ensemble_decision = evaluation.ensemble_decision
    if ensemble_decision.choice is not None:
        found += _worst(
            SIMULATED,
            ensemble_decision.simulated,
            named=ensemble_decision.choice.nested,
            n_of_a_kind=n_of_a_kind,
            levels=_levels(evaluation),
        )
    if evaluation.labelled is not None:
        scores = evaluation.labelled.scores
        found += _worst(
            LABELLED,
            scores,
            named=scores.decide(evaluation.decision),
            n_of_a_kind=n_of_a_kind,
            levels={},
        )
    return found


def _levels(evaluation: Evaluation) -> dict[tuple[str, int, str], float]:
    """Return the SNR of each simulated bird in each row that it begins or goes on in."""
    levels: dict[tuple[str, int, str], float] = {}
    for one in evaluation.heard.events.itertuples():
        for row in range(int(one.onset // SEGMENT_SECONDS), int(one.offset // SEGMENT_SECONDS) + 1):
            key = (one.recording, row, one.ebird_code)
            levels[key] = max(one.snr_db, levels.get(key, -np.inf))
    return levels


def _worst(
    sound: str,
    scores: LabelledPredictions,
    named: np.ndarray,
    n_of_a_kind: int,
    levels: dict[tuple[str, int, str], float],
) -> list[Mistake]:
    truth, classes = scores.labelled_truth, scores.classes
    probability = combine(scores.framewise)[scores.labelled]
    segments = scores.segments[scores.labelled]
    recordings = segments["recording"].to_numpy()
    starts = segments["seconds"].to_numpy(float) - SEGMENT_SECONDS
    found = []
    for kind, wrong in ((FALSE, named & ~truth), (MISSED, truth & ~named)):
        worst: dict[tuple[str, str], Mistake] = {}
        for row, column in zip(*np.nonzero(wrong[:, : len(classes)]), strict=True):
            code, recording = classes[column], str(recordings[row])
            score = float(probability[row, column])
            if kind == MISSED:
                at = (recording, int(starts[row] // SEGMENT_SECONDS), code)
                score = levels.get(at, -score)
            old = worst.get((recording, code))
            if old is None or score > old.score:
                worst[recording, code] = Mistake(
                    kind=kind,
                    sound=sound,
                    recording=recording,
                    start=float(starts[row]),
                    ebird_code=code,
                    score=score,
                    named=_codes(named[row], classes),
                    true=_codes(truth[row], classes),
                )
        ranked = sorted(worst.values(), key=lambda one: (-one.score, one.recording, one.ebird_code))
        found += ranked[:n_of_a_kind]
    return found


def _codes(chosen: np.ndarray, classes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(classes[column] for column in np.flatnonzero(chosen[: len(classes)]))


def predict_mistakes(
    evaluation: Evaluation, found: Sequence[Mistake]
) -> Iterator[PredictedMistake]:
    """Make the sound of each mistake; members that did not train on it hear it again."""
    heard = evaluation.heard
    of_fold = cache(
        lambda fold: heard.ensemble.for_members(
            [one for one in heard.ensemble.members if one.checkpoint.fold == fold]
        )
    )
    simulated = {one.name: one for one in heard.soundscapes}
    for mistake in found:
        ensemble = heard.ensemble
        try:
            if mistake.sound == SIMULATED:
                soundscape = simulated[mistake.recording]
                ensemble = of_fold(soundscape.fold)
                row = _render_row(soundscape, heard, ensemble, mistake.start)
            else:
                row = _read_labelled_row(evaluation.labelled, ensemble, mistake)
        except (AudioError, OSError) as error:
            logger.warning("%s; a mistake is shown without its sound", error)
            yield PredictedMistake(
                mistake=mistake,
                waveform=None,
                reason=str(error),
                frames=None,
                members=(),
                events=(),
            )
            continue
        frames = _hear_again(ensemble, row.sound, mistake, evaluation.classes)
        members = tuple(member.name for member in ensemble.members)
        events = tuple(_cut_events(row.events, mistake))
        yield PredictedMistake(
            mistake=mistake,
            waveform=row.waveform,
            reason="",
            frames=frames,
            members=members,
            events=events,
        )


class _Row(NamedTuple):
    """The sound of a row, to be played and to be heard again, and the events of its soundscape."""

    waveform: np.ndarray
    sound: Sound
    events: list[Event]


def _render_row(
    soundscape: SimulatedSoundscape, heard: HeldOutPredictions, ensemble: Ensemble, start: float
) -> _Row:
    noise = open_noise(heard.data, soundscape.fold, heard.config.sample_rate)
    rates = sorted({SAMPLE_RATE, *ensemble.sample_rates})
    rendered = render(soundscape, heard.data, noise=noise, config=heard.config, sample_rates=rates)
    row = slice(round(start * SAMPLE_RATE), round((start + SEGMENT_SECONDS) * SAMPLE_RATE))
    events = [Event(one.ebird_code, one.onset, one.offset) for one in soundscape.events]
    return _Row(rendered[SAMPLE_RATE][row], _of_row(rendered, start, ensemble), events)


def _read_labelled_row(labelled: Labelled, ensemble: Ensemble, mistake: Mistake) -> _Row:
    path = labelled.paths[mistake.recording]
    own = labelled.annotations[labelled.annotations["recording"] == mistake.recording]
    events = [Event(one.ebird_code, one.onset, one.offset) for one in own.itertuples()]
    waveform = _read_row(path, mistake.start, SAMPLE_RATE)
    return _Row(waveform, _read_sound(path, mistake.start, ensemble), events)


def _cut_events(events: Sequence[Event], mistake: Mistake) -> Iterator[Event]:
    """Yield what of the mistake's species lies in its row."""
    start, end = mistake.start, mistake.start + SEGMENT_SECONDS
    for one in events:
        if one.ebird_code in mistake.species and one.onset < end and one.offset > start:
            yield replace(one, onset=max(one.onset, start), offset=min(one.offset, end))


def _of_row(rendered: dict[int, np.ndarray], start: float, ensemble: Ensemble) -> Sound:
    """Return the row alone where it is heard alone, else the whole soundscape."""
    if ensemble.listening.is_single_segment:
        rendered = {
            rate: one[round(start * rate) : round((start + SEGMENT_SECONDS) * rate)]
            for rate, one in rendered.items()
        }
    return lambda rates: {rate: rendered[rate] for rate in rates}


def _read_row(path: Path, start: float, rate: int) -> np.ndarray:
    """Read a row of a recording, the last of which may be shorter."""
    try:
        return read_audio(path, rate, start, float(SEGMENT_SECONDS))
    except AudioError:
        return read_audio(path, rate, start)


def _read_sound(path: Path, start: float, ensemble: Ensemble) -> Sound:
    rates = ensemble.sample_rates
    if ensemble.listening.is_single_segment:
        waveforms = {rate: _read_row(path, start, rate) for rate in rates}
    else:
        waveforms = {rate: read_audio(path, rate) for rate in rates}
    return lambda options: {rate: waveforms[rate] for rate in options}


def _hear_again(
    ensemble: Ensemble, sound: Sound, mistake: Mistake, classes: Sequence[str]
) -> np.ndarray:
    """Return ``(1 + members, species, FRAMES_PER_SEGMENT)`` of the mistake's row."""
    pieces = [
        item for _, item in hear(ensemble, {"": sound}, ("frames", MEMBER_FRAMES))
        if isinstance(item, Piece)
    ]  # fmt: skip
    frames = np.concatenate(
        [np.concatenate([piece.frames[None], piece.member_frames]) for piece in pieces], axis=2
    )
    first = 0 if ensemble.listening.is_single_segment else round(mistake.start / SEGMENT_SECONDS)
    own = frames[:, :, first * FRAMES_PER_SEGMENT : (first + 1) * FRAMES_PER_SEGMENT]
    column = {code: place for place, code in enumerate(classes)}
    nothing = np.full((len(own), own.shape[2]), np.nan, np.float32)
    return np.stack(
        [own[:, column[code]] if code in column else nothing for code in mistake.species], axis=1
    )
