/* The way to the first pair: invitation, consent, name and code, guide, headphone check, rehearsal. Each once; the server
   knows what was done, so a refresh goes on where it stopped. The menu leads back to each. */
const INVITE_KEY = 'encore.invite';
const JOIN_KEY = 'encore.join'; // a joining that was sent and not yet answered: { key, body }
const post = (path, body) => call(path, { method: 'POST', body: JSON.stringify(body) });
let consentPage = null;
let trial = null; // the headphone check: { number, sounds, index, answers, played }. The server alone knows what is right
let toneNode = null;
let checkDue = false; // whether the pairs that wait are only for those who passed the check
let rehearsal = 0;

const rehearsed = () => sessionStorage.getItem('encore.rehearsed') === 'yes';

/* Who is here, and the first step still to do. true: rate on; false: the page waits for a person; null: no connection */
async function arrive() {
  const token = sessionStorage.getItem(INVITE_KEY);
  if (me && !token) return true;
  const pending = JSON.parse(sessionStorage.getItem(JOIN_KEY) || 'null');
  if (token && pending && pending.body.invitation === token) { // joined perhaps, and never told so: asked again, the answer is the same
    const joined = await sendJoining();
    if (joined === null) return null;
    if (joined.ok) return (welcome(await joined.json()), false);
  }
  const answer = await call('/me');
  if (answer === null) return null;
  if (answer.status === 401) return token ? offerInvitation(token) : askToSignIn(me ? KEPT : '');
  me = await answer.json();
  localStorage.setItem(NAME_KEY, me.handle);
  if (token) {
    const taken = await post('/me/invitation', { invitation: token });
    if (taken === null) return null;
    sessionStorage.removeItem(INVITE_KEY);
    if (!taken.ok) notice = `The invitation was not taken: ${await reason(taken)}.`;
    else return (me = null, arrive());
  }
  if (me.consent_due) return openStep('consent');
  if (!me.screen) return openStep('guide');
  return true;
}

async function offerInvitation(token) {
  const answer = await post('/invitation', { invitation: token });
  if (answer === null) return null;
  if (answer.ok) return openStep('consent');
  sessionStorage.removeItem(INVITE_KEY);
  return askToSignIn(`This invitation does not work. ${await reason(answer)}.`);
}

async function openStep(step, aspects = []) {
  player.stop();
  keepDraft();
  hushTone();
  if (step === 'practice') {
    rehearsal = Number(sessionStorage.getItem('encore.rehearsal') || 0) % REHEARSAL.length;
    return presentRehearsal(aspects);
  }
  if (step === 'consent') {
    const answer = await call('/consent');
    if (answer === null) return null;
    consentPage = await answer.json();
    find('.consent-title').textContent = consentPage.title;
    find('.view-consent .words').replaceChildren(...consentPage.text.map((text) => Object.assign(document.createElement('p'), { textContent: text })));
    const agreed = me !== null && !me.consent_due;
    find('.agree').textContent = agreed ? 'Go back' : 'I agree';
    find('.refuse').textContent = agreed ? 'Withdraw my consent' : 'No, thank you';
    find('.view-consent .problem').textContent = '';
  }
  if (step === 'check') startCheck();
  show(step);
  const heading = find(`.view-${step} h1`);
  if (heading) heading.focus({ preventScroll: true });
  return false;
}

async function agree() {
  if (me === null) return void (show('join'), find('.joining input').focus());
  if (me.consent_due) {
    const answer = await post('/me/consent', { version: consentPage.version, accepted: true });
    if (answer === null || !answer.ok) return void (find('.view-consent .problem').textContent = 'The server does not answer. Try again in a moment.');
    me = null;
  }
  await advance();
}

