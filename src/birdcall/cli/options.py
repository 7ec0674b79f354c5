"""Options that several commands share, and the files that they stand for."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from birdcall.config import FULL

if TYPE_CHECKING:
    from birdcall.data.dataset import TrainingData

logger = logging.getLogger(__name__)

_DATA_NOTE = "data_folder.txt"

Data = Annotated[
    Path, typer.Option(help="Data folder in the layout of the competition.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option(help="Folder for the results.", show_default="output/<name of the data folder>"),
]
Folds = Annotated[
    Path | None,
    typer.Option(help="CSV file of the folds.", show_default="folds/<name of the data folder>.csv"),
]
Noise = Annotated[
    Path | None,
    typer.Option(
        help="Folder of recordings without birds.",
        show_default="noise/ in the data folder or beside it",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="Pseudo-labels, written by `birdcall pseudo-label`.",
        show_default="the labels in train.csv",
    ),
]
SoundscapeLabels = Annotated[
    Path | None,
    typer.Option(
        help="Labels of soundscapes, written by `birdcall pseudo-label --soundscapes`.",
        show_default="none",
    ),
]
MustNotOverlap = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of labelled soundscapes that must share no sound with the unlabelled ones. "
        "May be repeated.",
        show_default="the examples in the data folder",
    ),
]
OtherBirds = Annotated[
    Path | None,
    typer.Option(
        help="Folder of recordings of birds that are no class.",
        show_default="other_birds/ in the data folder",
    ),
]
Init = Annotated[
    Path | None,
    typer.Option(
        help="Initial weights: a .safetensors or .pth file.", show_default="timm's weights"
    ),
]
Trained = Annotated[
    list[str] | None,
    typer.Option(help="A trained experiment. May be repeated.", show_default="all trained ones"),
]
Fold = Annotated[str, typer.Option(help="Number of the held-out fold, or all.")]
Unlabelled = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of soundscapes of the site without labels, or of other birds: a name must be "
        "more probable than its species is in them. May be repeated.",
        show_default="none",
    ),
]
Labelled = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of labelled soundscapes: the examples of the competition, recordings with "
        "Raven or Audacity tables or CSV (BirdNET-Analyzer, birdcall predict), annotations.csv of "
        "the Cornell Lab's collections, or the labels of BirdCLEF 2021 or 2026. May be repeated.",
        show_default="the examples in the data folder",
    ),
]
BirdNET = Annotated[
    bool,
    typer.Option(
        "--birdnet",
        help="Predict with BirdNET 2.4 (the extra birdnet), whose weights are "
        "under CC BY-NC-SA 4.0: labels and weights that come from it are derived, non-commercial "
        "and share alike.",
    ),
]
WindowSegments = Annotated[
    int, typer.Option(min=1, help="Number of 5-second segments in one input of the network.")
]
ContextSeconds = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds of audio before and after the window, also input, in steps of 0.1."
    ),
]

Shifts = Annotated[
    int,
    typer.Option(
        min=1,
        help="Average each segment over windows that begin so often in its 5 s: a divisor of 50.",
    ),
]

LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of Raven and CSV tables with the labels.",
        show_default="Species Code, Species, Annotation, ...",
    ),
]


class Folders:
    """The files and folders of a data set: those that were given, else their default names.

    Default names are those of the data folder without its parents. ValueError where they would be
    those of another data folder: the audit has noted which one the output folder belongs to.
    """

    def __init__(self, data: Path, output: Path | None, folds: Path | None = None) -> None:
        self.data = data
        self.name = data.resolve().name
        self.output = output or self._default_output()
        self._folds = folds
        self.data_note = self.output / _DATA_NOTE  # the path of the data folder
        self.runs = self.output / "runs"
        self.audit = self.output / "audit.csv"
        self.cache = self.output / "cache"
        self.prediction_cache = self.output / "predictions"
        self.benchmark = self.output / "benchmark"
        self.decision = self.output / "decision.json"
        self.submission = self.output / "submission.csv"

    @property
    def folds(self) -> Path:
        if self._folds is None:
            self._default_output()  # the default files of folds belong to the same data folders
        return self._folds or Path("folds") / f"{self.name}.csv"

    def _default_output(self) -> Path:
        output = Path("output") / self.name
        note = output / _DATA_NOTE
        noted = Path(os.fsdecode(note.read_bytes())) if note.is_file() else self.data.resolve()
        if noted == self.data.resolve():
            return output
        if noted.is_dir():
            raise ValueError(
                f"{output} holds the results of {noted}, another folder of this name; give "
                f"--output and --folds to {self.data}"
            )
        logger.warning("%s was moved to %s, or is another folder of this name", noted, self.data)
        return output

    def load_training_data(
        self, noise: Path | None = None, labels: Path | None = None, **sources: Path | None
    ) -> TrainingData:
        """Load what the commands train on and score with; ``sources``: see the function itself."""
        from birdcall.data.dataset import load_training_data

        return load_training_data(
            self.data,
            folds=self.folds,
            audit=self.audit,
            cache=self.cache,
            noise=noise,
            labels=labels,
            **sources,
        )


def parse_fold(fold: str) -> int | str | None:
    """Return the number of a fold, FULL, or None for all folds."""
    if fold in ("all", FULL):
        return None if fold == "all" else FULL
    if not fold.isdigit():
        raise ValueError(f"--fold is {fold!r}; give the number of a fold, all, or {FULL}")
    return int(fold)
