/* The page's conduct: sign in, fetch a pair, listen, vote. A vote goes into an outbox in localStorage before it is sent,
   and leaves it when the server has answered for it; its key makes a second delivery harmless. */
const page = element.querySelector('main');
const find = (selector) => page.querySelector(selector);
const API = new URL('api/v1', document.baseURI).pathname;
const CAMPAIGN = new URLSearchParams(location.search).get('campaign');
const NAME_KEY = 'encore.name';
const player = new Player(() => paint());
let pair = null;
let busy = false;
let notice = '';
let said = '';
let chosen = null;

const outboxKey = () => `encore.outbox.${localStorage.getItem(NAME_KEY) || ''}`;
const readOutbox = () => JSON.parse(localStorage.getItem(outboxKey()) || '[]');
const writeOutbox = (votes) => localStorage.setItem(outboxKey(), JSON.stringify(votes));
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, '0')).join('');
const tell = (text) => { say(text); paint(); };
const say = (text) => { said = text; };

function show(view) {
  page.dataset.view = view;
  readColours();
  find('.signout').hidden = view === 'signin' || view === 'loading';
  if (view !== 'rate' && view !== 'done') find('.progress').hidden = true;
}

/* ---- talking to the server: an answer, or null when there is none to be had now */
async function call(path, options = {}) {
  const headers = { 'X-Encore-Client': 'page', ...options.headers };
  if (options.body) headers['Content-Type'] = 'application/json';
  try {
    const answer = await fetch(API + path, { credentials: 'same-origin', ...options, headers });
    return answer.status >= 500 || answer.status === 429 ? null : answer;
  } catch {
    return null;
  }
}

async function reason(answer) {
  const { detail } = await answer.json().catch(() => ({}));
  return detail && detail.remedy ? `${detail.got}: ${detail.remedy}` : `refused (${answer.status})`;
}

async function fetchAudio(url) {
  const answer = await fetch(url, { credentials: 'same-origin' });
  if (!answer.ok) throw new Error(`audio ${answer.status}`);
  return answer.arrayBuffer();
}

/* ---- the route: deliver what waits, then the next pair. true: done, false: sign in first, null: no connection */
async function advance() {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    const delivered = await deliver();
    const outcome = delivered ? await nextPair() : delivered;
    busy = outcome === null;
    if (!busy) return paint();
    setText(find('.view-loading .lead'), 'The server does not answer. Trying again…');
    tell(readOutbox().length ? 'No connection. Your vote is safe on this device and will be sent.' : 'No connection. Trying again…');
    await pause(wait);
  }
}

async function deliver() {
  for (let votes = readOutbox(); votes.length; votes = readOutbox()) {
    const { key, ballot } = votes[0];
    const answer = await call('/votes', { method: 'POST', headers: { 'Idempotency-Key': key }, body: JSON.stringify(ballot) });
    if (answer === null) return null;
    if (answer.status === 401) return askToSignIn('Your session ended. Your vote is kept; sign in to send it.');
    if (answer.ok) {
      const receipt = await answer.json();
      if (receipt.duplicate && receipt.choice !== ballot.choice) notice = 'You had answered that pair already. The first answer stands.';
    } else {
      notice = `That vote was not taken: ${await reason(answer)}.`;
    }
    writeOutbox(readOutbox().filter((vote) => vote.key !== key));
  }
  return true;
}

async function nextPair() {
  const answer = await call('/pairs/next' + (CAMPAIGN ? `?campaign=${encodeURIComponent(CAMPAIGN)}` : ''));
  if (answer === null) return null;
  if (answer.status === 401) return askToSignIn('');
  if (answer.status === 204) {
    pair = null;
    player.reset();
    show('done');
    countProgress();
    return true;
  }
  if (!answer.ok) {
    find('.view-loading .lead').textContent = await reason(answer);
    show('loading');
    return true;
  }
  pair = await answer.json();
  chosen = null;
  find('.prompt').textContent = pair.prompt; // text, never markup: anyone may have written it
  find('.prompt').classList.toggle('long', pair.prompt.length > 140);
  page.querySelectorAll('.sure input').forEach((input) => { input.checked = false; });
  find('.comment textarea').value = '';
  show('rate');
  countProgress(pair.progress);
  player.reset();
  tell('Loading both pieces…');
  const loading = pair;
  try {
    await player.load(pair.audio, pair.gain_db, fetchAudio);
    if (pair === loading) say(notice);
  } catch {
    if (pair === loading) say('The audio could not be loaded. Reload the page, or skip this pair.');
  }
  notice = '';
  paint();
  return true;
}

