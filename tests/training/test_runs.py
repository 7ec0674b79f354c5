"""Many runs: nothing is overwritten unasked, finished runs are kept, parallel runs are the same."""

import logging
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from birdcall.config import FULL, replace_nested
from birdcall.data.targets import PRESENT, STRONG_LABEL_COLUMNS
from birdcall.models.checkpoint import SETTINGS_FILE, STATE_FILE, read_checkpoint
from birdcall.storage.locks import locked
from birdcall.training import runs as runs_module
from birdcall.training.distributed import DistributedContext, process_context
from birdcall.training.log import find_best_epochs, find_runs, read_log, runs_table
from birdcall.training.resume import conditions_of, read_runs
from birdcall.training.runs import (
    TrainingInterrupted,
    plan_runs,
    train_many,
)
from birdcall.training.trainer import RunOptions

OPTIONS = RunOptions(workers=0)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
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
    with pytest.raises(ValueError, match=r"tiny.fold0 .*learning_rate was 0\.003, is 0\.0001"):
        train_many(runs, training_data, replace(OPTIONS, resume=True))


def with_column(data, name, change):
    recordings = data.recordings
    return replace(data, recordings=recordings.assign(**{name: change(recordings[name])}))


def with_labels(data):
    first = data.recordings.iloc[0]
    row = (first["filename"], first["ebird_code"], 0.0, 1.0, PRESENT, 1.0)
    return replace(data, strong_labels=pd.DataFrame([row], columns=list(STRONG_LABEL_COLUMNS)))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda data: with_column(data, "fold", lambda fold: 1 - fold), "folds"),
        (lambda data: with_column(data, "rating", lambda rating: rating + 1), "tables"),
        (lambda data: with_column(data, "sha256", lambda sha256: "1" + sha256.str[1:]), "audio"),
        (lambda data: with_column(data, "seconds", lambda seconds: seconds + 1), "lengths"),
        (lambda data: replace(data, noise_files=data.noise_files[1:]), "noise"),
        (with_labels, "labels"),
    ],
)
def test_a_finished_run_of_other_data_is_not_taken_for_this_one(
    training_data, tiny_experiment, finished, change, name
):
    runs = plan_runs([tiny_experiment], training_data, 0, finished)
    with pytest.raises(ValueError, match=rf"tiny.fold0 .*{name}.*--overwrite"):
        train_many(runs, change(training_data), replace(OPTIONS, resume=True))


def test_a_finished_run_that_started_from_other_weights_is_not_taken_for_this_one(
    training_data, tiny_experiment, finished
):
    runs = plan_runs([tiny_experiment], training_data, 0, finished)
    init = runs[0].folder / "model.safetensors"
    with pytest.raises(ValueError, match=r"tiny.fold0 .*--init"):
        train_many(runs, training_data, replace(OPTIONS, resume=True, init=init))


def test_a_finished_run_whose_weights_are_damaged_is_not_kept(
    training_data, tiny_experiment, finished
):
    runs = plan_runs([tiny_experiment], training_data, 0, finished)
    (runs[0].folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"tiny.fold0.model\.safetensors"):
        train_many(runs, training_data, replace(OPTIONS, resume=True))


def test_a_finished_run_is_kept_wherever_its_data_and_noise_lie(
    training_data, tiny_experiment, finished, tmp_path
):
    noise = tmp_path / "elsewhere" / "noise"
    shutil.copytree(training_data.noise_files[0].parent, noise)
    files = [noise / path.name for path in training_data.noise_files]
    moved = replace(training_data, folder=tmp_path / "elsewhere", noise_files=files)
    runs = plan_runs([tiny_experiment], training_data, 0, finished)
    (kept,) = train_many(runs, moved, replace(OPTIONS, resume=True))
    assert kept == read_checkpoint(runs[0].folder)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "queued"])
def test_killed_before_the_first_state_no_run_keeps_the_weights_that_it_was_to_overwrite(
    training_data, tiny_experiment, finished, order
):
    class Killed(BaseException):
        pass

    def kill(request):
        raise Killed

    planned = plan_runs([tiny_experiment], training_data, None, finished)
    runs = [planned[fold] for fold in order]
    with pytest.raises(Killed):
        train_many(runs, replace(training_data, read_crops=kill), replace(OPTIONS, overwrite=True))
    assert not list(finished.rglob(STATE_FILE))
    resumed = replace(OPTIONS, resume=True, deadline=time.monotonic())
    with pytest.raises(TrainingInterrupted):
        train_many(planned[:1], training_data, resumed)


