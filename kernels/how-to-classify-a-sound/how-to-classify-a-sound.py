# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How to classify a sound?
#
# A bird sings for two seconds in a minute of wind. Which bird is it, and when does it sing? This
# notebook answers in small steps: from sound to a waveform, from the waveform to a picture, and
# from the picture to species with times.
#
# 1. [The sound and its waveform](#1.-The-sound-and-its-waveform)
# 2. [The spectrogram](#2.-The-spectrogram)
# 3. [Log-mel](#3.-Log-mel)
# 4. [How fast is it?](#4.-How-fast-is-it?)
# 5. [The model, stage by stage](#5.-The-model,-stage-by-stage)
# 6. [Which species sings when?](#6.-Which-species-sings-when?)
# 7. [Summary](#7.-Summary)
#
# The package `birdcall` does all the work; the cells call it and draw. The notebook is stored as a
# Python file. This command, run in the root of the project, converts it to a notebook and runs it:
#
# ```sh
# mkdir -p kernels/build/notebook && cd kernels/build/notebook &&
#     jupytext --to ipynb --output how-to-classify-a-sound.ipynb \
#         ../../how-to-classify-a-sound/how-to-classify-a-sound.py &&
#     jupyter execute --inplace how-to-classify-a-sound.ipynb
# ```
#
# (For Kaggle, copy `kernel-metadata.json` into the same folder and run `kaggle kernels push -p` on
# it.)

# %%
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# On Kaggle the package is a mounted dataset; elsewhere it is installed.
sys.path.extend(map(str, Path("/kaggle/input").glob("birdcall-*")))
sys.path.extend(map(str, Path("/kaggle/input").glob("datasets/*/birdcall-*")))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Audio, Image, display

from birdcall.audio.filters import crop_or_pad
from birdcall.audio.frontend import LogMel
from birdcall.audio.reading import read_audio
from birdcall.audio.spectrogram import Spectrogram
from birdcall.config import SEGMENT_SECONDS, replace_nested
from birdcall.data.recordings import classes_of, read_recordings
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import default_device, load_ensemble
from birdcall.inference.events import detect_events
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.kaggle.manifest import MANIFEST_FILE
from birdcall.kaggle.submission import MEMBERS_FOLDER, open_package
from birdcall.kaggle.test_set import CompetitionFile, find_audio, read_annotations
from birdcall.models.checkpoint import find_checkpoints, read_checkpoint
from birdcall.models.summary import trace_stages
from birdcall.report.architecture import plot_architecture
from birdcall.taxonomy import display_name

# %% [markdown]
# Settings: change them here, or set environment variables of the same names.

# %%
N_CLIPS = int(os.environ.get("N_CLIPS", "48"))  # for the benchmark
REPEATS = int(os.environ.get("REPEATS", "3"))  # of the benchmark; the median counts
EPOCHS = int(os.environ.get("EPOCHS", "30"))  # of the training, if there is no trained model
MANY_RECORDINGS = 500  # too many to train on in a notebook
SHOWN_SECONDS = 40  # of a soundscape
N_RECORDINGS = int(os.environ.get("N_RECORDINGS", "14"))  # of each species, if there is no data
DATA = os.environ.get("DATA", "")  # a folder in the layout of the competition; "": search
PACKAGE = os.environ.get("PACKAGE", "")  # a folder written by `birdcall package`; "": search

MOUNTS = Path("/kaggle/input")
DEVICE = default_device()
SCRATCH = Path(tempfile.mkdtemp(prefix="birdcall-"))
plt.rcParams["figure.figsize"] = (10, 3)
plt.rcParams["figure.constrained_layout.use"] = True
print(f"torch {torch.__version__} on {DEVICE}, {torch.get_num_threads()} CPU threads")

# %% [markdown]
# The data is a folder in the layout of the Cornell Birdcall Identification competition. The next
# cell searches the two folders where Kaggle mounts it, and `input/demo`. If there is none, it
# synthesises some minutes of birdsong. Nothing is downloaded.