function countProgress(progress) {
  const total = progress ? progress.done + progress.open : 0;
  find('.progress').hidden = !total;
  if (!total) return;
  find('.count').textContent = `${progress.done} rated · ${progress.open >= 1000 ? '1000+' : progress.open} to go`;
  find('.meter i').style.width = `${(100 * progress.done) / total}%`;
  find('.meter').setAttribute('aria-valuenow', progress.done);
  find('.meter').setAttribute('aria-valuemax', total);
}

function askToSignIn(text) {
  player.stop();
  show('signin');
  find('.problem').textContent = text;
  find('.signin input').focus();
  return false;
}

async function signIn(handle, token) {
  const answer = await call('/login', { method: 'POST', body: JSON.stringify({ handle, token }) });
  if (answer === null) return void (find('.problem').textContent = 'The server does not answer. Try again in a moment.');
  if (!answer.ok) return void (find('.problem').textContent = 'That name and code do not match. Check both, or ask for a new code.');
  localStorage.setItem(NAME_KEY, (await answer.json()).handle);
  find('.signin').reset();
  find('.problem').textContent = '';
  await advance();
}

/* ---- voting */
const missing = () => (pair && player.buffers ? ['a', 'b'].filter((side) => player.heardMs[side] < pair.min_listen_ms) : ['a', 'b']);

async function vote(choice) {
  if (busy || !pair || page.dataset.view !== 'rate') return;
  player.tick();
  if (choice !== 'skip') {
    if (!player.buffers) return tell('One moment, both pieces are still loading.');
    const waiting = missing().map((side) => `${((pair.min_listen_ms - player.heardMs[side]) / 1000).toFixed(1)} s more of ${side.toUpperCase()}`);
    if (waiting.length) return tell(`First listen to ${waiting.join(' and ')}.`);
  }
  busy = true;
  player.stop();
  const sure = find('.sure input:checked');
  const ballot = {
    assignment_id: pair.assignment_id,
    choice,
    listen_ms: { a: Math.floor(player.heardMs.a), b: Math.floor(player.heardMs.b) },
    confidence: sure ? Number(sure.value) : null,
    comment: find('.comment textarea').value.trim() || null,
    events: player.events,
  };
  writeOutbox([...readOutbox(), { key: newKey(), ballot }]);
  chosen = choice;
  say(choice === 'skip' ? 'Skipping…' : 'Saving…');
  paint();
  await advance();
  find('.prompt').focus({ preventScroll: true });
}

