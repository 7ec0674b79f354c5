'use strict';
// Draw the charts one after another, so that the page can be scrolled at once, and move a line
// over the spectrogram of the mistake that plays.
const SEGMENT_SECONDS = 5;
const charts = JSON.parse(document.getElementById('charts').textContent);

async function drawCharts() {
  for (const element of document.querySelectorAll('[data-chart]')) {
    const { data, layout } = charts[element.dataset.chart];
    await Plotly.newPlot(element, data, layout, { responsive: true, displayModeBar: false });
    await new Promise((resume) => { setTimeout(resume, 0); });
  }
  await tablesReady;
  markReady();
}

const players = [...document.querySelectorAll('.card audio')];
for (const player of players) {
  const cursor = player.closest('.card').querySelector('.cursor');
  const moveCursor = () => {
    cursor.style.left = `${Math.min(100, player.currentTime / SEGMENT_SECONDS * 100)}%`;
    if (!player.paused) requestAnimationFrame(moveCursor);
  };
  player.addEventListener('play', () => {
    for (const playing of players) if (playing !== player) playing.pause();
    moveCursor();
  });
  player.addEventListener('seeked', moveCursor);
}

if (document.querySelector('[data-chart]')) drawCharts();
