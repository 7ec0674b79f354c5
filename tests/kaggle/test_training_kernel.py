"""The training kernel, with a stand-in for `birdcall train` where the real one would take long."""

import json
import logging
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import typer.main

import birdcall
from birdcall.__main__ import app
from birdcall.config import FULL
from birdcall.kaggle import training_kernel
from birdcall.kaggle.manifest import MANIFEST_FILE, make_manifest
from birdcall.kaggle.training_kernel import (
    SessionFolders,
    TrainingSettings,
    read_settings,
    run_training_kernel,
    take_previous_run,
    training_command,
    write_settings,
)
from birdcall.models.checkpoint import STATE_FILE, Checkpoint, save_checkpoint
from birdcall.models.sed import build_model

SETTINGS = TrainingSettings("tiny", 1)
# Stands for `birdcall train`: notes how it was called, then does what the test says.
STAND_IN = """
import json, os, pathlib, sys, time
argv = sys.argv[1:]
output = pathlib.Path(argv[argv.index("--output") + 1])
experiment, fold = (argv[argv.index(name) + 1] for name in ("--experiment", "--fold"))
run = output / "runs" / experiment / f"fold{{fold}}"
run.mkdir(parents=True, exist_ok=True)
(output / "generated_noise").mkdir(exist_ok=True)
called = pathlib.Path({called!r})
called.write_text(json.dumps({{"argv": argv, "audit": (output / "audit.csv").read_text()}}))
state = run / {state!r}
{then}
"""
SAVE = "state.write_text(state.read_text() + '+' if state.exists() else 'state')"


@pytest.fixture
def session(tmp_path):
    """Folders of a session, and a package whose `birdcall train` does what the test says."""
    return Session(tmp_path)


class Session:
    def __init__(self, folder: Path) -> None:
        self.package = folder / "input" / "datasets" / "owner" / "data"
        self.mounts, self.working = folder / "input", folder / "working"
        self.scratch, self.called = folder / "temp", folder / "called.json"
        self.run_folder = self.working / "runs" / "tiny" / "fold1"
        self.folders = SessionFolders(
            self.package,
            self.mounts / "data",
            mounts=self.mounts,
            working=self.working,
            scratch=self.scratch,
        )
        (self.package / "birdcall").mkdir(parents=True)
        (self.package / "audit.csv").write_text("the audit")

    def __call__(self, then: str, limit: float | None = None, **settings) -> int:
        code = STAND_IN.format(called=str(self.called), state=STATE_FILE, then=then)
        (self.package / "birdcall" / "__init__.py").touch()
        (self.package / "birdcall" / "__main__.py").write_text(code)
        write_settings(self.package, TrainingSettings("tiny", 1, **settings))
        self.write_manifest()
        return run_training_kernel(self.folders, limit)

    def write_manifest(self) -> None:
        (self.package / MANIFEST_FILE).unlink(missing_ok=True)
        (self.package / MANIFEST_FILE).write_text(json.dumps(make_manifest(self.package)))

    def option(self, name: str) -> str:
        argv = json.loads(self.called.read_text())["argv"]
        return argv[argv.index(name) + 1]


def leave(folder: Path, content: str = "state", name: str = STATE_FILE) -> Path:
    """What an earlier version has left, mounted as Kaggle does: read-only."""
    run = folder / "runs" / "tiny" / "fold1"
    run.mkdir(parents=True)
    (run / name).write_text(content)
    (run / name).chmod(stat.S_IRUSR)
    return run


# --- a session ----------------------------------------------------------------------------------


def test_a_session_that_ends_at_its_limit_succeeds_and_leaves_only_runs(session, caplog):
    caplog.set_level(logging.INFO)
    assert session(SAVE) == 0
    assert (session.run_folder / STATE_FILE).read_text() == "state"
    assert [path.name for path in session.working.iterdir()] == ["runs"]
    assert (session.scratch / "output" / "generated_noise").is_dir()
    assert "Push this kernel again" in caplog.text
    assert json.loads(session.called.read_text())["audit"] == "the audit"


