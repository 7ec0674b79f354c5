"""The pipeline in fresh processes on a tiny demo, the kernel, and what commands refuse."""

import html
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import SCRIPT, run_script_here
from shortened import (
    shorten_packaging,
    shorten_previews,
    shorten_simulation,
    shorten_training,
)

from birdcall.__main__ import main
from birdcall.experiments import EXPERIMENTS, find_experiment
from birdcall.models.checkpoint import Checkpoint, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.storage.files import atomic_path
from birdcall.storage.locks import locked

# The commands, each with its arguments as `sys.argv` has them, one after another: a process for
# each would import torch five times, and find nothing that the first one does not find.
COMMANDS = """
import json, sys
sys.path.insert(0, {tests!r})
from helpers import fake_birdnet
from pytest import MonkeyPatch
from shortened import (
    shorten_packaging, shorten_previews, shorten_simulation, shorten_training
)
from birdcall.__main__ import main
from birdcall.taxonomy import all_species
shorten_training(MonkeyPatch())
for command in json.loads(sys.argv[1]):
    if command[0] == "train":
        shorten_previews(MonkeyPatch())
    if command[0] == "evaluate":
        shorten_simulation(MonkeyPatch())
        labels = [f"{{species.scientific_name}}_Bird" for species in all_species()]
        MonkeyPatch().setattr("birdcall.data.birdnet.open_birdnet", lambda: fake_birdnet(labels))
    if command[0] == "package":
        shorten_packaging(MonkeyPatch())
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def run_in_fresh_process(folder: Path, *commands: tuple) -> str:
    """Run commands in ``folder`` as a user does; all must succeed. Returns what they printed."""
    given = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS.format(tests=str(Path(__file__).parent)), given],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in a folder and in the test's process: torch is not imported again for it.

    Returns what the command printed; with ``fails`` it must end with the exit code of an error that
    the user can correct, and the last line of stderr is returned.
    """
    shorten_training(monkeypatch)
    shorten_previews(monkeypatch)
    shorten_simulation(monkeypatch)

    def run_here(folder: Path, *arguments, fails: bool = False) -> str:
        monkeypatch.chdir(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert ended.value.code == (2 if fails else 0), printed.err
        return printed.err.strip().splitlines()[-1] if fails else printed.out

    return run_here


WINDOWS = ("--context-seconds", 2.5, "--shifts", 2)  # of the decision, and of the kernel


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, demo_folder):
    """A folder in which all steps of the pipeline have run on the tiny demo, and the demo."""
    folder = tmp_path_factory.mktemp("pipeline")
    data = ("--data", demo_folder)
    experiments = ("--experiment", "small_gru", "--experiment", "small_attention_normed")
    printed = run_in_fresh_process(
        folder,
        ("audit", *data, "--cache", "--workers", 0),
        ("folds", *data, "--n-folds", 2),
        ("train", *data, *experiments, "--workers", 0),
        ("evaluate", *data, *WINDOWS, "--birdnet"),
        ("package", *data, "--script", SCRIPT, "--dry-run"),
    )
    (folder / "printed.txt").write_text(printed)
    return folder, demo_folder


def test_the_kernel_writes_every_row_of_test_csv_in_order(pipeline, run):
    folder, demo = pipeline
    submission = folder / "output" / "tiny" / "submission.csv"
    rows, written = pd.read_csv(demo / "test.csv"), pd.read_csv(submission)
    assert list(written.columns) == ["row_id", "birds"]
    assert list(written["row_id"]) == list(rows["row_id"])
    assert "all nocall" in run(folder, "score", submission, "--data", demo)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--ensemble", "small_gru+nobody"), "no run of nobody"),
        (("--soundscapes", "nowhere"), "nowhere: no such folder of labelled soundscapes"),
        (("--fold", "7"), "no trained run of fold 7"),
        (("--experiment", "small_plain"), "no small_plain; `birdcall train` makes one"),
        (("--experiment", "small"), "runs of small_attention_normed, small_gru"),
        (("--unlabelled", "nowhere"), "nowhere"),
        (("--noise", "nowhere"), "nowhere"),
        (("--window-segments", "1000"), "window_segments is 1000"),
        (("--nocall-share", "1.5"), "nocall share is 1.5"),
    ],
)
def test_evaluate_refuses_bad_input_in_one_line(pipeline, run, arguments, complaint):
    folder, demo = pipeline
    assert complaint in run(folder, "evaluate", "--data", demo, *arguments, fails=True)


