"""Assign groups of recordings to folds, so that each fold has the same share of every class."""

from __future__ import annotations

import numpy as np

_MAX_SWAPPED = 1000  # swaps are tried among the largest groups; small groups even out by moving
# Costs are integers: every machine adds them up to the same sum. A class of n recordings weighs
# _COST_SCALE / n**2, which makes its cost one of shares; the balance of all recordings together
# counts as much as that of _TOTAL_WEIGHT classes.
_COST_SCALE = 1 << 40
_TOTAL_WEIGHT = 4


class Assignment:
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
