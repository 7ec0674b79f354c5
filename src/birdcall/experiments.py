"""The named experiments: each states only how it differs from the baseline."""

from __future__ import annotations

from dataclasses import replace

from birdcall.config import (
    AugmentConfig,
    Experiment,
    FrontendConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    replace_nested,
    require,
)


def find_experiment(name: str) -> Experiment:
    """Return the experiment called ``name``; ``ValueError`` lists the known ones."""
    require(
        name in EXPERIMENTS,
        f"unknown experiment {name!r}; known experiments: {', '.join(EXPERIMENTS)}",
    )
    return EXPERIMENTS[name]


def student_of(experiment: Experiment, number: int) -> Experiment:
    """Return the student of an experiment in a round; ``ValueError`` if it has none."""
    name = f"{experiment.name}_student{number}"
    names = [known for known in EXPERIMENTS if known.endswith("_student1")]
    require(
        name in EXPERIMENTS,
        f"{experiment.name} has no student of round {number}: there are {_N_ROUNDS} rounds of "
        + ", ".join(known.removesuffix("_student1") for known in names),
    )
    return EXPERIMENTS[name]


# For the real data and a GPU. They differ in input, backbone, temporal layer and head, as the
# members of an ensemble should.
_WIDE = FrontendConfig(n_mels=128, fmin=20.0, fmax=16_000.0)
# Kaggle's T4 has fp16, not bf16.
_GPU = TrainConfig(precision="fp16", optimizer=OptimizerConfig(ema_decay=0.999))
_REAL = (
    Experiment(
        name="densenet121",
        description="the 1st place's network: DenseNet-121, plain attention head, 30-s clips",
        model=ModelConfig(backbone="densenet121", temporal="none", temporal_size=1024, dropout=0.5),
        train=replace_nested(
            _GPU,
            epochs=50,
            data={"clip_seconds": 30.0, "batch_size": 24},
            loss={"secondary_label_weight": 1.0},
        ),
    ),
    Experiment(
        name="resnest50_gru",
        description="ResNeSt-50 + bi-GRU + attention head on 128 mel bins, 20-s clips",
        frontend=_WIDE,
        model=ModelConfig(backbone="resnest50d", temporal="gru", temporal_size=512),
        train=_GPU,
    ),
    Experiment(
        name="efficientnet_b0_gru_attention",
        description="EfficientNet-B0 + bi-GRU + self-attention on log-mel and deltas (4th place)",
        frontend=FrontendConfig(n_mels=128, features=("log_mel", "delta", "delta_delta")),
        model=ModelConfig(backbone="tf_efficientnet_b0", temporal="gru+attention"),
        train=_GPU,
    ),
    Experiment(
        name="efficientnetv2_s_gru_attention",
        description="EfficientNetV2-S + GeM + bi-GRU + self-attention, best three epochs averaged",
        frontend=_WIDE,
        model=ModelConfig(backbone="tf_efficientnetv2_s", pooling="gem", temporal="gru+attention"),
        train=replace_nested(
            _GPU,
            data={"batch_size": 24},
            loss={"label_smoothing": 0.01},
            optimizer={"average_best": 3},
        ),
    ),
    Experiment(
        name="regnety_040_attention",
        description="RegNetY-4.0 (8th place) + self-attention, log-mean-exp head (39th), 1-8 kHz",
        frontend=replace(_WIDE, fmin=500.0, fmax=10_000.0),
        model=ModelConfig(backbone="regnety_040", temporal="attention", head="log_mean_exp"),
        train=replace_nested(_GPU, data={"batch_size": 24}),
    ),
    Experiment(
        name="cnn14",
        description="PANNs' CNN14 on its own front end; give its AudioSet weights with --init",
        model=ModelConfig(
            backbone="panns_cnn14", pretrained=False, temporal="none", temporal_size=2048
        ),
        train=replace_nested(
            _GPU,
            data={"clip_seconds": 30.0, "batch_size": 24},
            optimizer={"learning_rate": 5e-4},
        ),
    ),
    Experiment(
        name="nfnet_l0_pcen",
        description="ECA-NFNet-L0 + GeM on PCEN and log-mel, focal loss, secondary labels masked",
        frontend=replace(_WIDE, features=("pcen", "log_mel"), normalization="clip"),
        model=ModelConfig(backbone="eca_nfnet_l0", pooling="gem", temporal="none"),
        train=replace(
            _GPU, loss=LossConfig(name="focal", secondary_label_weight=None, rating_weight=True)
        ),
    ),
)


# They make a clean recording more like a noisy site; an ablation trains without them.
_NOISE_AUGMENTATIONS = ("noise", "color_noise", "short_noise", "noise_only")


