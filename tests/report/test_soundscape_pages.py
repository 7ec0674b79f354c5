"""The content of pages: pictures, audio, frames in parts, names of files, tables."""

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import soundfile
from PIL import Image

from birdcall.inference.decision import Decision
from birdcall.inference.predictions import Calibration, SegmentPredictions, calibrate
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.report import html
from birdcall.report import soundscape as soundscape_pages
from birdcall.report.html import (
    SAMPLE_RATE,
    HtmlTable,
    PageContent,
    draw_tiles,
    encode_audio,
    read_asset,
    require_browser,
    write_page,
)
from birdcall.report.soundscape import (
    LEVELS,
    MAX_CLASSES,
    PART_SECONDS,
    FrameCollector,
    n_parts_of,
    page_names,
)
from birdcall.storage.files import fitting_name


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return 0.05 * generator.standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32)


def darkness(tile) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(tile.picture.split(",")[1])))
    return 1 - np.asarray(picture.convert("L"), float) / 255


def test_tiles_stand_side_by_side():
    tiles = draw_tiles(noise(130))
    assert [(tile.start, tile.seconds) for tile in tiles] == [(0, 60), (60, 60), (120, 10)]
    assert [darkness(tile).shape for tile in tiles] == [(256, 3000), (256, 3000), (256, 500)]


@pytest.mark.parametrize("seconds", [0.01, 0.5])
def test_the_shortest_audio_has_a_picture(seconds):
    (tile,) = draw_tiles(noise(seconds))
    assert tile.seconds == pytest.approx(seconds)
    assert darkness(tile).shape[0] == 256


def test_silence_is_white():
    assert darkness(draw_tiles(np.zeros(SAMPLE_RATE, np.float32))[0]).max() < 0.02


