"""Predictions are stored, read again to the bit, and computed again when anything has changed."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from birdcall.audio.reading import AudioError
from birdcall.evaluation import predictions
from birdcall.evaluation.predictions import PredictionCache
from birdcall.inference.engine import predict_waveforms
from birdcall.inference.ensemble import Ensemble, load_ensemble
from birdcall.storage import store

RATE = 32_000


def noise(seed, rates, seconds=12.3):
    generator = np.random.default_rng(seed)
    return {
        rate: 0.1 * generator.standard_normal(round(seconds * rate)).astype("f4") for rate in rates
    }


def damaged(rates):
    raise AudioError("x/XC1.mp3", "is no audio")


SOURCES = {
    "a": partial(noise, 0),
    "b": partial(noise, 1),
    "broken": damaged,
    "c": partial(noise, 2),
}


@pytest.fixture
def cache(tmp_path):
    return PredictionCache(tmp_path / "predictions", "some-recordings", "made-from-this")


@pytest.fixture
def ensemble(trained_runs):
    return load_ensemble(trained_runs[:2])


def unread(rates):
    raise AssertionError("was read again")


NO_CACHE = PredictionCache(None, "", "")
UNREAD = dict.fromkeys(SOURCES, unread) | {"broken": damaged}  # perhaps it can be read now


def assert_same(first, second):
    assert list(first) == list(second)
    for name, predicted in first.items():
        if isinstance(predicted, AudioError):
            assert str(predicted) == str(second[name])
        else:
            assert np.array_equal(predicted.clipwise, second[name].clipwise)
            assert np.array_equal(predicted.framewise, second[name].framewise)
            assert predicted.seconds == second[name].seconds


def test_they_are_those_of_the_ensemble(ensemble, cache):
    result = cache.predict(ensemble, SOURCES)
    for name in ("a", "b", "c"):
        expected = predict_waveforms(ensemble, SOURCES[name]([RATE]))
        np.testing.assert_allclose(result[name].clipwise, expected.clipwise, atol=1e-6)
        np.testing.assert_allclose(result[name].framewise, expected.framewise, atol=1e-6)
        assert result[name].seconds == pytest.approx(12.3)
    assert isinstance(result["broken"], AudioError)
    assert "XC1.mp3" in str(result["broken"])
    assert "is no audio" in str(result["broken"])


def test_a_second_time_no_audio_is_read_and_the_bits_are_the_same(ensemble, cache):
    first = cache.predict(ensemble, SOURCES)
    assert_same(first, cache.predict(ensemble, UNREAD))


def test_only_a_new_member_predicts(trained_runs, cache, monkeypatch):
    cache.predict(load_ensemble(trained_runs[:1]), SOURCES)
    members = []
    real = predictions.predict_audio

    def count(ensemble, sources, outputs):
        members.append([member.name for member in ensemble.members])
        return real(ensemble, sources, outputs)

    monkeypatch.setattr(predictions, "predict_audio", count)
    together = cache.predict(load_ensemble(trained_runs[:2]), SOURCES)
    assert members == [["other-fold1"]]
    alone = NO_CACHE.predict(load_ensemble(trained_runs[1:2]), SOURCES)
    assert np.array_equal(together["b"].clipwise[1:], alone["b"].clipwise)


def test_the_order_of_members_is_that_of_the_ensemble(trained_runs, cache):
    first = cache.predict(load_ensemble(trained_runs[:2]), SOURCES)
    turned = cache.predict(load_ensemble(trained_runs[1::-1]), UNREAD)
    assert np.array_equal(first["a"].clipwise, turned["a"].clipwise[::-1])


@pytest.mark.parametrize("change", ["audio", "weights", "code", "names"])
def test_what_has_changed_is_predicted_again(ensemble, cache, monkeypatch, change):
    cache.predict(ensemble, SOURCES)
    sources = UNREAD
    if change == "audio":
        cache = replace(cache, made_from="made from something else")
    elif change == "names":
        sources = {**UNREAD, "d": unread}
    elif change == "code":
        monkeypatch.setattr(store, "code_digest", lambda *modules: {"inference.engine": "other"})
    else:
        for member in ensemble.members:
            settings = replace(member.checkpoint, weights_sha256="0" * 64)
            object.__setattr__(member, "checkpoint", settings)
    with pytest.raises(AssertionError, match="read again"):
        cache.predict(ensemble, sources)


def test_stored_recordings_in_another_order_are_not_mistaken_for_each_other(trained_runs, cache):
    sources = {name: SOURCES[name] for name in ("a", "b", "c")}
    cache.predict(load_ensemble(trained_runs[:1]), dict(reversed(sources.items())))
    together = cache.predict(load_ensemble(trained_runs[:2]), sources)
    assert_same(together, NO_CACHE.predict(load_ensemble(trained_runs[:2]), sources))


def test_a_recording_that_failed_for_one_member_only_is_predicted_again_by_all(
    trained_runs, cache, caplog
):
    sources = {name: SOURCES[name] for name in ("a", "b", "c")}
    cache.predict(load_ensemble(trained_runs[:1]), {**sources, "b": damaged})
    together = cache.predict(load_ensemble(trained_runs[:2]), sources)
    assert "all predict again" in caplog.text
    assert_same(together, NO_CACHE.predict(load_ensemble(trained_runs[:2]), sources))
    assert_same(
        together,
        cache.predict(load_ensemble(trained_runs[:2]), dict.fromkeys("abc", unread)),
    )


def test_frames_are_stored_for_members_together(ensemble, trained_runs, cache, caplog):
    first = cache.predict_frames(ensemble, SOURCES)
    assert list(first) == ["a", "b", "c"]
    for name, frames in first.items():
        assert np.array_equal(frames, predict_waveforms(ensemble, SOURCES[name]([RATE])).frames)
    decoded = dict.fromkeys("abc", unread)
    again = cache.predict_frames(ensemble, decoded)
    assert all(np.array_equal(again[name], frames) for name, frames in first.items())
    with pytest.raises(AssertionError, match="read again"):
        cache.predict_frames(load_ensemble(trained_runs[:1]), decoded)
    with pytest.raises(AssertionError, match="read again"):
        replace(cache, made_from="new").predict_frames(ensemble, decoded)
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    repaired = cache.predict_frames(ensemble, {name: SOURCES[name] for name in "abc"})
    assert all(np.array_equal(repaired[name], frames) for name, frames in first.items())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert cache.predict_frames(ensemble, decoded).keys() == first.keys()


def test_outdated_predictions_of_a_member_are_deleted(ensemble, cache):
    cache.predict(ensemble, SOURCES)
    before = set(cache.folder.iterdir())
    replace(cache, name="others").predict(ensemble, SOURCES)
    replace(cache, made_from="new").predict(ensemble, SOURCES)
    after = set(cache.folder.iterdir())
    assert len(before) == 2
    assert len(after) == 4
    assert not before & after


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_one_warning_and_is_written_again(ensemble, cache, caplog, damage):
    first = cache.predict(ensemble, SOURCES)
    path = sorted(cache.folder.iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "garbage": b"\x80\x04pickle", "empty": b""}[damage]
    )
    assert_same(first, cache.predict(ensemble, SOURCES))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert path.name in warnings[0]
    assert path.read_bytes() == whole


def test_a_network_that_is_still_in_training_is_not_stored(ensemble, cache):
    member = ensemble.members[0]
    unnamed = replace(member, checkpoint=replace(member.checkpoint, weights_sha256=""))
    cache.predict(Ensemble([unnamed]), SOURCES)
    assert not cache.folder.exists()


def test_a_member_that_gives_nan_is_named_and_nothing_is_stored(ensemble, cache):
    changed = copy.deepcopy(ensemble.members[1])
    with torch.no_grad():
        changed.model.head.detection.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=f"{changed.name}: its clipwise output holds NaN"):
        cache.predict(ensemble.for_members([ensemble.members[0], changed]), SOURCES)
    assert not cache.folder.exists()