def test_evaluate_puts_birdnet_beside_the_ensemble(pipeline):
    """Its rows change no others: see test_yardstick.py."""
    folder, demo = pipeline
    output = folder / "output" / demo.name
    names = ("BirdNET 2.4", "BirdNET 2.4, decision chosen")
    assert all(name in (folder / "printed.txt").read_text() for name in names)
    assert tuple(pd.read_csv(output / "scores.csv")["name"].unique()[-2:]) == names
    assert "BirdNET 2.4 predicts labelled soundscapes only" in (output / "report.html").read_text()


def test_predict_and_the_kernel_write_the_same_submission(pipeline, run):
    folder, demo = pipeline
    submission = folder / "output" / "tiny" / "submission.csv"
    by_kernel = submission.read_bytes()
    run(folder, "predict", "--data", demo)
    assert submission.read_bytes() == by_kernel


def test_full_runs_are_trained_and_packaged_in_place_of_those_of_folds(
    pipeline, run, tmp_path, monkeypatch
):
    folder, demo = pipeline
    for name in ("output", "folds"):
        shutil.copytree(folder / name, tmp_path / name)
    experiments = ("--experiment", "small_gru", "--experiment", "small_attention_normed")
    printed = run(tmp_path, "train", "--data", demo, *experiments, "--fold", "full", "--workers", 0)
    assert "small_gru, full: not validated" in printed
    assert "fold1 after epoch" in printed
    assert "full held out nothing" in run(
        tmp_path, "evaluate", "--data", demo, "--fold", "full", fails=True
    )
    ablate = ("ablate", "--data", demo, "--experiment", "small_gru", "--fold", "full")
    assert "give it folds, not full" in run(tmp_path, *ablate, fails=True)
    shorten_packaging(monkeypatch)
    assert "2 members" in run(tmp_path, "package", "--data", demo, "--script", SCRIPT, "--full")
    dataset = tmp_path / "kernels" / "build" / "dataset"
    decision = json.loads((dataset / "decision.json").read_text())
    assert sorted(decision["members"]) == ["small_attention_normed-full", "small_gru-full"]
    assert "small_gru-fold0" in decision["chosen_on"]
    run(tmp_path, "predict", "--data", demo)
    assert (tmp_path / "output" / "tiny" / "submission.csv").is_file()


def test_each_step_writes_the_files_of_the_readme(pipeline):
    folder, _ = pipeline
    output = folder / "output" / "tiny"
    for name in (
        "audit.csv",
        "scores.csv",
        "per_class.csv",
        "oof.parquet",
        "decision.json",
        "report.html",
        "folds.png",
    ):
        assert (output / name).stat().st_size > 0
    runs = {path.parent.relative_to(output).as_posix() for path in output.rglob("model.json")}
    assert runs == {
        f"runs/{e}/fold{k}" for e in ("small_gru", "small_attention_normed") for k in (0, 1)
    }
    assert (folder / "folds" / "tiny.csv").is_file()
    report = (output / "report.html").read_text()
    assert "all nocall" in report
    assert "data:audio/mpeg;base64," in report
    assert "default-src 'none'" in report  # it opens without a network
    assert len(report) < 15e6
    assert (output / "soundscapes").is_dir()


def test_the_package_has_the_layout_that_kaggle_needs(pipeline):
    build = pipeline[0] / "kernels" / "build"
    metadata = json.loads((build / "kernel" / "kernel-metadata.json").read_text())
    assert metadata["enable_internet"] is False
    assert (build / "kernel" / metadata["code_file"]).read_bytes() == SCRIPT.read_bytes()
    dataset = json.loads((build / "dataset" / "dataset-metadata.json").read_text())
    assert dataset["id"] in metadata["dataset_sources"]
    assert 6 <= len(dataset["title"]) <= 50
    assert metadata["id"].split("/")[1] == metadata["title"].replace(" ", "-")
    manifest = json.loads((build / "dataset" / "manifest.json").read_text())
    assert manifest["name"] == "birdcall"
    assert "dataset-metadata.json" not in manifest["files"]  # Kaggle does not mount it
    assert sum(name.endswith("model.safetensors") for name in manifest["files"]) == 4