/* ---- what is seen */
function hint(open) {
  if (said) return said;
  if (!pair || !player.buffers) return '';
  if (!open.length) return 'Ready when you are. Switch as often as you like.';
  return `Listen to at least ${pair.min_listen_ms / 1000} s of each, then choose.`;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text; // unchanged text must not be announced again
}

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, '0')}`;

function paint() {
  const here = player.now();
  const open = missing();
  for (const side of ['a', 'b']) {
    const lane = find(`.lane.${side}`);
    const enough = !open.includes(side);
    lane.classList.toggle('on', player.side === side);
    lane.classList.toggle('enough', enough);
    lane.querySelector('.side').setAttribute('aria-pressed', String(player.side === side));
    const left = pair ? Math.max(0, pair.min_listen_ms - player.heardMs[side]) / 1000 : 0;
    setText(lane.querySelector('.heard'), enough ? 'heard' : `${left.toFixed(1)} s to go`);
    drawLane(lane.querySelector('canvas'), side, here);
  }
  find('.play').classList.toggle('playing', player.playing);
  find('.play').setAttribute('aria-label', player.playing ? 'Pause' : 'Play');
  find('.loop').setAttribute('aria-pressed', String(Boolean(player.loop)));
  const time = find('.time');
  time.textContent = `${clock(here)} / ${clock(player.duration)}`;
  time.setAttribute('aria-valuemax', player.duration.toFixed(1));
  time.setAttribute('aria-valuenow', here.toFixed(1));
  time.setAttribute('aria-valuetext', `${here.toFixed(1)} of ${player.duration.toFixed(1)} seconds`);
  setText(find('.status'), hint(open));
  page.classList.toggle('ready', !busy && !open.length);
  page.querySelectorAll('[data-vote]').forEach((button) => {
    button.setAttribute('aria-disabled', String(busy || open.length > 0));
    button.classList.toggle('chosen', button.dataset.vote === chosen);
  });
}

/* What was heard, and where the playhead stands. Deliberately no waveform: it would show which clip is fuller. */
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
  if (player.loop) bar(at(player.loop[0]), at(player.loop[1]), 0.16, 0.84, colours.loop, 8);
  bar(0, width, 0.4, 0.6, colours.line, 5);
  for (const [from, to] of player.spans[side]) bar(at(from), at(to), 0.4, 0.6, colours[side], 5);
  const head = Math.min(width - 3 * scale, Math.max(0, at(here) - 1.5 * scale));
  bar(head, head + 3 * scale, 0.08, 0.92, player.side === side ? colours.ink : colours.faint, 1.5);
}

let colours = {};
function readColours() {
  const style = getComputedStyle(page);
  colours = Object.fromEntries(['ink', 'faint', 'line', 'loop', 'a', 'b'].map((name) => [name, style.getPropertyValue(`--${name}`)]));
}

function frame() {
  if (player.playing) {
    player.tick();
    paint();
  }
  window.encoreFrame = requestAnimationFrame(frame);
}

/* ---- hands */
const hush = () => { if (!busy && player.buffers) said = ''; };
const toggle = () => { hush(); return player.playing ? player.stop() : player.play(); };
const other = () => { hush(); player.switchTo(player.side === 'a' ? 'b' : 'a'); };
const KEYS = {
  ' ': toggle, x: other, l: () => player.toggleLoop(),
  ArrowLeft: () => player.seek(player.now() - 1), ArrowRight: () => player.seek(player.now() + 1),
  1: () => vote('a'), 2: () => vote('b'), 3: () => vote('tie'), 4: () => vote('both_bad'),
};

function onKey(event) {
  if (page.dataset.view !== 'rate' || event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  const target = event.target instanceof Element ? event.target : document.body;
  if (target.closest('input:not([type=radio]), textarea, select, [contenteditable=true]')) return;
  if (event.key === ' ' && target.closest('button, summary, input')) return; // a focused control keeps its own Space
  if (event.key.startsWith('Arrow') && target.closest('input')) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

page.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) {
    if (event.detail) button.blur(); // clicked, not keyed: give Space back to the player
    if (button.dataset.side) {
      hush();
      player.switchTo(button.dataset.side);
      player.play();
    } else if (button.dataset.vote) vote(button.dataset.vote);
    else if (button.matches('.play')) toggle();
    else if (button.matches('.switch')) other();
    else if (button.matches('.loop')) player.toggleLoop();
    else if (button.matches('.skip')) vote('skip');
    else if (button.matches('.again')) advance();
    else if (button.matches('.signout')) call('/logout', { method: 'POST' }).then(() => askToSignIn(''));
    return;
  }
  const track = event.target.closest('.track');
  if (track && player.buffers) {
    const box = track.getBoundingClientRect();
    player.switchTo(track.closest('.lane').querySelector('.side').dataset.side);
    player.seek(((event.clientX - box.left) / box.width) * player.duration);
  }
});
find('.signin').addEventListener('submit', (event) => {
  event.preventDefault();
  const form = new FormData(event.target);
  signIn(form.get('handle'), form.get('token'));
});
for (const [target, name, handler] of [[document, 'keydown', onKey], [window, 'resize', () => { readColours(); paint(); }]]) {
  const slot = `encore:${name}`; // this script may run again after a reconnect: never listen twice
  if (window[slot]) target.removeEventListener(name, window[slot]);
  window[slot] = handler;
  target.addEventListener(name, handler);
}
cancelAnimationFrame(window.encoreFrame);
frame();
advance();
