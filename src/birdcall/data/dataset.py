"""Join recordings with their audit, folds and noise: the data that runs are trained on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.audio.filters import generate_noise
from birdcall.config import FULL, Experiment, require
from birdcall.data.audit import Measurement, read_audit
from birdcall.data.birdnet import WindowStore, scientific_names
from birdcall.data.cache import ReadCrops, RecordingCache
from birdcall.data.folds import TRAINING_ONLY, read_folds
from birdcall.data.noise import digest_noise, find_noise, split_noise
from birdcall.data.recordings import (
    check_recordings_exist,
    classes_of,
    read_recordings,
    usable_recordings,
)
from birdcall.data.soundscapes import SoundscapeLabels, find_unlabelled, require_folders
from birdcall.data.targets import read_strong_labels
from birdcall.kaggle.test_set import CompetitionFile
from birdcall.storage.files import (
    digest,
    find_files,
    readable_sound,
    shorten_list,
    write_atomically,
)

logger = logging.getLogger(__name__)

_LEARNT = ["filename", "ebird_code", "secondary_codes", "rating"]  # columns of recordings


@dataclass(frozen=True)
class TrainingData:
    """What runs share: recordings with their fold, and a way to read them."""

    folder: Path  # the data folder
    # With the columns of `read_recordings` and `usable_recordings`, and ``fold``.
    recordings: pd.DataFrame
    classes: tuple[str, ...]
    read_crops: ReadCrops
    noise_files: Sequence[Path] = ()  # bird-free, to mix in and to learn nocall from
    strong_labels: pd.DataFrame | None = None  # see `targets.StrongTargets`
    noise_store: Path | None = None  # folder of decoded noise, see `noise.NoiseFiles`
    other_birds: Sequence[Path] = ()  # sound of birds that are no class: see `find_other_birds`
    soundscape_labels: SoundscapeLabels | None = None  # for experiments with `StudentConfig.share`
    soundscape_cache: Path | None = None  # folder of decoded soundscapes, see `RecordingCache`
    birdnet: WindowStore | None = None  # what BirdNET predicts for recordings and soundscapes

    @property
    def folds(self) -> list[int]:
        """Return the folds that can be held out."""
        return sorted(set(map(int, self.recordings["fold"])) - {TRAINING_ONLY})

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """Digests of all that a training learns from, by name; the folder has no part in them.

        recordings: what the tables say about them. audio: their files, as audited. lengths: as
        decoded. labels: the strong labels, None without them; other_birds: likewise. annotated:
        the hashes of soundscapes that people have labelled, which no score may use. Recordings are
        not read for them.
        """
        table, labels = self.recordings, self.strong_labels
        soundscapes = self.soundscape_labels
        is_annotated = soundscapes is not None and soundscapes.events is not None
        annotated = (
            [item["audio_hash"] for item in soundscapes.soundscapes] if is_annotated else None
        )
        return {
            "recordings": digest(table[_LEARNT].to_csv(index=False)),
            "audio": digest("\n".join(table["sha256"])) if "sha256" in table else None,
            "lengths": digest(table["seconds"].to_csv(index=False)),
            "folds": digest(table[["filename", "fold"]].to_csv(index=False)),
            "noise": digest_noise(self.noise_files),
            "other_birds": digest_noise(self.other_birds) if self.other_birds else None,
            "soundscapes": None if soundscapes is None else soundscapes.digest,
            "annotated": annotated,
            "round": None if soundscapes is None else soundscapes.round,
            "teacher": None if self.birdnet is None else self.birdnet.sha256,
            "labels": None if labels is None else digest(labels.to_csv(index=False)),
        }

    def split(self, fold: int | str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the training and the validation recordings of ``fold``; FULL: all, and none."""
        if fold == FULL:
            return self.recordings, self.recordings[:0]
        if fold not in self.folds:
            known = ", ".join(map(str, self.folds))
            raise ValueError(f"fold {fold} is out of range; the folds are {known}")
        held_out = self.recordings["fold"] == fold
        return self.recordings[~held_out], self.recordings[held_out]

    @cached_property
    def scientific_names(self) -> tuple[str, ...]:
        """Return the scientific name of each class, from its recordings if it is not of the 264."""
        return scientific_names(self.classes, self.recordings)

    def learnable_classes(self, fold: int | str) -> np.ndarray:
        """Return which classes a run that holds out ``fold`` can learn, boolean ``(classes,)``.

        By primary labels: what a secondary one teaches depends on the experiment.
        """
        return np.isin(self.classes, self.split(fold)[0]["ebird_code"].unique())

    def split_noise(self, fold: int | str) -> tuple[list[Path], list[Path]]:
        """Return the noise to train and to validate with; no source is in both."""
        return self._split_files(self.noise_files, fold)

    def split_other_birds(self, fold: int | str) -> tuple[list[Path], list[Path]]:
        """Return the sound of other birds to train and to validate with, as `split_noise`."""
        return self._split_files(self.other_birds, fold)

    def find_unlabelled(
        self, folder: Path, labelled: Sequence[Path] = ()
    ) -> dict[str, Measurement]:
        """Return the soundscapes below ``folder``, as `find_unlabelled`; examples are labelled."""
        require_folders([folder, *labelled])
        examples = self.folder / CompetitionFile.EXAMPLE_AUDIO
        return find_unlabelled(
            folder, self.recordings, [examples, *labelled], self.soundscape_cache
        )

    def _split_files(self, files: Sequence[Path], fold: int | str) -> tuple[list[Path], list[Path]]:
        if fold == FULL:
            return list(files), []
        return split_noise(files, self.folds.index(fold), len(self.folds))

    def training_part(self, fold: int | str, recordings: pd.DataFrame) -> TrainingData:
        """Return what a run that holds out ``fold`` learns from, of ``recordings``."""
        return replace(
            self,
            recordings=recordings,
            noise_files=self.split_noise(fold)[0],
            other_birds=self.split_other_birds(fold)[0],
        )

    def require_sound_for(self, experiment: Experiment) -> None:
        """Raise ValueError where ``experiment`` trains on a kind of sound that is not here.

        Also where the labels of soundscapes are its own predictions.
        """
        probability = experiment.augment.other_birds_probability
        require(
            probability == 0 or len(self.other_birds) > 0,
            f"{experiment.name} has an other_birds_probability of {probability}, and there are no "
            "other birds: give a folder of them with --other-birds",
        )
        share = experiment.train.student.share
        if share > 0:
            require(
                self.soundscape_labels is not None,
                f"{experiment.name} has a share of {share} clips of soundscapes: give their labels "
                "with --soundscape-labels; `birdcall pseudo-label --soundscapes` makes them",
            )
            self.soundscape_labels.teachers_of(experiment)
        if experiment.train.teacher.is_used:
            self.teacher_files(experiment)

    def files_to_embed(self) -> dict[str, dict[str, Path]]:
        """Return the sound that a teacher embeds: by kind, the files by name in its store."""
        files = {"recordings": {name: self.folder / name for name in self.recordings["path"]}}
        if (labels := self.soundscape_labels) is not None:
            names = [item["name"] for item in labels.soundscapes]
            files["soundscapes"] = {name: labels.folder / name for name in names}
        return files

    def teacher_files(self, experiment: Experiment) -> dict[str, list[Path]]:
        """Return the file of the embeddings of each recording, and of each soundscape if needed.

        Raises ValueError where one is missing.
        """
        require(self.birdnet is not None, f"{experiment.name} cannot be taught in a kernel")
        stored = {}
        for kind, files in self.files_to_embed().items():
            if kind == "soundscapes" and experiment.train.student.share == 0:
                continue
            store = self.birdnet.part(kind)
            stored[kind] = [store.path(name, file) for name, file in files.items()]
            pairs = zip(files.values(), stored[kind], strict=True)
            missing = [file for file, path in pairs if not path.is_file()]
            labels = " --soundscape-labels with these labels" if kind == "soundscapes" else ""
            require(
                not missing,
                f"{experiment.name} learns from BirdNET's embeddings, and {len(missing)} of "
                f"{len(files)} {kind} have none, such as {missing and missing[0]}: `birdcall embed "
                f"--data {self.folder}`{labels} makes them",
            )
        return stored


