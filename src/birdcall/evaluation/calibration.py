"""Fit what makes scores probabilities, class by class, on recordings that no member trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from birdcall.inference.decision import MIN_PROBABILITY, Calibration

FloatArray = NDArray[np.float64]

# How far a class may go from what all classes share, as the standard deviation of a normal prior
# on the logarithm of its scale and on its offset: two classes of three within a fifth in scale and
# within half a unit of logit. A class of three recordings moves little from there, one of a hundred
# goes where its recordings say.
LOG_SCALE_SPREAD = 0.2
OFFSET_SPREAD = 0.5
MAX_LOG_SCALE = 3.0  # of what all share: a factor of 20
MAX_SPREADS = 5.0  # of a class, from there
MAX_ITERATIONS = 500


def fit_calibration(
    clipwise: NDArray[np.floating], framewise: NDArray[np.floating], targets: NDArray[np.floating]
) -> Calibration:
    """Fit a scale and an offset per class to scores of out-of-fold recordings.

    clipwise, framewise: ``(recordings, classes)``, the highest of each recording's segments.
    targets: the same shape, 1 and 0; cells below 0 may be either, and rows of NaN were held out
    from nobody: both are left out. Maximises the likelihood of the targets under
    sigmoid(scale * logit + offset) with a normal prior (Platt 1999, shrunk to the classes' common
    parameters as in a hierarchical logistic regression). Raises ``ValueError`` where no cell is
    left.
    """
    for name, scores in (("clipwise", clipwise), ("framewise", framewise)):
        if scores.shape != targets.shape or scores.ndim != 2:
            raise ValueError(
                f"{name} has shape {scores.shape} and targets {targets.shape}; both must be "
                "(recordings, classes)"
            )
    clip_scale, clip_offset = fit_scale_and_offset(clipwise, targets)
    frame_scale, frame_offset = fit_scale_and_offset(framewise, targets)
    return Calibration(
        *(
            tuple(round(float(number), 6) for number in numbers)
            for numbers in (clip_scale, clip_offset, frame_scale, frame_offset)
        )
    )


def fit_scale_and_offset(
    scores: NDArray[np.floating], targets: NDArray[np.floating]
) -> tuple[FloatArray, FloatArray]:
    """Return scale and offset ``(classes,)`` of one kind of score; see `fit_calibration`."""
    known = ~np.isnan(scores) & (targets >= 0)
    if not known.any():
        raise ValueError("no out-of-fold recording to fit a calibration on")
    n_classes = scores.shape[1]
    z = logit(
        np.clip(np.where(known, scores, 0.5).astype(float), MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    )
    y = np.where(known, targets > 0, 0).astype(float)

    def loss(values: FloatArray) -> tuple[float, FloatArray]:
        """Return the negative log posterior of shared and own parameters, and its gradient."""
        shared, own = values[:2], values[2:].reshape(2, n_classes)
        log_scale = shared[0] + LOG_SCALE_SPREAD * own[0]
        offset = shared[1] + OFFSET_SPREAD * own[1]
        scale = np.exp(log_scale)
        x = scale * z + offset
        likelihood = (np.logaddexp(0, x) - y * x)[known].sum()
        residual = np.where(known, expit(x) - y, 0)
        by_log_scale = (residual * z).sum(axis=0) * scale
        by_offset = residual.sum(axis=0)
        gradient = np.concatenate(
            [
                [by_log_scale.sum(), by_offset.sum()],
                LOG_SCALE_SPREAD * by_log_scale + own[0],
                OFFSET_SPREAD * by_offset + own[1],
            ]
        )
        return float(likelihood + 0.5 * np.square(own).sum()), gradient

    # A model of chance would have a scale of 0, and then no ranking is left.
    bounds = [(-MAX_LOG_SCALE, MAX_LOG_SCALE), (None, None)] + [(-MAX_SPREADS, MAX_SPREADS)] * (
        2 * n_classes
    )
    start = np.zeros(2 + 2 * n_classes)
    options = {"maxiter": MAX_ITERATIONS}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    own = found[2:].reshape(2, n_classes)
    return np.exp(found[0] + LOG_SCALE_SPREAD * own[0]), found[1] + OFFSET_SPREAD * own[1]
