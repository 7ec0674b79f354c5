"""Shared test data: a tiny demo data set, models too small to be good, the real recordings."""

from __future__ import annotations

import os
import shutil

# Tests run side by side; more threads than cores make each of them many times slower. Libraries
# read this when they are imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import SCRIPT
from shortened import shorten_previews

from birdcall.config import Experiment, ModelConfig, replace_nested
from birdcall.data.audit import audit_recordings
from birdcall.data.dataset import TrainingData, load_training_data
from birdcall.data.folds import make_folds, write_folds
from birdcall.data.recordings import audio_hashes, read_recordings, usable_recordings
from birdcall.demo.plan import DemoConfig
from birdcall.demo.writer import make_demo
from birdcall.evaluation.mistakes import find_mistakes, predict_mistakes, write_labelled_pages
from birdcall.evaluation.predict import HeldOutOptions, HeldOutPredictions, predict_held_out
from birdcall.evaluation.scoring import Evaluation, evaluate
from birdcall.evaluation.simulation import SimulationConfig
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision
from birdcall.kaggle.packaging import StagingOptions, stage_package
from birdcall.models.checkpoint import read_checkpoint
from birdcall.report.report import PAGES_FOLDER, write_report
from birdcall.report.soundscape import SoundscapePageWriter
from birdcall.training.runs import plan_runs, train_many
from birdcall.training.trainer import RunOptions

CORNELL_MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "cornell-mini"


@pytest.fixture(autouse=True)
def _one_thread():
    """A test may set another number of threads; the next test has one again."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cornell_mini() -> Path:
    """The real recordings beside the project; skips where they are absent."""
    if not CORNELL_MINI.is_dir():
        pytest.skip("the real recordings (cornell-mini) are not beside this checkout")
    return CORNELL_MINI


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that makes a folder once for all test processes; tests leave it as it is.

    The process that comes second waits for the folder, and uses it.
    """
    together = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        together = together.parent

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = together / name, together / f"{name}.made"
        with FileLock(together / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failure has left
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    """A network of a few thousand weights on two-second clips."""
    small = find_experiment("small_gru")
    return replace_nested(
        small,
        name="tiny",
        frontend=replace(small.frontend, n_mels=32, hop_length=1000),
        model=ModelConfig(
            backbone="test_byobnet", pretrained=False, temporal="gru", temporal_size=16, dropout=0.0
        ),
        train={
            "epochs": 2,
            "data": {"clip_seconds": 2.0, "batch_size": 4, "clips_per_epoch": 8},
        },
    )


@pytest.fixture(scope="session")
def demo_folder(make_once) -> Path:
    """A demo of three species: some minutes of sound in every file of the competition."""
    config = DemoConfig(
        n_species=3,
        recordings_per_species=(5, 7),
        recording_seconds=(4.0, 7.0),
        n_recordists=8,
        n_examples=2,
        n_site_1=1,
        n_site_2=1,
        n_site_3=2,
        soundscape_seconds=30.0,
        site_3_seconds=20.0,
        n_noise=2,
    )
    return make_once("input", lambda made: make_demo(made / "tiny", config, workers=1)) / "tiny"


@pytest.fixture(scope="session")
def tables(demo_folder, make_once, tmp_path_factory) -> tuple[Path, Path]:
    """The paths of the folds (two) and of the audit of the tiny demo.

    Beside them lies the cache of recordings, which each process has for itself.
    """

    def write_tables(folder: Path) -> None:
        recordings = read_recordings(demo_folder)
        audit = audit_recordings(demo_folder, recordings, folder / "audit.csv", workers=1)
        usable = usable_recordings(recordings, audit)
        folds = make_folds(usable, 2, audio_hashes=audio_hashes(usable, audit))
        write_folds(folds, folder / "folds.csv")

    output = tmp_path_factory.mktemp("output")
    shutil.copytree(make_once("tables", write_tables), output, dirs_exist_ok=True)
    return output / "folds.csv", output / "audit.csv"


@pytest.fixture(scope="session")
def training_data(demo_folder, tables) -> TrainingData:
    """The tiny demo, audited and in two folds."""
    folds, audit = tables
    return load_training_data(demo_folder, folds=folds, audit=audit, cache=audit.parent / "cache")


@pytest.fixture(scope="session")
def trained_runs(training_data, tiny_experiment, make_once) -> list[Path]:
    """The folders of two tiny experiments' runs on both folds, in order of name."""

    def train(runs: Path) -> None:
        torch.set_num_threads(1)
        other = replace(tiny_experiment, name="other", train=replace(tiny_experiment.train, seed=4))
        planned = plan_runs([tiny_experiment, other], training_data, None, runs)
        with pytest.MonkeyPatch.context() as patch:
            shorten_previews(patch)
            train_many(planned, training_data, RunOptions(workers=0))

    return sorted(make_once("runs", train).glob("*/*"))


@pytest.fixture(scope="session")
def held_out_options(trained_runs, training_data, make_once, tmp_path_factory) -> HeldOutOptions:
    """Short simulated soundscapes, and a cache that tests share: audio is predicted once."""
    simulation = SimulationConfig(n_soundscapes=4, soundscape_seconds=30.0)
    options = HeldOutOptions(simulation=simulation)

    def predict(folder: Path) -> None:
        predict_held_out(trained_runs, training_data, replace(options, cache_folder=folder))

    folder = tmp_path_factory.mktemp("predictions")
    shutil.copytree(make_once("predictions", predict), folder, dirs_exist_ok=True)
    return replace(options, cache_folder=folder)


@pytest.fixture(scope="session")
def held_out(trained_runs, training_data, held_out_options) -> HeldOutPredictions:
    """Predictions of two experiments on held-out audio."""
    return predict_held_out(trained_runs, training_data, held_out_options)


@pytest.fixture(scope="session")
def package(trained_runs, make_once) -> Path:
    """The dataset folder of a package of two members; tests leave it as it is."""
    runs = trained_runs[:2]
    checkpoints = [read_checkpoint(run) for run in runs]
    decision = Decision(
        0.3,
        0.3,
        max_birds=2,
        neighbour_weight=0.25,
        members=tuple(item.name for item in checkpoints),
        weights={item.name: item.weights_sha256 for item in checkpoints},
    )

    def stage(folder: Path) -> None:
        stage_package(runs, decision, StagingOptions(SCRIPT, folder / "build", "somebody"))

    return make_once("package", stage) / "build" / "dataset"


@pytest.fixture(scope="session")
def evaluation(held_out) -> Evaluation:
    """The evaluation of two experiments, and of both as an ensemble that is asked for by name."""
    return evaluate(held_out, [("tiny", "other")])


@pytest.fixture(scope="session")
def write_report_of():
    """Predict what a report shows and write it with its soundscape pages, as the command does."""

    def write(path, title, held_out, evaluation, n_pages=20) -> dict[str, Path]:
        page_writer = SoundscapePageWriter(
            folder=path.parent / PAGES_FOLDER,
            decision=evaluation.ensemble.decision,
            classes=evaluation.classes,
            members=tuple(member.name for member in held_out.ensemble.members),
            home="../report.html",
        )
        pages = write_labelled_pages(held_out, evaluation, page_writer, n_pages)
        mistakes = list(predict_mistakes(held_out, find_mistakes(held_out, evaluation.ensemble)))
        write_report(path, title, evaluation, mistakes=mistakes, pages=pages)
        return pages

    return write


@pytest.fixture
def blank_previews(monkeypatch):
    """Trainings of this test draw no pictures of their clips."""
    shorten_previews(monkeypatch)
