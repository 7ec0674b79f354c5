"""Hold a run while it is trained: the model, and all that follows it from step to step."""

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
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from birdcall.config import Experiment, OptimizerConfig, TrainConfig
from birdcall.data.dataset import ClipDataset, TrainingData
from birdcall.data.loader import ClipBatch, FailureCounter, iterate_clips, make_loader
from birdcall.data.targets import ClipSampler, ProcessShare
from birdcall.inference.ensemble import default_device
from birdcall.models.checkpoint import STATE_FILE, Checkpoint, save_checkpoint
from birdcall.models.sed import SEDModel
from birdcall.training.distributed import SINGLE_PROCESS, DistributedContext
from birdcall.training.initialisation import initialise
from birdcall.training.log import BatchPreview, EpochLog, is_previewed
from birdcall.training.resume import (
    BestWeights,
    delete_state,
    generator_tensors,
    identity_of,
    make_moving_average,
    optimizer_tensors,
    read_state,
    require_same_identity,
    restore_generators,
    restore_optimizer,
    write_state,
)
from birdcall.training.step import batch_loss, make_detector, warmup_cosine
from birdcall.training.validation import validate

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """An experiment on a fold, and the folder for its checkpoint, log and state."""

    experiment: Experiment
    fold: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.experiment.name}, fold {self.fold}"


