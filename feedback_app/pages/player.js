/* Two clips, one playhead. Both are decoded once and started together on one AudioContext clock; switching sides is an
   equal-power fade of 12 ms (cos and sin of one phase) at the same sample: no seek, no gap, no dip in power. */
const FADE_S = 0.012;
const LOOP_S = 3;
const MIN_LOOP_S = 0.2;
const MIN_MARK_S = 0.1;

class Player {
  constructor(onChange) {
    this.onChange = onChange;
    this.context = null;
    this.reset();
  }

  reset() {
    this.stop();
    Object.assign(this, {
      buffers: null, levels: { a: 1, b: 1 }, nodes: null, side: 'a', playing: false, position: 0, duration: 0, loop: null,
      heardMs: { a: 0, b: 0 }, spans: { a: [], b: [] }, events: [], marks: [], marking: null, shownAt: performance.now(),
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
    this.take({ a, b }, gainsDb);
  }

  take(buffers, gainsDb) {
    for (const side of ['a', 'b']) this.levels[side] = 10 ** (gainsDb[side] / 20);
    this.buffers = buffers;
    this.duration = Math.max(buffers.a.duration, buffers.b.duration);
    this.shownAt = performance.now();
    this.onChange();
  }

  now() {
    if (!this.playing || !this.nodes) return this.position;
    const passed = Math.max(0, this.context.currentTime - this.startedAt);
    const at = this.position + passed;
    if (!this.loop) return Math.min(at, this.duration);
    const [from, to] = this.loop;
    return at < to ? at : from + ((at - from) % (to - from));
  }

  async play() {
    if (!this.buffers || this.playing) return;
    this.playing = true;
    this.onChange();
    if (this.audio().state !== 'running') await this.context.resume();
    if (this.playing && this.buffers && !this.nodes) this.begin();
  }

  /* Source -> level (loudness match) -> fade (cos or sin of the phase) -> out, twice; both sources start at one instant. */
  begin() {
    const context = this.context;
    const at = context.currentTime + 0.02;
    this.playing = true;
    if (this.position >= this.duration - 0.02) this.position = this.loop ? this.loop[0] : 0;
    const out = context.createGain();
    out.gain.setValueAtTime(0, context.currentTime);
    out.gain.setValueAtTime(0, at);
    out.gain.linearRampToValueAtTime(1, at + FADE_S);
    out.connect(context.destination);
    const nodes = { out, source: {}, fade: {} };
    for (const side of ['a', 'b']) {
      const [source, level, fade] = [context.createBufferSource(), context.createGain(), context.createGain()];
      source.buffer = this.buffers[side];
      level.gain.value = this.levels[side];
      fade.gain.value = side === this.side ? 1 : 0;
      source.connect(level).connect(fade).connect(out);
      if (this.loop) [source.loop, source.loopStart, source.loopEnd] = [true, ...this.loop];
      source.start(at, this.position);
      [nodes.source[side], nodes.fade[side]] = [source, fade];
    }
    const phase = this.side === 'a' ? 0 : Math.PI / 2;
    Object.assign(this, { nodes, startedAt: at, tickedAt: at, tickedHere: this.position, turn: { at, seconds: 0, from: phase, to: phase } });
    this.log('play');
    this.onChange();
  }

  stop() {
    if (!this.playing) return;
    this.tick();
    if (!this.playing) return; // the tick met the end
    this.halt(this.now());
  }

  halt(position) {
    this.endMark();
    this.position = position;
    this.playing = false;
    if (this.nodes) {
      const at = this.context.currentTime;
      const { out, source } = this.nodes;
      out.gain.cancelScheduledValues(at);
      out.gain.setValueAtTime(out.gain.value, at);
      out.gain.linearRampToValueAtTime(0, at + FADE_S);
      for (const side of ['a', 'b']) source[side].stop(at + FADE_S);
    }
    this.nodes = null;
    this.log('pause');
    this.onChange();
  }

  /* Books the time since the last tick to the side that sounded, by the audio clock and not by the wall. */
  tick() {
    if (!this.playing || !this.nodes) return;
    let passed = this.context.currentTime - this.tickedAt;
    if (passed <= 0) return;
    this.tickedAt = this.context.currentTime;
    const end = this.loop ? this.loop[1] : this.duration;
    for (;;) { // round the loop as often as it went: a hidden tab ticks rarely
      const to = Math.min(end, this.tickedHere + passed);
      this.book(this.tickedHere, to);
      passed -= to - this.tickedHere;
      this.tickedHere = to;
      if (passed <= 1e-6) break;
      if (!this.loop) return this.halt(0);
      this.endMark(end);
      this.tickedHere = this.loop[0];
    }
  }

  book(from, to) {
    const end = Math.min(to, this.buffers[this.side].duration);
    if (end <= from) return;
    this.heardMs[this.side] += (end - from) * 1000;
    const spans = this.spans[this.side];
    const last = spans[spans.length - 1];
    if (last && Math.abs(last[1] - from) < 1e-3) last[1] = end;
    else spans.push([from, end]);
  }

  /* Share of a side that was heard at least once, 0 to 1. */
  coverage(side) {
    let [heard, upTo] = [0, 0];
    for (const [from, to] of [...this.spans[side]].sort((x, y) => x[0] - y[0])) {
      heard += Math.max(0, to - Math.max(from, upTo));
      upTo = Math.max(upTo, to);
    }
    return Math.min(1, heard / this.buffers[side].duration);
  }

  switchTo(side) {
    if (side === this.side) return;
    this.tick();
    this.endMark();
    this.side = side;
    if (this.nodes) this.fadeTo(side === 'a' ? 0 : Math.PI / 2);
    this.log('switch');
    this.onChange();
  }

  fadeTo(to) {
    const at = this.context.currentTime;
    const { turn } = this;
    const share = turn.seconds ? Math.min(1, Math.max(0, (at - turn.at) / turn.seconds)) : 1;
    const from = turn.from + (turn.to - turn.from) * share; // a turn in the midst of a turn goes on from where it is
    const seconds = Math.max(0.001, (FADE_S * Math.abs(to - from)) / (Math.PI / 2));
    const phases = Float32Array.from({ length: 33 }, (_, i) => from + ((to - from) * i) / 32);
    for (const [side, curve] of [['a', Math.cos], ['b', Math.sin]]) {
      const { gain } = this.nodes.fade[side];
      gain.cancelScheduledValues(Math.max(0, at - 2 * FADE_S));
      gain.setValueCurveAtTime(phases.map((phase) => Math.max(0, curve(phase))), at, seconds);
    }
    this.turn = { at, seconds, from, to };
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

  /* The region [from, to) over and over; too short a region ends the loop. Who stood outside of it goes to its begin. */
  async loopOver(from, to) {
    const resume = this.playing;
    const here = this.now();
    this.stop();
    const [begin, end] = [Math.max(0, from), Math.min(this.duration, to)];
    this.loop = end - begin >= MIN_LOOP_S ? [begin, end] : null;
    this.position = this.loop && (here < begin || here >= end) ? begin : here;
    this.log(this.loop ? 'loop' : 'unloop');
    if (resume) await this.play();
    this.onChange();
  }

  async toggleLoop() {
    if (!this.buffers) return;
    const from = Math.max(0, Math.min(this.now() - LOOP_S / 2, this.duration - LOOP_S));
    await (this.loop ? this.loopOver(0, 0) : this.loopOver(from, from + LOOP_S));
  }

  /* The playhead becomes the region's begin ('in') or its end ('out'), as in a cutting room. */
  async loopEdge(edge) {
    if (!this.buffers) return;
    const here = this.now();
    const [from, to] = this.loop || [0, this.duration];
    await (edge === 'in' ? this.loopOver(here, to > here ? to : this.duration) : this.loopOver(from < here ? from : 0, here));
  }

  /* ---- "bad here": a mark begins and ends on the side that sounds; a switch, a pause or the loop's turn ends it too */
  toggleMark() {
    this.tick();
    if (this.marking) this.endMark();
    else if (this.playing && this.nodes) this.marking = { side: this.side, from: this.now() };
    else return false;
    this.onChange();
    return true;
  }

  endMark(end = this.now()) {
    const open = this.marking;
    this.marking = null;
    if (open) this.addMark(open.side, open.from, Math.max(end, open.from + MIN_MARK_S));
  }

  addMark(side, from, to) {
    const end = this.buffers[side].duration;
    const mark = { side, t0_ms: Math.round(Math.max(0, from) * 1000), t1_ms: Math.floor(Math.min(to, end) * 1000), tag: 'bad' };
    if (mark.t1_ms <= mark.t0_ms || this.marks.length >= 100) return;
    this.marks.push(mark);
    this.log('mark');
    this.onChange();
  }

  log(what) {
    if (this.events.length < 500) {
      const since = Math.round(performance.now() - this.shownAt);
      this.events.push([since, what, this.side, Math.round(this.now() * 1000)]);
    }
  }
}
