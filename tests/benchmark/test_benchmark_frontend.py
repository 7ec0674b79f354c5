"""The benchmark compares like with like, on the clips it says, and writes what it measured."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import soundfile

from birdcall.benchmark import frontend as benchmark
from birdcall.benchmark.frontend import Side, benchmark_frontend, make_sides, read_clips, time_sides
from birdcall.config import FrontendConfig

RATE = 32_000
CONFIG = FrontendConfig(n_fft=512, hop_length=320, n_mels=32)


@pytest.fixture
def make_data(tmp_path):
    """Write a data folder whose recordings last so many seconds, each at its own level."""

    def make(*lengths):
        rows = []
        for number, seconds in enumerate(lengths, start=1):
            name = f"XC{number}.mp3"
            path = tmp_path / "train_audio" / "comrav" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = np.sin(np.arange(int(seconds * RATE)) * 0.2) * number / 10
            soundfile.write(path, tone, RATE, format="WAV", subtype="FLOAT")
            rows.append(
                {
                    "filename": name, "ebird_code": "comrav", "recordist": "A. Bird",
                    "primary_label": "Corvus corax_Common Raven", "secondary_labels": "[]",
                    "rating": 4.0, "duration": int(seconds), "sampling_rate": "32000 (Hz)",
                }
            )  # fmt: skip
        pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
        return tmp_path

    return make


def levels(clips):
    """Return which recording each clip comes from."""
    return np.round(np.abs(clips).max(axis=1) * 10).astype(int).tolist()


def test_the_table_compares_all_sides_and_is_written(make_data, tmp_path):
    output = tmp_path / "results" / "benchmark"
    table = benchmark_frontend(make_data(6, 12), output, n_clips=3, repeats=2, configs=[CONFIG])
    sides = set(
        table[table.device == "cpu"][["implementation", "batch_size"]].itertuples(index=False)
    )
    assert {("librosa", 1), ("torchlibrosa", 1), ("torchlibrosa", 16)} < sides
    assert {("birdcall", 1), ("birdcall", 16)} < sides
    assert set(table["config"]) == {"512/320/32"}
    assert (table["seconds"] > 0).all()
    np.testing.assert_allclose(table["clips_per_second"], 3 / table["seconds"], rtol=0.1)
    np.testing.assert_allclose(table["times_real_time"], 15 / table["seconds"], rtol=0.1)
    ours = table[table.implementation == "birdcall"]
    assert (ours["max_difference_db"] < 1e-3).all()
    written = pd.read_csv(output / "frontend.csv")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert (output / "frontend.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "frontend.png").stat().st_size > 10_000


def test_ratios_refer_to_librosa_and_to_batched_torchlibrosa(monkeypatch):
    seconds = {("librosa", 1): 6.0, ("torchlibrosa", 16): 8.0, ("birdcall", 16): 2.0}
    silent = lambda clips: np.zeros((len(clips), 1, 1))  # noqa: E731
    sides = [Side(name, "cpu", size, silent) for name, size in seconds]
    monkeypatch.setattr(benchmark, "make_sides", lambda config: sides)
    runs = [[value * factor for factor in (1.0, 50.0, 0.5)] for value in seconds.values()]
    monkeypatch.setattr(benchmark, "time_sides", lambda *_: np.array(runs))
    table = benchmark._benchmark_config(np.zeros((100, 5), np.float32), CONFIG, repeats=3)
    assert table["seconds"].tolist() == [6.0, 8.0, 2.0], "the median of the runs"
    assert table["times_librosa"].tolist() == [1.0, 0.75, 3.0]
    assert table["times_torchlibrosa"].tolist() == [1.33, 1.0, 4.0]
    assert table["clips_per_second"].tolist() == [16.7, 12.5, 50.0]
    assert table["times_real_time"].tolist() == [83, 62, 250]


def test_every_side_gives_the_same_log_mel():
    clips = 0.1 * np.random.default_rng(0).normal(size=(3, RATE)).astype(np.float32)
    sides = make_sides(CONFIG)
    reference = sides[0].run(clips)
    assert sides[0].implementation == "librosa"
    assert reference.shape == (3, 101, 32)
    for side in sides:
        np.testing.assert_allclose(side.run(clips), reference, atol=1e-3, err_msg=str(side))


def test_the_sides_take_turns(monkeypatch):
    monkeypatch.setattr(benchmark, "ROUND_CLIPS", 4)
    calls = []

    def transform(name, clips):
        calls.append((name, len(clips)))
        return clips

    sides = [Side(name, "cpu", 2, partial(transform, name)) for name in ("one", "other")]
    seconds = time_sides(sides, np.zeros((6, 8)), repeats=2)
    once = [("one", 2)] * 2 + [("other", 2)] * 2 + [("one", 2), ("other", 2)]
    assert calls == once * 2
    assert seconds.shape == (2, 2)
    assert (seconds > 0).all()


def test_clips_are_the_first_of_every_recording_then_the_second(make_data):
    clips = read_clips(make_data(12, 5, 10), n_clips=5, sample_rate=RATE, seed=1)
    assert clips.shape == (5, 5 * RATE)
    assert clips.dtype == np.float32
    drawn = levels(clips)
    assert sorted(drawn[:3]) == [1, 2, 3]
    assert sorted(drawn[3:]) == [1, 3]
    again = read_clips(make_data(12, 5, 10), n_clips=5, sample_rate=RATE, seed=1)
    assert np.array_equal(clips, again)


def test_few_clips_are_used_again_and_short_ones_padded(make_data, caplog):
    clips = read_clips(make_data(2, 5), n_clips=5, sample_rate=RATE)
    assert sorted(levels(clips)[:2]) == [1, 2]
    assert np.array_equal(clips[2:4], clips[:2])
    short = clips[levels(clips).index(1)]
    assert np.abs(short[: 2 * RATE]).max() > 0
    assert not short[2 * RATE :].any()
    assert "only 2 clips, used again to make 5" in caplog.text


def test_a_damaged_recording_is_left_out_and_named(make_data, caplog):
    data = make_data(5, 5)
    (data / "train_audio" / "comrav" / "XC1.mp3").write_bytes(b"<html>not found</html>")
    clips = read_clips(data, n_clips=2, sample_rate=RATE)
    assert levels(clips) == [2, 2]
    assert "XC1.mp3" in caplog.text
    (data / "train_audio" / "comrav" / "XC2.mp3").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 2 recordings can be read"):
        read_clips(data, n_clips=2, sample_rate=RATE)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"n_clips": 0}, "n_clips 0 and repeats 5 must be above 0"),
        ({"repeats": -1}, "repeats -1 must be above 0"),
        (
            {"configs": [CONFIG, FrontendConfig(sample_rate=44_100)]},
            r"sample rates \[32000, 44100\]; give one",
        ),
    ],
)
def test_impossible_requests_are_refused(make_data, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        benchmark_frontend(make_data(5), tmp_path, **values)
