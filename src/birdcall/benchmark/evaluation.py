"""Time an evaluation of many soundscapes from stored outputs, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from birdcall.benchmark.timing import peak_megabytes

from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.decision_search import search_decision
from birdcall.evaluation.predictions import (
    LabelledPredictions,
    PredictionCache,
    predict_cached,
    segment_table,
)
from birdcall.evaluation.tables import (
    ENSEMBLE,
    SIMULATED,
    Rows,
    ScoreSubject,
    decided_rows,
    ranked_rows,
    share_weights,
    tidy_table,
    wide_table,
)
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import Member, load_ensemble
from birdcall.inference.predictions import SegmentPredictions, concatenate
from birdcall.inference.windows import SINGLE_SEGMENT
from birdcall.models.checkpoint import Checkpoint, find_checkpoints, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.storage.files import write_atomically
from birdcall.taxonomy import all_species

NOCALL_SHARE = 0.54
TOGETHER = (0.7, 0.25, 0.05)  # of rows with birds, so many have one, two and three
SETTINGS_FILE = "settings.json"
RESULT_FILE = "evaluation.json"
BENCHMARKED = "small_plain"  # the network does not matter: its outputs are made up


@dataclass(frozen=True)
class Size:
    """How much is evaluated."""

    n_soundscapes: int
    n_segments: int  # of each
    n_classes: int
    n_members: int

    @property
    def names(self) -> list[str]:
        return [f"soundscape{k:04d}" for k in range(self.n_soundscapes)]


def benchmark_evaluation(
    folder: Path,
    n_soundscapes: int = 150,
    seconds: float = 600.0,
    n_classes: int = 264,
    n_members: int = 5,
) -> pd.DataFrame:
    """Make up members' outputs and evaluate them in a fresh process; return what that took.

    The process reads the outputs as `birdcall evaluate` does, chooses the decision of each member
    and of all together (nested over groups of soundscapes) and makes the table. Columns: rows,
    members, classes, seconds (wall, with the start of Python), peak_gigabytes (of memory), and the
    scores, so that one sees that there was something to choose.
    """
    size = Size(n_soundscapes, int(seconds // SEGMENT_SECONDS), n_classes, n_members)
    if n_classes > len(all_species()):
        raise ValueError(f"n_classes is {n_classes}; there are {len(all_species())} species")
    place = folder / "made-up-outputs"
    shutil.rmtree(place, ignore_errors=True)
    make_outputs(place, size)
    start = time.perf_counter()
    code = "import sys; from birdcall.benchmark.evaluation import run; run(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(place)], check=True)
    wall_seconds = time.perf_counter() - start
    result = json.loads((place / RESULT_FILE).read_text(encoding="utf-8"))
    row = {
        "soundscapes": n_soundscapes,
        "rows": n_soundscapes * size.n_segments,
        "classes": n_classes,
        "members": n_members,
        "seconds": round(wall_seconds, 1),
        "peak_gigabytes": round(result["peak_gigabytes"], 2),
        **{name: round(value, 3) for name, value in result["scores"].items()},
    }
    return pd.DataFrame([row])


def make_outputs(folder: Path, size: Size) -> None:
    """Write checkpoints and, as if they had heard them, their outputs on all soundscapes."""
    classes = tuple(species.ebird_code for species in all_species()[: size.n_classes])
    truth = make_truth(size)
    generator = np.random.default_rng(1)
    # What all members hear alike: mostly nothing, birds more or less, and some for another.
    heard = generator.normal(-6, 1.2, truth.shape).astype(np.float32)
    heard[truth] += generator.normal(6, 2.5, truth.sum())
    confused = generator.random(len(truth)) < 0.15
    heard[confused, generator.integers(size.n_classes, size=confused.sum())] += 5
    for number in range(size.n_members):
        member = _save_member(folder, number, classes)
        logits = heard + generator.normal(0, 0.8, truth.shape).astype(np.float32)
        clipwise = 1 / (1 + np.exp(-logits))
        framewise = 1 / (1 + np.exp(-(logits + generator.normal(0.7, 0.4, truth.shape))))
        together = SegmentPredictions(
            clipwise[None],
            framewise[None].astype(np.float32),
            starts=tuple(range(0, len(truth), size.n_segments)),
            recording_seconds=(float(SEGMENT_SECONDS * size.n_segments),) * size.n_soundscapes,
        )
        predictions = dict(zip(size.names, together.split(), strict=True))
        _cache(folder).write(member, SINGLE_SEGMENT, predictions)
    write_atomically(folder / SETTINGS_FILE, json.dumps(vars(size)))


def make_truth(size: Size) -> np.ndarray:
    """Return made-up truth ``(rows, classes)``: uneven species, and 54 % of the rows empty."""
    generator = np.random.default_rng(0)
    n_rows = size.n_soundscapes * size.n_segments
    prior = generator.pareto(1.0, size.n_classes) + 0.1
    truth = np.zeros((n_rows, size.n_classes), dtype=bool)
    for row in np.flatnonzero(generator.random(n_rows) >= NOCALL_SHARE):
        n_birds = 1 + generator.choice(len(TOGETHER), p=TOGETHER)
        n_birds = min(n_birds, size.n_classes)
        birds = generator.choice(
            size.n_classes, n_birds, replace=False, p=prior / prior.sum(), shuffle=False
        )
        truth[row, birds] = True
    return truth


def _save_member(folder: Path, number: int, classes: tuple[str, ...]) -> Member:
    torch.manual_seed(number)
    experiment = find_experiment(BENCHMARKED)
    model = build_model(experiment, len(classes)).eval()
    checkpoint = Checkpoint(experiment, classes, number)
    saved = save_checkpoint(folder / "runs" / f"fold{number}", model, checkpoint)
    return Member(saved.name, model, saved)


def _cache(folder: Path) -> PredictionCache:
    return PredictionCache(folder / "predictions", "soundscapes", "made up")


# --- what the fresh process does ------------------------------------------------------------------


def run(folder: str) -> None:
    """Evaluate what is stored in ``folder``; leave there what it took and found."""
    place = Path(folder)
    size = Size(**json.loads((place / SETTINGS_FILE).read_text(encoding="utf-8")))
    scores = read_scores(place, size)
    weights = share_weights(scores.labelled_truth, NOCALL_SHARE)
    rows: Rows = []
    found = {}
    sets = {f"member {k}": [k] for k in range(size.n_members)}
    for name, positions in {**sets, ENSEMBLE: range(size.n_members)}.items():
        part = scores.for_members(list(positions))
        search = search_decision(part, weights, start=Decision(classes=scores.classes))
        subject = ScoreSubject(name, len(part.member_names), SIMULATED)
        rows += decided_rows(subject, part, search.cross_validated, weights)
        rows += ranked_rows(subject, part)
        found[name] = float(np.average(search.cross_validated_f1, weights=weights))
    table = wide_table(tidy_table(rows)).to_string(index=False)
    peak = peak_megabytes() / 1000
    result = {
        "peak_gigabytes": peak,
        "scores": {"all_nocall": NOCALL_SHARE, "member_0": found["member 0"]}
        | {ENSEMBLE: found[ENSEMBLE]},
        "table": table,
    }
    write_atomically(place / RESULT_FILE, json.dumps(result))


def read_scores(folder: Path, size: Size) -> LabelledPredictions:
    """Read the members' outputs, each soundscape a group of its own."""

    def unheard(rates: object) -> dict[int, np.ndarray]:
        raise RuntimeError("the outputs are not where they were stored")

    ensemble = load_ensemble(find_checkpoints(folder / "runs"))
    predictions = predict_cached(ensemble, dict.fromkeys(size.names, unheard), _cache(folder))
    parts = [
        segment_table(name, size.n_segments, is_labelled=True, group=name) for name in size.names
    ]
    return LabelledPredictions(
        segments=pd.concat(parts, ignore_index=True),
        truth=make_truth(size),
        predictions=concatenate(list(predictions.values())),
        member_names=tuple(member.name for member in ensemble.members),
        classes=ensemble.classes,
    )
