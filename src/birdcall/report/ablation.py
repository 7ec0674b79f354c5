"""Show what an ablation found: a page in Markdown and a picture."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from birdcall.evaluation.ablation import Ablation
from birdcall.evaluation.comparison import LEVEL, N_RESAMPLES
from birdcall.report.style import ORANGE, SKY, save_figure, use_style

SEED_COLOR, MEAN_COLOR = SKY, ORANGE


def describe_ablation(ablation: Ablation, command: str = "") -> str:
    """Return the page: what was compared on what, scores, differences, and how to read them."""
    parts = [
        f"# Ablation on {ablation.data.folder.resolve().name}",
        f"```\n{command}\n```" if command else "",
        _conditions(ablation),
        _experiments(ablation),
        "## Scores",
        _markdown(score_table(ablation)),
        _score_notes(ablation),
        f"## Differences from `{ablation.reference}`",
        _markdown(difference_table(ablation)),
        _difference_notes(ablation),
        _agreement(ablation),
        "## Has the training converged?",
        _markdown(training_table(ablation)),
        "Losses are means over a run's last fifth of epochs; the change is from the fifth before "
        "it. An experiment whose loss still falls more than the others' could gain from more "
        "epochs, and a comparison at this length says nothing of longer ones. A learning rate "
        "that goes to nothing makes every curve flat at its end.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(ablation: Ablation) -> str:
    data = ablation.data
    seeds = sorted(ablation.table["seed"].unique())
    folds = ", ".join(map(str, ablation.folds))
    blocks = ", ".join(
        f"seed {seed} {ablation.block_seconds[seed] / 60:.1f}"
        for seed in sorted(ablation.block_seconds)
    )
    lines = [
        f"- Data: {len(data.recordings)} recordings of {len(data.classes)} species, "
        f"{len(data.folds)} folds without a recordist in two of them; held out: fold {folds}.",
        *(
            f"- {measure.title}: {len(measure.clusters)} rows of {measure.n_clusters} "
            f"{measure.cluster_kind}"
            + (
                "."
                if measure.all_nocall is None
                else f"; all nocall gets {measure.all_nocall:.3f}."
            )
            for measure in ablation.measures.values()
        ),
        f"- Seeds: {len(seeds)} ({', '.join(map(str, seeds))}); each changes weights, clips, "
        "order and augmentation. Start: "
        + (f"`{ablation.init.name}`." if ablation.init else "each experiment's own."),
        f"- Time: {sum(ablation.block_seconds.values()) / 60:.1f} of "
        f"{ablation.budget_seconds / 60:g} minutes, training and scoring ({blocks}); "
        f"runs at once: {ablation.jobs}, loader workers of each: {ablation.workers}, "
        f"cores: {os.cpu_count()}.",
        "- Left out, since the budget had no room for them: "
        + ("seed " + ", ".join(map(str, ablation.left_out)) if ablation.left_out else "nothing")
        + ".",
    ]
    return "\n".join(lines)


def _experiments(ablation: Ablation) -> str:
    return "\n".join(f"- `{one.name}`: {one.description}." for one in ablation.experiments)


def _score_notes(ablation: Ablation) -> str:
    notes = ["Mean over seeds"]
    if ablation.table["seed"].nunique() > 1:
        notes[0] += " ± sample standard deviation of the seeds"
    notes[0] += "."
    if "simulated_f1" in ablation.measures:
        notes.append(
            "F1 is the competition's row-wise F1. The decision is chosen on soundscapes simulated "
            "from held-out recordings and scored there without its own recordists; labelled and "
            "hidden rows are decided by it and have no part in it."
        )
    if len(ablation.folds) > 1:
        notes.append("Soundscapes are heard by the mean of an experiment's folds.")
    notes.append(
        "Recordings are those held out, each heard by the model that did not train on its fold. "
        "Clips/s is the speed of one run among those trained at once."
    )
    if any(measure.truth is not None for measure in ablation.measures.values()):
        notes.append(
            "In the picture, intervals of a macro AP lie high: a resample repeats rows and lacks "
            "classes, which raises it; a difference has that on both sides."
        )
    return " ".join(notes)


def _difference_notes(ablation: Ablation) -> str:
    n_seeds = ablation.table["seed"].nunique()
    few = [m for m in ablation.measures.values() if m.n_clusters < 10]
    notes = [
        "Mean over seeds of the difference in the same score on the same sound, with a "
        f"{100 * LEVEL:g} % interval from {N_RESAMPLES} resamples of whole soundscapes or "
        "recordists (the same ones for both experiments) and of seeds jointly; behind it, in how "
        "many seeds the difference was above 0. Nothing is trained and no threshold chosen again "
        "in a resample."
    ]
    if n_seeds == 1:
        notes.append("With one seed the intervals say nothing of what another seed would give.")
    elif n_seeds < 6:
        notes.append(
            f"{n_seeds} seeds tell little of how far seeds spread: simulated intervals of 3 seeds "
            "held the truth in 84 to 93 % of cases (4 to 30 clusters), those of 6 in 88 to 95 %."
        )
    if few:
        said = ", ".join(f"{m.title} ({m.n_clusters} {m.cluster_kind})" for m in few)
        notes.append(f"Intervals of so few clusters are too narrow: {said}.")
    notes.append(
        f"No correction is made for {len(ablation.differences)} differences being looked at."
    )
    return " ".join(notes)


def _agreement(ablation: Ablation) -> str:
    """Say which score ranks the experiments as hidden rows do."""
    found = ablation.agreement
    if found is None or found[["experiments", "networks"]].isna().all(axis=None):
        return ""
    table = pd.DataFrame(
        {
            "score": [ablation.measures[key].title for key in found["measure"]],
            "experiments": found["experiments"].map("{:+.2f}".format),
            "networks": found["networks"].map("{:+.2f}".format),
        }
    )
    n_networks = len(ablation.table)
    return (
        "## Which score foretells that on hidden rows?\n\n"
        + _markdown(table)
        + f"\n\nSpearman's correlation with the F1 of hidden rows: of the means of the "
        f"{len(ablation.experiments)} experiments, and of all {n_networks} networks, since seeds "
        "differ as much as experiments."
    )


def score_table(ablation: Ablation) -> pd.DataFrame:
    """Return a row per experiment: mean ± standard deviation of each measure, clips/s."""
    means = ablation.means.set_index(["experiment", "measure"])
    speed = ablation.table.groupby("experiment")["clips_per_second"].mean()
    rows = []
    for experiment in ablation.experiments:
        row = {"experiment": experiment.name}
        for key, measure in ablation.measures.items():
            one = means.loc[(experiment.name, key)]
            spread = "" if np.isnan(one["sd"]) else f" ± {one['sd']:.3f}"
            row[measure.title] = f"{one['mean']:.3f}{spread}"
        rows.append(row | {"clips/s": f"{speed[experiment.name]:.1f}"})
    return pd.DataFrame(rows)


def difference_table(ablation: Ablation) -> pd.DataFrame:
    """Return a row per experiment but the reference: each measure's difference and interval."""
    rows: dict[str, dict[str, str]] = {}
    for one in ablation.differences.to_dict("records"):
        row = rows.setdefault(one["experiment"], {"experiment": one["experiment"]})
        row[ablation.measures[one["measure"]].title] = (
            f"{_signed(one['difference'])} [{_signed(one['low'])}, {_signed(one['high'])}] "
            f"{one['positive_seeds']}/{one['seeds']}"
        )
    return pd.DataFrame(list(rows.values()))


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no negative zero


