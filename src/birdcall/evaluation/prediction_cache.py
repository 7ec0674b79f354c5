"""Keep what members heard, so that sound is heard once and evaluated as often as one likes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from birdcall.audio.reading import AudioError
from birdcall.inference.engine import predict_audio
from birdcall.inference.ensemble import Ensemble, Member
from birdcall.inference.predictions import SEGMENTS_ONLY, SegmentPredictions
from birdcall.inference.windows import SINGLE_SEGMENT, AudioSource, WindowConfig
from birdcall.storage.files import atomic_path, digest, write_atomically
from birdcall.storage.store import code_digest

logger = logging.getLogger(__name__)

ARRAYS = ("clipwise", "framewise")
UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError)  # what a damaged file raises


@dataclass(frozen=True)
class PredictionCache:
    """Where outputs on a set of sounds are kept, what these are made from, and how they are heard.

    window_config: the ensemble's, whatever it is here.
    """

    folder: Path
    sounds: str  # name of the set
    fingerprint: str
    window_config: WindowConfig = SINGLE_SEGMENT

    def of(self, ensemble: Ensemble) -> PredictionCache:
        return replace(self, window_config=ensemble.window_config)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one member heard: ``(segments of all sounds, classes)``, and how the sounds lie in it.

    lengths: segments of each sound; seconds likewise. failed: sounds that did not decode, and why.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    lengths: dict[str, int]
    seconds: dict[str, float]
    failed: dict[str, tuple[str, str]]


def predict_cached(
    ensemble: Ensemble,
    sounds: Mapping[str, AudioSource],
    kept: PredictionCache | None = None,
    progress: bool = False,
) -> dict[str, SegmentPredictions | AudioError]:
    """Score sounds as `inference.predict_audio` does, members whose outputs are kept from there.

    The results' ``frames`` are empty: they would be fifty times as large as all else.
    """
    kept = kept and kept.of(ensemble)
    found = [_read_kept(member, sounds, kept) for member in ensemble.members]
    outputs = _hear_missing(ensemble, sounds, kept=kept, found=found, progress=progress)
    if any(one.lengths != outputs[0].lengths for one in outputs):
        # A disk that was away for some members would shift all that comes after the sound.
        logger.warning("members heard different sounds of %s; all hear them again", list(sounds))
        outputs = _hear_missing(
            ensemble, sounds, kept=kept, found=[None] * len(found), progress=progress
        )
    return _join(outputs, list(sounds))


def _hear_missing(
    ensemble: Ensemble,
    sounds: Mapping[str, AudioSource],
    kept: PredictionCache | None,
    found: Sequence[Outputs | None],
    progress: bool,
) -> list[Outputs]:
    """Fill the gaps in ``found`` (one per member) in one pass over the sounds, and keep these."""
    filled = {place: outputs for place, outputs in enumerate(found) if outputs is not None}
    missing = [place for place in range(len(found)) if place not in filled]
    if missing:
        hearing = ensemble.for_members([ensemble.members[place] for place in missing])
        heard = _hear(hearing, sounds, kept.sounds if kept and progress else None)
        for order, place in enumerate(missing):
            filled[place] = _of_member(heard, order, len(ensemble.classes))
            if kept is not None and _has_weights(ensemble.members[place]):
                cache_predictions(kept, ensemble.members[place], filled[place])
    return [filled[place] for place in range(len(found))]


def predict_frames_cached(
    ensemble: Ensemble, sounds: Mapping[str, AudioSource], kept: PredictionCache | None = None
) -> dict[str, np.ndarray]:
    """Return `SegmentPredictions.frames` of each sound, the members' mean over time.

    They are kept for these members together. Sounds that do not decode are left out.
    """
    path, kept = None, kept and kept.of(ensemble)
    if kept is not None and all(_has_weights(member) for member in ensemble.members):
        path = _frames_path(kept, ensemble.members)
        if path.is_file():
            try:
                return _read_frames(path, list(sounds))
            except UNREADABLE as error:
                logger.warning("%s: not readable (%s); heard again", path, error)
    frames = {
        name: scores.frames
        for name, scores in predict_audio(ensemble, sounds)
        if isinstance(scores, SegmentPredictions)
    }
    if path is not None and frames:
        _keep_frames(path, frames)
    return frames


def _has_weights(member: Member) -> bool:
    """Say whether the network is a finished one: else there is no name for what it is."""
    return bool(member.checkpoint.weights_sha256)


def _hear(
    ensemble: Ensemble, sounds: Mapping[str, AudioSource], title: str | None
) -> dict[str, SegmentPredictions | AudioError]:
    sound_by_sound = predict_audio(ensemble, sounds, SEGMENTS_ONLY)
    return dict(tqdm(sound_by_sound, title, len(sounds), disable=title is None, unit="sound"))


def _of_member(
    heard: Mapping[str, SegmentPredictions | AudioError], place: int, n_classes: int
) -> Outputs:
    scored = {name: one for name, one in heard.items() if isinstance(one, SegmentPredictions)}
    empty = [np.zeros((0, n_classes), np.float32)]
    return Outputs(
        clipwise=np.concatenate(empty + [one.clipwise[place] for one in scored.values()]),
        framewise=np.concatenate(empty + [one.framewise[place] for one in scored.values()]),
        lengths={name: one.clipwise.shape[1] for name, one in scored.items()},
        seconds={name: one.seconds for name, one in scored.items()},
        failed={
            name: (str(one.path), one.reason)
            for name, one in heard.items()
            if isinstance(one, AudioError)
        },
    )


def _join(
    members: Sequence[Outputs], names: Iterable[str]
) -> dict[str, SegmentPredictions | AudioError]:
    first, start = members[0], 0
    starts = {}
    for name, length in first.lengths.items():
        starts[name] = start
        start += length
    result: dict[str, SegmentPredictions | AudioError] = {}
    for name in names:
        if name in first.failed:
            path, reason = first.failed[name]
            result[name] = AudioError(Path(path), reason)
            continue
        own = slice(starts[name], starts[name] + first.lengths[name])
        clipwise, framewise = (
            np.stack([getattr(one, array)[own] for one in members]) for array in ARRAYS
        )
        result[name] = SegmentPredictions(
            clipwise, framewise, recording_seconds=(first.seconds[name],)
        )
    return result


# --- on disk --------------------------------------------------------------------------------------


def _path(kept: PredictionCache, member: Member) -> Path:
    made_from = {
        "weights": member.checkpoint.weights_sha256,
        "experiment": asdict(member.checkpoint.experiment),
        "classes": member.checkpoint.classes,
        "sounds": kept.fingerprint,
        "code": code_digest("evaluation.prediction_cache"),
        "window_config": asdict(kept.window_config),
        "runtime": "torch" if member.export is None else "onnx",
        "torch": torch.__version__,
    }
    name = digest(json.dumps(made_from, sort_keys=True, default=str))
    return kept.folder / f"{member.name}.{kept.sounds}.{name}.safetensors"


def _read_kept(
    member: Member, sounds: Mapping[str, AudioSource], kept: PredictionCache | None
) -> Outputs | None:
    """Return what the member has heard of these sounds before; None if it must hear them."""
    if kept is None or not _has_weights(member):
        return None
    path = _path(kept, member)
    if not path.is_file():
        return None
    try:
        outputs = _read(path)
        scored = [name for name in sounds if name not in outputs.failed]
        if list(outputs.lengths) != scored or not outputs.failed.keys() <= sounds.keys():
            raise ValueError("it is of other sounds, or of these in another order")
    except UNREADABLE as error:
        logger.warning("%s: not readable (%s); heard again", path, error)
        return None
    return outputs


def _read(path: Path) -> Outputs:
    with safe_open(path, framework="numpy") as file:
        values = json.loads(file.metadata()["values"])
        arrays = [file.get_tensor(name) for name in ARRAYS]
    lengths = {name: int(length) for name, length in values["lengths"].items()}
    if any(len(array) != sum(lengths.values()) for array in arrays):
        raise ValueError("its arrays are not as long as it says")
    failed = {name: (str(path), str(why)) for name, (path, why) in values["failed"].items()}
    return Outputs(*arrays, lengths, values["seconds"], failed)


def cache_predictions(kept: PredictionCache, member: Member, outputs: Outputs) -> None:
    """Write a member's outputs on a set of sounds, and delete those of an earlier state of it."""
    path = _path(kept, member)
    values = {
        "lengths": outputs.lengths,
        "seconds": outputs.seconds,
        "failed": {name: list(why) for name, why in outputs.failed.items()},
    }
    arrays = {name: np.ascontiguousarray(getattr(outputs, name), np.float32) for name in ARRAYS}
    write_atomically(path, safetensors.numpy.save(arrays, {"values": json.dumps(values)}))
    _delete_earlier(path)


def _frames_path(kept: PredictionCache, members: Sequence[Member]) -> Path:
    names = digest(" ".join(member.name for member in members))
    states = digest(" ".join(_path(kept, member).name for member in members))
    return kept.folder / f"frames-{names}.{kept.sounds}.{states}.safetensors"


def _read_frames(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        if json.loads(file.metadata()["sounds"]) != names:
            raise ValueError("it is of other sounds, or of these in another order")
        return {name: file.get_tensor(str(place)) for place, name in enumerate(names)}


def _keep_frames(path: Path, frames: Mapping[str, np.ndarray]) -> None:
    arrays = {
        str(place): np.ascontiguousarray(one, np.float32)
        for place, one in enumerate(frames.values())
    }
    with atomic_path(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, {"sounds": json.dumps(list(frames))})
    _delete_earlier(path)


def _delete_earlier(path: Path) -> None:
    """Delete what is kept of the same members on the same set of sounds in an earlier state."""
    beginning = path.name.rsplit(".", 2)[0]
    for other in path.parent.glob(f"{beginning}.*.safetensors"):
        if other != path:
            other.unlink()