# %%
def find_folder(chosen: str, marker: str, *patterns: str) -> Path | None:
    """Return the folder that contains `marker`: the chosen folder, or one that is mounted."""
    roots = [MOUNTS, Path.cwd(), *Path.cwd().parents]
    mounted = (folder for root in roots for pattern in patterns for folder in root.glob(pattern))
    candidates = [Path(chosen)] if chosen else mounted
    folder = next((folder for folder in candidates if (folder / marker).is_file()), None)
    if chosen and folder is None:
        raise FileNotFoundError(f"{chosen}: this folder contains no {marker}")
    return folder


def make_tiny_demo() -> Path:
    """Write some minutes of audio: five synthetic species and two labelled soundscapes."""
    from birdcall.demo.plan import DemoConfig
    from birdcall.demo.writer import make_demo

    per_species = (N_RECORDINGS - 2, N_RECORDINGS + 2)
    config = DemoConfig(
        n_species=5, recordings_per_species=per_species, recording_seconds=(5.0, 8.0),
        n_recordists=8, n_examples=2, n_site_1=0, n_site_2=0, n_site_3=1,
        soundscape_seconds=60.0, site_3_seconds=20.0, n_noise=8, damaged=False,
    )  # fmt: skip
    make_demo(SCRATCH / "demo", config)
    return SCRATCH / "demo"


data = find_folder(DATA, "train.csv", "competitions/birdsong-*", "birdsong-*", "input/demo")
data = data or make_tiny_demo()
recordings = read_recordings(data)
classes = classes_of(recordings)
print(f"{data.name}: {len(recordings)} recordings of {len(classes)} species")

# %% [markdown]
# ## 1. The sound and its waveform
#
# Sound is air pressure that goes up and down. A microphone measures it many times per second; the
# list of these numbers is the *waveform*. Here it has 32,000 numbers per second, between -1 and 1.

# %%
SAMPLE_RATE = 32_000
N_SAMPLES = 72_000  # 2.25 seconds
good = recordings[(recordings["rating"] >= 4) & (recordings["duration"] >= 5)]
recording = (good if len(good) else recordings).iloc[0]
waveform = read_audio(data / recording["path"], SAMPLE_RATE)
print(f"{display_name(recording['ebird_code'])}: waveform of {len(waveform):,} samples")
display(Audio(waveform[: 5 * SAMPLE_RATE], rate=SAMPLE_RATE))

