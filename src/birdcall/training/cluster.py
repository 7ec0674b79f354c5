"""Train runs on a Ray cluster: the weights of one machine, also where a node is lost."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from birdcall.data.dataset import TrainingData
from birdcall.data.loader import check_worker_memory
from birdcall.models.checkpoint import SETTINGS_FILE, STATE_FILE, Checkpoint, read_checkpoint
from birdcall.storage.files import shorten_list
from birdcall.training.distributed import (
    Requirements,
    Share,
    choose_share,
    connect_to_ray,
    describe_node,
    live_nodes,
)
from birdcall.training.log import Answer, Board, Reporter
from birdcall.training.runs import TrainingInterrupted, claimed, stop_requests, train_run
from birdcall.training.trainer import Run, RunOptions

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_WAITING_SECONDS = 30.0  # between two lines about runs that no node takes
_MAX_LOSSES = 3  # of a run's nodes before its next state: the run may be the cause
_HEAD = {"node:__internal_head__": 0.001}  # a resource that Ray gives to the head node only

# --- what runs on a node ---


@dataclass(frozen=True)
class Task:
    """An attempt at a run on some node."""

    run: Run
    index: int
    attempt: int  # 0: the first
    options: RunOptions
    folder: str  # where the command was started: relative paths begin there
    n_threads: int  # of torch
    requirements: Requirements
    log_level: int
    line_seconds: float


def _train_there(task: Task, data: TrainingData, board: ActorHandle) -> Checkpoint | None:
    """Train the run of ``task`` from its last state; None: interrupted, and the state is saved."""
    with suppress(OSError):  # the requirements name the path that is missing then
        os.chdir(task.folder)
    if fault := task.requirements.describe_fault():
        raise ValueError(f"node {describe_node()}: {fault}")
    run, options = task.run, task.options
    torch.set_num_threads(task.n_threads)
    reporter = Reporter(
        board, run, index=task.index, attempt=task.attempt, line_seconds=task.line_seconds
    )
    with reporter.attached(task.log_level):
        verb = "continues" if task.attempt else "started"
        logger.info("%s: %s on node %s", run.name, verb, describe_node())
        if reporter.send() == Answer.STOP:
            return None
        # An attempt whose node was lost before the command knew of its end.
        if (run.folder / SETTINGS_FILE).is_file() and not (run.folder / STATE_FILE).is_file():
            return read_checkpoint(run.folder)
        check_worker_memory(options.workers * options.jobs, run.experiment)
        try:
            checkpoint = train_run(run, data, options, on_step=reporter.on_step)
        except TrainingInterrupted:
            return None
        logger.info("%s: finished on node %s", run.name, describe_node())
        return checkpoint


# --- the cluster ---


class RayCluster:
    """A Ray cluster that trains runs, a task for each; see `runs.train_many`.

    Data and runs must be in folders that all nodes see under the same paths. On CPUs of one type
    the weights are those of one machine that trains with the same number of threads.
    """

    def __init__(self, address: str, line_seconds: float = 60.0) -> None:
        """Connect as `connect_to_ray`; log the progress of each run every ``line_seconds``."""
        connect_to_ray(address)
        self.line_seconds = line_seconds

    def check(self, runs: Sequence[Run], data: TrainingData, options: RunOptions) -> None:
        """Raise ValueError that names what keeps nodes from training ``runs``."""
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = live_nodes()
        share = choose_share([node["Resources"] for node in nodes], options.jobs)
        answers, faults = {}, []
        with _requirements_of(runs, data, share) as requirements:
            for node in nodes:
                if share.fits(node["Resources"]):
                    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    ask = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
                    name = describe_node(node["NodeManagerHostname"], node["NodeID"])
                    answers[name] = ask(Requirements.describe_fault).remote(requirements)
            for name, answer in answers.items():
                try:
                    fault = ray.get(answer)
                except RayTaskError as error:  # birdcall is not there, or too old
                    fault = str(error.cause).strip().splitlines()[-1]
                except RayError as error:
                    logger.warning("node %s does not answer: %s", name, error)
                    continue
                faults += [f"node {name}: {fault}"] if fault else []
        if faults:
            raise ValueError(f"the cluster cannot train: {shorten_list(faults)}")

    def train(
        self, runs: Sequence[Run], data: TrainingData, options: RunOptions
    ) -> dict[Run, Checkpoint]:
        """Train ``runs``; a run whose node is lost continues on another from its last state.

        The runs are locked by this process. The error of one does not end the others: it is raised
        after their end. Raises TrainingInterrupted as `runs.train_run`, and ConnectionError where
        the head node is lost.
        """
        import ray
        from ray.exceptions import RayError

        share = choose_share([node["Resources"] for node in live_nodes()], options.jobs)
        text = "each of %d runs takes %s of a node, and trains with %d threads"
        logger.info(text, len(runs), share, share.n_threads)
        with ExitStack() as stack:
            for run in runs:
                stack.enter_context(claimed(run, options))
                if not options.resume:  # a second attempt must not take it for its own
                    (run.folder / STATE_FILE).unlink(missing_ok=True)
            board = ray.remote(num_cpus=0, resources=_HEAD)(Board).remote()
            stack.callback(ray.kill, board)
            device = torch.device("cuda" if share.n_gpus else "cpu")
            # An attempt need not know whether it is the first: see the states above.
            own_options = replace(options, device=device, resume=True, overwrite=False)
            own_options = replace(own_options, deadline=None, progress=False)
            dispatch = _Dispatch(
                board=board,
                data=ray.put(data),
                function=ray.remote(num_cpus=share.n_cores, num_gpus=share.n_gpus, max_retries=0)(
                    _train_there
                ),
                template=Task(
                    run=runs[0],
                    index=0,
                    attempt=0,
                    options=own_options,
                    folder=str(Path.cwd()),
                    n_threads=share.n_threads,
                    requirements=stack.enter_context(_requirements_of(runs, data, share)),
                    log_level=logger.getEffectiveLevel(),
                    line_seconds=self.line_seconds,
                ),
                courses=[_Course(run) for run in runs],
            )
            stack.callback(dispatch.kill)
            stop = stack.enter_context(stop_requests())
            for index in range(len(runs)):
                dispatch.submit(index)
            try:
                while dispatch.waiting:
                    done, _ = ray.wait(list(dispatch.waiting), timeout=_POLL_SECONDS)
                    dispatch.log_reports(str(share))
                    for reference in done:
                        dispatch.accept(reference)
                    is_late = options.deadline is not None and time.monotonic() >= options.deadline
                    if stop.is_set() or is_late:
                        dispatch.stop()
            except RayError as error:
                raise ConnectionError(
                    f"the cluster is lost: {error}; --resume continues"
                ) from error
        return dispatch.results()


@contextmanager
def _requirements_of(
    runs: Sequence[Run], data: TrainingData, share: Share
) -> Iterator[Requirements]:
    """Yield what nodes must have, while there is a file to recognise each folder of runs by."""
    token = secrets.token_hex(8)
    folders = sorted({run.folder.parent.absolute() for run in runs})
    paths = [folder / f".cluster-{token}" for folder in folders]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(token, encoding="utf-8")
        tokens = {str(path): token for path in paths}
        needs_gpu = share.n_gpus > 0
        yield Requirements.of(data, "training.trainer", tokens=tokens, needs_gpu=needs_gpu)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


@dataclass
class _Course:
    """How far a run is, as the command knows."""

    run: Run
    attempt: int = 0
    has_started: bool = False  # the attempt
    step: int = 0  # the last one that was reported
    first_step: int = 0  # of the attempt; 0: none yet
    furthest_start: int = 0  # the highest first step of the attempts that were lost
    n_losses: int = 0  # of nodes, one after another, before a later state


@dataclass
class _Dispatch:
    """The runs of one command: tasks that are waited for, and what has become of the others."""

    board: ActorHandle
    data: ObjectRef
    function: Any  # `_train_there`, with resources
    template: Task
    courses: list[_Course]
    waiting: dict[ObjectRef, int] = field(default_factory=dict)  # index of the run
    checkpoints: dict[Run, Checkpoint] = field(default_factory=dict)
    failures: dict[Run, BaseException] = field(default_factory=dict)
    is_stopping: bool = False
    last_line: float = field(default_factory=time.monotonic)

    def submit(self, index: int) -> None:
        """Submit a run to the cluster: the next node with a free share trains it."""
        import ray

        course = self.courses[index]
        ray.get(self.board.begin.remote(index, course.attempt))
        task = replace(self.template, run=course.run, index=index, attempt=course.attempt)
        self.waiting[self.function.remote(task, self.data, self.board)] = index

    def log_reports(self, share: str) -> None:
        """Log what runs have reported, or at times that no node takes any."""
        import ray

        for report in ray.get(self.board.take.remote()):
            course = self.courses[report.index]
            if report.attempt == course.attempt:
                course.has_started, course.step = True, max(report.step, course.step)
                course.first_step = course.first_step or report.step
            for level, text in report.messages:
                logger.log(level, "%s", text)
        now = time.monotonic()
        if any(self.courses[index].has_started for index in self.waiting.values()):
            self.last_line = now
        elif now > self.last_line + _WAITING_SECONDS and self.waiting:
            self.last_line = now
            logger.info("%d runs wait for a node with %s to spare", len(self.waiting), share)

    def accept(self, reference: ObjectRef) -> None:
        """Note how a task has ended; give its run to another node if its own is lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        index = self.waiting.pop(reference)
        course = self.courses[index]
        name = course.run.name
        try:
            checkpoint = ray.get(reference)
        except TaskCancelledError:  # by `stop`, before it has started
            return
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not isinstance(cause, RayError):
                self.failures[course.run] = cause
                logger.error("%s: %s", name, cause)
                return
            is_further = course.first_step > course.furthest_start
            course.n_losses = 1 if is_further else course.n_losses + 1
            course.furthest_start = max(course.first_step, course.furthest_start)
            if course.n_losses == _MAX_LOSSES:
                text = f"its node was lost {_MAX_LOSSES} times before its next state: {cause}"
                self.failures[course.run] = OSError(text)
                return
            logger.warning("%s: its node is lost, after step %d at least", name, course.step)
        else:
            if checkpoint is not None:
                self.checkpoints[course.run] = checkpoint
                return
            if not self.is_stopping:
                logger.warning("%s: stopped on its node after step %d", name, course.step)
        if not self.is_stopping:
            course.attempt, course.has_started, course.first_step = course.attempt + 1, False, 0
            self.submit(index)

    def stop(self) -> None:
        """Let runs save their state and end, and take back those that wait for a node."""
        import ray

        if not self.is_stopping:
            self.is_stopping = True
            ray.get(self.board.stop.remote())
            for reference, index in self.waiting.items():
                if not self.courses[index].has_started:
                    ray.cancel(reference)

    def kill(self) -> None:
        """End all tasks at once."""
        import ray

        for reference in self.waiting:
            ray.cancel(reference, force=True)

    def results(self) -> dict[Run, Checkpoint]:
        """Return all checkpoints; raise what has kept runs from their end."""
        if self.is_stopping and len(self.checkpoints) < len(self.courses):
            raise TrainingInterrupted("stopped; the same command with --resume continues")
        if self.failures:
            text = "; ".join(f"{run.name}: {error}" for run, error in self.failures.items())
            text = " ".join(text.split())
            known = all(isinstance(error, ValueError | OSError) for error in self.failures.values())
            kind = ValueError if known else RuntimeError
            raise kind(f"{text}; --resume continues") from next(iter(self.failures.values()))
        return self.checkpoints
