"""Every experiment's model detects birds in clips of any length, and can be trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from birdcall.config import TEMPORAL_LAYERS, ModelConfig
from birdcall.experiments import EXPERIMENTS, find_experiment
from birdcall.models import AttentionHead, BiGRU, SelfAttention, build_backbone, build_model

N_CLASSES = 5


@pytest.fixture(scope="module", params=list(EXPERIMENTS))
def experiment_model(request):
    torch.manual_seed(0)
    return build_model(EXPERIMENTS[request.param], N_CLASSES)


def noise(n_clips, seconds=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(n_clips, round(seconds * 32_000), generator=generator)


def test_every_experiment_gives_probabilities_and_trains_every_parameter(experiment_model):
    experiment_model.train()
    output = experiment_model(noise(2))
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
    experiment_model.eval()
    batch = torch.cat([noise(1), 5 * noise(2, seed=1)])
    with torch.no_grad():
        together, alone = experiment_model(batch), experiment_model(batch[:1])
    torch.testing.assert_close(together.clipwise[:1], alone.clipwise, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.framewise[:1], alone.framewise, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temporal", TEMPORAL_LAYERS)
def test_every_temporal_layer_takes_clips_of_any_length(tiny_experiment, temporal):
    model = build_model(
        replace(tiny_experiment, model=replace(tiny_experiment.model, temporal=temporal)), 3
    ).eval()
    frames = [model(noise(1, seconds)).framewise.shape[-1] for seconds in (1.0, 5.0, 30.0)]
    assert frames[0] < frames[1] < frames[2]


def test_a_temporal_layer_sees_the_whole_clip():
    features = torch.randn(1, 16, 12)
    for layer in (BiGRU(16), SelfAttention(16, 0.0)):
        changed = features.clone()
        changed[..., -1] += 1
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


def test_an_unknown_backbone_suggests_others():
    with pytest.raises(ValueError, match="no backbone 'resnet5O'; did you mean resnet50"):
        build_backbone(ModelConfig(backbone="resnet5O"), 1, pretrained=False)


def test_an_option_that_the_backbone_does_not_take_is_named():
    config = ModelConfig(backbone="densenet121", backbone_options=(("stem_widht", 16),))
    with pytest.raises(ValueError, match=r"densenet121'.*stem_widht"):
        build_backbone(config, 1, pretrained=False)


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
    experiment = replace(tiny_experiment, model=replace(tiny_experiment.model, dropout=0.5))
    model = build_model(experiment, 3).eval()
    with torch.no_grad():
        assert torch.equal(model(noise(1)).clipwise, model(noise(1)).clipwise)
    assert any(isinstance(module, nn.Dropout) for module in model.modules())
