"""Train one run: an experiment on all folds but one, validated on that one."""

from __future__ import annotations

import csv
import io
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from birdcall.audio import AudioError
from birdcall.augment import augment_batch
from birdcall.checkpoint import SETTINGS_FILE, Checkpoint, save_checkpoint
from birdcall.config import Experiment, TrainConfig
from birdcall.dataset import ClipDataset, ClipSampler, TrainingData, make_targets
from birdcall.files import write_atomically
from birdcall.frontend import SpecAugment
from birdcall.inference import Ensemble, Member, default_device, score_recordings
from birdcall.loader import FailureCounter, iterate_clips, make_loader
from birdcall.losses import sed_loss
from birdcall.metrics import average_precision, macro_average
from birdcall.models import SEDModel, build_model

logger = logging.getLogger(__name__)

LOG_FILE = "log.csv"
VALIDATION_SECONDS = 30.0  # of each recording: most sing early on, and some last an hour


@dataclass
class EpochLog:
    """What one epoch cost and gave; a row of ``log.csv``."""

    epoch: int
    loss: float
    learning_rate: float
    seconds: float
    clips_per_second: float
    waiting_share: float  # of the time, spent waiting for the loader
    validation: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        values = {name: value for name, value in vars(self).items() if name != "validation"}
        return {name: round(value, 6) for name, value in (values | self.validation).items()}


def train_runs(
    experiments: Sequence[Experiment],
    data: TrainingData,
    fold: int | None,
    folder: Path,
    *,
    workers: int = 1,
    jobs: int = 1,
    init: Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Checkpoint]:
    """Train each experiment on ``fold``, or on all; runs go to ``folder/<experiment>/fold<k>``.

    ``jobs`` runs are trained at once, each in a process with its share of the cores: on a CPU, two
    networks on one core each are faster than one on two. What would be overwritten is refused
    before the first run starts.
    """
    folds = data.folds if fold is None else [fold]
    runs = [(item, k, folder / item.name / f"fold{k}") for item in experiments for k in folds]
    for _, k, target in runs:
        data.split(k)
        if (target / SETTINGS_FILE).exists() and not overwrite:
            raise ValueError(f"{target} holds a trained run already; --overwrite trains it again")
    options = {"workers": workers, "init": init, "progress": progress}
    if jobs == 1:
        return [train_run(item, k, data, target, **options) for item, k, target in runs]
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, stuck
    with ProcessPoolExecutor(jobs, spawn, _share_cores, (jobs, logger.getEffectiveLevel())) as pool:
        pending = [
            pool.submit(train_run, item, k, data, target, bar_position=number % jobs, **options)
            for number, (item, k, target) in enumerate(runs)
        ]
        return [one.result() for one in pending]


def _share_cores(jobs: int, level: int) -> None:
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def train_run(
    experiment: Experiment,
    fold: int,
    data: TrainingData,
    folder: Path,
    *,
    workers: int = 1,
    device: torch.device | None = None,
    init: Path | None = None,
    progress: bool = False,
    bar_position: int | None = None,
) -> Checkpoint:
    """Train ``experiment`` without ``fold`` and leave checkpoint and log in ``folder``.

    Two calls with the same arguments give the same weights (on a CPU). Seeds torch's global
    generator, from which weights and dropout are drawn.
    """
    device = device or default_device()
    config = experiment.train
    train_part, validation_part = data.split(fold)
    torch.manual_seed(config.seed * 1000 + fold)
    model = _start_model(experiment, len(data.classes), init).to(device)
    loader = _make_loader(experiment, train_part, data, fold, workers)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = LambdaLR(optimizer, _warmup_cosine(config, config.epochs * len(loader)))
    failures = FailureCounter(loader.dataset.clips)
    log: list[EpochLog] = []
    n_steps = config.epochs * len(loader)
    with tqdm(total=n_steps, disable=not progress, unit="batch", position=bar_position) as bar:
        bar.set_description(f"{experiment.name} fold {fold}")
        for epoch in range(config.epochs):
            entry = _train_epoch(
                model, loader, failures, optimizer, schedule, experiment, epoch, device, bar
            )
            if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
                entry.validation = validate(model, experiment, fold, validation_part, data, device)
            log.append(entry)
            _write_log(folder / LOG_FILE, log)
            bar.set_postfix(epoch=epoch + 1, loss=f"{entry.loss:.3f}", **entry.validation)
    checkpoint = Checkpoint(experiment, data.classes, fold, log[-1].validation)
    return save_checkpoint(folder, model, checkpoint)


