'use strict';
// The soundscape page: look at a recording, hear it, see who is named when, and say what is true.
// Probabilities come as whole numbers of LEVELS, rounded down, so that comparing them with a
// threshold of the slider says just what comparing the probabilities themselves would.
const LEVELS = 200;
const MAX_GAP_SECONDS = 0.5; // two calls this close are one event, as in birdcall.detection
const LANE = 30, AXIS = 22, RULER = 46;
const COLORS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#7a5c00', '#56b4e9'];
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [12, 4]];

const data = JSON.parse(document.getElementById('data').textContent);
const $ = (id) => document.getElementById(id);
const names = new Map(data.species);
const nameOf = (code) => names.get(code) || code;
const view = { start: 0, seconds: data.seconds, lowHz: 0, highHz: data.maxHz };
const state = {
  cursor: 0, selection: null, selected: null, byThreshold: false, output: 0,
  levels: [], // of each output: a Uint8Array (classes x frames)
  labels: [], hidden: new Set(),
};
const storageKey = `birdcall labels ${data.identity}`;

// --- what is detected ---------------------------------------------------------------------------

/** Runs of frames that reach the threshold, joined over short gaps, as `frames_to_events` does. */
function eventsByThreshold(output, level) {
  const found = [], nFrames = data.nFrames, own = state.levels[output];
  data.classes.forEach((code, place) => {
    let last = null;
    for (let at = 0; at < nFrames; at++) {
      const begin = at;
      let highest = 0;
      while (at < nFrames && own[place * nFrames + at] >= level) {
        highest = Math.max(highest, own[place * nFrames + at]);
        at++;
      }
      if (at === begin) continue;
      const onset = begin * data.frameSeconds, offset = Math.min(at * data.frameSeconds, data.seconds);
      if (last && onset - last.offset <= MAX_GAP_SECONDS + 1e-6) {
        last.offset = offset;
        last.confidence = Math.max(last.confidence, highest / LEVELS);
      } else {
        last = { code, onset, offset, confidence: highest / LEVELS };
        found.push(last);
      }
    }
  });
  // Frames after the end of the sound are padding.
  return found.filter((one) => one.onset < data.seconds).map((one) => ({
    ...one, onset: round(one.onset + data.start), offset: round(one.offset + data.start),
  })).sort(byTime);
}

const round = (seconds) => Math.round(seconds * 1e6) / 1e6;
const byTime = (a, b) => a.onset - b.onset || a.offset - b.offset || (a.code < b.code ? -1 : 1);
const isShown = (event) => !state.hidden.has(event.code);
let detections = [];

function detect() {
  const level = Math.round(Number($('threshold').value) * LEVELS / 100);
  const all = state.byThreshold
    ? eventsByThreshold(state.output, Math.max(1, level))
    : data.decided.map(([code, onset, offset, confidence]) => ({ code, onset, offset, confidence }));
  detections = all.filter(isShown);
  state.selected = null;
}

/** The species with a lane: those that are named, true, labelled, or loud in the output shown. */
function lanes() {
  const wanted = new Set([...detections, ...data.truth.map(asEvent), ...state.labels].map((one) => one.code));
  if (!wanted.size) data.classes.slice(0, 3).forEach((code) => wanted.add(code));
  return [...wanted].filter((code) => !state.hidden.has(code)).sort((a, b) => nameOf(a).localeCompare(nameOf(b)));
}
const asEvent = ([code, onset, offset]) => ({ code, onset, offset });

// --- drawing ------------------------------------------------------------------------------------

const x = (seconds) => (seconds - data.start - view.start) / view.seconds * width();
const secondsAt = (px) => data.start + view.start + px / width() * view.seconds;
const width = () => $('strip').clientWidth;
const tiles = data.tiles.map((tile) => Object.assign(new Image(), { tile, onload: draw, src: tile.picture }));

function prepare(canvas, height) {
  const scale = window.devicePixelRatio || 1, wide = Math.round(canvas.clientWidth * scale);
  if (canvas.width !== wide) canvas.width = wide;
  if (canvas.height !== Math.round(height * scale)) {
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext('2d');
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, canvas.clientWidth, height);
  context.font = '12px system-ui, sans-serif';
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
    drawStrip();
    $('where').textContent = `${clock(state.cursor)} of ${clock(data.total)}`;
  });
}

