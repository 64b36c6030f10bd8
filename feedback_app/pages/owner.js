/* The owner's page: every text that a person wrote goes in by textContent, every figure comes from the owner's JSON API. */
const page = element.querySelector('main');
const find = (selector) => page.querySelector(selector);
const API = '/api/v1';
const ASPECTS = ['prompt_fit', 'musicality', 'sound_quality'];
const SVG = 'http' + '://www.w3.org/2000/svg'; // a name, not an address
let house = null;
let current = null;

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
  const cells = (row) => row.map((cell) => make('td', {}, cell instanceof Node ? cell : String(cell ?? '–')));
  return make('table', {}, make('thead', {}, make('tr', {}, ...heads.map((head) => make('th', {}, head)))),
    make('tbody', {}, ...rows.map((row) => make('tr', {}, ...cells(row)))));
}
const card = (title, content, wide) => make('div', { class: wide ? 'card full' : 'card' }, make('h2', {}, title), content);
function say(text, bad = false) {
  find('.said').textContent = text;
  find('.said').classList.toggle('bad', bad);
}

/* ---- talking to the server: the answer's JSON; null after a refusal, which is shown */
async function call(method, path, body) {
  const headers = { 'X-Encore-Client': 'owner' };
  if (body !== undefined) headers['Content-Type'] = 'application/json';
  try {
    const answer = await fetch(API + path, { method, headers, credentials: 'same-origin', body: body === undefined ? undefined : JSON.stringify(body) });
    if (answer.ok) return answer.status === 204 ? {} : await answer.json();
    const { detail } = await answer.json().catch(() => ({}));
    if (answer.status === 401 && path !== '/login') show('signin');
    say(detail ? `Got ${detail.got}; expected ${detail.expected}. ${detail.remedy}.` : `Refused (${answer.status}).`, true);
  } catch {
    say('The server does not answer. Nothing was changed; try again in a moment.', true);
  }
  return null;
}
const own = (method, path, body) => call(method, `/owner${path}`, body);

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
  house = await own('GET', '/house');
  if (!house) return show(page.dataset.view === 'loading' ? 'signin' : page.dataset.view);
  find('.roots').textContent = house.roots.length ? `Clips may lie below ${house.roots.join(', ')}` : 'The server was started without --data-root, so it finds no clips.';
  find('.list').replaceChildren(...house.campaigns.map((campaign) => make('button', { type: 'button', class: 'campaign card', onclick: () => openCampaign(campaign.id) },
    make('b', {}, campaign.name), make('span', { class: `state ${campaign.status}` }, campaign.status),
    make('span', { class: 'fine' }, `${campaign.n_pairs} pairs, ${campaign.n_gold} gold · ${campaign.votes} of ${campaign.votes_wanted} votes · ${campaign.leases} being heard · ${campaign.skips} skipped`),
    make('span', { class: 'meter' }, make('i', { style: `width:${Math.min(100, (100 * campaign.votes) / Math.max(1, campaign.votes_wanted))}%` })))));
  if (!house.campaigns.length) find('.list').replaceChildren(make('div', { class: 'card' }, 'No campaign yet. Make the first one below.'));
  show('campaigns');
}

async function openCampaign(id) {
  const [fresh, found] = [await own('GET', '/house'), await own('GET', `/campaigns/${id}/results`)];
  if (!fresh || !found) return;
  house = fresh;
  current = house.campaigns.find((campaign) => campaign.id === id);
  find('.head h1').textContent = current.name;
  find('.head .lead').textContent = `${current.status} · ${current.n_pairs} pairs, ${current.n_gold} gold · ${current.votes} of ${current.votes_wanted} votes · ${found.n_raters} raters whose votes rank`;
  const to = (status, text) => make('button', { type: 'button', class: 'plain', onclick: async () => { if (await own('PUT', `/campaigns/${id}/status`, { status })) openCampaign(id); } }, text);
  const moves = { open: [['paused', 'Pause'], ['closed', 'Close']], paused: [['open', 'Open again'], ['closed', 'Close']], closed: [['open', 'Open again']] };
  find('.actions').replaceChildren(...moves[current.status].map((move) => to(...move)));
  rulesForm(find('.change .rules'), current.rules);
  find('.made').replaceChildren();
  const excluded = Object.entries(found.excluded).map(([reason, n]) => [reason.replaceAll('_', ' '), n]);
  const agreement = found.agreement ? table(['', ''], [['Two raters agree', `${percent(found.agreement.rate)} of ${found.agreement.n} couples`],
    ['Ceiling for a reward model', `${percent(found.agreement.ceiling)} (95 %: ${found.agreement.ci.map(percent).join(' to ')})`],
    ['Krippendorff’s alpha', found.alpha === null ? '–' : found.alpha.toFixed(2)]]) : make('p', { class: 'fine' }, 'Two raters must hear one pair first.');
  find('.plots').replaceChildren(card('Rating, with 95 % intervals', ratingPlot(found.standings)), card('Who beat whom', winMatrix(found)),
    card('Votes over time', dayPlot(found.votes_by_day)), card('Agreement', agreement),
    card('Kept, but not counted', table(['Reason', 'Votes'], excluded)),
    card('Raters', table(['Rater', 'Votes', 'Gold right', 'Repeats alike', 'Side A', 'Heard', 'Reliability'], found.raters.map((rater) => [rater.handle, rater.n_votes,
      percent(rater.gold_accuracy), percent(rater.repeat_agreement), percent(rater.left_share), percent(rater.coverage), rater.reliability === null ? '–' : rater.reliability.toFixed(2)])), true));
  show('campaign');
}

