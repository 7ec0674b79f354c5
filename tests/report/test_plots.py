"""Figures have one style, show what they are given, and are written by a command."""

import importlib
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer.main

import birdcall
from birdcall.__main__ import app
from birdcall.benchmark.inference import plot_inference_speed
from birdcall.report.architecture import LAYERS, plot_layers, project_figures, read_layers
from birdcall.report.plots import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    STEPS,
    plot_pipeline,
    plot_table,
    save_figure,
    write_figures,
)


def luminance(color: str) -> float:
    """WCAG's relative luminance."""
    parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_lines_stand_out_from_paper():
    for color in (BLUE, ORANGE, GREEN, GREY):
        assert 1.05 / (luminance(color) + 0.05) >= 3, color
    assert len(set(COLORS)) == len(COLORS) == len(set(MARKERS))


def test_every_step_of_the_pipeline_is_a_command_and_a_module():
    commands = typer.main.get_command(app).commands
    names = {step.name for step in STEPS}
    for step in STEPS:
        command, *options = step.command.split()
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert set(options) <= known
        importlib.import_module(f"birdcall.{step.module}")
        assert set(step.after) <= names
    assert len({step.position for step in STEPS}) == len(STEPS)


def test_the_pipeline_is_drawn_with_all_its_steps():
    axes = plot_pipeline().axes[0]
    texts = {text.get_text() for text in axes.texts}
    for step in STEPS:
        assert {step.name, f"birdcall {step.command}", step.module} <= texts
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == sum(len(step.after) for step in STEPS)
    assert len(axes.patches) == len(STEPS)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".webp"])
def test_a_figure_is_the_same_file_each_time(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        save_figure(plot_pipeline(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 5000


# --- layers ---------------------------------------------------------------------------------------


@pytest.fixture
def small_package(tmp_path):
    """A package in which training imports evaluation, and one kaggle module packages."""
    files = {
        "config.py": "X = 1\n",
        "__main__.py": "from birdcall.cli.training import run\n",
        "cli/training.py": "def run():\n    from birdcall.training.trainer import train\n",
        "training/trainer.py": "from birdcall.evaluation.scoring import score\n",
        "evaluation/scoring.py": "from birdcall import config\nfrom birdcall.config import X\n",
        "kaggle/kernel.py": "import birdcall.config\n",
        "kaggle/packaging.py": "from birdcall.training import trainer\n",
        "kaggle/upload.py": "from birdcall.kaggle import kernel, packaging\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_layers_are_read_from_the_imports(small_package):
    layers = {layer.name: layer for layer in read_layers(small_package)}
    assert layers["cli"].n_files == 2 and layers["cli"].n_lines == 3
    assert layers["cli"].imports == {"cli": 1, "training": 1}
    assert layers["training"].imports == {"evaluation": 1}
    assert layers["evaluation"].imports == {"root": 2}
    assert layers["kaggle"].n_files == 1 and layers["kaggle"].imports == {"root": 1}
    packaging = layers["kaggle: packaging"]
    assert packaging.n_files == 2
    assert packaging.imports == {"training": 1, "kaggle": 1, "kaggle: packaging": 1}


def test_an_import_from_a_higher_layer_stands_out(small_package):
    axes = plot_layers(read_layers(small_package)).axes[0]
    strong = [patch for patch in axes.patches if patch.get_alpha() == 1.0]
    assert len(strong) == 1
    row, column = LAYERS.index("training"), LAYERS.index("evaluation")
    assert strong[0].get_y() == row
    columns = sorted({patch.get_x() for patch in axes.patches if patch.get_height() == 1})
    assert columns.index(strong[0].get_x()) == column


def test_every_folder_of_the_package_is_a_layer():
    package = Path(birdcall.__file__).parent
    folders = {path.name for path in package.iterdir() if any(path.glob("*.py"))}
    assert folders <= set(LAYERS)
    texts = {text.get_text() for text in plot_layers(read_layers(package)).axes[0].texts}
    assert folders <= texts


# --- the command ----------------------------------------------------------------------------------

INFERENCE = pd.DataFrame(
    {
        "members": [1, 5],
        "naive_x_real_time": [315.0, 62.0],
        "x_real_time": [1020.0, 341.0],
        "model_alone_x_real_time": [2000.0, 422.0],
    }
)


def test_speeds_are_drawn_as_they_were_measured():
    axes = plot_inference_speed(INFERENCE).axes[0]
    widths = sorted(bar.get_width() for bar in axes.patches)
    assert widths == [62, 315, 341, 422, 1020, 2000]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1 member", "5 members"]


def test_figures_without_their_input_are_named_and_the_others_written(tmp_path, tiny_experiment):
    def nothing():
        raise FileNotFoundError("runs: no trained run; `birdcall train` makes one")

    figures = project_figures(tiny_experiment, nothing, n_classes=3)
    figures["inference.svg"] = partial(plot_table, tmp_path / "inference.csv", plot_inference_speed)
    lines = list(write_figures(tmp_path / "to", figures))
    assert {path.name for path in (tmp_path / "to").iterdir()} == {
        *("pipeline.svg", "layers.svg", "architecture.svg")
    }
    assert any("inference.csv is missing: `birdcall benchmark inference`" in line for line in lines)
    for name in ("snr.svg", "spectrogram.webp"):
        assert any("birdcall train" in line and name in line for line in lines)


def test_all_figures_are_written_where_all_input_is_there(tmp_path, tiny_experiment, evaluation):
    INFERENCE.to_csv(tmp_path / "inference.csv", index=False)
    figures = project_figures(tiny_experiment, lambda: evaluation, n_classes=3)
    figures["inference.svg"] = partial(plot_table, tmp_path / "inference.csv", plot_inference_speed)
    list(write_figures(tmp_path / "to", figures))
    assert {path.name for path in (tmp_path / "to").iterdir()} == {
        *("pipeline.svg", "layers.svg", "architecture.svg", "inference.svg", "snr.svg"),
        "spectrogram.webp",
    }
    drawing = (tmp_path / "to" / "architecture.svg").read_text()
    assert re.search("tiny: 5 s in, 3 classes out", drawing)
