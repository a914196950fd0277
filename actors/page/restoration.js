/**
 * One run: pictures of a source go to the service, and come back in pairs with their restoration onto the stage.
 * Both sides of a pair are the same frame: what was sent is kept under its id until its answer is shown.
 */

import { Flag, UpriverStream } from "./client.js";
import { openDecoder, openEncoder } from "./codecs.js";

const MOST_ENCODING = 2;
const SMALLEST_SIDE = 16;
const CLOSE_PATIENCE_MS = 3000;

/**
 * @typedef {object} Settings
 * @property {URL} service
 * @property {string} apiKey
 * @property {string} token
 * @property {string} model empty: the service's default
 * @property {number} side shorter side of what is sent; 0: as the source
 * @property {2 | 3 | 4} scale
 * @property {number} fps at most; 0: as the source
 * @property {import("./client.js").Hello["policy"]} policy
 * @property {number} budgetMs 0: none
 * @property {import("./codecs.js").PageCodec} codec
 * @property {number} quality
 */

/** @typedef {{pts: number, cut: boolean, original: Promise<ImageBitmap>}} Taken */

export class Restoration {
  /**
   * @param {import("./sources.js").Source} source
   * @param {Settings} settings
   * @param {import("./comparison.js").Comparison} comparison
   * @param {import("./figures.js").Figures} figures
   */
  constructor(source, settings, comparison, figures) {
    this.source = source;
    this.settings = settings;
    this.comparison = comparison;
    this.figures = figures;
    /** @type {UpriverStream | null} */
    this.stream = null;
    this.size = inputSize(source.size, settings.side, Infinity);
    this.isHeld = settings.policy?.kind === "lossless" && !source.isLive;
    this.canvas = new OffscreenCanvas(this.size.width, this.size.height);
    /** @type {Map<number, Promise<ImageBitmap>>} */
    this.originals = new Map();
    this.takenAt = -Infinity;
    this.lastTime = -Infinity;
    this.ending = false;
    this.abort = new AbortController();
    this.encoder = openEncoder(settings.codec, settings.quality, {
      done: (payload, about, key) => this.#send(payload, about, key),
      lost: (/** @type {Taken} */ about) => void closeLater(about.original),
      failed: (error) => this.#fail(error),
    });
    this.decoder = openDecoder(settings.codec, {
      done: (picture, /** @type {number} */ id) => this.#show(picture, id),
      lost: () => this.stream?.reset(), // the next answer can be decoded alone
    });
  }

  /**
   * Run until the source ends, `stop` is called, or the stream fails.
   *
   * @param {(event: CustomEvent) => void} onState
   * @throws {import("./client.js").Refusal}
   */
  async run(onState) {
    const { settings, source, figures } = this;
    try {
      const stream = await UpriverStream.open(settings.service, this.#hello(), {
        apiKey: settings.apiKey,
        token: settings.token,
        onState,
        signal: this.abort.signal,
      });
      this.stream = stream;
      if (this.ending) void this.stop();
      stream.addEventListener("handover", () => figures.countHandOver());
      stream.addEventListener("restart", () => figures.countRestart());
      stream.addEventListener("credit", () => this.#release());
      source.onend = () => void this.stop();
      source.watch((time) => this.#take(time));
      for await (const answer of stream) {
        figures.count(answer);
        if (answer.dropped !== null) this.#forget(answer.id);
        else await this.decoder.decode(answer.payload, answer.id, (answer.header.flags & Flag.KEY) !== 0);
      }
      if (this.error) throw this.error;
    } catch (error) {
      if (!this.abort.signal.aborted || this.error) throw this.error ?? error;
    } finally {
      this.#free();
    }
  }

  /** Send nothing more, wait a moment for what is under way, and end. */
  async stop() {
    this.ending = true;
    this.source.close();
    if (!this.stream) {
      this.abort.abort();
      return;
    }
    const timer = setTimeout(() => this.abort.abort(), CLOSE_PATIENCE_MS);
    await this.stream.close();
    clearTimeout(timer);
  }

  #hello() {
    const { settings, size } = this;
    return {
      ...size,
      fps: settings.fps || undefined,
      model: settings.model || undefined,
      scale: settings.scale,
      codec_in: settings.codec,
      codec_out: settings.codec,
      quality: settings.quality,
      policy: settings.policy,
      latency_ms: settings.budgetMs || undefined,
    };
  }

