"""A batch is mixed, shifted and turned up or down as drawn, alike in one process or several."""

from dataclasses import replace

import pytest
import torch

from birdcall.config import NO_AUGMENT, AugmentConfig
from birdcall.data.augment import BatchDraws, augment_batch
from birdcall.data.targets import IGNORE_TARGET

N = 8


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def batch(n_clips=N, n_classes=4, n_samples=1000):
    loudness = torch.arange(1, n_clips + 1)[:, None]
    waveform = torch.randn(n_clips, n_samples, generator=generator(0)) * loudness
    return waveform, torch.eye(n_classes).repeat(-(-n_clips // n_classes), 1)[:n_clips]


def draw(n_clips=N, seed=1, **values):
    return BatchDraws.draw(n_clips, replace(NO_AUGMENT, **values), generator(seed))


def by_hand(n_clips, **values):
    """Return draws that do nothing but what is given, one value for each clip."""
    return replace(draw(n_clips), **{name: torch.tensor(value) for name, value in values.items()})


def test_nothing_is_done_where_nothing_is_drawn():
    waveform, target = batch()
    same, labels = augment_batch(waveform, target, draw())
    assert torch.equal(same, waveform)
    assert torch.equal(labels, target)
    assert same is not waveform


def test_mixing_adds_each_partner_at_the_clips_own_power_times_the_gain():
    waveform = torch.tensor([[1.0, -1.0, 1.0, -1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 4.0, 0.0, 0.0]])
    target = torch.tensor([[1.0, 0, 0, 0.3], [0, 1, 0, 0], [0, 0, 1, 1]])
    draws = by_hand(
        3, partners=[[1, 2], [2, 0], [0, 1]], mix_gain=[[0.5, 2.0], [1.0, 0.0], [0.0, 0.0]]
    )
    mixed, union = augment_batch(waveform, target, draws)
    # RMS 1, 3 and 2: partner 1 is scaled by 0.5 / 3, partner 2 by 2 / 2.
    expected = torch.tensor([[1.5, 3.5, 1.5, -0.5], [3.0, 9.0, 3.0, 3.0], [0.0, 4.0, 0.0, 0.0]])
    torch.testing.assert_close(mixed, expected)
    assert torch.equal(union, torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]))


def test_a_class_is_unknown_where_it_is_so_in_one_and_positive_in_none():
    target = torch.tensor(
        [[IGNORE_TARGET, IGNORE_TARGET, 0, 1, 0], [1, 0, IGNORE_TARGET, IGNORE_TARGET, 0.0]]
    )
    draws = by_hand(2, partners=[[1, 0], [0, 1]], mix_gain=[[1.0, 0.0], [1.0, 0.0]])
    _, union = augment_batch(torch.ones(2, 4), target, draws)
    assert union.tolist() == [[1, IGNORE_TARGET, IGNORE_TARGET, 1, 0]] * 2


def test_a_silent_clip_takes_and_gives_no_label():
    waveform, target = batch()
    waveform[2] = 0
    draws = draw(mixup_probability=1.0, mixup_third_probability=1.0)
    mixed, union = augment_batch(waveform, target, draws)
    assert mixed.isfinite().all()
    assert not mixed[2].any()
    assert torch.equal(union[2], target[2])
    takers = (draws.partners == 2).any(dim=1).nonzero().flatten().tolist()
    assert len(takers) == 2
    for row in takers:
        (other,) = (int(p) for p in draws.partners[row] if p != 2)
        assert torch.equal(union[row], torch.maximum(target[row], target[other]))


def test_partners_are_two_other_clips_each_taken_as_often_as_any():
    for seed in range(20):
        draws = draw(7, seed, mixup_probability=1.0)
        rows = torch.cat([torch.arange(7)[:, None], draws.partners], dim=1)
        assert all(len(set(row)) == 3 for row in rows.tolist())
        for column in draws.partners.T:
            assert sorted(column.tolist()) == list(range(7))


def test_mixing_happens_in_the_shares_and_the_range_that_were_asked_for():
    draws = draw(
        4000, mixup_probability=0.5, mixup_third_probability=0.2, mixup_gain_db=(-6.0, 6.0)
    )
    first, third = (draws.mix_gain > 0).T
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not (third & ~first).any()
    assert (third.sum() / first.sum()).item() == pytest.approx(0.2, abs=0.03)
    gain_db = 20 * torch.log10(draws.mix_gain[first, 0])
    assert (gain_db.min().item(), gain_db.max().item()) == pytest.approx((-6, 6), abs=0.05)


