"""Split recordings into folds for cross-validation; all recordings of a recordist share a fold."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from birdcall.storage.files import read_table, shorten_list, write_atomically

logger = logging.getLogger(__name__)

_COLUMNS = ("filename", "ebird_code", "fold")
# In place of a fold's number: in every training part, held out in none, as in scikit-learn's
# `PredefinedSplit`.
TRAINING_ONLY = -1
_MAX_PASSES = 50
_MAX_SWAPPED = 1000  # swaps are tried among the largest groups; small groups even out by moving
# Costs are integers: every machine adds them up to the same sum. A class of n recordings weighs
# _COST_SCALE / n**2, which makes its cost one of shares; the balance of all recordings together
# counts as much as that of _TOTAL_WEIGHT classes.
_COST_SCALE = 1 << 40
_TOTAL_WEIGHT = 4

# scikit-learn's StratifiedGroupKFold(shuffle=True) respects the recordists too. Ours stays for two
# reasons. (1) Published folds must come out with the same bytes under every library version.
# (2) It is more even, because groups may still move after the greedy assignment. Deviation of a
# class's share in a fold from 1 / n_folds, mean over classes of the largest, ours against theirs
# (docs/decisions.md): 0.072 against 0.101 on the demo (largest of all 0.133 against 0.217), 0.0081
# against 0.0106 on the 43,934 real recordings. Both need less than 2 seconds there.


def make_folds(
    recordings: pd.DataFrame,
    n_folds: int = 5,
    seed: int = 0,
    audio_hashes: Sequence[object] | None = None,
    min_recordings: int = 1,
) -> pd.DataFrame:
    """Assign each recording to one of ``n_folds``; return filename, ebird_code and fold.

    Recordings of one recordist share a fold, and so do recordings with equal ``audio_hashes``
    (such as the audit's hash of the decoded audio; one per recording, missing: unlike all others).
    A recording without a recordist is a group of its own.

    From ``min_recordings`` of 2 on, no fold holds out rare species, those with fewer recordings or
    with a single group: their recordings are TRAINING_ONLY, whoever made them, and so is what has
    the same audio. A recordist's other recordings are held out, without one of a rare species.

    The cost of an assignment is the sum over classes and folds of the squared difference between
    the share of the class that is in the fold and 1 / n_folds. (1) Groups are assigned from the
    largest to the smallest, equal sizes in the order of a hash of seed and name, each to the fold
    with the lowest cost. (2) Groups move to another fold, and large groups swap folds, while that
    lowers the cost. (3) A class that is completely in one fold although it has several groups is
    divided, so that every training part contains every class.

    On the 43,934 real recordings with a long tail of recordists the share of each species in each
    fold is within 0.04 of 1 / n_folds, or within 1 / n for a species of n recordings, plus what its
    largest recordist has more than 1 / n_folds. The result does not depend on the order of rows.

    Raises ValueError for fewer groups than folds; warns of species that cannot be divided.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds is {n_folds}; at least 2 are needed to validate on one")
    recordings = recordings.assign(group=_join_groups(recordings, audio_hashes))
    is_rare = _find_training_only(recordings, audio_hashes, min_recordings)
    recordings = recordings.assign(is_rare=is_rare)
    recordings = recordings.sort_values(["ebird_code", "filename"], ignore_index=True)
    folds = recordings[["filename", "ebird_code"]].assign(fold=TRAINING_ONLY)
    recordings = recordings[~recordings["is_rare"]]
    sizes = recordings["group"].value_counts().to_dict()
    # Not Python's hash, which differs between versions and processes.
    hashes = {name: hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in sizes}
    names = sorted(sizes, key=lambda name: (-sizes[name], hashes[name]))
    if len(names) < n_folds:
        of_species = f" of species with {min_recordings} recordings (ask for fewer)"
        of_species = of_species if min_recordings > 1 else ""
        raise ValueError(
            f"n_folds is {n_folds}, but there are only {len(names)} recordists{of_species}; "
            "a recordist must not be in two folds"
        )
    counts = pd.crosstab(recordings["group"], recordings["ebird_code"]).loc[names].to_numpy()
    assignment = _Assignment(counts, n_folds)
    for _ in range(_MAX_PASSES):
        if not assignment.move_groups() and not assignment.swap_large_groups():
            break
    assignment.divide_classes()
    fold_of = dict(zip(names, assignment.folds.tolist(), strict=True))
    folds.loc[recordings.index, "fold"] = recordings["group"].map(fold_of)
    _warn_of_undivided(recordings, folds)
    return folds


def check_folds(
    folds: pd.DataFrame,
    recordings: pd.DataFrame,
    audio_hashes: Sequence[object] | None = None,
) -> None:
    """Raise ValueError naming the first recordist or audio hash that is in two folds.

    TRAINING_ONLY counts as a fold of audio, but not of a recordist: see `make_folds`.
    """
    joined = recordings.assign(audio=_known_hashes(recordings, audio_hashes))
    joined = joined.merge(folds[["filename", "fold"]], on="filename")
    joined["recordist"] = _recordist_keys(joined).where(joined["fold"] != TRAINING_ONLY)
    for column in ("recordist", "audio"):
        known = joined[joined[column].notna()]
        n_folds = known.groupby(column)["fold"].nunique()
        leaks = n_folds.index[n_folds > 1]
        if len(leaks):
            rows = known[known[column] == leaks[0]].drop_duplicates("fold").head(2)
            where = " and ".join(
                f"fold {row.fold} ({row.filename})" for row in rows.itertuples(index=False)
            )
            raise ValueError(
                f"folds leak: the {column} {leaks[0]} is in {where}; "
                f"{len(leaks)} of {len(n_folds)} are in more than one fold"
            )


def write_folds(folds: pd.DataFrame, path: Path) -> None:
    """Write filename, ebird_code and fold, whole or not at all."""
    write_atomically(path, folds[list(_COLUMNS)].to_csv(index=False, lineterminator="\n"))


def read_folds(path: Path, recordings: pd.DataFrame, n_folds: int | None = None) -> pd.DataFrame:
    """Read the folds of ``recordings`` and check that they belong to them and do not leak.

    Recordings that the file does not list were left out by the audit when it was written; a listed
    recording that is not among ``recordings`` is an error, as is another species or another number
    of folds. Raises FileNotFoundError, or ValueError that names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folds; `birdcall folds` makes them")
    folds = read_table(path, _COLUMNS)
    invalid = folds[~folds["fold"].str.fullmatch(r"-1|[0-9]{1,3}")]
    if len(invalid):
        line, value = invalid.index[0], invalid["fold"].iloc[0]
        raise ValueError(
            f"{path}, line {line}: fold is {value!r}; expected 0, 1, 2, ... or "
            f"{TRAINING_ONLY}, which is in every training part"
        )
    folds["fold"] = folds["fold"].astype(int)
    codes = dict(zip(recordings["filename"], recordings["ebird_code"], strict=True))
    first_lines: dict[str, int] = {}
    for row in folds.itertuples():
        first = first_lines.setdefault(row.filename, row.Index)
        if first != row.Index:
            raise ValueError(f"{path}, line {row.Index}: {row.filename} is in line {first} already")
        known = codes.get(row.filename)
        if known != row.ebird_code:
            reason = f"of {known} there" if known else "not in this data set"
            raise ValueError(
                f"{path}, line {row.Index}: {row.filename} of {row.ebird_code} is {reason}; "
                "make folds for this data set with `birdcall folds`"
            )
    numbers = sorted(set(folds["fold"]) - {TRAINING_ONLY})
    if numbers != list(range(n_folds or len(numbers))) or len(numbers) < 2:
        expected = f"0 to {n_folds - 1}" if n_folds else "0, 1, 2, ... without a gap"
        raise ValueError(f"{path}: has folds {', '.join(map(str, numbers))}; expected {expected}")
    if left_out := sorted(codes.keys() - first_lines.keys()):
        message = "%s does not list %d usable recordings, which are left out: %s"
        logger.warning(message, path, len(left_out), shorten_list(left_out))
    check_folds(folds, recordings)
    return folds[list(_COLUMNS)].reset_index(drop=True)


def fold_report(folds: pd.DataFrame, recordings: pd.DataFrame) -> pd.DataFrame:
    """Return one row per fold: its recordings and recordists, and how even its classes are.

    ``lowest_share`` and ``highest_share`` are the smallest and largest share of any species that is
    in the fold; ``unknown_to_training`` counts species of which the training has no recording.
    ``share`` is that of all recordings, also of those for training only, which have no row.
    """
    lengths = "seconds" if "seconds" in recordings else "duration"  # of the audit, or of the table
    joined = folds.merge(recordings[["filename", "recordist", lengths]], on="filename")
    joined["recordist"] = _recordist_keys(joined)
    shares, unknown = class_shares(folds), _unknown_to_training(folds)
    rows = []
    for fold, part in joined[joined["fold"] != TRAINING_ONLY].groupby("fold"):
        recordists = part["recordist"].value_counts()
        rows.append(
            {
                "fold": fold,
                "recordings": len(part),
                "share": len(part) / len(joined),
                "hours": part[lengths].sum() / 3600,
                "recordists": len(recordists) + int(part["recordist"].isna().sum()),
                "largest_recordist": recordists.max() / len(part) if len(recordists) else 0.0,
                "species": int((shares[fold] > 0).sum()),
                "lowest_share": shares[fold].min(),
                "highest_share": shares[fold].max(),
                "unknown_to_training": int((unknown == fold).sum()),
            }
        )
    return pd.DataFrame(rows).set_index("fold")


def class_shares(folds: pd.DataFrame) -> pd.DataFrame:
    """Return which share of each held-out ebird_code (rows) is in each fold (columns)."""
    folds = folds[folds["fold"] != TRAINING_ONLY]
    return pd.crosstab(folds["ebird_code"], folds["fold"], normalize="index")


def _unknown_to_training(folds: pd.DataFrame) -> pd.Series:
    """Return the fold of each species, by ebird_code, that no other training part has."""
    of_species = folds.groupby("ebird_code")["fold"]
    is_unknown = (of_species.nunique() == 1) & (of_species.min() != TRAINING_ONLY)
    return of_species.min()[is_unknown]


def describe_training_only(folds: pd.DataFrame) -> str:
    """Return in words which recordings no fold holds out; empty where there are none."""
    rare = folds[folds["fold"] == TRAINING_ONLY]
    codes = sorted(set(rare["ebird_code"]))
    if not codes:
        return ""
    return (
        f"{len(rare)} of {len(folds)} recordings, of {len(codes)} rare species, are in every "
        f"training part (fold {TRAINING_ONLY}), and no fold scores them: {shorten_list(codes)}"
    )


def recordist_clusters(recordings: pd.DataFrame) -> pd.Series:
    """Return the recordist of each recording; an unknown recordist is a cluster of their own."""
    return _recordist_keys(recordings).fillna("unknown: " + recordings["path"])


def _join_groups(recordings: pd.DataFrame, audio_hashes: Sequence[object] | None) -> list[str]:
    """Name the group of each recording: the first name of all that it is connected with."""
    recordists = _recordist_keys(recordings)
    keys = [
        f"file:{filename}" if pd.isna(recordist) else f"recordist:{recordist}"
        for filename, recordist in zip(recordings["filename"], recordists, strict=True)
    ]
    # A graph of names and audio hashes, with an edge for each recording that has both.
    name_of, names = pd.factorize(np.array(keys, object), sort=True)
    hash_of, hashes = pd.factorize(np.array(_known_hashes(recordings, audio_hashes), object))
    has_hash = hash_of >= 0
    edges = (name_of[has_hash], len(names) + hash_of[has_hash])
    n_nodes = len(names) + len(hashes)
    graph = coo_array((np.ones(len(edges[0])), edges), shape=(n_nodes, n_nodes))
    group_of_name = pd.Series(connected_components(graph, directed=False)[1][: len(names)])
    first_names = group_of_name.drop_duplicates()
    first_of_group = dict(zip(first_names, names[first_names.index], strict=True))
    return [first_of_group[group] for group in group_of_name[name_of]]


def _find_training_only(
    recordings: pd.DataFrame, audio_hashes: Sequence[object] | None, min_recordings: int
) -> np.ndarray:
    """Return which recordings no fold holds out, ``(recordings,)``: see `make_folds`."""
    if min_recordings < 2:
        return np.zeros(len(recordings), dtype=bool)
    groups = recordings.groupby("ebird_code")["group"]
    is_rare = (groups.transform("size") < min_recordings) | (groups.transform("nunique") == 1)
    hashes = pd.Series(_known_hashes(recordings, audio_hashes), recordings.index)
    return (is_rare | hashes.isin(hashes[is_rare].dropna())).to_numpy()


def _recordist_keys(recordings: pd.DataFrame) -> pd.Series:
    """Write recordists alike: spaces and capitals make no second person; unknown: NA."""
    names = recordings["recordist"].fillna("").astype(str)
    return names.map(lambda name: " ".join(name.split()).casefold() or None)


def _known_hashes(recordings: pd.DataFrame, audio_hashes: Sequence[object] | None) -> list[object]:
    hashes = [None] * len(recordings) if audio_hashes is None else list(audio_hashes)
    if len(hashes) != len(recordings):
        raise ValueError(f"{len(hashes)} audio_hashes for {len(recordings)} recordings")
    return [None if pd.isna(item) or item == "" else item for item in hashes]


def _warn_of_undivided(recordings: pd.DataFrame, folds: pd.DataFrame) -> None:
    undivided = list(_unknown_to_training(folds).index)
    if not undivided:
        return
    n_groups = recordings.groupby("ebird_code")["group"].nunique()
    n_single = sum(n_groups[code] == 1 for code in undivided)
    logger.warning(
        "%d of %d species are in one fold only, %d of them because all their recordings are by one "
        "recordist: the model that is validated on that fold is not trained on them (%s)",
        *(len(undivided), folds["ebird_code"].nunique(), n_single, shorten_list(undivided)),
    )


# --- groups in folds, so that each fold has the same share of every class ---


class _Assignment:
    """The fold of each group, and the cost; ``counts`` is ``(groups, classes)``, largest first."""

    def __init__(self, counts: np.ndarray, n_folds: int) -> None:
        self.n_folds = n_folds
        self.class_groups = (counts > 0).sum(axis=0)
        self.counts = np.column_stack([counts, counts.sum(axis=1)])  # "all" is one more class
        self.sizes = self.counts.sum(axis=0)
        self.weights = _COST_SCALE // self.sizes**2
        self.weights[-1] *= _TOTAL_WEIGHT
        self.classes_of = [np.flatnonzero(row) for row in self.counts]
        # How many recordings of a class a fold has too many, times n_folds: (classes, folds).
        self.excess = -np.repeat(self.sizes[:, None], n_folds, axis=1)
        self.folds = np.full(len(counts), -1)
        for group in range(len(counts)):
            self._assign(group, int(np.argmin(self._fold_costs(group))))

    def divide_classes(self) -> None:
        """Move the cheapest group out of each fold that has all of a class, where that is possible.

        A move must not make another class undivided.
        """
        for class_index in np.flatnonzero(self._undivided()).tolist():
            before = self._undivided()
            moves = []
            for group in np.flatnonzero(self.counts[:, class_index]).tolist():
                costs, current = self._fold_costs(group), self.folds[group]
                moves += [
                    (int(costs[fold] - costs[current]), group, fold)
                    for fold in range(self.n_folds)
                    if fold != current
                ]
            for _, group, fold in sorted(moves):
                current = self._remove(group)
                self._assign(group, fold)
                after = self._undivided()
                if not after[class_index] and after.sum() < before.sum():
                    break
                self._remove(group)
                self._assign(group, current)

    def _fold_costs(self, group: int) -> np.ndarray:
        """Return ``(folds,)``: the cost of the group in each fold, up to a constant."""
        classes = self.classes_of[group]
        return (self.weights[classes] * self.counts[group, classes]) @ self.excess[classes]

    def _assign(self, group: int, fold: int) -> None:
        classes = self.classes_of[group]
        self.excess[classes, fold] += self.n_folds * self.counts[group, classes]
        self.folds[group] = fold

    def _remove(self, group: int) -> int:
        """Take the group out of its fold and return that fold."""
        classes, fold = self.classes_of[group], int(self.folds[group])
        self.excess[classes, fold] -= self.n_folds * self.counts[group, classes]
        return fold

    def move_groups(self) -> int:
        """Assign each group to the fold with the lowest cost; return how many moved."""
        n_moved = 0
        for group in range(len(self.folds)):
            current = self._remove(group)
            costs = self._fold_costs(group)
            best = int(np.argmin(costs))
            moves = bool(costs[best] < costs[current])
            self._assign(group, best if moves else current)
            n_moved += moves
        return n_moved

    def swap_large_groups(self) -> int:
        """Swap each of the largest groups with its best partner; return how many swapped."""
        counts = self.counts[:_MAX_SWAPPED]
        weighted = counts * self.weights
        overlap = weighted @ counts.T
        squares = np.diag(overlap)
        costs, n_swapped = weighted @ self.excess, 0
        for group in range(len(counts)):
            current, folds = self.folds[group], self.folds[:_MAX_SWAPPED]
            to_partner = costs[group, folds] - costs[group, current]
            from_partner = costs[:, current] - costs[np.arange(len(counts)), folds]
            both = self.n_folds * (squares[group] + squares - 2 * overlap[group])
            change = to_partner + from_partner + both
            change[folds == current] = 0
            partner = int(np.argmin(change))
            if change[partner] < 0:
                partner_fold = self._remove(partner)
                self._remove(group)
                self._assign(group, partner_fold)
                self._assign(partner, int(current))
                costs = weighted @ self.excess
                n_swapped += 1
        return n_swapped

    def _undivided(self) -> np.ndarray:
        """Return ``(classes,)``: whether one fold has all of a class that has several groups."""
        in_fold = (self.excess + self.sizes[:, None]) // self.n_folds
        return (in_fold.max(axis=1) == self.sizes)[:-1] & (self.class_groups > 1)
