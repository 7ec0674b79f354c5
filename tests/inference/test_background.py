"""A site that raises a class in all rows does not name it; what stands out above that does."""

import numpy as np
import pytest
from scipy.special import expit, logit

from birdcall.config import SEGMENT_SECONDS
from birdcall.inference.background import BLOCK_SEGMENTS, Background, BackgroundAligner
from birdcall.inference.decision import Decision, decide_segments, read_decision, write_decision
from birdcall.inference.events import EventDetector
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import FRAMES_PER_SEGMENT

LEVEL = Background(clip=(-4.0, -4.0), frame=(-3.0, -3.0))


def soundscape(n_rows, levels=(-4.0, -4.0), n_members=2, seed=0):
    """Logits around the level of each class; the first class calls in one row of ten."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(levels, 0.5, (n_members, n_rows, 2))
    logits[:, ::10, 0] += 5
    return expit(logits).astype(np.float32)


def test_logits_are_shifted_by_the_lower_quartile_and_short_recordings_by_less():
    """By hand: five rows have the quartile -2, which counts 5 / (5 + 12)."""
    logits = np.array([-3.0, -2.0, -1.0, 0.0, 1.0])
    probabilities = expit(np.stack([logits, logits], axis=1))[None]
    clip, frame = LEVEL.apply(probabilities, probabilities, [0])
    assert logit(clip[0, :, 0]) == pytest.approx(logits - 5 / 17 * (-2 + 4))
    assert logit(frame[0, :, 1]) == pytest.approx(logits - 5 / 17 * (-2 + 3))
    long = np.tile(probabilities, (1, 24, 1))
    clip, _ = LEVEL.apply(long, long, [0])
    assert logit(clip[0, :5, 0]) == pytest.approx(logits - 120 / 132 * (-2 + 4))


def test_recordings_and_blocks_of_ten_minutes_and_members_have_their_own_background():
    night, day = soundscape(BLOCK_SEGMENTS, (-4, -4)), soundscape(BLOCK_SEGMENTS, (-1, -6))
    short = soundscape(30, (-2, -2))
    whole = np.concatenate([night, day, short], axis=1)
    together, _ = LEVEL.apply(whole, whole, [0, 2 * BLOCK_SEGMENTS])
    apart = [LEVEL.apply(part, part, [0])[0] for part in (night, day, short)]
    assert np.array_equal(together, np.concatenate(apart, axis=1))
    first, _ = LEVEL.apply(whole[:1], whole[:1], [0, 2 * BLOCK_SEGMENTS])
    assert np.array_equal(first, together[:1])
    assert together.dtype == np.float32


def test_recordings_at_the_level_of_the_background_stay():
    probabilities = soundscape(240)
    own = Background.of(probabilities, probabilities, [0, 120])
    aligned, _ = own.apply(probabilities, probabilities, [0, 120])
    assert np.abs(logit(aligned) - logit(probabilities)).max() < 0.3
    assert own.clip == pytest.approx((-4.3, -4.3), abs=0.15)


def test_a_class_that_a_site_raises_in_all_rows_is_named_where_it_stands_out_only():
    raised = soundscape(120, (0.5, 0.5))
    without, aligned = Decision(0.5, 0.5), Decision(0.5, 0.5, background=LEVEL)
    assert decide_segments(raised, raised, without).mean() > 0.5
    named = decide_segments(raised, raised, aligned)
    assert named[:, 0].tolist() == [row % 10 == 0 for row in range(120)]
    assert not named[:, 1].any()


def test_parts_of_a_long_recording_give_the_events_of_the_whole():
    clipwise = np.concatenate([soundscape(130, (0.5, -5)), soundscape(140, (-5, 0.5))], axis=1)
    decision = Decision(0.4, 0.4, neighbour_weight=0.25, background=LEVEL)
    frames = np.repeat(clipwise.mean(axis=0).T, FRAMES_PER_SEGMENT, axis=1)
    detector = EventDetector(decision, ("amecro", "norcar"))
    for first in range(0, 270, 37):
        span = slice(first * FRAMES_PER_SEGMENT, (first + 37) * FRAMES_PER_SEGMENT)
        part = clipwise[:, first : first + 37]
        detector.add(SegmentPredictions(part, part, frames[:, span]))
    named = np.zeros((270, 2), bool)
    for event in detector.finish(270.0 * SEGMENT_SECONDS):
        rows = slice(round(event.onset // SEGMENT_SECONDS), round(event.offset / SEGMENT_SECONDS))
        named[rows, ("amecro", "norcar").index(event.ebird_code)] = True
    expected = decide_segments(clipwise, clipwise, decision)
    assert 20 < expected.sum() < 100
    assert np.array_equal(named, expected)


def test_frames_are_aligned_as_segments_are_whatever_parts_they_come_in():
    clipwise = soundscape(200, (-1, -4))
    member_frames = np.repeat(clipwise.swapaxes(1, 2), FRAMES_PER_SEGMENT, axis=2)
    frames = member_frames.mean(axis=0)
    aligner, parts = BackgroundAligner(LEVEL), []
    for first in range(0, 200, 33):
        span = slice(first * FRAMES_PER_SEGMENT, (first + 33) * FRAMES_PER_SEGMENT)
        part = clipwise[:, first : first + 33]
        given = SegmentPredictions(part, part, frames[:, span], member_frames[:, :, span])
        parts += aligner.add(given)
    parts += aligner.finish()
    assert [part.n_segments for part in parts] == [120, 80]
    clip, frame = LEVEL.apply(clipwise, clipwise, [0])
    whole = SegmentPredictions.concatenate(parts)
    assert np.array_equal(whole.clipwise, clip) and np.array_equal(whole.framewise, frame)
    of_segments = whole.member_frames.reshape(2, 2, 200, FRAMES_PER_SEGMENT)
    np.testing.assert_allclose(of_segments.max(axis=3).swapaxes(1, 2), frame, rtol=1e-4)
    assert whole.frames.shape == frames.shape
    assert BackgroundAligner(None).add(given) == [given]


def test_a_decision_keeps_its_background_on_disk_and_refuses_other_classes(tmp_path):
    decision = Decision(background=LEVEL, classes=("amecro", "norcar"))
    write_decision(tmp_path / "decision.json", decision)
    assert read_decision(tmp_path / "decision.json") == decision
    with pytest.raises(ValueError, match="background is for 2 classes, the decision for 1"):
        Decision(background=LEVEL, classes=("amecro",))
    with pytest.raises(ValueError, match="background: frame must be a finite number"):
        Background((0.0,), (float("nan"),))
    with pytest.raises(ValueError, match="background is of 2 classes, the probabilities are of 3"):
        LEVEL.apply(np.full((1, 4, 3), 0.5), np.full((1, 4, 3), 0.5), [0])
