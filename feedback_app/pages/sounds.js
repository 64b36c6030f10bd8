/* Sounds made in the page: the level tone and the rehearsal's pairs. Nothing is fetched. */
const RATE = 44100;

function makeBuffer(context, seconds, channels, sample) {
  const buffer = context.createBuffer(channels, Math.round(seconds * RATE), RATE);
  for (let channel = 0; channel < channels; channel += 1) {
    const data = buffer.getChannelData(channel);
    for (let i = 0; i < data.length; i += 1) data[i] = sample(i / RATE, channel);
  }
  return buffer;
}

const edge = (t, seconds, ramp) => Math.min(1, t / ramp, Math.max(0, (seconds - t) / ramp));

/* A soft chord that swells and rests, to set a comfortable volume by. */
const levelTone = (context) => makeBuffer(context, 4, 1, (t) => (
  0.06 * edge(t, 4, 0.3) * (0.75 + 0.25 * Math.sin(Math.PI * t)) * [262, 330, 392].reduce((sum, hz) => sum + Math.sin(2 * Math.PI * hz * t), 0)
));

/* The rehearsal: one tune twice, once spoiled so that nobody can doubt which is better. */
const TUNE = [262, 330, 392, 523, 440, 392, 330, 294, 262, 330];
const note = (hz, t) => Math.exp(-3 * t) * Math.min(1, t / 0.01) * (Math.sin(2 * Math.PI * hz * t) + 0.3 * Math.sin(4 * Math.PI * hz * t));
const tune = (t, wrong) => note(TUNE[Math.floor(t / 0.5) % TUNE.length] * (wrong ? 1 + 0.09 * Math.sin(40 * Math.floor(t / 0.5)) : 1), t % 0.5);
const REHEARSAL = [
  { prompt: 'A calm tune on a music box', better: 'a', why: 'B is full of noise', spoil: (t) => 0.25 * tune(t) + 0.12 * (Math.random() - 0.5) },
  { prompt: 'A clean, simple melody', better: 'b', why: 'A is out of tune and distorted', spoil: (t) => Math.max(-0.14, Math.min(0.14, 0.6 * tune(t, true))) },
];
function rehearse(context, { better, spoil }) {
  const good = makeBuffer(context, 5, 1, (t) => 0.25 * tune(t));
  const bad = makeBuffer(context, 5, 1, spoil);
  return better === 'a' ? { a: good, b: bad } : { a: bad, b: good };
}
