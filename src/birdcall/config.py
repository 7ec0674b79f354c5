"""Say what an experiment is: frozen, checked, JSON-able settings, and the named experiments."""

from __future__ import annotations

import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

SEGMENT_SECONDS = 5  # the competition scores one row per five seconds
NOCALL = "nocall"

FEATURES = ("log_mel", "log_mel_1.5", "pcen", "delta", "delta_delta")
NORMALIZATIONS = ("none", "clip", "bin")
IMPLEMENTATIONS = ("fft", "torchlibrosa", "conv")
TEMPORAL_LAYERS = ("none", "gru", "attention", "gru+attention")
SAMPLINGS = ("uniform", "balanced", "rated", "balanced+rated")

Config = TypeVar("Config")


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def require_share(name: str, value: float) -> None:
    require(0 <= value <= 1, f"{name} is {value}; a probability lies between 0 and 1")


def require_range(name: str, bounds: tuple[float, float]) -> None:
    require(
        len(bounds) == 2 and bounds[0] <= bounds[1],
        f"{name} is {bounds}; give (lowest, highest)",
    )


@dataclass(frozen=True)
class FrontendConfig:
    """From waveform to the model's input image; names and meanings are librosa's.

    ``features`` are the image's channels, in order. ``top_db`` limits the range below the loudest
    point *of each clip* (never of the batch). The defaults are those of PANNs and of the 1st place.
    """

    sample_rate: int = 32_000
    n_fft: int = 1024
    hop_length: int = 320
    n_mels: int = 64
    fmin: float = 50.0
    fmax: float = 14_000.0
    features: tuple[str, ...] = ("log_mel",)
    normalization: str = "none"
    top_db: float | None = None
    implementation: str = "fft"

    def __post_init__(self) -> None:
        for name in ("sample_rate", "n_fft", "hop_length", "n_mels"):
            require(
                getattr(self, name) > 0,
                f"{name} is {getattr(self, name)}; it must be above 0",
            )
        require(
            self.hop_length <= self.n_fft,
            f"hop_length {self.hop_length} skips samples: it must not exceed n_fft {self.n_fft}",
        )
        nyquist = self.sample_rate / 2
        require(
            0 <= self.fmin < self.fmax <= nyquist,
            f"fmin {self.fmin} and fmax {self.fmax} Hz must satisfy 0 <= fmin < fmax <= "
            f"{nyquist:g} Hz, half the sample_rate of {self.sample_rate}",
        )
        require(
            len(self.features) > 0,
            f"features is empty; choose from {', '.join(FEATURES)}",
        )
        for feature in self.features:
            require_choice("features", feature, FEATURES)
        require_choice("normalization", self.normalization, NORMALIZATIONS)
        require_choice("implementation", self.implementation, IMPLEMENTATIONS)
        require(
            self.top_db is None or self.top_db > 0,
            f"top_db is {self.top_db}; give decibels above 0, or None",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A sound event detector: timm backbone, temporal layer, attention head (PANNs)."""

    backbone: str = "resnet18"
    backbone_options: tuple[tuple[str, Any], ...] = ()  # (name, value) pairs for timm's builder
    pretrained: bool = True  # timm's weights; needs the hub, or `--init FILE`
    temporal: str = "gru"
    temporal_size: int = 256  # channels between backbone and head
    dropout: float = 0.3

    def __post_init__(self) -> None:
        require_choice("temporal", self.temporal, TEMPORAL_LAYERS)
        require(
            self.temporal_size > 0 and self.temporal_size % 8 == 0,
            f"temporal_size is {self.temporal_size}; it must be a positive multiple of 8",
        )
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; give a share in [0, 1)")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training clips; each with its probability, its range and its reason."""

    # Recordings are close and clean, soundscapes are not: the largest single gain of the 2020
    # solutions (4th place: +0.02). Real bird-free noise where there is some, at 0-15 dB.
    noise_probability: float = 0.6
    noise_snr_db: tuple[float, float] = (0.0, 15.0)
    # A bird-free clip with an empty target now and then (7th place), to learn nocall from.
    noise_only_probability: float = 0.15
    # Wind and rain are near to pink; the 1st place trained on generated pink noise alone.
    color_noise_probability: float = 0.3
    color_noise_snr_db: tuple[float, float] = (3.0, 20.0)
    # Distant birds are quiet (1st and 4th place turned the volume down more than up).
    gain_probability: float = 0.5
    gain_db: tuple[float, float] = (-18.0, 6.0)
    # Distance and foliage take the high frequencies first (2nd place).
    low_pass_probability: float = 0.2
    low_pass_hz: tuple[float, float] = (4_000.0, 12_000.0)
    # Union-label mixup of waveforms (3rd, 4th place): rows with two or three birds occur.
    mixup_probability: float = 0.5
    mixup_gain_db: tuple[float, float] = (-6.0, 6.0)
    # SpecAugment, in shares of the clip's frames and mel bins.
    time_mask_share: float = 0.1
    mel_mask_share: float = 0.1
    n_masks: int = 2

    def __post_init__(self) -> None:
        for name in ("noise", "noise_only", "color_noise", "gain", "low_pass", "mixup"):
            require_share(f"{name}_probability", getattr(self, f"{name}_probability"))
        for item in fields(self):
            if item.name.endswith(("_db", "_hz")):
                require_range(item.name, getattr(self, item.name))
        require_share("time_mask_share", self.time_mask_share)
        require_share("mel_mask_share", self.mel_mask_share)
        require(self.n_masks >= 0, f"n_masks is {self.n_masks}; it must not be negative")


NO_AUGMENT = AugmentConfig(
    noise_probability=0,
    noise_only_probability=0,
    color_noise_probability=0,
    gain_probability=0,
    low_pass_probability=0,
    mixup_probability=0,
    n_masks=0,
)


@dataclass(frozen=True)
class TrainConfig:
    """How an experiment is trained."""

    clip_seconds: float = 20.0  # weak labels hold for long clips (1st: 30 s, 6th: 20 s)
    epochs: int = 40
    clips_per_epoch: int | None = None  # None: as many as the fold has recordings
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_share: float = 0.05
    sampling: str = "balanced"  # see dataset.recording_weights
    crops_per_recording: int = 1  # clips in a row from one opened recording
    secondary_label_weight: float = (
        0.3  # target of species heard behind the primary one (2nd place)
    )
    framewise_loss_weight: float = 0.5  # 6th place: keeps the frames honest
    validate_every: int = 5  # epochs; the last one is always validated
    gradient_clip: float = 5.0
    seed: int = 0
    # Of the recordings, and of the noise files: more that fail while training stop the run. The
    # audit has left out what is damaged, so failures mean that files or a disk have changed since.
    max_failed_share: float = 0.01

    def __post_init__(self) -> None:
        for name in (
            "clip_seconds",
            "epochs",
            "batch_size",
            "crops_per_recording",
            "learning_rate",
            "gradient_clip",
        ):
            require(
                getattr(self, name) > 0,
                f"{name} is {getattr(self, name)}; it must be above 0",
            )
        require(
            self.clips_per_epoch is None or self.clips_per_epoch >= self.batch_size,
            f"clips_per_epoch {self.clips_per_epoch} is less than one batch of {self.batch_size}",
        )
        require_choice("sampling", self.sampling, SAMPLINGS)
        require_share("warmup_share", self.warmup_share)
        require_share("secondary_label_weight", self.secondary_label_weight)
        require_share("max_failed_share", self.max_failed_share)
        require(
            self.framewise_loss_weight >= 0,
            "framewise_loss_weight must not be negative",
        )


@dataclass(frozen=True)
class Experiment:
    """A named configuration; an experiment on one fold is a run."""

    name: str
    description: str
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def named(cls, name: str) -> Experiment:
        """Return the experiment called ``name``; ``ValueError`` lists the known ones."""
        require(
            name in EXPERIMENTS,
            f"unknown experiment {name!r}; known experiments: {', '.join(EXPERIMENTS)}",
        )
        return EXPERIMENTS[name]

    @property
    def clip_samples(self) -> int:
        return round(self.train.clip_seconds * self.frontend.sample_rate)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, as `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Experiment:
        """Rebuild an experiment from `to_dict`, even after JSON made lists of its tuples."""
        return config_from_dict(cls, values)


def config_from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Build a config dataclass from plain values, checking every name on the way."""
    hints = typing.get_type_hints(config_class)
    unknown = sorted(set(values) - {item.name for item in fields(config_class)})
    require(
        not unknown,
        f"{config_class.__name__} has no field {', '.join(unknown)}: "
        "was it written by another version of birdcall?",
    )
    return config_class(**{name: _restored(hints[name], value) for name, value in values.items()})


def _restored(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return config_from_dict(hint, value)
    return _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


# Two cores and no GPU: half the frame rate, a quarter of the channels, five-second clips.
SMALL = Experiment(
    name="small_gru",
    description="narrow ResNet-10 + bi-GRU + attention head, from random weights; two CPU cores",
    frontend=FrontendConfig(hop_length=640, fmin=200.0),
    model=ModelConfig(
        backbone="resnet10t",
        backbone_options=(("channels", (32, 64, 128, 256)), ("stem_width", 16)),
        pretrained=False,
        temporal="gru",
        temporal_size=128,
        dropout=0.2,
    ),
    train=TrainConfig(
        clip_seconds=5.0,
        epochs=24,
        clips_per_epoch=480,
        batch_size=32,
        learning_rate=3e-3,
        # Birds behind are what soundscapes are made of: at 0.3 they stay below every threshold.
        secondary_label_weight=1.0,
    ),
)

_ALL = (
    Experiment(
        name="densenet121",
        description="the 1st place's network: DenseNet-121, plain attention head, 30-s clips",
        model=ModelConfig(backbone="densenet121", temporal="none", temporal_size=1024, dropout=0.5),
        train=TrainConfig(clip_seconds=30.0, epochs=50, batch_size=24),
    ),
    Experiment(
        name="resnest50_gru",
        description="ResNeSt-50 + bi-GRU + attention head on 128 mel bins, 20-s clips",
        frontend=FrontendConfig(n_mels=128, fmin=20.0, fmax=16_000.0),
        model=ModelConfig(backbone="resnest50d", temporal="gru", temporal_size=512),
    ),
    Experiment(
        name="efficientnet_b0_gru_attention",
        description="EfficientNet-B0 + bi-GRU + self-attention on log-mel and deltas",
        frontend=FrontendConfig(n_mels=128, features=("log_mel", "delta", "delta_delta")),
        model=ModelConfig(backbone="tf_efficientnet_b0", temporal="gru+attention"),
    ),
    SMALL,
    replace(
        SMALL,
        name="small_attention",
        description="small_gru with self-attention for the GRU, on input normalised per clip",
        frontend=replace(SMALL.frontend, n_mels=80, fmax=12_000.0, normalization="clip"),
        model=replace(SMALL.model, temporal="attention"),
        train=replace(SMALL.train, seed=1),
    ),
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
require(len(EXPERIMENTS) == len(_ALL), "two experiments have the same name")
