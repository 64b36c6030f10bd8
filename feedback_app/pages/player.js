/* Two clips, one playhead. Both are decoded once and started together on one AudioContext clock; each has a gain that
   carries its loudness match or silence. Switching sides is a 12 ms crossfade at the same sample: no seek, no gap. */
const FADE_S = 0.012;
const LOOP_S = 3;

class Player {
  constructor(onChange) {
    this.onChange = onChange;
    this.context = null;
    this.reset();
  }

  reset() {
    this.stop();
    Object.assign(this, {
      buffers: null, gains: { a: 1, b: 1 }, nodes: {}, side: 'a', playing: false, startedAt: 0, position: 0,
      duration: 0, loop: null, heardMs: { a: 0, b: 0 }, spans: { a: [], b: [] }, events: [], shownAt: performance.now(),
    });
  }

  audio() {
    this.context ||= new (window.AudioContext || window.webkitAudioContext)({ latencyHint: 'interactive' });
    return this.context;
  }

  async load(urls, gainsDb, fetchAudio) {
    this.reset();
    const bytes = await Promise.all([fetchAudio(urls.a), fetchAudio(urls.b)]);
    const [a, b] = await Promise.all(bytes.map((data) => this.audio().decodeAudioData(data)));
    for (const side of ['a', 'b']) this.gains[side] = 10 ** (gainsDb[side] / 20);
    this.buffers = { a, b };
    this.duration = Math.max(a.duration, b.duration);
    this.shownAt = performance.now();
    this.onChange();
  }

  now() {
    if (!this.playing) return this.position;
    const at = Math.max(this.position, this.context.currentTime - this.startedAt);
    if (!this.loop) return Math.min(at, this.duration);
    const [from, to] = this.loop;
    return at < to ? at : from + ((at - from) % (to - from));
  }

  async play() {
    if (!this.buffers || this.playing) return;
    const context = this.audio();
    this.playing = true;
    this.onChange();
    if (context.state !== 'running') await context.resume();
    if (!this.playing || !this.buffers) return;
    if (this.position >= this.duration - 0.02) this.position = this.loop ? this.loop[0] : 0;
    const at = context.currentTime + 0.02;
    for (const side of ['a', 'b']) {
      const source = context.createBufferSource();
      const gain = context.createGain();
      source.buffer = this.buffers[side];
      gain.gain.setValueAtTime(0, context.currentTime);
      gain.gain.setValueAtTime(0, at);
      gain.gain.linearRampToValueAtTime(side === this.side ? this.gains[side] : 0, at + FADE_S);
      source.connect(gain).connect(context.destination);
      if (this.loop) [source.loop, source.loopStart, source.loopEnd] = [true, ...this.loop];
      source.start(at, this.position);
      this.nodes[side] = { source, gain };
    }
    this.startedAt = at - this.position;
    this.tickedAt = at;
    this.log('play');
    this.onChange();
  }

  stop() {
    if (!this.playing) return;
    this.tick();
    this.position = this.now();
    this.playing = false;
    const at = this.context.currentTime;
    for (const { source, gain } of Object.values(this.nodes)) {
      gain.gain.cancelScheduledValues(at);
      gain.gain.setValueAtTime(gain.gain.value, at);
      gain.gain.linearRampToValueAtTime(0, at + FADE_S);
      source.stop(at + FADE_S);
    }
    this.nodes = {};
    this.log('pause');
    this.onChange();
  }

  /* Books the time since the last tick to the side that sounded, by the audio clock and not by the wall. */
  tick() {
    if (!this.playing || !this.nodes.a) return;
    const passed = this.context.currentTime - this.tickedAt;
    if (passed <= 0) return;
    this.tickedAt = this.context.currentTime;
    const here = this.now();
    this.heardMs[this.side] += passed * 1000;
    const spans = this.spans[this.side];
    const last = spans[spans.length - 1];
    const from = Math.max(0, here - passed);
    if (last && Math.abs(last[1] - from) < 0.06) last[1] = here;
    else spans.push([from, here]);
    if (!this.loop && here >= this.duration - 0.005) {
      this.stop();
      this.position = 0;
      this.onChange();
    }
  }

  switchTo(side) {
    if (side === this.side) return;
    this.tick();
    this.side = side;
    for (const [name, { gain }] of Object.entries(this.nodes)) {
      const at = this.context.currentTime;
      gain.gain.cancelScheduledValues(at);
      gain.gain.setValueAtTime(gain.gain.value, at);
      gain.gain.linearRampToValueAtTime(name === side ? this.gains[name] : 0, at + FADE_S);
    }
    this.log('switch');
    this.onChange();
  }

  async seek(position) {
    const resume = this.playing;
    this.stop();
    this.position = Math.min(Math.max(position, 0), Math.max(0, this.duration - 0.05));
    if (this.loop && (this.position < this.loop[0] || this.position >= this.loop[1])) this.loop = null;
    this.log('seek');
    if (resume) await this.play();
    this.onChange();
  }

  async toggleLoop() {
    const resume = this.playing;
    const here = this.now();
    this.stop();
    const from = Math.max(0, Math.min(here - LOOP_S / 2, this.duration - LOOP_S));
    this.loop = this.loop ? null : [from, Math.min(this.duration, from + LOOP_S)];
    this.position = here;
    this.log(this.loop ? 'loop' : 'unloop');
    if (resume) await this.play();
    this.onChange();
  }

  log(what) {
    if (this.events.length < 500) {
      const since = Math.round(performance.now() - this.shownAt);
      this.events.push([since, what, this.side, Math.round(this.now() * 1000)]);
    }
  }
}
