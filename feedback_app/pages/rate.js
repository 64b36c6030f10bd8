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
let unloadable = ''; // why the pair on the table has no sound
let said = '';
let chosen = null;
let me = null;

const outboxKey = () => `encore.outbox.${me ? me.handle : localStorage.getItem(NAME_KEY) || ''}`;
const readOutbox = () => JSON.parse(localStorage.getItem(outboxKey()) || '[]');
const writeOutbox = (votes) => localStorage.setItem(outboxKey(), JSON.stringify(votes));
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, '0')).join('');
const tell = (text) => { say(text); paint(); };
const say = (text) => { said = text; };

function show(view) {
  page.dataset.view = view;
  readColours();
  const inside = me !== null && !['signin', 'loading', 'join', 'refused'].includes(view);
  find('.signout').hidden = !inside;
  find('.menu').hidden = !inside || view === 'code';
  find('.menu').open = false;
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
    let outcome = await arrive();
    if (outcome) outcome = await deliver();
    if (outcome) outcome = await nextPair();
    busy = outcome === null;
    if (!busy) return paint();
    setText(find('.view-loading .lead'), 'The server does not answer. Trying again…');
    tell(readOutbox().length ? 'No connection. Your vote is safe on this device and will be sent.' : 'No connection. Trying again…');
    await pause(wait);
  }
}

