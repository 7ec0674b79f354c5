"""Many runs: nothing is overwritten unasked, finished ones are kept, at once is as in turn."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from birdcall.config import replace_nested
from birdcall.models.checkpoint import STATE_FILE
from birdcall.training.distributed import DistributedContext
from birdcall.training.log import TrainingInterrupted
from birdcall.training.runs import plan_runs, runs_table, train_many


def test_runs_are_planned_by_experiment_and_fold(training_data, tiny_experiment, tmp_path):
    other = replace(tiny_experiment, name="other")
    runs = plan_runs([tiny_experiment, other], training_data, None, tmp_path)
    assert [run.folder.relative_to(tmp_path).as_posix() for run in runs] == [
        *("tiny/fold0", "tiny/fold1", "other/fold0", "other/fold1")
    ]
    assert [run.fold for run in plan_runs([other], training_data, 1, tmp_path)] == [1]


def test_a_trained_run_is_not_overwritten_unasked(training_data, tiny_experiment, tmp_path):
    first = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    both = plan_runs([tiny_experiment], training_data, None, tmp_path)
    train_many(first, training_data, workers=0)
    with pytest.raises(ValueError, match="holds a trained run already; --overwrite"):
        train_many(both, training_data, workers=0)
    assert not (tmp_path / "tiny" / "fold1").exists()
    train_many(first, training_data, workers=0, overwrite=True)


def test_a_finished_run_is_kept_when_others_are_resumed(training_data, tiny_experiment, tmp_path):
    first = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    both = plan_runs([tiny_experiment], training_data, None, tmp_path)
    (made,) = train_many(first, training_data, workers=0)
    written = (first[0].folder / "model.safetensors").stat().st_mtime_ns
    kept, _ = train_many(both, training_data, workers=0, resume=True)
    assert kept == made
    assert (first[0].folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(
    training_data, tiny_experiment, tmp_path
):
    train_many(plan_runs([tiny_experiment], training_data, 0, tmp_path), training_data, workers=0)
    other = replace_nested(tiny_experiment, train={"optimizer": {"learning_rate": 1e-4}})
    runs = plan_runs([other], training_data, 0, tmp_path)
    with pytest.raises(ValueError, match="trained by other settings of tiny; --overwrite"):
        train_many(runs, training_data, workers=0, resume=True)


def test_runs_trained_at_once_have_the_weights_of_runs_trained_in_turn(
    training_data, tiny_experiment, tmp_path
):
    def digests(folder, jobs):
        runs = plan_runs([tiny_experiment], training_data, None, folder)
        made = train_many(runs, training_data, workers=0, jobs=jobs)
        return [(one.fold, one.weights_sha256) for one in made]

    assert digests(tmp_path / "a", 1) == digests(tmp_path / "b", 2)


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
    with pytest.raises(ValueError, match="leave --jobs at 1 under torchrun"):
        train_many(runs, training_data, jobs=2, distributed=DistributedContext(0, 2))
    assert not list(tmp_path.iterdir())


def test_the_table_of_runs_says_what_they_scored_and_cost(training_data, tiny_experiment, tmp_path):
    runs = plan_runs([tiny_experiment], training_data, None, tmp_path)
    made = train_many(runs, training_data, workers=0)
    table = runs_table(runs)
    assert list(table["fold"]) == [0, 1]
    assert list(table["macro_ap"]) == [one.score["macro_ap"] for one in made]
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
    with pytest.raises(TrainingInterrupted, match="--resume goes on"):
        train_many(runs, training_data, workers=0, jobs=2)
    assert all((run.folder / STATE_FILE).is_file() for run in runs)
    assert not multiprocessing.active_children()
