'use strict';
// The soundscape page, first part: the recording's data, the detections, and their drawing.
// Probabilities are whole numbers of LEVELS, rounded down, so that comparing them with a threshold
// of the slider gives the same detections as comparing the probabilities themselves.
const LEVELS = 200;
const MAX_GAP_SECONDS = 0.5; // two calls this close are one event, as in birdcall.inference.events
const LANE_HEIGHT = 30, SPECTROGRAM_HEIGHT = 260, AXIS_HEIGHT = 22, OVERVIEW_HEIGHT = 46; // pixels
const MEMBER_COLORS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#7a5c00', '#56b4e9'];
const MEMBER_DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [12, 4]];
const PREDICTED_COLOR = '#0072b2', TRUE_COLOR = '#b34700', LABEL_COLOR = '#006b4f';
const AREA_COLOR = '#a9c7dd', THRESHOLD_COLOR = '#595959', TEXT_COLOR = '#1a1a1a', CURSOR_COLOR = '#c00000';
const FONT = '12px system-ui, sans-serif';

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId('data').textContent);
const names = new Map(data.species);
const nameOf = (code) => names.get(code) || code;
// The part of the recording in view: seconds from the start of this page's part, and frequencies.
const view = { start: 0, seconds: data.seconds, lowHz: 0, highHz: data.maxHz };
const state = {
  cursor: 0, // seconds
  selection: null, // {onset, offset}
  selected: null, // the detection or label that was clicked last
  usesThreshold: false,
  output: 0, // index of the ensemble (0) or of a member
  levels: [], // for each output a Uint8Array (classes x frames)
  highest: [], // for each output the highest level of each class
  labels: [],
  hidden: new Set(), // species
};
const truth = data.truth.map(([code, onset, offset]) => ({ code, onset, offset }));
let detections = []; // those shown

// --- detections ---------------------------------------------------------------------------------

const roundSeconds = (seconds) => Math.round(seconds * 1e6) / 1e6;
const byTime = (a, b) => a.onset - b.onset || a.offset - b.offset || (a.code < b.code ? -1 : 1);
const byName = (a, b) => nameOf(a).localeCompare(nameOf(b));
const isShown = (event) => !state.hidden.has(event.code);

/** Runs of frames that reach the threshold, joined over short gaps, as `frames_to_events` does. */
function eventsAboveThreshold(output, minLevel) {
  const events = [], levels = state.levels[output], nFrames = data.nFrames;
  data.classes.forEach((code, classIndex) => {
    const row = levels.subarray(classIndex * nFrames, (classIndex + 1) * nFrames);
    let last = null;
    for (let frame = 0; frame < nFrames; frame++) {
      const first = frame;
      let highest = 0;
      while (frame < nFrames && row[frame] >= minLevel) {
        highest = Math.max(highest, row[frame]);
        frame++;
      }
      if (frame === first) continue;
      const onset = first * data.frameSeconds, offset = Math.min(frame * data.frameSeconds, data.seconds);
      if (last && onset - last.offset <= MAX_GAP_SECONDS + 1e-6) {
        last.offset = offset;
        last.confidence = Math.max(last.confidence, highest / LEVELS);
      } else {
        last = { code, onset, offset, confidence: highest / LEVELS };
        events.push(last);
      }
    }
  });
  // Frames after the end of the recording are padding.
  return events.filter((event) => event.onset < data.seconds).map((event) => ({
    ...event, onset: roundSeconds(event.onset + data.start), offset: roundSeconds(event.offset + data.start),
  })).sort(byTime);
}

/** The level of the threshold that the slider shows. */
const thresholdLevel = () => Math.max(1, Math.round(Number(byId('threshold').value) * LEVELS / 100));

function updateDetections() {
  const events = state.usesThreshold
    ? eventsAboveThreshold(state.output, thresholdLevel())
    : data.detections.map(([code, onset, offset, confidence]) => ({ code, onset, offset, confidence }));
  detections = events.filter(isShown);
  state.selected = null;
}

/** The species with a lane: those detected, true or labelled; without any, the most probable ones. */
function laneSpecies() {
  const codes = new Set([...detections, ...truth, ...state.labels].map((event) => event.code));
  if (!codes.size) data.classes.slice(0, 3).forEach((code) => codes.add(code));
  return [...codes].filter((code) => !state.hidden.has(code)).sort(byName);
}

/** The outputs that are drawn: the chosen one, and the members where they are shown. */
const drawnOutputs = () => (byId('show-members').checked ? [...state.levels.keys()] : [state.output]);

/** The level at the top of a species' lane: the highest that is drawn of it anywhere on this page. */
function laneLevel(code) {
  const classIndex = data.classes.indexOf(code);
  if (classIndex < 0 || !state.levels.length) return 0;
  return Math.max(...drawnOutputs().map((output) => state.highest[output][classIndex]));
}

/** The scale of a species' lane in words, or why it has no curve. */
function laneScale(code) {
  const level = laneLevel(code);
  if (level) return `up to ${level / LEVELS}`;
  if (data.classes.includes(code)) return 'up to 0';
  if (!data.modelled.includes(code)) return 'no class of the model';
  return data.classes.length < data.maxClasses
    ? `below ${data.minProbability}` : `not among the ${data.maxClasses} most probable`;
}

