"""Describe an ablation: a page in Markdown and a figure."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from birdcall.evaluation.ablation import Ablation
from birdcall.evaluation.comparison import LEVEL, N_RESAMPLES
from birdcall.report.plots import ORANGE, SKY, new_figure

_FEW_CLUSTERS, _FEW_SEEDS = 10, 6  # with fewer, the page warns


def describe_ablation(ablation: Ablation, command: str = "") -> str:
    """Return the page: conditions, scores, differences, and how to read them."""
    parts = [
        f"# Ablation on {ablation.data.folder.resolve().name}",
        f"```\n{command}\n```" if command else "",
        _describe_conditions(ablation),
        "\n".join(f"- `{each.name}`: {each.description}." for each in ablation.experiments),
        "## Scores",
        _to_markdown(_score_table(ablation)),
        _score_notes(ablation),
        f"## Differences from `{ablation.options.reference}`",
        _to_markdown(difference_table(ablation)),
        _difference_notes(ablation),
        _describe_agreement(ablation),
        "## Has the training converged?",
        _to_markdown(_training_table(ablation)),
        "The loss is the mean over the last fifth of the epochs of a run; the change is relative "
        "to the fifth before it. An experiment whose loss still falls more than that of the others "
        "could gain from more epochs, and a comparison at this length does not hold for longer "
        "runs. With a learning rate that decays to zero, every curve is flat at its end.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _describe_conditions(ablation: Ablation) -> str:
    data = ablation.data
    seeds = sorted(ablation.table["seed"].unique())
    folds = ", ".join(map(str, ablation.options.folds))
    lines = [
        f"- Data: {len(data.recordings)} recordings of {len(data.classes)} species, "
        f"{len(data.folds)} folds, each recordist in one of them; held out: fold {folds}."
    ]
    for measure in ablation.measures.values():
        n_rows, kind = len(measure.clusters), measure.cluster_kind
        line = f"- {measure.title}: {n_rows} rows of {measure.n_clusters} {kind}"
        if measure.all_nocall is not None:
            line += f"; all nocall gets {measure.all_nocall:.3f}"
        if measure.truth is not None:
            line += f", over {measure.n_classes} classes"
        if measure.n_left_out:
            line += f" ({measure.n_left_out} that occur are left out: no run could learn them)"
        lines.append(f"{line}.")
    options, training = ablation.options, ablation.options.training
    init = f"`{training.init.name}`" if training.init else "as each experiment says"
    seconds = ablation.block_seconds
    by_seed = ", ".join(f"seed {seed} {seconds[seed] / 60:.1f}" for seed in sorted(seconds))
    skipped = "nothing"
    if ablation.left_out:
        skipped = "seed " + ", ".join(map(str, ablation.left_out))
    return "\n".join(
        [
            *lines,
            f"- Seeds: {len(seeds)} ({', '.join(map(str, seeds))}); a seed determines initial "
            f"weights, clips, their order and augmentation. Initial weights: {init}.",
            f"- Time: {sum(seconds.values()) / 60:.1f} of {options.budget_seconds / 60:g} "
            f"minutes, training and scoring ({by_seed}); runs at the same time: {training.jobs}, "
            f"loader workers per run: {training.workers}, cores: {os.cpu_count()}.",
            f"- Left out, since the budget had no room for them: {skipped}.",
        ]
    )


def _score_notes(ablation: Ablation) -> str:
    is_one_seed = ablation.table["seed"].nunique() == 1
    spread = "" if is_one_seed else " ± sample standard deviation of the seeds"
    notes = [f"Mean over seeds{spread}."]
    if "simulated_f1" in ablation.measures:
        notes.append(
            "F1 is the competition's row-wise F1. The decision is chosen on soundscapes simulated "
            "from held-out recordings. Its score there is cross-validated over groups of "
            "recordists. It is applied to labelled and hidden rows, which have no part in the "
            "choice."
        )
    if len(ablation.options.folds) > 1:
        notes.append("On soundscapes the members of all folds of an experiment are averaged.")
    notes.append(
        "Recordings are held out: each is predicted by the model that was not trained on its fold. "
        "Clips/s is the speed of one run among those trained at the same time."
    )
    if any(measure.truth is not None for measure in ablation.measures.values()):
        notes.append(
            "In the figure, intervals of a macro AP lie too high: a resample repeats rows and "
            "lacks classes, which raises it. In a difference this happens on both sides."
        )
    return " ".join(notes)


def _difference_notes(ablation: Ablation) -> str:
    n_seeds = ablation.table["seed"].nunique()
    notes = [
        "Mean over seeds of the difference in the same score on the same audio, with a "
        f"{100 * LEVEL:g} % interval from {N_RESAMPLES} resamples of whole soundscapes or "
        "recordists (the same resamples for both experiments) and of seeds jointly. The last "
        "number is in how many seeds the difference was above 0. A resample does not train again "
        "and does not choose thresholds again."
    ]
    if n_seeds == 1:
        notes.append("With one seed the intervals do not include differences between seeds.")
    elif n_seeds < _FEW_SEEDS:
        notes.append(
            f"{n_seeds} seeds do not measure well how much seeds differ: in a simulation, "
            "intervals from 3 seeds contained the truth in 84 to 93 % of cases (4 to 30 clusters), "
            "intervals from 6 seeds in 88 to 95 %."
        )
    few = [m for m in ablation.measures.values() if m.n_clusters < _FEW_CLUSTERS]
    if few:
        listed = ", ".join(f"{m.title} ({m.n_clusters} {m.cluster_kind})" for m in few)
        notes.append(f"Intervals of so few clusters are too narrow: {listed}.")
    notes.append(f"The intervals are not corrected for {len(ablation.differences)} comparisons.")
    return " ".join(notes)


def _describe_agreement(ablation: Ablation) -> str:
    """Return which scores rank the experiments as the hidden rows do."""
    agreement = ablation.agreement
    if agreement is None or agreement[["experiments", "networks"]].isna().all(axis=None):
        return ""
    table = pd.DataFrame(
        {
            "score": [ablation.measures[key].title for key in agreement["measure"]],
            "experiments": agreement["experiments"].map("{:+.2f}".format),
            "networks": agreement["networks"].map("{:+.2f}".format),
        }
    )
    return (
        "## Which scores predict the score on hidden rows?\n\n"
        + _to_markdown(table)
        + "\n\nSpearman's correlation with the F1 of hidden rows: of the means of the "
        f"{len(ablation.experiments)} experiments, and of all {len(ablation.table)} networks, "
        "since seeds differ as much as experiments."
    )


def _score_table(ablation: Ablation) -> pd.DataFrame:
    """Return a row per experiment: mean ± standard deviation of each measure, clips/s."""
    means = ablation.means.set_index(["experiment", "measure"])
    speed = ablation.table.groupby("experiment")["clips_per_second"].mean()
    rows = []
    for experiment in ablation.experiments:
        row = {"experiment": experiment.name}
        for key, measure in ablation.measures.items():
            mean, deviation = means.loc[(experiment.name, key), ["mean", "sd"]]
            spread = "" if np.isnan(deviation) else f" ± {deviation:.3f}"
            row[measure.title] = f"{mean:.3f}{spread}"
        rows.append(row | {"clips/s": f"{speed[experiment.name]:.1f}"})
    return pd.DataFrame(rows)


def difference_table(ablation: Ablation) -> pd.DataFrame:
    """Return a row per experiment but the reference: each measure's difference and interval."""
    rows: dict[str, dict[str, str]] = {}
    for item in ablation.differences.to_dict("records"):
        row = rows.setdefault(item["experiment"], {"experiment": item["experiment"]})
        # + 0.0: no negative zero
        difference, low, high = (
            f"{round(item[name], 3) + 0.0:+.3f}" for name in ("difference", "low", "high")
        )
        seeds = f"{item['positive_seeds']}/{item['seeds']}"
        row[ablation.measures[item["measure"]].title] = f"{difference} [{low}, {high}] {seeds}"
    return pd.DataFrame(list(rows.values()))


