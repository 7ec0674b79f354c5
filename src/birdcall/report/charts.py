"""Draw what an evaluation found as charts to point at: the report's, by plotly."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from birdcall.config import NOCALL
from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.decision_search import THRESHOLDS, DecisionSearchResult
from birdcall.evaluation.metrics import reliability, row_f1_scores
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.tables import PRIOR, SIMULATED, SNR_STEP_DB
from birdcall.inference.decision import decide
from birdcall.report.style import BLUE, COLORS, ORANGE
from birdcall.taxonomy import display_name

SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "diamond", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MAX_CONFUSED = 30  # species of the picture; the table has the pairs


class Chart(NamedTuple):
    """A chart, what it says in a sentence, and its numbers for those who cannot see it."""

    figure: go.Figure
    caption: str
    numbers: pd.DataFrame | None = None


def _layout(figure: go.Figure, x: str, y: str, height: int = 380) -> go.Figure:
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 14, "color": "#1a1a1a"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": {"text": x}, "showgrid": True, "gridcolor": "#e6e6e6"},
        yaxis={"title": {"text": y}, "showgrid": True, "gridcolor": "#e6e6e6"},
    )
    return figure


def chart_steps(choice: DecisionSearchResult) -> Chart:
    """Draw what each step of the choice would gain, with its standard error."""
    steps = choice.steps.iloc[1:]
    figure = go.Figure()
    for adopted, color, symbol, label in (
        (False, "#595959", "circle", "not better by a standard error"),
        (True, ORANGE, "diamond", "adopted"),
    ):
        own = steps[steps["adopted"] == adopted]
        figure.add_scatter(
            x=own["gain"].tolist(),
            y=own["alternative"].tolist(),
            error_x={"type": "data", "array": own["standard_error"].tolist(), "color": color},
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 11},
            name=label,
        )
    order = steps["alternative"].tolist()[::-1]
    figure.update_yaxes(categoryorder="array", categoryarray=order, automargin=True)
    figure.add_vline(0, line_color="#595959")
    return Chart(
        _layout(figure, "gain in row-wise F1 over the rule so far", "", 150 + 28 * len(steps)),
        "What was tried, in this order from the top: a step is adopted only if it is better by "
        "more than a standard error, over soundscapes.",
        steps[["alternative", "gain", "standard_error", "adopted"]],
    )


def chart_thresholds(choice: DecisionSearchResult) -> Chart:
    """Draw weighted row-wise F1 over clip and frame threshold, with the chosen pair."""
    decision, values = choice.decision, list(THRESHOLDS)
    figure = go.Figure(
        go.Heatmap(
            x=values,
            y=values,
            z=choice.grid.round(4).tolist(),
            colorscale="Cividis",
            colorbar={"title": {"text": "F1"}},
            hovertemplate="frame %{x}, clip %{y}: F1 %{z:.3f}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=[decision.frame_threshold],
        y=[decision.clip_threshold],
        mode="markers",
        marker={"size": 16, "color": "white", "line": {"color": "black", "width": 3}},
        name="chosen",
        showlegend=True,
    )
    return Chart(
        _layout(figure, "frame threshold", "clip threshold", 460),
        "Row-wise F1 over both thresholds where they were chosen, so higher than the score. The "
        "ring is the chosen pair: the best mean over neighbours, since a peak with steep sides is "
        "luck.",
    )


def chart_threshold_curves(choice: DecisionSearchResult) -> Chart:
    """Draw row-wise F1 over one threshold, the other as chosen."""
    clip, frame = choice.place
    curves = {
        "clip threshold": (choice.grid[:, frame], THRESHOLDS[clip]),
        "frame threshold": (choice.grid[clip], THRESHOLDS[frame]),
    }
    figure = go.Figure()
    for order, (name, (scores, chosen)) in enumerate(curves.items()):
        figure.add_scatter(
            x=list(THRESHOLDS),
            y=scores.round(4).tolist(),
            mode="lines+markers",
            name=name,
            line={"color": (BLUE, ORANGE)[order], "dash": DASHES[order]},
            marker={"symbol": SYMBOLS[order], "size": 7},
        )
        figure.add_scatter(
            x=[chosen],
            y=[scores[THRESHOLDS.index(chosen)]],
            mode="markers",
            showlegend=False,
            name=f"{name}, chosen",
            marker={
                "size": 16,
                "symbol": "circle-open",
                "line": {"width": 3},
                "color": (BLUE, ORANGE)[order],
            },
        )
    numbers = pd.DataFrame(
        {"threshold": THRESHOLDS} | {name: scores for name, (scores, _) in curves.items()}
    )
    return Chart(
        _layout(figure, "threshold", "row-wise F1"),
        "The same along either threshold, the other as chosen; rings mark the chosen ones.",
        numbers,
    )


def chart_votes(
    scores: LabelledPredictions, weights: np.ndarray, choice: DecisionSearchResult
) -> Chart | None:
    """Draw row-wise F1 over how many members must agree; None for a single one."""
    n_members = len(scores.member_names)
    if n_members < 2:
        return None
    numbers = pd.DataFrame(vote_scores(scores, weights, choice), columns=["votes", "F1"])
    figure = go.Figure(
        go.Scatter(
            x=numbers["votes"].tolist(),
            y=numbers["F1"].round(4).tolist(),
            mode="lines+markers",
            line={"color": BLUE},
            marker={"size": 9},
            name="votes",
        )
    )
    decision = choice.decision
    if decision.combination == "votes":
        n_votes = decision.n_votes(n_members)
        x, y = [n_votes], [float(numbers["F1"][n_votes - 1])]
    else:
        x, y = [1, n_members], [choice.tuned] * 2
    figure.add_scatter(
        x=x,
        y=y,
        name=f"chosen: {decision.combination}",
        mode="markers" if len(x) == 1 else "lines",
        line={"color": ORANGE, "dash": "dash"},
        marker={"size": 16, "symbol": "circle-open", "color": ORANGE, "line": {"width": 3}},
    )
    _layout(figure, "members that must agree", "row-wise F1")
    figure.update_xaxes(dtick=1)
    return Chart(
        figure,
        "Row-wise F1 where each member is asked alone and so many must agree, at the chosen "
        "thresholds; beside it the rule that was chosen.",
        numbers,
    )


def vote_scores(
    scores: LabelledPredictions, weights: np.ndarray, choice: DecisionSearchResult
) -> list[tuple[int, float]]:
    """Return for each number of votes the weighted row-wise F1 at the chosen thresholds."""
    n_members = len(scores.member_names)
    found = []
    for n_votes in range(1, n_members + 1):
        share = n_votes / n_members
        rule = replace(choice.decision, combination="votes", vote_share=share, members=())
        named = decide(scores.clipwise, scores.framewise, rule, scores.starts)[scores.labelled]
        n_missing = scores.truth.shape[1] - named.shape[1]
        f1 = row_f1_scores(scores.labelled_truth, np.pad(named, ((0, 0), (0, n_missing))))
        found.append((n_votes, float(np.average(f1, weights=weights))))
    return found


def chart_shares(table: pd.DataFrame) -> Chart:
    """Draw row-wise F1 on simulated soundscapes over their share of nocall rows."""
    own = table[(table["metric"] == "row_wise_f1") & table["sound"].str.startswith(f"{SIMULATED} ")]
    own = own.assign(share=own["sound"].str.extract(r"(\d+)%")[0].astype(float))
    names = [name for name in dict.fromkeys(own["name"]) if name != PRIOR]
    figure = go.Figure()
    for order, name in enumerate(names):
        rows = own[own["name"] == name]
        is_nocall = name == f"all {NOCALL}"
        color = "#4d4d4d" if is_nocall else COLORS[order % len(COLORS)]
        up, down = rows["high"] - rows["value"], rows["value"] - rows["low"]
        figure.add_scatter(
            x=(rows["share"] + 0.6 * (order - len(names) / 2)).tolist(),
            y=rows["value"].tolist(),
            error_y={
                "type": "data",
                "array": up.fillna(0).clip(lower=0).tolist(),
                "arrayminus": down.fillna(0).clip(lower=0).tolist(),
            },
            name=_short(name),
            mode="lines+markers",
            line={"color": color, "dash": DASHES[order % len(DASHES)]},
            marker={
                "symbol": "x" if is_nocall else SYMBOLS[order % len(SYMBOLS)],
                "size": 9,
                "color": color,
            },
        )
    _layout(figure, "rows without a bird, %", "row-wise F1, nested")
    figure.update_xaxes(tickvals=sorted(set(own["share"])))
    return Chart(
        figure,
        "Row-wise F1 at shares of rows without a bird, with 95 % intervals.",
        own[["name", "share", "value", "low", "high"]],
    )


def _short(name: str) -> str:
    """Return a name that plotly takes for no markup: it knows some of HTML's tags."""
    return name.replace("<", "‹").replace(">", "›")[:60]


