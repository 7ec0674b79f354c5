"""The spectrogram equals librosa's, stays small and exact, and refuses what it cannot transform."""

import threading

import librosa
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from birdcall.audio.frontend import LogMel
from birdcall.audio.spectrogram import FFTPower, Spectrogram, check_waveform, exact_float32
from birdcall.config import FrontendConfig

CPU = torch.device("cpu")
IMPLEMENTATIONS = ("fft", "conv", "torchlibrosa")


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_articles_first_step_gives_torchlibrosas_layout(implementation):
    waveform = noise(1, 72_000)
    power = Spectrogram(n_fft=2048, hop_length=320, implementation=implementation)(waveform)
    assert power.shape == (1, 1, 226, 1025)
    reference = librosa.stft(waveform[0].numpy(), n_fft=2048, hop_length=320, pad_mode="reflect")
    np.testing.assert_allclose(power[0, 0].numpy().T, np.abs(reference) ** 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_fft,hop_length", [(1024, 320), (512, 512), (401, 160), (64, 3)])
@pytest.mark.parametrize("n_samples", [700, 1024, 4001])
def test_there_are_as_many_frames_as_in_librosa(n_fft, hop_length, n_samples):
    power = Spectrogram(n_fft, hop_length)(noise(2, n_samples))
    reference = librosa.stft(np.zeros(n_samples), n_fft=n_fft, hop_length=hop_length)
    assert power.shape[2] == reference.shape[1]


def test_a_batch_cut_into_blocks_equals_its_clips_one_by_one(monkeypatch):
    waveform = noise(5, 9_000)
    waveform[::2] += torch.sin(torch.arange(9_000) / 100)  # not all frames are repaired
    # Products of other shapes are rounded otherwise; the transforms themselves are the same.
    for module, error in ((Spectrogram(1024, 320), 0), (LogMel(FrontendConfig()), 1e-5)):
        whole = module(waveform)
        for block in (4096, 32_000, 160_000):
            monkeypatch.setattr(FFTPower, "cpu_block_bytes", block)
            monkeypatch.setattr(FFTPower, "cpu_double_block_bytes", block)
            torch.testing.assert_close(module(waveform), whole, rtol=0, atol=error)
        monkeypatch.undo()


@pytest.mark.parametrize("n_clips,seconds", [(1, 5), (5, 5), (7, 0.7), (1, 60)])
def test_the_number_of_threads_does_not_change_a_bit(n_clips, seconds):
    frontend, waveform = LogMel(FrontendConfig()), noise(n_clips, int(seconds * 32_000))
    expected = frontend(waveform)
    for n_threads in (2, 3):
        torch.set_num_threads(n_threads)  # conftest sets it back to one
        assert torch.equal(frontend(waveform), expected)
        with torch.inference_mode():
            assert torch.equal(frontend(waveform), expected)
        assert torch.equal(frontend(waveform.clone().requires_grad_()).detach(), expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("n_fft,hop_length,n_mels", [(1024, 320, 64), (2048, 512, 128)])
@pytest.mark.parametrize("n_clips,seconds", [(1, 5), (1, 60), (16, 5), (3, 0.5)])
def test_no_temporary_is_larger_than_the_complex_spectrogram(
    n_fft, hop_length, n_mels, n_clips, seconds
):
    config = FrontendConfig(n_fft=n_fft, hop_length=hop_length, n_mels=n_mels)
    waveform = noise(n_clips, int(seconds * 32_000))
    frontend = LogMel(config)
    with LargestTensor() as largest:
        n_frames = frontend(waveform).shape[2]
    complex_spectrogram = n_clips * n_frames * (n_fft // 2 + 1) * 8
    assert 0 < largest.nbytes <= complex_spectrogram


@pytest.mark.parametrize(
    "waveform,message",
    [
        (np.zeros((1, 32_000), np.float32), "is a ndarray; give a tensor"),
        (torch.zeros(32_000), r"shape \(32000,\); give \(batch, samples\)"),
        (torch.zeros(4, 2, 32_000), r"shape \(4, 2, 32000\).* stereo is averaged first"),
        (torch.zeros(32_000, 2), r"has 2 samples .* transpose \(samples, channels\)"),
        (torch.zeros(0, 32_000), "it is empty"),
        (torch.zeros(3, 0), "it is empty"),
        (torch.zeros(3, 512), "has 512 samples .* n_fft 1024 needs at least 513"),
        (torch.zeros(2, 32_000, dtype=torch.int32), "is torch.int32; give float32 .* or int16"),
        (torch.zeros(2, 32_000, dtype=torch.uint8), "is torch.uint8"),
        (torch.zeros(2, 32_000, dtype=torch.bool), "is torch.bool"),
        (torch.zeros(2, 32_000, dtype=torch.complex64), "is torch.complex64"),
        (torch.zeros(2, 32_000, device="meta"), "is on meta, the front end on cpu; move one"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_no_waveform_is_refused_with_what_came_and_what_is_wanted(
    implementation, waveform, message
):
    frontend = LogMel(FrontendConfig(implementation=implementation))
    with pytest.raises(ValueError, match=message) as error:
        frontend(waveform)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_samples_are_refused_naming_the_clips(value):
    waveform = noise(4, 32_000)
    waveform[1, 7] = waveform[3, 0] = value
    with pytest.raises(ValueError, match=r"clips \[1, 3\] of the batch"):
        LogMel(FrontendConfig())(waveform)


def test_samples_that_are_only_huge_are_not_called_infinite():
    waveform = torch.full((2, 1000), 3e38)
    assert torch.equal(check_waveform(waveform, 64, CPU), waveform)


def test_the_shortest_waveform_that_can_be_mirrored_is_taken():
    waveform = noise(2, 513)
    reference = librosa.stft(waveform[1].numpy(), n_fft=1024, hop_length=320, pad_mode="reflect")
    power = Spectrogram(1024, 320)(waveform)[1, 0].numpy().T
    np.testing.assert_allclose(power, np.abs(reference) ** 2, rtol=1e-3, atol=1e-6)


def test_int16_is_scaled_to_one_and_other_floats_are_converted():
    frontend = LogMel(FrontendConfig())
    pcm = (noise(2, 32_000) * 32_768).to(torch.int16)
    expected = frontend(pcm.float() / 32_768)
    assert torch.equal(frontend(pcm), expected)
    assert torch.equal(frontend(pcm.double() / 32_768), expected)
    half = noise(2, 32_000).half()
    assert torch.equal(frontend(half), frontend(half.float()))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_the_waveform_is_left_as_it_was(dtype):
    waveform = (noise(2, 32_000) * 1000).to(dtype)
    before = waveform.clone()
    LogMel(FrontendConfig())(waveform)
    assert torch.equal(waveform, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_does_not_reach_the_front_end(implementation, precision):
    frontend, waveform = LogMel(FrontendConfig(implementation=implementation)), noise(4, 32_000)
    expected = frontend(waveform)
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(frontend(waveform), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_is_restored_after_an_error():
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ZeroDivisionError), exact_float32(CPU):  # noqa: PT012
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise ZeroDivisionError
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation is 'stft'; choose one of fft, conv"):
        Spectrogram(1024, 320, "stft")
    with pytest.raises(ValueError, match="hop_length 2048 must be in"):
        Spectrogram(1024, 2048)


def test_products_stay_exact_while_any_thread_wants_them():
    """One thread's end must not hand another one the rounded products of its surroundings."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with exact_float32(torch.device("cpu")):
            with exact_float32(torch.device("cpu")):
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
        inside, both, left = (threading.Event() for _ in range(3))
        seen = []

        def short():
            with exact_float32(torch.device("cpu")):
                inside.set()
                both.wait()
            left.set()

        def long():
            inside.wait()
            with exact_float32(torch.device("cpu")):
                both.set()
                left.wait()
                seen.append(matmul.fp32_precision)

        threads = [threading.Thread(target=run) for run in (short, long)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == ["ieee"]
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