@dataclass
class Progress:
    """Where a training is: all numbers that change, but for weights and generators."""

    epoch: int = 0  # finished ones
    step: int = 0  # of the optimiser, since the start
    epoch_step: int = 0  # of the optimiser, since the epoch's start
    loss_sum: float = 0.0  # since the epoch's start, as the four that follow
    n_batches: int = 0
    n_skipped: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    n_clips: int = 0
    best_score: float = -math.inf
    validations_since_best: int = 0

    def describe(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return (
            f"epoch {self.epoch + 1}, loss {self.loss_sum / max(self.n_batches, 1):.3f}, "
            f"{self.n_clips / seconds:.0f} clips/s, waiting {self.waiting / seconds:.0%}"
        )

    def start_epoch(self) -> None:
        self.epoch_step = self.n_batches = self.n_skipped = self.n_clips = 0
        self.loss_sum = self.seconds = self.waiting = 0.0


@dataclass
class Training:
    """A run while it is trained: the model with all that follows it from step to step."""

    run: Run
    data: TrainingData
    model: SEDModel
    detect: nn.Module  # the model's `detect` as it is trained: compiled, in several processes
    loader: DataLoader[ClipBatch]
    failures: FailureCounter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    best: BestWeights
    device: torch.device
    distributed: DistributedContext
    progress: Progress = field(default_factory=Progress)
    log: list[EpochLog] = field(default_factory=list)
    # Is shown the first batch that is trained on, and later those that begin some epochs.
    watch: Callable[[int, BatchPreview], None] | None = None
    has_shown: bool = False

    @property
    def config(self) -> TrainConfig:
        return self.run.experiment.train

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._batches_per_epoch // self.config.optimizer.accumulate)

    @property
    def _batches_per_epoch(self) -> int:
        # A last, smaller batch is left out, unless it is the only one.
        return max(1, self.loader.sampler.n_clips // self.config.data.batch_size)

    @property
    def is_last_epoch(self) -> bool:
        return self.progress.epoch >= self.config.epochs

    @property
    def is_finished(self) -> bool:
        return self.is_last_epoch or self._is_out_of_patience

    @property
    def _is_out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.validations_since_best >= patience

    @property
    def trained(self) -> SEDModel:
        """The model that is validated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def agree(self, asked: bool) -> bool:
        """Say whether any process was asked; all hear the same answer."""
        if self.distributed.world_size == 1:
            return asked
        return bool(self.distributed.sum(torch.tensor(float(asked), device=self.device)) > 0)

    # --- steps

    def steps(self) -> Iterator[None]:
        """Make the steps that the epoch still lacks, and yield after each."""
        progress, config = self.progress, self.config
        n_done = progress.epoch_step * config.optimizer.accumulate * config.data.batch_size
        self.loader.sampler.set_epoch(progress.epoch, min(n_done, self.loader.sampler.n_clips))
        self.model.train()
        mark = time.perf_counter()
        pending: list[ClipBatch] = []
        n_left = self.steps_per_epoch - progress.epoch_step
        for batch in iterate_clips(self.loader, self.failures):
            progress.waiting += time.perf_counter() - mark
            pending.append(batch)
            is_last = n_left == 1 and len(pending) == self._batches_of_last_step
            if len(pending) == config.optimizer.accumulate or is_last:
                self.step(pending)
                pending, n_left = [], n_left - 1
            progress.seconds += time.perf_counter() - mark
            if not pending:
                yield
            mark = time.perf_counter()

    @property
    def _batches_of_last_step(self) -> int:
        return (
            self._batches_per_epoch - (self.steps_per_epoch - 1) * self.config.optimizer.accumulate
        )

    def step(self, batches: list[ClipBatch]) -> None:
        """Make one step of the optimiser from one batch or several."""
        progress, config = self.progress, self.config.optimizer
        learning_rate = config.learning_rate * self.schedule(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        first = progress.epoch_step * config.accumulate
        losses = [
            self._backward(batch, first + number, 1 / len(batches))
            for number, batch in enumerate(batches)
        ]
        finite = [loss for loss in losses if loss is not None]
        if finite:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None:
                self.average.update_parameters(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch_step += 1
        progress.loss_sum += sum(finite)
        progress.n_batches += len(finite)
        progress.n_skipped += len(batches) - len(finite)
        progress.n_clips += (
            sum(len(batch.target) for batch in batches) * self.distributed.world_size
        )

    def _backward(self, batch: ClipBatch, position: int, share: float) -> float | None:
        """Add a batch's gradients; return its loss, None if that is not finite and skipped.

        Several processes share the gradients of every batch, also of those that are accumulated:
        one may be skipped, and then another than the last would have to do it.
        """
        loss = batch_loss(
            self.model,
            self.detect,
            batch=batch,
            experiment=self.run.experiment,
            epoch=self.progress.epoch,
            position=position,
            device=self.device,
            distributed=self.distributed,
            watch=self._watch_at(position),
        )
        total = self.distributed.sum(loss.detach()) / self.distributed.world_size
        if not total.isfinite():
            self._on_non_finite(batch, bool(loss.isfinite()))
            return None
        self.scaler.scale(loss * share).backward()
        return total.item()

    def _watch_at(self, position: int) -> Callable[[BatchPreview], None] | None:
        if self.watch is None:
            return None
        epoch = self.progress.epoch
        if self.has_shown and not (position == 0 and is_previewed(epoch)):
            return None
        self.has_shown = True
        return partial(self.watch, epoch + 1)

    def _on_non_finite(self, batch: ClipBatch, elsewhere: bool) -> None:
        named = "another process" if elsewhere else ", ".join(dict.fromkeys(batch.recordings))
        message = f"{self.run.name}: the loss is not finite in a batch of {named}"
        if self.config.on_non_finite == "stop":
            raise ValueError(f"{message}: lower the learning_rate")
        logger.warning("%s: skipped", message)

    def schedule(self, step: int) -> float:
        """Return the factor on the learning rate at a step of the optimiser."""
        return warmup_cosine(self.config.optimizer, step, self.config.epochs * self.steps_per_epoch)

    # --- epochs

    def end_epoch(self) -> EpochLog:
        """Close the epoch's account."""
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
        progress.start_epoch()
        return entry

    def validate(self, entry: EpochLog, recordings: pd.DataFrame) -> None:
        """Score the model on the held-out recordings, and see whether it is the best so far."""
        entry.validation = self._score(recordings)
        score, progress = entry.validation["macro_ap"], self.progress
        if score > progress.best_score:
            progress.best_score, progress.validations_since_best = score, 0
        else:
            progress.validations_since_best += 1
        if self.config.optimizer.average_best:
            self.best.offer(entry.epoch, score, self.trained)

    def _score(self, recordings: pd.DataFrame) -> dict[str, float]:
        return validate(
            self.trained,
            self._checkpoint,
            recordings=recordings,
            data=self.data,
            device=self.device,
            distributed=self.distributed,
        )

    @property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.run.experiment, self.data.classes, self.run.fold)

    def finish(self, recordings: pd.DataFrame) -> Checkpoint:
        """Write the checkpoint; then the state is no longer needed."""
        run, score = self.run, self.log[-1].validation
        if self.config.optimizer.average_best:
            self.distributed.wait()  # the first one has written them all
            self.trained.load_state_dict(self.best.mean())
            score = self._score(recordings)
        checkpoint = replace(self._checkpoint, score=score)
        if self.distributed.is_first:
            checkpoint = save_checkpoint(run.folder, self.trained, checkpoint)
            delete_state(run.folder / STATE_FILE)
            self.best.delete()
        self.distributed.wait()
        return checkpoint

    # --- to stop and go on

    def save(self) -> None:
        """Write the state from which `restore` goes on, to the bit."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": one for name, one in self.average.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= generator_tensors(self.device, self.distributed)
        if not self.distributed.is_first:
            return
        values = {
            "identity": self._identity(),
            "progress": asdict(self.progress),
            "log": [asdict(entry) for entry in self.log],
            "best": list(self.best.scores.items()),
            "scaler": self.scaler.state_dict(),
        }
        write_state(self.run.folder / STATE_FILE, tensors, values)
        self.best.prune()

    def restore(self) -> None:
        """Take the state that lies in the run's folder; refuse one of another training."""
        path = self.run.folder / STATE_FILE
        tensors, values = read_state(path)
        require_same_identity(path, values["identity"], self._identity())
        self.model.load_state_dict(_below("model.", tensors))
        if self.average is not None:
            self.average.load_state_dict(_below("average.", tensors))
        restore_optimizer(self.optimizer, tensors)
        restore_generators(tensors, self.device, self.distributed)
        self.scaler.load_state_dict(values["scaler"])
        self.progress = Progress(**values["progress"])
        self.log = [EpochLog(**entry) for entry in values["log"]]
        self.best.scores = dict(map(tuple, values["best"]))
        logger.info("%s goes on after step %d", self.run.name, self.progress.step)

    def _identity(self) -> dict[str, object]:
        experiment = self.run.experiment.to_dict()
        return identity_of(experiment, self.run.fold, self.data, self.distributed)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)
    }


