"""The tutorial notebook runs from start to end where there is no data; its figures are real."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import NETWORKS

from birdcall.experiments import find_experiment
from birdcall.models.sed import build_model
from birdcall.models.summary import trace_stages
from birdcall.report.architecture import plot_architecture

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "how-to-classify-a-sound"
SOURCE = FOLDER / "how-to-classify-a-sound.py"
METADATA = json.loads((FOLDER / "kernel-metadata.json").read_text(encoding="utf-8"))
QUICK = {
    "EPOCHS": "1",
    "N_CLIPS": "2",
    "N_RECORDINGS": "5",
    "REPEATS": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def upload(tmp_path_factory) -> Path:
    """What `kaggle kernels push` is given: the notebook, made of its text, and the metadata."""
    jupytext = pytest.importorskip("jupytext", reason="jupytext makes the notebook of its text")
    folder = tmp_path_factory.mktemp("upload")
    shutil.copy(FOLDER / "kernel-metadata.json", folder)
    jupytext.write(jupytext.read(SOURCE), folder / SOURCE.with_suffix(".ipynb").name)
    return folder


@pytest.fixture(scope="module")
def executed(upload, tmp_path_factory):
    """The notebook after a run in a fresh kernel, in a folder with no data near."""
    reason = "nbclient and ipykernel run the notebook: pip install -r requirements.txt"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    notebook = nbformat.read(upload / METADATA["code_file"], as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUICK | {"DATA": "", "PACKAGE": "", "TMPDIR": str(folder)}).items():
            patch.setenv(name, value)
        client.execute(env=dict(os.environ))
    return notebook


def printed(notebook) -> str:
    return "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )


def figures_of(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- the notebook -------------------------------------------------------------------------------


def test_every_cell_runs_in_order_and_without_an_error(executed):
    cells = code_cells(executed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell.outputs}
    assert "error" not in kinds


def test_it_shows_waveform_spectrograms_benchmark_architecture_and_detections(executed):
    sources = [cell.source for cell in code_cells(executed) if figures_of(cell)]
    for shown in (
        *("detail.plot", "power_db", "log_mel(batch)", "frontend.png"),
        *("plot_architecture", "predictions.frames"),
    ):
        assert sum(shown in source for source in sources) == 1, shown


def test_the_first_spectrogram_has_the_shape_of_the_article(executed):
    assert "(1, 72000) -> (1, 1, 226, 1025)" in printed(executed)


def test_detections_come_from_a_model_that_was_trained(executed):
    text = printed(executed)
    assert re.search(
        r"small_gru-fold0: \{'macro_ap': [\d.]+, 'classes': \d+, 'left_out': \d+\}", text
    )
    assert "1 members, 5 species" in text
    assert re.search(r"\d+ detections in 40 s", text)


def test_the_text_keeps_no_outputs_and_no_paths_of_a_machine():
    text = SOURCE.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|Users|work)/", text)
    assert "jupytext --to ipynb" in text and "jupyter execute --inplace" in text


# --- what Kaggle reads ---------------------------------------------------------------------------


def test_the_metadata_names_the_notebook_and_its_title_makes_its_id(upload):
    assert (upload / METADATA["code_file"]).is_file()
    assert METADATA["kernel_type"] == "notebook" and METADATA["language"] == "python"
    slug = re.sub(r"[^a-z0-9]+", "-", METADATA["title"].lower()).strip("-")
    assert METADATA["id"].split("/")[1] == slug == FOLDER.name


def test_the_kernel_has_no_internet_and_the_competitions_data():
    assert METADATA["enable_internet"] is False  # the client's default is on
    assert METADATA["competition_sources"] == ["birdsong-recognition"]
    assert METADATA["dataset_sources"] == [METADATA["id"].split("/")[0] + "/birdcall-package"]


# --- the architecture ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_have_the_shapes_of_the_model_and_all_of_its_weights(name):
    model = build_model(find_experiment(name), 7).eval()
    waveform = torch.zeros(2, 96_000)
    stages = trace_stages(model, waveform)
    shapes = {stage.name: stage.shape for stage in stages}
    with torch.inference_mode():
        log_mel = model.frontend(waveform)
        output = model.detect(log_mel)
    images = [", ".join(model.frontend.config.features)]
    if not name.startswith("birdnet_"):  # BirdNET's network does not normalise mel bins
        images.append("each mel bin normalised")
    assert {image: shapes[image] for image in images} == dict.fromkeys(images, tuple(log_mel.shape))
    assert ("each mel bin normalised" in shapes) == ("each mel bin normalised" in images)
    assert shapes["framewise output"] == tuple(output.framewise.shape)
    assert [shape for name, shape in shapes.items() if name.startswith("clipwise")] == [(2, 7)]
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert sum(stage.n_weights for stage in stages) == weights


def test_the_backbone_halves_the_image_stage_by_stage():
    model = build_model(find_experiment("small_gru"), 7)
    stages = trace_stages(model, torch.zeros(1, 160_000))
    backbone = [stage for stage in stages if stage.part == "backbone" and len(stage.shape) == 4]
    assert [stage.shape[2:] for stage in backbone] == [
        (126, 32),
        (63, 16),
        (32, 8),
        (16, 4),
        (8, 2),
    ]
    assert [stage.name for stage in backbone[2:]] == ["layer2", "layer3", "layer4"]


def test_tracing_leaves_no_hooks_and_the_mode_as_it_was():
    model = build_model(find_experiment("small_gru"), 7).train()
    trace_stages(model, torch.zeros(1, 32_000))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_the_figure_names_every_stage_with_its_measured_shape():
    figure = plot_architecture(find_experiment("small_gru"), 264)
    text = [item.get_text() for item in figure.axes[0].texts]
    assert "160,000 samples" in text
    assert "1 channel × 251 frames × 64 mel bins" in text
    assert "264 classes × 8 frames" in text


def test_drawing_does_not_move_torchs_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plot_architecture(find_experiment("small_gru"), 5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"pooling": "mean", "head": "max"}, ("mean over mel bins", "clipwise: loudest frame")),
        (
            {"pooling": "gem", "head": "log_mean_exp"},
            ("GeM over mel bins", "clipwise: log-mean-exp over frames"),
        ),
    ],
)
def test_the_figure_says_which_pooling_and_which_head(options, names):
    small = find_experiment("small_gru")
    figure = plot_architecture(replace(small, model=replace(small.model, **options)), 5)
    text = [item.get_text() for item in figure.axes[0].texts]
    assert set(names) <= set(text)
