"""Train one run step by step: everything that decides about its weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from birdcall.config import FULL, Experiment, TrainConfig
from birdcall.data.clips import ClipDataset
from birdcall.data.dataset import TrainingData
from birdcall.data.loader import ClipBatch, FailureCounter, iterate_clips, make_loader
from birdcall.data.targets import ClipSampler, ProcessShare
from birdcall.inference.ensemble import Ensemble, Member, default_device
from birdcall.models.checkpoint import STATE_FILE, Checkpoint, save_checkpoint
from birdcall.models.sed import SEDModel
from birdcall.training.distributed import DistributedContext
from birdcall.training.initialisation import initialise
from birdcall.training.resume import (
    BestWeights,
    TensorState,
    conditions_of,
    identity_of,
    make_moving_average,
    read_state,
    write_state,
)
from birdcall.training.step import BatchLoss, BatchPreview, EpochLog, validate, warmup_cosine

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """An experiment on a fold, and the folder for its checkpoint, log and state."""

    experiment: Experiment
    fold: int | str  # that is held out, or FULL
    folder: Path

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"{self.experiment.name}, {'full' if self.fold == FULL else f'fold {self.fold}'}"


@dataclass(frozen=True)
class RunOptions:
    """Where and how runs are trained; without influence on their weights, except ``init``."""

    workers: int = 1  # loader processes; 0: clips are made in the training process
    jobs: int = 1  # runs trained at the same time
    device: torch.device | None = None  # None: a GPU if there is one
    distributed: DistributedContext = DistributedContext()
    init: Path | None = None  # weights to start from: see `initialisation.initialise`
    resume: bool = False  # continue unfinished runs, keep finished ones
    overwrite: bool = False  # replace finished and unfinished runs
    save_every: int = 200  # steps between two states
    deadline: float | None = None  # as `time.monotonic` counts; then the state is saved
    progress: bool = False  # show a progress bar


@dataclass
class _Progress:
    """The position of a training: all numbers that change, without weights and generators."""

    epoch: int = 0  # finished epochs
    step: int = 0  # optimizer steps since the start
    epoch_step: int = 0  # optimizer steps since the start of the epoch, as all until n_clips
    loss_sum: float = 0.0
    n_batches: int = 0
    n_skipped: int = 0
    seconds: float = 0.0
    waiting: float = 0.0  # of these seconds, for the loader
    n_clips: int = 0
    best_score: float = -math.inf
    validations_since_best: int = 0


@dataclass
class Training:
    """A run in training: the model, and everything that changes with it from step to step."""

    run: Run
    config: TrainConfig  # of the run's experiment
    data: TrainingData
    checkpoint: Checkpoint  # without score
    model: SEDModel
    batch_loss: BatchLoss
    parameters: list[nn.Parameter]  # all that is trained
    loader: DataLoader[ClipBatch]
    failures: FailureCounter
    batches_per_epoch: int
    steps_per_epoch: int  # of the optimizer; the last step can have fewer batches
    n_steps: int  # of all epochs
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    validated_model: SEDModel  # it is saved, too: the moving average, if there is one
    best: BestWeights
    tensors: TensorState
    device: torch.device
    distributed: DistributedContext
    progress: _Progress = field(default_factory=_Progress)
    log: list[EpochLog] = field(default_factory=list)
    # Receives the epoch, from 1, and clips of it; for some epochs only.
    show_preview: Callable[[int, BatchPreview], None] | None = None
    has_shown_preview: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are trained, or the patience is used up."""
        progress, patience = self.progress, self.config.patience
        is_trained = progress.epoch >= self.config.epochs
        return is_trained or (patience is not None and progress.validations_since_best >= patience)

    # --- steps

    def steps(self) -> Iterator[None]:
        """Train the rest of the epoch; yield after each optimizer step."""
        progress, config = self.progress, self.config
        accumulate = config.optimizer.accumulate
        n_trained = progress.epoch_step * accumulate * config.data.batch_size
        self.loader.sampler.set_epoch(progress.epoch, min(n_trained, self.loader.sampler.n_clips))
        self.model.train()
        n_left = self.steps_per_epoch - progress.epoch_step
        n_last = self.batches_per_epoch - (self.steps_per_epoch - 1) * accumulate
        pending: list[ClipBatch] = []
        mark = time.perf_counter()
        for batch in iterate_clips(self.loader, self.failures):
            progress.waiting += time.perf_counter() - mark
            pending.append(batch)
            n_needed = n_last if n_left == 1 else accumulate
            is_complete = len(pending) == n_needed
            if is_complete:
                self.step(pending)
                pending = []
                n_left -= 1
            progress.seconds += time.perf_counter() - mark
            if is_complete:
                yield
            mark = time.perf_counter()

    def step(self, batches: list[ClipBatch]) -> None:
        """Make one optimizer step from one or more batches."""
        progress, config = self.progress, self.config.optimizer
        learning_rate = config.learning_rate * warmup_cosine(config, progress.step, self.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        first = progress.epoch_step * config.accumulate
        losses = []
        for number, batch in enumerate(batches):
            loss = self._add_gradients(batch, first + number, 1 / len(batches))
            if loss is not None:
                losses.append(loss)
        if losses:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, config.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None:
                self.average.update_parameters(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch_step += 1
        progress.loss_sum += sum(losses)
        progress.n_batches += len(losses)
        progress.n_skipped += len(batches) - len(losses)
        n_clips = sum(len(batch.target) for batch in batches)
        progress.n_clips += n_clips * self.distributed.world_size

    def _add_gradients(self, batch: ClipBatch, position: int, weight: float) -> float | None:
        """Add the gradients of ``weight`` x loss; return the loss, None if it is not finite.

        Processes exchange gradients after every batch, also of accumulated batches: any of them
        can be skipped, so none of them is certain to be the last.

        Previews show the first batch of a training, also of a resumed one, and then the first
        batches of the epochs 1, 2, 4, 8, …
        """
        epoch, preview = self.progress.epoch, None
        is_power_of_two = (epoch + 1) & epoch == 0
        is_shown = not self.has_shown_preview or (position == 0 and is_power_of_two)
        if self.show_preview is not None and is_shown:
            self.has_shown_preview = True
            preview = partial(self.show_preview, epoch + 1)
        loss = self.batch_loss(batch, epoch, position, preview=preview)
        total = self.distributed.sum(loss.detach()) / self.distributed.world_size
        if total.isfinite():
            self.scaler.scale(loss * weight).backward()
            return total.item()
        recordings = ", ".join(dict.fromkeys(batch.recordings))
        source = "another process" if loss.isfinite() else recordings
        message = f"{self.run.name}: the loss is not finite in a batch of {source}"
        if self.config.on_non_finite == "stop":
            raise ValueError(f"{message}: lower the learning_rate")
        logger.warning("%s: skipped", message)
        return None

    # --- epochs

    def end_epoch(self, held_out: pd.DataFrame) -> EpochLog:
        """Add the epoch to the log; validate on ``held_out``, if there are any, when it is due."""
        progress = self.progress
        seconds = max(progress.seconds, 1e-9)
        entry = EpochLog(
            epoch=progress.epoch + 1,
            loss=progress.loss_sum / max(progress.n_batches, 1),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=seconds,
            clips_per_second=progress.n_clips / seconds,
            waiting_share=progress.waiting / seconds,
            skipped=progress.n_skipped,
        )
        self.log.append(entry)
        progress.epoch += 1
        progress.epoch_step = progress.n_batches = progress.n_skipped = progress.n_clips = 0
        progress.loss_sum = progress.seconds = progress.waiting = 0.0
        is_last = progress.epoch >= self.config.epochs
        if len(held_out) and (is_last or entry.epoch % self.config.validate_every == 0):
            entry.validation = self._validate(held_out)
            score = entry.validation["macro_ap"]
            progress.validations_since_best += not math.isnan(score)  # NaN: no class is scored
            if score > progress.best_score:
                progress.best_score, progress.validations_since_best = score, 0
            if self.config.optimizer.average_best:
                self.best.offer(entry.epoch, score, self.validated_model)
        return entry

    def finish(self, held_out: pd.DataFrame) -> Checkpoint:
        """Write the checkpoint and delete the state, which is no longer needed."""
        score = self.log[-1].validation
        if self.config.optimizer.average_best:
            self.distributed.wait()  # for the first process, which writes the weights
            self.validated_model.load_state_dict(self.best.mean())
            score = self._validate(held_out)
        checkpoint = replace(self.checkpoint, score=score)
        if self.distributed.is_first:
            checkpoint = save_checkpoint(self.run.folder, self.validated_model, checkpoint)
            self.discard()
        self.distributed.wait()
        return checkpoint

    def _validate(self, held_out: pd.DataFrame) -> dict[str, float]:
        member = Member(self.checkpoint.name, self.validated_model, self.checkpoint)
        return validate(Ensemble([member], self.device), held_out, self.data, self.distributed)

    def discard(self) -> None:
        """Delete the state, also files that a killed process wrote in part, and the best epochs."""
        path = self.run.folder / STATE_FILE
        path.unlink(missing_ok=True)
        for temporary in path.parent.glob(f".{path.stem}.*{path.suffix}"):
            temporary.unlink()
        self.best.delete()

    # --- interruption

    def save(self) -> None:
        """Write the state, from which `restore` continues with the same bits."""
        tensors = self.tensors.collect()
        if not self.distributed.is_first:
            return
        values = {
            "identity": identity_of(self.checkpoint),
            "progress": asdict(self.progress),
            "log": [asdict(entry) for entry in self.log],
            "best": list(self.best.scores.items()),
            "scaler": self.scaler.state_dict(),
        }
        write_state(self.run.folder / STATE_FILE, tensors, values)
        self.best.prune()

    def restore(self) -> None:
        """Continue from the state in the run's folder; ValueError if it is of another training."""
        path = self.run.folder / STATE_FILE
        tensors, values = read_state(path, identity_of(self.checkpoint))
        self.tensors.restore(tensors)
        self.scaler.load_state_dict(values["scaler"])
        self.progress = _Progress(**values["progress"])
        self.log = [EpochLog(**entry) for entry in values["log"]]
        self.best.scores = dict(map(tuple, values["best"]))
        logger.info("%s: resumed after step %d", self.run.name, self.progress.step)


def start_training(
    run: Run, data: TrainingData, recordings: pd.DataFrame, options: RunOptions
) -> Training:
    """Prepare a training on ``recordings`` before its first step. Seeds torch's generator."""
    device, distributed = options.device or default_device(), options.distributed
    experiment, config = run.experiment, run.experiment.train
    trained_on = conditions_of(data, experiment, options.init, device, distributed=distributed)
    seed = config.seed * 1000 + (len(data.folds) if run.fold == FULL else run.fold)
    torch.manual_seed(seed)
    n_classes, names = len(data.classes), data.scientific_names
    model = initialise(experiment, n_classes, options.init, classes=data.classes, names=names)
    model.to(device)
    # All processes start from the same weights, but draw different dropout.
    torch.manual_seed(seed + 7919 * distributed.rank)
    subset = data.training_part(run.fold, recordings)
    share = ProcessShare(distributed.rank, distributed.world_size)
    sampler = ClipSampler(recordings, config.data, config.seed, share)
    clips = ClipDataset(subset, experiment)
    loader = make_loader(clips, sampler, options.workers, n_loaders=options.jobs)
    # The loader leaves out a last, smaller batch, unless it is the only one.
    batches_per_epoch = max(1, sampler.n_clips // config.data.batch_size)
    steps_per_epoch = math.ceil(batches_per_epoch / config.optimizer.accumulate)
    batch_loss = BatchLoss(model, experiment, device, distributed)
    parameters = batch_loss.parameters()
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    # Biases, normalisations and GeM's power do not decay.
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(groups, rate, weight_decay=decay, fused=True)
    modules, average = dict(batch_loss.modules), None
    if config.optimizer.ema_decay is not None:
        average = make_moving_average(model, config.optimizer.ema_decay)
        modules["average"] = average
    return Training(
        run=run,
        config=config,
        data=data,
        checkpoint=Checkpoint(experiment, data.classes, run.fold, trained_on=trained_on),
        model=model,
        batch_loss=batch_loss,
        parameters=parameters,
        loader=loader,
        failures=FailureCounter(loader.dataset),
        batches_per_epoch=batches_per_epoch,
        steps_per_epoch=steps_per_epoch,
        n_steps=config.epochs * steps_per_epoch,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        average=average,
        validated_model=model if average is None else average.module,
        best=BestWeights(run.folder / "best", config.optimizer.average_best, distributed.is_first),
        tensors=TensorState(modules, optimizer, device, distributed),
        device=device,
        distributed=distributed,
    )
