"""The predictions of a segment depend on its audio alone: not on batch, threads or neighbours."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from birdcall.audio.frontend import LogMel
from birdcall.audio.reading import AudioError, read_audio
from birdcall.inference import engine as engine_module
from birdcall.inference.engine import (
    open_recording,
    predict_audio,
    predict_files,
    predict_stream,
    predict_waveforms,
)
from birdcall.inference.ensemble import Ensemble, Member, MemberError
from birdcall.inference.windows import FRAMES_PER_SEGMENT, WindowConfig
from birdcall.models.checkpoint import Checkpoint
from birdcall.models.sed import build_model

RATE = 32_000
CLASSES = ("amecro", "bkcchi", "norcar")


@pytest.fixture(scope="module")
def members(tiny_experiment):
    members = []
    for seed, hop_length in enumerate((1000, 1000, 800)):
        torch.manual_seed(seed)
        frontend = replace(tiny_experiment.frontend, hop_length=hop_length)
        experiment = replace(tiny_experiment, frontend=frontend)
        model = build_model(experiment, len(CLASSES))
        # Statistics of real spectrograms, or every probability is about one half.
        model.train()(0.1 * torch.randn(8, 2 * RATE))
        members.append(Member(f"m{seed}", model.eval(), Checkpoint(experiment, CLASSES, seed)))
    return members


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype("f4")


def source(seconds, seed=0):
    return lambda rates: {rate: noise(seconds, seed) for rate in rates}


def assert_same(actual, expected):
    for name in ("clipwise", "framewise", "frames"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.seconds == expected.seconds


def test_predictions_have_an_entry_for_every_member_segment_and_class(members):
    predictions = predict_waveforms(Ensemble(members), {RATE: noise(12.3)})
    assert predictions.clipwise.shape == predictions.framewise.shape == (3, 3, 3)
    assert predictions.frames.shape == (3, 3 * FRAMES_PER_SEGMENT)
    assert predictions.seconds == pytest.approx(12.3)


def test_a_segment_has_the_probabilities_that_its_model_returns(members):
    """The reference is the model itself, on the five seconds cut by hand."""
    predictions = predict_waveforms(Ensemble(members[2:]), {RATE: noise(12.3)})
    for number in range(3):
        segment = np.zeros(5 * RATE, np.float32)
        samples = noise(12.3)[number * 5 * RATE : (number + 1) * 5 * RATE]
        segment[: len(samples)] = samples
        with torch.inference_mode():
            expected = members[2].model(torch.from_numpy(segment)[None])
        np.testing.assert_allclose(predictions.clipwise[0, number], expected.clipwise[0], atol=1e-6)
        peaks = expected.framewise[0].amax(dim=1)
        np.testing.assert_allclose(predictions.framewise[0, number], peaks, atol=1e-6)


def test_a_member_predicts_the_same_alone_and_in_an_ensemble(members):
    together = predict_waveforms(Ensemble(members), {RATE: noise(12.3)})
    for position, member in enumerate(members):
        alone = predict_waveforms(Ensemble([member]), {RATE: noise(12.3)})
        assert np.array_equal(alone.clipwise[0], together.clipwise[position])
        assert np.array_equal(alone.framewise[0], together.framewise[position])


def test_members_that_share_a_front_end_share_its_log_mel(members, monkeypatch):
    calls = []
    forward = LogMel.forward
    ensemble = Ensemble(members)
    predict_waveforms(ensemble, {RATE: noise(5)})  # the first time, it measures when frames are
    monkeypatch.setattr(
        LogMel, "forward", lambda self, w: calls.append(self.config.hop_length) or forward(self, w)
    )
    predict_waveforms(ensemble, {RATE: noise(5)})
    assert set(calls) == {1000, 800}
    assert calls.count(1000) == calls.count(800)


def test_a_recording_has_the_same_predictions_to_the_bit_whatever_is_predicted_beside_it(members):
    ensemble = Ensemble(members)
    lengths = {"a": 7.0, "b": 0.2, "c": 31.0, "d": 5.0, "e": 12.3}
    sources = {name: source(seconds, seed) for seed, (name, seconds) in enumerate(lengths.items())}
    together = dict(predict_audio(ensemble, sources))
    backwards = dict(predict_audio(ensemble, dict(reversed(sources.items()))))
    for name, audio in sources.items():
        ((_, alone),) = predict_audio(ensemble, {name: audio})
        assert_same(together[name], alone)
        assert_same(backwards[name], alone)


def test_the_batch_does_not_change_a_prediction(members):
    expected = predict_waveforms(Ensemble(members), {RATE: noise(40)})
    ensemble = Ensemble(members)
    ensemble.batch_windows = 3
    predictions = predict_waveforms(ensemble, {RATE: noise(40)})
    np.testing.assert_allclose(predictions.clipwise, expected.clipwise, atol=1e-6)
    np.testing.assert_allclose(predictions.framewise, expected.framewise, atol=1e-6)


def test_the_number_of_threads_does_not_change_a_bit(members):
    expected = predict_waveforms(Ensemble(members), {RATE: noise(42)})
    torch.set_num_threads(3)
    assert_same(predict_waveforms(Ensemble(members), {RATE: noise(42)}), expected)


def test_a_long_window_is_predicted_by_segments(members):
    ensemble = Ensemble(members[:1], window_config=WindowConfig(3))
    predictions = predict_waveforms(ensemble, {RATE: noise(23)})
    assert predictions.clipwise.shape == predictions.framewise.shape == (1, 5, 3)
    assert predictions.frames.shape == (3, 5 * FRAMES_PER_SEGMENT)
    peaks = predictions.frames.reshape(3, 5, FRAMES_PER_SEGMENT).max(axis=2).T
    np.testing.assert_allclose(predictions.framewise[0], peaks, atol=1e-6)
    assert len(np.unique(predictions.clipwise[0, :, 0])) == 5


def test_context_changes_a_segment_and_is_not_predicted_itself(members):
    """A shout after the segment changes its probability only where there is context."""
    quiet, shout = 1e-3 * noise(20), 1e-3 * noise(20)
    shout[23 * RATE // 2 : 27 * RATE // 2] += noise(2, seed=7) * 5
    plain, wide = Ensemble(members[:1]), Ensemble(members[:1], window_config=WindowConfig(1, 2.5))
    for ensemble, is_changed in ((plain, False), (wide, True)):
        before, after = (predict_waveforms(ensemble, {RATE: audio}) for audio in (quiet, shout))
        assert np.array_equal(before.clipwise[:, 0], after.clipwise[:, 0])
        assert np.array_equal(before.clipwise[:, 1], after.clipwise[:, 1]) != is_changed
        assert np.array_equal(before.clipwise[:, 3], after.clipwise[:, 3]) != is_changed
        assert after.frames.shape == (3, 4 * FRAMES_PER_SEGMENT)


def test_a_segment_is_the_mean_of_the_shifted_windows_that_overlap_with_it(members):
    """The reference: without its first half segment, a recording has the windows between."""
    sound, half = noise(22.3), FRAMES_PER_SEGMENT // 2
    plain = Ensemble(members)
    own = predict_waveforms(plain, {RATE: sound})
    between = predict_waveforms(plain, {RATE: sound[round(2.5 * RATE) :]})
    assert (own.n_segments, between.n_segments) == (5, 4)
    shifted = predict_waveforms(plain.with_windows(WindowConfig(shifts=2)), {RATE: sound})
    assert shifted.seconds == own.seconds
    for name in ("clipwise", "framewise"):
        windows, later = getattr(own, name), getattr(between, name)
        expected = [
            np.mean([*later[:, max(0, k - 1) : k + 1].swapaxes(0, 1), windows[:, k]], axis=0)
            for k in range(5)
        ]
        actual = getattr(shifted, name)
        np.testing.assert_allclose(actual, np.stack(expected, axis=1), atol=1e-6)
        assert not np.allclose(actual, windows, atol=1e-3)
    # The first half segment is in one window only, each other one in two.
    expected = own.frames.copy()
    expected[:, half : half + between.frames.shape[1]] += between.frames
    expected[:, half : half + between.frames.shape[1]] /= 2
    np.testing.assert_allclose(shifted.frames, expected, atol=1e-6)


@pytest.mark.parametrize("shifts", [2, 5])
def test_batches_and_blocks_do_not_change_shifted_windows(members, shifts):
    ensemble = Ensemble(members[:1], window_config=WindowConfig(1, 0.5, shifts))
    sound = noise(17.0)
    expected = predict_waveforms(ensemble, {RATE: sound})
    assert expected.n_segments == 4
    blocks = [
        {RATE: sound[: 3 * RATE]},
        {RATE: sound[3 * RATE : 9 * RATE]},
        {RATE: sound[9 * RATE :]},
    ]
    both = {"a": lambda _: iter(blocks), "b": source(3.0), "c": lambda _: {RATE: sound}}
    predicted = dict(predict_audio(ensemble, both))
    assert_same(predicted["a"], expected)
    assert_same(predicted["c"], expected)
    assert predicted["b"].n_segments == 1
    ensemble.batch_windows = 1  # other shapes, other rounding
    alone = predict_waveforms(ensemble, {RATE: sound})
    for name in ("clipwise", "framewise", "frames"):
        np.testing.assert_allclose(getattr(alone, name), getattr(expected, name), atol=1e-6)


def test_shifted_windows_cost_as_many_times_as_much(members):
    sounds = {}
    for shifts in (1, 2):
        ensemble = Ensemble(members[:1], window_config=WindowConfig(shifts=shifts))
        predict_waveforms(ensemble, {RATE: noise(20.0)})
        sounds[shifts] = ensemble.costs.audio_seconds["m0"]
    assert sounds == {1: 20.0, 2: 7 * 2.5}


def test_an_export_suits_shifted_windows_too(members):
    (member,) = members[:1]
    exported = Ensemble([replace(member, export=lambda log_mel, outputs: None)])
    assert exported.with_windows(WindowConfig(shifts=2)).members[0].export is not None
    assert exported.with_windows(WindowConfig(1, 2.5, 2)).members[0].export is None


def test_frames_are_where_the_shout_is_in_windows_of_any_length(members):
    """A shout changes most where it is."""
    waveform = 1e-3 * noise(20)
    waveform[11 * RATE : 12 * RATE] += noise(1, seed=7) * 5
    for window_config in (WindowConfig(), WindowConfig(2, 2.5), WindowConfig(4, 0.0)):
        ensemble = Ensemble(members[:1], window_config=window_config)
        shout = predict_waveforms(ensemble, {RATE: waveform}).frames
        quiet = predict_waveforms(ensemble, {RATE: 1e-3 * noise(20)}).frames
        moved = np.abs(shout - quiet).sum(axis=0)
        changed = np.flatnonzero(moved > moved.max() / 2) * 5 / FRAMES_PER_SEGMENT
        assert changed[0] > 9.5  # the frames of the network are a second long
        assert changed[-1] < 13.0
        assert abs((changed[0] + changed[-1] + 0.1) / 2 - 11.5) < 0.25


def test_an_export_for_other_windows_is_not_used(members):
    exported = replace(members[0], export=lambda *_: pytest.fail("it runs"))
    ensemble = Ensemble(members[:1])
    ensemble.members = [exported]
    wide = ensemble.with_windows(WindowConfig(2))
    assert wide.members[0].export is None
    assert predict_waveforms(wide, {RATE: noise(12)}).clipwise.shape[1] == 3
    assert ensemble.with_windows(WindowConfig()) is ensemble


def test_members_of_other_classes_do_not_make_an_ensemble(members):
    other = replace(members[1], checkpoint=replace(members[1].checkpoint, classes=("a", "b", "c")))
    with pytest.raises(ValueError, match="other classes"):
        Ensemble([members[0], other])


def test_members_of_two_sample_rates_share_one_decode(members, tiny_experiment, tmp_path):
    torch.manual_seed(5)
    frontend = replace(tiny_experiment.frontend, sample_rate=22_050, fmax=10_000.0)
    experiment = replace(tiny_experiment, frontend=frontend)
    low = Member("low", build_model(experiment, 3).eval(), Checkpoint(experiment, CLASSES, 0))
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(12.3), RATE)
    paths = {"a": path}
    ((_, both),) = predict_files(Ensemble([members[0], low]), paths)
    ((_, alone),) = predict_files(Ensemble([low]), paths)
    assert np.array_equal(both.clipwise[1], alone.clipwise[0])


def test_a_recording_that_does_not_decode_does_not_stop_the_others(members, tmp_path):
    good, bad = tmp_path / "good.wav", tmp_path / "bad.mp3"
    soundfile.write(good, noise(6), RATE)
    bad.write_bytes(b"<html>not found</html>")
    paths = {"bad": bad, "gone": tmp_path / "gone.wav", "good": good}
    results = dict(predict_files(Ensemble(members[:1]), paths))
    assert "bad.mp3" in str(results["bad"])
    assert isinstance(results["gone"], AudioError)
    assert "gone.wav" in str(results["gone"])
    assert results["good"].clipwise.shape == (1, 2, 3)


def test_a_recording_that_breaks_off_ends_with_its_error(members):
    def broken(rates):
        yield {RATE: noise(22)}
        raise AudioError("x.mp3", "broke off")

    items = [
        item for _, item in predict_stream(Ensemble(members[:1]), {"a": broken, "b": source(5)})
    ]
    assert isinstance(items[-3], AudioError)
    assert sum(item.clipwise.shape[1] for item in items[:-3]) == 4
    results = dict(predict_audio(Ensemble(members[:1]), {"a": broken, "b": source(5)}))
    assert isinstance(results["a"], AudioError)
    assert_same(results["b"], predict_waveforms(Ensemble(members[:1]), {RATE: noise(5)}))


def test_an_unexpected_error_of_a_reader_reaches_the_caller(members):
    def crash(rates):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        dict(predict_audio(Ensemble(members[:1]), {"a": source(5), "b": crash}))


def test_a_stream_that_is_closed_leaves_no_reader_behind(members):
    def endless(rates):
        while True:
            yield {RATE: noise(5)}

    before = threading.active_count()
    stream = predict_stream(Ensemble(members[:1]), {"a": endless})
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_reading_ahead_is_bounded(members):
    n_read = 0

    def long(rates):
        nonlocal n_read
        for _ in range(1000):
            n_read += 1
            yield {RATE: np.zeros(5 * RATE, np.float32)}

    stream = predict_stream(Ensemble(members[:1]), {"a": long})
    next(stream)
    time.sleep(0.3)
    assert n_read < 100
    stream.close()


def test_a_process_that_predicts_uses_freed_memory_again(members, monkeypatch):
    calls = []
    monkeypatch.setattr(engine_module, "reuse_freed_memory", lambda: calls.append(1))
    predict_waveforms(Ensemble(members[:1]), {RATE: noise(5)})
    assert calls


def test_a_limit_predicts_the_beginning_only(members, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(21), RATE)
    ensemble = Ensemble(members[:1])
    ((_, predictions),) = predict_files(ensemble, {"a": path}, limit_seconds=10.0)
    assert predictions.clipwise.shape[1] == 2
    assert predictions.seconds == 10
    ((_, whole),) = predict_files(ensemble, {"a": path}, limit_seconds=30.0)
    assert whole.clipwise.shape[1] == 5
    np.testing.assert_allclose(whole.clipwise[:, :2], predictions.clipwise, atol=1e-6)


def test_a_limited_recording_is_its_beginning_to_the_sample(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(70), 44_100)
    blocks = list(open_recording(path, 33.3)([RATE, 16_000]))
    for rate in (RATE, 16_000):
        joined = np.concatenate([block[rate] for block in blocks])
        expected = read_audio(path, rate, duration_seconds=33.3)
        np.testing.assert_allclose(joined, expected, atol=1e-6)


def test_some_members_predict_and_at_none_nothing_more_is_predicted(members):
    sources = {name: source(6, seed) for seed, name in enumerate("abcd")}
    n_members = iter((3, 1, 0))
    results = dict(
        predict_audio(Ensemble(members), sources, limit_members=lambda _: next(n_members))
    )
    assert {name: len(item.clipwise) for name, item in results.items()} == {"a": 3, "b": 1}
    alone = predict_waveforms(Ensemble(members[:1]), sources["b"]([RATE]))
    assert_same(results["b"], alone)


def test_a_member_that_predicts_nan_is_named(members, tiny_experiment):
    model = build_model(tiny_experiment, 3)
    with torch.no_grad():
        model.head.detection.bias.fill_(float("nan"))
    bad = Member("bad", model, Checkpoint(tiny_experiment, CLASSES, 0))
    with pytest.raises(MemberError, match="bad: its clipwise output holds NaN") as caught:
        predict_waveforms(Ensemble([members[0], bad]), {RATE: noise(5)})
    assert caught.value.member == "bad"


def test_costs_measure_reading_front_ends_and_members(members):
    ensemble = Ensemble(members)
    predict_waveforms(ensemble, {RATE: noise(40)})
    front_ends = {"front end", "front end 2"}
    assert set(ensemble.costs.seconds) == {"reading", *front_ends, "m0", "m1", "m2"}
    assert all(seconds > 0 for seconds in ensemble.costs.seconds.values())
    assert ensemble.costs.audio_seconds["m0"] == 40
    assert {ensemble.costs.audio_seconds[name] for name in front_ends} == {40}
    # 10 s were needed for what is measured, by all members; the first needs one front end.
    costs, total = ensemble.costs, sum(ensemble.costs.seconds.values())
    per_second = {name: costs.seconds[name] / costs.audio_seconds[name] for name in costs.seconds}
    expected = 10 / total * sum(per_second.values())
    assert costs.estimate(["m0", "m1", "m2"], 10.0) == pytest.approx(expected)
    expected = 10 / total * (sum(per_second[name] for name in ("reading", "front end", "m0")))
    assert costs.estimate(["m0"], 10.0) == pytest.approx(expected)