def test_the_kernel_also_finds_its_data_in_the_old_layout_of_mounts(pipeline, tmp_path):
    folder, demo = pipeline
    build = folder / "kernels" / "build"
    root, working = tmp_path / "input", tmp_path / "working"
    working.mkdir()
    root.mkdir()
    # The dry run has the new one.
    (root / "birdsong-recognition").symlink_to(demo)
    (root / "birdcall-package").symlink_to(build / "dataset")
    environment = {"KAGGLE_INPUT": str(root), "KAGGLE_WORKING": str(working)}
    done = run_script_here([sys.executable, str(SCRIPT)], environment)
    assert done.returncode == 0, done.stdout
    by_dry_run = folder / "output" / "tiny" / "submission.csv"
    assert (working / "submission.csv").read_bytes() == by_dry_run.read_bytes()


def test_predict_finds_birds_in_a_folder_of_recordings(pipeline, run, tmp_path):
    folder, demo = pipeline
    (tmp_path / "mine").mkdir()
    source = next((demo / "test_audio").iterdir())
    shutil.copyfile(source, tmp_path / "mine" / "dawn <1>.mp3")
    (tmp_path / "mine" / "broken.mp3").write_bytes(b"<html>")
    printed = run(folder, "predict", tmp_path / "mine", "--output", tmp_path / "out")
    assert "1 recordings" in printed
    assert "1 failed" in printed
    table = pd.read_csv(tmp_path / "out" / "detections.csv")
    assert list(table.columns[:4]) == ["recording", "onset", "offset", "ebird_code"]
    assert "broken.mp3" in (tmp_path / "out" / "failed.csv").read_text()
    assert len(list((tmp_path / "out" / "raven").iterdir())) == 1


def test_predict_resumes_and_writes_the_requested_formats(pipeline, run, tmp_path):
    folder, demo = pipeline
    (tmp_path / "mine").mkdir()
    for path in sorted((demo / "test_audio").iterdir())[:3]:
        shutil.copyfile(path, tmp_path / "mine" / path.name)
    output = tmp_path / "out"
    run(folder, "predict", tmp_path / "mine" / "*.mp3", "--output", output, "--format", "parquet")
    journal = (output / "journal.jsonl").read_bytes()
    table = pd.read_parquet(output / "detections.parquet")
    printed = run(
        folder,
        *("predict", tmp_path / "mine" / "*.mp3", "--output", output, "--format", "jsonl"),
        *("--format", "audacity", "--min-confidence", "0.9"),
    )
    assert (output / "journal.jsonl").read_bytes() == journal  # nothing was predicted again
    assert f"{(table['confidence'] >= 0.9).sum()} detections in 3 recordings" in printed
    assert len(list((output / "audacity").iterdir())) == 3
    run(folder, "predict", tmp_path / "mine", "--output", tmp_path / "two", "--embeddings")
    assert len(list((tmp_path / "two" / "embeddings").iterdir())) == 3


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((), "either PATHS of recordings or --data DIR"),
        (("nowhere",), "no such recording or folder"),
        (("{audio}", "--species", "dodo"), "knows no species dodo"),
        (("{audio}", "--format", "xls"), "format is 'xls'"),
        (("{audio}", "--min-confidence", "2"), "min_confidence is 2"),
        (("{audio}", "--package", "nowhere"), "no such manifest"),
        (("{audio}", "--ray", "127.0.0.1:1"), "no cluster answers there"),
        (("{audio}", "--label-column", "Species"), "--view"),
        (("--data", "{audio}", "--species", "amecro"), "--data"),
    ],
)
def test_predict_refuses_bad_input_in_one_line(pipeline, run, tmp_path, arguments, complaint):
    folder, demo = pipeline
    given = [text.format(audio=demo / "test_audio") for text in arguments]
    if "--output" not in given and given:
        given += ["--output", tmp_path / "out"]
    assert complaint in run(folder, "predict", *given, fails=True)


