"""Every experiment's model detects birds in clips of any length, and can be trained."""

import copy
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import NETWORKS
from scipy.special import expit
from torch import nn
from torch.nn import functional

from birdcall.config import ModelConfig
from birdcall.experiments import EXPERIMENTS, find_experiment
from birdcall.models.backbones import MIN_FRAMES, build_backbone
from birdcall.models.sed import (
    HEADS,
    POOLINGS,
    AttentionHead,
    BiGRU,
    GeM,
    LogMeanExpHead,
    MaxHead,
    SelfAttention,
    build_model,
)

N_CLASSES = 5


@pytest.fixture(scope="module", params=NETWORKS)
def experiment_model(request):
    torch.manual_seed(0)
    model = build_model(EXPERIMENTS[request.param], N_CLASSES)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # statistics of what it was trained on: else all saturates
    return model


TEMPORAL_LAYERS = ("none", "gru", "attention", "gru+attention")


def noise(n_clips, seconds=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(n_clips, round(seconds * 32_000), generator=generator)


def changed(experiment, **options):
    return replace(experiment, model=replace(experiment.model, **options))


def test_every_experiment_gives_probabilities_and_trains_every_parameter(experiment_model):
    experiment_model.train()
    output = experiment_model(noise(2, 1.0))
    assert output.clipwise.shape == (2, N_CLASSES)
    assert output.framewise.shape[:2] == (2, N_CLASSES)
    for values in output:
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert values.max() <= 1
    (output.clipwise.sum() + output.framewise.amax(-1).sum()).backward()
    without = [n for n, p in experiment_model.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in experiment_model.parameters())
    experiment_model.zero_grad()


def test_what_stands_beside_a_clip_does_not_change_it(experiment_model):
    # In float64: the kernels of float32 for one clip and for three round in their own ways, and
    # random weights of a deep network make 1e-4 of it.
    clip, others = noise(1, 1.0), 5 * noise(2, 1.0, seed=1)
    with torch.no_grad():
        together = experiment_model.frontend(torch.cat([clip, others])).double()
        alone = experiment_model.frontend(clip).double()
        model = copy.deepcopy(experiment_model).eval().double()
        outputs = zip(model.detect(together), model.detect(alone), strict=True)
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)  # dB, of float32
    for beside, expected in outputs:
        torch.testing.assert_close(beside[:1], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n_frames", [1, 13.5, 100])
def test_clips_of_odd_lengths_and_shorter_than_one_stride_have_frames(experiment_model, n_frames):
    frontend = experiment_model.frontend.config
    n_samples = max(frontend.n_fft // 2, round(n_frames * frontend.hop_length)) + 1
    experiment_model.eval()
    with torch.no_grad():
        output = experiment_model(noise(2, n_samples / 32_000))
    assert output.framewise.shape[-1] >= 1
    assert (output.framewise.shape[-1] > 1) == (n_frames == 100)
    for values in output:
        assert values.isfinite().all()
        assert values.shape[:2] == (2, N_CLASSES)


def test_a_clip_shorter_than_one_stride_is_padded_with_its_last_frame(tiny_experiment):
    model = build_model(tiny_experiment, 3).eval()
    short = torch.randn(1, 1, 5, 32)
    by_hand = torch.cat([short[:, :, [min(k, 4)]] for k in range(MIN_FRAMES)], dim=2)
    with torch.no_grad():
        torch.testing.assert_close(model.detect(short), model.detect(by_hand))


@pytest.mark.parametrize("temporal", TEMPORAL_LAYERS)
def test_every_temporal_layer_takes_clips_of_any_length(tiny_experiment, temporal):
    model = build_model(changed(tiny_experiment, temporal=temporal), 3).eval()
    frames = [model(noise(1, seconds)).framewise.shape[-1] for seconds in (1.0, 5.0, 30.0)]
    assert frames[0] < frames[1] < frames[2]


def test_a_temporal_layer_sees_the_whole_clip():
    torch.manual_seed(0)
    features = torch.randn(1, 16, 12)
    changed = features.clone()
    changed[:, 0, -1] += 1  # of one channel: layer normalisation removes a change of all channels
    for layer in (BiGRU(16), SelfAttention(16, 0.0)):
        with torch.no_grad():
            first = layer.eval()(features)[..., 0]
            assert not torch.equal(first, layer(changed)[..., 0])


def test_self_attention_knows_the_order_of_frames():
    layer = SelfAttention(16, 0.0).eval()
    features = torch.randn(1, 16, 6)
    with torch.no_grad():
        forward, backward = layer(features), layer(features.flip(-1)).flip(-1)
    assert not torch.allclose(forward, backward, atol=1e-3)


def test_attention_weights_sum_to_one_over_frames():
    weights = AttentionHead(16, 3).attend(torch.randn(2, 16, 9))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))


def test_the_clip_is_the_weighted_mean_of_its_frames():
    head = AttentionHead(16, 3)
    features = torch.randn(2, 16, 9)
    output = head(features)
    torch.testing.assert_close(output.clipwise, (head.attend(features) * output.framewise).sum(-1))


