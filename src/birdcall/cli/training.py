"""Commands that train: experiments, train, student, ablate; and export what was trained."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from birdcall.cli.options import (
    ContextSeconds,
    Data,
    Fold,
    Folders,
    Folds,
    Init,
    Labels,
    MustNotOverlap,
    Noise,
    OtherBirds,
    Output,
    Shifts,
    SoundscapeLabels,
    Unlabelled,
    WindowSegments,
    parse_fold,
)
from birdcall.config import FULL
from birdcall.experiments import EXPERIMENTS

commands = typer.Typer()

_Experiments = Annotated[
    list[str], typer.Option(help=f"May be repeated. One of: {', '.join(EXPERIMENTS)}.")
]
_Workers = Annotated[int, typer.Option(min=0, help="Processes that decode recordings.")]
_Jobs = Annotated[int, typer.Option(min=1, help="Runs trained at once; they share the cores.")]
_WORKERS = max(1, min(8, (os.cpu_count() or 2) - 1))


@commands.command("experiments")
def _experiments() -> None:
    """List the named experiments: network, size, stride and receptive field."""
    from birdcall.models.summary import experiments_table

    typer.echo(experiments_table(list(EXPERIMENTS)).to_string(index=False))


@commands.command("train")
def _train(
    data: Data,
    experiment: _Experiments,
    fold: Annotated[
        str, typer.Option(help="Number of the held-out fold, all, or full: hold out nothing.")
    ] = "all",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    labels: Labels = None,
    other_birds: OtherBirds = None,
    soundscape_labels: SoundscapeLabels = None,
    init: Init = None,
    workers: _Workers = _WORKERS,
    jobs: _Jobs = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue unfinished runs, skip finished ones.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace trained and unfinished runs.")
    ] = False,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between two saved states, for --resume.")
    ] = 200,
    time_limit: Annotated[
        float | None,
        typer.Option(
            min=0, help="Save the state and stop after these seconds.", show_default="none"
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster that trains the runs, or auto: --jobs on each node, or "
            "on each GPU where there are some.",
            show_default="this machine",
        ),
    ] = None,
) -> None:
    """Train experiments, each on all folds except the held-out fold; --fold full: on everything.

    A run on several GPUs: torchrun --nproc_per_node=2 -m birdcall train ...
    """
    from birdcall.experiments import find_experiment
    from birdcall.inference.ensemble import default_device
    from birdcall.training.cluster import RayCluster
    from birdcall.training.distributed import distributed_context
    from birdcall.training.log import find_best_epochs, runs_table
    from birdcall.training.runs import plan_runs, train_many
    from birdcall.training.trainer import RunOptions

    if resume and overwrite:
        raise ValueError("--resume continues a run, --overwrite replaces it: give one of them")
    deadline = None if time_limit is None else time.monotonic() + time_limit
    chosen, held_out = [find_experiment(name) for name in experiment], parse_fold(fold)
    folders = Folders(data, output, folds)
    training_data = folders.load_training_data(
        noise, labels, other_birds=other_birds, soundscape_labels=soundscape_labels
    )
    runs = plan_runs(chosen, training_data, held_out, folders.runs)
    with (
        _report_interruption(deadline),
        distributed_context(default_device()) as (distributed, device),
    ):
        options = RunOptions(
            workers=workers,
            jobs=jobs,
            device=device,
            distributed=distributed,
            init=init,
            resume=resume,
            overwrite=overwrite,
            save_every=save_every,
            deadline=deadline,
            progress=True,
        )
        cluster = None if ray is None else RayCluster(ray)
        train_many(runs, training_data, options, cluster)
        if distributed.is_first:
            typer.echo(runs_table(runs).to_string(index=False))
            for run in (run for run in runs if run.fold == FULL):
                best = find_best_epochs(run.folder.parent)
                shown = ", ".join(f"{name} after epoch {epoch}" for name, epoch in best.items())
                typer.echo(
                    f"{run.name}: not validated; trained for the {run.experiment.train.epochs} "
                    f"epochs of the experiment; the folds' validation was best: {shown or 'no log'}"
                )


@contextmanager
def _report_interruption(deadline: float | None = None) -> Iterator[None]:
    """Print the step of the interruption: a success at the deadline, else exit code 130."""
    from birdcall.training.runs import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interruption:
        if deadline is not None and time.monotonic() >= deadline:
            typer.echo(str(interruption))
            return
        typer.echo(f"birdcall: {interruption}", err=True)
        raise typer.Exit(130) from None


@commands.command("student")
def _student(
    data: Data,
    soundscapes: Annotated[
        Path, typer.Option(help="Folder of soundscapes without labels.", show_default=False)
    ],
    experiment: _Experiments,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of labelling and training.")] = 1,
    fold: Annotated[
        str, typer.Option(help="Number of the held-out fold, all, or full: hold out nothing.")
    ] = "all",
    labelled: MustNotOverlap = None,
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    other_birds: OtherBirds = None,
    init: Init = None,
    workers: _Workers = _WORKERS,
    jobs: _Jobs = 1,
) -> None:
    """Train experiments on soundscapes that their runs label, in rounds; a second call resumes.

    Round 1 trains <experiment>_student1 on labels by the runs of the other experiments, round 2
    <experiment>_student2 on labels by these students. Give at least two experiments.
    """
    from birdcall.data.soundscapes import require_folders
    from birdcall.experiments import find_experiment
    from birdcall.inference.ensemble import default_device
    from birdcall.training.log import runs_table
    from birdcall.training.student import StudentOptions, describe_labels, train_rounds
    from birdcall.training.trainer import RunOptions

    require_folders([soundscapes, *(labelled or ())])
    chosen, held_out = [find_experiment(name) for name in experiment], parse_fold(fold)
    folders = Folders(data, output, folds)
    training_data = folders.load_training_data(noise, other_birds=other_birds)
    options = StudentOptions(
        soundscapes=soundscapes,
        n_rounds=rounds,
        fold=held_out,
        labelled=labelled or (),
        training=RunOptions(
            workers=workers,
            jobs=jobs,
            device=default_device(),
            init=init,
            resume=True,
            progress=True,
        ),
    )
    with _report_interruption():
        for done in train_rounds(
            chosen, training_data, output=folders.output, runs=folders.runs, options=options
        ):
            typer.echo(describe_labels(done.labels))
            typer.echo(runs_table(done.runs).to_string(index=False))


@commands.command("ablate")
def _ablate(
    data: Data,
    experiment: _Experiments,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each experiment and fold.")] = 3,
    fold: Fold = "all",
    minutes: Annotated[
        float, typer.Option(help="Time budget; a seed that does not fit is left out.")
    ] = 60.0,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Experiment that the others are compared with.", show_default="the first one"
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Folder of this ablation in the output folder.")
    ] = "ablation",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    other_birds: OtherBirds = None,
    soundscape_labels: SoundscapeLabels = None,
    unlabelled: Unlabelled = None,
    context_seconds: ContextSeconds = 0.0,
    shifts: Shifts = 1,
    init: Init = None,
    workers: _Workers = _WORKERS,
    jobs: _Jobs = 1,
) -> None:
    """Compare experiments over several seeds within a time budget; a second call resumes."""
    from birdcall.data.soundscapes import require_folders
    from birdcall.evaluation.ablation import AblationOptions, ablate
    from birdcall.evaluation.predict import HeldOutOptions
    from birdcall.experiments import find_experiment
    from birdcall.inference.ensemble import default_device
    from birdcall.inference.windows import WindowConfig
    from birdcall.report.ablation import describe_ablation, plot_ablation
    from birdcall.report.plots import save_figure
    from birdcall.storage.files import inside, write_atomically
    from birdcall.training.trainer import RunOptions

    require_folders(unlabelled or ())
    chosen = [find_experiment(experiment_name) for experiment_name in experiment]
    folders = Folders(data, output, folds)
    folder = inside(folders.output, name)
    held_out = parse_fold(fold)
    training_data = folders.load_training_data(
        noise, other_birds=other_birds, soundscape_labels=soundscape_labels
    )
    with _report_interruption():
        options = AblationOptions(
            budget_seconds=60 * minutes,
            n_seeds=seeds,
            folds=None if held_out is None else (held_out,),
            reference=reference,
            training=RunOptions(workers=workers, jobs=jobs, init=init, progress=True),
            evaluation=HeldOutOptions(
                default_device(),
                window_config=WindowConfig(1, context_seconds, shifts),
                unlabelled_folders=unlabelled or (),
            ),
        )
        ablation = ablate(chosen, training_data, folder, options)
    page = describe_ablation(ablation, shlex.join(["birdcall", *sys.argv[1:]]))
    ablation.write_tables(folder)
    save_figure(plot_ablation(ablation), folder / "ablation.png")
    write_atomically(folder / "ablation.md", page)
    typer.echo(page)


@commands.command("export")
def _export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run or of a packaged member.")],
    to: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="model.onnx in the folder"),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            help="Input: log_mel, for the kernel and evaluate, or waveform, for other programs.",
        ),
    ] = "log_mel",
    int8: Annotated[
        Path | None,
        typer.Option(
            help="Folder of recordings: much of the network runs in int8, calibrated on half of "
            "them, if 99 % of the rows of the other half have the same labels.",
            show_default="none",
        ),
    ] = None,
    bfloat16: Annotated[
        Path | None,
        typer.Option(help="As --int8, in bfloat16 by OpenVINO (an extra).", show_default="none"),
    ] = None,
    window_segments: WindowSegments = 1,
    context_seconds: ContextSeconds = 0.0,
) -> None:
    """Export a network to ONNX, and check that ONNX Runtime predicts the same as torch."""
    from birdcall.inference.engine import sample_log_mels
    from birdcall.inference.windows import ONNX_FILE, WindowConfig, export_checkpoint
    from birdcall.models.checkpoint import find_bfloat16_fault, read_checkpoint
    from birdcall.models.export import allow_bfloat16, quantize_onnx, require_windows
    from birdcall.storage.files import find_files, readable_sound

    path = to or checkpoint / ONNX_FILE
    if source != "log_mel" and to is None:
        raise ValueError(f"--input waveform needs --to FILE: {path} must have log_mel as its input")
    folder, option = (int8, "--int8") if bfloat16 is None else (bfloat16, "--bfloat16")
    if None not in (int8, bfloat16) or (folder is not None and source != "log_mel"):
        raise ValueError("give no more than one of --int8, --bfloat16 and --input waveform")
    if bfloat16 is not None and (fault := find_bfloat16_fault()):
        raise ValueError(f"--bfloat16: {fault}")
    window_config = WindowConfig(window_segments, context_seconds)
    frontend = read_checkpoint(checkpoint).experiment.frontend
    if folder is not None:  # before the export, which it would leave in float32
        recordings = readable_sound(find_files(folder), "recordings")
        log_mels = sample_log_mels(recordings, frontend, window_config)
        require_windows(f"{option} {folder}", *log_mels)
    difference = export_checkpoint(checkpoint, path, window_config, source)
    typer.echo(f"{path}: written; probabilities differ from torch's by at most {difference:.1g}")
    if folder is not None:
        parity = (quantize_onnx if bfloat16 is None else allow_bfloat16)(path, *log_mels)
        kept = f"; {parity.float_share:.0%} of its layers stay float32" if int8 else ""
        typer.echo(
            f"{path}: in {option[2:]} {parity.speed:.2f} x as fast, {parity.rows_equal:.1%} of "
            f"held-out rows have the same labels, row-wise F1 {parity.row_wise_f1:.3f}{kept}"
        )
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