def test_export_refuses_bad_input_in_one_line(pipeline, run, tmp_path):
    """What it writes is in test_export.py."""
    folder, demo = pipeline
    member = folder / "output" / demo.name / "runs" / "small_gru" / "fold0"
    assert "--input waveform needs --to" in run(
        folder, "export", member, "--input", "waveform", fails=True
    )
    given = ("--input", "waveform", "--to", tmp_path / "a.onnx", "--int8", tmp_path)
    assert "no more than one of" in run(folder, "export", member, *given, fails=True)
    assert "no such checkpoint" in run(folder, "export", tmp_path, fails=True)
    given = (member, "--to", tmp_path / "a.onnx")
    assert str(tmp_path) in run(folder, "export", *given, "--int8", tmp_path, fails=True)
    assert "waveform" in run(folder, "export", *given, "--input", "audio", fails=True)
    (tmp_path / "a folder").mkdir()
    assert "a folder" in run(folder, "export", member, "--to", tmp_path / "a folder", fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a folder"]


def test_the_package_uses_the_window_of_evaluate(pipeline, run):
    folder, demo = pipeline
    written = folder / "output" / "tiny" / "decision.json"
    decision = json.loads(written.read_text())
    assert (decision["window_segments"], decision["context_seconds"]) == (1, 2.5)
    assert decision["shifts"] == 2
    packaged = folder / "kernels" / "build" / "dataset" / written.name
    assert packaged.read_bytes() == written.read_bytes()
    error = run(folder, "evaluate", "--data", demo, "--context-seconds", 0.33, fails=True)
    assert "context_seconds" in error
    assert "shifts is 3" in run(folder, "evaluate", "--data", demo, "--shifts", 3, fails=True)


def test_without_options_a_window_is_a_segment_and_only_the_named_experiment_is_scored(
    pipeline, run, tmp_path, monkeypatch
):
    folder, demo = pipeline
    runs = Path("runs") / "small_gru"
    shutil.copytree(folder / "output" / "tiny" / runs, tmp_path / runs)
    shutil.copy(folder / "output" / "tiny" / "audit.csv", tmp_path)
    options = ("--output", tmp_path, "--experiment", "small_gru", "--pages", 0)
    printed = run(folder, "evaluate", "--data", demo, *options)
    report = (tmp_path / "report.html").read_text()
    weaknesses = re.findall(r"id='weakness-\w+' data-low='(\w+)'>(.*?)</p>", report)
    assert weaknesses  # two steps of training are no training
    assert all(html.unescape(text) in printed for _, text in weaknesses)
    decision = json.loads((tmp_path / "decision.json").read_text())
    assert (decision["window_segments"], decision["context_seconds"]) == (1, 0.0)
    assert decision["shifts"] == 1
    assert decision["members"] == ["small_gru-fold0", "small_gru-fold1"]
    names = set(pd.read_csv(tmp_path / "scores.csv")["name"])
    assert "small_gru" in names
    assert "small_attention_normed" not in names
    # Of several numbers of shifts the better one is part of the decision.
    gain = "birdcall.evaluation.ensemble_decision.compare_decisions"
    monkeypatch.setattr(gain, lambda *_: (0.02, 0.01))
    run(folder, "evaluate", "--data", demo, *options, "--shifts", 1, "--shifts", 2)
    assert json.loads((tmp_path / "decision.json").read_text())["shifts"] == 2


@pytest.fixture
def refolded(pipeline, tmp_path):
    """The results of the pipeline, with the numbers of the two folds swapped after the training."""
    folder, _ = pipeline
    for name in ("output", "folds"):
        shutil.copytree(folder / name, tmp_path / name)
    table = pd.read_csv(tmp_path / "folds" / "tiny.csv")
    table.assign(fold=1 - table["fold"]).to_csv(tmp_path / "folds" / "tiny.csv", index=False)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [("train", "--experiment", "small_gru", "--resume"), ("evaluate",), ("pseudo-label",)],
)
def test_runs_of_other_folds_are_refused(pipeline, refolded, run, command):
    error = run(refolded, *command, "--data", pipeline[1], fails=True)
    assert "fold0" in error
    assert "the folds are different" in error


@pytest.fixture
def audited(demo_folder, tmp_path):
    """A folder in which the audit of a data folder was begun, and another one of the same name."""
    first, second = tmp_path / "a" / "tiny", tmp_path / "b" / "tiny"
    for data in (first, second):
        data.parent.mkdir()
        shutil.copytree(demo_folder / "train_audio", data / "train_audio")
        shutil.copyfile(demo_folder / "train.csv", data / "train.csv")
    return tmp_path, first, second