function drawOverview() {
  const context = prepare($('overview'), RULER), w = $('overview').clientWidth;
  const at = (seconds) => (seconds - data.start) / data.seconds * w;
  context.fillStyle = '#f3f5f7';
  context.fillRect(0, 0, w, RULER);
  for (const one of detections) bar(context, '#0072b2', at(one.onset), 6, at(one.offset), 10);
  for (const one of data.truth.map(asEvent).filter(isShown)) bar(context, '#b34700', at(one.onset), 18, at(one.offset), 10);
  for (const one of state.labels) bar(context, '#006b4f', at(one.onset), 30, at(one.offset), 10);
  context.strokeStyle = '#1a1a1a';
  context.lineWidth = 2;
  context.strokeRect(1 + view.start / data.seconds * w, 1, Math.max(4, view.seconds / data.seconds * w - 2), RULER - 2);
  line(context, at(state.cursor), 0, RULER);
}

function bar(context, color, left, top, right, height) {
  context.fillStyle = color;
  context.fillRect(left, top, Math.max(2, right - left), height);
}

function line(context, at, top, bottom) {
  context.strokeStyle = '#c00000';
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(at, top);
  context.lineTo(at, bottom);
  context.stroke();
}

function drawLanes() {
  const shown = lanes(), context = prepare($('lanes'), Math.max(1, shown.length) * LANE), w = width();
  shown.forEach((code, row) => {
    const top = row * LANE;
    context.fillStyle = row % 2 ? '#ffffff' : '#f6f7f9';
    context.fillRect(0, top, w, LANE);
    drawFrames(context, code, top, w);
    for (const one of data.truth.map(asEvent)) {
      if (one.code === code) box(context, '#b34700', one, top + 1, 9, false);
    }
    for (const one of state.labels) if (one.code === code) box(context, '#006b4f', one, top + LANE - 5, 4, true);
    for (const one of detections) {
      if (one.code !== code) continue;
      box(context, '#0072b2', one, top + 11, 8, true);
      if (one === state.selected) {
        context.strokeStyle = '#1a1a1a';
        context.lineWidth = 2;
        context.strokeRect(x(one.onset) - 2, top + 9, Math.max(6, x(one.offset) - x(one.onset) + 4), 12);
      }
    }
    context.font = '600 12px system-ui, sans-serif';
    const text = nameOf(code), textWidth = context.measureText(text).width;
    context.fillStyle = 'rgba(255,255,255,.82)';
    context.fillRect(2, top + 7, textWidth + 6, 16);
    context.fillStyle = '#1a1a1a';
    context.fillText(text, 5, top + 19);
  });
  markSelection(context, shown.length * LANE);
}

/** The probability over time: the output in use as an area, the others as lines. */
function drawFrames(context, code, top, w) {
  const place = data.classes.indexOf(code);
  if (place < 0 || !state.levels.length) return;
  const perPixel = view.seconds / data.frameSeconds / w;
  const heightAt = (output, px) => {
    const first = Math.floor((view.start / data.frameSeconds) + px * perPixel);
    const last = Math.max(first + 1, Math.floor((view.start / data.frameSeconds) + (px + 1) * perPixel));
    let highest = 0;
    for (let at = first; at < Math.min(last, data.nFrames); at++) {
      highest = Math.max(highest, state.levels[output][place * data.nFrames + at]);
    }
    return highest / LEVELS * (LANE - 2);
  };
  context.fillStyle = '#a9c7dd';
  context.beginPath();
  context.moveTo(0, top + LANE);
  for (let px = 0; px <= w; px++) context.lineTo(px, top + LANE - heightAt(state.output, px));
  context.lineTo(w, top + LANE);
  context.fill();
  if (!$('members').checked) return;
  state.levels.forEach((_, output) => {
    if (output === 0) return;
    context.strokeStyle = COLORS[(output - 1) % COLORS.length];
    context.setLineDash(DASHES[(output - 1) % DASHES.length]);
    context.lineWidth = 1.25;
    context.beginPath();
    for (let px = 0; px <= w; px++) context.lineTo(px, top + LANE - heightAt(output, px));
    context.stroke();
  });
  context.setLineDash([]);
}