# %%
loudest = int(np.abs(waveform).argmax())
start = max(0, min(loudest - N_SAMPLES // 2, len(waveform) - N_SAMPLES))
clip = crop_or_pad(waveform[start:], N_SAMPLES)
figure, (whole, detail) = plt.subplots(1, 2, width_ratios=(2, 1))
whole.plot(np.arange(len(clip)) / SAMPLE_RATE, clip, lw=0.3)
whole.set(title="2.25 seconds of waveform", xlabel="seconds", ylabel="pressure", xlim=(0, 2.25))
near = waveform[max(0, loudest - 160) :][:320]
detail.plot(np.arange(len(near)) / 32, near, lw=1)
detail.set(title="10 milliseconds of it", xlabel="milliseconds")
plt.show()

# %% [markdown]
# The left picture shows when the recording is loud, but not *which* sound it is. The right picture
# shows why: a tone is a wave that repeats thousands of times per second. Its pitch is the number of
# repetitions.
#
# ## 2. The spectrogram
#
# For each short moment we compute how much of each frequency the waveform contains. That is a
# Fourier transform of `n_fft` samples; the next transform starts `hop_length` samples later. The
# result is a picture: time to the right, frequency upwards, power as brightness.
#
# Many projects compute it on the CPU, file by file, and store it on disk. Here it is a layer of the
# network: it runs in batches, on the GPU if there is one, and nothing is stored. A changed setting
# is used from the next batch on.

# %%
spectrogram = Spectrogram(n_fft=2048, hop_length=320).to(DEVICE)
batch = torch.from_numpy(clip)[None].to(DEVICE)  # (batch, samples)
with torch.inference_mode():
    power = spectrogram(batch)
print(f"{tuple(batch.shape)} -> {tuple(power.shape)} on {power.device}")

# %% [markdown]
# The four numbers are the batch, the channel (as in a grey picture), the frames (72,000 / 320, plus
# one because both ends count) and the frequencies (2048 / 2, plus one for 0 Hz). The layout is that
# of torchlibrosa, and the values are those of librosa.


# %%
def show_image(axes: plt.Axes, level_db: np.ndarray, seconds: float, top: float) -> None:
    """Draw decibels `(frames, bins)` over time; `top` is the upper end of the axis."""
    low, high = np.percentile(level_db, (5, 99.9))
    axes.imshow(
        level_db.T, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high,
        extent=(0, seconds, 0, top), interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("seconds")


power_db = 10 * np.log10(np.maximum(power[0, 0].cpu().numpy(), 1e-10))
figure, (raw, decibels) = plt.subplots(1, 2)
show_image(raw, power[0, 0].cpu().numpy(), 2.25, SAMPLE_RATE / 2000)
raw.set(title="power", ylabel="kHz")
show_image(decibels, power_db, 2.25, SAMPLE_RATE / 2000)
decibels.set(title="power in decibels", ylabel="kHz")
plt.show()

# %% [markdown]
# Power spans a factor of a million, so the left picture is nearly black. The human ear perceives
# loudness by factors; decibels, a logarithm, show it in the same way.
#
# ## 3. Log-mel
#
# The ear perceives pitch by factors, too. The *mel* scale puts the many high frequencies into wide
# bins and the low frequencies into narrow bins. 1,025 frequencies become 64 mel bins: a sixteenth
# of the numbers, and the song is still visible. This picture is the input of the network.

# %%
SMALL = find_experiment("small_gru")
log_mel = LogMel(SMALL.frontend).to(DEVICE)
with torch.inference_mode():
    image = log_mel(batch)
print(f"{tuple(batch.shape)} -> {tuple(image.shape)}, {log_mel.frame_seconds} s per frame")
figure, axes = plt.subplots()
show_image(axes, image[0, 0].cpu().numpy(), 2.25, SMALL.frontend.n_mels)
axes.set(title="log-mel of the same 2.25 seconds", ylabel="mel bin")
plt.show()

# %% [markdown]
# ## 4. How fast is it?
#
# librosa (clip by clip), torchlibrosa and birdcall (clip by clip and in batches of 16) compute the
# log-mel of the same five-second clips, on the CPU and on the GPU if there is one. The time on the
# GPU includes both transfers. All results are the same picture: `max_difference_db` is the largest
# difference from librosa.

# %%
if find_spec("torchlibrosa") and find_spec("librosa"):
    from birdcall.benchmark.frontend import benchmark_frontend

    table = benchmark_frontend(data, SCRATCH, n_clips=N_CLIPS, repeats=REPEATS)
    display(table.drop(columns=["times_real_time", "threads"]))
    display(Image(SCRATCH / "frontend.png", width=1000))
else:
    print("librosa or torchlibrosa is not installed: nothing to compare with")

# %% [markdown]
# The table shows two things. A GPU is fast only if it gets *many clips at once*; with single clips
# it mostly waits. And the algorithm matters most: torchlibrosa computes the Fourier transform of n
# samples as a convolution, in n × n steps; the *fast* Fourier transform takes about n × log(n).
# (A few clips on a busy machine give rough times; `birdcall benchmark frontend` takes 1,000 clips.)
#
# ## 5. The model, stage by stage
#
# The network that recognises a cat in a photo also recognises a song in a spectrogram: a
# convolutional network, the *backbone*. Layer by layer the picture gets smaller and gets more
# channels, until each remaining frame is a list of features. Then:
#
# - the mean over frequency leaves a sequence in time;
# - a *temporal layer* (here a GRU, which reads the sequence forwards and backwards) combines each
#   frame with its neighbours;
# - the *attention head* predicts the probability of each species in each frame, the **framewise**
#   output. It also learns the weight of each frame. The weighted mean of the frames is the
#   **clipwise** output.
#
# Because of the clipwise output the network can be trained with weak labels: the label of a
# recording tells *which* bird sings, not *when*. The loss compares the clipwise output with the
# label, and the framewise output needs no label.
#
# First we need a trained model: the dataset of `birdcall package`, if there is one for these
# species. Otherwise the next cell trains a small model, in a minute or two.


# %%
def train_small_model() -> tuple[Path, Path]:
    """Train on the data, or on the tiny demo if the data is large; return both folders."""
    from birdcall.data.audit import audit_recordings
    from birdcall.data.cache import RecordingCache
    from birdcall.data.dataset import load_training_data
    from birdcall.data.folds import make_folds, write_folds
    from birdcall.data.recordings import usable_recordings
    from birdcall.training.runs import train_run
    from birdcall.training.trainer import Run, RunOptions

    folder = data if len(recordings) <= MANY_RECORDINGS else make_tiny_demo()
    table, cache, folds = SCRATCH / "audit.csv", SCRATCH / "cache", SCRATCH / "folds.csv"
    rows = read_recordings(folder)
    recording_cache = RecordingCache(folder, cache)
    audit = audit_recordings(folder, rows, table, workers=0, cache=recording_cache)
    write_folds(make_folds(usable_recordings(rows, audit), n_folds=4), folds)
    train = {"epochs": EPOCHS, "validate_every": EPOCHS, "data": {"clips_per_epoch": 160}}
    training_data = load_training_data(folder, folds=folds, audit=table, cache=cache)
    run = Run(replace_nested(SMALL, train=train), 0, SCRATCH / "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on two busy cores are ten times as slow
    checkpoint = train_run(run, training_data, RunOptions(workers=0))
    torch.set_num_threads(threads)
    print(f"{checkpoint.name}: {checkpoint.score} on the held-out recordings")
    return folder, SCRATCH / "run"


package = find_folder(
    PACKAGE, MANIFEST_FILE, "datasets/*/birdcall-*", "birdcall-*", "kernels/build/dataset"
)
members = find_checkpoints(package / MEMBERS_FOLDER) if package else []
if members and read_checkpoint(members[0]).classes == classes:
    ensemble, decision, _ = open_package(package, DEVICE, all_members=True)
else:
    data, trained = train_small_model()
    ensemble = load_ensemble([trained], DEVICE)
    decision = Decision(clip_threshold=0.3, frame_threshold=0.5)
print(f"{len(ensemble.members)} members, {len(ensemble.classes)} species, on {DEVICE}")

# %% [markdown]
# This is the model (the first member of an ensemble). The figure is drawn from a run on five
# seconds of audio: every shape in it was measured in that run.

# %%
member = ensemble.members[0]
display(plot_architecture(member.checkpoint.experiment, len(ensemble.classes)))

# %% [markdown]
# The same as a table, for the trained weights:

# %%
five_seconds = torch.zeros(1, 5 * SAMPLE_RATE, device=DEVICE)
stages = pd.DataFrame(trace_stages(member.model, five_seconds))
display(stages[["part", "name", "shape", "n_weights"]].style.hide(axis="index"))

# %% [markdown]
# ## 6. Which species sings when?
#
# A soundscape is a long recording at one site: many birds, most of them far away. The model was not
# trained on it. It is cut into segments of five seconds, as the competition scores them, and the
# framewise outputs of the segments are joined again.

# %%
annotations = read_annotations(data)
annotations = annotations[annotations["onset"] < SHOWN_SECONDS]
is_class = annotations["ebird_code"].isin(ensemble.classes)
filename = annotations.loc[is_class, "filename"].value_counts().idxmax()  # the most annotations
here = annotations["filename"] == filename
truth, others = annotations[here & is_class], annotations[here & ~is_class]
path = find_audio(data / CompetitionFile.EXAMPLE_AUDIO, filename)
_, predictions = next(predict_files(ensemble, {filename: path}, limit_seconds=SHOWN_SECONDS))
events = detect_events(predictions, decision, ensemble.classes)
print(f"{filename}: {len(events)} detections in {predictions.seconds:g} s")
display(pd.DataFrame(events))

# %%
species = {*truth["ebird_code"], *(event.ebird_code for event in events)}
shown = [code for code in ensemble.classes if code in species]
rows = [ensemble.classes.index(code) for code in shown]
soundscape = torch.from_numpy(read_audio(path, SAMPLE_RATE, 0.0, predictions.seconds))[None].to(
    DEVICE
)
with torch.inference_mode():
    image = log_mel(soundscape)[0, 0].cpu().numpy()
figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(10, 4 + 0.35 * len(shown)))
show_image(top, image, predictions.seconds, image.shape[1])
for other in others.itertuples():
    top.plot((other.onset, other.offset), (62, 62), c="white", lw=3, solid_capstyle="butt")
top.set(
    title=f"log-mel of {filename}; bar: annotated, but not one of the species", ylabel="mel bin"
)
top.set(xlabel="", xlim=(0, predictions.seconds))
end = predictions.frames.shape[1] / FRAMES_PER_SEGMENT * SEGMENT_SECONDS
frames = bottom.imshow(
    predictions.frames[rows], aspect="auto", cmap="cividis", vmin=0, vmax=1,
    extent=(0, end, len(shown), 0), interpolation="nearest",
)  # fmt: skip
for bird in truth.itertuples():
    corner = (bird.onset, shown.index(bird.ebird_code) + 0.08)
    size = (bird.offset - bird.onset, 0.84)
    bottom.add_patch(plt.Rectangle(corner, *size, fill=False, ec="white", lw=1.5))
for event in events:
    line = shown.index(event.ebird_code) + 0.5
    bottom.plot((event.onset, event.offset), (line, line), c="black", lw=5, solid_capstyle="butt")
    bottom.plot((event.onset, event.offset), (line, line), c="white", lw=3, solid_capstyle="butt")
bottom.set_yticks(np.arange(len(shown)) + 0.5, [display_name(code) for code in shown])
title = "framewise output; outlined: annotated, line: detected"
bottom.set(title=title, xlabel="seconds", xlim=(0, predictions.seconds))
figure.colorbar(frames, ax=bottom, label="probability")
plt.show()

# %% [markdown]
# The upper picture is the input of the model, the lower picture is its output. The training labels
# do not contain *when* a bird sings: there is one label for a whole recording. A detection is a
# segment in which the clipwise and the framewise output agree, narrowed to its probable frames. The
# last rows of the architecture give the number of frames in five seconds: with eight frames, as in
# the small model, an onset is no more exact than half a second.
#
# Look at the bars, too: animals, or birds, that are not one of the species. They are not in the
# training labels, and a small model often gives them the name of a species that it knows. The usual
# remedies are noise without birds among the training clips, more recordings, and an ensemble.
#
# ## 7. Summary
#
# - A **waveform** shows how loud a recording is; a **spectrogram** shows its frequencies;
#   **log-mel** scales both like the ear does, with a fraction of the numbers.
# - Log-mel is the first layer of the network: it needs no files, and is fast on both devices if the
#   clips come in batches and the Fourier transform is a fast one.
# - A **convolutional backbone** extracts features from the picture, a **temporal layer** combines
#   them over time, and an **attention head** learns *when* a species sings from one label per
#   recording.
# - A **decision** turns probabilities into labels: two thresholds, chosen on soundscapes that the
#   models were not trained on (`birdcall evaluate`).
#
# Next: `birdcall train` on the real recordings, `birdcall package`, and the submission kernel.