def test_few_clips_are_mixed_with_those_there_are():
    for n_clips in (1, 2):
        draws = draw(n_clips, mixup_probability=1.0, mixup_third_probability=1.0)
        assert (draws.mix_gain > 0).sum().item() == 2 * (n_clips - 1)
        waveform, target = batch(n_clips)
        mixed, union = augment_batch(waveform, target, draws)
        assert mixed.isfinite().all()
        assert (union.sum(dim=1) == n_clips).all()


def test_the_shift_is_a_ring():
    waveform, target = batch(3)
    shifted, same = augment_batch(waveform, target, by_hand(3, shift=[0.0, 0.25, 0.9999999]))
    for row, n in enumerate((0, 250, 999)):
        assert torch.equal(shifted[row], waveform[row].roll(n))
    assert torch.equal(same, target)


def test_a_mixed_clip_is_shifted_and_its_gain_changed_as_a_whole():
    waveform, target = batch(2)
    mixing = {"partners": [[1, 0], [0, 1]], "mix_gain": [[0.7, 0.0], [0.0, 0.0]]}
    mixed, _ = augment_batch(waveform, target, by_hand(2, **mixing))
    all_of_it, _ = augment_batch(
        waveform, target, by_hand(2, **mixing, shift=[0.3, 0.0], gain=[0.5, 2.0])
    )
    torch.testing.assert_close(all_of_it[0], 0.5 * mixed[0].roll(300))
    torch.testing.assert_close(all_of_it[1], 2 * waveform[1])


def test_shift_and_gain_are_drawn_in_their_shares_and_ranges():
    draws = draw(4000, shift_probability=0.3, gain_probability=0.5, gain_db=(-18.0, 6.0))
    assert (draws.shift > 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert draws.shift.max() > 0.99
    gain_db = 20 * torch.log10(draws.gain)
    changed = gain_db[draws.gain != 1]
    assert len(changed) / 4000 == pytest.approx(0.5, abs=0.03)
    assert (changed.min().item(), changed.max().item()) == pytest.approx((-18, 6), abs=0.05)
    always = draw(100, shift_probability=1.0, gain_probability=1.0)
    assert (always.shift > 0).all()
    assert (always.gain != 1).all()


@pytest.mark.parametrize("n_parts", [2, 4])
def test_the_parts_equal_the_whole_to_the_bit(n_parts):
    config = AugmentConfig(shift_probability=0.5, mixup_probability=0.9, gain_probability=0.5)
    waveform, target = batch(n_samples=40_001)
    target[target == 0] = torch.tensor([0, IGNORE_TARGET, 0.3])[torch.arange(24) % 3]
    draws = BatchDraws.draw(N, config, generator())
    whole = augment_batch(waveform, target, draws)
    size = N // n_parts
    for start in range(0, N, size):
        rows = slice(start, start + size)
        part = draws.part(start, start + size)
        assert torch.equal(part.masks, draws.masks[rows])
        made = augment_batch(waveform[rows], target[rows], part, (waveform, target))
        assert torch.equal(made[0], whole[0][rows])
        assert torch.equal(made[1], whole[1][rows])


def test_one_seed_gives_one_batch_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = (
        BatchDraws.draw(N, AugmentConfig(), generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in vars(first).items():
        assert value.device.type == "cpu"
        assert torch.equal(value, getattr(again, name))
    assert not torch.equal(first.masks, other.masks)
    assert not torch.equal(first.partners, other.partners)


def test_the_input_is_left_as_it_was():
    waveform, target = batch()
    before = waveform.clone(), target.clone()
    draws = draw(mixup_probability=1.0, gain_probability=1.0, shift_probability=1.0)
    mixed, _ = augment_batch(waveform, target, draws)
    assert torch.equal(waveform, before[0])
    assert torch.equal(target, before[1])
    assert not torch.equal(mixed, waveform)


@pytest.mark.cuda
def test_a_gpu_makes_the_clips_of_the_cpu():
    config = AugmentConfig(shift_probability=0.5, mixup_probability=0.9, gain_probability=0.5)
    waveform, target = batch()
    draws = BatchDraws.draw(N, config, generator())
    made = augment_batch(waveform.cuda(), target.cuda(), draws)
    expected = augment_batch(waveform, target, draws)
    assert made[0].is_cuda
    torch.testing.assert_close(made[0].cpu(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(made[1].cpu(), expected[1])
