"""The benchmark of front ends compares the same clips and writes what it measured."""

import inspect
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import soundfile

from birdcall.benchmark.frontend import (
    benchmark_frontend,
    make_implementations,
    peak_megabytes,
    read_clips,
    time_in_turns,
)
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


def test_the_table_compares_all_implementations_and_is_written(make_data, tmp_path):
    output = tmp_path / "results" / "benchmark"
    table = benchmark_frontend(make_data(6, 12), output, n_clips=3, repeats=2, configs=[CONFIG])
    rows = set(
        table[table.device == "cpu"][["implementation", "batch_size"]].itertuples(index=False)
    )
    assert {("librosa", 1), ("torchlibrosa", 1), ("torchlibrosa", 16)} < rows
    assert {("birdcall", 1), ("birdcall", 16)} < rows
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


def test_medians_of_runs_and_ratios_to_librosa_and_to_batched_torchlibrosa(
    make_data, tmp_path, monkeypatch
):
    runs = {
        ("librosa", 1): [6.0, 300.0, 3.0],
        ("torchlibrosa", 16): [8.0, 400.0, 4.0],
        ("birdcall", 16): [2.0, 100.0, 1.0],
    }

    def time_in_turns(functions, parts, repeats):
        implementations = [function.__self__ for function in functions]
        names = [(item.name, item.batch_size) for item in implementations]
        return np.array([runs.get(name, [1.0] * repeats) for name in names])

    monkeypatch.setattr("birdcall.benchmark.frontend.time_in_turns", time_in_turns)
    table = benchmark_frontend(make_data(6), tmp_path, n_clips=100, repeats=3, configs=[CONFIG])
    table = table[table["device"] == "cpu"].set_index(["implementation", "batch_size"])
    table = table.loc[list(runs)]
    assert table["seconds"].tolist() == [6.0, 8.0, 2.0], "the median of the runs"
    assert table["times_librosa"].tolist() == [1.0, 0.75, 3.0]
    assert table["times_torchlibrosa"].tolist() == [1.33, 1.0, 4.0]
    assert table["clips_per_second"].tolist() == [16.7, 12.5, 50.0]
    assert table["times_real_time"].tolist() == [83, 62, 250]


def test_every_implementation_gives_the_same_log_mel():
    clips = 0.1 * np.random.default_rng(0).normal(size=(3, RATE)).astype(np.float32)
    implementations = make_implementations(CONFIG)
    outputs = {item: np.concatenate(item.run(clips)) for item in implementations}
    reference = outputs[implementations[0]]
    assert implementations[0].name == "librosa"
    assert reference.shape == (3, 101, 32)
    for implementation, log_mel in outputs.items():
        np.testing.assert_allclose(log_mel, reference, atol=1e-3, err_msg=str(implementation))


def test_functions_take_turns_on_each_part():
    calls = []
    functions = [partial(lambda name, part: calls.append((name, part)), name) for name in "ab"]
    seconds = time_in_turns(functions, ["first", "second"], repeats=2)
    once = [("a", "first"), ("b", "first"), ("a", "second"), ("b", "second")]
    assert calls == once * 2
    assert seconds.shape == (2, 2)
    assert (seconds > 0).all()


def test_an_implementation_runs_in_its_batches():
    sizes = []
    implementation = make_implementations(CONFIG)[0]._replace(
        batch_size=2, transform=lambda clips: sizes.append(len(clips))
    )
    implementation.run(np.zeros((5, 8)))
    assert sizes == [2, 2, 1]


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


# The function alone: the modules that a benchmark imports take hundreds of megabytes.
ALLOCATE = f"""
import resource
import sys
from pathlib import Path
import numpy as np
{inspect.getsource(peak_megabytes)}
before = peak_megabytes()
allocated = np.ones(2**25)
print(before, peak_megabytes() - before, allocated.nbytes / 2**20)
"""


def test_memory_is_what_the_process_takes_and_not_what_its_parent_has():
    parent = np.ones(2**27)  # a gigabyte
    command = [sys.executable, "-c", ALLOCATE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, gained, allocated = map(float, done.stdout.split())
    assert before < 0.5 * parent.nbytes / 2**20
    assert gained == pytest.approx(allocated, rel=0.05)
