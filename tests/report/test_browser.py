"""The pages in headless Chromium, used as a person uses them: look, sort, play, label, save."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import read_audacity_labels
from markupsafe import Markup

from birdcall.evaluation.labelled import read_truth
from birdcall.inference.decision import Decision
from birdcall.inference.events import Event, frames_to_events
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.tables import read_raven_table
from birdcall.inference.windows import FRAME_SECONDS, FRAMES_PER_SEGMENT
from birdcall.report import soundscape as soundscape_pages
from birdcall.report.html import (
    PageContent,
    open_browser,
    open_page,
    require_browser,
    take_screenshots,
    write_page,
)
from birdcall.report.report import write_report
from birdcall.report.soundscape import (
    FrameCollector,
    Soundscape,
    SoundscapePageWriter,
    write_soundscape_pages,
)

try:
    require_browser()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

CLASSES = ("amecro", "blujay", "norcar")
HOSTILE = "<img src=x onerror=\"window.wasRun='yes'\">"
RATE = 32_000


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(autouse=True)
def _one_thread():
    """Training is over: the browser has threads of its own."""


@pytest.fixture(autouse=True)
def _close_pages(browser):
    """What a test opens is closed behind it: each page keeps a process."""
    shared = browser.contexts
    yield
    for context in browser.contexts:
        if context not in shared:
            context.close()


class OpenPage:
    """A page whose errors and requests are recorded."""

    def __init__(self, browser, path: Path, width: int = 1280) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        context = browser.new_context(
            viewport={"width": width, "height": 900}, accept_downloads=True
        )
        self.page = context.new_page()
        self.page.on("console", lambda message: self._note(message))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector("body[data-ready=yes]", timeout=20_000)

    def _note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.messages.append(message.text)

    def check(self) -> None:
        """There is no error, and no request but for the page itself."""
        assert self.messages == []
        outside = {url for url in self.requests if not url.startswith(("data:", "blob:"))}
        assert len(outside) == 1
        assert outside.pop().startswith("file://")
        assert self.page.evaluate("window.wasRun") is None


def make_soundscape(folder: Path, seconds: float = 30.0, **changes) -> Soundscape:
    """A tone in noise, and three species that two members predict in it."""
    path = folder / "site <1>.wav"
    generator = np.random.default_rng(0)
    time = np.arange(round(seconds * RATE)) / RATE
    sound = 0.01 * generator.standard_normal(len(time)) + 0.2 * np.sin(2 * np.pi * 3000 * time)
    soundfile.write(path, sound.astype(np.float32), RATE)
    n_frames = FRAMES_PER_SEGMENT * max(1, int(np.ceil(seconds / 5)))
    at = np.arange(n_frames) * FRAME_SECONDS
    members = 0.02 * generator.random((2, len(CLASSES), n_frames), dtype=np.float32)
    members[:, 0] += 0.9 * np.exp(-np.square((at - 8) / 1.5))
    members[0, 1] += 0.7 * np.exp(-np.square((at - 20) / 1.0))
    members[:, 2] += 0.3 * (np.sin(at * 3) > 0.7)
    collector = FrameCollector(Decision(), CLASSES)
    nothing = np.zeros((2, n_frames // FRAMES_PER_SEGMENT, len(CLASSES)), np.float32)
    collector.add(
        SegmentPredictions(
            clipwise=nothing,
            framewise=nothing,
            frames=members.mean(axis=0),
            member_frames=members,
        )
    )
    soundscape = Soundscape(
        name=path.name,
        path=path,
        seconds=seconds,
        parts=collector.finish(),
        members=("one", "two"),
        threshold=0.5,
        decided=(Event("amecro", 6.9, 9.1, 0.9), Event("blujay", 19.5, 20.5, 0.36)),
        truth=(Event("amecro", 7.0, 9.0),),
        labels=(),
        species=CLASSES,
    )
    return replace(soundscape, **changes)


@pytest.fixture(scope="module")
def written_soundscape(tmp_path_factory):
    """`make_soundscape` and its page; tests leave both as they are."""
    folder = tmp_path_factory.mktemp("soundscape")
    soundscape = make_soundscape(folder)
    return soundscape, write_soundscape_pages(folder / "view", soundscape)


@pytest.fixture
def opened(browser, written_soundscape):
    """The page of `make_soundscape`, as it opens for the first time."""
    soundscape, path = written_soundscape
    opened_page = OpenPage(browser, path)
    opened_page.soundscape = soundscape
    opened_page.page.evaluate("player.muted = true")
    yield opened_page
    opened_page.check()


def write_index(folder: Path, table: pd.DataFrame, title: str = "Recordings") -> Path:
    return SoundscapePageWriter(folder, Decision(), CLASSES, ("one", "two")).write_index(
        table, title
    )


def listed(page) -> list[Event]:
    return [
        Event(event["code"], event["onset"], event["offset"], event["confidence"])
        for event in page.evaluate("detections")
    ]


def until(page, condition: str, seconds: float = 8.0) -> None:
    """Wait for a condition; playwright's own way needs an eval, which the pages forbid."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"it is still false: {condition}"
        page.wait_for_timeout(20)