/* ---- plots */
function ratingPlot(standings) {
  if (!standings.length) return make('p', { class: 'fine' }, 'No vote ranks two systems yet.');
  const ends = standings.flatMap((row) => row.ci || [row.strength]);
  const [low, high] = [Math.min(...ends, -0.1), Math.max(...ends, 0.1)];
  const x = (value) => 150 + ((value - low) / (high - low)) * 280;
  const plot = draw('svg', { viewBox: `0 0 460 ${standings.length * 40 + 24}`, role: 'img', 'aria-label': 'Rating of each system with its interval' });
  plot.append(draw('line', { x1: x(0), x2: x(0), y1: 4, y2: standings.length * 40, stroke: 'var(--line)', 'stroke-width': 2 }));
  standings.forEach((row, i) => {
    const y = 22 + i * 40;
    const needed = row.separate === false && row.votes_needed ? ` · ${row.votes_needed} more votes would part it from the next` : '';
    plot.append(draw('text', { x: 0, y: y + 4 }, row.system.length > 20 ? `${row.system.slice(0, 19)}…` : row.system));
    if (row.ci) plot.append(draw('line', { x1: x(row.ci[0]), x2: x(row.ci[1]), y1: y, y2: y, stroke: 'var(--a)', 'stroke-width': 4, 'stroke-linecap': 'round', opacity: 0.4 }));
    plot.append(draw('circle', { cx: x(row.strength), cy: y, r: 6, fill: 'var(--a)' }, draw('title', {}, `${row.system}: ${row.strength.toFixed(2)}`)));
    plot.append(draw('text', { x: 0, y: y + 20, class: 'soft' }, `${row.strength >= 0 ? '+' : ''}${row.strength.toFixed(2)} · ${row.wins} won, ${row.losses} lost, ${row.ties} tied${needed}`));
  });
  return plot;
}

function winMatrix({ standings, wins }) {
  if (standings.length < 2) return make('p', { class: 'fine' }, 'Two systems must meet first.');
  const size = Math.min(64, 330 / standings.length);
  const plot = draw('svg', { viewBox: `0 0 460 ${standings.length * size + 30}`, role: 'img', 'aria-label': 'Share of votes for the row over the column' });
  standings.forEach((row, i) => {
    plot.append(draw('text', { x: 0, y: 24 + i * size + size / 2 + 4 }, row.system.slice(0, 16)));
    plot.append(draw('text', { x: 120 + i * size + size / 2, y: 14, 'text-anchor': 'middle', class: 'soft' }, row.system.slice(0, Math.max(3, Math.floor(size / 7)))));
    standings.forEach((column, j) => {
      const n = wins[i][j] + wins[j][i];
      const share = n ? wins[i][j] / n : 0.5;
      const colour = i === j || !n ? 'var(--well)' : share >= 0.5 ? 'var(--a)' : 'var(--b)';
      plot.append(draw('rect', { x: 121 + j * size, y: 24 + i * size, width: size - 3, height: size - 3, rx: 8, fill: colour, opacity: i === j || !n ? 1 : 0.15 + 0.8 * Math.abs(share - 0.5) },
        draw('title', {}, `${row.system} over ${column.system}: ${wins[i][j]} of ${n}`)));
      if (i !== j && n && size > 30) plot.append(draw('text', { x: 120 + j * size + size / 2, y: 24 + i * size + size / 2 + 3, 'text-anchor': 'middle' }, percent(share)));
    });
  });
  return plot;
}

function dayPlot(days) {
  if (!days.length) return make('p', { class: 'fine' }, 'No vote yet.');
  const shown = days.slice(-60);
  const most = Math.max(...shown.map(([, n]) => n));
  const wide = Math.min(40, 440 / shown.length);
  const plot = draw('svg', { viewBox: '0 0 460 150', role: 'img', 'aria-label': `Votes on each of ${shown.length} days` });
  shown.forEach(([day, n], i) => {
    const high = (105 * n) / most;
    plot.append(draw('rect', { x: 10 + i * wide, y: 122 - high, width: Math.max(1, wide - 3), height: high, rx: 3, fill: 'var(--a)' }, draw('title', {}, `${day}: ${n} votes`)));
  });
  plot.append(draw('text', { x: 10, y: 142, class: 'soft' }, shown[0][0]), draw('text', { x: 450, y: 142, 'text-anchor': 'end', class: 'soft' }, `${shown.at(-1)[0]}, at most ${most} a day`));
  return plot;
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
  say(`${made.name}: ${made.n_clips} clips, ${made.n_pairs} pairs, ${made.n_gold} gold.`);
});
onSubmit('.change', async (data, form) => {
  if (await own('PATCH', `/campaigns/${current.id}/rules`, readRules(form))) { await openCampaign(current.id); say('Saved.'); }
});
onSubmit('.freeze', async (data) => {
  const name = data.get('name');
  const made = await own('POST', `/campaigns/${current.id}/snapshots`, { name });
  if (made) find('.made').replaceChildren(`${made.n_votes} votes, sha256 ${made.sha256.slice(0, 12)}: `, make('a', { href: `${API}/owner/snapshots/${encodeURIComponent(name)}`, download: '' }, 'download'));
});
onSubmit('.invite', async (data) => {
  const made = await own('POST', '/invitations', { campaign_id: data.get('campaign') ? Number(data.get('campaign')) : null, max_uses: Number(data.get('max_uses')), expires_in_h: 24 * Number(data.get('days')), note: data.get('note') || null });
  if (!made) return;
  await openPeople();
  find('.link').hidden = false;
  find('.link input').value = `${location.origin}/#invite=${made.token}`;
  find('.link input').select();
});
rulesForm(find('.create .rules'), FRESH);
openHouse().then(() => { if (page.dataset.view === 'signin') say(''); });
