"""Average weights: over steps while training, over the best epochs at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from birdcall.files import write_atomically


def make_moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of ``model`` that follows it by ``update_parameters(model)``, buffers as well.

    The first steps count more, or random weights would stay in the mean for ``1 / (1 - decay)``
    steps: step n keeps ``min(decay, (1 + n) / (10 + n))``.
    """

    def follow(average: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        n_steps = int(n_averaged)
        keep = min(decay, (1 + n_steps) / (10 + n_steps))
        for mean, value in zip(average, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - keep)
            else:
                mean.copy_(value)  # how many batches a normalisation has seen

    @torch.no_grad()
    def follow_all(average: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        follow(average, current, n_averaged)

    return AveragedModel(model, multi_avg_fn=follow_all, use_buffers=True)


@dataclass
class BestWeights:
    """The weights of the ``n_best`` best epochs, as files in ``folder``.

    Every process knows which they are; the first one, which ``writes``, keeps their files.

    Nothing is deleted before `prune`: what an older state refers to must outlive the writing of
    the next one.
    """

    folder: Path
    n_best: int
    writes: bool = True
    scores: dict[int, float] = field(default_factory=dict)  # of the epochs that are kept

    def offer(self, epoch: int, score: float, model: nn.Module) -> None:
        """Keep the weights of ``model`` if ``score`` is among the best so far."""
        ranked = sorted(
            (self.scores | {epoch: score}).items(), key=lambda item: (-item[1], item[0])
        )
        kept = dict(ranked[: self.n_best])
        if epoch in kept and self.writes:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            write_atomically(self._path(epoch), safetensors.torch.save(weights))
        self.scores = kept

    def prune(self) -> None:
        """Delete the files of epochs that are no longer among the best."""
        kept = {self._path(epoch) for epoch in self.scores}
        for path in self.folder.glob("*.safetensors"):
            if path not in kept:
                path.unlink()

    def delete(self) -> None:
        """Delete all files and their folder."""
        self.scores = {}
        self.prune()
        if self.folder.is_dir():
            self.folder.rmdir()

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the kept weights; whole numbers are those of the best epoch."""
        best_first = sorted(self.scores, key=lambda epoch: (-self.scores[epoch], epoch))
        parts = [safetensors.torch.load_file(self._path(epoch)) for epoch in best_first]
        return {
            name: torch.stack([part[name] for part in parts]).mean(dim=0)
            if value.is_floating_point()
            else value
            for name, value in parts[0].items()
        }

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch{epoch:04d}.safetensors"
