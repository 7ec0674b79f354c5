"""Many runs: nothing is overwritten unasked, finished runs are kept, parallel runs are the same."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest

from birdcall.config import replace_nested
from birdcall.models.checkpoint import STATE_FILE, read_checkpoint
from birdcall.storage.files import locked
from birdcall.training import runs as runs_module
from birdcall.training.distributed import DistributedContext
from birdcall.training.runs import TrainingInterrupted, plan_runs, runs_table, train_many
from birdcall.training.trainer import RunOptions

OPTIONS = RunOptions(workers=0)
pytestmark = pytest.mark.usefixtures("blank_previews")


@pytest.fixture
def finished(trained_runs, tmp_path):
    """A folder with the finished run of the tiny experiment's fold 0."""
    (source,) = [folder for folder in trained_runs if folder.parts[-2:] == ("tiny", "fold0")]
    shutil.copytree(source, tmp_path / "tiny" / "fold0")
    return tmp_path


def test_runs_are_planned_by_experiment_and_fold(training_data, tiny_experiment, tmp_path):
    other = replace(tiny_experiment, name="other")
    runs = plan_runs([tiny_experiment, other], training_data, None, tmp_path)
    assert [run.folder.relative_to(tmp_path).as_posix() for run in runs] == [
        *("tiny/fold0", "tiny/fold1", "other/fold0", "other/fold1")
    ]
    assert [run.fold for run in plan_runs([other], training_data, 1, tmp_path)] == [1]


def test_a_trained_run_is_not_overwritten_unasked(training_data, tiny_experiment, finished):
    first = plan_runs([tiny_experiment], training_data, 0, finished)
    both = plan_runs([tiny_experiment], training_data, None, finished)
    with pytest.raises(ValueError, match="holds a trained run already; --overwrite"):
        train_many(both, training_data, OPTIONS)
    assert not both[1].folder.exists()
    written = (first[0].folder / "model.safetensors").stat().st_mtime_ns
    train_many(first, training_data, replace(OPTIONS, overwrite=True))
    assert (first[0].folder / "model.safetensors").stat().st_mtime_ns > written


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_run_that_another_process_trains_is_left_to_it(
    training_data, tiny_experiment, finished, option
):
    """It is refused before the first run starts."""
    pytest.importorskip("fcntl")
    runs = plan_runs([tiny_experiment], training_data, None, finished)
    half_written = runs[1].folder / ".state.0123456789abcdef.safetensors"
    half_written.parent.mkdir()
    half_written.touch()
    written = (runs[0].folder / "model.safetensors").stat().st_mtime_ns
    with locked(runs[1].folder), pytest.raises(OSError, match=rf"fold1: process {os.getpid()} on"):
        train_many(runs, training_data, replace(OPTIONS, **{option: True}))
    assert (runs[0].folder / "model.safetensors").stat().st_mtime_ns == written
    assert half_written.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_has_finished_meanwhile_is_not_trained_over(
    training_data, tiny_experiment, finished, monkeypatch, resume
):
    runs = plan_runs([tiny_experiment], training_data, None, finished)
    shutil.move(runs[0].folder, finished / "finished")

    def finish_next(run, *_):
        assert run is runs[0]
        shutil.copytree(finished / "finished", runs[1].folder)

    monkeypatch.setattr(runs_module, "train_run", finish_next)
    with pytest.raises(ValueError, match="fold1: another command has trained this run"):
        train_many(runs, training_data, replace(OPTIONS, resume=resume))


def test_a_finished_run_is_kept_when_others_are_resumed(training_data, tiny_experiment, finished):
    both = plan_runs([tiny_experiment], training_data, None, finished)
    before = read_checkpoint(both[0].folder)
    written = (both[0].folder / "model.safetensors").stat().st_mtime_ns
    kept, trained = train_many(both, training_data, replace(OPTIONS, resume=True))
    assert kept == before
    assert (both[0].folder / "model.safetensors").stat().st_mtime_ns == written
    assert trained == read_checkpoint(both[1].folder)


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(
    training_data, tiny_experiment, finished
):
    other = replace_nested(tiny_experiment, train={"optimizer": {"learning_rate": 1e-4}})
    runs = plan_runs([other], training_data, 0, finished)
    with pytest.raises(ValueError, match=r"tiny.fold0 was trained with other settings of tiny"):
        train_many(runs, training_data, replace(OPTIONS, resume=True))


def test_runs_trained_at_once_have_the_weights_of_runs_trained_in_turn(
    training_data, tiny_experiment, trained_runs, tmp_path
):
    runs = plan_runs([tiny_experiment], training_data, None, tmp_path)
    checkpoints = train_many(runs, training_data, replace(OPTIONS, jobs=2))
    in_turn = [read_checkpoint(path) for path in trained_runs if path.parent.name == "tiny"]
    assert [one.fold for one in checkpoints] == [0, 1]
    assert [one.weights_sha256 for one in checkpoints] == [one.weights_sha256 for one in in_turn]


def test_a_fold_out_of_range_is_refused_before_anything_is_trained(
    training_data, tiny_experiment, tmp_path
):
    runs = plan_runs([tiny_experiment], training_data, 5, tmp_path)
    with pytest.raises(ValueError, match=r"fold 5 is out of range; the folds are 0, 1"):
        train_many(runs, training_data)
    assert not list(tmp_path.iterdir())


def test_runs_at_once_are_refused_where_processes_share_each(
    training_data, tiny_experiment, tmp_path
):
    runs = plan_runs([tiny_experiment], training_data, None, tmp_path)
    options = RunOptions(jobs=2, distributed=DistributedContext(0, 2))
    with pytest.raises(ValueError, match="leave --jobs at 1 under torchrun"):
        train_many(runs, training_data, options)
    assert not list(tmp_path.iterdir())


def test_the_table_of_runs_has_their_scores_and_times(training_data, tiny_experiment, trained_runs):
    folder = trained_runs[0].parents[1]
    runs = plan_runs([tiny_experiment], training_data, None, folder)
    table = runs_table(runs)
    assert list(table["fold"]) == [0, 1]
    assert list(table["macro_ap"]) == [
        read_checkpoint(run.folder).score["macro_ap"] for run in runs
    ]
    assert (table["epochs"] == 2).all()
    assert (table["clips_per_second"] > 0).all()


def test_a_signal_stops_runs_that_are_trained_at_once(training_data, tiny_experiment, tmp_path):
    long = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=10_000))
    runs = plan_runs([long], training_data, None, tmp_path)

    def stop_when_both_run():
        while len(list(tmp_path.glob(f"*/*/{STATE_FILE}"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_both_run, daemon=True).start()
    with pytest.raises(TrainingInterrupted, match="--resume"):
        train_many(runs, training_data, replace(OPTIONS, jobs=2))
    assert all((run.folder / STATE_FILE).is_file() for run in runs)
    assert not multiprocessing.active_children()