def saved(page, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


# --- the soundscape page ------------------------------------------------------------------------


def test_the_page_shows_the_detections_of_the_decision(opened):
    assert listed(opened.page) == sorted(opened.soundscape.decided, key=lambda event: event.onset)
    rows = opened.page.inner_text("#detections").splitlines()
    assert any("American Crow" in row for row in rows)
    assert any("Blue Jay" in row for row in rows)


def test_the_spectrogram_is_where_the_tone_is(opened):
    """A tone at 3 kHz is a dark line at 3/16 of the height, and moves when the band is zoomed."""
    darkest = """() => {
      const canvas = document.getElementById('spectrogram'), scale = canvas.height / (260 + 22);
      const copy = document.createElement('canvas');
      [copy.width, copy.height] = [canvas.width, canvas.height];
      const context = copy.getContext('2d', { willReadFrequently: true });
      context.drawImage(canvas, 0, 0);
      const column = context.getImageData(canvas.width / 2, 0, 1, 260 * scale).data;
      let best = 0;
      for (let y = 0; y < 260 * scale; y++) if (column[4 * y] < column[4 * best]) best = y;
      return 1 - best / (260 * scale);
    }"""
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate(darkest) == pytest.approx(3 / 16, abs=0.02)
    opened.page.fill("#high-khz", "6")
    opened.page.dispatch_event("#high-khz", "change")
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate(darkest) == pytest.approx(3 / 6, abs=0.03)


def test_the_slider_gives_the_events_that_the_library_gives(opened):
    for output in (0, 1, 2):
        for percent in (5, 20, 35, 50, 80):
            check_slider(opened, percent, output)


def check_slider(opened, percent: int, output: int) -> None:
    page = opened.page
    page.select_option("#output", str(output))
    page.evaluate(
        "value => { const s = document.getElementById('threshold'); s.value = value;"
        "s.dispatchEvent(new Event('input')); }",
        percent,
    )
    (part,) = opened.soundscape.parts
    levels = part.unpack()[output] / 200
    expected = frames_to_events(
        levels,
        part.classes,
        frame_seconds=FRAME_SECONDS,
        threshold=percent / 100,
        min_seconds=0.0,
        max_gap_seconds=0.5,
    )
    events = listed(page)
    assert [(event.ebird_code, event.onset, event.offset) for event in events] == [
        (event.ebird_code, event.onset, event.offset) for event in expected
    ]
    assert [event.confidence for event in events] == pytest.approx(
        [event.confidence for event in expected]
    )
    assert page.is_checked("#by-threshold")
    page.check("#by-decision")
    assert listed(page) == list(opened.soundscape.decided)


def test_a_lane_is_scaled_to_what_is_drawn_of_its_species(opened):
    """The number beside the name is the highest probability, and there the curve is at the top."""
    page, (part,) = opened.page, opened.soundscape.parts
    row = part.classes.index("norcar")
    highest = part.unpack()[:, row].max(axis=1) / 200
    page.evaluate(
        "() => { for (const e of [...truth]) state.labels.push({ ...e, code: 'norcar' }); }"
    )
    for output in (0, 1, 2):
        page.select_option("#output", str(output))
        (number,) = re.findall(r"\d+\.?\d*", page.evaluate("laneScale('norcar')"))
        assert float(number) == highest[output]
        page.wait_for_timeout(100)
        assert page.evaluate(TOP_OF_AREA, "norcar") == pytest.approx(2, abs=1.5)
    page.select_option("#output", "0")
    page.check("#show-members")
    assert f"{highest.max():g}" in page.evaluate("laneScale('norcar')")


# The highest pixel of a lane's area, from the top of the lane, right of the species' name.
TOP_OF_AREA = """(code) => {
  const canvas = document.getElementById('lanes'), scale = window.devicePixelRatio;
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const context = copy.getContext('2d', { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const top = LANE_HEIGHT * laneSpecies().indexOf(code), left = 300;
  const isArea = ([r, g, b]) => Math.abs(r - 169) + Math.abs(g - 199) + Math.abs(b - 221) < 12;
  for (let y = 0; y < LANE_HEIGHT; y++) {
    const width = (viewWidth() - left) * scale;
    const pixels = context.getImageData(left * scale, (top + y) * scale, width, 1).data;
    for (let x = 0; x < pixels.length; x += 4) if (isArea(pixels.subarray(x, x + 3))) return y;
  }
  return LANE_HEIGHT;
}"""


def test_a_decision_that_names_nothing_is_told_and_its_slider_shows_something(browser, tmp_path):
    nothing = make_soundscape(tmp_path, threshold=1.0, decided=(), truth=(), species=CLASSES)
    page = OpenPage(browser, write_soundscape_pages(tmp_path / "view", nothing)).page
    assert f"{nothing.parts[0].unpack()[0].max() / 200:g}" in page.inner_text("#no-detections")
    page.check("#by-threshold")
    assert len(listed(page)) >= 1
    page.context.close()


def test_a_page_with_detections_has_no_such_notice(opened):
    assert opened.page.locator("#no-detections").count() == 0


def test_levels_and_probabilities_reach_the_same_thresholds(tmp_path):
    frames = np.random.default_rng(3).random((1, 1, 500), dtype=np.float32)
    collector = FrameCollector(Decision(), ("amecro",))
    nothing = np.zeros((1, 10, 1), np.float32)
    collector.add(
        SegmentPredictions(
            clipwise=nothing,
            framewise=nothing,
            frames=frames[0],
            member_frames=frames,
        )
    )
    levels = collector.finish()[0].unpack()[0, 0]
    for percent in range(5, 100):
        assert ((levels >= 2 * percent) == (frames[0, 0] >= np.float32(percent / 100))).all()


def test_a_click_on_the_spectrogram_plays_from_there(opened):
    page = opened.page
    page.click("#spectrogram", position={"x": page.evaluate("viewWidth()") / 2, "y": 100})
    until(page, "player.currentTime > 15.1 && !player.paused")
    page.keyboard.press("Tab")
    page.click("#play")
    assert page.evaluate("player.paused")
    assert 15 < page.evaluate("state.cursor") < 20


def test_the_audio_has_the_length_and_level_of_the_recording(opened):
    assert opened.page.evaluate("player.duration") == pytest.approx(30.0, abs=0.06)
    loudest = opened.page.evaluate(
        """async () => {
          const bytes = Uint8Array.from(atob(data.audio), (character) => character.charCodeAt(0));
          const sound = await new OfflineAudioContext(1, 1, 32000).decodeAudioData(bytes.buffer);
          return sound.getChannelData(0).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        }"""
    )
    assert 0.5 < loudest <= 1.1


def test_a_detection_that_is_clicked_plays_to_its_end(opened):
    page = opened.page
    x = page.evaluate("xOf(8)")
    row = page.evaluate("laneSpecies().indexOf('amecro')")
    page.click("#lanes", position={"x": x, "y": 30 * row + 15})
    assert page.evaluate("state.selected.code") == "amecro"
    until(page, "player.paused && state.cursor >= 9.1")
    assert page.evaluate("state.cursor") < 9.6


def test_the_keyboard_moves_plays_zooms_and_goes_to_detections(opened):
    page = opened.page
    page.focus("#viewer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("state.cursor") == pytest.approx(5.5)
    assert page.evaluate("player.currentTime") == pytest.approx(5.5, abs=0.05)
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("state.cursor") == pytest.approx(5.0)
    page.keyboard.press("n")
    assert page.evaluate("state.selected.code") == "amecro"
    page.keyboard.press("n")
    assert page.evaluate("[state.selected.code, state.cursor]") == ["blujay", 19.5]
    assert "Blue Jay" in page.inner_text("#message")
    page.keyboard.press("n")
    assert "No detection after" in page.inner_text("#message")
    page.keyboard.press("p")
    assert page.evaluate("state.selected.code") == "amecro"
    page.keyboard.press("+")
    assert page.evaluate("view.seconds") == pytest.approx(15)
    page.keyboard.press("-")
    assert page.evaluate("view.seconds") == pytest.approx(30)
    page.keyboard.press("End")
    assert page.evaluate("state.cursor") == pytest.approx(30)
    page.keyboard.press("Home")
    page.keyboard.press("Space")
    until(page, "!player.paused && state.cursor > 0.1")
    page.keyboard.press("Space")
    assert page.evaluate("player.paused")


def test_keys_typed_into_a_field_stay_in_the_field(opened):
    page = opened.page
    page.focus("#note")
    page.keyboard.type("n p + space")
    assert page.input_value("#note") == "n p + space"
    assert page.evaluate("state.cursor") == 0


def test_species_can_be_hidden_and_shown(opened):
    page = opened.page
    page.click("summary:has-text('Species shown')")
    page.uncheck("#filter input[value=amecro]")
    assert [event.ebird_code for event in listed(page)] == ["blujay"]
    assert "amecro" not in page.evaluate("laneSpecies()")
    page.click("#show-none")
    assert listed(page) == []
    page.click("#show-all")
    assert len(listed(page)) == 2


def test_the_saved_tables_hold_the_events_shown(opened, tmp_path):
    page = opened.page
    page.evaluate(
        "() => { const s = document.getElementById('threshold'); s.value = 12;"
        "s.dispatchEvent(new Event('input')); }"
    )
    page.click("summary:has-text('Species shown')")
    page.uncheck("#filter input[value=blujay]")
    shown = listed(page)
    assert len(shown) > 3
    raven = saved(page, "#save-raven", tmp_path)
    audacity = saved(page, "#save-audacity", tmp_path)
    assert raven.name == "site _1_.detections.txt"  # the browser's doing: < is no name on Windows
    assert read_raven_table(raven) == shown
    assert read_audacity_labels(audacity) == shown
    assert "American Crow" in raven.read_text()


def test_labels_are_added_corrected_stored_saved_and_read_as_truth(opened, tmp_path):
    page = opened.page
    page.click("#copy-detections")
    page.select_option("#labels tr:nth-child(2) select", "norcar")
    page.fill("#labels tr:nth-child(1) td:nth-child(4) input", 'far\taway, "two" of them')
    page.dispatch_event("#labels tr:nth-child(1) td:nth-child(4) input", "change")
    wide = page.evaluate("viewWidth()")
    page.locator("#spectrogram").scroll_into_view_if_needed()
    box = page.locator("#spectrogram").bounding_box()
    page.mouse.move(box["x"] + wide * 12 / 30, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + wide * 13 / 30, box["y"] + 60)
    page.mouse.move(box["x"] + wide * 14 / 30, box["y"] + 60)
    page.mouse.up()
    assert page.evaluate("[state.selection.onset, state.selection.offset]") == pytest.approx(
        [12, 14], abs=0.1
    )
    page.select_option("#species", "blujay")
    page.click("#add-label")
    assert "Stored in this browser" in page.inner_text("#message")
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.inner_text("#n-labels") == "3 labels"
    folder = tmp_path / "truth"
    folder.mkdir()
    page.click("button[aria-label='Delete label 3']")
    page.click("#copy-detections")  # those that are there already are not taken twice
    assert page.inner_text("#n-labels") == "3 labels"
    page.click("button[aria-label='Delete label 3']")
    table = saved(page, "#save-labels", folder)
    events = read_raven_table(table)
    assert [event.ebird_code for event in events] == ["amecro", "blujay"]
    assert events[0].note == "far away,  two  of them"  # a table knows no quotes
    shutil.copy(opened.soundscape.path, folder / "site _1_.wav")
    truth = read_truth([folder], CLASSES)
    assert truth.annotated == ["site _1_"]
    assert list(truth.annotations["ebird_code"]) == ["amecro", "blujay"]
    assert truth.annotations["onset"].tolist() == pytest.approx([6.9, 12], abs=0.1)
    birds = dict(zip(truth.rows["seconds"], truth.rows["birds"], strict=True))
    assert birds[10.0] == ("amecro",) and birds[15.0] == ("blujay",) and birds[25.0] == ()


def test_a_saved_table_is_opened_again(opened, tmp_path):
    page = opened.page
    page.click("#copy-detections")
    page.fill("#labels tr:nth-child(1) td:nth-child(4) input", "sure")
    page.dispatch_event("#labels tr:nth-child(1) td:nth-child(4) input", "change")
    table = saved(page, "#save-labels", tmp_path)
    page.click("button[aria-label='Delete label 1']")
    page.set_input_files("#open-labels", str(table))
    until(page, "state.labels.length === 2")
    assert page.evaluate("state.labels[0].note") == "sure"
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("no\ttable\n1\t2\n")
    page.set_input_files("#open-labels", str(wrong))
    until(page, "document.getElementById('message').textContent.includes('not a Raven')")
    assert page.inner_text("#n-labels") == "2 labels"


def test_a_table_from_raven_is_opened_as_commands_read_it(opened, tmp_path):
    page, table = opened.page, tmp_path / "by hand.txt"
    table.write_text(
        'Selection\tBegin Time (s)\tEnd Time (s)\t"species"\tNotes\n'
        '1\t1\t2\tAMECRO\t"seet" then trill\n'
        '1\t1\t2\tAMECRO\t"seet" then trill\n'  # in another view
        '1\t5\t6\t"Blue jay "\t"rattle, not sure\n'
        "2\t8\t9\tsquirrel\t\n"
    )
    page.set_input_files("#open-labels", str(table))
    until(page, "state.labels.length === 3")
    labels = page.evaluate("state.labels.map(({ code, onset, note }) => [code, onset, note])")
    assert labels == [
        ["amecro", 1, '"seet" then trill'],
        ["blujay", 5, '"rattle, not sure'],
        ["squirrel", 8, ""],
    ]
    events = read_raven_table(table)
    assert [event.onset for event in events] == [1, 5, 8]
    assert [event.note for event in events] == [note for *_, note in labels]


def test_a_label_outside_the_recording_is_refused(opened):
    page = opened.page
    page.select_option("#species", "blujay")
    for onset, offset in (("5", "4"), ("29", "31"), ("", "")):
        page.fill("#onset", onset)
        page.fill("#offset", offset)
        page.click("#add-label")
        assert "later end" in page.inner_text("#message")
    assert page.inner_text("#n-labels") == "0 labels"


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"decided": (), "truth": ()},
        {"seconds": 0.5, "decided": (Event("amecro", 0.1, 0.4, 0.9),), "truth": ()},
        {"species": ("amecro",)},
        {"parts": (), "decided": ()},
    ],
    ids=["no detections", "half a second", "one class", "no predictions"],
)
def test_poor_input_makes_a_page_that_works(browser, tmp_path, changes):
    soundscape = make_soundscape(tmp_path, changes.pop("seconds", 30.0), **changes)
    opened_page = OpenPage(browser, write_soundscape_pages(tmp_path / "view", soundscape))
    assert len(listed(opened_page.page)) == len(soundscape.decided)
    opened_page.page.evaluate("player.muted = true; togglePlaying()")
    until(opened_page.page, "player.currentTime > 0 || player.ended")
    opened_page.check()