@pytest.mark.parametrize(
    ("wrong", "right"), [("resnet5O", "resnet50"), ("panns_cnn41", "panns_cnn14")]
)
def test_an_unknown_backbone_suggests_others(wrong, right):
    with pytest.raises(ValueError, match=f"no backbone '{wrong}'; did you mean {right}"):
        build_backbone(ModelConfig(backbone=wrong), 1, pretrained=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"takes no image of 32 frames and 32 mel bins"),
        ((("dynamic_img_size", True),), r"gives features \(1, 5, 192\).*choose a CNN"),
    ],
)
def test_a_backbone_that_is_no_cnn_is_refused(tiny_experiment, options, message):
    experiment = changed(tiny_experiment, backbone="vit_tiny_patch16_224", backbone_options=options)
    with pytest.raises(ValueError, match=message):
        build_model(experiment, 3)


def test_an_option_that_the_backbone_does_not_take_is_named():
    for name in ("densenet121", "panns_cnn14"):
        settings = ModelConfig(backbone=name, backbone_options=(("stem_widht", 16),))
        with pytest.raises(ValueError, match=f"{name}'.*stem_widht"):
            build_backbone(settings, 1, pretrained=False)


def test_every_channel_of_the_image_is_normalised_by_itself(tiny_experiment):
    features = ("log_mel", "delta")
    frontend = replace(tiny_experiment.frontend, features=features)
    model = build_model(replace(tiny_experiment, frontend=frontend), 3).train()
    with mock.patch.object(
        model.backbone, "forward_features", wraps=model.backbone.forward_features
    ) as forward:
        log_mel = model.frontend(noise(4))
        model.embed(log_mel)
    (image,) = forward.call_args.args
    for channel in range(len(features)):
        values = log_mel[:, channel].numpy()  # (batch, frames, n_mels)
        mean, deviation = values.mean(axis=(0, 1)), values.std(axis=(0, 1))
        expected = (values - mean) / np.sqrt(deviation**2 + model.mel_norm.eps)
        np.testing.assert_allclose(image[:, channel].detach().numpy(), expected, atol=1e-3)


def test_the_state_dict_holds_nothing_that_the_config_says(tiny_experiment):
    names = build_model(tiny_experiment, 3).state_dict()
    assert not [name for name in names if name.startswith("frontend")]


def test_one_seed_gives_one_model():
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(build_model(find_experiment("small_gru"), 3).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_dropout_is_off_in_evaluation(tiny_experiment):
    model = build_model(changed(tiny_experiment, dropout=0.5), 3).eval()
    with torch.no_grad():
        assert torch.equal(model(noise(1)).clipwise, model(noise(1)).clipwise)
    assert any(isinstance(module, nn.Dropout) for module in model.modules())


# --- pooling over frequency ----------------------------------------------------------------------


def test_every_choice_of_the_config_is_built():
    for name, built in (("head", HEADS), ("pooling", POOLINGS)):
        with pytest.raises(ValueError, match=f"{name} is 'none'; choose one of ") as caught:
            ModelConfig(**{name: "none"})
        assert str(caught.value).split("choose one of ")[1].split(", ") == list(built)


@pytest.mark.parametrize("power", [1.0, 3.0, 7.5])
def test_gem_is_torchs_power_average_of_any_power(power):
    features = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) + 0.01
    # lp_pool2d sums where GeM takes the mean
    expected = functional.lp_pool2d(features.double(), power, (1, 6)) / 6 ** (1 / power)
    torch.testing.assert_close(GeM(power)(features).double(), expected[..., 0], rtol=1e-5, atol=0)


def test_gems_gradients_are_those_of_its_formula():
    features = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    layer = GeM()
    inputs = features.clone().requires_grad_()
    layer(inputs).square().sum().backward()
    reference = features.double().requires_grad_()
    power = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    reference.pow(power).mean(3).pow(1 / power).square().sum().backward()
    torch.testing.assert_close(inputs.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.power.grad.double(), power.grad, rtol=1e-4, atol=1e-6)