def test_without_the_initial_weights_nothing_is_overwritten(
    training_data, tiny_experiment, finished, tmp_path
):
    runs = plan_runs([tiny_experiment], training_data, 0, finished)
    before = read_checkpoint(runs[0].folder)
    options = replace(OPTIONS, overwrite=True, init=tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError):
        train_many(runs, training_data, options)
    assert read_checkpoint(runs[0].folder) == before


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


def test_other_birds_count_for_experiments_that_draw_from_them(
    training_data, tiny_experiment, finished, tmp_path
):
    bird = tmp_path / "bird.wav"
    bird.write_bytes(b"sound")
    data = replace(training_data, other_birds=[bird])
    runs = plan_runs([tiny_experiment], data, 0, finished)
    resume = replace(OPTIONS, resume=True)
    assert train_many(runs, data, resume), "it was trained without them, and draws from none"
    with_birds = replace_nested(tiny_experiment, augment={"other_birds_probability": 0.1})
    other = replace(with_birds, name="open")
    planned = plan_runs([tiny_experiment, other], training_data, 0, finished)
    with pytest.raises(ValueError, match=r"open has an other_birds_probability of 0\.1"):
        train_many(planned, training_data, resume)
    device, distributed = torch.device("cpu"), DistributedContext()
    with_sound, without = (
        conditions_of(data, experiment, None, device, distributed=distributed)
        for experiment in (with_birds, tiny_experiment)
    )
    assert (with_sound["other_birds"], without["other_birds"]) == (
        data.digests["other_birds"],
        None,
    )


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


@pytest.mark.parametrize("content", [None, b"", b"<html>", b"epoch,lo", b"\xff\0"])
def test_a_log_that_cannot_be_read_is_named_and_leaves_the_scores(
    training_data, tiny_experiment, finished, caplog, content
):
    (run,) = plan_runs([tiny_experiment], training_data, 0, finished)
    (run.folder / "log.csv").unlink()
    if content is not None:
        (run.folder / "log.csv").write_bytes(content)
    table = runs_table([run])
    assert list(table["macro_ap"]) == [read_checkpoint(run.folder).score["macro_ap"]]
    (record,) = caplog.records
    assert str(run.folder / "log.csv") in record.getMessage()


def process_servers():
    """The processes, other than runs, that this one has started to train runs at once."""
    if sys.platform != "linux":
        return []
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [int(child) for child, command in commands.items() if b"forkserver" in command]


def test_a_signal_stops_runs_that_are_trained_at_once(training_data, tiny_experiment, tmp_path):
    long = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=10_000))
    runs = plan_runs([long], training_data, None, tmp_path)
    # A process takes its next run before it ends the first one.
    next_one = replace(long, name="next", train=replace(long.train, epochs=500))
    waiting = plan_runs([next_one], training_data, None, tmp_path)

    servers = []

    def stop_when_both_run():
        while len(list(tmp_path.glob(f"*/*/{STATE_FILE}"))) < 2:
            time.sleep(0.05)
        try:
            servers.extend(process_servers())
        finally:
            for process in (*servers, os.getpid()):  # a batch system signals all processes
                os.kill(process, signal.SIGTERM)

    threading.Thread(target=stop_when_both_run, daemon=True).start()
    with pytest.raises(TrainingInterrupted, match="--resume"):
        train_many([*runs, *waiting], training_data, replace(OPTIONS, jobs=2))
    assert all((run.folder / STATE_FILE).is_file() for run in runs)
    assert not any((run.folder / SETTINGS_FILE).is_file() for run in waiting)
    assert not multiprocessing.active_children()
    assert len(servers) == (sys.platform == "linux")


def descendants(process):
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {int(child) for child in children}.union(*map(descendants, children))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of processes")
def test_processes_end_when_the_one_that_has_started_them_is_killed(
    training_data, tiny_experiment, tmp_path
):
    long = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=10_000))
    runs = plan_runs([long], training_data, None, tmp_path)
    arguments = (runs, training_data, replace(OPTIONS, jobs=2, save_every=1))
    main = multiprocessing.get_context("spawn").Process(target=train_many, args=arguments)
    main.start()
    while not all((run.folder / STATE_FILE).is_file() for run in runs):
        assert main.is_alive()
        time.sleep(0.05)
    others = descendants(main.pid)
    assert len(others) >= 3  # the server, and a process for each run
    main.kill()
    main.join()
    deadline = time.monotonic() + 60
    while alive := [process for process in others if Path(f"/proc/{process}").exists()]:
        if time.monotonic() > deadline:
            for process in alive:
                os.kill(process, signal.SIGKILL)
            pytest.fail(f"{len(alive)} processes outlive the one that has started them")
        time.sleep(0.1)