function box(context, color, event, top, height, isFilled) {
  const left = x(event.onset), wide = Math.max(3, x(event.offset) - left);
  context.fillStyle = context.strokeStyle = color;
  context.lineWidth = 2;
  if (isFilled) context.fillRect(left, top, wide, height);
  else context.strokeRect(left + 1, top + 1, Math.max(1, wide - 2), height - 2);
}

function drawStrip() {
  const height = 260, context = prepare($('strip'), height + AXIS), w = width();
  const low = view.lowHz / data.maxHz, high = view.highHz / data.maxHz;
  context.imageSmoothingEnabled = view.seconds < 30;
  for (const image of tiles) {
    if (!image.complete || !image.naturalWidth) continue;
    const { start, seconds } = image.tile;
    const from = Math.max(start, view.start), to = Math.min(start + seconds, view.start + view.seconds);
    if (to <= from) continue;
    const perSecond = image.naturalWidth / seconds;
    context.drawImage(
      image, (from - start) * perSecond, (1 - high) * image.naturalHeight,
      Math.max(1, (to - from) * perSecond), (high - low) * image.naturalHeight,
      (from - view.start) / view.seconds * w, 0, (to - from) / view.seconds * w, height,
    );
  }
  context.fillStyle = '#1a1a1a';
  const kiloHertz = (view.highHz - view.lowHz) / 1000, step = kiloHertz > 8 ? 4 : kiloHertz > 3 ? 1 : 0.5;
  for (let khz = Math.ceil(view.lowHz / 1000 / step) * step; khz < view.highHz / 1000; khz += step) {
    const y = height - (khz * 1000 - view.lowHz) / (view.highHz - view.lowHz) * height;
    context.fillStyle = 'rgba(255,255,255,.8)';
    context.fillRect(0, y - 13, 44, 13);
    context.fillStyle = '#1a1a1a';
    context.fillText(`${khz} kHz`, 3, y - 2);
    context.fillRect(0, y, 8, 1);
  }
  const spacing = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600].find((one) => one / view.seconds * w > 60) || 600;
  const end = data.start + view.start + view.seconds;
  for (let at = Math.ceil((data.start + view.start) / spacing - 1e-9) * spacing; at <= end; at += spacing) {
    context.fillRect(x(at), height, 1, 5);
    const text = clock(at), wide = context.measureText(text).width;
    context.fillText(text, Math.min(x(at) + 3, w - wide), height + 17);
  }
  markSelection(context, height);
}

function markSelection(context, height) {
  if (state.selection) {
    context.fillStyle = 'rgba(0,107,79,.22)';
    context.fillRect(x(state.selection.onset), 0, Math.max(1, x(state.selection.offset) - x(state.selection.onset)), height);
  }
  line(context, x(state.cursor), 0, height);
}

