"""Runs on a cluster have the weights of one machine, also where it loses a node."""

import logging
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from birdcall.__main__ import main
from birdcall.config import replace_nested
from birdcall.models.checkpoint import SETTINGS_FILE, STATE_FILE, read_checkpoint
from birdcall.storage.locks import locked
from birdcall.training.cluster import RayCluster
from birdcall.training.distributed import (
    DistributedContext,
    Requirements,
    Share,
    choose_share,
    connect_to_ray,
)
from birdcall.training.log import Answer, Board, Report, Reporter, runs_table
from birdcall.training.resume import read_state
from birdcall.training.runs import TrainingInterrupted, plan_runs, train_many, train_run
from birdcall.training.trainer import RunOptions

OPTIONS = RunOptions(workers=0)
FORTY_STEPS = {"epochs": 1, "data": {"clips_per_epoch": 160}}  # of the tiny experiment


def hashes(checkpoints):
    return [checkpoint.weights_sha256 for checkpoint in checkpoints]


# --- without a cluster --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "jobs", "expected", "n_threads"),
    [
        ([{"CPU": 0}, {"CPU": 8}, {"CPU": 64}], 2, Share(4, 0), 4),  # the head has no cores
        ([{"CPU": 7}], 2, Share(3, 0), 3),
        ([{"CPU": 2}], 3, Share(0.6666, 0), 1),  # three of them fit
        ([{"CPU": 64}, {"CPU": 32, "GPU": 4}], 1, Share(8, 1), 8),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 64, "GPU": 2}], 3, Share(2, 0.3333), 2),
        ([{"CPU": 0, "GPU": 1}], 1, Share(0, 1), 1),
    ],
)
def test_a_run_has_the_same_share_of_all_nodes(nodes, jobs, expected, n_threads):
    share = choose_share(nodes, jobs)
    assert share == expected
    assert share.n_threads == n_threads
    smallest = min(filter(share.fits, nodes), key=lambda node: (node.get("GPU", 0), node["CPU"]))
    assert jobs * share.n_cores <= smallest["CPU"]


def test_a_node_without_gpu_has_no_part_where_others_have_one():
    share = choose_share([{"CPU": 64}, {"CPU": 32, "GPU": 4}], 1)
    assert [share.fits(node) for node in ({"CPU": 64}, {"CPU": 32, "GPU": 4})] == [False, True]


def test_a_cluster_that_has_nothing_to_train_with_is_refused():
    with pytest.raises(ValueError, match="no node with a core or a GPU"):
        choose_share([{"CPU": 0, "memory": 1e9}], 1)


@pytest.fixture
def requirements(training_data, tmp_path):
    token = tmp_path / "token"
    token.write_text("abc")
    return Requirements.of(
        training_data, "training.trainer", tokens={str(token): "abc"}, needs_gpu=False
    )


def test_a_node_that_sees_the_same_has_no_fault(requirements):
    assert requirements.describe_fault() == ""
    assert len(requirements.sizes) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: {"versions": own.versions | {"torch": "1.0"}}, r"torch is \S+ there, 1\.0"),
        (lambda own: {"versions": own.versions | {"birdcall": "0"}}, "birdcall is .* there, 0 "),
        (lambda own: {"code": own.code | {"training.step": "x"}}, r"training/step\.py"),
        (lambda own: {"tokens": dict.fromkeys(own.tokens, "other")}, "not the same folder there"),
        (lambda own: {"tokens": {"/nowhere/token": "abc"}}, "/nowhere is not the same folder"),
        (lambda own: {"sizes": dict.fromkeys(own.sizes, 1)}, r"\.\S+ is missing or another file"),
        (lambda own: {"sizes": {"/nowhere/a.mp3": 1}}, r"/nowhere/a\.mp3 is missing or another"),
    ],
)
def test_what_a_node_lacks_is_named(requirements, change, message):
    assert re.search(message, replace(requirements, **change(requirements)).describe_fault())