def test_gem_stays_between_mean_and_maximum_wherever_its_power_goes():
    features = torch.rand(1, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    for power in (-5.0, 0.0, 2.0, 1e4):
        pooled = GeM(power)(features)
        assert (pooled >= features.mean(3) - 1e-6).all()
        assert (pooled <= features.amax(3) + 1e-6).all()
    assert torch.allclose(GeM(-5.0)(features), features.mean(3), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gem_of_huge_tiny_and_negative_features_is_finite_in_any_precision(dtype):
    features = torch.tensor([6e4, 0.0, -6e4, 1e-7]).to(dtype).expand(1, 1, 1, 4).clone()
    for values in (features, torch.zeros_like(features), -features.abs()):
        layer, inputs = GeM(12.0), values.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = layer(inputs)
        assert pooled.dtype == dtype
        pooled.float().sum().backward()
        assert pooled.isfinite().all()
        assert inputs.grad.isfinite().all() and layer.power.grad.isfinite().all()


def test_the_pooling_of_the_config_is_the_models(tiny_experiment):
    wide = replace(tiny_experiment, frontend=replace(tiny_experiment.frontend, n_mels=128))
    model = build_model(changed(wide, pooling="gem"), 3).eval()
    plain = build_model(wide, 3).eval()
    state = {k: v for k, v in model.state_dict().items() if k != "pooling.power"}
    plain.load_state_dict(state)
    with torch.no_grad():
        assert not torch.allclose(model(noise(1)).framewise, plain(noise(1)).framewise, atol=1e-5)


# --- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS.values())
def test_of_one_frame_clip_and_frame_are_the_same(head):
    output = head(16, 3)(torch.randn(2, 16, 1))
    torch.testing.assert_close(output.clipwise, output.framewise[..., 0])


@pytest.mark.parametrize("head", HEADS.values())
def test_a_clip_lies_between_its_quietest_and_its_loudest_frame(head):
    output = head(16, 3)(5 * torch.randn(8, 16, 20))
    assert (output.clipwise >= output.framewise.amin(-1) - 1e-6).all()
    assert (output.clipwise <= output.framewise.amax(-1) + 1e-6).all()


def test_all_heads_start_from_the_same_detection_layer():
    weights = []
    for head in HEADS.values():
        torch.manual_seed(0)
        weights.append(head(16, 3).detection.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    assert weights[0]["bias"].sigmoid().tolist() == pytest.approx([1 / 3] * 3)  # one class of three


def head_of_logits(head, logits):
    """The clipwise output of a head whose framewise logits are the features themselves."""
    layer = head(1, 1)
    nn.init.ones_(layer.detection.weight)
    nn.init.zeros_(layer.detection.bias)
    return layer(torch.as_tensor(logits)[None, None]).clipwise.squeeze()


def test_the_max_head_takes_the_loudest_frame():
    assert head_of_logits(MaxHead, [-2.0, 0.5, -1.0]).item() == pytest.approx(expit(0.5))


def test_log_mean_exp_takes_the_mean_of_the_frames_odds():
    odds = np.array([1 / 9, 1.0, 3.0], dtype=np.float32)  # of probabilities .1, .5 and .75
    mean = odds.mean()
    clip = head_of_logits(LogMeanExpHead, np.log(odds))
    assert clip.item() == pytest.approx(mean / (1 + mean), rel=1e-5)


def test_log_mean_exp_keeps_a_short_call_in_a_long_clip_that_the_mean_would_lose():
    logits = np.full(94, -6.0, dtype=np.float32)  # 30 s, silent but for one frame
    logits[40] = 5.0
    assert expit(logits).mean() < 0.02
    assert head_of_logits(LogMeanExpHead, logits).item() > 0.5


@pytest.mark.parametrize("head", HEADS.values())
def test_heads_are_finite_for_logits_beyond_all_bounds(head):
    features = torch.full((1, 1, 5), 1e4)
    features[..., 2:] = -1e4
    features.requires_grad_()
    layer = head(1, 1)
    output = layer(features)
    assert ((output.clipwise >= 0) & (output.clipwise <= 1)).all()
    (output.clipwise.sum() + output.framewise.sum()).backward()
    assert features.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# --- precision and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temporal", TEMPORAL_LAYERS)
def test_silence_beside_full_scale_is_finite_in_half_precision(
    tiny_experiment, temporal, head, dtype
):
    experiment = changed(tiny_experiment, temporal=temporal, head=head, pooling="gem")
    model = build_model(experiment, 3).train()
    loud = noise(1).sign()  # white noise at full scale
    log_mel = model.frontend(torch.cat([torch.zeros_like(loud), loud]))
    assert log_mel.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        output = model.detect(log_mel)
    for values in output:
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    target = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    functional.binary_cross_entropy(output.clipwise, target).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.mel_norm.weight.grad.abs().sum() > 0


def test_half_precision_predicts_what_float32_predicts(tiny_experiment):
    model = build_model(changed(tiny_experiment, temporal="gru+attention"), 3).eval()
    log_mel = model.frontend(noise(2))
    with torch.no_grad():
        full = model.detect(log_mel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model.detect(log_mel)
    torch.testing.assert_close(half.framewise, full.framewise, atol=0.03, rtol=0)
    assert not torch.equal(half.framewise, full.framewise)  # autocast was on


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_is_the_experiments_choice(tiny_experiment, channels_last):
    train = replace(tiny_experiment.train, channels_last=channels_last)
    # of three channels: with one, an image is in both formats at once
    frontend = replace(tiny_experiment.frontend, features=("log_mel", "delta", "pcen"))
    model = build_model(replace(tiny_experiment, train=train, frontend=frontend), 3).eval()
    kernels = [p for p in model.backbone.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    images = []
    first = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda _module, inputs, output: images.extend([*inputs, output]))
    with torch.no_grad():
        model(noise(1))
    assert kernels and len(images) == 2
    for tensor in (*kernels, *images):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert tensor.is_contiguous() != channels_last


def test_memory_formats_give_the_same_output(tiny_experiment):
    model = build_model(tiny_experiment, 3).eval()
    train = replace(tiny_experiment.train, channels_last=False)
    other = build_model(replace(tiny_experiment, train=train), 3).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(model(noise(2)), other(noise(2)), atol=1e-5, rtol=1e-4)
