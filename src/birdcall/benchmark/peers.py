"""Compare birdcall with its peers in one run: speed, memory, scores on labelled soundscapes."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pandas as pd
import soundfile
import torch
from torch import Tensor, nn

from birdcall.audio.reading import AudioError, iterate_audio
from birdcall.benchmark.frontend import peak_megabytes, time_in_turns, torchlibrosa_frontend
from birdcall.benchmark.inference import predict_naively, write_soundscapes
from birdcall.config import SEGMENT_SECONDS, require
from birdcall.data import birdnet
from birdcall.data.recordings import read_recordings
from birdcall.evaluation import metrics
from birdcall.evaluation.labelled import LabelledSoundscapes, predict_labelled
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import Ensemble, load_ensemble, load_member
from birdcall.inference.windows import ONNX_FILE, export_checkpoint
from birdcall.kaggle.test_set import CompetitionFile
from birdcall.models.checkpoint import OpenVinoModel, is_onnx_installed, read_checkpoint
from birdcall.models.sed import SEDModel
from birdcall.storage.files import write_atomically

logger = logging.getLogger(__name__)

_BATCH = 8  # clips of opensoundscape
_MAX_LOGIT = 15.0  # of BirdNET
_RESULT_FILE = "result.json"

# Paths to clipwise probabilities (segments, classes) of each recording.
_Predict = Callable[[Sequence[Path]], list[np.ndarray]]


@dataclass(frozen=True)
class Setting:
    """What each peer is opened with: a trained run, and the scientific names of its classes."""

    run: Path
    names: tuple[str, ...]


@dataclass(eq=False)
class Peer:
    """An implementation that predicts the classes of a run, or the reason why it does not.

    predict: None with a reason. known: which classes it knows, ``(classes,)``; None: all.
    core_seconds: of the process, since the peer was opened.
    """

    name: str
    predict: _Predict | None = None
    known: np.ndarray | None = None
    reason: str = ""
    core_seconds: float = field(default=0.0, init=False)

    def run(self, paths: Sequence[Path]) -> list[np.ndarray]:
        """Predict recordings, and count the time of all cores."""
        start = time.process_time()
        results = self.predict(paths)
        self.core_seconds += time.process_time() - start
        return results


def benchmark_peers(
    data: Path,
    run: Path,
    folder: Path,
    *,
    soundscapes: Sequence[Path] = (),
    minutes: float = 5.0,
    repeats: int = 5,
    threshold: float = 0.5,
) -> pd.DataFrame:
    """Time and score birdcall and its peers with the weights of ``run``; write ``peers.csv``.

    A row for each of `PEERS`; one that is not installed or does not run has the reason in
    ``state``. Columns: x_real_time, of ``minutes`` of the data's soundscapes as mp3, the median of
    ``repeats`` turns; core_seconds_per_hour, the time of all cores for an hour of audio;
    peak_megabytes, of a new process that predicts them; rows, classes, macro_ap, macro_auc and
    row_wise_f1 at ``threshold``: see `score_rows`. Labelled soundscapes are those of
    ``soundscapes``, else the examples in the data folder; without any there are no scores.
    """
    checkpoint, recordings = read_checkpoint(run), read_recordings(data)
    names = birdnet.scientific_names(checkpoint.classes, recordings)
    examples = [data] if (data / CompetitionFile.EXAMPLE_LABELS).is_file() else []
    labelled = predict_labelled(load_ensemble([run]), soundscapes or examples)
    with tempfile.TemporaryDirectory() as scratch:
        paths = list(write_soundscapes(data, Path(scratch) / "sound", minutes).values())
        setting = Setting(_copy_run(run, Path(scratch) / "run"), names)
        peers = [open_peer(name, setting) for name in PEERS]
        clipwise = {peer.name: _warm_up(peer, labelled, paths) for peer in peers if peer.predict}
        measured = [peer for peer in peers if peer.predict]
        known = np.ones(len(checkpoint.classes), dtype=bool)
        for peer in measured:
            peer.core_seconds = 0.0
            known &= True if peer.known is None else peer.known
        functions = [peer.run for peer in measured]
        seconds = np.median(time_in_turns(functions, [[path] for path in paths], repeats), axis=1)
        length = sum(soundfile.info(str(path)).duration for path in paths)
        rows = [{"peer": peer.name, "state": peer.reason or "measured"} for peer in peers]
        table = pd.DataFrame(rows).set_index("peer")
        for peer, turn in zip(measured, seconds, strict=True):
            hourly = 3600 / (length * repeats)
            row = {"x_real_time": round(length / turn, 1)}
            row["core_seconds_per_hour"] = round(peer.core_seconds * hourly, 1)
            row["peak_megabytes"] = _measure_memory(peer.name, setting, paths, Path(scratch))
            if labelled is not None:
                row |= score_rows(labelled.predictions, clipwise[peer.name], known, threshold)
            table.loc[peer.name, list(row)] = row
    table = table.reset_index()
    write_atomically(folder / "peers.csv", table.to_csv(index=False))
    return table


def score_rows(
    labelled: LabelledPredictions, clipwise: np.ndarray, known: np.ndarray, threshold: float
) -> dict[str, float]:
    """Score the probabilities ``(segments, classes)`` of a peer on the labelled rows.

    known: the classes that count, ``(classes,)``; a row with birds of other classes only is nocall.
    macro_ap and macro_auc are means over those that occur, ``classes`` their number. row_wise_f1:
    all classes from ``threshold`` on are predicted.
    """
    truth = labelled.labelled_truth[:, : len(known)][:, known]
    scored = clipwise[labelled.labelled][:, known]
    scores = {
        "macro_ap": metrics.macro_average(metrics.average_precision(truth, scored)),
        "macro_auc": metrics.macro_average(metrics.roc_auc(truth, scored)),
        "row_wise_f1": float(metrics.row_f1_scores(truth, scored >= threshold).mean()),
    }
    counts = {"rows": len(truth), "classes": int(truth.any(axis=0).sum())}
    return counts | {name: round(score, 3) for name, score in scores.items()}


def _warm_up(
    peer: Peer, labelled: LabelledSoundscapes | None, paths: Sequence[Path]
) -> np.ndarray | None:
    """Return the probabilities ``(segments, classes)`` of the labelled soundscapes.

    Where there are none, or where the peer fails, which ends its part, None. A peer may cut off the
    last, incomplete segment: what it does not predict is 0.
    """
    logger.info("%s predicts the labelled soundscapes", peer.name)
    try:
        if labelled is None:
            peer.run(paths[:1])
            return None
        segments, starts = labelled.predictions.segments, labelled.predictions.starts
        results = peer.run([labelled.paths[name] for name in segments["recording"].iloc[starts]])
    except Exception as error:  # whatever another library raises: the others are measured still
        peer.predict, peer.reason = None, f"does not run: {_first_line(error)}"
        return None
    clipwise = np.zeros((len(segments), results[0].shape[1]))
    for start, end, part in zip(starts, [*starts[1:], len(segments)], results, strict=True):
        clipwise[start : start + len(part)] = part[: end - start]
    return clipwise


def _copy_run(run: Path, copy: Path) -> Path:
    """Copy a run with its export, which is made where that is possible."""
    copytree(run, copy, ignore=ignore_patterns("tensorboard"))
    if is_onnx_installed() and not (copy / ONNX_FILE).is_file():
        export_checkpoint(copy, copy / ONNX_FILE)
    return copy


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- the peers ------------------------------------------------------------------------------------


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"needs {package}: pip install -e '.[{extra}]'")


def _predict_with_engine(ensemble: Ensemble) -> _Predict:
    def predict(paths: Sequence[Path]) -> list[np.ndarray]:
        results = []
        for _, item in predict_files(ensemble, dict(zip(map(str, paths), paths, strict=True))):
            if isinstance(item, AudioError):
                raise item
            results.append(item.clipwise[0])
        return results

    return predict


def _open_export(setting: Setting, in_bfloat16: bool) -> tuple[_Predict, None]:
    member = load_member(setting.run)
    if member.export is None:
        raise ValueError(f"{setting.run}: no export; needs pip install -e '.[onnx]'")
    export = member.export.slower or member.export
    if in_bfloat16:
        export = OpenVinoModel(setting.run / ONNX_FILE, slower=export)
    return _predict_with_engine(Ensemble([replace(member, export=export)])), None


def _open_torch(setting: Setting) -> tuple[_Predict, None]:
    return _predict_with_engine(Ensemble([load_member(setting.run, with_export=False)])), None


def _open_naive(setting: Setting) -> tuple[_Predict, None]:
    member = load_member(setting.run, with_export=False)
    frontends = [torchlibrosa_frontend(member.checkpoint.experiment.frontend)]

    def predict(paths: Sequence[Path]) -> list[np.ndarray]:
        return [part[0] for part in predict_naively([member], frontends, dict(enumerate(paths)))]

    return predict, None


class _WaveformNetwork(nn.Module):
    """The network with its log-mel, as opensoundscape calls it: waveform to probabilities."""

    def __init__(self, model: SEDModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveform: Tensor) -> Tensor:
        return self.model.detect(self.model.frontend(waveform)).clipwise


def _to_tensor(audio: object) -> Tensor:
    return torch.from_numpy(audio.samples)


def _open_opensoundscape(setting: Setting) -> tuple[_Predict, None]:
    """Open its CNN class round the network: its reading, clips and batches, our log-mel."""
    _require("opensoundscape", "peers")
    from opensoundscape import CNN
    from opensoundscape.preprocess.actions import Action
    from opensoundscape.preprocess.preprocessors import AudioPreprocessor

    member = load_member(setting.run, with_export=False)
    cnn = CNN(
        architecture=_WaveformNetwork(member.model),
        classes=list(member.checkpoint.classes),
        sample_duration=SEGMENT_SECONDS,
        sample_rate=member.checkpoint.experiment.frontend.sample_rate,
        preprocessor_cls=AudioPreprocessor,
        device="cpu",
    )
    cnn.preprocessor.insert_action("to_tensor", Action(_to_tensor))

    def predict(paths: Sequence[Path]) -> list[np.ndarray]:
        # Not with raise_errors, in which 0.13.2 fails: what cannot be read is NaN.
        table = cnn.predict(list(map(str, paths)), batch_size=_BATCH, progress_bar=False)
        require(not table.isna().any(axis=None), "cannot read all of the soundscapes")
        by_file = dict(iter(table.groupby(level="file", sort=False)))
        return [by_file[str(path)].to_numpy() for path in paths]

    return predict, None


def _open_birdnet(setting: Setting, is_dense: bool) -> tuple[_Predict, np.ndarray]:
    """Open BirdNET; dense: a window each second, as `birdcall evaluate --birdnet` runs it."""
    model = birdnet.open_birdnet()
    columns = birdnet.find_columns(model.labels, setting.names)

    def predict_path(path: Path) -> np.ndarray:
        if is_dense:
            return birdnet.predict_windows(model, path, columns).of_segments()
        logits, n_samples = [], 0
        for block in iterate_audio(path, birdnet.SAMPLE_RATE, birdnet.WINDOW_SECONDS):
            n_samples += len(block)
            window = np.zeros(birdnet.WINDOW_SECONDS * birdnet.SAMPLE_RATE, np.float32)
            window[: len(block)] = block
            logits.append(model.run(window[None])[0][0, columns])
        clipped = np.clip(logits, -_MAX_LOGIT, _MAX_LOGIT)
        probabilities = np.where(columns >= 0, 1 / (1 + np.exp(-clipped)), 0)
        return join_windows(probabilities, n_samples / birdnet.SAMPLE_RATE)

    return lambda paths: list(map(predict_path, paths)), columns >= 0


def join_windows(probabilities: np.ndarray, seconds: float) -> np.ndarray:
    """Return the probabilities ``(segments, classes)`` from windows of 3 s that lie side by side.

    probabilities: ``(windows, classes)``, of a recording of so many ``seconds``. A segment has the
    highest of the windows that overlap with it by a second or more.
    """
    n_windows, n_classes = probabilities.shape
    each_second = np.zeros((birdnet.WINDOW_SECONDS * (n_windows - 1) + 1, n_classes))
    each_second[:: birdnet.WINDOW_SECONDS] = probabilities
    return birdnet.WindowPredictions(each_second, np.empty(0), seconds).of_segments()


# Each opener raises whatever keeps its peer from running.
PEERS: Mapping[str, Callable[[Setting], tuple[_Predict, np.ndarray | None]]] = {
    "birdcall, ONNX Runtime": partial(_open_export, in_bfloat16=False),
    "birdcall, OpenVINO in bfloat16": partial(_open_export, in_bfloat16=True),
    "birdcall, torch": _open_torch,
    "librosa, torchlibrosa, torch": _open_naive,
    "opensoundscape": _open_opensoundscape,
    f"{birdnet.NAME}, windows side by side": partial(_open_birdnet, is_dense=False),
    f"{birdnet.NAME}, a window each second": partial(_open_birdnet, is_dense=True),
}


def open_peer(name: str, setting: Setting) -> Peer:
    """Open one of `PEERS`; where that fails, the peer has the reason."""
    try:
        predict, known = PEERS[name](setting)
    except Exception as error:  # whatever another library raises: the others are measured still
        logger.warning("%s: %s", name, _first_line(error))
        return Peer(name, reason=_first_line(error))
    return Peer(name, predict, known)


# --- memory ---------------------------------------------------------------------------------------


def _measure_memory(
    name: str, setting: Setting, paths: Sequence[Path], scratch: Path
) -> float | None:
    """Return the peak megabytes of a new process that opens a peer and predicts ``paths``."""
    values = {"name": name, "run": str(setting.run), "names": setting.names}
    values["paths"] = list(map(str, paths))
    (scratch / _RESULT_FILE).write_text(json.dumps(values), encoding="utf-8")
    code = f"import sys; from {__name__} import _predict_alone; _predict_alone(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(scratch / _RESULT_FILE)], check=True)
    return json.loads((scratch / _RESULT_FILE).read_text(encoding="utf-8"))["peak_megabytes"]


def _predict_alone(file: str) -> None:
    """Predict what ``file`` says; write the peak memory of the process there."""
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    peer = open_peer(values["name"], Setting(Path(values["run"]), tuple(values["names"])))
    peer.run(list(map(Path, values["paths"])))
    write_atomically(Path(file), json.dumps({"peak_megabytes": round(peak_megabytes())}))