def test_a_page_without_audio_gives_the_reason_and_works(browser, tmp_path):
    soundscape = replace(make_soundscape(tmp_path), path=tmp_path / "gone.wav")
    opened_page = OpenPage(browser, write_soundscape_pages(tmp_path / "view", soundscape))
    assert "gone.wav: no such file" in opened_page.page.inner_text(".notice")
    assert opened_page.page.is_disabled("#play")
    opened_page.page.focus("#viewer")
    opened_page.page.keyboard.press("n")
    assert opened_page.page.evaluate("state.selected.code") == "amecro"
    opened_page.check()


def test_a_long_recording_is_shown_in_parts(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(soundscape_pages, "PART_SECONDS", 10)
    soundscape = make_soundscape(tmp_path, 25.0)
    first = write_soundscape_pages(tmp_path / "view", soundscape)
    assert len(list((tmp_path / "view").iterdir())) == 3
    page = OpenPage(browser, first).page
    assert [event.ebird_code for event in listed(page)] == ["amecro"]
    page.click("text=Next part")
    page.wait_for_selector("body[data-ready=yes]")
    assert [event.ebird_code for event in listed(page)] == ["blujay"]
    assert page.evaluate("[data.start, data.seconds, data.totalSeconds]") == [10, 10, 25]
    page.evaluate(
        "() => { const s = document.getElementById('threshold'); s.value = 30;"
        "s.dispatchEvent(new Event('input')); }"
    )
    blue_jays = [event for event in listed(page) if event.ebird_code == "blujay"]
    assert blue_jays
    assert all(event.onset > 19 and event.offset <= 20 for event in blue_jays)
    assert saved(page, "#save-labels", tmp_path).name.endswith(".part002.selections.txt")
    page.click("text=Next part")
    page.wait_for_selector("body[data-ready=yes]")
    assert page.evaluate("data.seconds") == 5
    assert page.locator("text=Next part").count() == 0


def test_predictions_that_are_no_numbers_are_refused():
    frames = np.full((1, 1, 50), np.nan, np.float32)
    with pytest.raises(ValueError, match="did a model diverge"):
        FrameCollector(Decision(), ("amecro",)).add(
            SegmentPredictions(
                clipwise=frames,
                framewise=frames,
                frames=frames[0],
                member_frames=frames,
            )
        )


@pytest.mark.parametrize(
    "name", [HOSTILE, "🐦" * 70, "%2e%2e%2f"], ids=["HTML", "long", "escaped path"]
)
def test_hostile_names_are_inert(browser, tmp_path, name):
    base = make_soundscape(tmp_path)
    code = f"{HOSTILE}</script><script>window.wasRun='yes'</script>"
    hostile = replace(
        base,
        name=f"{name}.wav".replace("/", "∕"),
        decided=(Event(code, 1.0, 2.0, 0.5),),
        truth=(Event(code, 1.0, 2.0),),
        labels=(Event(code, 1.0, 2.0, 1.0, code),),
    )
    path = write_soundscape_pages(tmp_path / "view", hostile)
    assert path.parent == tmp_path / "view"
    opened_page = OpenPage(browser, path)
    assert opened_page.page.evaluate("state.labels[0].note") == code
    opened_page.check()
    table = pd.DataFrame(
        {"recording": [hostile.name], "seconds": [30.0], "species": [code], "failed": [HOSTILE]}
    )
    index = OpenPage(browser, write_index(tmp_path / "view", table, HOSTILE))
    index.check()
    index.page.click("tbody a >> nth=0")
    index.page.wait_for_selector("#viewer")
    assert index.page.evaluate("data.detections[0][0]") == code


@pytest.mark.parametrize("name", ["../out.wav", "/out.wav", "a/../../out.wav"])
def test_a_name_does_not_leave_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="give a relative path"):
        write_soundscape_pages(tmp_path / "view", replace(make_soundscape(tmp_path), name=name))