async function deliver() {
  if (localStorage.getItem(NAME_KEY) !== me.handle) return askToSignIn('Somebody else signed in in another tab. Sign in again to go on; no vote is lost.');
  for (let votes = readOutbox(); votes.length; votes = readOutbox()) {
    const { key, ballot } = votes[0];
    const answer = await call('/votes', { method: 'POST', headers: { 'Idempotency-Key': key }, body: JSON.stringify(ballot) });
    if (answer === null) return null;
    if (answer.status === 401) return askToSignIn(KEPT);
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
  checkDue = false;
  if (answer.status === 403) {
    const { detail } = await answer.json();
    checkDue = detail.step === 'check';
    if (!checkDue && me) me.consent_due = true; // it may have become due while this page was open
    return openStep(checkDue ? 'check' : 'consent');
  }
  if (answer.status === 204) {
    pair = null;
    player.reset();
    show('done');
    countProgress();
    return tellDeeds();
  }
  if (!answer.ok) {
    find('.view-loading .lead').textContent = await reason(answer);
    show('loading');
    return true;
  }
  const next = await answer.json();
  if (next.practice && !me.practised && !rehearsed()) return openStep('practice', next.aspects);
  return present(next, () => player.load(next.audio, next.gain_db, fetchAudio));
}

async function present(next, load) {
  pair = next;
  chosen = null;
  find('.prompt bdi').textContent = pair.prompt; // text, never markup: anyone may have written it
  find('.prompt').classList.toggle('long', pair.prompt.length > 140);
  find('.rehearsing').hidden = !pair.rehearsal;
  page.querySelectorAll('.sure input').forEach((input) => { input.checked = false; });
  find('.comment textarea').value = '';
  askAspects(pair.aspects);
  show('rate');
  countProgress(pair.progress);
  player.reset();
  unloadable = '';
  tell('Loading both pieces…');
  try {
    await load();
    if (pair === next) {
      if (!pair.rehearsal) takeUpDraft();
      say(notice);
    }
  } catch (error) {
    if (pair === next) say(unloadable = `The audio could not be loaded (${error.message}). Reload the page, or skip this pair.`);
  }
  notice = '';
  paint();
  return true;
}

const ASPECTS = { prompt_fit: 'Fits the words', musicality: 'Musicality', sound_quality: 'Sound quality' };
const SCORES = { '-2': 'A much', '-1': 'A', 0: 'Alike', 1: 'B', 2: 'B much' };
function askAspects(aspects) {
  find('.aspects').replaceChildren(...aspects.map((aspect) => {
    const field = document.createElement('fieldset');
    field.className = 'aspect';
    field.append(Object.assign(document.createElement('legend'), { textContent: ASPECTS[aspect] || aspect }));
    for (const score of [-2, -1, 0, 1, 2]) {
      const [label, input, text] = ['label', 'input', 'span'].map((tag) => document.createElement(tag));
      Object.assign(input, { type: 'radio', name: aspect, value: score });
      text.textContent = SCORES[score];
      label.append(input, text);
      field.append(label);
    }
    return field;
  }));
  find('.why').open = aspects.length > 0;
}

/* ---- what was heard and said of a pair outlives a refresh */
const draftKey = () => `encore.draft.${me.handle}`;
function answers() {
  const checked = [...page.querySelectorAll('.aspect input:checked')];
  const sure = find('.sure input:checked');
  return {
    aspects: Object.fromEntries(checked.map((input) => [input.name, Number(input.value)])),
    confidence: sure ? Number(sure.value) : null,
    comment: find('.comment textarea').value.trim() || null,
  };
}
function keepDraft() {
  if (!pair || !me || pair.rehearsal || !player.buffers || busy) return;
  const { heardMs, spans, events, marks } = player;
  localStorage.setItem(draftKey(), JSON.stringify({ id: pair.assignment_id, said: answers(), player: { heardMs, spans, events, marks } }));
}
function takeUpDraft() {
  const draft = JSON.parse(localStorage.getItem(draftKey()) || 'null');
  if (!draft || draft.id !== pair.assignment_id) return;
  Object.assign(player, draft.player);
  for (const [name, score] of Object.entries(draft.said.aspects)) {
    const input = find(`.aspect input[name="${CSS.escape(name)}"][value="${Number(score)}"]`);
    if (input) input.checked = true;
  }
  if (draft.said.confidence) find(`.sure input[value="${Number(draft.said.confidence)}"]`).checked = true;
  find('.comment textarea').value = draft.said.comment || '';
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

const KEPT = 'Your session ended. Your vote is kept; sign in to send it.';
function askToSignIn(text) {
  player.stop();
  me = null;
  show('signin');
  find('.view-signin .problem').textContent = text;
  find('.signin input').focus();
  return false;
}

async function signIn(handle, token) {
  const answer = await call('/login', { method: 'POST', body: JSON.stringify({ handle, token }) });
  if (answer === null) return void (find('.view-signin .problem').textContent = 'The server does not answer. Try again in a moment.');
  const unknown = 'That name and code do not match. Check both, or ask for a new code.';
  if (!answer.ok) return void (find('.view-signin .problem').textContent = answer.status === 401 ? unknown : `That did not work. ${await reason(answer)}.`);
  localStorage.setItem(NAME_KEY, (await answer.json()).handle);
  find('.signin').reset();
  find('.view-signin .problem').textContent = '';
  me = null;
  await advance();
}

/* ---- voting */
const missing = () => (pair && player.buffers ? ['a', 'b'].filter((side) => player.heardMs[side] < pair.min_listen_ms) : ['a', 'b']);

async function vote(choice) {
  if (busy || !pair || page.dataset.view !== 'rate') return;
  player.tick();
  if (choice !== 'skip') {
    if (!player.buffers) return tell(unloadable || 'One moment, both pieces are still loading.');
    const waiting = missing().map((side) => `${((pair.min_listen_ms - player.heardMs[side]) / 1000).toFixed(1)} s more of ${side.toUpperCase()}`);
    if (waiting.length) return tell(`First listen to ${waiting.join(' and ')}.`);
  }
  busy = true;
  player.stop();
  if (pair.rehearsal) return afterRehearsal(choice);
  const ballot = {
    assignment_id: pair.assignment_id,
    choice,
    listen_ms: { a: Math.floor(player.heardMs.a), b: Math.floor(player.heardMs.b) },
    ...answers(),
    events: player.events,
    marks: player.marks,
    coverage: player.buffers ? { a: player.coverage('a'), b: player.coverage('b') } : null,
    client_ms: Date.now(),
    ui_version: page.dataset.version,
  };
  writeOutbox([...readOutbox(), { key: newKey(), ballot }]);
  localStorage.removeItem(draftKey());
  chosen = choice;
  say(choice === 'skip' ? 'Skipping…' : 'Saving…');
  paint();
  await advance();
  if (page.dataset.view === 'rate') find('.prompt').focus({ preventScroll: true });
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
  find('.mark').setAttribute('aria-pressed', String(Boolean(player.marking)));
  listMarks();
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
const mark = () => (player.toggleMark() ? hush() : tell('Play first, then press M where it sounds bad.'));
const KEYS = {
  ' ': toggle, x: other, l: () => player.toggleLoop(), i: () => player.loopEdge('in'), o: () => player.loopEdge('out'), m: () => mark(),
  ArrowLeft: () => player.seek(player.now() - 1), ArrowRight: () => player.seek(player.now() + 1),
  1: () => vote('a'), 2: () => vote('b'), 3: () => vote('tie'), 4: () => vote('both_bad'),
};

function onKey(event) {
  if (!['rate', 'check'].includes(page.dataset.view) || event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  const target = event.target instanceof Element ? event.target : document.body;
  if (target.closest('input:not([type=radio]), textarea, select, [contenteditable=true]')) return;
  if ([' ', 'Enter'].includes(event.key) && target.closest('button, summary, input')) return; // a focused control keeps its own Space
  if (event.key.startsWith('Arrow') && target.closest('input')) return;
  const act = (page.dataset.view === 'check' ? CHECK_KEYS : KEYS)[event.key.length === 1 ? event.key.toLowerCase() : event.key];
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
    else if (button.matches('.mark')) mark();
    else if (button.matches('.skip')) vote('skip');
    else if (stepClick(button)) return;
    else if (button.matches('.again')) advance();
    else if (button.matches('.signout')) call('/logout', { method: 'POST' }).then(() => askToSignIn(''));
    return;
  }
});
page.querySelectorAll('.track').forEach(watchLane);
page.addEventListener('input', keepDraft);
find('.joining').addEventListener('submit', (event) => {
  event.preventDefault();
  join(String(new FormData(event.target).get('handle')));
});
find('.signin').addEventListener('submit', (event) => {
  event.preventDefault();
  const form = new FormData(event.target);
  signIn(form.get('handle'), form.get('token'));
});
for (const [target, name, handler] of [[document, 'keydown', onKey], [window, 'resize', () => { readColours(); paint(); }], [window, 'pagehide', keepDraft]]) {
  const slot = `encore:${name}`; // this script may run again after a reconnect: never listen twice
  if (window[slot]) target.removeEventListener(name, window[slot]);
  window[slot] = handler;
  target.addEventListener(name, handler);
}
page.player = player; // for whoever measures it
cancelAnimationFrame(window.encoreFrame);
frame();
advance();