class FakeCluster:
    """A cluster that cannot train, and says so."""

    def check(self, runs, data, options):
        raise ValueError("node a: no")

    def train(self, runs, data, options):
        raise AssertionError("it trains after all")


def test_nothing_is_overwritten_where_the_cluster_cannot_train(
    training_data, tiny_experiment, tmp_path
):
    (run,) = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / SETTINGS_FILE).touch()
    with pytest.raises(ValueError, match="node a: no"):
        train_many([run], training_data, replace(OPTIONS, overwrite=True), FakeCluster())
    assert (run.folder / SETTINGS_FILE).is_file()


def test_a_cluster_is_refused_under_torchrun(training_data, tiny_experiment, tmp_path):
    runs = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    options = replace(OPTIONS, distributed=DistributedContext(0, 2))
    with pytest.raises(ValueError, match="not in 2: leave out torchrun"):
        train_many(runs, training_data, options, FakeCluster())


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[ray\]'"):
        RayCluster("auto")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_where_no_cluster_answers_the_error_names_the_address(address):
    pytest.importorskip("ray")
    with pytest.raises(ConnectionError, match=rf"--ray {address}: no cluster .* refused"):
        connect_to_ray(address)


def test_the_command_trains_on_the_cluster_that_it_is_given(demo_folder, tables, capsys):
    pytest.importorskip("ray")
    folds, audit = tables
    with pytest.raises(SystemExit) as caught:
        main([
            *("train", "--data", str(demo_folder), "--output", str(audit.parent)),
            *("--folds", str(folds), "--experiment", "small_gru", "--ray", "127.0.0.1:1"),
        ])  # fmt: skip
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("birdcall: --ray 127.0.0.1:1: no cluster answers there")


class LocalBoard:
    """A board that is called as an actor is."""

    def __init__(self):
        self.board = Board()
        self.add = self

    def remote(self, report):
        return self.board.add(report)