def training_table(ablation: Ablation) -> pd.DataFrame:
    """Return a row per experiment on its training: epochs, minutes, loss at the end."""
    by_experiment = ablation.table.groupby("experiment")
    rows = []
    for experiment in ablation.experiments:
        own = by_experiment.get_group(experiment.name)
        rows.append(
            {
                "experiment": experiment.name,
                "epochs": f"{own['epochs'].max()}",
                "minutes a seed": f"{own['train_minutes'].mean():.1f}",
                "loss": f"{own['loss_last_fifth'].mean():.4f}",
                "change": f"{own['loss_change_last_fifth'].mean():+.1%}",
            }
        )
    return pd.DataFrame(rows)


def _markdown(table: pd.DataFrame) -> str:
    if table.empty:
        return "None: there is a single experiment."
    head = list(table.columns)
    lines = [head, ["---"] * len(head), *table.fillna("").astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_picture(path: Path, ablation: Ablation) -> None:
    """Write ``ablation.png``, whole or not at all."""
    save_figure(plot_ablation(ablation), path)


def plot_ablation(ablation: Ablation) -> Figure:
    """Draw each measure in a row: scores on the left, differences from the reference right."""
    n_rows, names = len(ablation.measures), [one.name for one in ablation.experiments]
    use_style()
    figure = Figure(figsize=(12, n_rows * (0.9 + 0.32 * len(names))), layout="constrained")
    axes = figure.subplots(n_rows, 2, squeeze=False)
    for (key, measure), (left, right) in zip(ablation.measures.items(), axes, strict=True):
        seeds = ablation.table.pivot(index="experiment", columns="seed", values=key).loc[names]
        means = ablation.means[ablation.means["measure"] == key].set_index("experiment")
        _draw(left, seeds, means["mean"], means)
        if measure.all_nocall is not None:
            left.axvline(measure.all_nocall, color="0.3", ls="--", lw=1.2, label="all nocall")
        left.set_title(measure.title)
        kept = ablation.differences
        if len(kept):
            kept = kept[kept["measure"] == key].set_index("experiment")
            by_seed = seeds - seeds.loc[ablation.reference]
            _draw(right, by_seed, kept["difference"], kept)
            right.tick_params(labelleft=False)
        right.axvline(0, color="0.4", lw=1, zorder=0)
        right.set_title(f"{measure.title}, minus {ablation.reference}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _draw(axes: Axes, seeds: pd.DataFrame, centre: pd.Series, bounds: pd.DataFrame) -> None:
    """Draw a line per experiment, from the top: its seeds, and the mean with its interval."""
    place = {name: -position for position, name in enumerate(seeds.index)}
    points = seeds.stack()
    axes.plot(
        points, [place[name] - 0.18 for name, _ in points.index], "o", color=SEED_COLOR, ms=6,
        mec="0.2", mew=0.5, label="one seed",
    )  # fmt: skip
    y = [place[name] + 0.1 for name in centre.index]
    low, high = centre - bounds["low"], bounds["high"] - centre
    # A percentile interval need not hold the mean, and errorbar takes no negative length.
    errors = np.clip(np.nan_to_num([low, high]), 0, None)
    axes.errorbar(
        centre, y, xerr=errors, fmt="D", color=MEAN_COLOR, capsize=4, ms=7, lw=2,
        label=f"mean over seeds, {100 * LEVEL:g} % interval",
    )  # fmt: skip
    axes.set_yticks(list(place.values()), list(place))
    axes.set_ylim(min(place.values()) - 0.6, 0.6)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
