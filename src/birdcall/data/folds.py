"""Split recordings into folds for cross-validation that no recordist and no sound crosses."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from birdcall.report.style import COLORS, MARKERS, ORANGE, use_style
from birdcall.storage.files import read_table, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

COLUMNS = ("filename", "ebird_code", "fold")
MAX_PASSES = 50
MAX_SWAPPED = 1000  # swaps are tried among the largest groups; small ones even out by moving
# Costs are whole numbers, so that every machine adds them up to the same sum. A class of n
# recordings weighs COST_SCALE / n**2, which makes its cost one of shares; the balance of all
# recordings together counts as much as that of TOTAL_WEIGHT classes.
COST_SCALE = 1 << 40
TOTAL_WEIGHT = 4


def make_folds(
    recordings: pd.DataFrame,
    n_folds: int = 5,
    seed: int = 0,
    same_sound: Sequence[object] | None = None,
) -> pd.DataFrame:
    """Assign each recording to one of ``n_folds``; return filename, ebird_code and fold.

    Recordings of one recordist stay together, and those with an equal ``same_sound`` entry (such
    as the audit's hash of what was decoded; one per recording, missing: unlike all others). A
    recording without a recordist is on its own.

    The algorithm is our own, in integers, so that no library version changes a committed file.
    The cost of an assignment is, summed over classes and folds, the squared distance between the
    share of the class that is in the fold and 1 / n_folds. (1) Groups are taken from the largest
    down, equal ones in the order of a hash of seed and name, and each goes where it costs least.
    (2) Then groups move, and large ones trade places, while that costs less. (3) A class that has
    ended up whole in one fold though it has several groups is divided: every training part should
    know every class.

    On the 43,934 real recordings with a long tail of recordists each species is within 0.04 of
    1 / n_folds in every fold, or 1 / n of its n recordings, plus what its largest recordist has
    more than 1 / n_folds. The result depends on the set of recordings, not on their order.

    Raises ValueError for fewer groups than folds; warns of what the recordists make impossible.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds is {n_folds}; at least 2 are needed to validate on one")
    recordings = recordings.assign(group=_join_groups(recordings, same_sound))
    recordings = recordings.sort_values(["ebird_code", "filename"], ignore_index=True)
    names = _order_groups(recordings["group"], seed)
    if len(names) < n_folds:
        raise ValueError(
            f"n_folds is {n_folds}, but there are only {len(names)} recordists; "
            "a recordist must not be in two folds"
        )
    counts = _count_classes(recordings, names)
    placed = _Assignment(counts, n_folds)
    placed.improve()
    placed.divide_classes()
    fold_of = dict(zip(names, placed.folds.tolist(), strict=True))
    folds = recordings[["filename", "ebird_code"]].assign(fold=recordings["group"].map(fold_of))
    _warn_of_limits(recordings, folds)
    return folds


class _Assignment:
    """Groups in folds, and what it costs; ``counts`` is ``(groups, classes)``, largest first."""

    def __init__(self, counts: np.ndarray, n_folds: int) -> None:
        self.n_folds = n_folds
        self.class_groups = (counts > 0).sum(axis=0)
        self.counts = np.column_stack([counts, counts.sum(axis=1)])  # "all" is one more class
        self.sizes = self.counts.sum(axis=0)
        self.weights = COST_SCALE // self.sizes**2
        self.weights[-1] *= TOTAL_WEIGHT
        self.members = [np.flatnonzero(row) for row in self.counts]
        # How many recordings each fold has too many of a class, times n_folds: (classes, folds).
        self.excess = -np.repeat(self.sizes[:, None], n_folds, axis=1)
        self.folds = np.full(len(counts), -1)
        for group in range(len(counts)):
            self._put(group, int(np.argmin(self._slopes(group))))

    def improve(self) -> None:
        """Move and swap groups while that costs less, at most MAX_PASSES times."""
        for _ in range(MAX_PASSES):
            if not self._move_all() and not self._swap_large():
                return

    def divide_classes(self) -> None:
        """Move the group that costs least out of each fold that holds all of a class, if it can."""
        for whole in np.flatnonzero(self._undivided()).tolist():
            before = self._undivided()
            moves = [
                (int(slopes[fold] - slopes[self.folds[group]]), group, fold)
                for group in np.flatnonzero(self.counts[:, whole]).tolist()
                for slopes in [self._slopes(group)]
                for fold in range(self.n_folds)
                if fold != self.folds[group]
            ]
            for _, group, fold in sorted(moves):
                home = self._take(group)
                self._put(group, fold)
                after = self._undivided()
                if not after[whole] and after.sum() < before.sum():
                    break
                self._take(group)
                self._put(group, home)

    def _slopes(self, group: int) -> np.ndarray:
        """Return ``(folds,)``: how dear the group would be in each fold, up to a constant."""
        members = self.members[group]
        return (self.weights[members] * self.counts[group, members]) @ self.excess[members]

    def _put(self, group: int, fold: int) -> None:
        members = self.members[group]
        self.excess[members, fold] += self.n_folds * self.counts[group, members]
        self.folds[group] = fold

    def _take(self, group: int) -> int:
        members, fold = self.members[group], int(self.folds[group])
        self.excess[members, fold] -= self.n_folds * self.counts[group, members]
        return fold

    def _move_all(self) -> int:
        """Put each group where it costs least; return how many moved."""
        n_moved = 0
        for group in range(len(self.folds)):
            home = self._take(group)
            slopes = self._slopes(group)
            best = int(np.argmin(slopes))
            moves = bool(slopes[best] < slopes[home])
            self._put(group, best if moves else home)
            n_moved += moves
        return n_moved

    def _swap_large(self) -> int:
        """Swap each of the largest groups with the one that gains most; return how many did."""
        counts = self.counts[:MAX_SWAPPED]
        weighted = counts * self.weights
        overlap = weighted @ counts.T
        own = np.diag(overlap)
        slopes, n_swapped = weighted @ self.excess, 0
        for group in range(len(counts)):
            home, folds = self.folds[group], self.folds[:MAX_SWAPPED]
            there = slopes[group, folds] - slopes[group, home]
            back = slopes[:, home] - slopes[np.arange(len(counts)), folds]
            change = there + back + self.n_folds * (own[group] + own - 2 * overlap[group])
            change[folds == home] = 0
            partner = int(np.argmin(change))
            if change[partner] < 0:
                self._take(group), self._take(partner)
                fold = int(folds[partner])
                self._put(group, fold), self._put(partner, int(home))
                slopes = weighted @ self.excess
                n_swapped += 1
        return n_swapped

    def _undivided(self) -> np.ndarray:
        """Return ``(classes,)``: whether one fold holds all of a class that has several groups."""
        in_fold = (self.excess + self.sizes[:, None]) // self.n_folds
        return (in_fold.max(axis=1) == self.sizes)[:-1] & (self.class_groups > 1)


def check_folds(
    folds: pd.DataFrame,
    recordings: pd.DataFrame,
    same_sound: Sequence[object] | None = None,
) -> None:
    """Raise ValueError naming the first recordist, or the first sound, that is in two folds."""
    joined = recordings.assign(sound=_sounds(recordings, same_sound))
    joined = joined.merge(folds[["filename", "fold"]], on="filename")
    joined["recordist"] = _recordist_keys(joined)
    for column, kind in (("recordist", "recordist"), ("sound", "sound")):
        known = joined[joined[column].notna()]
        n_folds = known.groupby(column)["fold"].nunique()
        for name in n_folds.index[n_folds > 1][:1]:
            rows = known[known[column] == name].drop_duplicates("fold").head(2)
            where = " and ".join(
                f"fold {row.fold} ({row.filename})" for row in rows.itertuples(index=False)
            )
            raise ValueError(
                f"folds leak: the {kind} {name} is in {where}; "
                f"{int((n_folds > 1).sum())} of {len(n_folds)} are in more than one fold"
            )


def write_folds(folds: pd.DataFrame, path: Path) -> None:
    """Write filename, ebird_code and fold, whole or not at all."""
    write_atomically(path, folds[list(COLUMNS)].to_csv(index=False, lineterminator="\n"))


def read_folds(path: Path, recordings: pd.DataFrame, n_folds: int | None = None) -> pd.DataFrame:
    """Read the folds of ``recordings`` back and check that they are theirs and do not leak.

    Recordings that the file does not list were left out when it was made, by the audit; a listed
    one that is not among ``recordings`` is an error, as are other species or numbers of folds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folds; `birdcall folds` makes them")
    folds = read_table(path, COLUMNS)
    bad = folds[~folds["fold"].str.fullmatch(r"[0-9]{1,3}")]
    if len(bad):
        raise ValueError(
            f"{path}, line {bad.index[0]}: fold is {bad['fold'].iloc[0]!r}; expected 0, 1, 2, ..."
        )
    folds["fold"] = folds["fold"].astype(int)
    codes = dict(zip(recordings["filename"], recordings["ebird_code"], strict=True))
    first_lines: dict[str, int] = {}
    for row in folds.itertuples():
        if row.filename in first_lines:
            first = first_lines[row.filename]
            raise ValueError(f"{path}, line {row.Index}: {row.filename} is in line {first} already")
        if codes.get(row.filename) != row.ebird_code:
            known = codes.get(row.filename)
            reason = f"of {known} there" if known else "not in this data set"
            raise ValueError(
                f"{path}, line {row.Index}: {row.filename} of {row.ebird_code} is {reason}; "
                "make folds for this data set with `birdcall folds`"
            )
        first_lines[row.filename] = row.Index
    found = sorted(set(folds["fold"]))
    if found != list(range(n_folds or len(found))) or len(found) < 2:
        expected = f"0 to {n_folds - 1}" if n_folds else "0, 1, 2, ... without a gap"
        raise ValueError(f"{path}: has folds {', '.join(map(str, found))}; expected {expected}")
    if len(folds) < len(recordings):
        log.info("%s leaves out %d recordings", path, len(recordings) - len(folds))
    check_folds(folds, recordings)
    return folds[list(COLUMNS)].reset_index(drop=True)


def fold_report(folds: pd.DataFrame, recordings: pd.DataFrame) -> pd.DataFrame:
    """Return one row per fold: its recordings and recordists, and how even its classes are.

    ``lowest_share`` and ``highest_share`` are the smallest and largest part of any species that is
    in the fold; ``unknown_to_training`` counts species that no other fold has.
    """
    joined = folds.merge(recordings[["filename", "recordist", "duration"]], on="filename")
    joined["recordist"] = _recordist_keys(joined)
    shares = class_shares(folds)
    rows = []
    for fold, part in joined.groupby("fold"):
        recordists = part["recordist"].value_counts()
        rows.append(
            {
                "fold": fold,
                "recordings": len(part),
                "share": len(part) / len(joined),
                "hours": part["duration"].sum() / 3600,
                "recordists": len(recordists) + int(part["recordist"].isna().sum()),
                "largest_recordist": recordists.max() / len(part) if len(recordists) else 0.0,
                "species": int((shares[fold] > 0).sum()),
                "lowest_share": shares[fold].min(),
                "highest_share": shares[fold].max(),
                "unknown_to_training": int((shares[fold] == 1).sum()),
            }
        )
    return pd.DataFrame(rows).set_index("fold")


def class_shares(folds: pd.DataFrame) -> pd.DataFrame:
    """Return which share of each ebird_code (rows) is in each fold (columns)."""
    return pd.crosstab(folds["ebird_code"], folds["fold"], normalize="index")


def plot_folds(folds: pd.DataFrame, recordings: pd.DataFrame) -> Figure:
    """Draw each species' share in each fold against an equal share, and the folds' recordists."""
    use_style()
    from matplotlib.figure import Figure

    shares, report = class_shares(folds), fold_report(folds, recordings)
    sizes = folds["ebird_code"].value_counts().reindex(shares.index)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    for order, fold in enumerate(shares.columns):
        color, marker = COLORS[order % len(COLORS)], MARKERS[order % len(MARKERS)]
        left.scatter(
            sizes, shares[fold], s=18, alpha=0.7, color=color, marker=marker, label=f"fold {fold}"
        )
    left.axhline(1 / len(shares.columns), color="black", linewidth=1, label="equal share")
    left.set(xscale="log", xlabel="recordings of the species", ylabel="share in the fold")
    left.set_title(f"{len(shares)} species: how evenly each is divided", loc="left")
    left.legend(fontsize="small")
    names = [str(fold) for fold in report.index]
    right.bar(names, report["recordings"], color="0.8", label="all")
    largest = report["recordings"] * report["largest_recordist"]
    right.bar(
        names, largest, color=ORANGE, hatch="//", ec="white", label="by the largest recordist"
    )
    right.set(xlabel="fold", ylabel="recordings", ylim=(0, 1.25 * report["recordings"].max()))
    right.legend(fontsize="small")
    return figure


def _join_groups(recordings: pd.DataFrame, same_sound: Sequence[object] | None) -> list[str]:
    """Name the group of each recording: the first, by name, of all that it is connected with."""
    recordists = _recordist_keys(recordings)
    keys = [
        f"file:{filename}" if pd.isna(recordist) else f"recordist:{recordist}"
        for filename, recordist in zip(recordings["filename"], recordists, strict=True)
    ]
    parents = {key: key for key in keys}

    def root(key: str) -> str:
        while parents[key] != key:
            parents[key] = key = parents[parents[key]]
        return key

    first_of_sound: dict[object, str] = {}
    for key, sound in zip(keys, _sounds(recordings, same_sound), strict=True):
        if not pd.isna(sound):
            first, second = sorted([root(first_of_sound.setdefault(sound, key)), root(key)])
            parents[second] = first
    return [root(key) for key in keys]


def recordist_clusters(recordings: pd.DataFrame) -> pd.Series:
    """Return whose each recording is; one whose recordist is unknown is a cluster of its own."""
    return _recordist_keys(recordings).fillna("unknown: " + recordings["path"])


def _recordist_keys(recordings: pd.DataFrame) -> pd.Series:
    """Write recordists alike, so that spaces and capitals make no second person; unknown: NA."""
    names = recordings["recordist"].fillna("").astype(str)
    return names.map(lambda name: " ".join(name.split()).casefold() or None)


def _sounds(recordings: pd.DataFrame, same_sound: Sequence[object] | None) -> list[object]:
    sounds = [None] * len(recordings) if same_sound is None else list(same_sound)
    if len(sounds) != len(recordings):
        raise ValueError(f"same_sound has {len(sounds)} entries for {len(recordings)} recordings")
    return [None if pd.isna(sound) or sound == "" else sound for sound in sounds]


def _order_groups(groups: pd.Series, seed: int) -> list[str]:
    """Order groups from the largest down, equal ones by a hash that no Python version changes."""
    sizes = groups.value_counts().to_dict()

    def key(name: str) -> tuple[int, bytes]:
        return -sizes[name], hashlib.sha256(f"{seed}:{name}".encode()).digest()

    return sorted(sizes, key=key)


def _count_classes(recordings: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Count the recordings ``(groups, classes)``."""
    classes = sorted(set(recordings["ebird_code"]))
    rows = recordings["group"].map({name: index for index, name in enumerate(names)})
    columns = recordings["ebird_code"].map({code: index for index, code in enumerate(classes)})
    counts = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(counts, (rows.to_numpy(), columns.to_numpy()), 1)
    return counts


def _warn_of_limits(recordings: pd.DataFrame, folds: pd.DataFrame) -> None:
    shares = class_shares(folds)
    whole = list(shares.index[shares.max(axis=1) == 1])
    if whole:
        groups = recordings.groupby("ebird_code")["group"].nunique()
        lone = sum(groups[code] == 1 for code in whole)
        shown = ", ".join(whole[:5]) + (", ..." if len(whole) > 5 else "")
        log.warning(
            "%d of %d species are in one fold only, %d of them because one recordist has them all: "
            "the model that is validated on that fold never hears them (%s)",
            len(whole), len(shares), lone, shown,
        )  # fmt: skip
