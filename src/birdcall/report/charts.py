"""Draw the tables of an evaluation as the report's interactive charts, by plotly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from birdcall.config import NOCALL
from birdcall.evaluation.decision_search import THRESHOLDS, DecisionSearchResult
from birdcall.evaluation.tables import PRIOR, SIMULATED
from birdcall.report.html import HtmlTable
from birdcall.report.plots import BLUE, COLORS, GREY, ORANGE
from birdcall.taxonomy import display_name

_SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "diamond", "pentagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_PAIR = (BLUE, ORANGE)  # colours of two curves
_MAX_NAME = 60  # characters


class Chart(NamedTuple):
    """A chart, its message in one or two sentences, and its numbers for those who cannot see it."""

    figure: go.Figure
    caption: str
    numbers: HtmlTable | None = None


def _make_chart(figure: go.Figure, caption: str, numbers: pd.DataFrame | None = None) -> Chart:
    table = None if numbers is None else HtmlTable(numbers, "The numbers of this chart")
    return Chart(figure, caption, table)


def _new_figure(x: str, y: str, height: int = 380) -> go.Figure:
    """Return an empty chart with titles of its axes; the height is in pixels."""
    axis = {"showgrid": True, "gridcolor": "#e6e6e6"}
    return go.Figure(
        layout={
            "template": "simple_white",
            "height": height,
            "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
            "font": {"family": "system-ui, sans-serif", "size": 14, "color": "#1a1a1a"},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": {"title": {"text": x}, **axis},
            "yaxis": {"title": {"text": y}, **axis},
        }
    )


def _range_of(values: np.ndarray, least: float = 0.1) -> list[float]:
    """Return an axis range around values; plotly's around equal ones has ticks of 16 digits."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(0.05 * (high - low), (least - (high - low)) / 2)
    return [low - margin, high + margin]


def chart_steps(search: DecisionSearchResult) -> Chart:
    """Draw the gain of each step of the decision search, with its standard error."""
    steps = search.steps.iloc[1:]
    figure = _new_figure("gain in F1", "", 150 + 28 * len(steps))
    for is_adopted, color, symbol, label in (
        (False, GREY, "circle", "not better by a standard error"),
        (True, ORANGE, "diamond", "adopted"),
    ):
        subset = steps[steps["adopted"] == is_adopted]
        figure.add_scatter(
            x=subset["gain"].tolist(),
            y=subset["alternative"].tolist(),
            error_x={"type": "data", "array": subset["standard_error"].tolist(), "color": color},
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 11},
            name=label,
        )
    order = steps["alternative"].tolist()[::-1]
    figure.update_yaxes(categoryorder="array", categoryarray=order, automargin=True)
    ends = [
        0,
        *(steps["gain"] - steps["standard_error"]),
        *(steps["gain"] + steps["standard_error"]),
    ]
    figure.update_xaxes(range=_range_of(np.array(ends), least=0.02))
    figure.add_vline(0, line_color=GREY)
    figure.update_layout(showlegend=True)
    return _make_chart(
        figure,
        "The steps of the search, in order from the top, each with its gain over the rule so far. "
        "A step is adopted if its gain is larger than its standard error over soundscapes.",
        steps[["alternative", "gain", "standard_error", "adopted"]],
    )


def chart_thresholds(search: DecisionSearchResult) -> Chart:
    """Draw weighted row-wise F1 over clip and frame threshold, with the chosen pair."""
    decision, values = search.decision, list(THRESHOLDS)
    lowest, highest = _range_of(search.grid_scores)
    figure = _new_figure("frame threshold", "clip threshold", 460)
    figure.add_heatmap(
        x=values,
        y=values,
        z=search.grid_scores.round(4).tolist(),
        colorscale="Cividis",
        zmin=lowest,
        zmax=highest,
        colorbar={"title": {"text": "F1"}},
        hovertemplate="frame %{x}, clip %{y}: F1 %{z:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=[decision.frame_threshold],
        y=[decision.clip_threshold],
        mode="markers",
        marker={"size": 16, "color": "white", "line": {"color": "black", "width": 3}},
        name="chosen",
        showlegend=True,
    )
    return _make_chart(
        figure,
        "Row-wise F1 over both thresholds, on the data they were chosen on, so it is higher than "
        "the score. The ring marks the chosen pair. It has the best mean over its neighbours: a "
        "narrow peak would be chance.",
    )


