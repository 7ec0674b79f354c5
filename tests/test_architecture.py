"""Imports point one way, and the kernel needs nothing that only training needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import birdcall

PACKAGE = Path(birdcall.__file__).parent

# A module imports only from those before it. Down to `kernel` is what an offline kernel runs.
KERNEL_SIDE = (
    *(
        "wheels",
        "config",
        "files",
        "manifest",
        "taxonomy",
        "audio",
        "threads",
        "windows",
        "spectrogram",
    ),
    *("frontend", "panns", "models", "checkpoint", "onnx_detector", "ensemble", "inference"),
    *("decision", "outputs", "detection", "soundscapes", "submission", "kernel"),
    "training_kernel",
)
DATA = (
    *("recordings", "cache", "audit", "folds", "noise", "memory", "filters", "noise_files"),
    *("augment", "batch_augment", "targets", "sampling", "dataset", "loader"),
)
TRAINING = (
    *("losses", "initialisation", "distributed", "averaging", "resume", "log", "validation"),
    *("pictures", "step", "trainer", "run", "runs", "relabelling"),
)
EVALUATION = (
    *("held_out", "stored", "out_of_fold", "stretches", "simulation", "simulated_sound"),
    *("labelled", "hearing", "calibration", "choosing", "tables", "scoring", "submission"),
    *("comparison", "ablation", "ablation_report", "figures", "charts", "mistakes"),
    *("labelled_pages", "report"),
)
PAGES = ("page", "sound", "soundscape", "browser")
TRAINING_SIDE = (
    *("experiments", "fingerprint", "export", "journal", "style", "road"),
    *("pages", *(f"pages.{name}" for name in PAGES)),
    *("prediction", "cluster"),
    *("metrics", "event_metrics"),
    *("data", *(f"data.{name}" for name in DATA)),
    *("training", *(f"training.{name}" for name in TRAINING)),
    *("evaluation", *(f"evaluation.{name}" for name in EVALUATION)),
    *("packaging", "training_packaging", "demo", "architecture", "receptive_field"),
    *("benchmark", "gallery", "__main__"),
)
ORDER = (*KERNEL_SIDE, *TRAINING_SIDE)
FORBIDDEN_IN_KERNEL = (
    "audiomentations",
    "matplotlib",
    "sklearn",
    "librosa",
    "typer",
    "torchlibrosa",
)


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, as ORDER has them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        names |= {place_of(m.split(".")[1:]) for m in modules if m.startswith("birdcall.")}
    return names - {""}


def place_of(parts: list[str]) -> str:
    """The longest beginning of a dotted name that ORDER has; "" if there is none."""
    places = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((place for place in places if place in ORDER), "")


def module_of(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return place_of(parts) or ".".join(parts)


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_its_place():
    assert {module_of(path) for path in source_files()} == set(ORDER)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_those_before_it(path):
    own = module_of(path)
    later = [name for name in imports_of(path) - {own} if ORDER.index(name) > ORDER.index(own)]
    assert not later


@pytest.mark.parametrize("module", ["config", "files", "metrics"])
def test_some_modules_need_no_torch(module):
    assert not loaded_by(module, ("torch", "timm"))


@pytest.mark.parametrize("module", ["audio", "data.recordings", "soundscapes", "outputs", "demo"])
def test_what_handles_files_needs_no_torch(module):
    assert not loaded_by(module, ("torch", "timm", "librosa"))


def test_inference_and_kernel_import_nothing_that_only_training_needs():
    ours = tuple(f"birdcall.{name}" for name in TRAINING_SIDE)
    assert not loaded_by("kernel", (*FORBIDDEN_IN_KERNEL, *ours))
    assert not loaded_by("inference", (*FORBIDDEN_IN_KERNEL, *ours))


def loaded_by(module: str, unwanted: tuple[str, ...]) -> list[str]:
    """Which of ``unwanted`` a fresh process has loaded after importing one module of ours."""
    code = f"import birdcall.{module}, sys; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_commands_print(path):
    if module_of(path) == "__main__":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "joblib.load"}
        if name == "torch.load":
            assert "weights_only=True" in ast.unparse(node)
        if name in {"np.load", "numpy.load"}:
            assert "allow_pickle=True" not in ast.unparse(node)
