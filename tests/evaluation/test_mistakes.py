"""The mistakes of a report are the worst, and their frames are those that were scored."""

import numpy as np

from birdcall.evaluation.mistakes import FALSE, find_mistakes, predict_mistakes


def test_mistakes_are_mistakes_and_the_worst(held_out, evaluation):
    mistakes = find_mistakes(held_out, evaluation.ensemble)
    assert {one.audio for one in mistakes} == {"simulated", "labelled"}
    predictions = evaluation.labelled.predictions
    predicted = predictions.decide(evaluation.ensemble.decision)
    ends = predictions.segments["seconds"].to_numpy()
    names = predictions.segments["recording"].to_numpy()
    for one in [one for one in mistakes if one.audio == "labelled"]:
        row = np.flatnonzero((names == one.recording) & (ends == one.start + 5))
        column = predictions.classes.index(one.ebird_code)
        assert predicted[row, column] == (one.kind == FALSE)
        assert predictions.truth[row, column] == (one.kind != FALSE)
    for kind in {(one.audio, one.kind) for one in mistakes}:
        subset = [one for one in mistakes if (one.audio, one.kind) == kind]
        scores = [one.score for one in subset]
        assert scores == sorted(scores, reverse=True)
        assert len({(one.recording, one.ebird_code) for one in subset}) == len(subset) <= 6


def test_a_mistake_is_predicted_as_it_was_scored(held_out, evaluation):
    """The highest frame of each member is the score of its row, and the waveform is the row's."""
    column = {code: index for index, code in enumerate(evaluation.classes)}
    mistakes = find_mistakes(held_out, evaluation.ensemble, 2)
    for predicted in predict_mistakes(held_out, mistakes):
        mistake = predicted.mistake
        predictions = evaluation.labelled.predictions
        if mistake.audio == "simulated":
            predictions = evaluation.ensemble.simulated
        row = np.flatnonzero(
            (predictions.segments["recording"] == mistake.recording)
            & (predictions.segments["seconds"] == mistake.start + 5)
        )[0]
        members = predicted.frames[1:, 0].max(axis=1)
        expected = predictions.framewise[:, row, column[mistake.ebird_code]]
        # Frames are interpolated: between two of them a peak is a little higher.
        assert (members <= expected + 1e-5).all()
        np.testing.assert_allclose(members, expected, atol=0.02)
        assert len(predicted.waveform) == 5 * 32_000
        end = mistake.start + 5
        assert all(mistake.start <= e.onset <= e.offset <= end for e in predicted.events)
