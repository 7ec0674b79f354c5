"""Draw what an evaluation found as charts to point at: the report's, by plotly."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from birdcall.config import NOCALL
from birdcall.evaluation.decision_search import THRESHOLDS, DecisionSearchResult
from birdcall.evaluation.tables import PRIOR, SNR_STEP_DB
from birdcall.report.style import BLUE, COLORS, ORANGE
from birdcall.taxonomy import display_name

SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "diamond", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


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


def chart_steps(search: DecisionSearchResult) -> Chart:
    """Draw what each step of the choice would gain, with its standard error."""
    steps = search.steps.iloc[1:]
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


def chart_thresholds(search: DecisionSearchResult) -> Chart:
    """Draw weighted row-wise F1 over clip and frame threshold, with the chosen pair."""
    decision, values = search.decision, list(THRESHOLDS)
    figure = go.Figure(
        go.Heatmap(
            x=values,
            y=values,
            z=search.grid_scores.round(4).tolist(),
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


def chart_threshold_curves(search: DecisionSearchResult) -> Chart:
    """Draw row-wise F1 over one threshold, the other as chosen."""
    clip, frame = search.grid_index
    curves = {
        "clip threshold": (search.grid_scores[:, frame], THRESHOLDS[clip]),
        "frame threshold": (search.grid_scores[clip], THRESHOLDS[frame]),
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


def chart_votes(votes: pd.DataFrame, search: DecisionSearchResult) -> Chart | None:
    """Draw `tables.votes_table` beside the rule that was chosen; None for a single member."""
    n_members = len(votes)
    if n_members < 2:
        return None
    figure = go.Figure(
        go.Scatter(
            x=votes["votes"].tolist(),
            y=votes["row_wise_f1"].round(4).tolist(),
            mode="lines+markers",
            line={"color": BLUE},
            marker={"size": 9},
            name="votes",
        )
    )
    decision = search.decision
    if decision.combination == "votes":
        n_votes = decision.n_votes(n_members)
        x, y = [n_votes], [float(votes["row_wise_f1"][n_votes - 1])]
    else:
        x, y = [1, n_members], [search.in_sample_f1] * 2
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
        "Row-wise F1 where each member decides alone and a number of them must agree, at the "
        "chosen thresholds; beside it the rule that was chosen.",
        votes,
    )


def chart_shares(table: pd.DataFrame) -> Chart:
    """Draw `tables.nocall_share_table`."""
    names = [name for name in dict.fromkeys(table["name"]) if name != PRIOR]
    figure = go.Figure()
    for order, name in enumerate(names):
        rows = table[table["name"] == name]
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
    figure.update_xaxes(tickvals=sorted(set(table["share"])))
    return Chart(
        figure,
        "Row-wise F1 at shares of rows without a bird, with 95 % intervals.",
        table,
    )


def _short(name: str) -> str:
    """Return a name that plotly takes for no markup: it knows some of HTML's tags."""
    return name.replace("<", "‹").replace(">", "›")[:60]


def chart_reliability(table: pd.DataFrame) -> Chart:
    """Draw `tables.reliability_table`: how often a class is present, by its probability."""
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "#8a8a8a"}, name="calibrated exactly"
    )
    for order, (name, curve) in enumerate(table.groupby("probabilities", sort=False)):
        figure.add_scatter(
            x=curve["mean_probability"].tolist(),
            y=curve["share_true"].tolist(),
            customdata=curve["cells"].tolist(),
            mode="lines+markers",
            name=name,
            hovertemplate="predicted %{x:.2f}, true %{y:.2f}, %{customdata} cells",
            line={"color": (BLUE, ORANGE)[order], "dash": DASHES[order]},
            marker={"symbol": SYMBOLS[order], "size": 9},
        )
    _layout(figure, "predicted probability", "share that is true", 460)
    figure.update_xaxes(range=[0, 1]).update_yaxes(range=[0, 1])
    return Chart(
        figure,
        "Held-out recordings: how often a species is present, by its predicted probability. The "
        "calibration was fitted on these recordings; the decision uses it only if that raised "
        "its score.",
        table,
    )


def chart_recall_over_snr(table: pd.DataFrame) -> Chart:
    """Draw the recall of simulated events over their SNR in the bird's own band."""
    figure = go.Figure(
        go.Scatter(
            x=(table["snr_db"] + SNR_STEP_DB / 2).tolist(),
            y=table["recall"].tolist(),
            error_y={"type": "data", "array": table["standard_error"].tolist()},
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


def chart_confusions(counts: pd.DataFrame) -> Chart | None:
    """Draw `tables.confusion_matrix`; None where nothing was confused."""
    if counts.empty:
        return None
    names = [display_name(code) for code in counts.index]
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=counts.to_numpy().tolist(),
            text=[[str(count) if count else "" for count in row] for row in counts.to_numpy()],
            texttemplate="%{text}",
            colorscale="Blues",
            colorbar={"title": {"text": "times"}},
            hovertemplate="%{y} predicted as %{x}: %{z} times<extra></extra>",
        )
    )
    _layout(figure, "predicted species", "true species", 260 + 22 * len(names))
    figure.update_xaxes(automargin=True, tickangle=-60, showgrid=False)
    figure.update_yaxes(automargin=True, autorange="reversed", showgrid=False)
    return Chart(
        figure,
        "Confused species: held-out recordings by their most probable species, and rows of "
        "simulated soundscapes in which one species is missed and another predicted.",
    )