// --- drawing ------------------------------------------------------------------------------------

const viewWidth = () => byId('spectrogram').clientWidth;
const xOf = (seconds) => (seconds - data.start - view.start) / view.seconds * viewWidth();
const secondsAt = (x) => data.start + view.start + x / viewWidth() * view.seconds;
const tiles = data.tiles.map((tile) => Object.assign(new Image(), { tile, onload: draw, src: tile.picture }));

/** Clear a canvas, at the resolution of the screen, and return its context. */
function clearCanvas(canvas, height) {
  const scale = window.devicePixelRatio || 1, width = Math.round(canvas.clientWidth * scale);
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== Math.round(height * scale)) {
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext('2d');
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, canvas.clientWidth, height);
  context.font = FONT;
  context.lineWidth = 1;
  return context;
}

let isDrawing = false;
function draw() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    drawOverview();
    drawLanes();
    drawSpectrogram();
    byId('position').textContent = `${formatTime(state.cursor)} of ${formatTime(data.totalSeconds)}`;
  });
}

function drawOverview() {
  const width = byId('overview').clientWidth, context = clearCanvas(byId('overview'), OVERVIEW_HEIGHT);
  const overviewX = (seconds) => (seconds - data.start) / data.seconds * width;
  context.fillStyle = '#f3f5f7';
  context.fillRect(0, 0, width, OVERVIEW_HEIGHT);
  const drawBars = (events, color, top) => {
    context.fillStyle = color;
    for (const { onset, offset } of events) {
      context.fillRect(overviewX(onset), top, Math.max(2, overviewX(offset) - overviewX(onset)), 10);
    }
  };
  drawBars(detections, PREDICTED_COLOR, 6);
  drawBars(truth.filter(isShown), TRUE_COLOR, 18);
  drawBars(state.labels, LABEL_COLOR, 30);
  context.strokeStyle = TEXT_COLOR;
  context.lineWidth = 2;
  const left = view.start / data.seconds * width, viewed = view.seconds / data.seconds * width;
  context.strokeRect(1 + left, 1, Math.max(4, viewed - 2), OVERVIEW_HEIGHT - 2);
  drawCursor(context, overviewX(state.cursor), OVERVIEW_HEIGHT);
}

function drawCursor(context, x, height) {
  context.strokeStyle = CURSOR_COLOR;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x, 0);
  context.lineTo(x, height);
  context.stroke();
}

function drawLanes() {
  const codes = laneSpecies(), height = codes.length * LANE_HEIGHT;
  const context = clearCanvas(byId('lanes'), Math.max(LANE_HEIGHT, height));
  codes.forEach((code, row) => drawLane(context, code, row));
  drawSelection(context, height);
}

function drawLane(context, code, row) {
  const top = row * LANE_HEIGHT, isOfSpecies = (event) => event.code === code;
  context.fillStyle = row % 2 ? '#ffffff' : '#f6f7f9';
  context.fillRect(0, top, viewWidth(), LANE_HEIGHT);
  drawProbabilities(context, code, top);
  for (const event of truth.filter(isOfSpecies)) {
    context.strokeStyle = TRUE_COLOR;
    context.lineWidth = 2;
    context.strokeRect(xOf(event.onset) + 1, top + 2, Math.max(1, eventWidth(event) - 2), 7);
  }
  const fillEvent = (event, color, y, eventHeight) => {
    context.fillStyle = color;
    context.fillRect(xOf(event.onset), y, eventWidth(event), eventHeight);
  };
  for (const label of state.labels.filter(isOfSpecies)) fillEvent(label, LABEL_COLOR, top + LANE_HEIGHT - 5, 4);
  for (const event of detections.filter(isOfSpecies)) {
    fillEvent(event, PREDICTED_COLOR, top + 11, 8);
    if (event === state.selected) {
      context.strokeStyle = TEXT_COLOR;
      context.lineWidth = 2;
      context.strokeRect(xOf(event.onset) - 2, top + 9, eventWidth(event) + 4, 12);
    }
  }
  drawLaneTitle(context, code, top);
}

function drawLaneTitle(context, code, top) {
  const scale = ` ${laneScale(code)}`;
  context.font = FONT;
  const scaleWidth = context.measureText(scale).width;
  context.font = `600 ${FONT}`;
  const nameWidth = context.measureText(nameOf(code)).width;
  context.fillStyle = 'rgba(255,255,255,.7)';
  context.fillRect(2, top + 7, nameWidth + scaleWidth + 6, 16);
  context.fillStyle = TEXT_COLOR;
  context.fillText(nameOf(code), 5, top + 19);
  context.font = FONT;
  context.fillText(scale, 5 + nameWidth, top + 19);
}

const eventWidth = (event) => Math.max(3, xOf(event.offset) - xOf(event.onset));