@pytest.fixture
def board(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    local = LocalBoard()
    local.board.begin(0, 1)
    return local


def report_from(board, run, attempt):
    return Reporter(board, run, index=0, attempt=attempt, line_seconds=0)


@pytest.mark.usefixtures("blank_previews")
def test_a_run_stops_when_the_board_says_so_and_has_saved_its_state(
    board, training_data, tiny_experiment, tmp_path
):
    (run,) = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    reporter = report_from(board, run, attempt=1)
    board.board.stop()
    with reporter.attached(logging.INFO), pytest.raises(TrainingInterrupted):
        train_run(run, training_data, OPTIONS, on_step=reporter.on_step)
    assert read_state(run.folder / STATE_FILE)[1]["progress"]["step"] == 1
    reports = board.board.take()
    assert [report.step for report in reports] == [1, 1]
    assert reports[0].messages[-1][1].startswith("tiny, fold 0: step 1 of 4, epoch 1")
    assert board.board.take() == []


@pytest.mark.usefixtures("blank_previews")
def test_a_run_that_was_given_to_another_node_writes_nothing_more(
    board, training_data, tiny_experiment, tmp_path
):
    """Its node was cut off from the cluster, and is back."""
    (run,) = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    reporter = report_from(board, run, attempt=0)
    options = replace(OPTIONS, save_every=1)
    with pytest.raises(RuntimeError, match="tiny, fold 0: another node has taken it"):
        train_run(run, training_data, options, on_step=reporter.on_step)
    assert not (run.folder / STATE_FILE).exists()


def test_a_board_listens_to_the_last_attempt_only():
    board = Board()
    board.begin(0, 0)
    assert board.add(Report(0, 0, 5, [])) == Answer.CONTINUE
    board.begin(0, 1)
    assert board.add(Report(0, 0, 6, [])) == Answer.LEAVE
    assert board.add(Report(0, 1, 5, [])) == Answer.CONTINUE
    assert [(report.attempt, report.step) for report in board.take()] == [(0, 5), (1, 5)]


# --- on a cluster of two nodes ------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_cluster():
    """Two nodes on this machine; the first is the head."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["PYTHONWARNINGS"] = "ignore"
    node = {"num_cpus": 1, "include_log_monitor": False}
    head = node | {"include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def cluster(ray_cluster, caplog):
    """The cluster as the command uses it; each step is a line of the log."""
    caplog.set_level(logging.INFO)
    return RayCluster(ray_cluster.address, line_seconds=0)


def nodes_of(text, verb):
    """The first letters of the nodes' ids, by fold."""
    lines = re.findall(rf"fold (\d): {verb} on node \S+ \((\w+)\)", text)
    return {int(fold): node for fold, node in lines}


def steps_of(text, fold):
    """The steps that a run has made, one after another; the same twice if it was repeated."""
    return list(map(int, re.findall(rf"fold {fold}: step (\d+) of", text)))


class Watch(logging.Handler):
    """Calls ``action`` with each message that matches, until it returns True."""

    def __init__(self, pattern, action):
        super().__init__()
        self.pattern, self.action, self.is_done = re.compile(pattern), action, False

    def emit(self, record):
        match = None if self.is_done else self.pattern.search(record.getMessage())
        if match:
            self.is_done = bool(self.action(match))


@pytest.fixture
def watch():
    """Let an action follow the messages that match."""
    handlers = []

    def start(pattern, action):
        handlers.append(Watch(pattern, action))
        logging.getLogger("birdcall").addHandler(handlers[-1])

    yield start
    for handler in handlers:
        logging.getLogger("birdcall").removeHandler(handler)


def cut_off(node):
    """Kill what runs on a node at once, as a power failure does; else it would end step by step."""
    (raylet,) = node.all_processes["raylet"]
    children = Path(f"/proc/{raylet.process.pid}/task/{raylet.process.pid}/children").read_text()
    for process in children.split():
        os.kill(int(process), signal.SIGKILL)


def test_two_nodes_train_the_weights_of_one_machine(
    cluster, training_data, tiny_experiment, trained_runs, tmp_path, caplog, watch
):
    """Two jobs have these weights too: see test_runs.py."""
    runs = plan_runs([tiny_experiment], training_data, None, tmp_path)
    owners = []

    def lock(_):
        with pytest.raises(OSError, match="writes to it") as caught, locked(runs[1].folder):
            pass
        owners.append(str(caught.value))

    watch("fold 1: step 1 of", lock)
    checkpoints = train_many(runs, training_data, OPTIONS, cluster)
    here = [folder for folder in trained_runs if folder.parent.name == "tiny"]
    assert hashes(checkpoints) == hashes(map(read_checkpoint, here))
    nodes = nodes_of(caplog.text, "started")
    assert len(set(nodes.values())) == 2
    assert nodes_of(caplog.text, "finished") == nodes
    assert [steps_of(caplog.text, fold) for fold in (0, 1)] == [[1, 2, 3, 4]] * 2
    assert len(owners) == 1
    assert f"process {os.getpid()}" in owners[0]
    columns = ["experiment", "fold", "macro_ap", "epochs"]
    expected = plan_runs([tiny_experiment], training_data, None, here[0].parents[1])
    assert runs_table(runs)[columns].equals(runs_table(expected)[columns])
    assert sorted(path.name for path in runs[0].folder.parent.iterdir()) == ["fold0", "fold1"]


def test_the_error_of_a_run_is_one_line_and_leaves_the_others_their_results(
    cluster, training_data, tiny_experiment, trained_runs, tmp_path, caplog
):
    runs = plan_runs([tiny_experiment], training_data, None, tmp_path)
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / STATE_FILE).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"^tiny, fold 0: \S+ not a readable state.*") as caught:
        train_many(runs, training_data, replace(OPTIONS, resume=True), cluster)
    assert "\n" not in str(caught.value)
    assert len(re.findall("fold 0: started", caplog.text)) == 1  # it is not tried again
    (expected,) = [path for path in trained_runs if path.parts[-2:] == ("tiny", "fold1")]
    assert hashes([read_checkpoint(runs[1].folder)]) == hashes([read_checkpoint(expected)])