def chart_threshold_curves(search: DecisionSearchResult) -> Chart:
    """Draw row-wise F1 over one threshold, with the other threshold as chosen."""
    clip, frame = search.grid_index
    curves = {
        "clip threshold": (search.grid_scores[:, frame], THRESHOLDS[clip]),
        "frame threshold": (search.grid_scores[clip], THRESHOLDS[frame]),
    }
    figure = _new_figure("threshold", "row-wise F1")
    for index, (name, (scores, chosen)) in enumerate(curves.items()):
        color = _PAIR[index]
        figure.add_scatter(
            x=list(THRESHOLDS),
            y=scores.round(4).tolist(),
            mode="lines+markers",
            name=name,
            line={"color": color, "dash": _DASHES[index]},
            marker={"symbol": _SYMBOLS[index], "size": 7},
        )
        ring = {"size": 16, "symbol": "circle-open", "line": {"width": 3}, "color": color}
        figure.add_scatter(
            x=[chosen],
            y=[round(float(scores[THRESHOLDS.index(chosen)]), 4)],
            mode="markers",
            showlegend=False,
            name=f"{name}, chosen",
            marker=ring,
        )
    drawn = np.concatenate([scores for scores, _ in curves.values()])
    figure.update_yaxes(range=_range_of(drawn))
    numbers = {"threshold": THRESHOLDS} | {name: scores for name, (scores, _) in curves.items()}
    return _make_chart(
        figure,
        "Row-wise F1 over each threshold, with the other threshold as chosen. Rings mark the "
        "chosen thresholds.",
        pd.DataFrame(numbers),
    )


def chart_votes(votes: pd.DataFrame, search: DecisionSearchResult) -> Chart | None:
    """Draw `ensemble_decision.votes_table` beside the chosen rule; None for a single member."""
    n_members, decision = len(votes), search.decision
    if n_members < 2:
        return None
    figure = _new_figure("members that must agree", "row-wise F1")
    figure.add_scatter(
        x=votes["votes"].tolist(),
        y=votes["row_wise_f1"].round(4).tolist(),
        mode="lines+markers",
        line={"color": BLUE},
        marker={"size": 9},
        name="votes",
    )
    if decision.combination == "votes":
        n_votes = decision.n_votes(n_members)
        x, y = [n_votes], [round(float(votes["row_wise_f1"][n_votes - 1]), 4)]
    else:
        x, y = [1, n_members], [round(float(search.in_sample_f1), 4)] * 2
    figure.add_scatter(
        x=x,
        y=y,
        name=f"chosen: {decision.combination}",
        mode="markers" if len(x) == 1 else "lines",
        line={"color": ORANGE, "dash": "dash"},
        marker={"size": 16, "symbol": "circle-open", "color": ORANGE, "line": {"width": 3}},
    )
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(range=_range_of(np.array([*votes["row_wise_f1"], *y])))
    return _make_chart(
        figure,
        "Row-wise F1 where each member decides alone and this number of members must agree, at the "
        "chosen thresholds. For comparison: the chosen rule.",
        votes,
    )


def chart_shares(scores: pd.DataFrame) -> Chart:
    """Draw row-wise F1 at each simulated share of nocall, of `Evaluation.scores`."""
    is_share = scores["audio"].str.startswith(f"{SIMULATED} ")
    rows = scores[is_share & (scores["metric"] == "row_wise_f1")]
    share = rows["audio"].str.extract(r"(\d+)%")[0].astype(float)
    table = rows.assign(share=share)[["name", "share", "value", "low", "high"]]
    names = [name for name in dict.fromkeys(table["name"]) if name != PRIOR]
    figure = _new_figure("rows without a bird, %", "row-wise F1, cross-validated")
    for index, name in enumerate(names):
        rows = table[table["name"] == name]
        is_nocall = name == f"all {NOCALL}"
        color = "#4d4d4d" if is_nocall else COLORS[index % len(COLORS)]
        symbol = "x" if is_nocall else _SYMBOLS[index % len(_SYMBOLS)]
        above, below = rows["high"] - rows["value"], rows["value"] - rows["low"]
        figure.add_scatter(
            x=(rows["share"] + 0.6 * (index - len(names) / 2)).tolist(),
            y=rows["value"].tolist(),
            error_y={
                "type": "data",
                "array": above.fillna(0).clip(lower=0).tolist(),
                "arrayminus": below.fillna(0).clip(lower=0).tolist(),
            },
            # plotly reads some HTML tags in a name.
            name=name.replace("<", "‹").replace(">", "›")[:_MAX_NAME],
            mode="lines+markers",
            line={"color": color, "dash": _DASHES[index % len(_DASHES)]},
            marker={"symbol": symbol, "size": 9, "color": color},
        )
    figure.update_xaxes(tickvals=sorted(set(table["share"])))
    drawn = table.loc[table["name"].isin(names), ["value", "low", "high"]].to_numpy()
    figure.update_yaxes(range=_range_of(drawn))
    return _make_chart(
        figure, "Row-wise F1 by the share of rows without a bird, with 95 % intervals.", table
    )


