"""Build backbones: timm's, the networks of PANNs (Kong et al., 2020), and BirdNET 2.4's."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
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
        if name in OWN:
            return OWN[name](in_chans, **options)
        import timm  # takes 2 s: not for a command that refuses its input

        if not timm.is_model(name):
            close = difflib.get_close_matches(name, [*OWN, *timm.list_models()], n=3)
            raise ValueError(
                f"there is no backbone {name!r}; did you mean {', '.join(close) or 'another'}? "
                f"There are {', '.join(OWN)} and all that `timm.list_models()` lists"
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
    """Train no weight of the first ``n_stages`` of a backbone; the stem is the first.

    Their normalisations still follow the statistics of the batches. ``ValueError`` where the
    backbone has not so many stages, or one of PANNs', which have none.
    """
    if n_stages == 0:
        return
    require(name not in PANNS, f"backbone {name!r} has no stages; its frozen_stages must be 0")
    from timm.models import group_parameters

    stages = list(group_parameters(backbone, backbone.group_matcher(coarse=True)).values())
    require(
        n_stages <= len(stages),
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


# --- BirdNET ---


class _InvertedBlock(nn.Module):
    """MobileNet's inverted residual block with squeeze and excitation, normalisations folded in."""

    def __init__(self, in_chans: int, channels: int, widths: tuple[int, int], stride: int) -> None:
        super().__init__()
        width, squeezed = widths
        self.has_shortcut = stride == 1
        self.expand = nn.Conv2d(in_chans, width, 1)
        self.depthwise = nn.Conv2d(width, width, 3, stride, 1, groups=width)
        if squeezed:
            self.squeeze = nn.Conv2d(width, squeezed, 1, bias=False)
            self.excite = nn.Conv2d(squeezed, width, 1, bias=False)
        self.project = nn.Conv2d(width, channels, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = _silu(self.depthwise(_silu(self.expand(image))))
        if hasattr(self, "squeeze"):
            squeezed = _silu(self.squeeze(hidden.mean(dim=(2, 3), keepdim=True)))
            hidden = hidden * torch.sigmoid(self.excite(squeezed))
        hidden = self.project(hidden)
        return image + hidden if self.has_shortcut else hidden


class _Affine(nn.Module):
    """A scale and an offset per channel, which are not trained: a normalisation's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.register_buffer("offset", torch.zeros(channels, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return image * self.scale + self.offset


class BirdNETBackbone(nn.Module):
    """The convolutions of BirdNET 2.4 (Kahl et al., 2021): stride 64, 1024 features.

    ``(batch, 2, frames, 96 mel bins)`` in dB, see `BirdNETFilters`, → ``(batch, 1024, frames / 64,
    1)``, rounded up. BirdNET averages its features over the 6 frames of 3 s that the last, unpadded
    convolution leaves; here all frames are kept, and that convolution repeats the first and the
    last one.
    """

    num_features = 1024
    takes_decibels = True  # it has its own scale of loudness, so `SEDModel` does not normalise

    def __init__(self, in_chans: int = 2) -> None:
        super().__init__()
        require(in_chans == 2, "backbone 'birdnet' takes the features birdnet_low and birdnet_high")
        self.register_buffer("power", torch.full((in_chans, 1, 1), 0.2))  # of the filters' power
        self.input_norm = _Affine(in_chans)
        self.stem = nn.Conv2d(in_chans, 24, (8, 4), 2)
        self.stem_pool = nn.Conv2d(48, 24, 1)
        self.blocks = nn.Sequential()
        before = 24
        for depth, channels, *widths in _BIRDNET_STAGES:
            blocks = [_InvertedBlock(before, channels, tuple(widths), stride=2)]
            blocks += [
                _InvertedBlock(channels, channels, tuple(widths), stride=1)
                for _ in range(depth - 1)
            ]
            self.blocks.append(nn.Sequential(*blocks))
            before = channels
        self.post_norm = _Affine(before)
        self.post = nn.Conv2d(before, self.num_features, 3)

    def forward_features(self, image: Tensor) -> Tensor:
        # A last output frame of few image frames changes all others, through the squeeze: for 513
        # frames the cosine to the embedding of 512 is 0.55. So the image is mirrored at its end.
        n_frames = image.shape[2]
        period = max(1, 2 * n_frames - 2)
        n_padded = -(-n_frames // _BIRDNET_STRIDE) * _BIRDNET_STRIDE
        number = torch.arange(n_padded, device=image.device) % period
        mirrored = torch.minimum(number, period - number)
        decibels = image[:, :, mirrored].flip(3)  # the highest frequency is the first
        image = self.input_norm(torch.exp(decibels * self.power * _NEPER_PER_DB))
        image = functional.relu(self.stem(functional.pad(image, (1, 1, 3, 4))))
        pooled = functional.max_pool2d(image, (2, 1)), functional.avg_pool2d(image, (2, 1))
        image = self.blocks(self.stem_pool(torch.cat(pooled, dim=1)))
        image = functional.relu(self.post_norm(image))
        image = torch.cat((image[:, :, :1], image, image[:, :, -1:]), dim=2)
        return functional.relu(self.post(image))

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return what timm's ``group_parameters`` takes: the stem, the stages, the last one."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^post", (99,))]}


def birdnet_state(weights: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the state dict of a `BirdNETBackbone` from the weights of BirdNET's network.

    Its convolutions are (outputs, mel bins, frames, inputs), its depthwise ones (1, mel bins,
    frames, channels). Its other layers, with biases of zero, are left out.
    """
    powers = [weights[f"model/MEL_SPEC{number}/truediv_1"] for number in (1, 2)]
    state = {"power": torch.from_numpy(np.stack(powers)).reshape(2, 1, 1)}
    for norm, name in (("input_norm", "SPEC"), ("post_norm", "POST")):
        for key, number in (("offset", ""), ("scale", "1")):
            value = weights[f"model/BNORM_{name}_NOQUANT/FusedBatchNormV3{number}"]
            state[f"{norm}.{key}"] = torch.from_numpy(value).reshape(-1, 1, 1)
    for name, value in weights.items():
        layer = name.removeprefix("model/").split("/")[0]
        block = re.fullmatch(r"BLOCK_(\d)-(\d)_(\w+)", layer)
        key = _BIRDNET_LAYERS.get((block[3] if block else layer, value.ndim))
        if key is None:
            continue
        if block:
            key = f"blocks.{int(block[1]) - 1}.{int(block[2]) - 1}.{key}"
        if value.ndim == 4:
            value = value.transpose((3, 0, 2, 1) if ".depthwise." in key else (0, 3, 2, 1))
        state[key] = torch.from_numpy(np.ascontiguousarray(value))
    return state


# BirdNET's names of layers, and the number of dimensions: weights have four, biases one.
_BIRDNET_LAYERS = {
    ("CONV_0", 4): "stem.weight", ("BNORM_0", 1): "stem.bias",
    ("POOL_0_CONV", 4): "stem_pool.weight", ("POOL_0_CONV", 1): "stem_pool.bias",
    ("CONV_1", 4): "expand.weight", ("BN_1", 1): "expand.bias",
    ("BN_2", 4): "depthwise.weight", ("BN_2", 1): "depthwise.bias",
    ("SE_CONV_1", 4): "squeeze.weight", ("SE_CONV_2", 4): "excite.weight",
    ("CONV_3", 4): "project.weight",
    ("POST_CONV_1", 4): "post.weight", ("POST_BN_1", 1): "post.bias",
}  # fmt: skip
# Of each stage: its blocks, their output channels, width and squeezed width.
_BIRDNET_STAGES = ((3, 36, 72, 0), (4, 72, 288, 18), (5, 108, 864, 27), (4, 192, 1536, 48))
_silu = partial(functional.silu, inplace=True)
_BIRDNET_STRIDE = 64
_NEPER_PER_DB = math.log(10) / 10

BIRDNET = "birdnet"
# Backbones that are built here; all others are timm's.
OWN = PANNS | {BIRDNET: BirdNETBackbone}
