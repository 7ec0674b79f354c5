"""Build backbones: timm's, and the networks of PANNs (Kong et al., 2020) under their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.config import FrontendConfig, ModelConfig, require

MIN_FRAMES = 32  # the stride of nearly every backbone: from 32 frames on, one frame comes out

_BLOCK_DROPOUT, _RESIDUAL_DROPOUT = 0.2, 0.1
_CNN14_WIDTHS = (64, 128, 256, 512, 1024, 2048)
_RESNET38_WIDTHS, _RESNET38_DEPTHS = (64, 128, 256, 512), (3, 4, 6, 3)
_RESNET38_FEATURES = 2048


def build_backbone(config: ModelConfig, in_chans: int, *, pretrained: bool) -> nn.Module:
    """Build the network whose ``forward_features`` are ``(batch, channels, frames, mels)``.

    ``ValueError`` names a backbone or an option that does not exist, and what does.
    """
    name, options = config.backbone, dict(config.backbone_options)
    try:
        if name in PANNS:
            return PANNS[name](in_chans, **options)
        import timm  # takes 2 s: not for a command that refuses its input

        if not timm.is_model(name):
            close = difflib.get_close_matches(name, [*PANNS, *timm.list_models()], n=3)
            raise ValueError(
                f"there is no backbone {name!r}; did you mean {', '.join(close) or 'another'}? "
                f"There are {', '.join(PANNS)} and all that `timm.list_models()` lists"
            )
        return timm.create_model(
            name,
            pretrained=pretrained,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            **options,
        )
    except TypeError as error:
        raise ValueError(f"backbone {name!r}: backbone_options: {error}") from error


def freeze_stages(backbone: nn.Module, name: str, n_stages: int) -> None:
    """Train no weight of the first ``n_stages`` of a backbone of timm; the stem is the first.

    Their normalisations still follow the statistics of the batches. ``ValueError`` where the
    backbone has not so many stages, or one of PANNs', which have none.
    """
    if n_stages == 0:
        return
    require(name not in PANNS, f"backbone {name!r} has no stages; its frozen_stages must be 0")
    from timm.models import group_parameters

    stages = list(group_parameters(backbone, backbone.group_matcher(coarse=True)).values())
    require(
        n_stages < len(stages),
        f"backbone {name!r} has {len(stages)} stages; frozen_stages is {n_stages}",
    )
    parameters = dict(backbone.named_parameters())
    for stage in stages[:n_stages]:
        for parameter in stage:
            parameters[parameter].requires_grad_(False)


def count_features(backbone: nn.Module, name: str, frontend: FrontendConfig) -> int:
    """Return the channels of ``forward_features``, measured: timm's ``num_features`` may differ.

    ``ValueError`` if the outputs for two lengths are no images whose third axis is time.
    """
    shapes = []
    was_training = backbone.training
    backbone.eval()
    for n_frames in (MIN_FRAMES, 4 * MIN_FRAMES):
        image = torch.zeros(1, len(frontend.features), n_frames, frontend.n_mels)
        try:
            with torch.no_grad():
                shapes.append(tuple(backbone.forward_features(image).shape))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"backbone {name!r} takes no image of {n_frames} frames and {frontend.n_mels} mel "
                f"bins, so it is not a CNN of any length: {str(error).splitlines()[0]}"
            ) from error
    backbone.train(was_training)
    short, long = shapes
    if len(short) != 4 or long[1] != short[1] or long[2] <= short[2] or long[3] != short[3]:
        raise ValueError(
            f"backbone {name!r} gives features {short}, and {long} of four times as many frames; "
            "choose a CNN, which gives (batch, channels, frames, mels)"
        )
    return short[1]


# --- PANNs ---


class _ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, each normalised and rectified; the image keeps its size."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _build_conv(in_chans, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _build_conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, image: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(image)))
        return functional.relu(self.bn2(self.conv2(hidden)))


class Cnn14(nn.Module):
    """Six blocks with a pooling after each but the last: stride 32, 2048 features.

    ``(batch, in_chans, frames, mels)`` → ``(batch, 2048, frames / 32, mels / 32)``, rounded up.
    """

    def __init__(self, in_chans: int = 1, widths: Sequence[int] = _CNN14_WIDTHS) -> None:
        super().__init__()
        self.num_features = widths[-1]
        for number, (before, after) in enumerate(pairwise((in_chans, *widths)), start=1):
            self.add_module(f"conv_block{number}", _ConvBlock(before, after))

    def forward_features(self, image: Tensor) -> Tensor:
        blocks = list(self.children())
        for block in blocks:
            image = block(image) if block is blocks[-1] else _halve(block(image))
            image = functional.dropout(image, _BLOCK_DROPOUT, self.training)
        return image


class _ResidualBlock(nn.Module):
    """ResNet's basic block, which halves its input by averaging instead of by a stride of two."""

    def __init__(self, in_chans: int, channels: int, *, is_halved: bool) -> None:
        super().__init__()
        self.is_halved = is_halved
        self.conv1 = _build_conv(in_chans, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _build_conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)  # the block begins as the identity, as in PANNs
        self.downsample = None
        if is_halved:
            pool = nn.AvgPool2d(2, ceil_mode=True)
            self.downsample = nn.Sequential(
                pool, _build_conv(in_chans, channels, 1), nn.BatchNorm2d(channels)
            )

    def forward(self, image: Tensor) -> Tensor:
        hidden = _halve(image) if self.is_halved else image
        hidden = functional.relu(self.bn1(self.conv1(hidden)))
        hidden = functional.dropout(hidden, _RESIDUAL_DROPOUT, self.training)
        shortcut = image if self.downsample is None else self.downsample(image)
        return functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet38(nn.Module):
    """The four layers of ResNet-34 between two blocks of PANNs: stride 32, 2048 features.

    ``(batch, in_chans, frames, mels)`` → ``(batch, 2048, frames / 32, mels / 32)``, rounded up.
    """

    num_features = _RESNET38_FEATURES

    def __init__(self, in_chans: int = 1) -> None:
        super().__init__()
        self.conv_block1 = _ConvBlock(in_chans, _RESNET38_WIDTHS[0])
        self.resnet = nn.Sequential()
        widths = pairwise((_RESNET38_WIDTHS[0], *_RESNET38_WIDTHS))
        for number, ((before, after), depth) in enumerate(
            zip(widths, _RESNET38_DEPTHS, strict=True), start=1
        ):
            first = _ResidualBlock(before, after, is_halved=number > 1)
            rest = (_ResidualBlock(after, after, is_halved=False) for _ in range(depth - 1))
            self.resnet.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.conv_block_after1 = _ConvBlock(_RESNET38_WIDTHS[-1], _RESNET38_FEATURES)

    def forward_features(self, image: Tensor) -> Tensor:
        image = _halve(self.conv_block1(image))
        image = _halve(self.resnet(functional.dropout(image, _BLOCK_DROPOUT, self.training)))
        image = self.conv_block_after1(functional.dropout(image, _BLOCK_DROPOUT, self.training))
        return functional.dropout(image, _BLOCK_DROPOUT, self.training)


def _build_conv(in_chans: int, channels: int, size: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_chans, channels, size, padding=size // 2, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer


# Averages 2 x 2 points; at an odd size, the remaining row or column is averaged as well. PANNs drop
# it: after five poolings up to 31 frames at the end of a clip would have no effect, and shorter
# clips would give no output at all. For even sizes the two are the same.
_halve = partial(functional.avg_pool2d, kernel_size=2, ceil_mode=True)


PANNS = {"panns_cnn14": Cnn14, "panns_resnet38": ResNet38}