  // From the source to the service

  /** @param {number} time of the picture in its video, in milliseconds */
  #take(time) {
    if (this.ending || !this.stream) return;
    const now = performance.now();
    const { fps, side } = this.settings;
    if (fps && now - this.takenAt < 1000 / fps - 5) return; // 5 ms: pictures of a screen's rate come unevenly
    if (!this.#room()) {
      if (!this.isHeld) this.figures.countSkipped();
      else this.owed = time; // shown before the source stood still: taken when there is room
      if (this.isHeld) this.source.hold();
      return;
    }
    const cut = time < this.lastTime - 1;
    [this.takenAt, this.lastTime] = [now, time];
    const size = inputSize(this.source.size, side, this.size.width * this.size.height);
    const { canvas } = this;
    if (canvas.width !== size.width || canvas.height !== size.height) Object.assign(canvas, size);
    const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }));
    context.imageSmoothingQuality = "high";
    try {
      context.drawImage(this.source.video, 0, 0, size.width, size.height);
      const about = { pts: Math.round(1000 * time), cut, original: createImageBitmap(canvas) };
      this.encoder.encode(canvas, about, cut);
    } catch (error) {
      this.#fail(/** @type {Error} */ (error));
      return;
    }
    this.figures.countSent();
    if (this.isHeld && !this.#room()) this.source.hold();
  }

  #room() {
    return this.encoder.pending < MOST_ENCODING && (this.stream?.credit ?? 0) > this.encoder.pending;
  }

  #release() {
    if (!this.isHeld || this.ending || !this.#room()) return;
    const { owed } = this;
    this.owed = null;
    if (owed !== null) this.#take(owed);
    if (this.#room()) this.source.release();
  }

  /**
   * @param {Uint8Array<ArrayBuffer>} payload
   * @param {Taken} about
   * @param {boolean} key
   */
  async #send(payload, about, key) {
    try {
      const id = await /** @type {UpriverStream} */ (this.stream).send(payload, { pts: about.pts, cut: about.cut, key });
      this.originals.set(id, about.original);
      this.#release();
    } catch (error) {
      void closeLater(about.original);
      if (!this.ending && this.stream?.state === "open") this.#fail(/** @type {Error} */ (error)); // a picture too large
    }
  }

  // From the service to the stage

  /**
   * @param {ImageBitmap | VideoFrame} picture
   * @param {number} id
   */
  async #show(picture, id) {
    const original = (await this.originals.get(id)?.catch(() => null)) ?? null;
    this.originals.delete(id);
    for (const older of this.originals.keys()) if (older < id) this.#forget(older);
    if (this.freed || id < this.comparison.id) {
      original?.close();
      picture.close();
      return;
    }
    this.comparison.show(id, original, picture);
  }

  /** @param {number} id */
  #forget(id) {
    void closeLater(this.originals.get(id));
    this.originals.delete(id);
  }

  /** @type {Error | undefined} */
  error;
  freed = false;
  /** @type {number | null} */
  owed = null;

  /** @param {Error} error */
  #fail(error) {
    this.error ??= error;
    this.ending = true;
    this.abort.abort();
  }

  #free() {
    this.ending = this.freed = true;
    this.source.close();
    this.stream?.abort();
    this.encoder.close();
    this.decoder.close();
    for (const id of this.originals.keys()) this.#forget(id);
  }
}

/**
 * Return the size in which a source's pictures are sent: even, of the same shape, and never enlarged.
 *
 * @param {{width: number, height: number}} source
 * @param {number} side wanted for the shorter one; 0: as it is
 * @param {number} mostPixels
 */
export function inputSize({ width, height }, side, mostPixels) {
  const wanted = side ? Math.min(1, side / Math.min(width, height)) : 1;
  const factor = Math.min(wanted, Math.sqrt(mostPixels / (width * height)));
  const even = (/** @type {number} */ length) => Math.max(SMALLEST_SIDE, 2 * Math.floor((length * factor) / 2 + 0.25));
  return { width: even(width), height: even(height) };
}

/** @param {Promise<ImageBitmap> | undefined} picture */
async function closeLater(picture) {
  (await picture?.catch(() => null))?.close();
}