def _family(base: Experiment) -> tuple[Experiment, ...]:
    """Return ``base`` with each temporal layer, and with a GRU but without noise in its clips.

    An ablation compares them: they differ in nothing else.
    """
    layers = {
        "plain": ("none", "no temporal layer"),
        "gru": ("gru", "a bi-GRU"),
        "attention": ("attention", "self-attention"),
        "gru_attention": ("gru+attention", "a bi-GRU and self-attention"),
    }
    members = {
        name: replace(
            base,
            name=f"{base.name}_{name}",
            description=f"{base.description}; {what}",
            model=replace(base.model, temporal=temporal),
        )
        for name, (temporal, what) in layers.items()
    }
    clean = replace(
        members["gru"],
        name=f"{base.name}_gru_clean",
        description=f"{members['gru'].description}, without noise of any kind",
        augment=base.augment.without(*_NOISE_AUGMENTATIONS),
    )
    return (*members.values(), clean)


# Two cores and no GPU: half the frame rate, a quarter of the channels, five-second clips.
_SMALL = Experiment(
    name="small",
    description="narrow ResNet-10 from random weights, for two CPU cores",
    frontend=FrontendConfig(hop_length=640, fmin=200.0),
    model=ModelConfig(
        backbone="resnet10t",
        backbone_options=(("channels", (32, 64, 128, 256)), ("stem_width", 16)),
        pretrained=False,
        temporal_size=128,
        dropout=0.2,
    ),
    augment=AugmentConfig().without("mp3"),  # costs as much time as the network's step
    train=TrainConfig(
        epochs=24,
        data=SamplingConfig(clip_seconds=5.0, clips_per_epoch=480),
        # Soundscapes are full of background species: at 0.3 they stay below every threshold.
        loss=LossConfig(secondary_label_weight=1.0),
        optimizer=OptimizerConfig(learning_rate=3e-3),
    ),
)
# From ImageNet on two cores: a hundred recordings are too few to learn from random weights. Frozen
# stages cost less time, and finer images are worth more than as many epochs again: docs/real.md.
_LITE0 = Experiment(
    name="lite0",
    description="EfficientNet-Lite0 from ImageNet, for two CPU cores",
    frontend=FrontendConfig(n_fft=2048, hop_length=512, n_mels=128, fmin=200.0),
    model=ModelConfig(backbone="tf_efficientnet_lite0"),
    augment=replace(AugmentConfig().without("mp3"), equalizer_probability=0.7),
    train=TrainConfig(
        epochs=75,
        data=SamplingConfig(clip_seconds=5.0, batch_size=16),
        loss=LossConfig(softmax_weight=2.0),
        optimizer=OptimizerConfig(frozen_stages=3),
        validate_every=15,
    ),
)
# BirdNET's convolutions as they are, and a head of our own: recordings of most species are too few
# to change more than that.
_BIRDNET = replace_nested(
    _LITE0,
    name="birdnet",
    description="BirdNET 2.4's convolutions (CC BY-NC-SA 4.0), for two CPU cores",
    frontend=FrontendConfig(
        n_fft=1366, hop_length=186, n_mels=96, features=("birdnet_low", "birdnet_high")
    ),
    model={"backbone": "birdnet"},
    train={"epochs": 25, "validate_every": 5, "optimizer": {"frozen_stages": 6}},
)
_SMALL_VARIANTS = (
    replace(
        _SMALL,
        name="small_gru_bf16",
        description="small_gru in bfloat16",
        train=replace(_SMALL.train, precision="bf16"),
    ),
    replace(
        _SMALL,
        name="small_attention_normed",
        description="small_attention on 80 mel bins, input normalised per clip; an ensemble's 2nd",
        frontend=replace(_SMALL.frontend, n_mels=80, fmax=12_000.0, normalization="clip"),
        model=replace(_SMALL.model, temporal="attention"),
        train=replace(_SMALL.train, seed=1),
    ),
)


_N_ROUNDS = 2  # of students


def _field_variants(base: Experiment) -> tuple[Experiment, ...]:
    """Return ``base`` with sound of the field: other birds, or soundscapes that others labelled."""
    students = (
        replace_nested(
            base,
            name=f"{base.name}_student{number}",
            description=f"{base.description}, half of its clips from soundscapes, round {number}",
            train={"student": {"share": 0.5}},
        )
        for number in range(1, _N_ROUNDS + 1)
    )
    is_open = replace_nested(
        base,
        name=f"{base.name}_open",
        description=f"{base.description}, with clips of other birds",
        augment={"other_birds_probability": 0.1},
    )
    return (is_open, *students)