def test_a_codecs_limit_does_not_blacken_the_noise_below_it():
    """The noise of a recording that ends at 8 kHz looks as it does up to 16 kHz."""
    whole = noise(20)
    spectrum = np.fft.rfft(whole)
    spectrum[len(spectrum) // 2 :] = 0
    halved = np.fft.irfft(spectrum, len(whole)).astype(np.float32)
    low_rows = slice(140, 250)
    both = [darkness(draw_tiles(waveform)[0])[low_rows].mean() for waveform in (whole, halved)]
    assert both[1] == pytest.approx(both[0], abs=0.1)
    assert darkness(draw_tiles(halved)[0])[10:120].mean() < 0.02


def in_band(waveform: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """What a waveform has from one frequency to another."""
    spectrum = np.fft.rfft(waveform)
    hz = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
    spectrum[(hz < low_hz) | (hz > high_hz)] = 0
    return np.fft.irfft(spectrum, len(waveform)).astype(np.float32)


def rows_of(low_hz: float, high_hz: float) -> slice:
    """The rows of a picture between two frequencies; high frequencies are at the top."""
    return slice(256 - round(high_hz / 62.5), 256 - round(low_hz / 62.5))


def test_a_quiet_bird_at_7_khz_stands_out_from_loud_wind():
    """As loud as the noise around 7 kHz, and 40 dB below the wind, for half a second."""
    spectrum = np.fft.rfft(noise(20))
    hz = np.fft.rfftfreq(20 * SAMPLE_RATE, 1 / SAMPLE_RATE)
    wind = np.fft.irfft(spectrum / np.maximum(hz, 100) ** 1.5).astype(np.float32)
    wind *= 0.3 / np.abs(wind).max()
    near = in_band(wind, 6500, 7500).std()
    assert 20 * np.log10(wind.std() / near) > 40
    time = np.arange(len(wind)) / SAMPLE_RATE
    bird = np.sqrt(2) * near * np.sin(2 * np.pi * 7000 * time) * ((time > 10) & (time < 10.5))
    picture = darkness(draw_tiles((wind + bird).astype(np.float32))[0])
    burst = picture[rows_of(6900, 7100), 503:522].max(axis=0).mean()
    around = picture[rows_of(6000, 8000), :480].mean()
    assert burst - around > 0.4  # 0.20 where one level is white for all frequencies
    assert picture[rows_of(0, 1000), :480].mean() < 0.15


def test_what_goes_on_is_background_only_if_it_is_broad_and_long():
    """Rain for minutes is; a whistle that does not end is not, and neither is a song of 3 s."""
    rain = noise(240)
    rain[120 * SAMPLE_RATE :] *= 10
    tiles = draw_tiles(rain)
    assert max(darkness(tile)[:, 1000:2000].mean() for tile in (tiles[0], tiles[3])) < 0.15
    time = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    whistle = noise(5) + 0.05 * np.sin(2 * np.pi * 3000 * time).astype(np.float32)
    assert darkness(draw_tiles(whistle)[0])[rows_of(2900, 3100)].max(axis=0).mean() > 0.6
    song = noise(5) + 10 * in_band(noise(5, seed=1), 3000, 5000) * (time < 3)
    picture = darkness(draw_tiles(song.astype(np.float32))[0])[rows_of(3200, 4800)]
    assert picture[:, 10:140].mean() > 0.4 > 0.1 > picture[:, 160:].mean()


def test_encoded_audio_keeps_times_and_level():
    time = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    click = 0.01 * np.sin(2 * np.pi * 2000 * time) * np.exp(-np.square((time - 3.2) / 0.01))
    content = base64.b64decode(encode_audio(click.astype(np.float32)))
    back, rate = soundfile.read(io.BytesIO(content))
    assert rate == SAMPLE_RATE
    assert len(back) == len(click)
    assert np.abs(back).argmax() / SAMPLE_RATE == pytest.approx(3.2, abs=0.005)
    assert 0.5 < np.abs(back).max() <= 1.05
    assert len(content) < 5 * 60_000 / 8 + 2000


def split_frames(frames: np.ndarray, sizes: list[int]):
    """Cut ``(members, classes, frames)`` into predictions of these numbers of segments."""
    start = 0
    for n_segments in sizes:
        stop = start + n_segments * FRAMES_PER_SEGMENT
        subset = frames[:, :, start:stop]
        nothing = np.zeros((len(subset), n_segments, subset.shape[1]), np.float32)
        yield SegmentPredictions(
            clipwise=nothing,
            framewise=nothing,
            frames=subset.mean(axis=0),
            member_frames=subset,
        )
        start = stop


def test_frames_are_the_same_however_they_come(monkeypatch):
    monkeypatch.setattr(soundscape_pages, "PART_SECONDS", 40)
    classes = tuple(f"c{index}" for index in range(6))
    frames = np.random.default_rng(0).random((3, 6, 20 * FRAMES_PER_SEGMENT), dtype=np.float32)
    results = []
    for sizes in ([20], [1] * 20, [7, 7, 6]):
        collector = FrameCollector(Decision(), classes)
        for predictions in split_frames(frames, sizes):
            collector.add(predictions)
        results.append(collector.finish())
    assert results[0] == results[1] == results[2]
    assert [part.n_frames for part in results[0]] == [400, 400, 200]
    outputs = np.concatenate([frames.mean(axis=0)[None], frames])
    for number, part in enumerate(results[0]):
        order = [classes.index(code) for code in part.classes]
        expected = outputs[:, order, 400 * number : 400 * number + part.n_frames]
        assert (part.unpack() == np.floor(expected * LEVELS)).all()


def test_a_page_grows_with_the_length_of_the_recording_not_with_classes():
    generator = np.random.default_rng(0)
    sizes = []
    for n_classes in (24, 264):
        frames = generator.random((2, n_classes, 500), dtype=np.float32)
        classes = tuple(f"c{index}" for index in range(n_classes))
        collector = FrameCollector(Decision(), classes)
        collector.add(next(split_frames(frames, [10])))
        (part,) = collector.finish()
        assert len(part.classes) == MAX_CLASSES
        sizes.append(len(part.packed))
    assert sizes[1] < 1.1 * sizes[0]


def test_species_that_no_member_predicts_are_left_out():
    frames = np.zeros((1, 3, 50), np.float32)
    frames[0, 1, 7] = 0.06
    collector = FrameCollector(Decision(), ("a", "b", "c"))
    collector.add(next(split_frames(frames, [1])))
    assert collector.finish()[0].classes == ("b",)


def test_frames_are_calibrated_as_detections_are():
    calibration = Calibration((1.0,), (0.0,), (2.0,), (-0.5,))
    frames = np.random.default_rng(1).random((2, 1, 50), dtype=np.float32)
    collector = FrameCollector(Decision(calibration=calibration), ("a",))
    collector.add(next(split_frames(frames, [1])))
    expected = calibrate(frames[1].T, (2.0,), (-0.5,)).T
    assert (collector.finish()[0].unpack()[2] == np.floor(expected * LEVELS)).all()


def test_a_day_is_144_pages():
    assert n_parts_of(24 * 3600) == 144 == len(page_names("day.wav", 144))
    assert n_parts_of(0.5) == 1 == n_parts_of(PART_SECONDS)
    assert n_parts_of(PART_SECONDS + 0.1) == 2
    assert page_names("a/b.mp3", 1) == ["a/b.mp3.html"]
    assert page_names("b.mp3", 2)[1] == "b.mp3.part002.html"


def test_names_fit_and_stay_apart():
    first, second = (fitting_name("x" * 260 + end, ".html") for end in "ab")
    assert first != second
    assert len(first.encode()) <= 200 and first.endswith(".html")
    assert fitting_name("ü" * 90 + "/name.wav", ".html") == "ü" * 90 + "/name.wav.html"
    assert len(fitting_name("ü" * 300, ".html").encode()) <= 200


def read_page(folder, content: PageContent, **context) -> str:
    template = "index.html" if "table" in context else "page.html"
    write_page(folder / "p.html", template, content, **context)
    return (folder / "p.html").read_text()


def test_tables_sort_by_number_and_escape_text(tmp_path):
    frame = pd.DataFrame({"name": ["<b>", "x"], "n": [3, 12], "f1": [0.12345, np.nan]})
    table = HtmlTable(frame, "a <caption>", is_sortable=True, links={"x": "y'z.html"})
    text = read_page(tmp_path, PageContent("t"), table=table)
    assert "<b>" not in text and "&lt;b&gt;" in text
    assert "<caption>a &lt;caption&gt;</caption>" in text
    assert "data-order='12'>12</td>" in text
    assert "data-order='0.12345'>0.123</td>" in text
    assert "data-order='-1'></td>" in text
    assert "href='y&#39;z.html'" in text


def test_data_in_a_page_cannot_end_its_element(tmp_path):
    data = {"a": "</script><b>", "b": float("nan"), "c": "\u2028", "d": "\udcff"}
    text = read_page(tmp_path, PageContent("t", data={"data": data}), body="")
    element = text.split("id='data'>")[1].split("</script>")[0]
    assert json.loads(element) == {"a": "</script><b>", "b": None, "c": "\u2028", "d": "?"}
    assert "<b>" not in element


def test_text_without_utf8_is_written(tmp_path):
    assert "<title>a?</title>" in read_page(tmp_path, PageContent("a\udcff"), body="")


def test_a_script_that_ends_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"p\.html: .*</script"):
        write_page(tmp_path / "p.html", "page.html", PageContent("t", ("'</script>'",)), body="")


def test_scripts_come_from_packages_and_this_folder(tmp_path):
    text = read_page(tmp_path, PageContent("t", has_tables=True), body="")
    bundle = json.loads(text.split("id='datatables'>")[1].split("</script>")[0])
    assert "DataTables" in bundle and "export" in bundle
    assert read_asset("tables.js") in text
    assert "blob:" in text.split("script-src")[1].split(";")[0]
    without = read_page(tmp_path, PageContent("t"), body="")
    assert "blob:" not in without.split("script-src")[1].split(";")[0]


def test_screenshots_without_a_browser_are_refused_at_once(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="screenshots need Chromium"):
        require_browser()
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[browser\]'"):
        require_browser()
