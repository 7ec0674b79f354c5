"""Figures have one style, say what is so, and are made by a command."""

import importlib
import re

import numpy as np
import pandas as pd
import pytest
import typer.main

from birdcall.cli import app
from birdcall.report.gallery import plot_inference, write_figures
from birdcall.report.plots import STEPS, plot_pipeline
from birdcall.report.style import BLUE, COLORS, GREEN, GREY, MARKERS, ORANGE, save_figure


def luminance(color: str) -> float:
    """WCAG's relative luminance."""
    parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_lines_stand_out_from_paper():
    for color in (BLUE, ORANGE, GREEN, GREY):
        assert 1.05 / (luminance(color) + 0.05) >= 3, color
    assert len(set(COLORS)) == len(COLORS) == len(set(MARKERS))


def test_every_step_of_the_road_is_a_command_and_a_module():
    commands = typer.main.get_command(app).commands
    names = {step.name for step in STEPS}
    for step in STEPS:
        command, *options = step.command.split()
        known = {option for one in commands[command].params for option in one.opts}
        assert set(options) <= known
        importlib.import_module(f"birdcall.{step.module}")
        assert set(step.after) <= names
    assert len({step.place for step in STEPS}) == len(STEPS)


def test_the_road_is_drawn_with_all_its_steps():
    axes = plot_pipeline().axes[0]
    said = {text.get_text() for text in axes.texts}
    for step in STEPS:
        assert {step.name, f"birdcall {step.command}", step.module} <= said
    n_arrows = sum(len(step.after) for step in STEPS)
    assert (
        sum(text.arrow_patch is not None for text in axes.texts if hasattr(text, "arrow_patch"))
        == n_arrows
    )
    assert len(axes.patches) == len(STEPS)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".webp"])
def test_a_figure_is_the_same_file_each_time(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        save_figure(plot_pipeline(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 5000


INFERENCE = pd.DataFrame(
    {
        "members": [1, 5],
        "naive_x_real_time": [315.0, 62.0],
        "x_real_time": [1020.0, 341.0],
        "model_alone_x_real_time": [2000.0, 422.0],
    }
)


def test_speeds_are_drawn_as_they_were_measured():
    axes = plot_inference(INFERENCE).axes[0]
    widths = sorted(bar.get_width() for bar in axes.patches)
    assert widths == [62, 315, 341, 422, 1020, 2000]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1 member", "5 members"]


def test_the_command_makes_what_it_can_and_says_what_is_missing(tmp_path, tiny_experiment):
    def nothing():
        raise FileNotFoundError("runs: no trained run; `birdcall train` makes one")

    said = list(
        write_figures(
            tmp_path / "to", tmp_path, experiment=tiny_experiment, evaluation=nothing, n_classes=3
        )
    )
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"road.svg", "architecture.svg"}
    assert any("inference.csv is missing: `birdcall benchmark inference`" in line for line in said)
    assert any("birdcall train" in line and "no snr.svg" in line for line in said)


def test_all_figures_are_made_where_all_is_there(tmp_path, tiny_experiment, evaluation):
    (tmp_path / "benchmark").mkdir()
    INFERENCE.to_csv(tmp_path / "benchmark" / "inference.csv", index=False)
    list(
        write_figures(
            tmp_path / "to",
            tmp_path,
            experiment=tiny_experiment,
            evaluation=lambda: evaluation,
            n_classes=3,
        )
    )
    assert {path.name for path in (tmp_path / "to").iterdir()} == {
        *("road.svg", "architecture.svg", "inference.svg", "snr.svg", "spectrogram.webp")
    }
    drawn = (tmp_path / "to" / "architecture.svg").read_text()
    assert re.search("tiny: 5 s in, 3 classes out", drawn)
