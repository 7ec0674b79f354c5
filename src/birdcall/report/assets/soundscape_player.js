'use strict';
// The soundscape page, second part: playing, moving, zooming and selecting, by mouse and keyboard.

const player = byId('player');
let stopAt = Infinity; // seconds; where playing ends by itself

const showMessage = (text) => { byId('message').textContent = text; };

// --- playing ------------------------------------------------------------------------------------

function loadAudio() {
  if (!data.audio) {
    byId('play').disabled = true;
    player.hidden = true;
    return;
  }
  const bytes = Uint8Array.from(atob(data.audio), (character) => character.charCodeAt(0));
  player.src = URL.createObjectURL(new Blob([bytes], { type: 'audio/mpeg' }));
}

function playUntil(seconds) {
  if (!data.audio) return;
  stopAt = seconds;
  player.play().catch((error) => showMessage(`The audio does not play: ${error.message}`));
}

function togglePlaying() {
  if (!player.paused) {
    player.pause();
    return;
  }
  const isInSelection = state.selection && state.cursor < state.selection.offset;
  playUntil(isInSelection ? state.selection.offset : Infinity);
}

/** Move the cursor with the audio, once per frame of the screen. */
function followPlayer() {
  if (player.paused) return;
  state.cursor = data.start + player.currentTime;
  if (state.cursor >= stopAt) {
    player.pause();
    stopAt = Infinity;
  }
  bringIntoView(state.cursor);
  draw();
  requestAnimationFrame(followPlayer);
}

player.addEventListener('play', () => {
  byId('play').textContent = 'Pause';
  followPlayer();
});
player.addEventListener('pause', () => { byId('play').textContent = 'Play'; });
player.addEventListener('error', () => { if (data.audio) showMessage('This browser cannot play the audio.'); });
player.addEventListener('seeking', () => {
  state.cursor = data.start + player.currentTime;
  draw();
});

// --- moving and zooming -------------------------------------------------------------------------

function moveCursor(seconds) {
  state.cursor = Math.min(data.start + data.seconds, Math.max(data.start, seconds));
  if (data.audio) player.currentTime = state.cursor - data.start;
  draw();
}

function seek(seconds) {
  moveCursor(seconds);
  bringIntoView(state.cursor);
}

function bringIntoView(seconds) {
  const position = seconds - data.start;
  if (position < view.start || position > view.start + view.seconds) {
    setView(position - view.seconds / 4, view.seconds);
  }
}

function setView(start, seconds) {
  view.seconds = Math.min(data.seconds, Math.max(Math.min(1, data.seconds), seconds));
  view.start = Math.min(data.seconds - view.seconds, Math.max(0, start));
  draw();
  listDetections();
}

/** Move the view, as long as it is, to where most true and detected events begin. */
function showFullestView() {
  const onsets = [...truth, ...detections].map((event) => event.onset - data.start);
  const countFrom = (start) => onsets.filter((onset) => onset >= start && onset < start + view.seconds).length;
  const fullest = onsets.reduce((best, start) => (countFrom(start) > countFrom(best) ? start : best), view.start);
  setView(fullest - view.seconds / 20, view.seconds);
}

function zoomAt(seconds, factor) {
  const position = seconds - data.start;
  setView(position - (position - view.start) * factor, view.seconds * factor);
}

function setFrequencies() {
  const low = Number(byId('low-khz').value) * 1000, high = Number(byId('high-khz').value) * 1000;
  if (!(high > low)) {
    showMessage('The upper frequency must be above the lower frequency.');
    return;
  }
  view.lowHz = Math.max(0, low);
  view.highHz = Math.min(data.maxHz, high);
  draw();
}

// --- selecting ----------------------------------------------------------------------------------

function setSelection(onset, offset) {
  state.selection = {
    onset: roundSeconds(Math.min(onset, offset)), offset: roundSeconds(Math.max(onset, offset)),
  };
  state.selected = null;
  showSelectionTimes();
  draw();
}

function clearSelection() {
  state.selection = state.selected = null;
  stopAt = Infinity;
  showSelectionTimes();
  draw();
}

function showSelectionTimes() {
  byId('onset').value = state.selection ? state.selection.onset.toFixed(2) : '';
  byId('offset').value = state.selection ? state.selection.offset.toFixed(2) : '';
}

/** Select a detection or a label, and move to its start. */
function selectEvent(event) {
  state.selected = event;
  state.selection = { onset: event.onset, offset: event.offset };
  if (event.offset > event.onset) byId('species').value = event.code;
  seek(event.onset);
  const confidence = event.confidence === undefined ? '' : `, confidence ${event.confidence.toFixed(2)}`;
  showMessage(`${nameOf(event.code)}, ${formatTime(event.onset)} to ${formatTime(event.offset)}${confidence}`);
  showSelectionTimes();
  draw();
}