def _start_model(experiment: Experiment, n_classes: int, init: Path | None) -> SEDModel:
    pretrained = experiment.model.pretrained and init is None
    try:
        model = build_model(experiment, n_classes, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        # timm raises what its hub client raises; offline that is one of these.
        raise ValueError(
            f"cannot fetch the pretrained weights of {experiment.model.backbone} "
            f"({type(error).__name__}); give them with --init FILE"
        ) from error
    if init is not None:
        load_backbone(model, init)
    return model


def load_backbone(model: SEDModel, path: Path) -> None:
    """Load a backbone's state dict (``.safetensors``, or ``.pth`` of plain tensors) into ``model``.

    A first convolution of three channels is summed to one, as timm does. The classifier's weights
    are left out; any other missing or unexpected key is a ``ValueError`` that lists them.
    """
    from timm.models import adapt_input_conv

    state = _read_state_dict(path)
    own = model.backbone.state_dict()
    for name, value in list(state.items()):
        if name in own and value.ndim == 4 and value.shape[1] == 3 != own[name].shape[1]:
            state[name] = adapt_input_conv(own[name].shape[1], value)
    classifier = ("classifier.", "fc.", "head.fc.")
    missing = sorted(set(own) - set(state))
    unexpected = sorted(key for key in set(state) - set(own) if not key.startswith(classifier))
    wrong = sorted(key for key in own if key in state and own[key].shape != state[key].shape)
    if missing or unexpected or wrong:
        raise ValueError(
            f"{path}: weights of another architecture: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, "
            f"{len(wrong)} of another shape {wrong[:3]}"
        )
    model.backbone.load_state_dict({key: state[key] for key in own})


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file to initialise from")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _make_loader(
    experiment: Experiment, recordings: pd.DataFrame, data: TrainingData, fold: int, workers: int
) -> DataLoader:
    config = experiment.train
    noise, _ = data.split_noise(fold)
    dataset = ClipDataset(recordings, data.classes, experiment, data.read_clip, noise)
    sampler = ClipSampler(
        list(recordings["ebird_code"]),
        config.clips_per_epoch,
        config.sampling,
        config.seed,
        ratings=list(recordings["rating"]),
        crops_per_recording=config.crops_per_recording,
    )
    return make_loader(dataset, sampler, workers)


def _warmup_cosine(config: TrainConfig, n_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate: up in a line, down along a cosine to nothing."""
    n_warmup = max(1, round(config.warmup_share * n_steps))

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))

    return factor


def _train_epoch(
    model: SEDModel,
    loader: DataLoader,
    failures: FailureCounter,
    optimizer: Optimizer,
    schedule: LambdaLR,
    experiment: Experiment,
    epoch: int,
    device: torch.device,
    bar: tqdm,
) -> EpochLog:
    config = experiment.train
    loader.sampler.set_epoch(epoch)
    generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    model.train()
    learning_rate = schedule.get_last_lr()[0]
    losses, n_clips, waiting = [], 0, 0.0
    start = mark = time.perf_counter()
    for waveform, target in iterate_clips(loader, failures):
        waiting += time.perf_counter() - mark
        loss = training_step(
            model,
            waveform.to(device),
            target.to(device),
            experiment,
            optimizer,
            generator,
        )
        schedule.step()
        losses.append(loss)
        n_clips += len(waveform)
        bar.update()
        mark = time.perf_counter()
    seconds = time.perf_counter() - start
    return EpochLog(
        epoch + 1,
        float(np.mean(losses)),
        learning_rate,
        seconds,
        n_clips / seconds,
        waiting / seconds,
    )


def training_step(
    model: SEDModel,
    waveform: Tensor,
    target: Tensor,
    experiment: Experiment,
    optimizer: Optimizer,
    generator: torch.Generator,
) -> float:
    """Make one step on a batch, waveform ``(batch, samples)``; return its loss."""
    augment = experiment.augment
    waveform, target = augment_batch(waveform, target, augment, generator)
    log_mel = model.frontend(waveform)
    hide = SpecAugment(augment.time_mask_share, augment.mel_mask_share, augment.n_masks)
    output = model.detect(hide(log_mel, generator))
    # Before the loss: cross-entropy of NaN ends a CUDA process without saying where.
    if not output.framewise.isfinite().all():
        raise ValueError("the model's output is not finite: lower the learning_rate")
    loss = sed_loss(output, target, experiment.train.framewise_loss_weight)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), experiment.train.gradient_clip)
    optimizer.step()
    return loss.item()


def validate(
    model: SEDModel,
    experiment: Experiment,
    fold: int,
    recordings: pd.DataFrame,
    data: TrainingData,
    device: torch.device,
) -> dict[str, float]:
    """Score ``model`` on recordings that it was not trained on, with the kernel's own inference."""
    checkpoint = Checkpoint(experiment, data.classes, fold)
    ensemble = Ensemble([Member(checkpoint.name, model, checkpoint)], device)
    scores = score_out_of_fold(ensemble, recordings, data.folder)
    targets = make_targets(recordings, data.classes, 0.0) > 0
    return {"macro_ap": round(macro_average(average_precision(targets, scores)), 4)}


def score_out_of_fold(ensemble: Ensemble, recordings: pd.DataFrame, folder: Path) -> np.ndarray:
    """Return the highest clipwise probability of any segment, ``(recordings, classes)``."""
    paths = {name: folder / name for name in recordings["path"]}
    scores = np.zeros((len(paths), len(ensemble.classes)), dtype=np.float32)
    heard = score_recordings(ensemble, paths, limit_seconds=VALIDATION_SECONDS)
    for row, (_, result) in enumerate(heard):
        if isinstance(result, AudioError):
            raise result
        scores[row] = result.clipwise.mean(axis=0).max(axis=0)
    return scores


def _write_log(path: Path, log: Sequence[EpochLog]) -> None:
    rows = [entry.row() for entry in log]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