function clock(seconds) {
  const tenths = Math.round(seconds * 10), whole = Math.floor(tenths / 10);
  const two = (number) => String(number).padStart(2, '0');
  const hours = Math.floor(whole / 3600), rest = `${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  return (hours ? `${hours}:${rest}` : rest) + (tenths % 10 ? `.${tenths % 10}` : '');
}

// --- sound --------------------------------------------------------------------------------------

const player = $('player');
let stopAt = Infinity;

function loadSound() {
  if (!data.audio) {
    $('play').disabled = true;
    player.hidden = true;
    return;
  }
  const text = atob(data.audio), bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  player.src = URL.createObjectURL(new Blob([bytes], { type: 'audio/mpeg' }));
}

function seek(seconds, andShow = true) {
  state.cursor = Math.min(data.start + data.seconds, Math.max(data.start, seconds));
  if (data.audio) player.currentTime = state.cursor - data.start;
  if (andShow) show(state.cursor);
  draw();
}

/** Move the view so that a time is in it. */
function show(seconds) {
  const at = seconds - data.start;
  if (at < view.start || at > view.start + view.seconds) zoom(at - view.seconds / 4, view.seconds);
}

function play(until = Infinity) {
  if (!data.audio) return;
  stopAt = until;
  player.play().catch((error) => say(`The sound does not play: ${error.message}`));
}

function toggle() {
  if (player.paused) play(state.selection && state.cursor < state.selection.offset ? state.selection.offset : Infinity);
  else player.pause();
}

function follow() {
  if (player.paused) return;
  state.cursor = data.start + player.currentTime;
  if (state.cursor >= stopAt) {
    player.pause();
    stopAt = Infinity;
  }
  show(state.cursor);
  draw();
  requestAnimationFrame(follow);
}

player.addEventListener('play', () => { $('play').textContent = 'Pause'; follow(); });
player.addEventListener('pause', () => { $('play').textContent = 'Play'; });
player.addEventListener('error', () => { if (data.audio) say('This browser cannot play the sound.'); });
player.addEventListener('seeking', () => { state.cursor = data.start + player.currentTime; draw(); });

// --- moving and zooming -------------------------------------------------------------------------

function zoom(start, seconds) {
  view.seconds = Math.min(data.seconds, Math.max(Math.min(1, data.seconds), seconds));
  view.start = Math.min(data.seconds - view.seconds, Math.max(0, start));
  draw();
  list();
}

function zoomAt(seconds, factor) {
  const at = seconds - data.start, next = view.seconds * factor;
  zoom(at - (at - view.start) * factor, next);
}

function setBand() {
  let low = Number($('low').value) * 1000, high = Number($('high').value) * 1000;
  if (!(high > low)) {
    say('The upper frequency must be above the lower one.');
    return;
  }
  view.lowHz = Math.max(0, low);
  view.highHz = Math.min(data.maxHz, high);
  draw();
}

function next(step) {
  const from = state.selected ? state.selected.onset : state.cursor;
  const order = step > 0 ? detections : [...detections].reverse();
  const at = state.selected ? order.indexOf(state.selected) : -1;
  const found = at >= 0 ? order[at + 1] : order.find((one) => (step > 0 ? one.onset >= from : one.onset <= from));
  if (found) select(found);
  else say(step > 0 ? 'No detection after this one.' : 'No detection before this one.');
}

function select(event) {
  state.selected = event;
  state.selection = { onset: event.onset, offset: event.offset };
  if (event.offset - event.onset > 0) $('species').value = event.code;
  seek(event.onset);
  say(`${nameOf(event.code)}, ${clock(event.onset)} to ${clock(event.offset)}` +
    (event.confidence === undefined ? '' : `, confidence ${event.confidence.toFixed(2)}`));
  fillSelection();
  draw();
}

const say = (text) => { $('said').textContent = text; };

const KEYS = {
  ' ': toggle, ArrowLeft: (e) => seek(state.cursor - (e.shiftKey ? 5 : 0.5)), ArrowRight: (e) => seek(state.cursor + (e.shiftKey ? 5 : 0.5)),
  Home: () => seek(data.start), End: () => seek(data.start + data.seconds), '+': () => zoomAt(state.cursor, 0.5),
  '-': () => zoomAt(state.cursor, 2), n: () => next(1), p: () => next(-1),
  '[': () => setSelection(state.cursor, state.selection ? Math.max(state.selection.offset, state.cursor) : state.cursor),
  ']': () => setSelection(state.selection ? Math.min(state.selection.onset, state.cursor) : state.cursor, state.cursor),
  Enter: addLabel, Escape: () => { state.selection = state.selected = null; stopAt = Infinity; fillSelection(); draw(); },
};

document.addEventListener('keydown', (event) => {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  // A control keeps its own keys.
  if (target.closest('input, select, textarea, button, a, audio, summary, [role=region]')) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act(event);
});

function setSelection(onset, offset) {
  state.selection = { onset: round(Math.min(onset, offset)), offset: round(Math.max(onset, offset)) };
  state.selected = null;
  fillSelection();
  draw();
}

for (const canvas of [$('strip'), $('lanes')]) {
  let from = null, hasMoved = false;
  canvas.addEventListener('pointerdown', (event) => {
    from = event.offsetX;
    hasMoved = false;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (from === null || Math.abs(event.offsetX - from) < 4 && !hasMoved) return;
    hasMoved = true;
    setSelection(secondsAt(Math.max(0, from)), secondsAt(Math.min(width(), event.offsetX)));
  });
  canvas.addEventListener('pointerup', (event) => {
    if (from === null) return;
    if (!hasMoved) click(canvas, event);
    else seek(state.selection.onset, false);
    from = null;
  });
  canvas.addEventListener('pointercancel', () => { from = null; });
  canvas.addEventListener('wheel', (event) => {
    if (!event.ctrlKey) return; // else the page could not be scrolled
    event.preventDefault();
    zoomAt(secondsAt(event.offsetX), event.deltaY > 0 ? 1.25 : 0.8);
  }, { passive: false });
}

function click(canvas, event) {
  const at = secondsAt(event.offsetX);
  if (canvas === $('lanes')) {
    const code = lanes()[Math.floor(event.offsetY / LANE)];
    const hit = detections.find((one) => one.code === code && one.onset <= at && at <= one.offset);
    if (hit) {
      select(hit);
      play(hit.offset);
      return;
    }
  }
  seek(at);
  play();
}

$('overview').addEventListener('pointerdown', (event) => {
  const at = event.offsetX / $('overview').clientWidth * data.seconds;
  zoom(at - view.seconds / 2, view.seconds);
  seek(data.start + at);
});

// --- labels: what a person says is true ---------------------------------------------------------

function fillSelection() {
  $('onset').value = state.selection ? state.selection.onset.toFixed(2) : '';
  $('offset').value = state.selection ? state.selection.offset.toFixed(2) : '';
}

function addLabel() {
  const code = $('species').value, onset = Number($('onset').value), offset = Number($('offset').value);
  if (!code) return say('Choose a species first.');
  if ($('onset').value === '' || !(offset > onset) || onset < data.start || offset > data.start + data.seconds + 0.01) {
    return say(`Give a beginning and a later end between ${data.start} and ${round(data.start + data.seconds)} s.`);
  }
  state.labels.push({ code, onset: round(onset), offset: round(offset), note: $('note').value.trim() });
  $('note').value = '';
  keepLabels(`Label added: ${nameOf(code)}.`);
}

function takeDetections() {
  const known = new Set(state.labels.map((one) => `${one.code} ${one.onset} ${one.offset}`));
  const added = detections.filter((one) => !known.has(`${one.code} ${one.onset} ${one.offset}`));
  state.labels.push(...added.map(({ code, onset, offset }) => ({ code, onset, offset, note: '' })));
  keepLabels(`${added.length} detections taken over as labels.`);
}

function keepLabels(said) {
  state.labels.sort(byTime);
  try {
    localStorage.setItem(storageKey, JSON.stringify(state.labels));
    say(`${said} Kept in this browser; save the table to keep it for good.`);
  } catch (error) {
    say(`${said} This browser keeps nothing: save the table before you leave.`);
  }
  listLabels();
  draw();
}

function restoreLabels() {
  let kept = null;
  try {
    kept = JSON.parse(localStorage.getItem(storageKey));
  } catch (error) {
    say('This browser keeps no labels from page to page: save the table before you leave.');
  }
  const rows = Array.isArray(kept) ? kept : data.labels.map(([code, onset, offset, note]) => ({ code, onset, offset, note }));
  state.labels = rows.filter((one) => one && typeof one.code === 'string' && Number(one.offset) >= Number(one.onset))
    .map((one) => ({ code: one.code, onset: Number(one.onset), offset: Number(one.offset), note: String(one.note || '') }));
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function speciesSelect(chosen) {
  const made = element('select');
  const codes = new Set([...data.species.map(([code]) => code), ...(chosen ? [chosen] : [])]);
  for (const code of [...codes].sort((a, b) => nameOf(a).localeCompare(nameOf(b)))) {
    made.append(element('option', { value: code, textContent: names.has(code) ? `${nameOf(code)} (${code})` : code }));
  }
  made.value = chosen || '';
  return made;
}

function listLabels() {
  const body = $('labels');
  body.replaceChildren();
  state.labels.forEach((label, row) => {
    const said = `label ${row + 1}`;
    const change = (key, input, read) => {
      input.setAttribute('aria-label', `${said}: ${key}`);
      input.addEventListener('change', () => {
        const value = read(input.value);
        if (value === null) {
          input.value = label[key];
          say('That is no time in this recording.');
          return;
        }
        label[key] = value;
        keepLabels(`Label ${row + 1} changed.`);
      });
      return element('td', {}, input);
    };
    const time = (isOnset) => (text) => {
      const value = Number(text);
      const isGood = text !== '' && value >= 0 && value <= data.total + 0.01 && (isOnset ? value < label.offset : value > label.onset);
      return isGood ? round(value) : null;
    };
    const number = (value) => element('input', { type: 'number', step: '0.1', min: '0', value: String(Math.round(value * 100) / 100), className: 'time' });
    const hear = element('button', { type: 'button', textContent: 'Show', onclick: () => select(label) });
    const remove = element('button', { type: 'button', textContent: 'Delete', onclick: () => {
      state.labels.splice(state.labels.indexOf(label), 1);
      keepLabels('Label deleted.');
      $('add').focus();
    } });
    hear.setAttribute('aria-label', `Show ${said}`);
    remove.setAttribute('aria-label', `Delete ${said}`);
    body.append(element('tr', {},
      change('code', speciesSelect(label.code), (value) => value), change('onset', number(label.onset), time(true)),
      change('offset', number(label.offset), time(false)), change('note', element('input', { value: label.note }), (value) => value.trim()),
      element('td', {}, hear, ' ', remove)));
  });
  $('nlabels').textContent = `${state.labels.length} labels`;
}

// --- the list of detections, for those who cannot see the picture ----------------------------------

const LISTED = 100;
function list() {
  const from = data.start + view.start, to = from + view.seconds;
  const shown = detections.filter((one) => one.offset >= from && one.onset <= to);
  const body = $('detections');
  body.replaceChildren(...shown.slice(0, LISTED).map((one) => {
    const button = element('button', { type: 'button', textContent: 'Play', onclick: () => { select(one); play(one.offset); } });
    button.setAttribute('aria-label', `Play ${nameOf(one.code)} at ${clock(one.onset)}`);
    return element('tr', {}, element('td', { textContent: nameOf(one.code) }), element('td', { textContent: clock(one.onset) }),
      element('td', { textContent: clock(one.offset) }), element('td', { textContent: one.confidence.toFixed(2) }), element('td', {}, button));
  }));
  $('ndetections').textContent = `${detections.length} detections${shown.length < detections.length ? `, ${shown.length} in view` : ''}` +
    (shown.length > LISTED ? `, the first ${LISTED} are listed` : '');
}

function refresh() {
  detect();
  list();
  draw();
}

function listSpecies() {
  const codes = [...new Set([...data.decided.map(([code]) => code), ...data.truth.map(([code]) => code), ...data.classes])];
  codes.sort((a, b) => nameOf(a).localeCompare(nameOf(b)));
  $('filter').append(...codes.map((code) => {
    const input = element('input', { type: 'checkbox', checked: true, value: code, onchange: () => {
      if (input.checked) state.hidden.delete(code);
      else state.hidden.add(code);
      refresh();
    } });
    return element('label', {}, input, ` ${nameOf(code)}`);
  }));
}

function setAll(isShown) {
  for (const input of $('filter').querySelectorAll('input')) {
    input.checked = isShown;
    if (isShown) state.hidden.delete(input.value);
    else state.hidden.add(input.value);
  }
  refresh();
}

// --- files --------------------------------------------------------------------------------------

const RAVEN = ['Selection', 'View', 'Channel', 'Begin Time (s)', 'End Time (s)', 'Low Freq (Hz)', 'High Freq (Hz)',
  'Species Code', 'Common Name'];
const plain = (text) => String(text).replace(/[\t\r\n"]+/g, ' ');

function ravenTable(events, lastColumn, lastOf) {
  const rows = events.map((one, row) => [row + 1, 'Spectrogram 1', 1, one.onset, one.offset, view.lowHz, view.highHz,
    plain(one.code), plain(nameOf(one.code)), plain(lastOf(one))]);
  return [[...RAVEN, lastColumn], ...rows].map((row) => row.join('\t')).join('\n') + '\n';
}

const audacityLabels = (events) => events.map((one) => `${one.onset}\t${one.offset}\t${plain(one.code)} ${one.confidence}\n`).join('');

function save(name, text) {
  const link = element('a', { href: URL.createObjectURL(new Blob([text], { type: 'text/plain' })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${name} saved by your browser.`);
}