def test_a_signal_does_not_end_a_process_that_waits_for_its_next_run():
    """It would keep the lock of the pool's queue, and the others would wait for it forever."""
    settings = (1, logging.INFO)
    with ProcessPoolExecutor(1, process_context(), runs_module._prepare_process, settings) as pool:
        process = pool.submit(os.getpid).result()
        if sys.platform == "linux":  # imported by the server that the processes fork from
            assert pool.submit(eval, "'timm' in __import__('sys').modules").result()
        os.kill(process, signal.SIGTERM)
        assert pool.submit(os.getpid).result() == process


def faults_of_new_memory():
    """How often this process asks the system for memory when it makes 64 MB of arrays."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [torch.ones(4_000_000) for _ in range(4)]
    del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="small pages only"
)
def test_a_process_that_trains_has_large_pages():
    settings = (1, logging.INFO)
    with ProcessPoolExecutor(1, process_context(), runs_module._prepare_process, settings) as pool:
        tries = [pool.submit(faults_of_new_memory).result() for _ in range(3)]
    assert min(tries) < 8_000  # of small pages 16,000; large ones may be rare for a moment


def test_a_run_in_this_process_uses_freed_memory_again(
    training_data, tiny_experiment, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(runs_module, "reuse_freed_memory", lambda: calls.append(1))
    (run,) = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    with pytest.raises(TrainingInterrupted):
        runs_module.train_run(run, training_data, replace(OPTIONS, deadline=0.0))
    assert calls


def test_runs_that_are_not_finished_are_named(tmp_path, caplog):
    for path in ("small_gru/fold0/model.json", "small_gru/fold1/state.safetensors"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert find_runs(tmp_path) == [tmp_path / "small_gru" / "fold0"]
    (record,) = caplog.records
    assert str(tmp_path / "small_gru" / "fold1") in record.getMessage()
    caplog.clear()
    assert find_runs(tmp_path, fold=0) == [tmp_path / "small_gru" / "fold0"]
    assert not caplog.records


def test_a_full_run_is_trained_on_everything_for_the_epochs_of_its_experiment(
    training_data, tiny_experiment, finished
):
    (run,) = plan_runs([tiny_experiment], training_data, FULL, finished)
    assert run.folder == finished / "tiny" / "full"
    (checkpoint,) = train_many([run], training_data, OPTIONS)
    assert (checkpoint.name, checkpoint.score) == ("tiny-full", {})
    log = read_log(run.folder)
    assert len(log) == tiny_experiment.train.epochs
    assert all(not entry.validation for entry in log)
    assert not (run.folder / "missing_classes.csv").exists()
    assert list(runs_table([run])["fold"]) == [FULL]
    assert list(find_best_epochs(run.folder.parent)) == ["fold0"]
    written = (run.folder / "model.safetensors").stat().st_mtime_ns
    assert train_many([run], training_data, replace(OPTIONS, resume=True)) == [checkpoint]
    assert (run.folder / "model.safetensors").stat().st_mtime_ns == written
    # Nothing was held out that it could be scored on.
    assert find_runs(finished) == [finished / "tiny" / "fold0"]
    assert find_runs(finished, fold=FULL) == [run.folder]
    with pytest.raises(ValueError, match=r"tiny.full held out nothing"):
        read_runs([run.folder], training_data)


@pytest.mark.parametrize("change", [{"patience": 2}, {"optimizer": {"average_best": 2}}])
def test_a_full_run_has_no_epochs_to_choose_from(training_data, tiny_experiment, tmp_path, change):
    experiment = replace_nested(tiny_experiment, train=change)
    runs = [
        *plan_runs([tiny_experiment], training_data, 0, tmp_path),
        *plan_runs([experiment], training_data, FULL, tmp_path),
    ]
    with pytest.raises(ValueError, match="tiny has a patience or average_best"):
        train_many(runs, training_data, OPTIONS)
    assert not any(run.folder.exists() for run in runs if run.fold == FULL)
    assert not (runs[0].folder / SETTINGS_FILE).exists()