def start_training(
    run: Run,
    data: TrainingData,
    recordings: pd.DataFrame,
    *,
    workers: int,
    device: torch.device | None = None,
    distributed: DistributedContext = SINGLE_PROCESS,
    init: Path | None = None,
) -> Training:
    """Put a training together, before its first step."""
    device = device or default_device()
    experiment, config = run.experiment, run.experiment.train
    seed = config.seed * 1000 + run.fold
    torch.manual_seed(seed)
    model = initialise(experiment, len(data.classes), init, classes=data.classes).to(device)
    # Weights are the same in all processes; what they drop must not be.
    torch.manual_seed(seed + 7919 * distributed.rank)
    loader = _make_loader(
        experiment, recordings, data=data, fold=run.fold, workers=workers, distributed=distributed
    )
    return Training(
        run=run,
        data=data,
        model=model,
        detect=make_detector(model, experiment, device, distributed),
        loader=loader,
        failures=FailureCounter(loader.dataset.clips),
        optimizer=_make_optimizer(model, config.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        average=None
        if config.optimizer.ema_decay is None
        else make_moving_average(model, config.optimizer.ema_decay),
        best=BestWeights(run.folder / "best", config.optimizer.average_best, distributed.is_first),
        device=device,
        distributed=distributed,
    )


def _make_optimizer(model: SEDModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW; biases, normalisations and GeM's power do not decay."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    groups = [
        {"params": [one for one in parameters if one.ndim > 1]},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)


def _make_loader(
    experiment: Experiment,
    recordings: pd.DataFrame,
    data: TrainingData,
    fold: int,
    workers: int,
    distributed: DistributedContext,
) -> DataLoader[ClipBatch]:
    noise, _ = data.split_noise(fold)
    subset = replace(data, recordings=recordings, noise_files=noise)
    share = ProcessShare(distributed.rank, distributed.world_size)
    sampler = ClipSampler(recordings, experiment.train.data, experiment.train.seed, share)
    return make_loader(ClipDataset(subset, experiment), sampler, workers)