async function openTable(file) {
  const rows = (await file.text()).replace(/^\ufeff/, '').split(/\r?\n/).filter((line) => line.trim()).map((line) => line.split('\t'));
  const head = rows.shift() || [];
  const column = (...wanted) => wanted.map((name) => head.indexOf(name)).find((place) => place >= 0) ?? -1;
  const [from, to, code, note, number] = [column('Begin Time (s)'), column('End Time (s)'), column('Species Code', 'ebird_code', 'Code', 'Species', 'Annotation', 'Label'),
    column('Notes'), column('Selection')];
  if (Math.min(from, to, code) < 0) return say(`${file.name} is no Raven selection table: it needs Begin Time (s), End Time (s) and Species Code.`);
  const seen = new Set(), found = [];
  for (const [at, row] of rows.entries()) {
    if (number >= 0 && seen.has(row[number])) continue; // Raven saves a selection once for each view
    seen.add(row[number]);
    const label = { code: row[code], onset: Number(row[from]), offset: Number(row[to]), note: note >= 0 ? row[note] || '' : '' };
    if (!label.code || !(label.onset >= 0 && label.offset >= label.onset)) return say(`${file.name}, line ${at + 2}: not a selection.`);
    found.push(label);
  }
  state.labels = found;
  keepLabels(`${found.length} labels read from ${file.name}.`);
}