def _training_table(ablation: Ablation) -> pd.DataFrame:
    """Return a row per experiment on its training: epochs, minutes, loss at the end."""
    by_experiment = ablation.table.groupby("experiment")
    rows = []
    for experiment in ablation.experiments:
        runs = by_experiment.get_group(experiment.name)
        rows.append(
            {
                "experiment": experiment.name,
                "epochs": f"{runs['epochs'].max()}",
                "minutes a seed": f"{runs['train_minutes'].mean():.1f}",
                "loss": f"{runs['loss_last_fifth'].mean():.4f}",
                "change": f"{runs['loss_change_last_fifth'].mean():+.1%}",
            }
        )
    return pd.DataFrame(rows)


def _to_markdown(table: pd.DataFrame) -> str:
    if table.empty:
        return "None: there is a single experiment."
    header = list(table.columns)
    lines = [header, ["---"] * len(header), *table.fillna("").astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_ablation(ablation: Ablation) -> Figure:
    """Draw a row for each measure: its scores, and the differences from the reference."""
    n_rows = len(ablation.measures)
    names = [experiment.name for experiment in ablation.experiments]
    figure = new_figure(12, n_rows * (0.9 + 0.32 * len(names)))
    axes = figure.subplots(n_rows, 2, squeeze=False)
    for (key, measure), (left, right) in zip(ablation.measures.items(), axes, strict=True):
        seeds = ablation.table.pivot(index="experiment", columns="seed", values=key).loc[names]
        means = ablation.means[ablation.means["measure"] == key].set_index("experiment")
        _draw_experiments(left, seeds, means["mean"], means)
        if measure.all_nocall is not None:
            left.axvline(measure.all_nocall, color="0.3", ls="--", lw=1.2, label="all nocall")
        left.set_title(measure.title)
        differences = ablation.differences
        if len(differences):
            differences = differences[differences["measure"] == key].set_index("experiment")
            by_seed = seeds - seeds.loc[ablation.options.reference]
            _draw_experiments(right, by_seed, differences["difference"], differences)
            right.tick_params(labelleft=False)
        right.axvline(0, color="0.4", lw=1, zorder=0)
        right.set_title(f"{measure.title}, minus {ablation.options.reference}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _draw_experiments(
    axes: Axes, seeds: pd.DataFrame, centre: pd.Series, bounds: pd.DataFrame
) -> None:
    """Draw a line per experiment, from the top: its seeds, and the mean with its interval."""
    line = {name: -index for index, name in enumerate(seeds.index)}
    points = seeds.stack()
    axes.plot(
        points, [line[name] - 0.18 for name, _ in points.index], "o", color=SKY, ms=6, mec="0.2",
        mew=0.5, label="one seed",
    )  # fmt: skip
    low, high = centre - bounds["low"], bounds["high"] - centre
    # A percentile interval need not contain the mean, and errorbar takes no negative length.
    errors = np.clip(np.nan_to_num([low, high]), 0, None)
    axes.errorbar(
        centre, [line[name] + 0.1 for name in centre.index], xerr=errors, fmt="D", color=ORANGE,
        capsize=4, ms=7, lw=2, label=f"mean over seeds, {100 * LEVEL:g} % interval",
    )  # fmt: skip
    axes.set_yticks(list(line.values()), list(line))
    axes.set_ylim(min(line.values()) - 0.6, 0.6)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
