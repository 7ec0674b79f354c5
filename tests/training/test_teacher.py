"""BirdNET's embeddings are a second thing to learn, beside the labels."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from helpers import RATE, fake_birdnet
from torch.nn import functional

from birdcall.__main__ import main
from birdcall.config import NO_AUGMENT, TeacherConfig, replace_nested
from birdcall.data.augment import BatchDraws, mix_scale
from birdcall.data.birdnet import (
    EMBEDDING_SIZE,
    MODEL_SHA256,
    WindowStore,
    read_clip,
    scientific_names,
)
from birdcall.data.clips import ClipDataset, mix_embeddings, mix_targets
from birdcall.data.loader import ClipBatch
from birdcall.data.soundscapes import CollapseLimits
from birdcall.data.targets import IGNORE_TARGET, ClipRequest
from birdcall.experiments import EXPERIMENTS
from birdcall.models.checkpoint import read_checkpoint
from birdcall.models.sed import build_model
from birdcall.training.runs import TrainingInterrupted, plan_runs, train_many, train_run
from birdcall.training.step import BatchLoss, cosine_loss, sed_loss
from birdcall.training.student import label_soundscapes
from birdcall.training.trainer import Run, RunOptions, start_training

CPU = torch.device("cpu")
OPTIONS = RunOptions(workers=0)
pytestmark = pytest.mark.usefixtures("blank_previews")


@pytest.fixture(scope="module")
def taught(tiny_experiment):
    return replace_nested(tiny_experiment, name="taught", train={"teacher": {"weight": 3.0}})


@pytest.fixture(scope="module")
def model(training_data):
    names = scientific_names(training_data.classes, training_data.recordings)
    return fake_birdnet([f"{name}_Bird" for name in names])


@pytest.fixture
def without_embeddings(training_data, model, tmp_path):
    names = scientific_names(training_data.classes, training_data.recordings)
    return replace(training_data, birdnet=WindowStore(tmp_path / "store", names, model.sha256))


def embed(data, model):
    for kind, files in data.files_to_embed().items():
        dict(data.birdnet.part(kind).predict(model, files))
    return data


@pytest.fixture(scope="module")
def embedded(training_data, model, tmp_path_factory):
    """The tiny demo with embeddings of all its recordings."""
    names = scientific_names(training_data.classes, training_data.recordings)
    folder = tmp_path_factory.mktemp("birdnet")
    return embed(replace(training_data, birdnet=WindowStore(folder, names, model.sha256)), model)


# --- loss ---------------------------------------------------------------------------------------


def test_the_loss_is_one_less_the_cosine_and_clips_without_embedding_add_nothing():
    projected = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [5.0, 5.0]])
    embedding = torch.tensor([[1.0, 0.0], [4.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    expected = (0 + 1 + (1 - 0.5**0.5) + 0) / 4
    assert cosine_loss(projected, embedding).item() == pytest.approx(expected)
    projected.requires_grad_()
    cosine_loss(projected, embedding).backward()
    assert not projected.grad[3].any() and projected.grad[1].any()


def test_a_mix_has_its_parts_embeddings_by_their_gain_or_none():
    """By hand: clip 0 gets clip 1 at half its level; clip 1 gets 2 and 0; clip 2 gets nothing."""
    draws = replace(
        BatchDraws.draw(3, NO_AUGMENT, torch.Generator().manual_seed(0)),
        partners=torch.tensor([[1, 2], [2, 0], [0, 1]]),
        mix_gain=torch.tensor([[0.5, 0.0], [1.0, 2.0], [0.0, 0.0]]),
    )
    waveform = torch.tensor([[1.0, -1.0], [4.0, -4.0], [0.5, 0.5]])
    scale = mix_scale(waveform, draws)
    embedding = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    mixed = mix_embeddings(embedding, draws, scale)
    assert mixed.tolist() == [[1.0, 1.0], [5.0, 5.0], [3.0, 3.0]]
    embedding[2] = 0  # noise, for example
    assert mix_embeddings(embedding, draws, scale).tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    waveform[1] = 0  # silent: it is not added
    assert mix_embeddings(embedding, draws, mix_scale(waveform, draws))[0].tolist() == [1.0, 0.0]


def test_the_cosine_loss_of_the_mean_features_is_added_by_its_weight(taught):
    torch.manual_seed(0)
    experiment = replace(taught, augment=NO_AUGMENT)
    model = build_model(experiment, 3).eval()
    waveform, target = 0.1 * torch.randn(2, 64_000), torch.eye(3)[:2]
    embedding = torch.rand(2, EMBEDDING_SIZE)
    batch = ClipBatch(waveform, target, torch.ones(2), ("a", "b"), (), embedding)
    batch_loss = BatchLoss(model, experiment, CPU)
    features = model.features(model.frontend(waveform))
    projected = batch_loss.projection(features.mean(dim=2))
    cosine = functional.cosine_similarity(projected, embedding)
    labels = sed_loss(model.head(features), target, experiment.train.loss)
    expected = labels + 3.0 / 3 * (1 - cosine).mean()
    torch.testing.assert_close(batch_loss(batch, epoch=0, position=0), expected)
    plain = replace_nested(experiment, train={"teacher": {"weight": 0.0}})
    torch.testing.assert_close(BatchLoss(model, plain, CPU)(batch, epoch=0, position=0), labels)


def test_a_weight_below_zero_and_a_share_above_one_are_refused():
    with pytest.raises(ValueError, match=r"weight is -1\.0; it must not be negative"):
        TeacherConfig(weight=-1.0)
    with pytest.raises(ValueError, match=r"label_share is 1\.5"):
        TeacherConfig(label_share=1.5)


# --- clips --------------------------------------------------------------------------------------


def test_a_clip_of_a_recording_has_the_embedding_of_its_part_of_it(embedded, taught):
    plain = replace(taught, augment=NO_AUGMENT)
    dataset = ClipDataset(embedded, plain)
    clips = dataset.make_clips([ClipRequest(0, position, position % 5) for position in range(20)])
    files = dict(zip(embedded.recordings["path"], range(len(embedded.recordings)), strict=True))
    clip_seconds = plain.train.data.clip_seconds
    for position, clip in enumerate(clips):
        index = files[clip.recording]
        generator = np.random.default_rng((plain.train.seed, 0, position))
        generator.random()  # of its source
        start = generator.random() * (dataset.seconds[index] - clip_seconds)
        path = embedded.birdnet.part("recordings").path(
            clip.recording, embedded.folder / clip.recording
        )
        expected, _ = read_clip(path, start, clip_seconds)
        assert expected.any() and clip.embedding.numpy() == pytest.approx(expected)


def test_noise_has_no_embedding_and_plain_clips_have_none_at_all(embedded, taught):
    noisy = replace(taught, augment=replace(NO_AUGMENT, noise_only_probability=1.0))
    (clip,) = ClipDataset(embedded, noisy).make_clips([ClipRequest(0, 0, 0)])
    assert clip.recording == "noise"
    assert clip.embedding.shape == (EMBEDDING_SIZE,) and not clip.embedding.any()
    plain = replace_nested(noisy, train={"teacher": {"weight": 0.0}})
    (clip,) = ClipDataset(embedded, plain).make_clips([ClipRequest(0, 0, 0)])
    assert clip.embedding is None


def test_targets_have_a_share_of_what_the_teacher_finds_in_the_clip():
    """By hand: present and not found, ignored, found beside the labels, unknown to the teacher."""
    target = np.array([1.0, IGNORE_TARGET, 0.0, 0.5, IGNORE_TARGET], np.float32)
    probabilities = np.array([0.25, 0.5, 0.75, 0.0, 0.0], np.float32)
    expected = [0.25 * 1.0 + 0.75 * 0.25, 0.5, 0.75 * 0.75, 0.5, IGNORE_TARGET]
    assert mix_targets(target, probabilities, 0.75).tolist() == expected
    assert mix_targets(target, probabilities, 0.0) is target


def test_a_clip_of_a_recording_is_labelled_by_the_teacher_too(embedded, taught):
    plain = replace(taught, augment=NO_AUGMENT)
    told = replace_nested(plain, train={"teacher": {"weight": 0.0, "label_share": 0.5}})
    requests = [ClipRequest(0, position, position % 5) for position in range(10)]
    pairs = zip(
        *(ClipDataset(embedded, each).make_clips(requests) for each in (plain, told)), strict=True
    )
    for clip, labelled in pairs:
        assert torch.equal(clip.waveform, labelled.waveform)
        store = embedded.birdnet.part("recordings")
        stored = store.path(clip.recording, embedded.folder / clip.recording)
        (index,) = np.flatnonzero(embedded.recordings["path"] == clip.recording)
        every = read_clip(stored, 0.0, embedded.recordings["seconds"][index])[1]
        change = labelled.target.numpy() - clip.target.numpy()
        assert np.abs(change).max() > 0.01
        # No clip has more of a class than the whole recording.
        assert (labelled.target.numpy() <= 0.5 * clip.target.numpy() + 0.5 * every + 1e-6).all()


# --- runs ---------------------------------------------------------------------------------------


def test_without_embeddings_a_taught_run_is_refused_before_the_first_run(
    without_embeddings, tiny_experiment, taught, model, tmp_path
):
    data = without_embeddings
    runs = plan_runs([tiny_experiment, taught], data, 0, tmp_path / "runs")
    first = data.folder / data.recordings["path"][0]
    n = len(data.recordings)
    with pytest.raises(ValueError, match=rf"{n} of {n} recordings.* as {first}: `birdcall embed"):
        train_many(runs, data, OPTIONS)
    embed(data, model)
    data.birdnet.part("recordings").path(data.recordings["path"][0], first).unlink()
    with pytest.raises(ValueError, match=rf"1 of {n} recordings have none, such as {first}"):
        train_many(runs, data, OPTIONS)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    with pytest.raises(ValueError, match="taught cannot be taught in a kernel"):
        replace(data, birdnet=None).require_sound_for(taught)


def test_at_weight_0_it_trains_to_the_same_bits_as_without_embeddings(
    embedded, tiny_experiment, trained_runs, tmp_path
):
    (run,) = plan_runs([tiny_experiment], embedded, 0, tmp_path)
    train_many([run], embedded, OPTIONS)
    (plain,) = [folder for folder in trained_runs if folder.parts[-2:] == ("tiny", "fold0")]
    for name in ("model.safetensors", "model.json"):
        assert (run.folder / name).read_bytes() == (plain / name).read_bytes()
    assert read_checkpoint(run.folder).trained_on["teacher"] is None


def test_a_taught_run_that_is_interrupted_ends_with_the_same_bits(embedded, taught, tmp_path):
    experiment = replace_nested(
        taught, model={"dropout": 0.3}, train={"optimizer": {"ema_decay": 0.9}}
    )
    whole, parts = (Run(experiment, 0, tmp_path / name) for name in ("whole", "parts"))
    checkpoint = train_run(whole, embedded, OPTIONS)
    n_interruptions = 0
    while True:
        try:
            train_run(parts, embedded, replace(OPTIONS, resume=True, deadline=0.0))
            break
        except TrainingInterrupted:
            n_interruptions += 1
    assert n_interruptions == 4
    for name in ("model.safetensors", "model.json"):
        assert (parts.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert checkpoint.trained_on["teacher"] == "fake"


def test_the_projection_is_trained_and_saved_with_the_state_only(embedded, taught, tmp_path):
    train_part, _ = embedded.split(0)
    training = start_training(Run(taught, 0, tmp_path), embedded, train_part, OPTIONS)
    before = training.batch_loss.projection.weight.clone()
    dropout = torch.get_rng_state()
    plain = replace_nested(taught, train={"teacher": {"weight": 0.0}})
    other = start_training(Run(plain, 0, tmp_path), embedded, train_part, OPTIONS)
    assert torch.equal(dropout, torch.get_rng_state())
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name])
    for _ in training.steps():
        pass
    assert not torch.equal(before, training.batch_loss.projection.weight)
    state = training.tensors.collect()
    assert torch.equal(state["projection.weight"], training.batch_loss.projection.weight)
    assert not [name for name in training.model.state_dict() if "projection" in name]


def test_soundscapes_of_a_taught_student_need_embeddings_too(embedded, taught, model, tmp_path):
    folder = tmp_path / "field"
    folder.mkdir()
    samples = np.random.default_rng(0).normal(0, 0.1, 7 * RATE)
    soundfile.write(folder / "1.wav", samples, RATE)
    limits = CollapseLimits(0.0, 1.0, 1e9, 1.0, 0.0)
    _, labels = label_soundscapes(model, embedded, folder, tmp_path, limits=limits)
    data = replace(embedded, soundscape_labels=labels)
    student = replace_nested(taught, train={"student": {"share": 1.0}}, name="taught_student")
    student = replace(student, augment=NO_AUGMENT)
    (clip,) = ClipDataset(data, student).make_clips([ClipRequest(0, 0, 0)])
    assert clip.recording == "1.wav" and clip.embedding.any()
    mixed = replace_nested(student, train={"student": {"mode": "mix"}})
    (clip,) = ClipDataset(data, mixed).make_clips([ClipRequest(0, 0, 0)])
    assert not clip.embedding.any()  # of two sounds
    data.birdnet.part("soundscapes").path("1.wav", folder / "1.wav").unlink()
    with pytest.raises(ValueError, match=r"1 of 1 soundscapes have none.* --soundscape-labels"):
        data.require_sound_for(student)
    data.require_sound_for(taught)


# --- command ------------------------------------------------------------------------------------


def test_embed_stores_what_taught_experiments_need(
    training_data, tables, taught, model, tmp_path, monkeypatch, capsys
):
    real = replace(model, sha256=MODEL_SHA256)
    monkeypatch.setattr("birdcall.data.birdnet.open_birdnet", lambda: real)
    folds, audit = tables
    output = tmp_path / "output"
    output.mkdir()
    (output / "audit.csv").write_bytes(audit.read_bytes())
    arguments = ["--data", str(training_data.folder), "--output", str(output)]
    arguments += ["--folds", str(folds)]
    with pytest.raises(SystemExit) as ended:
        main(["embed", *arguments])
    assert ended.value.code == 0
    n = len(training_data.recordings)
    assert f"{n} of {n} recordings have embeddings" in capsys.readouterr().out
    names = scientific_names(training_data.classes, training_data.recordings)
    store = WindowStore(output / "cache" / "birdnet", names)
    replace(training_data, birdnet=store).require_sound_for(taught)


def test_taught_experiments_differ_in_their_teacher_only():
    for name in ("lite0_plain", "lite0_gru"):
        base, experiment = EXPERIMENTS[name], EXPERIMENTS[f"{name}_taught"]
        assert experiment.train.teacher.weight > 0
        plain = replace_nested(experiment, train={"teacher": {"weight": 0.0}})
        assert replace(plain, name=base.name, description=base.description) == base
        assert "CC BY-NC-SA" in experiment.description