def chart_reliability(
    scores: np.ndarray, calibrated: np.ndarray | None, targets: np.ndarray
) -> Chart:
    """Draw how often what is said with a probability comes true, before and after calibration.

    scores, calibrated, targets: ``(recordings, classes)`` of held-out recordings.
    """
    cells = (targets != IGNORE_TARGET) & ~np.isnan(scores)
    truth = targets[cells][:, None] > 0
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "#8a8a8a"}, name="as it should be"
    )
    tables = []
    for order, (values, color, label) in enumerate(
        ((scores, BLUE, "as the members say"), (calibrated, ORANGE, "calibrated"))
    ):
        if values is None:
            continue
        curve = reliability(truth, values[cells][:, None], 10)
        figure.add_scatter(
            x=curve.mean_probability.tolist(),
            y=curve.share_true.tolist(),
            customdata=curve.count.tolist(),
            mode="lines+markers",
            name=label,
            hovertemplate="said %{x:.2f}, true %{y:.2f}, %{customdata} cells",
            line={"color": color, "dash": DASHES[order]},
            marker={"symbol": SYMBOLS[order], "size": 9},
        )
        tables.append(
            pd.DataFrame(
                {
                    "which": label,
                    "said": curve.mean_probability,
                    "comes true": curve.share_true,
                    "cells": curve.count,
                }
            )
        )
    _layout(figure, "probability that is said", "share that comes true", 460)
    figure.update_xaxes(range=[0, 1]).update_yaxes(range=[0, 1])
    return Chart(
        figure,
        "Held-out recordings: how often a species is there when it is said with a probability. The "
        "calibration was fitted on these recordings; the decision uses it only if that paid.",
        pd.concat(tables),
    )