async function refuse() {
  let text = 'Nothing about you was stored. You may close this page, or change your mind.';
  if (me) {
    text = 'No more pairs are handed to you. The answers you gave so far stay as they are; ask whoever invited you if they should be erased.';
    if (!me.consent_due) {
      const answer = await post('/me/consent', { version: consentPage.version, accepted: false });
      if (answer === null || !answer.ok) return void (find('.view-consent .problem').textContent = 'The server does not answer. Try again in a moment.');
    }
    me = null;
  }
  find('.refused-text').textContent = text;
  show('refused');
  find('.view-refused h1').focus();
}

async function join(handle) {
  const problem = find('.view-join .problem');
  const body = { invitation: sessionStorage.getItem(INVITE_KEY) || '', handle, consent_version: consentPage.version };
  const { key } = JSON.parse(sessionStorage.getItem(JOIN_KEY) || '{}');
  sessionStorage.setItem(JOIN_KEY, JSON.stringify({ key: key || newKey(), body }));
  const answer = await sendJoining();
  if (answer === null) return void (problem.textContent = 'The server does not answer. Try again in a moment; you will join only once.');
  if (!answer.ok) return void (problem.textContent = `That did not work. ${await reason(answer)}.`);
  welcome(await answer.json());
}

async function sendJoining() {
  const { key, body } = JSON.parse(sessionStorage.getItem(JOIN_KEY));
  const answer = await call('/join', { method: 'POST', headers: { 'Idempotency-Key': key }, body: JSON.stringify(body) });
  if (answer !== null) sessionStorage.removeItem(JOIN_KEY);
  return answer;
}

function welcome(joined) {
  sessionStorage.removeItem(INVITE_KEY);
  localStorage.setItem(NAME_KEY, joined.handle);
  find('.newname').textContent = joined.handle;
  find('.code code').textContent = joined.access_code;
  show('code');
  find('.view-code h1').focus();
}

/* ---- the headphone check */
function startCheck() {
  trial = null;
  const [level, asking, found] = ['.level', '.trial', '.found'].map(find);
  [level.hidden, asking.hidden, found.hidden, find('.leave').hidden] = [false, true, true, false];
  find('.due').hidden = !checkDue;
  find('.view-check .problem').textContent = '';
}

function hushTone() {
  if (toneNode) toneNode.stop();
  toneNode = null;
}

async function playTone() {
  hushTone();
  const context = player.audio();
  const asked = trial && trial.index;
  if (context.state !== 'running') await context.resume();
  hushTone(); // a second press may have come first
  if (page.dataset.view !== 'check' || asked !== (trial && trial.index)) return;
  const source = context.createBufferSource();
  source.buffer = trial ? trial.sounds[trial.index] : levelTone(context);
  source.loop = !trial;
  source.connect(context.destination);
  source.start();
  toneNode = source;
  if (trial) trial.played = true;
}

async function openCheck() {
  const answer = await call('/me/screen');
  return answer && answer.ok ? answer.json() : null;
}

async function beginTrials() {
  const problem = find('.view-check .problem');
  problem.textContent = 'One moment…';
  try {
    const { number, trials } = await openCheck();
    const sounds = await Promise.all(trials.map(async (url) => player.audio().decodeAudioData(await fetchAudio(url))));
    trial = { number, sounds, answers: [] };
  } catch {
    return void (problem.textContent = 'The tones could not be loaded. Try again in a moment.');
  }
  problem.textContent = '';
  nextTrial(0);
}

function nextTrial(index) {
  hushTone();
  Object.assign(trial, { index, played: false });
  [find('.level').hidden, find('.trial').hidden] = [true, false];
  find('.nth').textContent = `${index + 1} of ${trial.sounds.length}`;
}

async function answerTrial(which) {
  if (!trial || !trial.played || trial.answers.length > trial.index) return;
  trial.answers.push(which);
  if (trial.index + 1 < trial.sounds.length) return nextTrial(trial.index + 1);
  await finishCheck(trial.answers);
}