// --- beginning ----------------------------------------------------------------------------------

/** Unpack zlib's bytes: the browser can, without a library. */
async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function begin() {
  state.cursor = data.start;
  view.seconds = Math.min(data.seconds, 60);
  $('species').replaceWith(Object.assign(speciesSelect(''), { id: 'species' }));
  data.outputs.forEach((name, place) => $('output').append(element('option', { value: place, textContent: name })));
  const members = data.outputs.slice(1);
  $('members').closest('label').hidden = members.length < 2;
  members.forEach((name, place) => {
    const swatch = element('span', { className: 'swatch', ariaHidden: 'true' });
    swatch.style.borderTop = `3px ${['solid', 'dashed', 'dotted', 'dashed', 'dotted', 'dashed'][place % 6]} ${COLORS[place % COLORS.length]}`;
    $('legend').append(element('span', { className: 'member' }, swatch, ` ${name}`));
  });
  $('legend').hidden = true;
  loadSound();
  listSpecies();
  restoreLabels();
  listLabels();
  refresh();
  const all = await unpack(data.frames), size = data.classes.length * data.nFrames;
  state.levels = data.outputs.map((_, place) => all.subarray(place * size, (place + 1) * size));
  $('threshold').disabled = $('bythreshold').disabled = !data.classes.length;
  refresh();
  document.body.dataset.ready = 'yes';
}