# --- the report ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(written_report):
    return written_report[0]


@pytest.fixture(scope="module")
def opened_report(browser, report):
    return OpenPage(browser, report)


@pytest.fixture
def read(opened_report):
    """The report, opened once: a test changes only its tables and players."""
    yield opened_report
    opened_report.check()


def column(page, table: str, index: int) -> list[str]:
    return page.eval_on_selector_all(
        f"{table} tbody tr", f"rows => rows.map((row) => row.cells[{index}].textContent)"
    )


def test_the_report_is_drawn_without_the_network(read):
    assert read.page.locator(".chart .main-svg").count() > 0
    empty = read.page.eval_on_selector_all(
        ".chart", "charts => charts.filter((chart) => !chart.querySelector('.main-svg')).length"
    )
    assert empty == 0


def test_charts_of_equal_scores_have_short_numbers(browser, evaluation, tmp_path):
    """All thresholds score as naming no bird does: 0.54, which is 0.5399999999999998 in floats."""
    score, search = 0.5399999999999998, evaluation.ensemble.search
    equal = replace(
        search,
        grid_scores=np.full_like(search.grid_scores, score),
        in_sample_f1=score,
        steps=search.steps.assign(gain=0.0, standard_error=0.0, adopted=False),
    )
    changed = replace(
        evaluation,
        ensemble=replace(evaluation.ensemble, search=equal),
        votes=evaluation.votes.assign(row_wise_f1=score),
        scores=evaluation.scores.assign(value=score, low=score, high=score),
    )
    write_report(tmp_path / "r.html", "equal", changed)
    opened = OpenPage(browser, tmp_path / "r.html")
    texts = opened.page.eval_on_selector_all(
        ".chart text", "texts => texts.map((text) => text.textContent)"
    )
    decimals = [number for text in texts for number in re.findall(r"\.(\d+)", text)]
    assert len(decimals) > 20
    assert max(map(len, decimals)) <= 3
    opened.check()
    opened.page.context.close()


