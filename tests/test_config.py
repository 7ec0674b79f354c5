"""Experiments are checked when they are built, and survive JSON."""

import json
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from birdcall.config import (
    AugmentConfig,
    Experiment,
    FrontendConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    config_from_dict,
    replace_nested,
)
from birdcall.experiments import EXPERIMENTS, find_experiment


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_survives_json(name):
    experiment = find_experiment(name)
    assert config_from_dict(Experiment, json.loads(json.dumps(asdict(experiment)))) == experiment


def test_an_unknown_experiment_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"small_gru.*small_attention"):
        find_experiment("smal_gru")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_key_of_an_experiment_is_its_name(name):
    assert EXPERIMENTS[name].name == name


def test_an_experiment_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        find_experiment("small_gru").name = "other"


@pytest.mark.parametrize(
    "build, complaint",
    [
        (lambda: FrontendConfig(fmax=17_000), "fmax 17000.*16000 Hz"),
        (lambda: FrontendConfig(fmin=15_000), "fmin 15000"),
        (lambda: FrontendConfig(hop_length=2048), "hop_length 2048 skips samples"),
        (lambda: FrontendConfig(n_mels=0), "n_mels is 0"),
        (lambda: FrontendConfig(features=("log_mel", "mfcc")), "'mfcc'; choose one of log_mel"),
        (lambda: FrontendConfig(features=()), "features is empty"),
        (lambda: FrontendConfig(implementation="cuda"), "fft, torchlibrosa, conv"),
        (lambda: FrontendConfig(top_db=-80), "top_db is -80"),
        (lambda: ModelConfig(temporal="lstm"), "'lstm'; choose one of none, gru, attention"),
        (lambda: ModelConfig(temporal_size=12), "temporal_size is 12"),
        (lambda: ModelConfig(dropout=1.0), "dropout is 1.0"),
        (lambda: AugmentConfig(noise_probability=1.5), "noise_probability is 1.5"),
        (lambda: AugmentConfig(noise_snr_db=(15.0, 0.0)), "noise_snr_db is .*lowest, highest"),
        (lambda: TrainConfig(epochs=0), "epochs is 0"),
        (lambda: TrainConfig(precision="fp8"), "'fp8'; choose one of float32, bf16, fp16"),
        (lambda: TrainConfig(patience=0), "patience is 0; give validations above 0"),
        (lambda: SamplingConfig(clips_per_epoch=8), "less than one batch of 32"),
        (
            lambda: SamplingConfig(sampling="random"),
            "'random'; choose one of uniform, balanced, rated",
        ),
        (
            lambda: SamplingConfig(crops_per_recording=0),
            "crops_per_recording is 0; it must be above",
        ),
        (lambda: SamplingConfig(max_failed_share=1.5), "max_failed_share is 1.5"),
        (lambda: LossConfig(name="mse"), "name is 'mse'; choose one of bce, focal"),
        (lambda: LossConfig(focal_gamma=-1), "focal_gamma is -1; it must not be negative"),
        (lambda: LossConfig(secondary_label_weight=2), "secondary_label_weight is 2"),
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate is 0; it must be above 0"),
        (lambda: OptimizerConfig(ema_decay=1.0), r"ema_decay is 1.0; give a share in \(0, 1\)"),
        (lambda: OptimizerConfig(average_best=-1), "average_best is -1; it must not be negative"),
    ],
)
def test_an_invalid_value_is_refused_with_what_is_allowed(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


def test_a_field_of_another_version_is_named():
    values = asdict(find_experiment("small_gru"))
    values["train"]["momentum"] = 0.9
    with pytest.raises(ValueError, match="TrainConfig has no field momentum"):
        config_from_dict(Experiment, values)


def test_nested_changes_leave_everything_else_and_are_checked():
    base = find_experiment("small_gru")
    changed = replace_nested(base, name="short", train={"epochs": 2, "data": {"batch_size": 8}})
    assert (changed.name, changed.train.epochs, changed.train.data.batch_size) == ("short", 2, 8)
    restored = replace(
        changed, name=base.name, train=replace(changed.train, epochs=24, data=base.train.data)
    )
    assert restored == base
    with pytest.raises(ValueError, match="batch_size is 0"):
        replace_nested(base, train={"data": {"batch_size": 0}})