function useThreshold(isUsed) {
  state.byThreshold = isUsed;
  $('asdecided').checked = !isUsed;
  $('bythreshold').checked = isUsed;
  refresh();
}

$('threshold').addEventListener('input', () => {
  $('thresholdvalue').textContent = (Number($('threshold').value) / 100).toFixed(2);
  useThreshold(true);
});
$('asdecided').addEventListener('change', () => useThreshold(false));
$('bythreshold').addEventListener('change', () => useThreshold(true));
$('output').addEventListener('change', () => { state.output = Number($('output').value); refresh(); });
$('members').addEventListener('change', () => { $('legend').hidden = !$('members').checked; draw(); });
$('play').addEventListener('click', toggle);
$('previous').addEventListener('click', () => next(-1));
$('next').addEventListener('click', () => next(1));
$('zoomin').addEventListener('click', () => zoomAt(state.cursor, 0.5));
$('zoomout').addEventListener('click', () => zoomAt(state.cursor, 2));
$('whole').addEventListener('click', () => zoom(0, data.seconds));
$('low').addEventListener('change', setBand);
$('high').addEventListener('change', setBand);
$('showall').addEventListener('click', () => setAll(true));
$('shownone').addEventListener('click', () => setAll(false));
$('onset').addEventListener('change', () => setSelection(Number($('onset').value), Math.max(Number($('onset').value), Number($('offset').value))));
$('offset').addEventListener('change', () => setSelection(Math.min(Number($('onset').value), Number($('offset').value)), Number($('offset').value)));
$('add').addEventListener('click', addLabel);
$('take').addEventListener('click', takeDetections);
$('saveraven').addEventListener('click', () => save(`${data.file}.detections.txt`, ravenTable(detections, 'Confidence', (one) => one.confidence)));
$('saveaudacity').addEventListener('click', () => save(`${data.file}.audacity.txt`, audacityLabels(detections)));
$('savelabels').addEventListener('click', () => save(`${data.file}.selections.txt`, ravenTable(state.labels, 'Notes', (one) => one.note)));
$('openlabels').addEventListener('change', (event) => { if (event.target.files.length) openTable(event.target.files[0]); });
window.addEventListener('resize', draw);
begin();
