"""An ensemble labels soundscapes softly; other networks than its own are trained on them."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from helpers import RATE, fake_birdnet

from birdcall.__main__ import main
from birdcall.audio.reading import read_audio
from birdcall.config import NO_AUGMENT, StudentConfig, replace_nested
from birdcall.data.birdnet import WindowStore, predict_windows, scientific_names
from birdcall.data.cache import CropRequest, RecordingCache
from birdcall.data.clips import ClipDataset
from birdcall.data.dataset import TrainingData, load_training_data
from birdcall.data.soundscapes import (
    CollapseLimits,
    LabelStatistics,
    SoundscapeLabels,
    SoundscapeTargets,
    network_of,
    scale_probabilities,
)
from birdcall.data.targets import IGNORE_TARGET, ClipRequest
from birdcall.experiments import EXPERIMENTS
from birdcall.inference.background import remove_background
from birdcall.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.training.distributed import DistributedContext
from birdcall.training.resume import conditions_of
from birdcall.training.runs import plan_runs, train_many
from birdcall.training.student import StudentOptions, label_soundscapes, labels_file, train_rounds
from birdcall.training.trainer import RunOptions

CLASSES = ("amecro", "bkcchi", "norcar")
ANY = CollapseLimits(0.0, 1.0, 1e9, 1.0, 0.0)  # a network of few weights may name what it likes
OPTIONS = RunOptions(workers=0)
pytestmark = pytest.mark.usefixtures("blank_previews")


def labels_of(folder, probabilities, seconds, experiments, classes=CLASSES):
    """Labels by ``experiments``, one array ``(segments, classes)`` each, of soundscapes so long."""
    n_segments = [int(-(-length // 5)) for length in seconds]
    names = [f"{number}.wav" for number in range(len(seconds))]
    sizes = [path.stat().st_size if (path := folder / name).is_file() else 0 for name in names]
    return SoundscapeLabels(
        folder=folder,
        classes=tuple(classes),
        soundscapes=[
            {"name": name, "seconds": length, "size": size, "audio_hash": name}
            for name, length, size in zip(names, seconds, sizes, strict=True)
        ],
        members=[
            {"name": f"{item.name}-fold0", "experiment": item.name, "network": network_of(item)}
            | {"weights_sha256": item.name}
            for item in experiments
        ],
        families=[network_of(item) for item in experiments],
        round=1,
        statistics={},
        probabilities=np.array(probabilities, np.float32),
        soundscape=np.repeat(np.arange(len(seconds)), n_segments),
    )


@pytest.fixture
def teacher(tiny_experiment):
    """An experiment with another network than the tiny one."""
    return replace_nested(tiny_experiment, name="teacher", model={"temporal": "none"})


@pytest.fixture
def student(tiny_experiment):
    """The tiny experiment; half of the clips of its recordings are of soundscapes."""
    student = replace_nested(
        tiny_experiment,
        name="student",
        train={"student": {"share": 0.5, "power": 2.0, "reference_quantile": 1.0}},
    )
    return replace(student, augment=NO_AUGMENT)


# --- labels -------------------------------------------------------------------------------------


def test_the_highest_probabilities_become_labels_of_one_before_the_power():
    """By hand: 0.28 is the highest of few recordings; a square alone would make it 0.08."""
    probabilities = np.array([[0.28, 0.0, 0.07], [0.0, 0.14, 0.07]])
    settings = StudentConfig(reference_quantile=1.0, power=2.0, min_reference=0.1)
    scaled = scale_probabilities(probabilities, settings)
    assert scaled == pytest.approx(np.array([[1.0, 0.0, 0.0625], [0.0, 0.25, 0.0625]]))
    median = StudentConfig(reference_quantile=0.5, power=1.0, min_reference=0.01)
    median = scale_probabilities(probabilities, median)
    assert median == pytest.approx(np.array([[1.0, 0.0, 1 / 3], [0.0, 2 / 3, 1 / 3]]))
    assert not scale_probabilities(np.zeros((2, 3)), StudentConfig()).any()
    faint = scale_probabilities(probabilities / 10, replace(settings, power=1.0, min_reference=0.3))
    assert faint == pytest.approx(probabilities / 3), "no bird at all: no label of one"


def test_what_a_site_raises_in_all_segments_is_taken_off_and_a_song_is_not():
    generator = np.random.default_rng(0)
    logits = generator.normal(-6, 0.5, (240, 5))
    logits[:120, 0] += 5.0  # wind that sounds like a dove, at one site
    logits[30:40, 1] += 6.0  # a song
    sites = ["night"] * 120 + ["day"] * 120
    cleaned = remove_background(1 / (1 + np.exp(-logits)), sites)
    change = np.log(cleaned / (1 - cleaned)) - logits
    assert change[:120, 0] == pytest.approx(-5 * 120 / 132, abs=0.3)
    assert np.abs(change[:120, 1:]).max() < 0.3 and np.abs(change[120:]).max() < 0.3


def test_a_clip_has_the_highest_labels_of_its_segments_up_to_their_cap(tmp_path, teacher, student):
    probabilities = [[1, 0, 0], [0, 1, 0.5], [0, 0, 0.5], [0.5, 0, 0]]
    labels = labels_of(tmp_path, [probabilities], [15.0, 4.0], [teacher])
    long = replace_nested(
        student, train={"data": {"clip_seconds": 10.0}, "student": {"power": 1.0, "max_sum": 1.5}}
    )
    targets = SoundscapeTargets(labels, long)
    assert targets.targets == pytest.approx(
        np.array([[0.6, 0.6, 0.3], [0, 1, 0.5], [0.5, 0, 0]]), abs=1e-6
    )
    generator = np.random.default_rng(0)
    drawn = [targets.draw(generator) for _ in range(2000)]
    shares = pd.Series([(index, start) for index, start, _ in drawn]).value_counts(normalize=True)
    assert set(shares.index) == {(0, 0.0), (0, 5.0), (1, 0.0)}
    for clip, largest in (((0, 0.0), 0.6), ((0, 5.0), 1.0), ((1, 0.0), 0.5)):
        assert shares[clip] == pytest.approx(largest / 2.1, abs=0.04)


def test_labels_are_read_as_they_were_written(tmp_path, teacher):
    soundfile.write(tmp_path / "0.wav", np.zeros(5 * RATE), RATE)
    path = tmp_path / "labels.safetensors"
    labels = labels_of(tmp_path, [[[0.1, 0.2, 0.3]]], [5.0], [teacher])
    labels.write(path)
    read = SoundscapeLabels.read(path, CLASSES)
    assert read.digest == labels.digest
    assert (read.members, read.round, read.folder) == (labels.members, 1, tmp_path.resolve())
    with pytest.raises(ValueError, match=r"labels\.safetensors: labels of other classes"):
        SoundscapeLabels.read(path, ("amecro",))
    soundfile.write(tmp_path / "0.wav", np.zeros(RATE), RATE)
    with pytest.raises(FileNotFoundError, match=r"0\.wav is not there as"):
        SoundscapeLabels.read(path, CLASSES)
    path.write_bytes(b"not labels")
    with pytest.raises(ValueError, match=r"labels\.safetensors: not a file of soundscape labels"):
        SoundscapeLabels.read(path, CLASSES)


# --- who teaches whom ---------------------------------------------------------------------------


def test_a_network_learns_from_the_labels_of_other_networks_only(
    tmp_path, tiny_experiment, teacher, student
):
    own, others = [[1, 0, 0], [0.5, 0, 0]], [[0, 0, 1], [0, 0.5, 0]]
    labels = labels_of(tmp_path, [own, others], [10.0], [tiny_experiment, teacher])
    learnt = SoundscapeTargets(labels, student).targets
    assert np.array_equal(learnt, np.array([[0, 0, 1], [0, 0.25, 0]], np.float32))
    with pytest.raises(ValueError, match="student would learn from its own predictions"):
        SoundscapeTargets(labels_of(tmp_path, [own], [10.0], [tiny_experiment]), student)
    named = labels_of(tmp_path, [own], [10.0], [replace(teacher, name="student")])
    with pytest.raises(ValueError, match="student would learn from its own predictions"):
        SoundscapeTargets(named, student)


def test_a_student_without_labels_or_with_its_own_is_refused_before_the_first_run(
    training_data, tiny_experiment, student, tmp_path
):
    runs = plan_runs([tiny_experiment, student], training_data, 0, tmp_path / "runs")
    with pytest.raises(ValueError, match=r"student has a share of 0\.5.*--soundscape-labels"):
        train_many(runs, training_data, OPTIONS)
    labels = labels_of(tmp_path, [np.ones((1, 3))], [5.0], [student], training_data.classes)
    with pytest.raises(ValueError, match="student would learn from its own predictions"):
        train_many(runs, replace(training_data, soundscape_labels=labels), OPTIONS)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


# --- clips --------------------------------------------------------------------------------------


@pytest.fixture
def clips_of(tmp_path, teacher):
    """Build the clips of three recordings, constant sound of 0.1, and of a soundscape of 0.3."""
    soundfile.write(tmp_path / "0.wav", np.full(10 * RATE, 0.3), RATE, subtype="FLOAT")
    recordings = pd.DataFrame(
        {
            "path": ["a", "b", "c"],
            "ebird_code": CLASSES,
            "secondary_codes": [("norcar",), (), ()],
            "seconds": [10.0, 10.0, 10.0],
            "fold": [0, 1, 1],
        }
    )
    labels = labels_of(tmp_path, [[[0.0, 0.5, 0.0], [0.0, 0.5, 1.0]]], [10.0], [teacher])

    def read(request):
        n_samples = round(request.seconds * request.sample_rate)
        return [np.full(n_samples, 0.1, np.float32) for _ in request.offsets]

    data = TrainingData(
        tmp_path,
        recordings,
        CLASSES,
        read,
        soundscape_labels=labels,
        soundscape_cache=tmp_path / "cache",
    )
    requests = [ClipRequest(0, position, position % 3) for position in range(120)]
    return lambda experiment: ClipDataset(data, experiment).make_clips(requests)


def test_a_share_of_the_clips_are_of_soundscapes_and_the_others_stay_the_same(clips_of, student):
    plain = clips_of(replace_nested(student, train={"student": {"share": 0.0}}))
    mixed = clips_of(student)
    is_soundscape = [clip.recording == "0.wav" for clip in mixed]
    assert 40 <= sum(is_soundscape) <= 80
    for clip, before, changed in zip(mixed, plain, is_soundscape, strict=True):
        if changed:
            assert torch.allclose(clip.waveform, torch.full((2 * RATE,), 0.3), atol=1e-4)
            assert clip.target.tolist() in ([0.0, 0.25, 0.0], [0.0, 0.25, 1.0])
        else:
            assert torch.equal(clip.waveform, before.waveform)
            assert torch.equal(clip.target, before.target)
    everything = clips_of(replace_nested(student, train={"student": {"share": 1.0}}))
    assert {clip.recording for clip in everything} == {"0.wav"}


def test_soundscapes_are_decoded_once_before_a_training_reads_clips_of_them(
    demo_folder, tables, training_data, teacher, tmp_path, monkeypatch
):
    sound = tmp_path / "sound"
    sound.mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(6 * RATE)
    soundfile.write(sound / "0.wav", noise, RATE)
    (sound / "1.wav").write_bytes(b"damaged since it was labelled")
    classes = training_data.classes
    half = np.full((1, 4, len(classes)), 0.5)  # two segments of each
    labels_of(sound, half, [6.0, 7.0], [teacher], classes).write(tmp_path / "labels.safetensors")

    def load():
        return load_training_data(
            demo_folder,
            folds=tables[0],
            audit=tables[1],
            cache=tmp_path / "cache",
            soundscape_labels=tmp_path / "labels.safetensors",
        )

    cached = RecordingCache(sound, load().soundscape_cache)
    assert [cached.path(f"{number}.wav").is_file() for number in range(2)] == [True, False]
    (crop,) = cached(CropRequest("0.wav", RATE, (1.0,), 5.0))
    expected = read_audio(sound / "0.wav", RATE)[RATE : 6 * RATE]
    np.testing.assert_allclose(crop, expected, atol=1e-4)
    # A second time only what is missing is tried.
    tried = []
    monkeypatch.setattr(
        "birdcall.data.soundscapes.measure_recording", lambda _, name, __: tried.append(name)
    )
    load()
    assert tried == ["1.wav"]


def test_a_mixed_in_soundscape_is_as_loud_as_the_recording_and_adds_its_labels(clips_of, student):
    ignored = {"loss": {"secondary_label_weight": None}}
    mixed = clips_of(
        replace_nested(student, train={"student": {"share": 1.0, "mode": "mix"}, **ignored})
    )
    assert {clip.recording for clip in mixed} == {"a", "b", "c"}
    for clip in mixed:
        assert torch.allclose(clip.waveform, torch.full((2 * RATE,), 0.2), atol=1e-4)
    of_first = {tuple(clip.target.tolist()) for clip in mixed if clip.recording == "a"}
    assert of_first == {(1.0, 0.25, IGNORE_TARGET), (1.0, 0.25, 1.0)}


def test_soundscapes_that_cannot_be_read_are_counted_as_such(clips_of, student, tmp_path):
    (tmp_path / "0.wav").write_bytes(b"<html>" * 100)
    clip = clips_of(replace_nested(student, train={"student": {"share": 1.0}}))[0]
    assert clip.waveform is None
    assert {failure.kind for failure in clip.failures} == {"soundscape"}
    assert all("0.wav" in failure.reason for failure in clip.failures)


def test_share_zero_trains_the_weights_of_plain_training(
    training_data, tiny_experiment, teacher, student, trained_runs, tmp_path
):
    labels = labels_of(tmp_path, [np.ones((1, 3))], [5.0], [teacher], training_data.classes)
    data = replace(training_data, soundscape_labels=labels)
    (run,) = plan_runs([tiny_experiment], data, 0, tmp_path)
    train_many([run], data, OPTIONS)
    (plain,) = [folder for folder in trained_runs if folder.parts[-2:] == ("tiny", "fold0")]
    for name in ("model.safetensors", "model.json"):
        assert (run.folder / name).read_bytes() == (plain / name).read_bytes()
    with_labels, without = (
        conditions_of(data, experiment, None, torch.device("cpu"), distributed=DistributedContext())
        for experiment in (student, tiny_experiment)
    )
    assert (with_labels["soundscapes"], with_labels["round"]) == (labels.digest, 1)
    assert (without["soundscapes"], without["round"]) == (None, None)


# --- rounds -------------------------------------------------------------------------------------


@pytest.fixture
def soundscapes(demo_folder, tmp_path):
    """A folder of two unlabelled soundscapes, a copy of one of them, and a damaged one."""
    folder = tmp_path / "field"
    (folder / "night").mkdir(parents=True)
    sounds = sorted((demo_folder / "test_audio").glob("*.mp3"))[:2]
    for number, sound in enumerate(sounds):
        soundfile.write(
            folder / "night" / f"{number}.wav", read_audio(sound, RATE)[: 7 * RATE], RATE
        )
    shutil.copyfile(folder / "night" / "1.wav", folder / "night" / "copy.wav")
    (folder / "broken.wav").write_bytes(b"<html>" * 100)
    return folder


@pytest.fixture
def teachers(training_data, tiny_experiment, teacher, tmp_path):
    """Runs of two networks; the first names the first class, the second the second and third."""
    folders = []
    for experiment, bias in ((tiny_experiment, (2.0, -9.0, -9.0)), (teacher, (-9.0, 2.0, 0.0))):
        model = build_model(experiment, len(training_data.classes))
        torch.nn.init.zeros_(model.head.detection.weight)
        with torch.no_grad():
            model.head.detection.bias[:] = torch.tensor(bias)
        folders.append(tmp_path / "runs" / experiment.name / "fold0")
        checkpoint = Checkpoint(experiment, training_data.classes, 0, trained_on={"code": {}})
        save_checkpoint(folders[-1], model, checkpoint)
    return folders


def test_an_ensemble_labels_soundscapes_and_another_network_is_trained_on_them(
    training_data, soundscapes, teachers, student, tmp_path, caplog
):
    path, _ = label_soundscapes(teachers, training_data, soundscapes, tmp_path, limits=ANY)
    labels = SoundscapeLabels.read(path, training_data.classes)
    assert [item["name"] for item in labels.soundscapes] == ["night/0.wav", "night/1.wav"]
    assert "broken.wav is left out" in caplog.text
    assert "copy.wav is left out: the same as night/1.wav" in caplog.text
    assert labels.soundscape.tolist() == [0, 0, 1, 1]
    hashes = [read_checkpoint(run).weights_sha256 for run in teachers]
    assert [item["weights_sha256"] for item in labels.members] == hashes
    logit = np.log(labels.probabilities / (1 - labels.probabilities))
    # In all four segments of the site: a quarter of what is above the other classes is taken off.
    assert logit[:, 0, 0] == pytest.approx([2.0 - 11 / 4, -9.0], abs=1e-3)
    data = replace(training_data, soundscape_labels=labels)
    runs = plan_runs([student], data, 0, tmp_path / "runs")
    (checkpoint,) = train_many(runs, data, OPTIONS)
    assert checkpoint.trained_on["soundscapes"] == labels.digest
    later, of_round_2 = label_soundscapes(
        [teachers[1], runs[0].folder], training_data, soundscapes, tmp_path, limits=ANY
    )
    assert (labels.round, of_round_2.round) == (1, 2)
    assert path.is_file() and later != path
    drift = replace(ANY, min_kept_share=100.0)
    with pytest.raises(ValueError, match="in round 2 have collapsed"):
        label_soundscapes([runs[0].folder], training_data, soundscapes, tmp_path, limits=drift)


@pytest.fixture
def student_rounds(monkeypatch, tiny_experiment, teacher):
    """Two rounds of students of the tiny experiment and of its teacher."""
    for base in (tiny_experiment, teacher):
        for number in (1, 2):
            name = f"{base.name}_student{number}"
            item = replace_nested(base, name=name, train={"student": {"share": 0.5}})
            monkeypatch.setitem(EXPERIMENTS, name, replace(item, augment=NO_AUGMENT))
        monkeypatch.setitem(EXPERIMENTS, base.name, base)
    return tiny_experiment, teacher


def test_rounds_of_students_learn_from_the_round_before_and_are_resumed(
    training_data, soundscapes, teachers, student_rounds, tmp_path
):
    runs = tmp_path / "runs"
    options = StudentOptions(soundscapes, 2, 0, training=replace(OPTIONS, resume=True), limits=ANY)
    given = {"output": tmp_path, "runs": runs, "options": options}
    rounds = list(train_rounds(student_rounds, training_data, **given))
    assert [item.labels.round for item in rounds] == [1, 2]
    names = [[run.experiment.name for run in item.runs] for item in rounds]
    assert names == [[f"{base.name}_student{k}" for base in student_rounds] for k in (1, 2)]
    first, second = rounds
    hashes = {checkpoint.weights_sha256 for checkpoint in first.checkpoints}
    assert {member["weights_sha256"] for member in second.labels.members} == hashes
    assert [item.trained_on["round"] for item in second.checkpoints] == [2, 2]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    again = list(train_rounds(student_rounds, training_data, **given))
    assert [item.labels.digest for item in again] == [item.labels.digest for item in rounds]
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    first_labels = labels_file(tmp_path, 1)
    first_labels.write_bytes(b"damaged")  # is labelled again, to the same labels
    one_round = {**given, "options": replace(options, n_rounds=1)}
    (repaired,) = train_rounds(student_rounds, training_data, **one_round)
    assert repaired.labels.digest == first.labels.digest


def test_labels_are_made_again_for_other_soundscapes_and_refused_where_these_have_labels(
    training_data, soundscapes, teachers, tmp_path
):
    given = (teachers, training_data, soundscapes, tmp_path)
    _, labels = label_soundscapes(*given, limits=ANY)
    cut = tmp_path / "labelled" / "cut.wav"
    cut.parent.mkdir()
    shutil.copyfile(soundscapes / "night" / "0.wav", cut)
    with pytest.raises(ValueError, match=r"night/0\.wav has sound of"):
        label_soundscapes(*given, limits=ANY, labelled=[cut.parent])
    sound, rate = soundfile.read(soundscapes / "night" / "0.wav")
    soundfile.write(soundscapes / "night" / "added.wav", sound[::-1], rate)
    _, with_added = label_soundscapes(*given, limits=ANY)
    assert len(with_added.soundscapes) == len(labels.soundscapes) + 1


def test_an_experiment_without_a_student_is_refused_before_it_labels(
    training_data, soundscapes, student_rounds, tmp_path
):
    options = StudentOptions(soundscapes, 3, 0)
    given = {"output": tmp_path, "runs": tmp_path / "runs", "options": options}
    with pytest.raises(ValueError, match="no student of round 3"):
        list(train_rounds(student_rounds, training_data, **given))


def test_birdnet_labels_soundscapes_and_any_network_is_trained_on_them(
    training_data, soundscapes, student, tmp_path
):
    names = scientific_names(training_data.classes, training_data.recordings)
    model = fake_birdnet([f"{name}_Bird" for name in names])
    data = replace(training_data, birdnet=WindowStore(tmp_path / "store", names, "fake"))
    path, _ = label_soundscapes(model, data, soundscapes, tmp_path, limits=ANY)
    assert path.name == "soundscape_labels_birdnet.safetensors"
    labels = SoundscapeLabels.read(path, training_data.classes)
    assert [item["name"] for item in labels.members] == ["BirdNET 2.4"]
    assert (labels.members[0]["weights_sha256"], labels.round) == ("fake", 1)
    expected = [
        predict_windows(model, soundscapes / item["name"], np.arange(3)).of_segments()
        for item in labels.soundscapes
    ]
    assert len(expected) == 2
    assert np.array_equal(labels.probabilities, np.concatenate(expected)[None])
    for experiment in (student, replace(student, name="BirdNET 2.5")):
        assert labels.teachers_of(experiment).tolist() == [True]
    data = replace(data, soundscape_labels=labels)
    (checkpoint,) = train_many(plan_runs([student], data, 0, tmp_path / "runs"), data, OPTIONS)
    assert checkpoint.trained_on["soundscapes"] == labels.digest
    n_runs = len(model.run.n_windows)
    label_soundscapes(model, data, soundscapes, tmp_path, limits=ANY)
    assert len(model.run.n_windows) == n_runs  # the windows were stored
    with pytest.raises(ValueError, match=r"in round 1 have collapsed"):
        label_soundscapes(model, data, soundscapes, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_teacher_of_other_classes_is_refused(training_data, soundscapes, tmp_path):
    other = fake_birdnet(["Nemo nemo_Nobody"])
    with pytest.raises(ValueError, match=r"BirdNET 2\.4 knows none of the 3 classes, such as "):
        label_soundscapes(other, training_data, soundscapes, tmp_path)


@pytest.mark.parametrize("arguments", [("--birdnet",), ("--birdnet", "--experiment", "small_gru")])
def test_birdnet_labels_soundscapes_only_and_alone(arguments, tmp_path, capsys):
    soundscapes = ["--soundscapes", str(tmp_path)] if len(arguments) > 1 else []
    with pytest.raises(SystemExit) as ended:
        main(["pseudo-label", "--data", str(tmp_path), *arguments, *soundscapes])
    assert ended.value.code == 2
    assert "--birdnet labels soundscapes" in capsys.readouterr().err


def test_soundscapes_with_labels_are_refused_by_their_audio(
    training_data, demo_folder, soundscapes, teachers, tmp_path
):
    example = next((demo_folder / "example_test_audio").glob("*.mp3"))
    shutil.copyfile(example, soundscapes / "renamed.mp3")
    with pytest.raises(ValueError, match=rf"renamed\.mp3 has sound of .*{example.name}"):
        label_soundscapes(teachers, training_data, soundscapes, tmp_path)
    (soundscapes / "renamed.mp3").unlink()
    recording = training_data.recordings["path"][0]
    shutil.copyfile(demo_folder / recording, soundscapes / "bird.mp3")
    with pytest.raises(ValueError, match=rf"bird\.mp3 is the recording {recording}"):
        label_soundscapes(teachers, training_data, soundscapes, tmp_path)
    (soundscapes / "bird.mp3").unlink()
    cut = tmp_path / "labelled" / "cut.flac"
    cut.parent.mkdir()
    sound, rate = soundfile.read(soundscapes / "night" / "0.wav", dtype="int16")
    soundfile.write(cut, sound[12_345 : 12_345 + 4 * rate], rate)
    with pytest.raises(ValueError, match=r"night/0\.wav has sound of .*cut\.flac"):
        label_soundscapes(teachers, training_data, soundscapes, tmp_path, labelled=[cut.parent])
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_without_sound_has_nothing_to_label(training_data, teachers, tmp_path):
    (tmp_path / "field").mkdir()
    (tmp_path / "field" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="field: no sound"):
        label_soundscapes(teachers, training_data, tmp_path / "field", tmp_path)


def test_labels_that_collapse_are_not_written(training_data, soundscapes, teachers, tmp_path):
    with pytest.raises(ValueError, match=rf"100% of them are {training_data.classes[0]}"):
        label_soundscapes(teachers[:1], training_data, soundscapes, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_collapse_is_told_by_the_distribution_of_the_labels():
    """By hand, of 40 classes: each of 40 segments names one; then one species, all, nothing."""
    classes = [f"bird{number:02}" for number in range(40)]
    good = LabelStatistics.of(0.3 * np.eye(40), classes)
    assert (good.probability, good.largest_share) == pytest.approx((0.3, 1 / 40))
    assert (good.n_species, good.mean_sum) == pytest.approx((40.0, 1.0))
    limits = CollapseLimits()
    good.require_no_collapse("A", limits)
    one = np.zeros((40, 40))
    one[:, 7] = 0.3
    for probabilities, reason in (
        (one, "100% of them are bird07"),
        (np.full((40, 40), 0.3), r"40\.0 of 40 species"),
        (0.001 * np.eye(40), r"nothing.* 0\.001"),
    ):
        with pytest.raises(ValueError, match=rf"labels of A have collapsed: .*{reason}"):
            LabelStatistics.of(probabilities, classes).require_no_collapse("A", limits)
    fewer = LabelStatistics.of(0.3 * np.eye(40)[np.arange(40) % 10], classes)
    assert fewer.n_species == pytest.approx(10.0)
    with pytest.raises(ValueError, match=r"10\.0 species.* were as 40\.0"):
        fewer.require_no_collapse("A", limits, good)
    assert json.loads(json.dumps(asdict(good))) == asdict(good)
