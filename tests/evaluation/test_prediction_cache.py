"""What members heard is kept, read again to the bit, and heard again when anything has changed."""

import copy
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from birdcall.audio.reading import AudioError
from birdcall.evaluation import prediction_cache as stored
from birdcall.evaluation.prediction_cache import (
    PredictionCache,
    predict_cached,
    predict_frames_cached,
)
from birdcall.inference.engine import predict_waveforms
from birdcall.inference.ensemble import Ensemble, load_ensemble

RATE = 32_000


def noise(seed, rates, seconds=12.3):
    generator = np.random.default_rng(seed)
    return {
        rate: 0.1 * generator.standard_normal(round(seconds * rate)).astype("f4") for rate in rates
    }


def damaged(rates):
    raise AudioError("x/XC1.mp3", "is no sound")


SOUNDS = {"a": partial(noise, 0), "b": partial(noise, 1), "broken": damaged, "c": partial(noise, 2)}


@pytest.fixture
def kept(tmp_path):
    return PredictionCache(tmp_path / "heard", "some-sounds", "made-from-this")


@pytest.fixture
def ensemble(trained_runs):
    return load_ensemble(trained_runs[:2])


def silent(rates):
    raise AssertionError("was heard again")


UNHEARD = dict.fromkeys(SOUNDS, silent)


def assert_same(one, other):
    assert list(one) == list(other)
    for name, scores in one.items():
        if isinstance(scores, AudioError):
            assert str(scores) == str(other[name])
        else:
            assert np.array_equal(scores.clipwise, other[name].clipwise)
            assert np.array_equal(scores.framewise, other[name].framewise)
            assert scores.seconds == other[name].seconds


def test_it_is_what_the_ensemble_says(ensemble, kept):
    heard = predict_cached(ensemble, SOUNDS, kept)
    for name in ("a", "b", "c"):
        expected = predict_waveforms(ensemble, SOUNDS[name]([RATE]))
        np.testing.assert_allclose(heard[name].clipwise, expected.clipwise, atol=1e-6)
        np.testing.assert_allclose(heard[name].framewise, expected.framewise, atol=1e-6)
        assert heard[name].seconds == pytest.approx(12.3)
    assert isinstance(heard["broken"], AudioError)
    assert "XC1.mp3" in str(heard["broken"])
    assert "is no sound" in str(heard["broken"])


def test_a_second_time_nothing_is_heard_and_the_bits_are_the_same(ensemble, kept):
    first = predict_cached(ensemble, SOUNDS, kept)
    assert_same(first, predict_cached(ensemble, UNHEARD, kept))


def test_only_a_new_member_hears(trained_runs, kept, monkeypatch):
    predict_cached(load_ensemble(trained_runs[:1]), SOUNDS, kept)
    members = []
    real = stored.predict_audio

    def count(ensemble, sounds, outputs):
        members.append([member.name for member in ensemble.members])
        return real(ensemble, sounds, outputs)

    monkeypatch.setattr(stored, "predict_audio", count)
    together = predict_cached(load_ensemble(trained_runs[:2]), SOUNDS, kept)
    assert members == [["other-fold1"]]
    alone = predict_cached(load_ensemble(trained_runs[1:2]), SOUNDS)
    assert np.array_equal(together["b"].clipwise[1:], alone["b"].clipwise)


def test_the_order_of_members_is_theirs_and_not_the_store_s(trained_runs, kept):
    first = predict_cached(load_ensemble(trained_runs[:2]), SOUNDS, kept)
    turned = predict_cached(load_ensemble(trained_runs[1::-1]), UNHEARD, kept)
    assert np.array_equal(first["a"].clipwise, turned["a"].clipwise[::-1])


@pytest.mark.parametrize("change", ["sounds", "weights", "code", "names"])
def test_what_has_changed_is_heard_again(ensemble, kept, monkeypatch, change):
    predict_cached(ensemble, SOUNDS, kept)
    sounds = UNHEARD
    if change == "sounds":
        kept = replace(kept, fingerprint="made from something else")
    elif change == "names":
        sounds = {**UNHEARD, "d": silent}
    elif change == "code":
        monkeypatch.setattr(stored, "code_digest", lambda *modules: {"inference.engine": "other"})
    else:
        for member in ensemble.members:
            settings = replace(member.checkpoint, weights_sha256="0" * 64)
            object.__setattr__(member, "checkpoint", settings)
    with pytest.raises(AssertionError, match="heard again"):
        predict_cached(ensemble, sounds, kept)