def test_two_data_folders_of_one_name_do_not_share_results(audited, run):
    folder, first, second = audited
    run(folder, "audit", "--data", first, "--workers", 0)
    run(folder, "folds", "--data", first, "--n-folds", 2)
    before = {path: path.read_bytes() for path in folder.rglob("*.csv")}
    train = ("train", "--experiment", "small_gru", "--fold", 0)
    for command in (("audit",), ("folds",), train, ("evaluate",), ("pseudo-label",), ("package",)):
        error = run(folder, *command, "--data", second, fails=True)
        assert str(first) in error
        assert "--output" in error
    other = ("--data", second, "--output", folder / "other")
    run(folder, "audit", *other, "--workers", 0)
    assert str(first) in run(folder, "folds", *other, fails=True)  # the default file of folds
    run(folder, "folds", *other, "--folds", folder / "other.csv", "--n-folds", 2)
    assert {path: path.read_bytes() for path in before} == before


def test_a_data_folder_may_be_moved_or_named_through_a_link(audited, run, caplog):
    folder, first, second = audited
    (folder / "link").symlink_to(first)
    for data in (first, folder / "link", Path("a") / "tiny"):
        run(folder, "audit", "--data", data, "--workers", 0)
    assert str(first) not in "".join(r.message for r in caplog.records if r.levelname == "WARNING")
    shutil.rmtree(second)
    first.rename(second)
    run(folder, "audit", "--data", second, "--workers", 0)
    assert any(str(first) in r.message for r in caplog.records if r.levelname == "WARNING")


# --- bad input: one line, exit code 2 -----------------------------------------------------------


@pytest.fixture
def copy(pipeline, tmp_path):
    """A copy of the demo that a test may damage, with audit and folds of the original."""
    folder, demo = pipeline
    shutil.copytree(demo, tmp_path / "tiny")
    (tmp_path / "output" / "tiny").mkdir(parents=True)
    shutil.copytree(folder / "folds", tmp_path / "folds")
    # The file times stay the same: the audit is of these files.
    shutil.copyfile(folder / "output" / "tiny" / "audit.csv", tmp_path / "output/tiny/audit.csv")
    return tmp_path / "tiny"


def test_a_data_folder_that_does_not_exist(tmp_path, run):
    error = run(tmp_path, "audit", "--data", "nowhere", fails=True)
    assert "nowhere" in error


def test_a_folder_in_no_known_layout(tmp_path, run):
    (tmp_path / "music").mkdir()
    error = run(tmp_path, "folds", "--data", "music", fails=True)
    assert "music" in error


def test_train_csv_without_a_needed_column(copy, run):
    table = pd.read_csv(copy / "train.csv").drop(columns="ebird_code")
    table.to_csv(copy / "train.csv", index=False)
    error = run(copy.parent, "audit", "--data", copy, fails=True)
    assert "train.csv" in error
    assert "ebird_code" in error


def test_a_recording_that_is_missing(copy, run):
    missing = sorted((copy / "train_audio").glob("*/*.mp3"))[0]
    missing.unlink()
    for command in ("audit", "train"):
        extra = ("--experiment", "small_gru") if command == "train" else ()
        assert missing.name in run(copy.parent, command, "--data", copy, *extra, fails=True)


def test_an_unknown_experiment_lists_the_known_ones(copy, run):
    error = run(copy.parent, "train", "--data", copy, "--experiment", "resnet", fails=True)
    assert all(name in error for name in ("resnet", *EXPERIMENTS))


@pytest.mark.parametrize("fold", ["2", "-1", "first"])
def test_a_fold_out_of_range(copy, run, fold):
    experiment = ("--experiment", "small_gru")
    error = run(copy.parent, "train", "--data", copy, *experiment, "--fold", fold, fails=True)
    assert fold in error
    assert "Traceback" not in error


def test_a_checkpoint_of_other_classes(copy, run, pipeline):
    experiment = replace(find_experiment("small_gru"), name="foreign")
    classes = ("aldfly", "ameavo")
    torch.manual_seed(0)
    checkpoint = Checkpoint(experiment, classes, 0)
    folder = copy.parent / "output" / "tiny" / "runs" / "foreign" / "fold0"
    save_checkpoint(folder, build_model(experiment, 2), checkpoint)
    error = run(copy.parent, "evaluate", "--data", copy, fails=True)
    assert "checkpoint of other classes" in error
    assert "aldfly" in error


