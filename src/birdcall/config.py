"""Say what an experiment is: frozen, checked, JSON-able settings."""

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
HEADS = ("attention", "max", "log_mean_exp")
POOLINGS = ("mean", "gem")
SAMPLINGS = ("uniform", "balanced", "rated", "balanced+rated")
LOSSES = ("bce", "focal")
PRECISIONS = ("float32", "bf16", "fp16")
ON_NON_FINITE = ("stop", "skip")

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
    """A sound event detector: backbone, frequency pooling, temporal layer, head.

    ``backbone`` is any CNN of timm's, or ``panns_cnn14`` or ``panns_resnet38``.
    """

    backbone: str = "resnet18"
    backbone_options: tuple[tuple[str, Any], ...] = ()  # (name, value) pairs for timm's builder
    pretrained: bool = True  # timm's weights; needs the hub, or `--init FILE`
    pooling: str = "mean"  # over frequency; "gem": Radenovic et al., between mean and maximum
    temporal: str = "gru"
    temporal_size: int = 256  # channels between backbone and head
    head: str = "attention"  # how frames become a clip: see `models.HEADS`
    dropout: float = 0.3

    def __post_init__(self) -> None:
        require_choice("pooling", self.pooling, POOLINGS)
        require_choice("temporal", self.temporal, TEMPORAL_LAYERS)
        require_choice("head", self.head, HEADS)
        require(
            self.temporal_size > 0 and self.temporal_size % 8 == 0,
            f"temporal_size is {self.temporal_size}; it must be a positive multiple of 8",
        )
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; give a share in [0, 1)")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training clips; each with its probability, its range and its reason.

    First what a loader worker does to one clip, in this order, then what is done to the batch.
    """

    # --- a clip, in the worker: files, filters, codecs
    # Stereo recorders have the bird to one side; the channels' mean is one of many mixes.
    downmix_probability: float = 0.2
    # Off: 20 ms a clip, and nobody found a gain in it; a wrong pitch is a wrong bird.
    pitch_probability: float = 0.0
    pitch_semitones: tuple[float, float] = (-1.0, 1.0)
    tempo_probability: float = 0.0
    tempo_rate: tuple[float, float] = (0.9, 1.1)
    # Distance and foliage take the high frequencies first (2nd place) ...
    low_pass_probability: float = 0.2
    low_pass_hz: tuple[float, float] = (4_000.0, 12_000.0)
    # ... gradually: a slope from nothing at 0 Hz to so many decibels at the highest frequency.
    high_fade_probability: float = 0.2
    high_fade_db: tuple[float, float] = (3.0, 24.0)
    # Recorders' low-cut switches, and recordists who filter the wind out.
    high_pass_probability: float = 0.1
    high_pass_hz: tuple[float, float] = (100.0, 600.0)
    # Wind and rain lie between white (0) and brown (-6 dB per octave); 1st place: pink, -3.
    color_noise_probability: float = 0.3
    color_noise_snr_db: tuple[float, float] = (3.0, 20.0)
    color_noise_slope_db: tuple[float, float] = (-6.0, -1.0)
    # Recordings are close and clean, soundscapes are not: the largest single gain of the 2020
    # solutions (4th place: +0.02). Real bird-free noise where there is some, at 0-15 dB.
    noise_probability: float = 0.6
    noise_snr_db: tuple[float, float] = (0.0, 15.0)
    # Twigs, drops, steps: bursts of bird-free sound (1st place's AddShortNoises).
    short_noise_probability: float = 0.2
    short_noise_snr_db: tuple[float, float] = (0.0, 20.0)
    short_noise_seconds: tuple[float, float] = (0.1, 0.6)
    short_noise_count: tuple[int, int] = (1, 4)
    # A bird-free clip with an empty target now and then (7th place), to learn nocall from.
    noise_only_probability: float = 0.15
    # Soundscapes were encoded again (8th place suspects so). 9 ms a clip.
    mp3_probability: float = 0.1
    mp3_kbps: tuple[int, int] = (32, 128)

    # --- the batch, on the model's device
    # Where a song starts in its clip must not matter to the temporal layer; the clip is a ring.
    shift_probability: float = 0.3
    # Union-label mixup of waveforms (3rd, 4th place): rows with two or three birds occur.
    mixup_probability: float = 0.5
    mixup_third_probability: float = 0.2  # of mixed clips, those that get a third one as well
    mixup_gain_db: tuple[float, float] = (-6.0, 6.0)
    # Distant birds are quiet (1st and 4th place turned the volume down more than up).
    gain_probability: float = 0.5
    gain_db: tuple[float, float] = (-18.0, 6.0)
    # SpecAugment, in shares of the clip's frames and mel bins.
    time_mask_share: float = 0.1
    mel_mask_share: float = 0.1
    n_masks: int = 2

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name.endswith(("_probability", "_share")):
                require_share(item.name, getattr(self, item.name))
            elif isinstance(item.default, tuple):
                require_range(item.name, getattr(self, item.name))
        for name in ("tempo_rate", "low_pass_hz", "high_pass_hz", "short_noise_seconds"):
            require(getattr(self, name)[0] > 0, f"{name} is {getattr(self, name)}; give above 0")
        require(
            self.mp3_kbps[0] >= 8 and self.mp3_kbps[1] <= 320,
            f"mp3_kbps is {self.mp3_kbps}; mp3 knows 8 to 320",
        )
        require(
            self.short_noise_count[0] >= 1,
            f"short_noise_count is {self.short_noise_count}; give at least 1 burst",
        )
        require(self.n_masks >= 0, f"n_masks is {self.n_masks}; it must not be negative")

    def without(self, *names: str) -> AugmentConfig:
        """Return the same with these probabilities, such as ``noise``, at zero."""
        return replace(self, **{f"{name}_probability": 0.0 for name in names})


NO_AUGMENT = replace(
    AugmentConfig(),
    **{item.name: 0.0 for item in fields(AugmentConfig) if item.name.endswith("_probability")},
    n_masks=0,
)
# What brings a clean recording nearer to a noisy site; an ablation trains without.
NOISE_AUGMENTATIONS = ("noise", "color_noise", "short_noise", "noise_only")


@dataclass(frozen=True)
class TrainConfig:
    """How an experiment is trained."""

    clip_seconds: float = 20.0  # weak labels hold for long clips (1st: 30 s, 6th: 20 s)
    epochs: int = 40
    clips_per_epoch: int | None = None  # None: as many as the fold has recordings
    batch_size: int = 32  # clips of one forward pass, over all processes together
    accumulate: int = 1  # batches to one step of the optimiser
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_share: float = 0.05
    gradient_clip: float = 5.0
    sampling: str = "balanced"  # see dataset.recording_weights
    crops_per_recording: int = 1  # clips in a row from one opened recording
    # Loss: see `losses.sed_loss`.
    loss: str = "bce"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0  # 2nd place of 2021: 0.01 to 0.025
    framewise_loss_weight: float = 0.5  # 6th place: keeps the frames honest
    # Target of species heard behind the primary one (2nd place of 2020: 0.3), or None: they are
    # left out of the loss, neither there nor absent.
    secondary_label_weight: float | None = 0.3
    rating_loss_weight: bool = False  # a clip's loss counts as its recording's rating
    # Speed and memory.
    precision: str = "float32"  # of the network under autocast; the front end stays in float32
    compile: bool = False  # torch.compile: minutes at the start, faster on a GPU
    channels_last: bool = True  # 1.4 x on a CPU with one-channel images, and on tensor cores
    # Weights: a moving average over steps (6th place), the best of the validated ones averaged.
    ema_decay: float | None = None
    average_best: int = 0  # 0: the weights of the last epoch
    validate_every: int = 5  # epochs; the last one is always validated
    patience: int | None = None  # validations without a better one before the run ends
    on_non_finite: str = "stop"  # a loss that is not finite stops the run, or skips its batch
    seed: int = 0
    # Of the recordings, and of the noise files: more that fail while training stop the run. The
    # audit has left out what is damaged, so failures mean that files or a disk have changed since.
    max_failed_share: float = 0.01

    def __post_init__(self) -> None:
        for name in (
            *("clip_seconds", "epochs", "batch_size", "accumulate", "crops_per_recording"),
            *("learning_rate", "gradient_clip", "validate_every"),
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
        require_choice("loss", self.loss, LOSSES)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("on_non_finite", self.on_non_finite, ON_NON_FINITE)
        for name in ("warmup_share", "max_failed_share", "label_smoothing"):
            require_share(name, getattr(self, name))
        if self.secondary_label_weight is not None:
            require_share("secondary_label_weight", self.secondary_label_weight)
        for name in ("framewise_loss_weight", "focal_gamma", "average_best"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay is {self.ema_decay}; give a share in (0, 1), or None",
        )
        require(
            self.patience is None or self.patience > 0,
            f"patience is {self.patience}; give validations above 0, or None",
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
