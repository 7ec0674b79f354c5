"""Compute the steps of a training: the loss of a batch, and the score of a validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.audio.decoder import AudioError, warn_once
from birdcall.audio.frontend import SpecAugment
from birdcall.config import Experiment, LossConfig, OptimizerConfig
from birdcall.data.augment import BatchDraws, augment_batch, mix_scale
from birdcall.data.birdnet import EMBEDDING_SIZE
from birdcall.data.clips import mix_embeddings, mix_frame_targets
from birdcall.data.dataset import TrainingData
from birdcall.data.loader import ClipBatch
from birdcall.data.targets import IGNORE_TARGET, make_targets
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import Ensemble
from birdcall.models.sed import SEDModel, SEDOutput, record_graph
from birdcall.training.distributed import DistributedContext

VALIDATION_SECONDS = 30.0  # of each recording: most birds sing early, some recordings last an hour

_N_PREVIEW_CLIPS = 8
_EXCLUDED_LOGIT = -1e4  # finite: the gradient of a clip without a known class is 0, not NaN
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sed_loss(
    output: SEDOutput,
    target: Tensor,
    config: LossConfig,
    weight: Tensor | None = None,
    frames: Tensor | None = None,
) -> Tensor:
    """Return the loss of a batch, a scalar: the mean of the clips' losses times their ``weight``.

    A clip's loss is the mean over classes of loss(clipwise) + ``framewise_weight`` x loss(loudest
    frame). The second term is the 6th place's: attention pooling alone leaves false frames, the
    maximum alone follows single impulses. `softmax_loss` is added with its weight, and the mean of
    the ``frames`` ``(batch, classes, n)`` that have targets with ``framewise_weight``.

    target: ``(batch, classes)`` in [0, 1], or IGNORE_TARGET: such a class adds nothing, and the
    mean is still over all classes, so that a batch's loss is the mean of its halves' losses.
    weight: ``(batch,)``, None: ones. Computed in float32, where the logarithm of a probability is
    safe.
    """
    with torch.autocast(target.device.type, enabled=False):
        is_known = target != IGNORE_TARGET
        target = target.float().clamp(min=0)
        # Label smoothing as in Keras, for independent classes: 0 becomes smoothing / 2, and 1
        # becomes 1 - smoothing / 2. The 2nd place of 2021 adds its 0.01 to 0.025 to all targets,
        # also to ones, which no probability can reach; at twice the value, absent classes (nearly
        # all) get the same target here.
        smoothing = config.label_smoothing
        smoothed = target * (1 - smoothing) + smoothing / 2
        loudest = output.framewise.float().amax(dim=-1)
        loss = _class_loss(output.clipwise.float(), smoothed, config)
        loss = loss + config.framewise_weight * _class_loss(loudest, smoothed, config)
        clip_loss = torch.where(is_known, loss, 0).mean(dim=1)
        if frames is not None:
            wanted = functional.adaptive_max_pool1d(frames.float(), output.framewise.shape[-1])
            is_timed = wanted != IGNORE_TARGET
            loss = _class_loss(output.framewise.float(), wanted.clamp(min=0), config)
            loss = torch.where(is_timed, loss, 0).sum(dim=-1) / is_timed.sum(dim=-1).clamp(min=1)
            clip_loss = clip_loss + config.framewise_weight * loss.mean(dim=1)
        if config.softmax_weight > 0:
            ranking = softmax_loss(output.clipwise.float(), target, is_known)
            clip_loss = clip_loss + config.softmax_weight / target.shape[1] * ranking
        return (clip_loss if weight is None else weight.float() * clip_loss).mean()


def softmax_loss(probability: Tensor, target: Tensor, is_known: Tensor) -> Tensor:
    """Return the cross-entropy ``(batch,)`` of the softmax of the logits and the targets.

    All ``(batch, classes)``. Targets of a sum above 1 are divided by it. Targets of 0 have a loss
    of 0: a softmax cannot predict nocall. Classes that are not known take no part.
    """
    logits = torch.logit(probability, torch.finfo(torch.float32).eps)
    logits = logits.masked_fill(~is_known, _EXCLUDED_LOGIT)
    entropy = -(target * torch.log_softmax(logits, dim=1)).sum(dim=1)
    return entropy / target.sum(dim=1).clamp(min=1)


def _class_loss(probability: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """Return the cross-entropy or focal loss of each element, in the shape of ``probability``.

    Focal (Lin et al. 2017, without alpha): cross-entropy x (1 - p_t) ** ``focal_gamma``, where p_t
    is the probability of the true state. Elements that are predicted well count less.
    """
    entropy = functional.binary_cross_entropy(probability, target, reduction="none")
    if config.name == "bce":
        return entropy
    error = probability * (1 - target) + (1 - probability) * target
    # A power below 1 has an infinite slope at zero.
    return entropy * error.clamp(min=torch.finfo(torch.float32).eps) ** config.focal_gamma


class BatchPreview(NamedTuple):
    """The first clips of a batch as the network was trained on them.

    log_mel: ``(clips, channels, frames, n_mels)``, after mixing, noise and masks; target: ``(clips,
    classes)``, after mixing; clipwise: ``(clips, classes)``, the predictions. recordings: the
    clips' source files; mixed-in recordings are in the target only.
    """

    log_mel: Tensor
    target: Tensor
    clipwise: Tensor
    recordings: tuple[str, ...]


def cosine_loss(projected: Tensor, embedding: Tensor) -> Tensor:
    """Return the mean over clips of 1 - cosine of both ``(batch, size)``; zeros add nothing."""
    loss = 1 - functional.cosine_similarity(projected.float(), embedding.float(), dim=1)
    return torch.where(embedding.any(dim=1), loss, 0).mean()


class _SpectrogramModel(nn.Module):
    """``model.detect``, which starts at the log-mel, as a module to compile and distribute.

    With a ``projection`` also that of the head's input, averaged over frames, else None.
    """

    def __init__(self, model: SEDModel, projection: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.projection = projection

    def forward(self, log_mel: Tensor) -> tuple[Tensor, ...]:
        if self.projection is None:
            return tuple(self.model.detect(log_mel))
        features = self.model.features(log_mel)
        return *self.model.head(features), self.projection(features.mean(dim=2))


class BatchLoss:
    """Computes the loss of batches: augmentation, front end, network and `sed_loss`.

    The network is compiled and distributed as ``experiment`` and ``distributed`` require. With a
    teacher, `cosine_loss` of a linear projection of the features is added. The projection is
    trained and no part of the model: ``modules`` has both.
    """

    def __init__(
        self,
        model: SEDModel,
        experiment: Experiment,
        device: torch.device,
        distributed: DistributedContext = DistributedContext(),
    ) -> None:
        self.model = model
        self.experiment = experiment
        self.device = device
        self.distributed = distributed
        self.modules: dict[str, nn.Module] = {"model": model}
        self.projection: nn.Module | None = None
        if experiment.train.teacher.weight > 0:
            # From a generator of its own: everything else is drawn as without a teacher.
            n_features = model.head.detection.in_channels
            projection = torch.nn.utils.skip_init(nn.Linear, n_features, EMBEDDING_SIZE)
            generator = torch.Generator().manual_seed(experiment.train.seed)
            nn.init.xavier_uniform_(projection.weight, generator=generator)
            nn.init.zeros_(projection.bias)
            self.modules["projection"] = self.projection = projection.to(device)
        network = distributed.wrap(_SpectrogramModel(model, self.projection), device)
        self._network = torch.compile(network) if experiment.train.compile else network
        # A replay overwrites the gradients of the last one, so they cannot be accumulated.
        self._is_to_record = (
            device.type == "cuda"
            and experiment.train.cuda_graph
            and not experiment.train.compile
            and experiment.train.optimizer.accumulate == 1
            and distributed.world_size == 1
        )
        augment = experiment.augment
        self._masks = SpecAugment(augment.time_mask_share, augment.mel_mask_share, augment.n_masks)

    def parameters(self) -> list[nn.Parameter]:
        """Return all that is trained."""
        modules = self.modules.values()
        return [item for module in modules for item in module.parameters() if item.requires_grad]

    def __call__(
        self,
        batch: ClipBatch,
        epoch: int,
        position: int,
        preview: Callable[[BatchPreview], None] | None = None,
    ) -> Tensor:
        """Return the loss of this process's part of a batch, a scalar.

        The random draws depend on the seed, ``epoch`` and the batch's ``position`` in the epoch.
        The loss is NaN where the network's output is not finite, because cross-entropy of NaN would
        end a CUDA process without naming the batch. ``preview`` receives the first clips.
        """
        waveform, target, weight, embedding, frames, masks = self._augment(batch, epoch, position)
        log_mel = self._masks.hide(self.model.frontend(waveform), masks)
        config = self.experiment.train
        dtype = _DTYPES[config.precision]
        is_mixed = dtype != torch.float32
        # A recording cannot use weights that autocast has cached before.
        with torch.autocast(self.device.type, dtype, enabled=is_mixed, cache_enabled=False):
            if self._is_to_record:
                self._is_to_record = False
                record_graph(self._network, log_mel)
            clipwise, framewise, *projected = self._network(log_mel)
        output = SEDOutput(clipwise, framewise)
        if preview is not None:
            tensors = (log_mel, target, output.clipwise)
            first = [tensor[:_N_PREVIEW_CLIPS].detach().float().cpu() for tensor in tensors]
            preview(BatchPreview(*first, batch.recordings[:_N_PREVIEW_CLIPS]))
        if not (output.framewise.isfinite().all() and output.clipwise.isfinite().all()):
            # Still a function of the weights: the other processes wait for its gradients.
            return output.framewise.sum() * math.nan
        loss = sed_loss(output, target, config.loss, weight, frames=frames)
        if self.projection is None:
            return loss
        share = config.teacher.weight / target.shape[1]  # the labels' loss is a mean over classes
        return loss + share * cosine_loss(*projected, embedding)

    def _augment(
        self, batch: ClipBatch, epoch: int, position: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return augmented waveforms, their targets, weights, embeddings and frames, and masks."""
        waveform, target, weight = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (batch.waveform, batch.target, batch.weight)
        )
        n_clips = len(waveform) * self.distributed.world_size
        entropy = (self.experiment.train.seed, epoch, position)
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0] >> np.uint64(1)))
        draws = BatchDraws.draw(n_clips, self.experiment.augment, generator)
        waveforms, targets, weights = waveform, target, weight
        embedding, frames = (
            None if tensor is None else tensor.to(self.device, non_blocking=True)
            for tensor in (batch.embedding, batch.frames)
        )
        if self.distributed.world_size > 1:
            # A clip can be mixed with a clip of another process.
            waveforms, targets, weights = map(self.distributed.gather, (waveform, target, weight))
            embedding, frames = (
                None if tensor is None else self.distributed.gather(tensor)
                for tensor in (embedding, frames)
            )
            part = self.distributed.part(n_clips)
            draws = draws.part(part.start, part.stop)
        if self.experiment.train.loss.rating_weight:
            # A mix is as good as its parts are on average.
            is_added = mix_scale(waveforms, draws) > 0
            added = torch.where(is_added, weights[draws.partners.to(self.device)], 0)
            weight = (weight + added.sum(dim=1)) / (1 + is_added.sum(dim=1))
        if embedding is not None:
            embedding = mix_embeddings(embedding, draws, mix_scale(waveforms, draws))
        if frames is not None:
            frames = mix_frame_targets(frames, draws, mix_scale(waveforms, draws))
        waveform, target = augment_batch(waveform, target, draws, (waveforms, targets))
        return waveform, target, weight, embedding, frames, draws.masks


