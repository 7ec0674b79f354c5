"""Soundscapes that people have labelled are trained on: clips and their frames have targets."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from helpers import RATE

from birdcall.__main__ import main
from birdcall.config import NO_AUGMENT, LossConfig, replace_nested
from birdcall.data.clips import ClipDataset, mix_frame_targets
from birdcall.data.dataset import TrainingData
from birdcall.data.loader import ClipBatch
from birdcall.data.soundscapes import SoundscapeLabels, SoundscapeTargets
from birdcall.data.targets import IGNORE_TARGET, PRESENT, ClipRequest, StrongTargets
from birdcall.evaluation.labelled import predict_labelled
from birdcall.inference.ensemble import load_ensemble
from birdcall.models.checkpoint import read_checkpoint
from birdcall.models.sed import SEDOutput, build_model
from birdcall.training.runs import plan_runs, train_many
from birdcall.training.step import BatchLoss, sed_loss
from birdcall.training.student import write_labels_of_people
from birdcall.training.trainer import RunOptions

CLASSES = ("amecro", "bkcchi", "norcar")
HEADER = "Filename,Start Time (s),End Time (s),Low Freq (Hz),High Freq (Hz),Species eBird Code"
UNKNOWN = [IGNORE_TARGET] * 3
pytestmark = pytest.mark.usefixtures("blank_previews")


@pytest.fixture
def annotated(tmp_path):
    """20 s: amecro from 1 to 2 s, norcar from 6 to 8, a bird nobody could name from 12 to 13."""
    folder = tmp_path / "ssw"
    (folder / "soundscape_data").mkdir(parents=True)
    noise = 0.1 * np.random.default_rng(5).standard_normal(20 * RATE).astype("f4")
    soundfile.write(folder / "soundscape_data" / "a.wav", noise, RATE, subtype="FLOAT")
    rows = ["a.wav,1,2,0,8000,amecro", "a.wav,6,8,0,8000,norcar", "a.wav,12,13,0,8000,????"]
    rows.append("a.wav,15.5,16,0,8000,aldfly")  # no class of the data
    (folder / "annotations.csv").write_text("\n".join([HEADER, *rows]))
    return folder


@pytest.fixture
def data(tmp_path):
    """Three recordings whose sound is constant."""
    recordings = pd.DataFrame(
        {
            "path": ["a", "b", "c"],
            "sha256": ["a", "b", "c"],
            "ebird_code": CLASSES,
            "secondary_codes": [()] * 3,
            "seconds": [10.0] * 3,
            "fold": [0, 1, 1],
        }
    )

    def read(request):
        n_samples = round(request.seconds * request.sample_rate)
        return [np.full(n_samples, 0.1, np.float32)] * len(request.offsets)

    return TrainingData(
        tmp_path, recordings, CLASSES, read, soundscape_cache=tmp_path / "soundscape_cache"
    )


@pytest.fixture
def student(tiny_experiment):
    """The tiny experiment; all clips are of soundscapes, as long as a segment."""
    changes = {"student": {"share": 1.0}, "data": {"clip_seconds": 5.0}}
    return replace(replace_nested(tiny_experiment, train=changes), augment=NO_AUGMENT)


# --- targets --------------------------------------------------------------------------------------


def test_a_clip_has_the_species_that_people_marked_in_it(annotated, data, student, tmp_path):
    path, labels = write_labels_of_people(data, annotated, tmp_path / "out")
    labels = SoundscapeLabels.read(path, CLASSES)
    targets = SoundscapeTargets(labels, student)
    generator = np.random.default_rng(0)
    drawn = [targets.draw(generator) for _ in range(300)]
    by_start = {start: target.tolist() for _, start, target in drawn}
    # Of the third segment nothing is known: it is never drawn. The fourth has a bird of no class.
    assert by_start == {0.0: [1, 0, 0], 5.0: [0, 0, 1], 15.0: [0, 0, 0]}


def test_a_clip_shorter_than_a_segment_has_what_lies_in_it(annotated, data, student, tmp_path):
    _, labels = write_labels_of_people(data, annotated, tmp_path / "out")
    short = replace_nested(student, train={"data": {"clip_seconds": 2.0}})
    targets = SoundscapeTargets(labels, short)
    generator = np.random.default_rng(0)
    drawn = [targets.draw(generator) for _ in range(300)]
    first = {start: target[0] for _, start, target in drawn if start < 5}
    for start, target in first.items():
        overlap = min(2, start + 2) - max(1, start)
        expected = 1 if overlap >= 0.5 else IGNORE_TARGET if overlap > 0 else 0
        assert target == expected
    assert set(first.values()) == {0, 1, IGNORE_TARGET}


def test_an_unknown_bird_may_be_of_any_class_that_is_not_marked():
    table = pd.DataFrame(
        {
            "filename": "a",
            "ebird_code": ["norcar", "????"],
            "onset": [1.0, 1.5],
            "offset": [3.0, 2.0],
            "state": PRESENT,
        }
    )
    strong = StrongTargets(pd.DataFrame({"filename": ["a", "b"]}), CLASSES, table)
    assert strong.find(0, 0.0, 5.0).tolist() == [IGNORE_TARGET, IGNORE_TARGET, 1]
    assert strong.find(0, 2.0, 5.0).tolist() == [0, 0, 1]
    # Frames of half a second, from 0.5 s on.
    frames = strong.find_frames(0, 0.5, 6, 0.5).T.tolist()
    here = [0, 0, 1]
    assert frames == [[0] * 3, here, [IGNORE_TARGET, IGNORE_TARGET, 1], here, here, [0] * 3]
    assert not strong.find_frames(1, 0.0, 6, 0.5).any()


def test_frames_of_a_clip_have_targets_and_those_of_recordings_none(
    annotated, data, student, tmp_path
):
    _, labels = write_labels_of_people(data, annotated, tmp_path / "out")
    half = replace_nested(student, train={"student": {"share": 0.5}})
    dataset = ClipDataset(replace(data, soundscape_labels=labels), half)
    clips = dataset.make_clips([ClipRequest(0, n, n % 3) for n in range(60)])
    by_name = {True: set(), False: set()}
    for clip in clips:
        assert clip.frames.shape == (3, 50)
        by_name[clip.recording == "soundscape_data/a.wav"].add(clip.frames.numpy().tobytes())
    unknown = np.full((3, 50), IGNORE_TARGET, np.float32)
    assert by_name[False] == {unknown.tobytes()}
    amecro, norcar, nothing = (np.zeros((3, 50), np.float32) for _ in range(3))
    amecro[0, 10:20] = 1  # 1 to 2 s
    norcar[2, 10:30] = 1  # 6 to 8 s, of the clip from 5 s on
    assert by_name[True] == {item.tobytes() for item in (amecro, norcar, nothing)}


def test_rows_without_times_give_targets_to_clips_and_none_to_frames(data, student, tmp_path):
    folder = tmp_path / "clef"
    (folder / "train_soundscapes").mkdir(parents=True)
    noise = 0.1 * np.random.default_rng(6).standard_normal(15 * RATE).astype("f4")
    soundfile.write(folder / "train_soundscapes" / "1_COR_20190904.wav", noise, RATE)
    rows = [
        "row_id,site,audio_id,seconds,birds",
        "1_COR_5,COR,1,5,amecro",
        "1_COR_15,COR,1,15,nocall",
    ]
    (folder / "train_soundscape_labels.csv").write_text("\n".join(rows))
    _, labels = write_labels_of_people(data, folder, tmp_path / "out")
    targets = SoundscapeTargets(labels, student)
    generator = np.random.default_rng(0)
    by_start = {
        start: target.tolist() for _, start, target in (targets.draw(generator) for _ in range(200))
    }
    assert by_start == {0.0: [1, 0, 0], 10.0: [0, 0, 0]}  # no clip of the segment without a row
    assert targets.find_frames(0, 0.0) is None


# --- mixing and loss ------------------------------------------------------------------------------


def test_frames_are_mixed_and_shifted_as_the_sound_is():
    frames = torch.tensor([[[1.0, 0, 0, 0]], [[0.0, 0, 1, 0]], [[IGNORE_TARGET] * 4]])
    draws = SimpleNamespace(
        index=torch.arange(3),
        partners=torch.tensor([[1, 2], [2, 0], [0, 0]]),
        shift=torch.tensor([0.0, 0.25, 0.0]),
    )
    scale = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    mixed = mix_frame_targets(frames, draws, scale)
    assert mixed[0].tolist() == [[1, 0, 1, 0]]
    # Its partner has no times: only what is present is known. Then a quarter later.
    assert mixed[1].tolist() == [[-1, -1, -1, 1]]
    assert mixed[2].tolist() == [[-1] * 4]


def test_the_loss_of_frames_is_the_cross_entropy_of_those_with_targets():
    """By hand: one class, two known frames of four, the other two unknown."""
    output = SEDOutput(
        clipwise=torch.full((1, 1), 0.5), framewise=torch.tensor([[[0.8, 0.4, 0.9, 0.9]]])
    )
    target, config = torch.ones(1, 1), LossConfig(framewise_weight=0.5)
    frames = torch.tensor([[[1.0, 0, IGNORE_TARGET, IGNORE_TARGET]]])
    without, with_frames = (
        sed_loss(output, target, config, frames=item) for item in (None, frames)
    )
    expected = 0.5 * (-np.log(0.8) - np.log(0.6)) / 2
    assert float(with_frames - without) == pytest.approx(expected, abs=1e-6)
    unknown = torch.full((1, 1, 4), IGNORE_TARGET)
    assert sed_loss(output, target, config, frames=unknown) == without
    twice = frames.repeat_interleave(2, dim=-1)  # finer than the network's frames
    assert sed_loss(output, target, config, frames=twice) == with_frames


def test_a_training_step_adds_the_loss_of_the_frames(student):
    torch.manual_seed(0)
    loss_of = BatchLoss(build_model(student, 3).eval(), student, torch.device("cpu"))
    n_samples = student.clip_samples
    batch = ClipBatch(
        waveform=0.1 * torch.randn(2, n_samples),
        target=torch.zeros(2, 3),
        weight=torch.ones(2),
        recordings=("a", "b"),
        failures=(),
    )
    frames = torch.full((2, 3, 50), IGNORE_TARGET)
    with torch.no_grad():
        without, unknown = (
            float(loss_of(batch._replace(frames=item), 0, 0)) for item in (None, frames)
        )
        frames[0, 1, 10:20] = 1.0
        known = float(loss_of(batch._replace(frames=frames), 0, 0))
    assert unknown == without < known


# --- leakage --------------------------------------------------------------------------------------


def test_a_run_is_not_scored_on_a_soundscape_whose_labels_it_learnt(
    annotated, training_data, tiny_experiment, tmp_path
):
    (annotated / "annotations.csv").write_text(f"{HEADER}\na.wav,1,2,0,8000,amecro\n")
    path, _ = write_labels_of_people(training_data, annotated, tmp_path / "out")
    labels = SoundscapeLabels.read(path, training_data.classes)
    student = replace_nested(tiny_experiment, name="student", train={"student": {"share": 0.5}})
    trained = replace(training_data, soundscape_labels=labels)
    (run,) = plan_runs([student], trained, 0, tmp_path / "runs")
    train_many([run], trained, RunOptions(workers=0))
    copy = tmp_path / "copy"
    copy.mkdir()
    waveform, rate = soundfile.read(annotated / "soundscape_data" / "a.wav", dtype="float32")
    soundfile.write(copy / "other name.w64", waveform, rate, subtype="FLOAT")
    (copy / "other name.txt").write_text("1.0\t2.0\tamecro\n")
    ensemble = load_ensemble([run.folder])
    for folder in (annotated, copy):
        with pytest.raises(ValueError, match="student-fold0 was trained on"):
            predict_labelled(ensemble, [folder])
    assert read_checkpoint(run.folder).trained_on["round"] == 0


def test_labelled_soundscapes_are_refused_in_a_training(annotated, data, tmp_path):
    with pytest.raises(ValueError, match=r"a\.wav has sound of .*a\.wav"):
        write_labels_of_people(data, annotated, tmp_path / "out", labelled=[annotated])
    assert not (tmp_path / "out").exists()


def test_labels_of_no_species_are_counted(annotated, data, tmp_path, caplog):
    rows = ("a.wav,1,2,0,8000,amecro", "a.wav,3,4,0,8000,sqrl", "a.wav,5,6,0,8000,sqrl")
    (annotated / "annotations.csv").write_text("\n".join([HEADER, *rows, ""]))
    _, labels = write_labels_of_people(data, annotated, tmp_path / "out")
    assert len(labels.events) == 1
    assert "sqrl 2" in caplog.text


def test_a_folder_that_is_not_there_shares_sound_with_nothing(annotated, data, tmp_path):
    """A name with a slip would let labelled soundscapes into a training."""
    for arguments in ({"labelled": [tmp_path / "nowhere"]}, {"folder": tmp_path / "nowhere"}):
        with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
            write_labels_of_people(
                data, **{"folder": annotated, "output": tmp_path / "out", **arguments}
            )
    assert not (tmp_path / "out").exists()


# --- the command ----------------------------------------------------------------------------------


def test_annotated_needs_soundscapes_and_no_model(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["pseudo-label", "--data", str(tmp_path), "--annotated"])
    assert "--soundscapes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--labelled", "."), ("--label-column", "Species")], ids=lambda item: item[0]
)
def test_an_option_that_would_not_be_read_is_refused(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["pseudo-label", "--data", str(tmp_path), *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_the_command_writes_labels_that_a_training_reads(
    annotated, demo_folder, tables, training_data, tmp_path, capsys
):
    folds, audit = tables
    output = tmp_path / "output"
    output.mkdir()
    shutil.copy(audit, output)
    arguments = ["--data", str(demo_folder), "--folds", str(folds), "--output", str(output)]
    with pytest.raises(SystemExit) as end:
        main(["pseudo-label", *arguments, "--soundscapes", str(annotated), "--annotated"])
    assert not end.value.code, capsys.readouterr().err
    path = output / "soundscape_labels_people.safetensors"
    assert str(path) in capsys.readouterr().out
    labels = SoundscapeLabels.read(path, training_data.classes)
    assert [item["name"] for item in labels.soundscapes] == ["soundscape_data/a.wav"]
    assert len(labels.events) > 0
