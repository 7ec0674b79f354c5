"""Commands that measure what was trained: evaluate, score, figures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from birdcall.cli.options import (
    BirdNET,
    ContextSeconds,
    Data,
    Fold,
    Folders,
    Folds,
    LabelColumn,
    Labelled,
    Noise,
    Output,
    Trained,
    Unlabelled,
    WindowSegments,
    parse_fold,
)

commands = typer.Typer()


@commands.command("evaluate")
def _evaluate(
    context: typer.Context,
    data: Data,
    experiment: Trained = None,
    fold: Fold = "all",
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            help="Also score these experiments as an ensemble: A+B. May be repeated.",
            show_default="all experiments as an ensemble",
        ),
    ] = None,
    soundscapes: Labelled = None,
    label_column: LabelColumn = None,
    unlabelled: Unlabelled = None,
    birdnet: BirdNET = False,
    nocall_share: Annotated[
        float, typer.Option(help="Expected share of rows without a bird.")
    ] = 0.54,
    window_segments: WindowSegments = 1,
    context_seconds: ContextSeconds = 0.0,
    shifts: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Average each segment over windows that begin so often in its 5 s: a divisor of "
            "50. Of several (the option repeated) the first, or a later one that scores clearly "
            "higher.",
            show_default="1",
        ),
    ] = None,
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    pages: Annotated[
        int, typer.Option(min=0, help="Number of labelled soundscapes that get a page.")
    ] = 20,
    screenshots: Annotated[
        Path | None,
        typer.Option(help="Folder for screenshots of the report (Chromium).", show_default="none"),
    ] = None,
) -> None:
    """Score runs on held-out audio of three kinds, choose the decision, write the report."""
    from birdcall.data.soundscapes import require_folders

    require_folders(unlabelled or ())
    if screenshots is not None:
        from birdcall.report.html import require_browser

        require_browser()  # before an hour of predictions, not after it
    from birdcall.data.birdnet import open_birdnet
    from birdcall.data.folds import describe_training_only
    from birdcall.evaluation.ensemble_decision import predict_with_best_windows
    from birdcall.evaluation.mistakes import find_mistakes, predict_mistakes, write_labelled_pages
    from birdcall.evaluation.predict import HeldOutOptions, write_oof_parquet
    from birdcall.evaluation.scoring import check_request, describe_classes, evaluate
    from birdcall.evaluation.tables import wide_table
    from birdcall.inference.decision import write_decision
    from birdcall.inference.ensemble import default_device
    from birdcall.inference.windows import WindowConfig
    from birdcall.report.report import (
        PAGES_FOLDER,
        describe_decision,
        find_weaknesses,
        write_report,
    )
    from birdcall.report.soundscape import SoundscapePageWriter
    from birdcall.storage.files import write_atomically
    from birdcall.storage.locks import locked
    from birdcall.training.log import find_runs

    yardstick = open_birdnet() if birdnet else None
    folders = Folders(data, output, folds)
    context.with_resource(locked(folders.prediction_cache))
    runs = find_runs(folders.runs, experiment, parse_fold(fold))
    ensembles = [tuple(names.split("+")) for names in ensemble or []]
    check_request(sorted({run.parent.name for run in runs}), ensembles, nocall_share)
    training_data = folders.load_training_data(noise)
    options = HeldOutOptions(
        device=default_device(),
        labelled_folders=soundscapes or (),
        label_column=label_column,
        unlabelled_folders=unlabelled or (),
        yardstick=yardstick,
        cache_folder=folders.prediction_cache,
        progress=True,
    )
    windows = [WindowConfig(window_segments, context_seconds, number) for number in shifts or (1,)]
    candidates = [replace(options, window_config=item) for item in windows]
    predictions = predict_with_best_windows(runs, training_data, candidates, nocall_share)
    evaluation = evaluate(predictions, ensembles, nocall_share)
    output, report = folders.output, folders.output / "report.html"
    write_decision(folders.decision, evaluation.ensemble.decision)
    write_atomically(output / "scores.csv", evaluation.scores.to_csv(index=False))
    write_atomically(output / "per_class.csv", evaluation.per_class.to_csv(index=False))
    out_of_fold = list(predictions.out_of_fold.values())
    write_oof_parquet(output / "oof.parquet", out_of_fold, evaluation.classes)
    page_writer = SoundscapePageWriter(
        folder=output / PAGES_FOLDER,
        decision=evaluation.ensemble.decision,
        classes=evaluation.classes,
        members=tuple(member.name for member in predictions.ensemble.members),
        home="../report.html",
    )
    soundscape_pages = write_labelled_pages(predictions, evaluation, page_writer, pages)
    mistakes = find_mistakes(predictions, evaluation.ensemble)
    write_report(
        report,
        folders.name,
        evaluation,
        mistakes=list(predict_mistakes(predictions, mistakes)),
        pages=soundscape_pages,
    )
    typer.echo(wide_table(evaluation.scores).to_string(index=False))
    typer.echo(describe_classes(evaluation.scores))
    if training_only := describe_training_only(training_data.recordings):
        typer.echo(training_only)
    typer.echo(f"decision: {describe_decision(evaluation.ensemble.decision)}")
    for weakness in find_weaknesses(evaluation.scores):
        typer.echo(weakness.text)
    typer.echo(f"report: {report}")
    if screenshots is not None:
        from birdcall.report.html import open_browser, take_screenshots

        page = None
        if soundscape_pages:  # the soundscape with most birds
            birds = evaluation.soundscapes.set_index("recording")["birds"]
            page = soundscape_pages[birds[list(soundscape_pages)].idxmax()]
        with open_browser() as browser:
            pictures = take_screenshots(browser, report, page, screenshots)
        typer.echo("screenshots: " + ", ".join(map(str, pictures)))


@commands.command("score")
def _score(
    submission: Annotated[Path, typer.Argument(help="A submission.csv.")],
    data: Data,
) -> None:
    """Score a submission against solution.csv in the data folder."""
    from birdcall.evaluation.comparison import score_submission

    typer.echo(score_submission(data, submission))


@commands.command("figures")
def _figures(
    context: typer.Context,
    data: Data,
    experiment: Annotated[
        str, typer.Option(help="Experiment whose architecture is drawn.")
    ] = "efficientnet_b0_gru_attention",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    to: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("docs/figures"),
) -> None:
    """Draw the figures of README and docs from the results of the other commands."""
    from birdcall.benchmark.frontend import plot_frontend_speed
    from birdcall.benchmark.inference import plot_inference_speed
    from birdcall.benchmark.loader import plot_loader_speed
    from birdcall.evaluation.predict import HeldOutOptions, predict_held_out
    from birdcall.evaluation.scoring import evaluate
    from birdcall.experiments import find_experiment
    from birdcall.inference.ensemble import default_device
    from birdcall.report.architecture import project_figures
    from birdcall.report.plots import plot_table, write_figures
    from birdcall.storage.locks import locked
    from birdcall.training.log import find_runs

    folders = Folders(data, output, folds)
    context.with_resource(locked(folders.prediction_cache))
    options = HeldOutOptions(
        device=default_device(), cache_folder=folders.prediction_cache, progress=True
    )
    figures = project_figures(
        find_experiment(experiment),
        lambda: evaluate(
            predict_held_out(find_runs(folders.runs), folders.load_training_data(noise), options)
        ),
    )
    for name, plot in (
        ("frontend", plot_frontend_speed),
        ("loader", plot_loader_speed),
        ("inference", plot_inference_speed),
    ):
        figures[f"{name}.svg"] = partial(plot_table, folders.benchmark / f"{name}.csv", plot)
    for line in write_figures(to, figures):
        typer.echo(line)