def warmup_cosine(config: OptimizerConfig, step: int, n_steps: int) -> float:
    """Return the factor on the learning rate: a linear rise, then a cosine down to zero."""
    n_warmup = max(1, round(config.warmup_share * n_steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))


# --- epochs ---


@dataclass
class EpochLog:
    """The loss, speed and scores of an epoch; a row of ``log.csv``."""

    epoch: int  # from 1
    loss: float
    learning_rate: float
    seconds: float
    clips_per_second: float
    waiting_share: float  # of the time, waiting for the loader
    skipped: int = 0  # batches whose loss was not finite
    validation: dict[str, float] = field(default_factory=dict)


def validate(
    ensemble: Ensemble,
    recordings: pd.DataFrame,
    data: TrainingData,
    distributed: DistributedContext = DistributedContext(),
) -> dict[str, float]:
    """Return the scores of ``ensemble`` on recordings that it was not trained on.

    macro_ap: over so many ``classes``, those that occur in the recordings and that the member could
    learn; others that occur are ``left_out``. Of several processes, each predicts a part of the
    recordings. A recording that cannot be read is named and not scored; raises ValueError where
    none can.
    """
    shape = (len(recordings), len(data.classes))
    probabilities = torch.zeros(shape, device=ensemble.device)
    rows = range(distributed.rank, len(recordings), distributed.world_size)
    paths = {name: data.folder / name for name in recordings["path"].iloc[list(rows)]}
    results = predict_files(ensemble, paths, limit_seconds=VALIDATION_SECONDS)
    for row, (_, result) in zip(rows, results, strict=True):
        if isinstance(result, AudioError):
            warn_once(f"{result}; it is not part of the validation")
            probabilities[row] = torch.nan
            continue
        highest = result.clipwise.mean(axis=0).max(axis=0)  # of any segment
        probabilities[row] = torch.from_numpy(highest).to(ensemble.device)
    probabilities = distributed.sum(probabilities).cpu().numpy()
    is_read = ~np.isnan(probabilities).any(axis=1)
    if not is_read.any():
        raise ValueError(f"none of {len(recordings)} recordings to validate with can be read")
    # Nobody knows whether a secondary label is audible in the first seconds: it is ignored.
    targets = make_targets(recordings, data.classes, None)[is_read]
    occurs = (targets > 0).any(axis=0)
    scored = occurs & data.learnable_classes(ensemble.members[0].checkpoint.fold)
    macro_ap = macro_average_precision(targets[:, scored], probabilities[is_read][:, scored])
    n_scored = int(scored.sum())
    return {
        "macro_ap": round(macro_ap, 4),
        "classes": n_scored,
        "left_out": int(occurs.sum()) - n_scored,
    }


def macro_average_precision(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean average precision of the classes that occur; NaN where none occurs.

    Both arrays are ``(rows, classes)``; cells whose target is IGNORE_TARGET are left out.
    """
    from sklearn.metrics import average_precision_score  # 0.7 s, in each process that trains

    precisions = []
    for target, probability in zip(targets.T, probabilities.T, strict=True):
        is_known = target != IGNORE_TARGET
        is_present = target[is_known] > 0
        if is_present.any():
            precisions.append(average_precision_score(is_present, probability[is_known]))
    return float(np.mean(precisions)) if precisions else math.nan
