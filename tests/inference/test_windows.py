"""Sound of any length becomes windows, whatever blocks it comes in."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from birdcall.audio.frontend import LogMel
from birdcall.config import FrontendConfig
from birdcall.inference.windows import (
    FRAME_SECONDS,
    SINGLE_SEGMENT,
    End,
    SegmentModel,
    Window,
    WindowConfig,
    cut_windows,
)
from birdcall.models.sed import MaxHead, MeanPooling, SEDModel

RATE = 100


def ramp(seconds, rate=RATE):
    return np.arange(1, round(seconds * rate) + 1, dtype=np.float32)


def cut(sound, window_config=SINGLE_SEGMENT):
    *windows, end = cut_windows(sound, window_config)
    assert isinstance(end, End)
    assert all(isinstance(window, Window) for window in windows)
    return windows, end.seconds


def test_twelve_seconds_are_three_segments_the_last_one_padded():
    windows, seconds = cut({RATE: ramp(12.3)})
    assert seconds == pytest.approx(12.3)
    joined = np.concatenate([window.waveforms[RATE] for window in windows])
    assert joined.shape == (1500,)
    assert np.array_equal(joined[:1230], ramp(12.3))
    assert not joined[1230:].any()
    assert [window.n_segments for window in windows] == [1, 1, 1]


@pytest.mark.parametrize("seconds, n_windows", [(0.01, 1), (4.99, 1), (5.0, 1), (5.01, 2), (10, 2)])
def test_a_window_begins_only_where_there_is_sound(seconds, n_windows):
    assert len(cut({RATE: ramp(seconds)})[0]) == n_windows


def test_a_window_contains_the_context_before_and_after_its_segments():
    windows, _ = cut({RATE: ramp(23)}, WindowConfig(2, 1.5))
    assert [window.n_segments for window in windows] == [2, 2, 1]
    padded = np.concatenate([np.zeros(150), ramp(23), np.zeros(2000)]).astype("f4")
    for number, window in enumerate(windows):
        start = number * 1000
        assert np.array_equal(window.waveforms[RATE], padded[start : start + 1300])


@pytest.mark.parametrize("seconds, n_windows", [(0.01, 1), (5, 1), (5.01, 3), (12.3, 5)])
@pytest.mark.parametrize("context", [0.0, 1.5])
def test_two_windows_begin_in_each_segment_but_the_last(seconds, n_windows, context):
    windows, _ = cut({RATE: ramp(seconds)}, WindowConfig(1, context, shifts=2))
    assert [window.n_segments for window in windows] == [1] * n_windows
    n_context = round(context * RATE)
    padded = np.concatenate([np.zeros(n_context), ramp(seconds), np.zeros(2000)]).astype("f4")
    for number, window in enumerate(windows):
        start = number * 250
        assert np.array_equal(window.waveforms[RATE], padded[start : start + 500 + 2 * n_context])


@given(
    st.integers(1, 4000),
    st.lists(st.integers(1, 900), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 5)]),
    st.sampled_from([0.0, 0.1, 2.5, 7.0]),
)
def test_blocks_do_not_change_the_windows(n_samples, cuts, segments_and_shifts, context):
    """Two rates, whose blocks begin and end at different times."""
    window_segments, shifts = segments_and_shifts
    window_config = WindowConfig(window_segments, context, shifts)
    sound = {RATE: ramp(n_samples / RATE), 2 * RATE: ramp(n_samples / RATE, 2 * RATE)}
    edges = np.unique(np.minimum(np.cumsum([0, *cuts, n_samples]), n_samples))
    blocks = [{RATE: sound[RATE][a:b]} for a, b in pairwise(edges)]
    for block, doubled in zip(blocks, np.array_split(sound[2 * RATE], len(blocks)), strict=True):
        block[2 * RATE] = doubled
    (whole, end), (parts, end_of_parts) = (
        cut(sound, window_config),
        cut(iter(blocks), window_config),
    )
    assert end == end_of_parts == pytest.approx(n_samples / RATE)
    assert [window.n_segments for window in whole] == [window.n_segments for window in parts]
    for one, other in zip(whole, parts, strict=True):
        for rate in sound:
            assert np.array_equal(one.waveforms[rate], other.waveforms[rate])


@pytest.mark.parametrize("context", [-1.0, 0.05, 0.123, float("inf"), float("nan")])
def test_context_is_a_whole_number_of_frames(context):
    with pytest.raises(ValueError, match="context_seconds"):
        WindowConfig(1, context)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_a_window_has_at_least_one_segment(n):
    with pytest.raises(ValueError, match="window_segments"):
        WindowConfig(n)


@pytest.mark.parametrize("window_segments, shifts", [(1, 0), (1, 3), (1, 2.0), (2, 2)])
def test_shifts_are_whole_numbers_of_frames_of_windows_of_one_segment(window_segments, shifts):
    with pytest.raises(ValueError, match="shifts"):
        WindowConfig(window_segments, 0.0, shifts)


class LateBackbone(nn.Module):
    """Means of 32 frames; before the first there is padding, so all are earlier than they seem."""

    def __init__(self, padding):
        super().__init__()
        self.padding = padding

    def forward_features(self, image):
        padded = nn.functional.pad(image, (0, 0, self.padding, 0), mode="replicate")
        return nn.functional.avg_pool2d(padded, (32, image.shape[3]))


@pytest.mark.parametrize("padding", [0, 24])
@pytest.mark.parametrize(
    "window_config", [SINGLE_SEGMENT, WindowConfig(2), WindowConfig(1, 2.5)], ids=str
)
def test_a_frame_of_a_segment_predicts_what_is_then(window_config, padding):
    """Where the sound says what time it is, every frame says its own time."""
    frontend = LogMel(FrontendConfig(hop_length=640, n_mels=8))
    model = SEDModel(
        frontend=frontend,
        backbone=LateBackbone(padding),
        n_features=1,
        pooling=MeanPooling(),
        temporal=nn.Identity(),
        head=MaxHead(1, 1),
        dropout=0.0,
    ).eval()
    for name, value in {"project": 0.5, "head.detection": 0.1}.items():
        nn.init.constant_(model.get_submodule(name).weight, value)
        nn.init.zeros_(model.get_submodule(name).bias)
    n_frames = round(window_config.window_seconds / frontend.frame_seconds) + 1
    clock = frontend.frame_seconds * torch.arange(n_frames)
    with torch.inference_mode():
        output = SegmentModel(model, window_config)(clock[None, None, :, None].expand(1, 1, -1, 8))
    # The model adds its maximum over three frames, a step later, to their mean.
    step = 32 * frontend.frame_seconds
    said = torch.logit(output.frames[0, 0]).numpy() / 0.1 - step / 2
    true = window_config.context_seconds + (np.arange(len(said)) + 0.5) * FRAME_SECONDS
    # Between the first two and the last two frames of the network, at the ends of the window.
    inside = (true > 1.5 * step) & (true < window_config.window_seconds - 2.5 * step)
    assert inside.sum() > 20
    np.testing.assert_allclose(said[inside], true[inside], atol=0.01)