def test_a_table_is_sorted_by_mouse_and_keyboard(read):
    page, table = read.page, "#species table.sortable"
    header = page.locator(f"{table} thead th", has_text="recordings").first
    index = header.evaluate("element => element.cellIndex")
    header.click()
    numbers = [float(text) for text in column(page, table, index)]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1
    until(page, f"document.querySelector('{table} th[aria-sort=ascending]') !== null")
    header.locator("[tabindex]").first.focus()
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('{table} th[aria-sort=descending]') !== null")
    assert [float(text) for text in column(page, table, index)] == numbers[::-1]


def test_a_table_is_filtered(read):
    page, table = read.page, "#species table.sortable"
    all_names = column(page, table, 0)
    page.fill("#species input[type=search]", all_names[1])
    until(page, "document.querySelectorAll('#species table.sortable tbody tr').length === 1")
    assert column(page, table, 0) == [all_names[1]]
    page.fill("#species input[type=search]", "no such bird")
    page.wait_for_selector("text=No row contains these words")
    page.fill("#species input[type=search]", "")


def test_a_mistake_plays(read):
    page = read.page
    cards = page.locator(".card")
    assert cards.count() > 3
    players = page.locator(".card audio")
    assert players.count() == cards.count()
    page.evaluate(
        "document.querySelectorAll('.card audio').forEach((player) => { player.muted = true; })"
    )
    players.nth(0).evaluate("element => element.play()")
    until(page, "document.querySelector('.card audio').currentTime > 0.3")
    assert players.nth(0).evaluate("element => element.duration") == pytest.approx(5, abs=0.1)
    left = (
        page.locator(".card .cursor").nth(0).evaluate("element => parseFloat(element.style.left)")
    )
    assert left > 0
    players.nth(1).evaluate("element => element.play()")
    until(page, "document.querySelector('.card audio').paused")