/** Draw probability over time: the chosen output as an area, the members as lines, the threshold. */
function drawProbabilities(context, code, top) {
  const classIndex = data.classes.indexOf(code), width = viewWidth(), bottom = top + LANE_HEIGHT;
  const maxLevel = laneLevel(code);
  if (!maxLevel) return;
  const yOf = (level) => bottom - level / maxLevel * (LANE_HEIGHT - 2);
  const framesPerPixel = view.seconds / data.frameSeconds / width, start = view.start / data.frameSeconds;
  const trace = (output) => {
    for (let x = 0; x <= width; x++) {
      const first = Math.floor(start + x * framesPerPixel);
      const end = Math.max(first + 1, Math.floor(start + (x + 1) * framesPerPixel));
      let highest = 0;
      for (let frame = first; frame < Math.min(end, data.nFrames); frame++) {
        highest = Math.max(highest, state.levels[output][classIndex * data.nFrames + frame]);
      }
      context.lineTo(x, yOf(highest));
    }
  };
  context.fillStyle = AREA_COLOR;
  context.beginPath();
  context.moveTo(0, bottom);
  trace(state.output);
  context.lineTo(width, bottom);
  context.fill();
  if (thresholdLevel() <= maxLevel) {
    const y = Math.round(yOf(thresholdLevel())) + 0.5;
    context.strokeStyle = THRESHOLD_COLOR;
    context.setLineDash([1, 4]);
    context.beginPath();
    context.moveTo(0, y);
    context.lineTo(width, y);
    context.stroke();
    context.setLineDash([]);
  }
  if (!byId('show-members').checked) return;
  context.lineWidth = 1.25;
  for (let output = 1; output < state.levels.length; output++) {
    context.strokeStyle = MEMBER_COLORS[(output - 1) % MEMBER_COLORS.length];
    context.setLineDash(MEMBER_DASHES[(output - 1) % MEMBER_DASHES.length]);
    context.beginPath();
    trace(output);
    context.stroke();
  }
  context.setLineDash([]);
}

function drawSpectrogram() {
  const context = clearCanvas(byId('spectrogram'), SPECTROGRAM_HEIGHT + AXIS_HEIGHT), width = viewWidth();
  const low = view.lowHz / data.maxHz, high = view.highHz / data.maxHz;
  context.imageSmoothingQuality = 'high'; // the mean of the columns of a pixel, not one of them
  for (const image of tiles) {
    if (!image.complete || !image.naturalWidth) continue;
    const { start, seconds } = image.tile;
    const left = Math.max(start, view.start), right = Math.min(start + seconds, view.start + view.seconds);
    if (right <= left) continue;
    const pixelsPerSecond = image.naturalWidth / seconds;
    context.drawImage(
      image, (left - start) * pixelsPerSecond, (1 - high) * image.naturalHeight,
      Math.max(1, (right - left) * pixelsPerSecond), (high - low) * image.naturalHeight,
      (left - view.start) / view.seconds * width, 0, (right - left) / view.seconds * width, SPECTROGRAM_HEIGHT,
    );
  }
  drawFrequencyAxis(context);
  drawTimeAxis(context, width);
  drawSelection(context, SPECTROGRAM_HEIGHT);
}

function drawFrequencyAxis(context) {
  const low = view.lowHz / 1000, high = view.highHz / 1000, range = high - low;
  const step = range > 8 ? 4 : range > 3 ? 1 : 0.5;
  for (let khz = Math.ceil(low / step) * step; khz < high; khz += step) {
    const y = SPECTROGRAM_HEIGHT - (khz - low) / range * SPECTROGRAM_HEIGHT;
    context.fillStyle = 'rgba(255,255,255,.8)';
    context.fillRect(0, y - 13, 44, 13);
    context.fillStyle = TEXT_COLOR;
    context.fillText(`${khz} kHz`, 3, y - 2);
    context.fillRect(0, y, 8, 1);
  }
}

function drawTimeAxis(context, width) {
  const steps = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600];
  const step = steps.find((seconds) => seconds / view.seconds * width > 60) || 600;
  const start = data.start + view.start;
  for (let seconds = Math.ceil(start / step - 1e-9) * step; seconds <= start + view.seconds; seconds += step) {
    context.fillRect(xOf(seconds), SPECTROGRAM_HEIGHT, 1, 5);
    const text = formatTime(seconds), left = xOf(seconds) + 3;
    if (left + context.measureText(text).width <= width) context.fillText(text, left, SPECTROGRAM_HEIGHT + 17);
  }
}

function drawSelection(context, height) {
  if (state.selection) {
    const { onset, offset } = state.selection;
    context.fillStyle = 'rgba(0,107,79,.22)';
    context.fillRect(xOf(onset), 0, Math.max(1, xOf(offset) - xOf(onset)), height);
  }
  drawCursor(context, xOf(state.cursor), height);
}

/** A time as 1:02:03.4, without hours and tenths that are 0. */
function formatTime(seconds) {
  const tenths = Math.round(seconds * 10), whole = Math.floor(tenths / 10);
  const pad = (number) => String(number).padStart(2, '0');
  const hours = Math.floor(whole / 3600), minutes = `${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
  return (hours ? `${hours}:${minutes}` : minutes) + (tenths % 10 ? `.${tenths % 10}` : '');
}
