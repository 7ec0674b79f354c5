"""The front end equals librosa and torchlibrosa, treats every clip alone, and can be exported."""

import copy
import io
import pickle
from dataclasses import replace
from functools import cache

import librosa
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchlibrosa.stft import LogmelFilterBank
from torchlibrosa.stft import Spectrogram as TorchlibrosaSpectrogram

from birdcall.audio.frontend import LogMel, delta, pcen, power_to_db
from birdcall.audio.reading import read_audio
from birdcall.config import FrontendConfig

RATE = 32_000
FEATURES = ("log_mel", "log_mel_1.5", "pcen", "delta", "delta_delta")
IMPLEMENTATIONS = ("fft", "torchlibrosa", "conv")
N_SAMPLES = 5 * RATE
CONFIGS = [FrontendConfig(), FrontendConfig(n_fft=2048, hop_length=512, n_mels=128)]
ALL_FEATURES = FrontendConfig(features=FEATURES, top_db=80.0)


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_signal(name):
    seconds = np.arange(N_SAMPLES) / RATE
    if name == "noise":
        signal = noise(N_SAMPLES).numpy()
    elif name == "chirp":
        signal = np.sin(2 * np.pi * (100 * seconds + 0.5 * (15_000 - 100) / 5 * seconds**2))
    elif name == "impulse":
        signal = np.eye(1, N_SAMPLES, N_SAMPLES // 2)[0]
    elif name == "silence":
        signal = np.zeros(N_SAMPLES)
    else:  # full scale: a square wave
        signal = np.where(np.sin(2 * np.pi * 1000 * seconds) >= 0, 1.0, -1.0)
    return signal.astype(np.float32)


SIGNALS = ["noise", "chirp", "impulse", "silence", "full_scale"]


def librosa_mel(signal, config):
    return librosa.feature.melspectrogram(
        y=signal, sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length,
        n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, pad_mode="reflect",
    )  # fmt: skip


def librosa_log_mel(signal, config):
    return librosa.power_to_db(librosa_mel(signal, config), top_db=None).T


@cache  # torchlibrosa needs seconds to build its matrices
def torchlibrosa_modules(config):
    spectrogram = TorchlibrosaSpectrogram(n_fft=config.n_fft, hop_length=config.hop_length)
    to_log_mel = LogmelFilterBank(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels, fmin=config.fmin,
        fmax=config.fmax, top_db=None,
    )  # fmt: skip
    return torch.nn.Sequential(spectrogram, to_log_mel)


def torchlibrosa_log_mel(signal, config):
    return torchlibrosa_modules(config)(torch.from_numpy(signal)[None])[0, 0].numpy()


shared_frontend = cache(LogMel)  # of tests that leave it as it is


def log_mel_of(signal, config):
    return shared_frontend(config)(torch.from_numpy(signal)[None])[0, 0].numpy()


def largest_difference(one, other, above):
    audible = other > above
    return np.abs(one - other)[audible].max() if audible.any() else 0.0


# --- equal to the references ---------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=["1024", "2048"])
@pytest.mark.parametrize("name", SIGNALS)
def test_it_equals_librosa(name, config):
    signal = make_signal(name)
    log_mel, reference = log_mel_of(signal, config), librosa_log_mel(signal, config)
    assert largest_difference(log_mel, reference, above=-80) < 1e-3
    assert largest_difference(log_mel, reference, above=-100.1) < 0.05  # inaudible


@pytest.mark.parametrize("config", CONFIGS, ids=["1024", "2048"])
def test_what_is_faint_beside_wind_is_as_exact(config):
    """Single precision alone is not: half of the frames have wind, and are computed in double."""
    wind = 0.9 * np.sin(2 * np.pi * 70 * np.arange(N_SAMPLES) / RATE)
    wind[N_SAMPLES // 2 :] = 0
    signal = (wind + 4e-4 * noise(N_SAMPLES).numpy()).astype(np.float32)
    reference = librosa_log_mel(signal, config)
    log_mel = LogMel(config)
    power, waveform = log_mel.spectrogram.power, torch.from_numpy(signal)[None]
    single = power(waveform, log_mel.mel, lambda power, _: power[..., 0] < 0)
    assert largest_difference(power_to_db(single)[0].numpy(), reference, above=-80) > 2e-3
    assert largest_difference(log_mel(waveform)[0, 0].numpy(), reference, above=-80) < 1e-3


@pytest.mark.parametrize("n_repaired", [0, 1, 100, 501])
def test_exactly_the_frames_in_doubt_are_computed_in_double_precision(n_repaired):
    frontend, waveform = LogMel(FrontendConfig()), noise(2, N_SAMPLES)
    power, chosen = frontend.spectrogram.power, torch.randperm(501)[:n_repaired]
    doubts = torch.zeros(2, 501, dtype=torch.bool)
    doubts[1, chosen] = True
    waiting = doubts.flatten().tolist()  # blocks come clip by clip, in order

    def is_inexact(block, _):
        part = [waiting.pop(0) for _ in range(block.shape[1])]
        return torch.tensor(part).reshape(block.shape[:2])

    same = lambda power: power  # noqa: E731
    repaired = power(waveform, same, is_inexact)
    double = power(waveform, same)
    single = power(waveform, same, lambda power, _: power[..., 0] < 0)
    assert torch.equal(repaired[doubts], double[doubts])
    assert torch.equal(repaired[~doubts], single[~doubts])
    assert not torch.equal(single, double)


def test_gradients_pass_through_frames_of_either_precision():
    signal = make_signal("chirp")[: RATE // 4] + 1e-4 * noise(RATE // 4).numpy()
    waveform = torch.from_numpy(signal)[None].requires_grad_()
    frontend = LogMel(FrontendConfig())
    power = frontend.spectrogram.power
    (single,) = torch.autograd.grad(frontend(waveform).mean(), waveform)
    (double,) = torch.autograd.grad(power_to_db(power(waveform, frontend.mel)).mean(), waveform)
    spread = double.abs().max().item()
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3 * spread)


@pytest.mark.parametrize("config", CONFIGS, ids=["1024", "2048"])
@pytest.mark.parametrize("name", SIGNALS)
def test_it_equals_torchlibrosa(name, config):
    # 60 dB below a full-scale tone the float32 of torchlibrosa starts to differ, from librosa too.
    signal = make_signal(name)
    reference = torchlibrosa_log_mel(signal, config)
    above = max(-80, reference.max() - 60) if name in ("chirp", "full_scale") else -80
    assert largest_difference(log_mel_of(signal, config), reference, above) < 1e-3


@pytest.mark.parametrize("config", CONFIGS, ids=["1024", "2048"])
@pytest.mark.parametrize("implementation", ["torchlibrosa", "conv"])
@pytest.mark.parametrize("name", SIGNALS)
def test_the_implementations_are_interchangeable(name, implementation, config):
    signal = make_signal(name)
    log_mel = log_mel_of(signal, config)
    other = log_mel_of(signal, replace(config, implementation=implementation))
    above = max(-80, log_mel.max() - 60) if name in ("chirp", "full_scale") else -80
    assert largest_difference(other, log_mel, above) < 1e-3


@pytest.mark.parametrize("config", CONFIGS, ids=["1024", "2048"])
def test_it_equals_librosa_and_torchlibrosa_on_real_recordings(cornell_mini, config):
    for path in sorted(cornell_mini.glob("train_audio/*/*"))[:5]:
        signal = read_audio(path, RATE, 0.0, 5.0)
        log_mel = log_mel_of(signal, config)
        assert largest_difference(log_mel, librosa_log_mel(signal, config), above=-80) < 1e-3
        reference = torchlibrosa_log_mel(signal, config)
        above = max(-80, reference.max() - 80)
        assert largest_difference(log_mel, reference, above) < 1e-3


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"n_fft": 2048, "n_mels": 128, "fmin": 0.0, "fmax": 16_000.0},
        {"n_fft": 512, "n_mels": 40, "fmin": 200.0},
        {"sample_rate": 22_050, "n_mels": 7, "fmin": 20.0, "fmax": 11_025.0},
    ],
)
def test_the_mel_filters_are_librosas(values):
    config = FrontendConfig(**values)
    reference = librosa.filters.mel(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels,
        fmin=config.fmin, fmax=config.fmax,
    )  # fmt: skip
    filters = LogMel(config).mel(torch.eye(config.n_fft // 2 + 1))
    np.testing.assert_allclose(filters.numpy().T, reference, rtol=1e-5, atol=1e-9)


def test_filters_too_narrow_for_the_fft_are_reported(caplog):
    frontend = LogMel(FrontendConfig(n_fft=512, hop_length=320, n_mels=128, fmin=0.0))
    assert "filters lie between two bins of n_fft 512" in caplog.text
    assert frontend(noise(1, RATE)).isfinite().all()


# --- BirdNET's filters ---------------------------------------------------------------------------

BIRDNET = FrontendConfig(
    n_fft=1366, hop_length=186, n_mels=96, features=("birdnet_low", "birdnet_high")
)
BIRDNET_RATE = 48_000


def tensorflow_mel(n_bins, band_hz, n_mels=96):
    """TensorFlow's ``linear_to_mel_weight_matrix`` at 48 kHz, bin by bin."""

    def mel_of(hz):
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(*map(mel_of, band_hz), n_mels + 2)
    filters = np.zeros((n_mels, n_bins))
    for number in range(1, n_bins):
        mel = mel_of(number * BIRDNET_RATE / 2 / (n_bins - 1))
        for band in range(n_mels):
            lower, centre, upper = edges[band : band + 3]
            rising, falling = (mel - lower) / (centre - lower), (upper - mel) / (upper - centre)
            filters[band, number] = max(0, min(rising, falling))
    return filters


def birdnet_power(signal, n_fft, hop, filters):
    """BirdNET's image (frames, mels), as its program computes it, with the frames of ours."""
    scaled = 2 * (signal - signal.min()) / (np.ptp(signal) + 1e-6) - 1
    padded = np.pad(scaled, n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    return (np.fft.rfft(frames * window).real @ filters.T) ** 2


@pytest.mark.parametrize(
    ("feature", "n_fft", "band_hz"),
    [("birdnet_low", 2048, (0, 3_000)), ("birdnet_high", 1024, (500, 15_000))],
)
@pytest.mark.parametrize("loudness", [1.0, 1e-3])
def test_birdnets_filters_are_its_own(feature, n_fft, band_hz, loudness):
    signal = loudness * (noise(BIRDNET_RATE).numpy() + 0.3)  # with an offset, which it takes away
    config = replace(
        BIRDNET, sample_rate=BIRDNET_RATE, n_fft=2048, hop_length=280, features=(feature,)
    )
    image = LogMel(config)(torch.from_numpy(signal)[None])[0, 0].numpy()
    power = birdnet_power(signal, n_fft, 280, tensorflow_mel(n_fft // 2 + 1, band_hz))
    amplitude, expected = 10 ** (image / 20), np.sqrt(power)
    assert image.shape == (BIRDNET_RATE // 280 + 1, 96)
    np.testing.assert_allclose(amplitude, expected, atol=1e-4 * expected.max())


@pytest.mark.parametrize("hz", [250, 1_000, 2_500, 6_000, 14_000])
def test_birdnets_filters_at_32_khz_are_those_at_48_khz(hz):
    """Of a tone: the mean power of each mel bin, which does not depend on where a frame begins."""
    powers = []
    for rate, config in (
        (RATE, BIRDNET),
        (BIRDNET_RATE, replace(BIRDNET, sample_rate=BIRDNET_RATE, n_fft=2048, hop_length=279)),
    ):
        tone = np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate).astype(np.float32)
        image = LogMel(config)(torch.from_numpy(tone)[None])[0, :, 10:-10]
        powers.append((10 ** (image / 10)).mean(dim=1).numpy())
    for ours, theirs in zip(*powers, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.03 * max(theirs.max(), 1e-3))


def test_birdnets_images_do_not_depend_on_loudness_and_have_no_other_channels():
    waveform = noise(2, N_SAMPLES)
    image = LogMel(BIRDNET)(waveform)
    assert image.shape == (2, 2, N_SAMPLES // 186 + 1, 96)
    amplitude, louder = 10 ** (image / 20), 10 ** (LogMel(BIRDNET)(waveform * 3) / 20)
    torch.testing.assert_close(louder, amplitude, rtol=0, atol=1e-4 * float(amplitude.max()))
    with pytest.raises(ValueError, match="share no image"):
        replace(BIRDNET, features=("log_mel", "birdnet_low"))
    with pytest.raises(ValueError, match="birdnet_high needs 30000"):
        LogMel(replace(BIRDNET, sample_rate=22_050, fmax=11_000.0))
    with pytest.raises(ValueError, match="1366 samples at 32000 Hz"):
        LogMel(replace(BIRDNET, n_fft=1024))


def test_birdnets_images_are_the_same_in_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session = onnxruntime.InferenceSession(export(LogMel(BIRDNET).eval(), dynamo=True))
    waveform = noise(3, 48_123)
    (image,) = session.run(None, {session.get_inputs()[0].name: waveform.numpy()})
    amplitude, expected = 10 ** (image / 20), 10 ** (LogMel(BIRDNET)(waveform).numpy() / 20)
    np.testing.assert_allclose(amplitude, expected, atol=1e-4 * expected.max())


# --- the other features --------------------------------------------------------------------------


def test_channels_are_the_features_in_their_order():
    image = LogMel(ALL_FEATURES)(noise(2, RATE))
    assert image.shape == (2, len(FEATURES), 101, 64)
    for channel, feature in enumerate(FEATURES):
        alone = LogMel(replace(ALL_FEATURES, features=(feature,)))(noise(2, RATE))
        assert torch.equal(image[:, channel], alone[:, 0]), feature
    backwards = LogMel(replace(ALL_FEATURES, features=FEATURES[::-1]))(noise(2, RATE))
    assert torch.equal(backwards, image.flip(1))


@pytest.mark.parametrize("top_db", [None, 30.0])
def test_top_db_and_the_power_of_one_and_a_half_are_librosas(top_db):
    signal = make_signal("chirp")
    config = FrontendConfig(features=("log_mel", "log_mel_1.5"), top_db=top_db)
    image = LogMel(config)(torch.from_numpy(signal)[None])[0].numpy()
    mel = librosa_mel(signal, config)
    for channel, power in zip(image, (mel, mel**1.5), strict=True):
        reference = librosa.power_to_db(power, top_db=top_db).T
        assert largest_difference(channel, reference, above=-80) < 1e-3
        assert largest_difference(channel, reference, above=-100.1) < 0.05


@pytest.mark.parametrize("n_frames", [1, 2, 100, 127, 128, 129, 256, 1000])
@pytest.mark.parametrize("hop_length", [320, 1024])
def test_pcen_is_librosas_started_at_the_first_frame(n_frames, hop_length):
    mel = np.random.default_rng(0).gamma(0.3, 0.01, (2, n_frames, 5)).astype(np.float32)
    rate = RATE / hop_length
    weight = (np.sqrt(1 + 4 * (0.4 * rate) ** 2) - 1) / (2 * (0.4 * rate) ** 2)
    for clip, ours in zip(mel, pcen(torch.from_numpy(mel), rate), strict=True):
        start = (1 - weight) * clip.T[:, :1]
        reference = librosa.pcen(clip.T, sr=RATE, hop_length=hop_length, zi=start)
        np.testing.assert_allclose(ours.numpy().T, reference, rtol=1e-4, atol=1e-5)


def test_pcen_ignores_how_loud_a_clip_is():
    config = FrontendConfig(features=("pcen",))
    waveform = noise(1, N_SAMPLES)
    ratio = LogMel(config)(waveform * 3) / LogMel(config)(waveform)
    assert ratio.max() < 1.1  # the mel itself has grown by 9; a gain of 0.98 leaves 9**0.02
    assert ratio.min() > 1.0


@pytest.mark.parametrize("n_frames", [9, 10, 50, 501])
@pytest.mark.parametrize("order", [1, 2])
def test_deltas_are_librosas(n_frames, order):
    log_mel = 20 * noise(2, n_frames, 5)
    for clip, ours in zip(log_mel, delta(log_mel, order), strict=True):
        reference = librosa.feature.delta(clip.numpy().T, order=order)
        np.testing.assert_allclose(ours.numpy().T, reference, atol=1e-5)


@pytest.mark.parametrize("n_frames", [1, 2, 5, 8])
@pytest.mark.parametrize("order", [1, 2])
def test_deltas_of_clips_shorter_than_the_filter_repeat_the_edges(n_frames, order):
    log_mel = 20 * noise(2, n_frames, 5)
    for clip, ours in zip(log_mel, delta(log_mel, order), strict=True):
        reference = librosa.feature.delta(clip.numpy().T, order=order, mode="nearest")
        np.testing.assert_allclose(ours.numpy().T, reference, atol=1e-5)


def test_normalization_centres_each_clip_or_each_bin():
    waveform = torch.stack([noise(RATE), 0.01 * noise(RATE, seed=1)])
    plain = LogMel(ALL_FEATURES)(waveform)
    for normalization, dims in (("clip", (2, 3)), ("bin", (2,))):
        image = LogMel(replace(ALL_FEATURES, normalization=normalization))(waveform)
        mean = plain.mean(dims, keepdim=True)
        expected = (plain - mean) / plain.std(dims, keepdim=True, correction=0)
        torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalization", ["clip", "bin"])
def test_normalised_silence_is_nearly_zero(normalization):
    image = LogMel(replace(ALL_FEATURES, normalization=normalization))(torch.zeros(1, RATE))
    assert image.abs().max() < 0.1


# --- each clip alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalization", ["none", "clip"])
def test_a_clip_does_not_depend_on_its_batch(implementation, normalization):
    config = replace(ALL_FEATURES, implementation=implementation, normalization=normalization)
    quiet, loud = 1e-3 * noise(1, N_SAMPLES), 10 * noise(1, N_SAMPLES, seed=1)  # 80 dB apart
    frontend = shared_frontend(config)
    alone = frontend(quiet)
    together = frontend(torch.cat((loud, quiet, loud)))[1:2]
    if implementation == "fft":
        assert torch.equal(together, alone)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seconds", [0.1, 0.7, 12.3])
def test_clips_of_any_length_do_not_depend_on_their_batch(seconds):
    frontend, clips = LogMel(FrontendConfig()), noise(7, int(seconds * RATE))
    alone = torch.cat([frontend(clip[None]) for clip in clips])
    torch.testing.assert_close(frontend(clips), alone, rtol=1e-6, atol=1e-5)


# --- precision and gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(implementation, dtype):
    config = replace(ALL_FEATURES, implementation=implementation, normalization="clip")
    frontend = shared_frontend(config)
    silence, full_scale = make_signal("silence"), make_signal("full_scale")
    waveform = torch.from_numpy(np.stack([silence, full_scale, noise(N_SAMPLES).numpy()]))
    expected = frontend(waveform)
    with torch.autocast("cpu", dtype=dtype):
        image = frontend(waveform)
    assert image.dtype == torch.float32
    assert image.isfinite().all()
    assert torch.equal(image, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalization", ["none", "bin"])
def test_gradients_are_those_of_finite_differences(implementation, normalization):
    config = replace(ALL_FEATURES, implementation=implementation, normalization=normalization)
    frontend = LogMel(replace(config, hop_length=500, top_db=None))
    waveform, direction = noise(2, 6_000), noise(2, 6_000, seed=1)
    weights = noise(2, len(FEATURES), 6_000 // 500 + 1, 64, seed=2)

    def loss(shift):
        return (frontend(waveform + shift * direction).double() * weights).sum()

    waveform.requires_grad_()
    loss(0.0).backward()
    step = 3e-3
    with torch.no_grad():
        numeric = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(
        (waveform.grad * direction).double().sum(), numeric, rtol=0.02, atol=0.02
    )


def test_gradients_of_silence_are_finite():
    waveform = torch.zeros(1, RATE, requires_grad=True)
    LogMel(replace(ALL_FEATURES, normalization="clip"))(waveform).sum().backward()
    assert waveform.grad.isfinite().all()


def test_the_graph_does_not_change_the_numbers():
    frontend, waveform = LogMel(ALL_FEATURES), noise(3, N_SAMPLES)
    with torch.inference_mode():
        expected = frontend(waveform)
    assert torch.equal(frontend(waveform.requires_grad_()).detach(), expected)


# --- a module that leaves no trace ---------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_in_the_state_dict_and_nothing_is_trained(implementation):
    frontend = shared_frontend(FrontendConfig(implementation=implementation))
    assert not frontend.state_dict()
    assert not list(frontend.parameters())
    frontend.load_state_dict({})
    assert all(buffer.is_contiguous() for buffer in frontend.buffers())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_in_half_precision_keeps_its_front_end_exact(implementation):
    frontend, waveform = LogMel(FrontendConfig(implementation=implementation)), noise(2, RATE)
    expected = frontend(waveform)
    model = torch.nn.Sequential(frontend, torch.nn.Linear(64, 2))
    for convert in (model.half, model.bfloat16, model.double, model.float):
        convert()
        assert torch.equal(frontend(waveform), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_copies_and_pickles_give_the_same(implementation):
    frontend, waveform = (
        shared_frontend(FrontendConfig(implementation=implementation)),
        noise(2, RATE),
    )
    for other in (copy.deepcopy(frontend), pickle.loads(pickle.dumps(frontend))):
        assert torch.equal(other(waveform), frontend(waveform))


def test_frame_seconds_is_the_step_between_frames():
    assert LogMel(FrontendConfig(hop_length=320)).frame_seconds == pytest.approx(0.01)


# --- export and speed ----------------------------------------------------------------------------


def export(frontend, dynamo):
    example = (noise(2, RATE),)
    if not dynamo:
        file = io.BytesIO()
        axes = {"waveform": {0: "batch", 1: "samples"}}
        torch.onnx.export(
            frontend, example, file, dynamo=False, input_names=["waveform"], dynamic_axes=axes,
            opset_version=17,
        )  # fmt: skip
        return file.getvalue()
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("samples")},)
    program = torch.onnx.export(
        frontend, example, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    return program.model_proto.SerializeToString()


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(FrontendConfig(), id="log_mel"),
        pytest.param(
            replace(ALL_FEATURES, n_fft=2048, hop_length=512, normalization="bin"),
            id="all features",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_conv_twin_gives_the_same_numbers_in_onnx_at_any_size(config, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = export(LogMel(replace(config, implementation="conv")).eval(), dynamo)
    session = onnxruntime.InferenceSession(model)
    for batch, n_samples in ((1, N_SAMPLES), (2, RATE), (5, 48_123)):
        waveform = noise(batch, n_samples, seed=batch)
        (image,) = session.run(None, {session.get_inputs()[0].name: waveform.numpy()})
        np.testing.assert_allclose(image, LogMel(config)(waveform).numpy(), atol=1e-3)


def test_fft_needs_a_small_part_of_the_operations_of_torchlibrosa():
    """Counted, not timed: `birdcall benchmark frontend` measures the speed."""
    counts = {}
    for name in ("fft", "torchlibrosa"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shared_frontend(FrontendConfig(implementation=name))(noise(4, N_SAMPLES))
        counts[name] = counter.get_total_flops()
    n_fft, hop = FrontendConfig().n_fft, FrontendConfig().hop_length
    transforms = 4 * (1 + N_SAMPLES // hop) * 2.5 * n_fft * np.log2(n_fft)  # torch counts none
    assert counts["torchlibrosa"] > 5 * (counts["fft"] + transforms)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gpu_gives_the_same_numbers(implementation):
    config = replace(ALL_FEATURES, implementation=implementation)
    waveform = noise(4, N_SAMPLES)
    expected = LogMel(ALL_FEATURES)(waveform)
    frontend = LogMel(config).to("cuda")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            image = frontend(waveform.to("cuda"))
        torch.testing.assert_close(image.cpu(), expected, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="waveform is on cpu, the front end on cuda:0"):
        frontend(waveform)


def test_power_to_db_is_librosas_below_its_floor():
    power = torch.tensor([[[0.0, 1e-12, 1e-10, 1e-5, 1.0, 1e4]]])
    reference = librosa.power_to_db(power.numpy(), top_db=None)
    np.testing.assert_allclose(power_to_db(power).numpy(), reference, atol=1e-5)
