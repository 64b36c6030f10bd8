/* The owner's page: every text that a person wrote goes in by textContent, every figure comes from the owner's JSON API. */
const page = element.querySelector('main');
const find = (selector) => page.querySelector(selector);
const API = '/api/v1';
const ASPECTS = ['prompt_fit', 'musicality', 'sound_quality'];
const SVG = 'http' + '://www.w3.org/2000/svg'; // a name, not an address
let house = null;
let current = null;
let narrow = { tag: '', aspect: '' };

/* ---- small tools */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  return fill(node, attributes, children);
}
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === 'onclick') node.addEventListener('click', value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
const percent = (share) => (share === null ? '–' : `${Math.round(100 * share)} %`);
const when = (text) => new Date(text).toLocaleString([], { dateStyle: 'medium', timeStyle: 'short' });
function table(heads, rows) {
  if (!rows.length) return make('p', { class: 'fine' }, 'Nothing yet.');
  const cells = (row) => row.map((cell, i) => make('td', { 'data-head': heads[i] || null }, cell instanceof Node ? cell : String(cell ?? '–')));
  return make('table', { class: heads.length > 3 ? 'many' : null }, make('thead', {}, make('tr', {}, ...heads.map((head) => make('th', {}, head)))),
    make('tbody', {}, ...rows.map((row) => make('tr', {}, ...cells(row)))));
}
const card = (title, content, wide) => make('div', { class: wide ? 'card full' : 'card' }, make('h2', {}, title), content);
const refusal = ({ got, expected, remedy }) => `Got ${got}; expected ${expected}. ${remedy.charAt(0).toUpperCase()}${remedy.slice(1)}.`;
function say(text, bad = false) {
  find('.said').textContent = text;
  find('.said').classList.toggle('bad', bad);
}

/* ---- talking to the server: the answer's JSON; null after a refusal, which is shown */
async function call(method, path, body, quiet = false) {
  const headers = { 'X-Encore-Client': 'owner' };
  if (body !== undefined) headers['Content-Type'] = 'application/json';
  try {
    const answer = await fetch(API + path, { method, headers, credentials: 'same-origin', body: body === undefined ? undefined : JSON.stringify(body) });
    if (answer.ok) return answer.status === 204 ? {} : await answer.json();
    const { detail } = await answer.json().catch(() => ({}));
    if (answer.status === 401 && path !== '/login') show('signin');
    if (!quiet) say(detail && detail.got ? refusal(detail) : `Refused (${answer.status}).`, true);
  } catch {
    if (!quiet) say('The server does not answer. Nothing was changed; try again in a moment.', true);
  }
  return null;
}
const own = (method, path, body, quiet) => call(method, `/owner${path}`, body, quiet);

function show(view) {
  page.dataset.view = view;
  page.querySelectorAll('[data-tab]').forEach((tab) => {
    const here = tab.dataset.tab === view || (view === 'campaign' && tab.dataset.tab === 'campaigns');
    if (here) tab.setAttribute('aria-current', 'page');
    else tab.removeAttribute('aria-current');
  });
}

/* ---- rules: one form, for a new campaign and for one that runs */
const NUMBERS = [['target_votes', 'Votes wanted for each pair', 1, 1000, 1], ['min_listen_ms', 'Listening asked for, ms a side', 0, 600000, 100],
  ['gold_rate', 'Share of gold pairs', 0, 0.5, 0.01], ['repeat_rate', 'Share of blind repeats', 0, 0.5, 0.01]];
const FRESH = { target_votes: 3, min_listen_ms: 3000, gold_rate: 0, repeat_rate: 0, chooser: 'least_voted', aspects: [], invited_only: false, practice: false, require_screen: false };
function rulesForm(box, rules) {
  const tick = (name, text, on) => make('label', { class: 'tick' }, make('input', { type: 'checkbox', name, checked: on && '' }), text);
  const choose = (name, text) => make('option', { value: name, selected: rules.chooser === name && '' }, text);
  box.replaceChildren(
    ...NUMBERS.map(([name, text, min, max, step]) => make('label', {}, text, make('input', { type: 'number', name, min, max, step, value: rules[name], required: '' }))),
    make('label', {}, 'Next pair', make('select', { name: 'chooser' }, choose('least_voted', 'the least voted'), choose('random', 'any that waits'), choose('informative', 'where a vote tells most'))),
    tick('invited_only', 'Only for those invited to it', rules.invited_only), tick('practice', 'New raters rehearse first', rules.practice),
    tick('require_screen', 'Only for those who passed the headphone check', rules.require_screen),
    ...ASPECTS.map((name) => tick(name, `Ask for ${name.replace('_', ' ')}`, rules.aspects.includes(name))));
}
function readRules(form) {
  const data = new FormData(form);
  const rules = Object.fromEntries(NUMBERS.map(([name]) => [name, Number(data.get(name))]));
  return { ...rules, chooser: data.get('chooser'), invited_only: data.has('invited_only'), practice: data.has('practice'), require_screen: data.has('require_screen'), aspects: ASPECTS.filter((name) => data.has(name)) };
}

/* ---- campaigns */
async function openHouse() {
  const fresh = await own('GET', '/house');
  if (!fresh) return show(page.dataset.view === 'loading' ? 'signin' : page.dataset.view);
  house = fresh;
  find('.roots').textContent = house.roots.length ? `Clips may lie below ${house.roots.join(', ')}` : 'The server was started without --data-root, so it finds no clips.';
  drawHouse();
  show('campaigns');
}
function drawHouse() {
  find('.list').replaceChildren(...house.campaigns.map((campaign) => make('button', { type: 'button', class: 'campaign card', onclick: () => openCampaign(campaign.id) },
    make('b', {}, campaign.name), make('span', { class: `state ${campaign.status}` }, campaign.status),
    make('span', { class: 'fine' }, `${campaign.n_pairs} pairs, ${campaign.n_gold} gold · ${campaign.votes} of ${campaign.votes_wanted} votes · ${campaign.leases} being heard · ${campaign.skips} skipped`),
    make('span', { class: 'meter' }, make('i', { style: `width:${Math.min(100, (100 * campaign.votes) / Math.max(1, campaign.votes_wanted))}%` })))));
  if (!house.campaigns.length) find('.list').replaceChildren(make('div', { class: 'card' }, 'No campaign yet. Make the first one below.'));
  find('.fills').replaceChildren(...house.fills.filter((fill) => fill.state !== 'done' && !put.has(fill.id)).map(fillCard));
}

/* ---- campaigns in the making: the server hears their clips while the page is free to leave */
const put = new Set(); // failures that were read and put away
const busy = () => house && house.fills.some((fill) => fill.state === 'waiting' || fill.state === 'running');
function fillCard(fill) {
  const failed = fill.state === 'failed';
  const told = failed ? `Nothing was stored. ${refusal(fill.problem)}`
    : fill.state === 'waiting' ? 'Waits for its turn.' : `${fill.stage || 'beginning'}${fill.total ? `: ${fill.done.toLocaleString()} of ${fill.total.toLocaleString()}` : ''}. You may leave this page.`;
  const away = make('button', { type: 'button', class: 'plain', onclick: () => { put.add(fill.id); drawHouse(); } }, 'Put away');
  return make('div', { class: 'card campaign fill', role: 'status' }, make('b', {}, fill.name), make('span', { class: failed ? 'state failed' : 'state' }, failed ? 'failed' : 'being made'),
    make('span', { class: 'fine' }, told), failed ? away : make('span', { class: 'meter' }, make('i', { style: `width:${(100 * fill.done) / Math.max(1, fill.total)}%` })));
}

const boardOf = (id) => `/campaigns/${id}/results?${new URLSearchParams(Object.entries(narrow).filter(([, value]) => value))}`;
async function openCampaign(id) {
  if (!current || current.id !== id) narrow = { tag: '', aspect: '' };
  const [fresh, found, frozen] = [await own('GET', '/house'), await own('GET', boardOf(id)), await own('GET', '/snapshots')];
  if (!fresh || !found || !frozen) return;
  house = fresh;
  current = house.campaigns.find((campaign) => campaign.id === id);
  find('.head h1').textContent = current.name;
  const to = (status, text) => make('button', { type: 'button', class: 'plain', onclick: async () => { if (await own('PUT', `/campaigns/${id}/status`, { status })) openCampaign(id); } }, text);
  const moves = { open: [['paused', 'Pause'], ['closed', 'Close']], paused: [['open', 'Open again'], ['closed', 'Close']], closed: [['open', 'Open again']] };
  find('.actions').replaceChildren(...moves[current.status].map((move) => to(...move)));
  rulesForm(find('.change .rules'), current.rules);
  const option = (value, text, chosen) => make('option', { value, selected: value === chosen && '' }, text);
  find('.narrow [name=tag]').replaceChildren(option('', 'all pairs', narrow.tag), ...found.tags.map((tag) => option(tag, tag.replace(':', ': '), narrow.tag)));
  find('.narrow [name=aspect]').replaceChildren(option('', 'the vote', narrow.aspect), ...ASPECTS.map((name) => option(name, name.replace('_', ' '), narrow.aspect)));
  const mine = frozen.filter((snapshot) => snapshot.campaign === current.name || snapshot.sha256 === null);
  find('.made').replaceChildren(mine.length ? table(['Name', 'Votes', 'sha256', 'Made', ''], mine.map((snapshot) => [snapshot.name, snapshot.n_votes,
    snapshot.sha256 === null ? 'cannot be read' : make('code', { title: snapshot.sha256 }, snapshot.sha256.slice(0, 16)), snapshot.created_at && when(snapshot.created_at),
    make('a', { href: `${API}/owner/snapshots/${encodeURIComponent(snapshot.name)}`, download: '' }, 'Download')])) : '');
  drawBoard(found);
  show('campaign');
}
function drawBoard(found) {
  find('.head .lead').textContent = `${current.status} · ${current.n_pairs} pairs, ${current.n_gold} gold · ${current.votes} of ${current.votes_wanted} votes · ${found.n_raters} raters whose votes rank`;
  find('.asof').textContent = `As of ${new Date().toLocaleTimeString()}`;
  const excluded = Object.entries(found.excluded).map(([reason, n]) => [reason.replaceAll('_', ' '), n]);
  const agreement = found.agreement ? table([], [['Two raters agree', `${percent(found.agreement.rate)} of ${found.agreement.n} couples`],
    ['Ceiling for a reward model', `${percent(found.agreement.ceiling)} (95 %: ${found.agreement.ci.map(percent).join(' to ')})`],
    ['Krippendorff’s alpha', found.alpha === null ? '–' : found.alpha.toFixed(2)]]) : make('p', { class: 'fine' }, 'Two raters must hear one pair first.');
  const apart = found.connected ? [] : [make('p', { class: 'fine' }, 'Not all systems have met, if only by way of third ones: ratings of different groups cannot be compared.')];
  find('.plots').replaceChildren(...apart, card('Rating, with 95 % intervals', ratingPlot(found)), card('Who beat whom', winMatrix(found)),
    card('Votes over time', dayPlot(found.votes_by_day)), card('Agreement', agreement),
    card('Kept, but not counted', table(['Reason', 'Votes'], excluded)),
    card('Raters', table(['Rater', 'Votes', 'Gold right', 'Repeats alike', 'Side A', 'Heard', 'Reliability'], found.raters.map((rater) => [rater.handle, rater.n_votes,
      percent(rater.gold_accuracy), percent(rater.repeat_agreement), percent(rater.left_share), percent(rater.coverage), rater.reliability === null ? '–' : rater.reliability.toFixed(2)])), true));
}

/* ---- gently: figures are renewed while somebody looks, forms are left alone, and a slow board is asked for less often */
const EVERY_MS = 15000;
const BUSY_MS = 1500; // while a campaign is being made
async function renew() {
  const began = performance.now();
  const view = page.dataset.view;
  if (document.visibilityState === 'visible' && (view === 'campaigns' || view === 'campaign')) {
    const asked = view === 'campaign' ? boardOf(current.id) : '';
    const fresh = await own('GET', '/house', undefined, true);
    const found = fresh && asked ? await own('GET', asked, undefined, true) : null;
    if (!page.isConnected) return;
    if (view === page.dataset.view && asked === (asked && boardOf(current.id))) { // nobody went elsewhere meanwhile
      if (fresh) house = fresh;
      if (fresh && !asked) drawHouse();
      if (found) {
        current = house.campaigns.find((campaign) => campaign.id === current.id);
        drawBoard(found);
      } else if (asked) find('.asof').textContent += find('.asof').textContent.endsWith(')') ? '' : ' (could not be renewed)';
    }
  }
  again(Math.max(busy() ? BUSY_MS : EVERY_MS, 10 * (performance.now() - began)));
}
let timer = 0;
function again(ms) {
  clearTimeout(timer);
  timer = setTimeout(renew, ms);
}

/* ---- plots: lengths in shares of the card, so that text keeps its size on a phone */
function ratingPlot({ standings }) {
  if (!standings.length) return make('p', { class: 'fine' }, 'No vote ranks two systems yet.');
  const ends = standings.flatMap((row) => row.ci || [row.strength]);
  const [low, high] = [Math.min(...ends, -0.1), Math.max(...ends, 0.1)];
  const x = (value) => `${(2 + (96 * (value - low)) / (high - low)).toFixed(2)}%`;
  return make('ol', { class: 'standings' }, ...standings.map((row, i) => {
    const range = draw('svg', { class: 'range', role: 'img', 'aria-label': row.ci ? `from ${row.ci[0].toFixed(2)} to ${row.ci[1].toFixed(2)}` : 'one rater, no interval' },
      draw('line', { x1: x(0), x2: x(0), y1: 0, y2: 18, stroke: 'var(--line)', 'stroke-width': 2 }));
    if (row.ci) range.append(draw('line', { x1: x(row.ci[0]), x2: x(row.ci[1]), y1: 9, y2: 9, stroke: 'var(--a)', 'stroke-width': 4, 'stroke-linecap': 'round', opacity: 0.4 }));
    range.append(draw('circle', { cx: x(row.strength), cy: 9, r: 6, fill: 'var(--a)' }));
    const needed = row.separate === false ? (row.votes_needed ? `${row.votes_needed.toLocaleString()} more votes to tell it from the next` : 'no number of votes would tell it from the next') : '';
    return make('li', {}, make('span', { class: 'who' }, make('b', {}, `${i + 1}. ${row.system}`), make('span', {}, `${row.strength >= 0 ? '+' : ''}${row.strength.toFixed(2)}`)),
      range, make('span', { class: 'fine' }, `${row.wins} won, ${row.losses} lost, ${row.ties} tied, ${row.both_bad} both bad`), needed && make('span', { class: 'fine' }, needed));
  }));
}

function winMatrix({ standings, wins }) {
  if (standings.length < 2) return make('p', { class: 'fine' }, 'Two systems must meet first.');
  const grid = make('div', { class: 'matrix', role: 'table', 'aria-label': 'Share of votes for the row over the column', style: `--n:${standings.length}` });
  const row = (...cells) => make('div', { role: 'row' }, ...cells);
  grid.append(row(make('span', { role: 'columnheader' }, ''), ...standings.map((column, j) => make('span', { role: 'columnheader', title: column.system }, String(j + 1)))));
  standings.forEach((one, i) => grid.append(row(make('span', { role: 'rowheader', title: one.system }, `${i + 1}. ${one.system}`), ...standings.map((other, j) => {
    const n = wins[i][j] + wins[j][i];
    if (i === j || !n) return make('span', { role: 'cell', title: i === j ? null : `${one.system} and ${other.system} have not met` }, '');
    const share = wins[i][j] / n;
    const tint = `${share >= 0.5 ? 'var(--a)' : 'var(--b)'} ${Math.round(12 + 76 * Math.abs(share - 0.5))}%`;
    return make('span', { role: 'cell', style: `background:color-mix(in srgb, ${tint}, var(--well))`, title: `${one.system} over ${other.system}: ${wins[i][j]} of ${n}` }, String(Math.round(100 * share)));
  }))));
  return make('div', {}, grid, make('p', { class: 'fine' }, 'Per cent of decided votes for the row over the column.'));
}

function dayPlot(days) {
  if (!days.length) return make('p', { class: 'fine' }, 'No vote yet.');
  const shown = days.slice(-60);
  const most = Math.max(...shown.map(([, n]) => n));
  const bars = make('div', { class: 'days', role: 'img', 'aria-label': `Votes on each of ${shown.length} days, at most ${most}` },
    ...shown.map(([day, n]) => make('i', { style: `height:${(100 * n) / most}%`, title: `${day}: ${n} votes` })));
  const span = shown.length > 1 ? `${shown[0][0]} to ${shown.at(-1)[0]}` : shown[0][0];
  return make('div', {}, bars, make('p', { class: 'fine' }, `${span}, at most ${most} a day`));
}

/* ---- people */
async function openPeople() {
  const [fresh, people, links] = [await own('GET', '/house'), await own('GET', '/raters'), await own('GET', '/invitations')];
  if (!fresh || !people || !links) return;
  house = fresh;
  find('.invite select').replaceChildren(make('option', { value: '' }, 'everything open to all'), ...house.campaigns.map((campaign) => make('option', { value: campaign.id }, campaign.name)));
  const act = (text, danger, run) => make('button', { type: 'button', class: danger ? 'plain danger' : 'plain', onclick: run }, text);
  const then = async (answer) => { if (await answer) openPeople(); };
  find('.invitations').replaceChildren(table(['Campaign', 'Note', 'Used', 'Until', ''], links.map((link) => [link.campaign || 'all', link.note, `${link.n_used} of ${link.max_uses}`, when(link.expires_at),
    new Date(link.expires_at) > new Date() ? act('End', false, () => then(own('DELETE', `/invitations/${link.id}`))) : 'ended'])));
  const buttons = (rater) => make('span', { class: 'row' },
    ['active', 'blocked'].includes(rater.status) && rater.handle !== house.handle ? act(rater.status === 'active' ? 'Block' : 'Unblock', false, () => then(own(rater.status === 'active' ? 'PUT' : 'DELETE', `/raters/${rater.id}/block`))) : '',
    act('Copy', false, () => saveCopy(rater)),
    rater.role === 'rater' && rater.status !== 'erased' ? act('Erase', true, () => erase(rater)) : '');
  find('.raters').replaceChildren(table(['Name', 'Role', 'Status', 'Votes', 'Since', ''], people.map((rater) => [rater.handle, rater.role, rater.status, rater.votes, when(rater.created_at), buttons(rater)])));
  show('people');
}

async function saveCopy(rater) {
  const copy = await own('GET', `/raters/${rater.id}/copy`);
  if (!copy) return;
  const link = make('a', { href: URL.createObjectURL(new Blob([JSON.stringify(copy, null, 2)], { type: 'application/json' })), download: `rater-${rater.id}.json` });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function erase(rater) {
  if (!confirm(`Forget ${rater.handle} for good? The name, the access code and the comments go; this cannot be undone.`)) return;
  const votes = confirm('Keep the votes without a name? Cancel removes them too.') ? 'anonymise' : 'remove';
  const found = await own('POST', `/raters/${rater.id}/erasure`, { votes });
  if (!found) return;
  await openPeople();
  say(found.snapshots.length ? `Forgotten. Frozen snapshots with these votes: ${found.snapshots.map((snapshot) => snapshot.name).join(', ')}.` : 'Forgotten. No frozen snapshot holds these votes.');
}

/* ---- audit */
async function openAudit() {
  const entries = await own('GET', '/audit');
  if (!entries) return;
  find('.entries').replaceChildren(table(['When', 'Who', 'What', ''], entries.map((entry) => [when(entry.at), entry.actor || 'command line', entry.action.replace('.', ' '), JSON.stringify(entry.detail)])));
  show('audit');
}

/* ---- hands */
const OPEN = { campaigns: openHouse, people: openPeople, audit: openAudit };
page.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.tab) { say(''); OPEN[button.dataset.tab](); }
  else if (button.matches('.back')) openHouse();
  else if (button.matches('.signout')) call('POST', '/logout').then(() => show('signin'));
});
function onSubmit(selector, run) {
  find(selector).addEventListener('submit', async (event) => {
    event.preventDefault();
    const button = find(`${selector} [type=submit]`);
    button.disabled = true; // twice pressed is once sent
    say('');
    await run(new FormData(event.target), event.target);
    button.disabled = false;
  });
}
onSubmit('.signin', async (data, form) => {
  if (!(await call('POST', '/login', { handle: data.get('handle'), token: data.get('token') }))) return;
  form.reset();
  await openHouse();
});
onSubmit('.create', async (data, form) => {
  const sources = [0, 1].filter((i) => data.get(`path${i}`)).map((i) => ({ path: data.get(`path${i}`), system: data.get(`system${i}`) || null }));
  say('Listening to every clip once…');
  const made = await own('POST', '/campaigns', { name: data.get('name'), sources, rules: readRules(form), n_gold: Number(data.get('n_gold')), every_pair: data.has('every_pair') });
  if (!made) return;
  form.reset();
  find('.new').open = false;
  await openHouse();
  if (made.state) { // it takes longer than an answer may
    say(`${made.name} is being made.`);
    return again(BUSY_MS);
  }
  say(`${made.name}: ${made.n_clips} clips, ${made.n_pairs} pairs, ${made.n_gold} gold.`);
});
onSubmit('.change', async (data, form) => {
  if (await own('PATCH', `/campaigns/${current.id}/rules`, readRules(form))) { await openCampaign(current.id); say('Saved.'); }
});
onSubmit('.freeze', async (data, form) => {
  const made = await own('POST', `/campaigns/${current.id}/snapshots`, { name: data.get('name') });
  if (!made) return;
  form.reset();
  await openCampaign(current.id);
  say(`${made.name}: ${made.n_votes} votes are frozen.`);
});
onSubmit('.invite', async (data) => {
  const made = await own('POST', '/invitations', { campaign_id: data.get('campaign') ? Number(data.get('campaign')) : null, max_uses: Number(data.get('max_uses')), expires_in_h: 24 * Number(data.get('days')), note: data.get('note') || null });
  if (!made) return;
  await openPeople();
  find('.link').hidden = false;
  find('.link input').value = `${location.origin}/#invite=${made.token}`;
  find('.link input').select();
});
find('.narrow').addEventListener('change', async (event) => {
  narrow[event.target.name] = event.target.value;
  const asked = boardOf(current.id);
  const found = await own('GET', asked);
  if (found && asked === boardOf(current.id)) drawBoard(found);
});
rulesForm(find('.create .rules'), FRESH);
again(EVERY_MS);
openHouse().then(() => { if (page.dataset.view === 'signin') say(''); });
