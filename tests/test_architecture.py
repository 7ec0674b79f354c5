"""The folder is the layer: imports point downwards; the offline kernel needs no training code."""

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import birdcall

PACKAGE = Path(birdcall.__file__).parent
ROOT = {"__init__", "__main__", "config", "experiments", "taxonomy"}
ENTRANCES = {"__init__", "__main__"}  # they import, lazily, whatever they offer

# A layer imports only from itself and from those before it. The root modules come first.
OFFLINE_LAYERS = ("", "storage", "audio", "models", "inference", "kaggle")
LAYERS = (
    *OFFLINE_LAYERS,
    *("data", "training", "kaggle.packaging", "kaggle.dry_run", "kaggle.upload"),
    *("prediction", "evaluation", "report"),
    *("demo", "benchmark", "cli"),
)
# Kaggle's image has no audiomentations, and its kernel should start without the others.
NOT_IN_KERNEL = {
    *("audiomentations", "matplotlib", "sklearn", "librosa", "typer", "torchlibrosa"),
    *("jinja2", "plotly", "itables", "tensorboard"),
}

MAX_FILES = 100
MAX_LINES = 500
MANY_LINES, MAX_LONG_FILES = 350, 10
MAX_POSITIONAL = 4


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax trees of all modules, by name: ``inference.engine``."""
    return {
        name_of(path): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name if name in ROOT else name.removesuffix(".__init__")


def layer_of(module: str) -> str:
    if module in LAYERS:
        return module
    return module.split(".")[0] if "." in module else ""


def imports_of(tree: ast.AST) -> set[str]:
    """Our modules that a module imports, anywhere in it, also where only types need them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from birdcall on"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("birdcall.") for name in names} & sources().keys()


def calls_of(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


# --- layers -------------------------------------------------------------------------------------


def test_every_module_is_in_a_layer():
    assert {name for name in sources() if "." not in name and name not in LAYERS} == ROOT
    assert {layer_of(name) for name in sources()} == set(LAYERS)


def test_imports_point_downwards():
    upwards = [
        f"{module} imports {imported}"
        for module, tree in sources().items()
        for imported in imports_of(tree)
        if module not in ENTRANCES
        if LAYERS.index(layer_of(imported)) > LAYERS.index(layer_of(module))
    ]
    assert not upwards


@pytest.mark.parametrize("layer", LAYERS)
def test_inside_a_layer_no_imports_go_round_in_a_circle(layer):
    members = {name for name in sources() if layer_of(name) == layer} - ENTRANCES
    graph = {name: (imports_of(sources()[name]) & members) - {name} for name in members}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# --- what a fresh process loads -----------------------------------------------------------------

OFFLINE = ("kaggle.submission", "kaggle.training_kernel", "inference.engine")
WITHOUT_TORCH = (
    *("config", "experiments", "storage.files", "storage.store", "audio.reading"),
    *("kaggle.test_set", "data.recordings", "demo.writer", "__main__"),
    *("evaluation.comparison", "report.html"),
)


def loaded_by(modules: tuple[str, ...]) -> set[str]:
    """Names of all modules that a fresh process has loaded after it imported some of ours."""
    lines = [f"import birdcall.{module}" for module in modules]
    code = "\n".join([*lines, "import json, sys", "print(json.dumps(list(sys.modules)))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_offline_kernel_loads_nothing_that_only_training_needs():
    loaded = loaded_by(OFFLINE)
    assert not loaded & NOT_IN_KERNEL
    ours = {name.removeprefix("birdcall.") for name in loaded if name.startswith("birdcall.")}
    assert {layer_of(name) for name in ours & sources().keys()} <= set(OFFLINE_LAYERS)


def test_what_handles_files_needs_no_torch():
    assert not loaded_by(WITHOUT_TORCH) & {"torch", "timm", "librosa", "matplotlib"}


# --- what a module does -------------------------------------------------------------------------


def test_only_commands_print():
    for module, tree in sources().items():
        if layer_of(module) == "cli" or module == "__main__":
            continue
        lines = [call.lineno for call in calls_of(tree) if ast.unparse(call.func) == "print"]
        assert not lines, module
        assert "typer" not in {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
            for alias in node.names
        }, module  # fmt: skip


def test_nothing_is_unpickled_or_evaluated():
    for module, tree in sources().items():
        for call in calls_of(tree):
            name, where = ast.unparse(call.func), f"{module}, line {call.lineno}"
            assert name not in {
                "eval", "exec", "pickle.load", "pickle.loads", "joblib.load"
            }, where  # fmt: skip
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(call), where
            if name in {"np.load", "numpy.load"}:
                assert "allow_pickle=True" not in ast.unparse(call), where


def test_a_module_defines_a_name_once():
    """A second option of one name silently replaced the first, with its help."""
    for module, tree in sources().items():
        names = []
        for node in tree.body:
            if isinstance(node, ast.Assign):
                names += [item.id for item in node.targets if isinstance(item, ast.Name)]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, f"{module}: {sorted(twice)}"


# --- how much -----------------------------------------------------------------------------------


def test_a_reader_finds_few_files_and_no_endless_one():
    lines = {name: len(tree_lines(name)) for name in sources()}
    assert len(lines) <= MAX_FILES
    assert not {name: n for name, n in lines.items() if n > MAX_LINES}
    long = {name: n for name, n in lines.items() if n > MANY_LINES}
    assert len(long) <= MAX_LONG_FILES, long


def tree_lines(module: str) -> list[str]:
    path = PACKAGE.joinpath(*module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return path.read_text(encoding="utf-8").splitlines()


def test_a_call_of_ours_with_more_than_four_arguments_names_them():
    functions = (ast.FunctionDef, ast.ClassDef)
    ours = {
        node.name for tree in sources().values() for node in ast.walk(tree)
        if isinstance(node, functions)
    }  # fmt: skip
    unnamed = [
        f"{module}, line {call.lineno}: {ast.unparse(call.func)}"
        for module, tree in sources().items()
        for call in calls_of(tree)
        if len(call.args) > MAX_POSITIONAL and ast.unparse(call.func).split(".")[-1] in ours
    ]
    assert not unnamed


def test_names_that_are_imported_when_a_command_runs_exist():
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("birdcall."):
                imported = import_module(node.module)
                for alias in node.names:
                    name = f"{node.module}.{alias.name}".removeprefix("birdcall.")
                    where = f"{module}, line {node.lineno}: {name}"
                    assert hasattr(imported, alias.name) or name in sources(), where