def test_a_finished_run_is_logged_with_its_score(session, caplog, tiny_experiment):
    caplog.set_level(logging.INFO)
    checkpoint = Checkpoint(tiny_experiment, ("aldfly", "ameavo"), 1, {"macro_ap": 0.625})
    save_checkpoint(session.run_folder, build_model(tiny_experiment, 2), checkpoint)
    assert session("") == 0
    assert "tiny-fold1 is finished (macro_ap 0.625)" in caplog.text
    assert "Push this kernel again" not in caplog.text


def test_training_gets_the_time_that_is_left(session):
    session(SAVE, time_limit_seconds=3600)
    assert 3590 < float(session.option("--time-limit")) <= 3600
    session("", limit=1e-3)  # in place of the package's
    assert float(session.option("--time-limit")) == 0.1


def test_a_training_that_fails_fails_the_session(session):
    assert session("sys.exit(2)") == 2


def test_a_training_that_leaves_nothing_is_an_error(session):
    with pytest.raises(ValueError, match="neither a checkpoint nor a state"):
        session("")


def test_a_training_that_overruns_is_ended_and_what_it_saved_counts(session, monkeypatch):
    monkeypatch.setattr(training_kernel, "GRACE_SECONDS", 2.0)
    started = time.monotonic()
    assert session(f"{SAVE}; time.sleep(600)", limit=0.5) == 0
    assert time.monotonic() - started < 30
    assert (session.run_folder / STATE_FILE).read_text() == "state"


def test_a_package_that_was_changed_is_refused(session):
    session(SAVE)
    (session.package / "audit.csv").write_text("another audit")
    with pytest.raises(ValueError, match=r"audit.csv: its sha256"):
        run_training_kernel(session.folders)


def test_wheels_of_the_package_can_be_imported(session):
    (session.package / "wheels").mkdir()
    wheel = session.package / "wheels" / "nestbox-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("nestbox.py", "EGGS = 'five'\n")
        info = "nestbox-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nestbox\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    assert session("import nestbox; state.write_text(nestbox.EGGS)") == 0
    assert (session.run_folder / STATE_FILE).read_text() == "five"


# --- what an earlier version left ---------------------------------------------------------------


@pytest.mark.parametrize("mount", ["birdcall-tiny-fold1", "notebooks/owner/birdcall-tiny-fold1"])
def test_the_next_version_resumes_from_the_output_of_this_one(session, mount):
    previous = leave(session.mounts / mount)
    (previous / "tensorboard").mkdir()
    (previous / "tensorboard" / "events").write_text("events")
    (previous / ".state.12ab.safetensors").write_text("half a state")
    assert session(SAVE) == 0
    assert (session.run_folder / STATE_FILE).read_text() == "state+"
    assert (session.run_folder / "tensorboard" / "events").read_text() == "events"
    assert not list(session.run_folder.glob(".*"))
    assert (previous / STATE_FILE).read_text() == "state"


def test_what_an_interactive_session_has_trained_already_stays(session):
    leave(session.mounts / "old", "older")
    session.run_folder.mkdir(parents=True)
    (session.run_folder / STATE_FILE).write_text("newer")
    take_previous_run(session.mounts, session.working, SETTINGS.run)
    assert (session.run_folder / STATE_FILE).read_text() == "newer"


def test_one_output_under_two_names_is_one_and_two_outputs_are_refused(session):
    leave(session.mounts / "one")
    leave(session.mounts / "notebooks" / "owner" / "one")
    take_previous_run(session.mounts, session.working, SETTINGS.run)
    assert (session.run_folder / STATE_FILE).read_text() == "state"
    leave(session.mounts / "two", "of another training")
    with pytest.raises(ValueError, match=r"one.* and .*two"):
        take_previous_run(session.mounts, session.working / "other", SETTINGS.run)


def test_the_output_of_another_fold_is_left_alone(session):
    leave(session.mounts / "one")
    take_previous_run(session.mounts, session.working, TrainingSettings("tiny", 0).run)
    assert not session.working.exists()


def folders_in(folder: Path) -> SessionFolders:
    return SessionFolders(folder, folder, mounts=folder, working=folder, scratch=folder)


# --- the command line ---------------------------------------------------------------------------