@pytest.mark.parametrize(
    "command, path",
    [
        ("demo", "data"),
        ("audit", "out/audit.journal"),
        ("pseudo-label", "out/pseudo_labels.csv"),
        ("evaluate", "out/predictions"),
        ("figures", "out/predictions"),
    ],
)
def test_a_second_command_on_one_output_says_which_process_has_it(
    tmp_path, run, demo_folder, command, path
):
    pytest.importorskip("fcntl")
    (tmp_path / "data").symlink_to(demo_folder)
    (tmp_path / "out").mkdir()
    options = [] if command == "demo" else ["--output", "out"]
    with locked(tmp_path / path):
        error = run(tmp_path, command, "--data", "data", *options, fails=True)
    assert f"{Path(path).name}: process {os.getpid()} on " in error
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_earlier_step_is_named(tmp_path, run, demo_folder):
    assert "birdcall audit" in run(tmp_path, "folds", "--data", demo_folder, fails=True)
    run(tmp_path, "audit", "--data", demo_folder, "--workers", 0)
    train = ("train", "--data", demo_folder, "--experiment", "small_gru")
    assert "birdcall folds" in run(tmp_path, *train, fails=True)
    assert "birdcall evaluate" in run(tmp_path, "package", "--data", demo_folder, fails=True)
    run(tmp_path, "folds", "--data", demo_folder, "--n-folds", 2)
    assert "birdcall train" in run(tmp_path, "evaluate", "--data", demo_folder, fails=True)


def test_a_recording_that_does_not_decode_is_listed_and_left_out(pipeline, run, demo_folder):
    folder, _ = pipeline
    printed = run(folder, "audit", "--data", demo_folder, "--workers", 0)
    audit = pd.read_csv(folder / "output" / "tiny" / "audit.csv")
    unreadable = audit[audit["status"] == "unreadable"]
    assert len(unreadable) == 1
    name = Path(unreadable["path"].iloc[0]).name
    assert name in printed
    assert name not in set(pd.read_csv(folder / "folds" / "tiny.csv")["filename"])


def test_pseudo_labels_are_written_where_train_reads_them(pipeline, run):
    folder, demo = pipeline
    labels = Path("output") / demo.name / "pseudo_labels.csv"
    assert str(labels) in run(folder, "pseudo-label", "--data", demo)
    assert (folder / labels).stat().st_size > 0


def test_what_libraries_tell_is_not_shown(tmp_path, monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    with pytest.raises(SystemExit, match="2"):
        main(["folds", "--data", str(tmp_path / "nowhere")])
    for name, level in (("matplotlib", "info"), ("onnx", "warning"), ("birdcall.data", "info")):
        getattr(logging.getLogger(name), level)("of %s", name)
    printed = capsys.readouterr().err
    assert "INFO of birdcall.data" in printed
    assert "WARNING of onnx" in printed
    assert "matplotlib" not in printed


def test_traceback_shows_where_an_error_comes_from(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "birdcall", "--traceback", "audit", "--data", "nowhere"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "nowhere" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_command_with_one_line_and_no_temporary_file(
    tmp_path, monkeypatch, capsys, number
):
    def write_slowly(_data):
        with atomic_path(tmp_path / "a.csv") as temporary:
            temporary.write_text("half a table")
            signal.raise_signal(number)

    monkeypatch.setattr("birdcall.data.recordings.read_recordings", write_slowly)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        main(["audit", "--data", str(tmp_path), "--output", str(tmp_path)])
    assert ended.value.code == 128 + number
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if number.name in line] == lines[-1:]
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


def test_a_file_where_a_folder_must_be_and_the_other_way_round(audited, run):
    folder, data, _ = audited
    run(folder, "audit", "--data", data, "--workers", 0)
    (folder / "a file").touch()
    (folder / "a folder").mkdir()
    for arguments, path in (
        (("audit", "--workers", 0, "--output", "a file"), "a file"),
        (("folds", "--folds", "a folder"), "a folder"),
    ):
        error = run(folder, *arguments, "--data", data, fails=True)
        assert path in error
        assert "Errno" not in error
    assert not list(folder.glob(".*"))


def test_help_lists_the_commands_in_pipeline_order(tmp_path, run):
    text = run(tmp_path, "--help")
    names = ("demo", "audit", "folds", "train", "evaluate", "package", "predict", "benchmark")
    positions = [text.index(f" {name} ") for name in names]
    assert positions == sorted(positions)