@pytest.mark.slow
def test_at_the_deadline_runs_save_their_state_and_others_are_not_started(
    cluster, training_data, tiny_experiment, tmp_path, caplog
):
    long = replace_nested(tiny_experiment, train={"epochs": 10_000})
    runs = plan_runs([long], training_data, None, tmp_path / "long")
    runs += plan_runs([replace(long, name="waits")], training_data, 0, tmp_path / "long")
    deadline = time.monotonic() + 5
    with pytest.raises(TrainingInterrupted, match="--resume"):
        train_many(runs, training_data, replace(OPTIONS, deadline=deadline), cluster)
    assert "waits, fold 0" not in caplog.text
    for run in runs[:2]:
        if started := steps_of(caplog.text, run.fold):
            state = read_state(run.folder / STATE_FILE)[1]
            assert state["progress"]["step"] == started[-1]


@pytest.mark.slow
def test_after_a_signal_the_state_is_saved_and_the_run_continues_later(
    cluster, training_data, tiny_experiment, tmp_path, caplog, watch
):
    experiment = replace_nested(tiny_experiment, train=FORTY_STEPS)
    there, here = (
        plan_runs([experiment], training_data, 0, tmp_path / name) for name in ("there", "here")
    )

    def stop(_):
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    watch("fold 0: step 3 of", stop)
    with pytest.raises(TrainingInterrupted, match="--resume"):
        train_many(there, training_data, replace(OPTIONS, save_every=10**6), cluster)
    state = read_state(there[0].folder / STATE_FILE)[1]
    assert state["progress"]["step"] == steps_of(caplog.text, 0)[-1] < 40
    continued = train_many(there, training_data, replace(OPTIONS, resume=True), cluster)
    assert steps_of(caplog.text, 0) == list(range(1, 41))
    assert hashes(continued) == hashes(train_many(here, training_data, OPTIONS))


@pytest.mark.slow
def test_a_run_whose_node_is_lost_repeats_few_steps_and_ends_with_the_same_bits(
    ray_cluster, cluster, training_data, tiny_experiment, tmp_path, caplog, watch
):
    """Last in this module: the cluster keeps one node."""
    experiment = replace_nested(tiny_experiment, train=FORTY_STEPS)
    there, here = (
        plan_runs([experiment], training_data, None, tmp_path / name) for name in ("there", "here")
    )
    (node,) = ray_cluster.worker_nodes
    lost = []

    def remove(match):
        fold = int(match[1])
        if node.node_id.startswith(nodes_of(caplog.text, "started")[fold]):
            cut_off(node)
            ray_cluster.remove_node(node, allow_graceful=False)
            lost.append(fold)
        return lost

    watch(r"fold (\d): step 14 of 40", remove)
    options = replace(OPTIONS, save_every=12)
    checkpoints = train_many(there, training_data, options, cluster)
    (fold,) = lost
    before, after = caplog.text.split(f"fold {fold}: its node is lost")
    assert nodes_of(after, "continues")[fold] not in node.node_id
    (resumed,) = map(int, re.findall(rf"fold {fold}: resumed after step (\d+)", after))
    n_repeated = steps_of(before, fold)[-1] - resumed
    assert resumed >= 12
    assert 0 <= n_repeated <= options.save_every
    assert len(steps_of(caplog.text, fold)) == 40 + n_repeated
    assert steps_of(caplog.text, 1 - fold) == list(range(1, 41))
    assert hashes(checkpoints) == hashes(train_many(here, training_data, replace(OPTIONS, jobs=2)))