def load_training_data(
    folder: Path,
    *,
    folds: Path,
    audit: Path,
    cache: Path,
    noise: Path | None = None,
    labels: Path | None = None,
    other_birds: Path | None = None,
    soundscape_labels: Path | None = None,
) -> TrainingData:
    """Join the recordings of ``folder`` with their audit and folds; open cache and noise.

    Recordings that the audit leaves out are not included; those of another size than in the audit
    are counted in a warning. Bird-free noise is taken from ``noise``,
    else from ``noise/`` in the data folder or beside it; without any it is generated, beside the
    cache. ``labels``: a file of strong labels, from which targets are then made. ``other_birds``:
    a folder of sound of birds that are no class, None: ``other_birds/`` in the data folder if it is
    there. FileNotFoundError for a given folder without sound. ``soundscape_labels``: a file of
    `SoundscapeLabels`.
    """
    recordings = read_recordings(folder)
    classes = classes_of(recordings)
    audited = read_audit(audit)
    recordings = usable_recordings(recordings, audited)
    fold_of = read_folds(folds, recordings)[["filename", "fold"]]
    recordings = recordings.merge(fold_of, on="filename", validate="one_to_one")
    check_recordings_exist(recordings, folder)
    sizes = dict(zip(audited["path"], audited["size"], strict=True))
    paths = recordings["path"]
    changed = [path for path in paths if (folder / path).stat().st_size != sizes[path]]
    if changed:
        logger.warning(
            "%d of %d recordings have another size than in %s, such as %s: run `birdcall audit` "
            "again, which decodes those only",
            *(len(changed), len(paths), audit, changed[0]),
        )
    read_crops = RecordingCache(folder, cache)
    if n_missing := read_crops.count_missing(paths):
        logger.warning(
            "%d of %d recordings are not in the cache in %s as this version decodes them, which "
            "takes several times as long for each clip: `birdcall audit --cache` stores them",
            *(n_missing, len(paths), cache),
        )
    require_folders(filter(None, (noise, other_birds)), "recordings")
    folders = [noise] if noise is not None else [folder / "noise", folder.parent / "noise"]
    noise_files = next((files for path in folders if (files := find_noise(path))), [])
    if not noise_files:
        if noise is not None:
            raise FileNotFoundError(f"{noise}: no audio in this folder of noise")
        logger.info("%s has no noise/: wind, rain, hum and coloured noise are generated", folder)
        noise_files = generate_noise(cache.parent / "generated_noise")
    other_files = find_other_birds(other_birds or folder / "other_birds", classes, audited)
    if other_birds is not None and not other_files:
        raise FileNotFoundError(f"{other_birds}: no sound of other birds in this folder")
    soundscapes = None
    if soundscape_labels is not None:
        soundscapes = SoundscapeLabels.read(soundscape_labels, classes)
        soundscapes.cache_sound(cache / "soundscapes")
    return TrainingData(
        folder=folder,
        recordings=recordings,
        classes=classes,
        read_crops=read_crops,
        noise_files=noise_files,
        strong_labels=None if labels is None else read_strong_labels(labels, recordings, classes),
        noise_store=cache / "noise",
        other_birds=other_files,
        soundscape_labels=soundscapes,
        soundscape_cache=cache / "soundscapes",
        birdnet=WindowStore(cache / "birdnet", scientific_names(classes, recordings)),
    )


