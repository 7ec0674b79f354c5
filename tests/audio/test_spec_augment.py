"""SpecAugment hides as much as its shares allow, per clip, in a copy."""

import pytest
import torch

from birdcall.audio.frontend import SpecAugment


def make_image(batch=64, channels=2, frames=200, n_mels=64):
    return torch.randn(batch, channels, frames, n_mels, generator=torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_points(image, masked):
    """Return (batch, frames, n_mels), True where all channels have changed."""
    return (image != masked).all(dim=1)


def hide(image, time_share, mel_share, n_masks, seed=0):
    """Return ``image`` with masks drawn from ``seed``."""
    mask = SpecAugment(time_share, mel_share, n_masks)
    return mask.hide(image, mask.draw(len(image), generator(seed)))


def test_without_masks_the_image_is_the_same():
    image = make_image()
    assert not torch.equal(hide(image, 0.2, 0.2, 2), image)
    assert hide(image, 0.2, 0.2, 0) is image
    assert torch.equal(hide(image, 0.0, 0.0, 3), image)


def test_the_input_is_left_as_it_was():
    image = make_image()
    before = image.clone()
    masked = hide(image, 0.5, 0.5, 2)
    assert torch.equal(image, before)
    assert not torch.equal(masked, before)


def test_masks_are_whole_frames_and_whole_mel_bins_within_their_shares():
    image = make_image()
    for time_share, mel_share in ((0.25, 0.0), (0.0, 0.25)):
        hidden = hidden_points(image, hide(image, time_share, mel_share, 1))
        axis, length = (2, 200) if time_share else (1, 64)
        across = hidden.all(dim=axis)  # (batch, length): hidden over the whole other axis
        assert torch.equal(across, hidden.any(dim=axis))
        widths = across.sum(dim=1)
        assert widths.max() <= 0.25 * length
        assert widths.max() > 0.2 * length
        edges = across.int().diff(dim=1).abs().sum(dim=1)
        assert edges.max() <= 2, "one mask is one interval"


def test_all_widths_and_positions_have_the_same_chance():
    image = torch.randn(20_000, 1, 10, 1)
    hidden = hidden_points(image, hide(image, 0.3, 0.0, 1))[..., 0]
    shares = torch.bincount(hidden.sum(dim=1), minlength=4) / len(image)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.02)
    ones = hidden[hidden.sum(dim=1) == 1].float().mean(dim=0)
    torch.testing.assert_close(ones, torch.full((10,), 0.1), rtol=0, atol=0.02)


def test_every_clip_has_its_own_masks():
    hidden = hidden_points(make_image(), hide(make_image(), 0.2, 0.2, 2))
    assert len(torch.unique(hidden.flatten(1), dim=0)) > 60


def test_more_masks_hide_more():
    image = make_image()
    hidden = [
        hidden_points(image, hide(image, 0.1, 0.1, n_masks)).float().mean() for n_masks in (1, 2, 4)
    ]
    assert hidden[0] < hidden[1] < hidden[2]


def test_hidden_points_take_the_mean_of_their_clip_and_channel():
    image = make_image() * 5 - torch.linspace(10, 80, 128).reshape(64, 2, 1, 1)
    masked = hide(image, 0.5, 0.5, 2)
    changed = image != masked
    means = image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    assert torch.equal(masked[changed], means[changed])
    assert torch.equal(masked[~changed], image[~changed])


def test_the_generator_alone_decides():
    image = make_image()
    first = hide(image, 0.2, 0.2, 2, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(hide(image, 0.2, 0.2, 2, seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(hide(image, 0.2, 0.2, 2, seed=2), first)


def test_masks_can_be_drawn_first_for_more_clips_and_of_another_length():
    image, mask = make_image(), SpecAugment(0.2, 0.2, 2)
    draws = mask.draw(len(image), generator(1))
    assert draws.shape == (64, 2, 2, 2)
    assert draws.device.type == "cpu"
    assert torch.equal(mask.hide(image, draws), hide(image, 0.2, 0.2, 2, seed=1))
    half = mask.hide(image[32:], draws[32:])
    assert torch.equal(half, mask.hide(image, draws)[32:])
    longer = make_image(frames=400)
    hidden = hidden_points(longer, mask.hide(longer, draws)).all(dim=2).float().mean(dim=1)
    shorter = hidden_points(image, mask.hide(image, draws)).all(dim=2).float().mean(dim=1)
    torch.testing.assert_close(hidden, shorter, rtol=0, atol=0.02)


@pytest.mark.parametrize("frames", [1, 2, 3, 9, 1001])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_it_works_on_any_length(frames, share):
    image = make_image(batch=8, frames=frames, n_mels=5)
    masked = hide(image, share, share, 3)
    assert masked.shape == image.shape
    assert masked.isfinite().all()


def test_gradients_pass_where_nothing_is_hidden():
    image = make_image(batch=4).requires_grad_()
    masked = hide(image, 0.3, 0.3, 1)
    hidden = masked != image
    masked[~hidden].sum().backward()
    assert torch.equal(image.grad, (~hidden).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_kept(dtype):
    assert hide(make_image().to(dtype), 0.2, 0.2, 2).dtype == dtype


@pytest.mark.parametrize(
    "values,message",
    [
        ((1.2, 0.1, 1), "time_mask_share is 1.2"),
        ((0.1, -0.1, 1), "mel_mask_share is -0.1"),
        ((0.1, 0.1, -1), "n_masks is -1"),
    ],
)
def test_impossible_masks_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SpecAugment(*values)
