"""Events are what the decision says of all rows, whatever pieces the recording comes in."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birdcall.config import SEGMENT_SECONDS
from birdcall.inference.decision import Decision, decide_segments
from birdcall.inference.events import EventDetector, detect_events
from birdcall.inference.predictions import Calibration, SegmentPredictions
from birdcall.inference.windows import FRAMES_PER_SEGMENT

CLASSES = ("amecro", "bkcchi", "norcar")


def scores_of(clipwise, framewise=None):
    clipwise = np.asarray(clipwise, dtype=np.float32)[None]
    framewise = clipwise if framewise is None else np.asarray(framewise, dtype=np.float32)[None]
    frames = np.repeat(framewise[0].T, FRAMES_PER_SEGMENT, axis=1)
    return SegmentPredictions(
        clipwise, framewise, frames, recording_seconds=(5.0 * clipwise.shape[1],)
    )


def test_every_decided_bird_has_an_event_in_its_segment():
    scores = scores_of([[0.9, 0.6, 0], [0.9, 0, 0], [0, 0, 0]])
    frames = scores.frames.copy()
    frames[0, :20] = 0.1  # the crow begins after two seconds
    frames[1, :FRAMES_PER_SEGMENT] = 0.3  # its members peak in different frames
    frames[1, 10] = 0.4
    events = detect_events(replace(scores, frames=frames), Decision(0.5, 0.5), CLASSES)
    assert [(e.ebird_code, e.onset, e.offset) for e in events] == [
        ("bkcchi", 1.0, 1.1),
        ("amecro", 2.0, 10.0),
    ]
    assert events[0].confidence == pytest.approx(0.4)


def test_events_are_as_long_as_calibrated_frames_say():
    scores = scores_of([[0.9, 0, 0]])
    frames = scores.frames.copy()
    frames[0, :20] = 0.3  # 0.3 is 0.5 where calibrated
    nothing = (0.0,) * 3
    calibration = Calibration((1.0,) * 3, nothing, (1.0,) * 3, (np.log(0.7 / 0.3) + 1e-3, 0, 0))
    events = [
        detect_events(replace(scores, frames=frames), Decision(calibration=one), CLASSES)
        for one in (None, calibration)
    ]
    assert [(e.onset, e.offset) for (e,) in events] == [(2.0, 5.0), (0.0, 5.0)]


def test_no_event_lasts_longer_than_its_recording():
    scores = replace(scores_of([[0.9, 0, 0], [0.9, 0, 0]]), recording_seconds=(7.33,))
    (event,) = detect_events(scores, Decision(0.5, 0.5), CLASSES)
    assert (event.onset, event.offset) == (0.0, 7.3)


def test_calls_half_a_second_apart_are_one_event_and_further_ones_two():
    scores = scores_of([[0.9, 0, 0]])
    frames = np.zeros_like(scores.frames)
    for frame in (5, 10, 20):  # 0.4 s and 0.9 s between them
        frames[0, frame] = 0.9
    events = detect_events(replace(scores, frames=frames), Decision(0.5, 0.5), CLASSES)
    assert [(e.onset, e.offset) for e in events] == [(0.5, 1.1), (2.0, 2.1)]


def test_a_recording_without_a_bird_has_no_event():
    assert detect_events(scores_of([[0.1, 0, 0]] * 4), Decision(0.5, 0.5), CLASSES) == []


DECISIONS = st.builds(
    Decision,
    clip_threshold=st.sampled_from([0.0, 0.3, 0.6]),
    frame_threshold=st.sampled_from([0.2, 0.6]),
    combination=st.sampled_from(["mean", "rms", "votes"]),
    vote_share=st.sampled_from([0.3, 0.5, 1.0]),
    recording_threshold=st.sampled_from([0.0, 0.7, 0.9]),
    neighbour_weight=st.sampled_from([0.0, 0.25, 1.0]),
    max_birds=st.sampled_from([1, 2, 5]),
)


@settings(max_examples=150, deadline=None)
@given(DECISIONS, st.integers(1, 3), st.integers(1, 40), st.integers(0, 10_000), st.data())
def test_pieces_of_any_length_give_the_events_of_the_whole(decision, n_members, n_rows, seed, data):
    """The reference decides on all rows at once, then asks each row's frames."""
    generator = np.random.default_rng(seed)
    clipwise, framewise = generator.random((2, n_members, n_rows, 6), dtype=np.float32)
    clipwise, framewise = clipwise.round(1), framewise.round(1)  # ties are common
    frames = generator.random((6, n_rows * FRAMES_PER_SEGMENT), dtype=np.float32)
    classes = tuple("abcdef")
    detector = EventDetector(decision, classes)
    row = 0
    while row < n_rows:
        end = min(n_rows, row + data.draw(st.integers(1, 9)))
        span = slice(row * FRAMES_PER_SEGMENT, end * FRAMES_PER_SEGMENT)
        detector.add(
            SegmentPredictions(clipwise[:, row:end], framewise[:, row:end], frames[:, span])
        )
        row = end
    events = detector.finish(5.0 * n_rows)

    chosen = decide_segments(clipwise, framewise, decision)
    by_row = frames.reshape(6, n_rows, FRAMES_PER_SEGMENT)
    threshold = np.minimum(by_row.max(axis=2), np.float32(decision.frame_threshold))
    expected = ((by_row >= threshold[..., None]) & chosen.T[..., None]).reshape(6, -1)
    found = np.zeros_like(expected)
    for event in events:
        first, last = (round(t * FRAMES_PER_SEGMENT / SEGMENT_SECONDS) for t in
                       (event.onset, event.offset))  # fmt: skip
        own = found[classes.index(event.ebird_code), first:last]
        assert not own.any()
        own[:] = True
    # All that is expected is in an event; what else is there lies in gaps of half a second.
    assert not (expected & ~found).any()
    for column in range(6):
        edges = np.flatnonzero(np.diff(np.pad(expected[column], 1).astype(int)))
        starts, ends = edges[::2], edges[1::2]
        for end, start in zip(ends[:-1], starts[1:], strict=True):
            assert found[column, end:start].all() == (start - end <= 5)
            assert found[column, end:start].any() == (start - end <= 5)


@pytest.mark.parametrize("gate", [0.0, 0.5, 0.99999])
def test_what_is_kept_does_not_grow_with_classes_that_have_no_chance(gate):
    """Every class passes the thresholds in every row; two birds of a row can be named."""
    generator = np.random.default_rng(0)
    n_classes, n_rows = 200, 50
    decision = Decision(0.0, 0.0, max_birds=2, recording_threshold=gate)
    detector = EventDetector(decision, [f"bird{one}" for one in range(n_classes)])
    for _ in range(n_rows):
        scores = generator.random((1, 1, n_classes), dtype=np.float32)
        frames = np.repeat(scores[0].T, FRAMES_PER_SEGMENT, axis=1)
        detector.add(SegmentPredictions(scores, scores, frames))
    n_kept = sum(len(one.row) for one in detector.candidates)
    if gate < 0.9:
        assert n_kept < 3 * n_rows
    else:  # hardly any bird passes: all may still do
        assert n_kept > 50 * n_rows


def test_an_event_must_reach_the_floor_of_its_class_as_a_name_must():
    scores = scores_of([[0.6, 0.6, 0.6]] * 2)
    decision = Decision(0.5, 0.5, floor=(0.7, 0.5, 0.55))
    named = decide_segments(scores.clipwise, scores.framewise, decision)
    assert named.tolist() == [[False, True, True]] * 2
    events = detect_events(scores, decision, CLASSES)
    assert {event.ebird_code for event in events} == set(CLASSES[1:])