def find_other_birds(folder: Path, classes: Sequence[str], audit: pd.DataFrame) -> list[Path]:
    """List the sound below ``folder`` of birds that are no class, sorted; none if it is absent.

    Left out, and named in the log, are files in a folder that has the name of a class, and copies
    of recordings that the ``audit`` knows.
    """
    files = readable_sound(find_files(folder), "sound of other birds")
    sizes, hashes = set(audit["size"]), set(audit["sha256"])  # of the same size: few files are read
    left_out = [
        path
        for path in files
        if path.parent.name in classes
        or (path.stat().st_size in sizes and _hash_file(path) in hashes)
    ]
    if left_out:
        logger.warning(
            "other birds: %d files are left out, recordings of the data or in a folder of the name "
            "of a class: %s",
            *(len(left_out), shorten_list(left_out)),
        )
    return [path for path in files if path not in left_out]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_classes(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    classes: Sequence[str],
    fold: int | str,
    table: Path,
) -> None:
    """Warn of classes without a recording in the training or in the validation part.

    ``table`` lists them all, a row each: part, ebird_code. It is not there if none is missing. A
    run that holds out nothing has no validation part.
    """
    rows = []
    for part, recordings, consequence in (
        ("training", training, "no score of this fold covers them"),
        ("validation", validation, "its scores do not cover them"),
    ):
        missing = sorted(set(classes) - set(recordings["ebird_code"])) if len(recordings) else []
        if missing:
            logger.warning(
                "fold %s has no %s recording of %d of %d classes (%s): %s; %s lists them",
                *(fold, part, len(missing), len(classes), shorten_list(missing), consequence),
                table,
            )
        rows += [(part, code) for code in missing]
    table.unlink(missing_ok=True)  # of an earlier training
    if rows:
        text = pd.DataFrame(rows, columns=["part", "ebird_code"]).to_csv(index=False)
        write_atomically(table, text)