/** Select the next detection (step 1) or the previous one (step -1). */
function selectDetection(step) {
  const ordered = step > 0 ? detections : [...detections].reverse();
  const index = state.selected ? ordered.indexOf(state.selected) : -1;
  const from = state.selected ? state.selected.onset : state.cursor;
  const isBeyond = (event) => (step > 0 ? event.onset >= from : event.onset <= from);
  const event = index >= 0 ? ordered[index + 1] : ordered.find(isBeyond);
  if (event) selectEvent(event);
  else showMessage(step > 0 ? 'No detection after this one.' : 'No detection before this one.');
}

// --- keyboard and mouse -------------------------------------------------------------------------

const KEYS = {
  ' ': togglePlaying,
  ArrowLeft: (event) => seek(state.cursor - (event.shiftKey ? 5 : 0.5)),
  ArrowRight: (event) => seek(state.cursor + (event.shiftKey ? 5 : 0.5)),
  Home: () => seek(data.start),
  End: () => seek(data.start + data.seconds),
  '+': () => zoomAt(state.cursor, 0.5),
  '-': () => zoomAt(state.cursor, 2),
  n: () => selectDetection(1),
  p: () => selectDetection(-1),
  '[': () => setSelection(state.cursor, state.selection ? Math.max(state.selection.offset, state.cursor) : state.cursor),
  ']': () => setSelection(state.selection ? Math.min(state.selection.onset, state.cursor) : state.cursor, state.cursor),
  Enter: () => addLabel(),
  Escape: clearSelection,
};

document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  // A control with the focus handles its keys itself.
  if (event.target.closest('input, select, textarea, button, a, audio, summary, [role=region]')) return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action(event);
});

function clickCanvas(canvas, event) {
  const seconds = secondsAt(event.offsetX);
  if (canvas === byId('lanes')) {
    const code = laneSpecies()[Math.floor(event.offsetY / LANE_HEIGHT)];
    const detection = detections.find(
      (candidate) => candidate.code === code && candidate.onset <= seconds && seconds <= candidate.offset,
    );
    if (detection) {
      selectEvent(detection);
      playUntil(detection.offset);
      return;
    }
  }
  seek(seconds);
  playUntil(Infinity);
}

for (const canvas of [byId('spectrogram'), byId('lanes')]) {
  let startX = null, isDragging = false;
  canvas.addEventListener('pointerdown', (event) => {
    startX = event.offsetX;
    isDragging = false;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (startX === null) return;
    isDragging ||= Math.abs(event.offsetX - startX) >= 4;
    if (isDragging) {
      setSelection(secondsAt(Math.max(0, startX)), secondsAt(Math.min(viewWidth(), event.offsetX)));
    }
  });
  canvas.addEventListener('pointerup', (event) => {
    if (startX === null) return;
    if (isDragging) moveCursor(state.selection.onset);
    else clickCanvas(canvas, event);
    startX = null;
  });
  canvas.addEventListener('pointercancel', () => { startX = null; });
  canvas.addEventListener('wheel', (event) => {
    if (!event.ctrlKey) return; // without Ctrl the wheel scrolls the page
    event.preventDefault();
    zoomAt(secondsAt(event.offsetX), event.deltaY > 0 ? 1.25 : 0.8);
  }, { passive: false });
}

byId('overview').addEventListener('pointerdown', (event) => {
  const position = event.offsetX / byId('overview').clientWidth * data.seconds;
  setView(position - view.seconds / 2, view.seconds);
  seek(data.start + position);
});
byId('play').addEventListener('click', togglePlaying);
byId('previous-detection').addEventListener('click', () => selectDetection(-1));
byId('next-detection').addEventListener('click', () => selectDetection(1));
byId('zoom-in').addEventListener('click', () => zoomAt(state.cursor, 0.5));
byId('zoom-out').addEventListener('click', () => zoomAt(state.cursor, 2));
byId('zoom-all').addEventListener('click', () => setView(0, data.seconds));
byId('low-khz').addEventListener('change', setFrequencies);
byId('high-khz').addEventListener('change', setFrequencies);
byId('onset').addEventListener('change', () => {
  const onset = Number(byId('onset').value);
  setSelection(onset, Math.max(onset, Number(byId('offset').value)));
});
byId('offset').addEventListener('change', () => {
  const offset = Number(byId('offset').value);
  setSelection(Math.min(Number(byId('onset').value), offset), offset);
});