def _taught(base: Experiment) -> Experiment:
    """Return ``base`` with BirdNET's embeddings as a second thing to learn.

    The weight is a choice, not yet the result of a search: at the start the cosine loss is then
    about a third of the labels' loss.
    """
    return replace_nested(
        base,
        name=f"{base.name}_taught",
        description=f"{base.description}, taught by BirdNET 2.4 (CC BY-NC-SA 4.0)",
        train={"teacher": {"weight": 10.0}},
    )


def _distilled(base: Experiment, weight: float = 10.0) -> Experiment:
    """Return ``base`` with BirdNET's embeddings, and its probabilities in the targets."""
    return replace_nested(
        base,
        name=f"{base.name}_distilled",
        description=f"{base.description}, distilled from BirdNET 2.4 (CC BY-NC-SA 4.0)",
        train={"teacher": {"weight": weight, "label_share": 0.7}},
    )


def _levers(base: Experiment, *names: str) -> tuple[Experiment, ...]:
    """Return ``base`` with one thing changed each, for an ablation on real sound; names: which."""
    changes = {
        "scratch": (
            "from random weights",
            {"model": {"pretrained": False}, "train": {"optimizer": {"frozen_stages": 0}}},
        ),
        "coarse": (
            "half as many mel bins and frames",
            {"frontend": {"n_mels": 64, "hop_length": 1024}},
        ),
        "thawed": ("no stage frozen", {"train": {"optimizer": {"frozen_stages": 0}}}),
        "binary": ("binary losses only", {"train": {"loss": {"softmax_weight": 0.0}}}),
        "10s": ("clips of 10 s", {"train": {"data": {"clip_seconds": 10.0}}}),
        "20s": ("clips of 20 s", {"train": {"data": {"clip_seconds": 20.0}}}),
        "unmixed": ("no mixup", {"augment": {"mixup_probability": 0.0}}),
        "flat": ("no random equaliser", {"augment": {"equalizer_probability": 0.0}}),
        "primary": (
            "secondary labels are absent birds",
            {"train": {"loss": {"secondary_label_weight": 0.0}}},
        ),
        "student1_25": (
            "a quarter of its clips from soundscapes, round 1",
            {"train": {"student": {"share": 0.25}}},
        ),
        "student1_75": (
            "three quarters of its clips from soundscapes, round 1",
            {"train": {"student": {"share": 0.75}}},
        ),
    }
    require(set(names) <= set(changes), f"levers are {', '.join(changes)}, not {names}")
    return tuple(
        replace_nested(
            base, name=f"{base.name}_{name}", description=f"{base.description}; {what}", **change
        )
        for name, (what, change) in changes.items()
        if name in (names or changes)
    )


_SMALL_FAMILY, _LITE0_FAMILY, _BIRDNET_FAMILY = map(_family, (_SMALL, _LITE0, _BIRDNET))
_LITE0_OF, _BIRDNET_OF = (
    {base.model.temporal: base for base in family if base.augment.noise_probability}
    for family in (_LITE0_FAMILY, _BIRDNET_FAMILY)
)
# Its head starts from BirdNET's last layer; at a higher rate it forgets what that layer knows.
_BIRDNET_OF["none"] = replace_nested(
    _BIRDNET_OF["none"],
    description="BirdNET 2.4 (CC BY-NC-SA 4.0), its last layer trained on, for two CPU cores",
    model={"temporal_size": 1024},
    train={"epochs": 15, "optimizer": {"learning_rate": 5e-5}},
)
(_BIRDNET_CLEAN,) = (base for base in _BIRDNET_FAMILY if base.name.endswith("_clean"))
_BIRDNETS = [_BIRDNET_OF[temporal] for temporal in ("none", "gru", "attention")]
_TAUGHT = [_taught(_LITE0_OF[temporal]) for temporal in ("none", "gru")]
_FIELD = [
    variant
    for base in (*map(_LITE0_OF.get, ("none", "gru", "attention")), *_TAUGHT)
    for variant in _field_variants(base)
]
_ALL = (
    *_REAL,
    *_SMALL_FAMILY,
    *_SMALL_VARIANTS,
    *_LITE0_FAMILY,
    *_BIRDNETS,
    _BIRDNET_CLEAN,
    *_field_variants(_BIRDNET_OF["gru"]),
    *_levers(_BIRDNET_OF["gru"], "10s", "unmixed", "primary"),
    *_levers(_LITE0_OF["gru"]),
    *_TAUGHT,
    *(_distilled(_LITE0_OF[temporal]) for temporal in ("gru", "attention")),
    *(_distilled(base, weight=0.0) for base in _BIRDNETS),
    *_FIELD,
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
require(len(EXPERIMENTS) == len(_ALL), "two experiments have the same name")