def test_a_mistake_shows_picture_curves_and_truth(read):
    for card in read.page.locator(".card").all():
        assert card.locator("img").evaluate("element => element.naturalWidth") >= 250
        assert card.locator("svg polygon").count() >= 1
        assert "true:" in card.inner_text() and "predicted:" in card.inner_text()


def test_the_report_leads_to_the_soundscape_and_back(browser, report):
    page = open_page(browser, report)
    page.click("#soundscapes tbody a >> nth=0")
    page.wait_for_selector("#viewer")
    assert page.evaluate("data.truth.length") > 0
    page.click("text=Report")
    page.wait_for_selector("#species")
    page.close()


def test_hostile_labels_are_inert_in_the_report(browser, evaluation, tmp_path):
    from collections import Counter

    labelled = replace(evaluation.labelled, foreign=Counter({HOSTILE: 3}))
    scores = evaluation.scores.replace({"name": {"tiny": HOSTILE}})
    path = tmp_path / "report.html"
    write_report(path, HOSTILE, replace(evaluation, labelled=labelled, scores=scores))
    opened_page = OpenPage(browser, path)
    assert HOSTILE in opened_page.page.inner_text("h1")
    opened_page.check()


# --- accessibility ------------------------------------------------------------------------------

UNNAMED = """() => [...document.querySelectorAll('button, input, select, textarea, audio, img,'
    + 'canvas, [role=img], [role=region], [role=application], a[href]')]
  .filter((element) => element.getClientRects().length)
  .filter((element) => !(element.getAttribute('aria-label') || element.getAttribute('alt')
    || element.title
    || (element.labels && [...element.labels].some((label) => label.textContent.trim()))
    || (['BUTTON', 'A'].includes(element.tagName) && element.textContent.trim())))
  .map((element) => element.outerHTML.slice(0, 120))"""