def test_one_command_line_that_the_real_command_understands(tmp_path):
    (tmp_path / "labels.csv").touch()
    settings = TrainingSettings("tiny", 1, init="init/weights.pth")
    command = training_command(
        settings, folders_in(tmp_path), output=tmp_path, seconds=41_400.0, n_gpus=0
    )
    assert command[:4] == [sys.executable, "-m", "birdcall", "train"]
    assert command[-1] == "--resume"
    train = typer.main.get_command(app).commands["train"]
    context = train.make_context("train", command[4:])
    assert context.params["time_limit"] == 41_400
    # Older versions of Typer make a Path of it only when they call the function.
    assert Path(context.params["init"]) == tmp_path / "init" / "weights.pth"
    assert Path(context.params["labels"]) == tmp_path / "labels.csv"
    assert context.params["fold"] == "1"
    assert context.params["resume"] is True


def test_several_gpus_share_one_training_and_its_workers(tmp_path):
    command = training_command(
        SETTINGS, folders_in(tmp_path), output=tmp_path, seconds=60.0, n_gpus=2
    )
    assert command[1:6] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"),
    ]
    alone = training_command(
        SETTINGS, folders_in(tmp_path), output=tmp_path, seconds=60.0, n_gpus=1
    )
    position = command.index("--workers") + 1
    assert (command[position], alone[alone.index("--workers") + 1]) == ("2", "4")
    assert command[6:position] == alone[2 : alone.index("--workers") + 1]


def test_torchrun_starts_a_process_per_gpu_that_finds_the_packages_code(session, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    ranks = "(run / f\"rank{os.environ['RANK']}\").write_text(os.environ['WORLD_SIZE'])"
    assert session(f"{SAVE}; {ranks}") == 0
    left = {path.name: path.read_text() for path in session.run_folder.glob("rank*")}
    assert left == {"rank0": "2", "rank1": "2"}


# --- settings -----------------------------------------------------------------------------------


def test_settings_are_read_as_they_were_written(tmp_path):
    settings = TrainingSettings(
        experiment="small_gru",
        fold=3,
        time_limit_seconds=7200.0,
        workers=2,
        init="init/weights.safetensors",
    )
    write_settings(tmp_path, settings)
    assert read_settings(tmp_path) == settings


def test_a_kernel_can_train_a_full_run(tmp_path):
    settings = TrainingSettings("small_gru", FULL)
    write_settings(tmp_path, settings)
    assert read_settings(tmp_path) == settings
    assert settings.name == "small_gru-full"
    assert settings.run == Path("runs", "small_gru", "full")


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"experiment": "tiny", "fold": 0, "time_limit_seconds": 43200}', "at most 42300"),
        ('{"experiment": "tiny", "fold": 0, "time_limit_seconds": 0}', "above 0"),
        ('{"experiment": "tiny", "fold": -1}', "fold is -1"),
        ('{"experiment": "tiny", "fold": "first"}', "not the settings"),
        ('{"experiment": "tiny"}', "fold"),
        ('{"experiment": "tiny", "fold": 0, "epochs": 3}', "no field epochs"),
        ("[]", "not the settings"),
        ("{", "not the settings"),
    ],
)
def test_bad_settings_are_named_with_their_file(tmp_path, content, reason):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match=reason) as raised:
        read_settings(tmp_path)
    assert "training.json" in str(raised.value)


def test_a_package_without_settings_says_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="birdcall package-training"):
        read_settings(tmp_path)


def test_a_weights_file_outside_the_package_is_refused(tmp_path):
    settings = TrainingSettings("tiny", 0, init="../weights.pth")
    with pytest.raises(ValueError, match=r"\.\./weights\.pth"):
        training_command(settings, folders_in(tmp_path), output=tmp_path, seconds=60.0, n_gpus=0)


# --- its place among the modules ----------------------------------------------------------------


def test_the_kernels_own_process_needs_nothing_that_wheels_may_bring():
    code = (
        "import birdcall.kaggle.training_kernel, sys;"
        "print(*(m for m in sys.modules if m.startswith(('birdcall.', 'audiomentations'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "birdcall.kaggle.training_kernel" in loaded
    unwanted = {
        "audiomentations",
        *(f"birdcall.data.{name}" for name in ("augment", "dataset", "noise")),
    }
    assert not loaded & unwanted
    assert (Path(birdcall.__file__).parent / "data" / "dataset.py").is_file()