def chart_recall_over_snr(table: pd.DataFrame) -> Chart:
    """Draw the recall of simulated events over their SNR in the bird's own band."""
    error = np.sqrt(table["recall"] * (1 - table["recall"]) / table["events"])
    figure = go.Figure(
        go.Scatter(
            x=(table["snr_db"] + SNR_STEP_DB / 2).tolist(),
            y=table["recall"].tolist(),
            error_y={"type": "data", "array": error.tolist()},
            customdata=table["events"].tolist(),
            hovertemplate="%{x} dB: %{y:.0%} of %{customdata}<extra></extra>",
            mode="lines+markers",
            line={"color": BLUE},
            marker={"size": 9},
        )
    )
    _layout(figure, "SNR in the bird's band, dB", "events found")
    figure.update_yaxes(range=[0, 1.02])
    return Chart(
        figure,
        "Simulated birds that are named, by their level above the noise in their own band.",
        table,
    )


# --- confusions -----------------------------------------------------------------------------------


def recording_confusions(
    scores: np.ndarray, targets: np.ndarray, classes: tuple[str, ...]
) -> pd.DataFrame:
    """Return which species the likeliest of a held-out recording is: sings, said, recordings.

    scores, targets: ``(recordings, classes)``. Only wrong ones; a secondary label is not wrong.
    """
    known = ~np.isnan(scores).any(axis=1)
    best, true = scores[known].argmax(axis=1), targets[known].argmax(axis=1)
    is_wrong = (best != true) & (targets[known][np.arange(known.sum()), best] != IGNORE_TARGET)
    return _count_pairs(true[is_wrong], best[is_wrong], classes, "recordings")