CONTRAST = """() => {
  const read = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (value) => (value /= 255) <= 0.03928 ? value / 12.92
    : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = read(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || element.closest('script, style, svg, [disabled], .disabled, option')) continue;
    if (!element.getClientRects().length) continue;
    const a = light(read(getComputedStyle(element).color)), b = light(ground(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
  }
  return poor;
}"""

FOCUSABLE = """() => [...document.querySelectorAll('[tabindex]')]
  .filter((element) => element.tabIndex > 0).length"""


@pytest.fixture(scope="module")
def every_page(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    soundscape = make_soundscape(folder, labels=(Event("amecro", 1.0, 2.0),))
    table = pd.DataFrame({"recording": [soundscape.name], "seconds": [30.0], "failed": [""]})
    return {
        "report": report,
        "soundscape": write_soundscape_pages(folder / "view", soundscape),
        "index": write_index(folder / "view", table, "All"),
    }


@pytest.mark.parametrize("name", ["report", "soundscape", "index"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_accessible(browser, every_page, name, width):
    opened_page = OpenPage(browser, every_page[name], width)
    page = opened_page.page
    page.evaluate(
        "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
    )
    page.wait_for_timeout(200)
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(FOCUSABLE) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").count() == 1
    opened_page.check()


def test_the_tab_key_goes_through_the_page_from_top_to_bottom(opened):
    page, seen = opened.page, []
    for _ in range(40):
        page.keyboard.press("Tab")
        where = page.evaluate("document.activeElement.id || document.activeElement.textContent")
        seen.append(where.strip())
    controls = [
        "play",
        "next-detection",
        "zoom-in",
        "low-khz",
        "threshold",
        "viewer",
        "save-raven",
        "add-label",
    ]
    positions = [seen.index(name) for name in controls]
    assert positions == sorted(positions)
    outline = page.evaluate(
        "() => { document.getElementById('play').focus(); return getComputedStyle("
        "document.activeElement).outlineStyle; }"
    )
    assert outline != "none"


def test_twenty_recordings_are_there_within_two_seconds(browser, written_soundscape, tmp_path):
    """Seconds of work, since a busy machine takes longer; and nearly as soon as one recording."""
    rows = []
    for number in range(20):
        (tmp_path / f"{number}.wav.html").write_bytes(written_soundscape[1].read_bytes())
        rows.append((f"{number}.wav", 30.0, 2, "American Crow, Blue Jay", ""))
    table = pd.DataFrame(rows, columns=["recording", "seconds", "detections", "species", "failed"])
    seconds = {}
    for n_recordings in (1, 20):
        page = OpenPage(browser, write_index(tmp_path, table[:n_recordings])).page
        seconds[n_recordings] = ready_after(page)
    assert seconds[20] < 3 * seconds[1]
    assert work_of(page) < 2
    page.click("text=7.wav >> nth=0")
    page.wait_for_selector("#viewer")
    page.wait_for_selector("body[data-ready=yes]")
    from_index = ready_after(page)
    assert from_index < 3 * ready_after(OpenPage(browser, written_soundscape[1]).page)
    assert work_of(page) < 2


def ready_after(page) -> float:
    """Seconds from the beginning of a navigation to now."""
    return page.evaluate("performance.now()") / 1000


def work_of(page) -> float:
    """Seconds for which the page has kept a processor busy since it was opened."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    metrics = session.send("Performance.getMetrics")["metrics"]
    (seconds,) = [item["value"] for item in metrics if item["name"] == "ProcessTime"]
    return seconds


def test_only_named_scripts_run(browser, tmp_path):
    """The policy holds even where something slipped through the escaping."""
    body = f"{HOSTILE}<script>window.wasRun='yes'</script><div id='x'></div>"
    script = "document.getElementById('x').textContent = 'ours'; document.body.dataset.ready='yes'"
    content = PageContent("t", scripts=(script,))
    write_page(tmp_path / "p.html", "page.html", content, body=Markup(body))
    page = open_page(browser, tmp_path / "p.html")
    assert page.inner_text("#x") == "ours"
    assert page.evaluate("window.wasRun") is None


def test_screenshots_are_of_what_is_there(browser, report, tmp_path):
    from PIL import Image

    pages = sorted((report.parent / "soundscapes").iterdir())
    paths = take_screenshots(browser, report, pages[0], tmp_path)
    assert [path.name for path in paths] == [
        *("report.webp", "mistakes.webp", "confusions.webp", "soundscape.webp")
    ]
    for path in paths:
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.shape[1] == 1280
        assert picture.std() > 15  # not a blank page
