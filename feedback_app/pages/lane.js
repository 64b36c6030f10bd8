/* What a side looks like: what was heard, where the playhead stands, what was marked. The waveform would show which clip is
   fuller, so it stays hidden until somebody marks, and both are drawn to their own peak. */
const BARS = 160;
const outlines = new WeakMap();
function outline(buffer) {
  if (!outlines.has(buffer)) {
    const data = buffer.getChannelData(0);
    const size = Math.ceil(data.length / BARS);
    const peaks = Array.from({ length: BARS }, (_, i) => data.subarray(i * size, (i + 1) * size).reduce((top, x) => Math.max(top, Math.abs(x)), 0));
    const top = Math.max(...peaks, 1e-6);
    outlines.set(buffer, peaks.map((peak) => peak / top));
  }
  return outlines.get(buffer);
}

function drawLane(canvas, side, here) {
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const draw = canvas.getContext('2d');
  draw.clearRect(0, 0, width, height);
  if (!player.duration) return;
  const at = (seconds) => (seconds / player.duration) * width;
  const bar = (from, to, top, bottom, colour, radius) => {
    draw.fillStyle = colour;
    draw.beginPath();
    draw.roundRect(from, top * height, Math.max(2 * scale, to - from), (bottom - top) * height, radius * scale);
    draw.fill();
  };
  const loop = dragged && dragged.loops ? [Math.min(dragged.from, dragged.to), Math.max(dragged.from, dragged.to)] : player.loop;
  if (loop) bar(at(loop[0]), at(loop[1]), 0.16, 0.84, colours.loop, 8);
  bar(0, width, 0.4, 0.6, colours.line, 5);
  for (const [from, to] of player.spans[side]) bar(at(from), at(to), 0.4, 0.6, colours[side], 5);
  const drawn = dragged && !dragged.loops ? dragged : null;
  if (player.marks.length || player.marking || drawn) {
    const buffer = player.buffers[side];
    outline(buffer).forEach((peak, i) => {
      const from = at((i * buffer.duration) / BARS);
      bar(from, from + Math.max(1, at(buffer.duration / BARS) - 1), 0.5 - 0.4 * peak, 0.5 + 0.4 * peak, colours.faint, 0);
    });
  }
  const open = drawn || (player.marking && { ...player.marking, to: here });
  const marks = player.marks.map((mark) => ({ side: mark.side, from: mark.t0_ms / 1000, to: mark.t1_ms / 1000 }));
  for (const mark of open ? [...marks, open] : marks) {
    if (mark.side === side) bar(at(Math.min(mark.from, mark.to)), at(Math.max(mark.from, mark.to)), 0.86, 1, colours.bad, 2);
  }
  const head = Math.min(width - 3 * scale, Math.max(0, at(here) - 1.5 * scale));
  bar(head, head + 3 * scale, 0.08, 0.92, player.side === side ? colours.ink : colours.faint, 1.5);
}

let colours = {};
function readColours() {
  const style = getComputedStyle(page);
  colours = Object.fromEntries(['ink', 'faint', 'line', 'loop', 'a', 'b', 'bad'].map((name) => [name, style.getPropertyValue(`--${name}`)]));
}

/* ---- a click on a lane seeks; a drag marks what it covers, and with Shift it loops it */
let dragged = null;
const secondsAt = (track, event) => {
  const box = track.getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * player.duration;
};
const sideOf = (track) => track.closest('.lane').querySelector('.side').dataset.side;

function watchLane(track) {
  let pressed = null;
  track.addEventListener('pointerdown', (event) => {
    if (!player.buffers || event.button) return;
    track.setPointerCapture(event.pointerId);
    pressed = { x: event.clientX, from: secondsAt(track, event), loops: event.shiftKey };
  });
  track.addEventListener('pointermove', (event) => {
    if (!pressed || Math.abs(event.clientX - pressed.x) < 6) return;
    dragged = { side: sideOf(track), from: pressed.from, to: secondsAt(track, event), loops: pressed.loops };
    paint();
  });
  track.addEventListener('pointerup', (event) => {
    if (!pressed) return;
    if (dragged) {
      const [from, to] = [Math.min(dragged.from, dragged.to), Math.max(dragged.from, dragged.to)];
      if (dragged.loops) player.loopOver(from, to);
      else player.addMark(dragged.side, from, to);
    } else {
      player.switchTo(sideOf(track));
      player.seek(secondsAt(track, event));
    }
    pressed = dragged = null;
    paint();
  });
  track.addEventListener('pointercancel', () => { pressed = dragged = null; paint(); });
}

/* ---- the marks as a list, each with what is wrong and a way to take it back */
const TAGS = { bad: 'Bad here', noise: 'Noise, clicks', timing: 'Out of time', notes: 'Wrong notes', misfit: 'Does not fit the words' };
let listed = '';
function listMarks() {
  const state = JSON.stringify(player.marks);
  if (state === listed) return;
  listed = state;
  find('.marks').replaceChildren(...player.marks.map((mark) => {
    const where = `${mark.side.toUpperCase()} ${(mark.t0_ms / 1000).toFixed(1)}–${(mark.t1_ms / 1000).toFixed(1)} s`;
    const [item, name, choice, remove] = ['li', 'span', 'select', 'button'].map((tag) => document.createElement(tag));
    name.textContent = where;
    choice.setAttribute('aria-label', `What is wrong at ${where}`);
    choice.append(...Object.entries(TAGS).map(([value, label]) => new Option(label, value, false, value === mark.tag)));
    choice.addEventListener('change', () => { mark.tag = choice.value; keepDraft(); });
    remove.type = 'button';
    remove.textContent = 'Remove';
    remove.setAttribute('aria-label', `Remove the mark at ${where}`);
    remove.addEventListener('click', () => { player.marks.splice(player.marks.indexOf(mark), 1); paint(); });
    item.append(name, choice, remove);
    return item;
  }));
}

