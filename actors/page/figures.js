/**
 * What the page counts of a stream, and the cards that show it. Updated a few times a second, whatever the frame rate.
 */

const WINDOW_MS = 5000; // rates and medians are those of the last five seconds
const STATIONS = /** @type {const} */ (["network", "decode", "queue", "step", "encode"]);
const LEVELS = /** @type {Record<number, string>} */ ({ 4: "4 steps", 2: "2 steps", 1: "1 step", 0: "resized" });
const LEVEL_NOTES = /** @type {Record<number, string>} */ ({
  4: "full quality",
  2: "reduced, to be in time",
  1: "reduced, to be in time",
  0: "not restored, to be in time",
});
const REASONS = /** @type {Record<string, string>} */ ({
  newer: "overtaken",
  late: "too late",
  rate: "over the rate",
  undecodable: "damaged",
  repeated: "repeated",
  out_of_order: "out of order",
});

/** @typedef {import("./client.js").Answer} Answer */

export class Figures {
  /**
   * @param {Document} page
   * @param {import("./latency_graph.js").LatencyGraph} graph
   */
  constructor(page, graph) {
    this.page = page;
    this.graph = graph;
    this.reset(0);
  }

  /** @param {number} budgetMs 0: none */
  reset(budgetMs) {
    /** @type {{at: number, ms: number, level: number, stations: number[]}[]} */
    this.recent = [];
    /** @type {number[]} */
    this.sent = [];
    /** @type {Map<string, number>} */
    this.dropped = new Map();
    this.restored = 0;
    this.skipped = 0;
    this.handOvers = 0;
    this.restarts = 0;
    this.waiting = 0;
    this.level = -1;
    this.graph.clear(budgetMs);
  }

  /** A picture of the source was sent. */
  countSent() {
    this.sent.push(performance.now());
  }

  /** A picture of the source was left out, because as many as may be were under way. */
  countSkipped() {
    this.skipped += 1;
  }

  /** @param {Answer} answer */
  count(answer) {
    const at = performance.now();
    if (answer.dropped !== null) {
      this.dropped.set(answer.dropped, (this.dropped.get(answer.dropped) ?? 0) + 1);
      this.graph.add({ at, kind: "drop" });
      return;
    }
    const { decodeUs, queueUs, stepUs, encodeUs, level } = answer.header;
    const ms = answer.latencyMs;
    const served = [decodeUs, queueUs, stepUs, encodeUs].map((us) => us / 1000);
    const network = Math.max(0, ms - served.reduce((sum, one) => sum + one));
    this.restored += 1;
    this.level = level;
    this.recent.push({ at, ms, level, stations: [network, ...served] });
    this.graph.add({ at, kind: "frame", ms, level });
  }

  countHandOver() {
    this.handOvers += 1;
    this.graph.add({ at: performance.now(), kind: "handover" });
  }

  countRestart() {
    this.restarts += 1;
    this.graph.add({ at: performance.now(), kind: "handover" });
  }

  /** Show what was counted. */
  show() {
    const now = performance.now();
    const since = now - WINDOW_MS;
    while (this.recent.length && this.recent[0].at < since) this.recent.shift();
    while (this.sent.length && this.sent[0] < since) this.sent.shift();
    const times = this.recent.map((one) => one.ms).sort((a, b) => a - b);
    const median = times[times.length >> 1];
    const span = Math.max(1000, Math.min(WINDOW_MS, now - (this.recent[0]?.at ?? now)));
    const rate = (1000 * this.recent.length) / span;

    this.#tell("level", this.level < 0 ? "–" : LEVELS[this.level] ?? `${this.level} steps`);
    this.#tell("level-note", LEVEL_NOTES[this.level] ?? "denoising steps a frame");
    this.#find("level-meter").dataset.level = String(this.level);
    this.#tell("latency", median === undefined ? "–" : duration(median));
    this.#tell("latency-note", median === undefined ? "from sending to answer" : `95 % within ${duration(quantile(times, 0.95))}`);
    this.#tell("rate", this.restored ? `${rate.toFixed(rate < 9.95 ? 1 : 0)} fps` : "–");
    const sent = (1000 * this.sent.length) / Math.max(1000, Math.min(WINDOW_MS, now - (this.sent[0] ?? now)));
    this.#tell("rate-note", this.restored ? `of ${sent.toFixed(sent < 9.95 ? 1 : 0)} sent · ${this.restored} in all` : "frames a second");
    let lost = 0;
    const reasons = [...this.dropped].map(([reason, count]) => ((lost += count), `${count} ${REASONS[reason] ?? reason}`));
    if (this.skipped) reasons.push(`${this.skipped} not sent`);
    this.#tell("dropped", this.restored + lost + this.skipped ? String(lost + this.skipped) : "–");
    this.#tell("dropped-note", reasons.join(", ") || "none");
    this.#tell("hand-overs", this.restored ? String(this.handOvers + this.restarts) : "–");
    this.#tell("hand-overs-note", this.restarts ? `${this.restarts} began anew` : "to another replica");
    this.#stations();
    this.graph.draw(now);
    this.#describe(median, rate, lost);
  }

  #stations() {
    const box = this.#find("stations");
    box.hidden = this.recent.length === 0;
    if (box.hidden) return;
    const means = STATIONS.map((_, n) => this.recent.reduce((sum, one) => sum + one.stations[n], 0) / this.recent.length);
    const words = ["network and browser", "decoding", "waiting", "model", "encoding"];
    const list = this.#find("station-words");
    STATIONS.forEach((name, n) => {
      /** @type {HTMLElement} */ (box.querySelector(`.split .s-${name}`)).style.flexGrow = String(means[n]);
      const item = list.children[n] ?? list.appendChild(Object.assign(this.page.createElement("li"), { className: `s-${name}` }));
      const text = `${words[n]} ${duration(means[n])}`;
      if (item.textContent !== text) item.textContent = text;
    });
  }

  /**
   * @param {number | undefined} median
   * @param {number} rate
   * @param {number} lost
   */
  #describe(median, rate, lost) {
    const words =
      median === undefined
        ? "No frames in the last seconds"
        : `Latency of the last half minute: now ${duration(median)} at ${rate.toFixed(0)} frames a second, ${lost} dropped`;
    this.#find("graph").setAttribute("aria-label", words);
  }

  /**
   * @param {string} id
   * @param {string} words
   */
  #tell(id, words) {
    const element = this.#find(id);
    if (element.textContent !== words) element.textContent = words;
  }

  /** @param {string} id */
  #find(id) {
    return /** @type {HTMLElement} */ (this.page.getElementById(id));
  }
}

/**
 * @param {number[]} sorted
 * @param {number} share
 */
function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** @param {number} ms */
function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms < 9950 ? 1 : 0)} s`;
  return ms < 9.95 ? `${ms.toFixed(1)} ms` : `${ms.toFixed(0)} ms`;
}