def chart_reliability(table: pd.DataFrame) -> Chart:
    """Draw `tables.reliability_table`: how often a species is present, by its probability."""
    figure = _new_figure("predicted probability", "share that is true", 460)
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "#8a8a8a"}, name="exact probabilities"
    )
    for index, (name, curve) in enumerate(table.groupby("probabilities", sort=False)):
        figure.add_scatter(
            x=curve["mean_probability"].tolist(),
            y=curve["share_true"].tolist(),
            customdata=curve["cells"].tolist(),
            mode="lines+markers",
            name=name,
            hovertemplate="predicted %{x:.2f}, true %{y:.2f}, %{customdata} cells",
            line={"color": _PAIR[index], "dash": _DASHES[index]},
            marker={"symbol": _SYMBOLS[index], "size": 9},
        )
    figure.update_xaxes(range=[0, 1]).update_yaxes(range=[0, 1])
    return _make_chart(
        figure,
        "Rows of simulated soundscapes: how often a species is present, by its predicted "
        "probability. Each row is calibrated without its group of recordists; the decision uses a "
        "calibration only if it raised the score.",
        table,
    )


def chart_recall_over_snr(table: pd.DataFrame) -> Chart:
    """Draw `tables.snr_table`: the recall of simulated events over their SNR."""
    figure = _new_figure("SNR, dB", "recall of events")
    figure.add_scatter(
        x=table["centre_db"].tolist(),
        y=table["recall"].tolist(),
        error_y={"type": "data", "array": table["standard_error"].tolist()},
        customdata=table["events"].tolist(),
        hovertemplate="%{x} dB: %{y:.0%} of %{customdata}<extra></extra>",
        mode="lines+markers",
        line={"color": BLUE},
        marker={"size": 9},
    )
    figure.update_yaxes(range=[-0.02, 1.02])
    return _make_chart(
        figure,
        "Share of simulated events that are predicted, by SNR: the level of the bird above the "
        "noise in its frequency band.",
        table.drop(columns="centre_db"),
    )


def confusion_matrix(confusions: pd.DataFrame, max_species: int = 30) -> pd.DataFrame:
    """Return `tables.confusion_table` as counts, true species × predicted species, both by code.

    Of more than ``max_species`` those that are confused most often.
    """
    total = confusions["recordings"] + confusions["rows"]
    counts = confusions.assign(total=total).pivot(
        index="true_species", columns="predicted_species", values="total"
    )
    codes = sorted({*counts.index, *counts.columns})
    counts = counts.reindex(index=codes, columns=codes).fillna(0).astype(int)
    by_species = counts.sum(axis=0) + counts.sum(axis=1)
    most = by_species.sort_values(ascending=False, kind="stable").index[:max_species]
    return counts.loc[sorted(most), sorted(most)]


def chart_confusions(confusions: pd.DataFrame) -> Chart | None:
    """Draw `tables.confusion_table` as a matrix; None where nothing was confused."""
    counts = confusion_matrix(confusions)
    if counts.empty:
        return None
    names = [display_name(code) for code in counts.index]
    figure = _new_figure("predicted species", "true species", 260 + 22 * len(names))
    figure.add_heatmap(
        x=names,
        y=names,
        z=counts.to_numpy().tolist(),
        text=[[str(count) if count else "" for count in row] for row in counts.to_numpy()],
        texttemplate="%{text}",
        colorscale="Blues",
        showscale=False,
        hovertemplate="%{y} predicted as %{x}: %{z} times<extra></extra>",
    )
    figure.update_xaxes(automargin=True, tickangle=-60, showgrid=False)
    figure.update_yaxes(automargin=True, autorange="reversed", showgrid=False)
    return _make_chart(
        figure,
        "Confused species: held-out recordings by their most probable species, and rows of "
        "simulated soundscapes in which one species is missed and another predicted.",
    )