async function finishCheck(answers) {
  hushTone();
  const check = trial || (await openCheck());
  const answer = check && (await post('/me/screen', { number: check.number, answers }));
  const passed = Boolean(answer && answer.ok && (await answer.json()).passed);
  [find('.level').hidden, find('.trial').hidden, find('.found').hidden, find('.leave').hidden] = [true, true, false, true];
  let text = 'The server does not answer. Go on; you will be asked again.';
  if (answer && answer.ok) {
    const unsure = checkDue ? 'The pairs that wait need headphones, and we could not tell that you wear them. Put them on and try again, or come back later.'
      : 'We could not tell that you wear headphones. You may go on all the same; better with them.';
    text = passed ? 'Your headphones work well.' : unsure;
  }
  find('.found .lead').textContent = text;
  find('.found .onward').textContent = checkDue && !passed ? 'Try again' : 'Go on';
  find('.due').hidden = true;
  trial = null;
  me.screen = { passed }; // unanswered, it is so for this visit only: the server will ask again
  find('.found .onward').focus();
}

const CHECK_KEYS = {
  ' ': () => playTone(), Enter: () => { if (!trial && !find('.level').hidden) beginTrials(); },
  1: () => answerTrial(0), 2: () => answerTrial(1), 3: () => answerTrial(2),
};

/* ---- the rehearsal: the rating page itself, with two pairs of its own; no answer leaves the page */
function presentRehearsal(aspects) {
  const task = REHEARSAL[rehearsal];
  const next = { rehearsal: task, prompt: task.prompt, min_listen_ms: 1000, aspects, progress: null };
  return present(next, async () => player.take(rehearse(player.audio(), task), { a: 0, b: 0 }));
}

async function afterRehearsal(choice) {
  const { rehearsal: task, aspects } = pair;
  if (choice !== task.better && choice !== 'skip') {
    busy = false;
    return tell(`Listen once more: ${task.why}.`);
  }
  rehearsal += 1;
  sessionStorage.setItem('encore.rehearsal', rehearsal);
  busy = false;
  if (rehearsal < REHEARSAL.length) {
    notice = 'Just so. One more to practise on.';
    return presentRehearsal(aspects);
  }
  sessionStorage.setItem('encore.rehearsal', 0);
  sessionStorage.setItem('encore.rehearsed', 'yes');
  await post('/me/practice', {}); // unanswered: the server offers it again on another visit
  me.practised = true;
  notice = 'That was the practice. From here on your answers count.';
  await advance();
}

async function tellDeeds() {
  const answer = await call('/me');
  if (answer === null || !answer.ok) return answer === null ? null : askToSignIn('');
  me = await answer.json();
  const one = me.votes === 1;
  const many = `${me.snapshots} frozen snapshot${me.snapshots > 1 ? 's' : ''}, from which models learn.`;
  const used = me.snapshots ? `Yours stand in ${many}` : `${one ? 'It waits' : 'They wait'} for the next snapshot, from which models learn.`;
  find('.deeds').textContent = me.votes ? `You gave ${me.votes} answer${one ? '' : 's'}. ${used}` : '';
  return true;
}

function stepClick(button) {
  if (button.dataset.step) openStep(button.dataset.step);
  else if (button.dataset.tone) answerTrial(Number(button.dataset.tone));
  else if (button.matches('.tone')) playTone();
  else if (button.matches('.leveled')) beginTrials();
  else if (button.matches('.leave')) finishCheck([]);
  else if (button.matches('.agree')) agree();
  else if (button.matches('.refuse')) refuse();
  else if (button.matches('.reconsider')) { location.reload(); }
  else if (button.matches('.kept')) advance();
  else if (button.matches('.copy')) navigator.clipboard?.writeText(find('.code code').textContent);
  else if (button.matches('.view-guide .onward')) { if (me && me.screen) advance(); else openStep('check'); }
  else if (button.matches('.view-check .onward')) advance();
  else return false;
  return true;
}
