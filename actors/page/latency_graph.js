/**
 * The graph of the last half minute, or of what there is of it: a point for each answer, in the colour of its level, and what happened between.
 * Knows no stream: it is given points.
 */

const SHORTEST_MS = 10_000;
const LONGEST_MS = 30_000;
const MOST_POINTS = 4000;
const LEFT = 52; // pixels for the words of the scale
const BOTTOM = 20;
const TOP = 8;
const STEPS_MS = [5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000];

/** @typedef {{at: number, kind: "frame" | "drop" | "handover", ms?: number, level?: number}} Point */

export class LatencyGraph {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    /** @type {Point[]} */
    this.points = [];
    this.budgetMs = 0;
    this.top = 0;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** @param {Point} point */
  add(point) {
    this.points.push(point);
    if (this.points.length > MOST_POINTS) this.points.splice(0, MOST_POINTS / 4);
  }

  /** @param {number} budgetMs 0: none */
  clear(budgetMs) {
    this.points = [];
    this.budgetMs = budgetMs;
    this.top = 0;
    this.draw();
  }

  /** @param {number} now in the unit of the points */
  draw(now = this.points.at(-1)?.at ?? 0) {
    const { canvas } = this;
    const scale = devicePixelRatio;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    }
    const style = getComputedStyle(canvas);
    const colour = (/** @type {string} */ name) => style.getPropertyValue(name);
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = `12px ${style.fontFamily}`;

    const oldest = this.points[0]?.at ?? now - LONGEST_MS;
    const span = Math.min(LONGEST_MS, Math.max(SHORTEST_MS, now - oldest));
    const first = now - span;
    const seen = this.points.filter((point) => point.at >= first);
    this.#rescale(seen);
    const x = (/** @type {number} */ at) => LEFT + ((at - first) / span) * (width - LEFT - 4);
    const floor = height - BOTTOM;
    const y = (/** @type {number} */ ms) => floor - (Math.min(ms, this.top) / this.top) * (floor - TOP);

    context.fillStyle = colour("--soft");
    context.strokeStyle = colour("--rule");
    context.lineWidth = 1;
    context.textBaseline = "middle";
    for (const share of [0, 0.5, 1]) {
      const line = Math.round(y(share * this.top)) + 0.5;
      context.beginPath();
      context.moveTo(LEFT, line);
      context.lineTo(width, line);
      context.stroke();
      context.textAlign = "right";
      context.fillText(inWords(share * this.top), LEFT - 8, line);
    }
    context.textBaseline = "alphabetic";
    context.textAlign = "right";
    context.fillText("now", width, height - 4);
    const apart = span > 20_000 ? 10 : 5; // seconds between two words
    for (let ago = apart; 1000 * ago <= span; ago += apart) {
      const place = x(now - 1000 * ago);
      context.textAlign = place < LEFT + 24 ? "left" : "center";
      context.fillText(`${ago} s ago`, place, height - 4);
    }

    if (this.budgetMs && this.budgetMs <= this.top) {
      context.strokeStyle = colour("--warn");
      context.setLineDash([5, 4]);
      context.beginPath();
      context.moveTo(LEFT, y(this.budgetMs));
      context.lineTo(width, y(this.budgetMs));
      context.stroke();
      context.setLineDash([]);
    }
    this.#marks(context, seen, x, y, floor, colour);
  }

  /** @param {Point[]} seen */
  #rescale(seen) {
    const values = seen.map((point) => point.ms ?? 0).sort((a, b) => a - b);
    const high = Math.max(values[Math.floor(0.98 * (values.length - 1))] ?? 0, this.budgetMs);
    const wanted = STEPS_MS.find((step) => step >= 1.1 * high) ?? STEPS_MS[STEPS_MS.length - 1];
    // Up at once, down only with room to spare: a scale that jumps about is worse than a low line.
    if (wanted > this.top || 2.2 * high < this.top || !this.top) this.top = high ? wanted : 100;
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Point[]} seen
   * @param {(at: number) => number} x
   * @param {(ms: number) => number} y
   * @param {number} floor
   * @param {(name: string) => string} colour
   */
  #marks(context, seen, x, y, floor, colour) {
    const frames = seen.filter((point) => point.kind === "frame");
    context.strokeStyle = colour("--rule");
    context.lineWidth = 1.5;
    context.beginPath();
    frames.forEach((point, n) => {
      const apart = n === 0 || point.at - frames[n - 1].at > 3000;
      context[apart ? "moveTo" : "lineTo"](x(point.at), y(point.ms ?? 0));
    });
    context.stroke();
    for (const level of [0, 1, 2, 4]) {
      context.fillStyle = colour(`--l${level}`);
      for (const point of frames) {
        if (point.level !== level) continue;
        context.beginPath();
        context.arc(x(point.at), y(point.ms ?? 0), 2, 0, 7);
        context.fill();
      }
    }
    context.fillStyle = colour("--drop");
    for (const point of seen) if (point.kind === "drop") context.fillRect(x(point.at) - 0.75, floor - 9, 1.5, 9);
    for (const point of seen) {
      if (point.kind !== "handover") continue;
      context.fillStyle = colour("--soft");
      context.fillRect(x(point.at) - 0.5, TOP, 1, floor - TOP);
      context.textAlign = x(point.at) > LEFT + 90 ? "right" : "left";
      context.fillText("handed over", x(point.at) + (context.textAlign === "right" ? -5 : 5), TOP + 10);
    }
  }
}

/** @param {number} ms */
function inWords(ms) {
  return ms >= 1000 ? `${ms / 1000} s` : `${ms} ms`;
}