def test_kept_sounds_in_another_order_are_not_mistaken_for_each_other(trained_runs, kept):
    sounds = {name: SOUNDS[name] for name in ("a", "b", "c")}
    predict_cached(load_ensemble(trained_runs[:1]), dict(reversed(sounds.items())), kept)
    together = predict_cached(load_ensemble(trained_runs[:2]), sounds, kept)
    assert_same(together, predict_cached(load_ensemble(trained_runs[:2]), sounds))


def test_a_sound_that_failed_for_one_member_only_is_heard_again_by_all(trained_runs, kept, caplog):
    sounds = {name: SOUNDS[name] for name in ("a", "b", "c")}
    predict_cached(load_ensemble(trained_runs[:1]), {**sounds, "b": damaged}, kept)
    together = predict_cached(load_ensemble(trained_runs[:2]), sounds, kept)
    assert "heard different sounds" in caplog.text
    assert_same(together, predict_cached(load_ensemble(trained_runs[:2]), sounds))
    assert_same(
        together,
        predict_cached(load_ensemble(trained_runs[:2]), dict.fromkeys("abc", silent), kept),
    )


def test_frames_are_kept_for_members_together(ensemble, trained_runs, kept, caplog):
    first = predict_frames_cached(ensemble, SOUNDS, kept)
    assert list(first) == ["a", "b", "c"]
    for name, frames in first.items():
        assert np.array_equal(frames, predict_waveforms(ensemble, SOUNDS[name]([RATE])).frames)
    decoded = dict.fromkeys("abc", silent)
    again = predict_frames_cached(ensemble, decoded, kept)
    assert all(np.array_equal(again[name], frames) for name, frames in first.items())
    with pytest.raises(AssertionError, match="heard again"):
        predict_frames_cached(load_ensemble(trained_runs[:1]), decoded, kept)
    with pytest.raises(AssertionError, match="heard again"):
        predict_frames_cached(ensemble, decoded, replace(kept, fingerprint="new"))
    (path,) = kept.folder.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    repaired = predict_frames_cached(ensemble, {name: SOUNDS[name] for name in "abc"}, kept)
    assert all(np.array_equal(repaired[name], frames) for name, frames in first.items())
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert predict_frames_cached(ensemble, decoded, kept).keys() == first.keys()


def test_old_outputs_of_a_member_are_deleted(ensemble, kept):
    predict_cached(ensemble, SOUNDS, kept)
    before = set(kept.folder.iterdir())
    predict_cached(ensemble, SOUNDS, replace(kept, sounds="others"))
    predict_cached(ensemble, SOUNDS, replace(kept, fingerprint="new"))
    after = set(kept.folder.iterdir())
    assert len(before) == 2
    assert len(after) == 4
    assert not before & after


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_one_warning_and_is_made_again(ensemble, kept, caplog, damage):
    first = predict_cached(ensemble, SOUNDS, kept)
    path = sorted(kept.folder.iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "garbage": b"\x80\x04pickle", "empty": b""}[damage]
    )
    assert_same(first, predict_cached(ensemble, SOUNDS, kept))
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == 1
    assert path.name in warnings[0]
    assert path.read_bytes() == whole


def test_a_network_that_is_still_in_training_leaves_nothing(ensemble, kept):
    member = ensemble.members[0]
    unnamed = replace(member, checkpoint=replace(member.checkpoint, weights_sha256=""))
    predict_cached(Ensemble([unnamed]), SOUNDS, kept)
    assert not kept.folder.exists()


def test_a_member_that_says_nan_is_named_and_nothing_is_kept(ensemble, kept):
    changed = copy.deepcopy(ensemble.members[1])
    with torch.no_grad():
        changed.model.head.detection.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=f"{changed.name}: its clipwise output holds NaN"):
        predict_cached(ensemble.for_members([ensemble.members[0], changed]), SOUNDS, kept)
    assert not kept.folder.exists()


KILLED = """
import os, sys
from pathlib import Path
from birdcall.storage import files
from birdcall.evaluation.prediction_cache import Kept, hear_sounds
from birdcall.inference.ensemble import load_ensemble
import numpy as np
real = Path.write_bytes
def write_half(self, content):
    real(self, content[: len(content) // 2])
    os.kill(os.getpid(), 9)
Path.write_bytes = write_half
sounds = {"a": lambda rates: {rate: np.zeros(rate, "f4") for rate in rates}}
hear_sounds(load_ensemble([Path(sys.argv[1])]), sounds, Kept(Path(sys.argv[2]), "s", "f"))
"""


def test_a_kill_in_the_middle_leaves_no_half_file(trained_runs, tmp_path):
    folder = tmp_path / "heard"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, trained_runs[0], folder], check=False, capture_output=True
    )
    assert done.returncode == -9
    left = list(folder.iterdir())
    assert [path.name for path in left if not path.name.startswith(".")] == []
    assert len(left) == 1  # a temporary file, which nobody reads
