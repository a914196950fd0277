/**
 * The stage: two pictures of the same frame, one over the other, and the divider between them.
 * Knows no stream: it is given pairs.
 */

const STEP = 2; // per cent that an arrow key moves the divider
const LEAP = 10;

export class Comparison {
  /** @param {Document} page */
  constructor(page) {
    const find = (/** @type {string} */ id) => /** @type {HTMLElement} */ (page.getElementById(id));
    this.frame = find("frame");
    this.stage = find("stage");
    this.divider = find("divider");
    this.original = /** @type {HTMLCanvasElement} */ (find("original"));
    this.restored = /** @type {HTMLCanvasElement} */ (find("restored"));
    this.sizes = { original: find("original-size"), restored: find("restored-size") };
    this.split = 50;
    /** Number of the frame that is shown, -1 if none is. */
    this.id = -1;
    this.#listen();
  }

  /**
   * Show a frame's two pictures; both are closed.
   *
   * @param {number} id
   * @param {ImageBitmap | null} original
   * @param {ImageBitmap | VideoFrame} restored
   */
  show(id, original, restored) {
    draw(this.restored, restored);
    if (original) draw(this.original, original);
    original?.close();
    restored.close();
    this.id = id;
    const ratio = (this.restored.width / this.restored.height).toFixed(4);
    if (this.stage.dataset.ratio !== ratio) {
      this.stage.dataset.ratio = ratio;
      this.frame.style.setProperty("--ratio", ratio);
    }
    this.stage.dataset.phase = "shown";
    tell(this.sizes.original, `${this.original.width}×${this.original.height}`);
    tell(this.sizes.restored, `${this.restored.width}×${this.restored.height}`);
  }

  /** @param {"idle" | "starting"} phase */
  clear(phase) {
    this.id = -1;
    this.stage.dataset.phase = phase;
  }

  /** @param {number} percent of the width that shows the original */
  move(percent) {
    this.split = Math.min(100, Math.max(0, percent));
    const shown = Math.round(this.split);
    this.stage.style.setProperty("--split", `${this.split}%`);
    this.divider.setAttribute("aria-valuenow", String(shown));
    this.divider.setAttribute("aria-valuetext", `${shown} % original, ${100 - shown} % restored`);
  }

  /**
   * Return both pictures beside each other, the original enlarged to the size of the other.
   *
   * @returns {Promise<Blob>} PNG
   */
  async snapshot() {
    const { width, height } = this.restored;
    const both = new OffscreenCanvas(2 * width, height);
    const context = /** @type {OffscreenCanvasRenderingContext2D} */ (both.getContext("2d"));
    context.imageSmoothingQuality = "high";
    context.drawImage(this.original, 0, 0, width, height);
    context.drawImage(this.restored, width, 0);
    return both.convertToBlob({ type: "image/png" });
  }

  #listen() {
    const { stage, divider } = this;
    const follow = (/** @type {PointerEvent} */ event) => {
      const place = stage.getBoundingClientRect();
      this.move((100 * (event.clientX - place.left)) / place.width);
    };
    stage.addEventListener("pointerdown", (event) => {
      if (stage.dataset.phase !== "shown" || event.button !== 0) return;
      stage.setPointerCapture(event.pointerId);
      follow(event);
      divider.focus({ preventScroll: true });
      event.preventDefault();
    });
    stage.addEventListener("pointermove", (event) => {
      if (stage.hasPointerCapture(event.pointerId)) follow(event);
    });
    divider.addEventListener("keydown", (event) => {
      const by = event.shiftKey ? LEAP : STEP;
      /** @type {Record<string, number>} */
      const places = {
        ArrowLeft: this.split - by,
        ArrowDown: this.split - by,
        ArrowRight: this.split + by,
        ArrowUp: this.split + by,
        PageDown: this.split - LEAP,
        PageUp: this.split + LEAP,
        Home: 0,
        End: 100,
      };
      if (!(event.key in places)) return;
      this.move(places[event.key]);
      event.preventDefault();
    });
  }
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {ImageBitmap | VideoFrame} picture
 */
function draw(canvas, picture) {
  const [width, height] =
    picture instanceof ImageBitmap ? [picture.width, picture.height] : [picture.displayWidth, picture.displayHeight];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d")).drawImage(picture, 0, 0, width, height);
}

/**
 * @param {HTMLElement} element
 * @param {string} words
 */
function tell(element, words) {
  if (element.textContent !== words) element.textContent = words;
}
