'use strict';
// Draw the charts one after another, so that the page can be scrolled from the first moment, and
// let a line follow the sound over each mistake's picture.
const charts = JSON.parse(document.getElementById('data').textContent).charts;
const places = [...document.querySelectorAll('[data-chart]')];

function drawNext() {
  const place = places.shift();
  if (!place) {
    document.body.dataset.ready = 'yes';
    return;
  }
  const { data, layout } = charts[Number(place.dataset.chart)];
  Plotly.newPlot(place, data, layout, { responsive: true, displayModeBar: false }).then(() => setTimeout(drawNext, 0));
}

for (const audio of document.querySelectorAll('.card audio')) {
  const cursor = audio.closest('.card').querySelector('.cursor');
  const follow = () => {
    cursor.style.left = `${Math.min(100, audio.currentTime / 5 * 100)}%`;
    if (!audio.paused) requestAnimationFrame(follow);
  };
  audio.addEventListener('play', () => {
    // One bird at a time.
    for (const other of document.querySelectorAll('.card audio')) if (other !== audio) other.pause();
    follow();
  });
  audio.addEventListener('seeked', follow);
}

drawNext();