def row_confusions(truth: np.ndarray, named: np.ndarray, classes: tuple[str, ...]) -> pd.DataFrame:
    """Return what is named in rows of what is missed: sings, said, rows.

    truth, named: ``(rows, known species)``, the first of which are ``classes``.
    """
    missed, false = truth & ~named, named & ~truth
    pairs = [
        (sings, said)
        for row in np.flatnonzero(missed.any(axis=1) & false.any(axis=1))
        for sings in np.flatnonzero(missed[row, : len(classes)])
        for said in np.flatnonzero(false[row, : len(classes)])
    ]
    sings, said = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
    return _count_pairs(sings, said, classes, "rows")


def _count_pairs(
    sings: np.ndarray, said: np.ndarray, classes: tuple[str, ...], what: str
) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "sings": [classes[place] for place in sings],
            "said": [classes[place] for place in said],
        },
        dtype=object,
    )
    counts = table.groupby(["sings", "said"]).size().rename(what).reset_index()
    return counts.sort_values([what, "sings", "said"], ascending=[False, True, True])


def join_confusions(of_recordings: pd.DataFrame, of_rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row per pair with its recordings and rows, the most frequent first.

    ``only``: whether the species that sings is taken for no other.
    """
    table = of_recordings.merge(of_rows, on=["sings", "said"], how="outer")
    table[["recordings", "rows"]] = table[["recordings", "rows"]].fillna(0).astype(int)
    n_others = table.groupby("sings")["said"].transform("nunique")
    table["only"] = np.where(n_others == 1, "yes", "")
    total = table["recordings"] + table["rows"]
    order = total.sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def chart_confusions(pairs: pd.DataFrame) -> Chart | None:
    """Draw how often a species is taken for another; of many, those confused most often."""
    if pairs.empty:
        return None
    total = pairs["recordings"] + pairs["rows"]
    weight = (
        pd.concat([pairs["sings"], pairs["said"]])
        .to_frame("code")
        .assign(n=pd.concat([total, total]))
    )
    counted = weight.groupby("code")["n"].sum().sort_values(ascending=False, kind="stable")
    codes = sorted(counted.index[:MAX_CONFUSED])
    place = {code: at for at, code in enumerate(codes)}
    grid = np.zeros((len(codes), len(codes)), dtype=int)
    for one, count in zip(pairs.itertuples(), total, strict=True):
        if one.sings in place and one.said in place:
            grid[place[one.sings], place[one.said]] += count
    names = [display_name(code) for code in codes]
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=grid.tolist(),
            text=np.where(grid, grid.astype(str), "").tolist(),
            texttemplate="%{text}",
            colorscale="Blues",
            colorbar={"title": {"text": "times"}},
            hovertemplate="%{y} taken for %{x}: %{z} times<extra></extra>",
        )
    )
    _layout(figure, "said", "sings", 260 + 22 * len(codes))
    figure.update_xaxes(automargin=True, tickangle=-60, showgrid=False)
    figure.update_yaxes(automargin=True, autorange="reversed", showgrid=False)
    return Chart(
        figure,
        "What is taken for what: held-out recordings by their likeliest species, and rows of "
        "simulated soundscapes in which one species is missed and another named.",
    )
