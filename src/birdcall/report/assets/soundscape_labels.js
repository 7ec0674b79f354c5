'use strict';
// The soundscape page, third part: the lists of species, detections and labels, tables to save and
// to open, and the start of the page.

const MAX_LISTED = 100; // detections
const MEMBER_BORDERS = ['solid', 'dashed', 'dotted', 'dashed', 'dotted', 'dashed']; // like MEMBER_DASHES
const storageKey = `birdcall labels ${data.identity}`;

function createElement(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function update() {
  updateDetections();
  listDetections();
  draw();
}

// --- species and detections ---------------------------------------------------------------------

function createSpeciesSelect(chosen) {
  const select = createElement('select');
  const codes = new Set([...names.keys(), ...(chosen ? [chosen] : [])]);
  for (const code of [...codes].sort(byName)) {
    const textContent = names.has(code) ? `${nameOf(code)} (${code})` : code;
    select.append(createElement('option', { value: code, textContent }));
  }
  select.value = chosen;
  return select;
}

function setShown(input, isChecked) {
  input.checked = isChecked;
  if (isChecked) state.hidden.delete(input.value);
  else state.hidden.add(input.value);
}

function listSpecies() {
  const events = [...data.detections, ...data.truth];
  const codes = [...new Set([...events.map(([code]) => code), ...data.classes])].sort(byName);
  byId('filter').append(...codes.map((code) => {
    const input = createElement('input', { type: 'checkbox', checked: true, value: code });
    input.addEventListener('change', () => {
      setShown(input, input.checked);
      update();
    });
    return createElement('label', {}, input, ` ${nameOf(code)}`);
  }));
}

function showAllSpecies(isChecked) {
  for (const input of byId('filter').querySelectorAll('input')) setShown(input, isChecked);
  update();
}

/** List the detections in view as text, for those who cannot see the canvas. */
function listDetections() {
  const start = data.start + view.start, end = start + view.seconds;
  const inView = detections.filter((event) => event.offset >= start && event.onset <= end);
  byId('detections').replaceChildren(...inView.slice(0, MAX_LISTED).map((event) => {
    const button = createElement('button', { type: 'button', textContent: 'Play' });
    button.setAttribute('aria-label', `Play ${nameOf(event.code)} at ${formatTime(event.onset)}`);
    button.addEventListener('click', () => {
      selectEvent(event);
      playUntil(event.offset);
    });
    const texts = [nameOf(event.code), formatTime(event.onset), formatTime(event.offset), event.confidence.toFixed(2)];
    const cells = texts.map((textContent) => createElement('td', { textContent }));
    return createElement('tr', {}, ...cells, createElement('td', {}, button));
  }));
  const inViewText = inView.length < detections.length ? `, ${inView.length} in view` : '';
  const listedText = inView.length > MAX_LISTED ? `, the first ${MAX_LISTED} are listed` : '';
  byId('n-detections').textContent = `${detections.length} detections${inViewText}${listedText}`;
}

// --- labels -------------------------------------------------------------------------------------

function addLabel() {
  const code = byId('species').value, onset = Number(byId('onset').value), offset = Number(byId('offset').value);
  const end = data.start + data.seconds;
  if (!code) {
    showMessage('Choose a species first.');
  } else if (byId('onset').value === '' || !(offset > onset) || onset < data.start || offset > end + 0.01) {
    showMessage(`Give a start and a later end, both between ${data.start} and ${roundSeconds(end)} s.`);
  } else {
    const note = byId('note').value.trim();
    state.labels.push({ code, onset: roundSeconds(onset), offset: roundSeconds(offset), note });
    byId('note').value = '';
    storeLabels(`Label added: ${nameOf(code)}.`);
  }
}

function copyDetections() {
  const keyOf = (event) => `${event.code} ${event.onset} ${event.offset}`;
  const existing = new Set(state.labels.map(keyOf));
  const added = detections.filter((event) => !existing.has(keyOf(event)));
  state.labels.push(...added.map(({ code, onset, offset }) => ({ code, onset, offset, note: '' })));
  storeLabels(`${added.length} detections copied to your labels.`);
}

function storeLabels(message) {
  state.labels.sort(byTime);
  try {
    localStorage.setItem(storageKey, JSON.stringify(state.labels));
    showMessage(`${message} Stored in this browser; save the table to use it elsewhere.`);
  } catch (error) {
    showMessage(`${message} This browser cannot store labels: save the table before you leave.`);
  }
  listLabels();
  draw();
}

function restoreLabels() {
  let stored = null;
  try {
    stored = JSON.parse(localStorage.getItem(storageKey));
  } catch (error) {
    showMessage('This browser cannot store labels: save the table before you leave.');
  }
  const labels = Array.isArray(stored)
    ? stored
    : data.labels.map(([code, onset, offset, note]) => ({ code, onset, offset, note }));
  const isValid = (label) => label && typeof label.code === 'string' && Number(label.offset) >= Number(label.onset);
  state.labels = labels.filter(isValid).map(({ code, onset, offset, note }) => ({
    code, onset: Number(onset), offset: Number(offset), note: String(note || ''),
  }));
}

function listLabels() {
  byId('labels').replaceChildren(...state.labels.map(createLabelRow));
  byId('n-labels').textContent = `${state.labels.length} labels`;
}

function createLabelRow(label, row) {
  const title = `label ${row + 1}`;
  // A cell that changes one property of the label; `read` returns null for a value that is refused.
  const createCell = (property, input, read) => {
    input.setAttribute('aria-label', `${title}: ${property}`);
    input.addEventListener('change', () => {
      const value = read(input.value);
      if (value === null) {
        input.value = label[property];
        showMessage('This time is not inside the recording, or the end is not after the start.');
        return;
      }
      label[property] = value;
      storeLabels(`Label ${row + 1} changed.`);
    });
    return createElement('td', {}, input);
  };
  const createTimeCell = (property, isAllowed) => {
    const value = String(Math.round(label[property] * 100) / 100);
    const input = createElement('input', { type: 'number', step: '0.1', min: '0', value, className: 'time' });
    return createCell(property, input, (text) => {
      const seconds = Number(text);
      const isInside = text !== '' && seconds >= 0 && seconds <= data.totalSeconds + 0.01;
      return isInside && isAllowed(seconds) ? roundSeconds(seconds) : null;
    });
  };
  const showButton = createElement('button', { type: 'button', textContent: 'Show' });
  showButton.setAttribute('aria-label', `Show ${title}`);
  showButton.addEventListener('click', () => selectEvent(label));
  const deleteButton = createElement('button', { type: 'button', textContent: 'Delete' });
  deleteButton.setAttribute('aria-label', `Delete ${title}`);
  deleteButton.addEventListener('click', () => {
    state.labels.splice(state.labels.indexOf(label), 1);
    storeLabels('Label deleted.');
    byId('add-label').focus();
  });
  return createElement('tr', {},
    createCell('code', createSpeciesSelect(label.code), (code) => code),
    createTimeCell('onset', (seconds) => seconds < label.offset),
    createTimeCell('offset', (seconds) => seconds > label.onset),
    createCell('note', createElement('input', { value: label.note }), (text) => text.trim()),
    createElement('td', {}, showButton, ' ', deleteButton));
}

// --- tables -------------------------------------------------------------------------------------

const RAVEN_COLUMNS = ['Selection', 'View', 'Channel', 'Begin Time (s)', 'End Time (s)', 'Low Freq (Hz)',
  'High Freq (Hz)', 'Species Code', 'Common Name'];
const cleanText = (text) => String(text).replace(/[\t\r\n"]+/g, ' ');

function ravenTable(events, lastColumn, lastValue) {
  const rows = events.map((event, row) => [
    row + 1, 'Spectrogram 1', 1, event.onset, event.offset, view.lowHz, view.highHz,
    cleanText(event.code), cleanText(nameOf(event.code)), cleanText(lastValue(event)),
  ]);
  return [[...RAVEN_COLUMNS, lastColumn], ...rows].map((row) => `${row.join('\t')}\n`).join('');
}

const audacityLabels = (events) => events.map(
  (event) => `${event.onset}\t${event.offset}\t${cleanText(event.code)} ${event.confidence}\n`,
).join('');

function saveFile(suffix, text) {
  const download = `${data.fileStem}.${suffix}`;
  const link = createElement('a', { href: URL.createObjectURL(new Blob([text], { type: 'text/plain' })), download });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  showMessage(`Your browser saves ${download}.`);
}

const lettersOf = (text) => text.toLowerCase().replace(/[^a-z0-9]/g, '');
// Quotes around a whole cell are those of R and Excel; any other quote is text.
const plainText = (cell) => cell.trim().replace(/^"(.*)"$/, (_, text) => text.replaceAll('""', '"').trim());

/** Return the code that a label means, a code or a name in any case, or the label itself. */
function findCode(label) {
  const wanted = label.toLowerCase().replace(/\s+/g, ' ');
  for (const [code, name] of names) {
    if (code.toLowerCase() === wanted || name.toLowerCase() === wanted) return code;
  }
  return label;
}

async function openTable(file) {
  const text = (await file.text()).replace(/^\ufeff/, '');
  const lines = text.split(/\r\n|\r|\n/).filter((line) => line.trim());
  const [header = [], ...rows] = lines.map((line) => line.split('\t').map(plainText));
  const columns = header.map(lettersOf);
  const findColumn = (...titles) => titles.map((title) => columns.indexOf(lettersOf(title))).find((index) => index >= 0) ?? -1;
  const onsetColumn = findColumn('Begin Time (s)'), offsetColumn = findColumn('End Time (s)');
  const codeColumn = findColumn('Species Code', 'ebird_code', 'Code', 'Species', 'Annotation', 'Label', 'Common Name', 'Scientific Name');
  const noteColumn = findColumn('Notes');
  if (Math.min(onsetColumn, offsetColumn, codeColumn) < 0) {
    showMessage(`${file.name} is not a Raven selection table: it needs the columns Begin Time (s), End Time (s) and Species Code.`);
    return;
  }
  const labels = new Map();
  for (const [index, row] of rows.entries()) {
    const code = findCode(row[codeColumn] || ''), onset = Number(row[onsetColumn]), offset = Number(row[offsetColumn]);
    if (!code || !(onset >= 0 && offset >= onset)) {
      showMessage(`${file.name}, line ${index + 2}: a selection needs a species, a start and a later end.`);
      return;
    }
    // Raven saves a selection once for each of its views.
    const key = `${code} ${onset} ${offset}`;
    if (!labels.has(key)) labels.set(key, { code, onset, offset, note: row[noteColumn] || '' });
  }
  state.labels = [...labels.values()];
  storeLabels(`${labels.size} labels read from ${file.name}.`);
}

// --- start --------------------------------------------------------------------------------------

/** Decompress zlib's bytes with what the browser brings. */
async function decompress(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function useThreshold(isUsed) {
  state.usesThreshold = isUsed;
  byId('by-decision').checked = !isUsed;
  byId('by-threshold').checked = isUsed;
  update();
}

function listOutputs() {
  data.outputs.forEach((name, index) => {
    byId('output').append(createElement('option', { value: index, textContent: name }));
  });
  const members = data.outputs.slice(1);
  byId('show-members').closest('label').hidden = members.length < 2;
  members.forEach((name, index) => {
    const color = MEMBER_COLORS[index % MEMBER_COLORS.length];
    const style = MEMBER_BORDERS[index % MEMBER_BORDERS.length];
    const swatch = createElement('span', { className: 'swatch', ariaHidden: 'true' });
    swatch.style.borderTop = `3px ${style} ${color}`;
    byId('member-key').append(createElement('span', { className: 'member' }, swatch, ` ${name}`));
  });
  byId('member-key').hidden = true;
}

byId('threshold').addEventListener('input', () => {
  byId('threshold-value').textContent = (Number(byId('threshold').value) / 100).toFixed(2);
  useThreshold(true);
});
byId('by-decision').addEventListener('change', () => useThreshold(false));
byId('by-threshold').addEventListener('change', () => useThreshold(true));
byId('output').addEventListener('change', () => {
  state.output = Number(byId('output').value);
  update();
});
byId('show-members').addEventListener('change', () => {
  byId('member-key').hidden = !byId('show-members').checked;
  draw();
});
byId('show-all').addEventListener('click', () => showAllSpecies(true));
byId('show-none').addEventListener('click', () => showAllSpecies(false));
byId('add-label').addEventListener('click', addLabel);
byId('copy-detections').addEventListener('click', copyDetections);
byId('save-raven').addEventListener('click', () => {
  saveFile('detections.txt', ravenTable(detections, 'Confidence', (event) => event.confidence));
});
byId('save-audacity').addEventListener('click', () => saveFile('audacity.txt', audacityLabels(detections)));
byId('save-labels').addEventListener('click', () => {
  saveFile('selections.txt', ravenTable(state.labels, 'Notes', (label) => label.note));
});
byId('open-labels').addEventListener('change', (event) => {
  if (event.target.files.length) openTable(event.target.files[0]);
});
window.addEventListener('resize', draw);

async function startPage() {
  state.cursor = data.start;
  view.seconds = Math.min(data.seconds, 60);
  byId('species').replaceWith(Object.assign(createSpeciesSelect(''), { id: 'species' }));
  listOutputs();
  loadAudio();
  listSpecies();
  restoreLabels();
  listLabels();
  update();
  const levels = await decompress(data.frames), size = data.classes.length * data.nFrames;
  state.levels = data.outputs.map((_, index) => levels.subarray(index * size, (index + 1) * size));
  const highestOf = (output, index) => output
    .subarray(index * data.nFrames, (index + 1) * data.nFrames).reduce((a, b) => Math.max(a, b), 0);
  state.highest = state.levels.map((output) => data.classes.map((_, index) => highestOf(output, index)));
  byId('threshold').disabled = byId('by-threshold').disabled = !data.classes.length;
  update();
  document.body.dataset.ready = 'yes';
}

startPage();
