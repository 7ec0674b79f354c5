"""Build the convolutional networks of PANNs (Kong et al., 2020), named as in their checkpoints."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

BLOCK_DROPOUT, RESIDUAL_DROPOUT = 0.2, 0.1
CNN14_WIDTHS = (64, 128, 256, 512, 1024, 2048)
RESNET38_WIDTHS, RESNET38_DEPTHS = (64, 128, 256, 512), (3, 4, 6, 3)
RESNET38_FEATURES = 2048


def halve(image: Tensor) -> Tensor:
    """Average 2 x 2 points; what an odd size leaves over is averaged as well.

    PANNs drop it: up to 31 frames at the end of a clip would go unheard after five poolings, and
    shorter clips could not be heard at all. Where sizes are even, the two are the same.
    """
    return functional.avg_pool2d(image, 2, ceil_mode=True)


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, each normalised and rectified; the image keeps its size."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _convolve(in_chans, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolve(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, image: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(image)))
        return functional.relu(self.bn2(self.conv2(hidden)))


class Cnn14(nn.Module):
    """Six blocks, halved after each but the last: stride 32, 2048 features.

    ``(batch, in_chans, frames, mels)`` → ``(batch, 2048, frames / 32, mels / 32)``, rounded up.
    """

    num_features = CNN14_WIDTHS[-1]

    def __init__(self, in_chans: int = 1) -> None:
        super().__init__()
        for number, (before, after) in enumerate(pairwise((in_chans, *CNN14_WIDTHS)), start=1):
            self.add_module(f"conv_block{number}", ConvBlock(before, after))

    def forward_features(self, image: Tensor) -> Tensor:
        *blocks, last = self.children()
        for block in blocks:
            image = self._drop(halve(block(image)))
        return self._drop(last(image))

    def _drop(self, image: Tensor) -> Tensor:
        return functional.dropout(image, BLOCK_DROPOUT, self.training)


class ResidualBlock(nn.Module):
    """ResNet's basic block, halved by averaging instead of by steps of two."""

    def __init__(self, in_chans: int, channels: int, *, is_halved: bool) -> None:
        super().__init__()
        self.is_halved = is_halved
        self.conv1 = _convolve(in_chans, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolve(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)  # starts as the identity, as in PANNs
        self.downsample = None
        if is_halved:
            pool = nn.AvgPool2d(2, ceil_mode=True)
            self.downsample = nn.Sequential(
                pool, _convolve(in_chans, channels, 1), nn.BatchNorm2d(channels)
            )

    def forward(self, image: Tensor) -> Tensor:
        hidden = halve(image) if self.is_halved else image
        hidden = functional.relu(self.bn1(self.conv1(hidden)))
        hidden = functional.dropout(hidden, RESIDUAL_DROPOUT, self.training)
        shortcut = image if self.downsample is None else self.downsample(image)
        return functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet38(nn.Module):
    """ResNet-34's four layers between two blocks of PANNs: stride 32, 2048 features.

    ``(batch, in_chans, frames, mels)`` → ``(batch, 2048, frames / 32, mels / 32)``, rounded up.
    """

    num_features = RESNET38_FEATURES

    def __init__(self, in_chans: int = 1) -> None:
        super().__init__()
        self.conv_block1 = ConvBlock(in_chans, RESNET38_WIDTHS[0])
        self.resnet = nn.Sequential()
        widths = pairwise((RESNET38_WIDTHS[0], *RESNET38_WIDTHS))
        for number, ((before, after), depth) in enumerate(
            zip(widths, RESNET38_DEPTHS, strict=True), start=1
        ):
            first = ResidualBlock(before, after, is_halved=number > 1)
            rest = (ResidualBlock(after, after, is_halved=False) for _ in range(depth - 1))
            self.resnet.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.conv_block_after1 = ConvBlock(RESNET38_WIDTHS[-1], RESNET38_FEATURES)

    def forward_features(self, image: Tensor) -> Tensor:
        image = self._drop(halve(self.conv_block1(image)))
        image = self._drop(halve(self.resnet(image)))
        return self._drop(self.conv_block_after1(image))

    def _drop(self, image: Tensor) -> Tensor:
        return functional.dropout(image, BLOCK_DROPOUT, self.training)


def _convolve(in_chans: int, channels: int, size: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_chans, channels, size, padding=size // 2, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer


PANNS = {"panns_cnn14": Cnn14, "panns_resnet38": ResNet38}
