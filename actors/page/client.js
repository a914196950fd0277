/**
 * JavaScript client of Upriver's live streams: frames in, restored frames out, over hand-overs and lost connections.
 * No dependencies, no build step; runs in pages, workers and Node 22.
 *
 *     const stream = await UpriverStream.open("wss://host", { width: 320, height: 180 }, { apiKey });
 *     await stream.send(jpeg);                       // Uint8Array; waits for credit
 *     for await (const answer of stream) { ... }     // in order; answer.payload is a picture, or answer.dropped says why not
 *
 * The stream keeps what it has sent until the service says that the state after it is durable. When its replica goes
 * away, it goes on with another one from there: nothing is lost, repeated or reordered. Where the state is lost as well,
 * it begins anew with the first frame that has no answer; that frame's answer has `Flag.RESET`.
 */

import { greet, parse, streamUrl } from "./connection.js";
import { KeptFrames } from "./kept_frames.js";
import {
  AdmissionRefused,
  DROP_REASONS,
  Flag,
  FrameTooLarge,
  HEADER_BYTES,
  Refusal,
  ServiceFailure,
  StateLost,
  VERSION,
  packFrame,
  refusalFrom,
  unpackFrame,
} from "./protocol.js";

export * from "./protocol.js";

const FIRST_PAUSE_MS = 50;
const LONGEST_PAUSE_MS = 2000;
const TELL_MS = 500; // an answer is acknowledged after so long if no frame carries it
const MOST_RESTARTS = 3; // without an answer between them: the frames themselves are what the service fails at
const STRAY = new Set([DROP_REASONS.indexOf("repeated"), DROP_REASONS.indexOf("out_of_order")]);

/**
 * What the stream is; docs/reference/protocol.md describes each field.
 *
 * @typedef {object} Hello
 * @property {number} width
 * @property {number} height
 * @property {number} [fps] frames per second; what the service reserves for the stream
 * @property {string} [model]
 * @property {2 | 3 | 4} [scale]
 * @property {number} [out_height]
 * @property {"jpeg" | "webp" | "png" | "raw" | "h264"} [codec_in]
 * @property {"jpeg" | "webp" | "png" | "raw" | "h264"} [codec_out]
 * @property {number} [quality] 1 to 100
 * @property {{kind: "lossless"} | {kind: "newest"} | {kind: "deadline", ms: number, late?: "drop" | "resize"}} [policy]
 * @property {number} [latency_ms]
 * @property {0 | 1 | 2 | 4} [least_steps]
 * @property {boolean} [adaptive]
 * @property {boolean} [cuts]
 * @property {number} [seed]
 */

/**
 * @typedef {object} Answer
 * @property {number} id
 * @property {number} pts
 * @property {string | null} dropped why there is no picture, one of `DROP_REASONS`; null if there is one
 * @property {Uint8Array<ArrayBuffer>} payload the restored picture in the stream's `codec_out`
 * @property {Required<import("./protocol.js").FrameHeader>} header
 * @property {number} latencyMs from the frame's sending to its answer's arrival
 * @property {number} connection on which it came
 */

/** @typedef {"connecting" | "waiting" | "open" | "resuming" | "closing" | "closed" | "failed"} StreamState */

/**
 * One stream. Iterate over it for the answers: taking one acknowledges it, so whoever stops reading is not sent more
 * than a window.
 *
 * Events: `state` (detail: `{state, refusal, retryMs}`), `handover`, `restart`, `stats`, `credit`.
 */
export class UpriverStream extends EventTarget {
  /** @type {StreamState} */
  state = "connecting";
  /** The service's last answer to a hello. @type {Record<string, any>} */
  welcome = {};
  /** The last answer to `askStats`. @type {Record<string, any> | null} */
  stats = null;
  /** How often the stream went on elsewhere, and how often it began anew because its state was lost. */
  handOvers = 0;
  restarts = 0;
  /** What the service counted, once the stream is closed. @type {{frames_in: number, frames_out: number} | null} */
  totals = null;

  #url;
  #hello;
  #giveUpMs;
  /** @type {WebSocket | null} */
  #socket = null;
  #kept;
  /** @type {Answer[]} */
  #answers = [];
  #nextId = 0;
  #sent = 0;
  #granted = 0;
  #received = 0; // all answers with a smaller id are here
  #connection = 0;
  #acknowledged = { below: 0, receipt: 0 };
  #told = 0; // answers of this connection that were taken since the last acknowledgement
  #wireSize = "";
  #size;
  #cut = false;
  #live = false; // welcomed on this connection
  #closing = false;
  #closeSent = false;
  #over = false;
  /** @type {Error | null} */
  #error = null;
  /** @type {Refusal | null} */
  #lastRefusal = null;
  #barren = 0; // connections in a row that brought no answer
  #barrenRestarts = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #tellTimer;
  /** @type {PromiseWithResolvers<void>} */
  #change = withResolvers();

  /**
   * Open a stream; resolves when the service has welcomed it.
   *
   * @param {string | URL} url of the service: ws, wss, http or https, with or without `/v1/streams`
   * @param {Hello} hello
   * @param {object} [options]
   * @param {string} [options.apiKey] travels in the hello, never in the address
   * @param {string} [options.token] a JSON web token, instead of a key
   * @param {number} [options.giveUpS] how long the service may be unreachable or full before the stream fails
   * @param {number} [options.keepBytes] of frames kept for a hand-over; beyond it the oldest answered ones are given up
   * @param {(event: CustomEvent) => void} [options.onState] gets the `state` events from the first one on
   * @param {AbortSignal} [options.signal] ends the stream at once
   * @returns {Promise<UpriverStream>}
   * @throws {Refusal} the service refused
   */
  static async open(url, hello, options = {}) {
    const stream = new UpriverStream(url, hello, options);
    if (options.onState) stream.addEventListener("state", /** @type {EventListener} */ (options.onState));
    options.signal?.addEventListener("abort", () => stream.abort(), { once: true });
    try {
      options.signal?.throwIfAborted();
      await stream.#open(false);
    } catch (error) {
      stream.#fail(/** @type {Error} */ (error));
      throw error;
    }
    return stream;
  }

  /**
   * Use `UpriverStream.open`.
   *
   * @param {string | URL} url
   * @param {Hello} hello
   * @param {{apiKey?: string, token?: string, giveUpS?: number, keepBytes?: number}} options
   */
  constructor(url, hello, options) {
    super();
    this.#url = streamUrl(url);
    const credentials = { api_key: options.apiKey || null, token: options.token || null };
    this.#hello = { type: "hello", protocol: VERSION, ...hello, credentials };
    this.#giveUpMs = 1000 * (options.giveUpS ?? 30);
    this.#kept = new KeptFrames(options.keepBytes ?? 256 * 1024 * 1024, hello.codec_in === "h264");
    this.#size = { width: hello.width, height: hello.height };
  }

  /** Frames that `send` would pass on now without waiting. */
  get credit() {
    return this.state === "open" ? Math.max(0, this.#granted - this.#sent - this.#kept.backlog) : 0;
  }

  /** Frames that were sent and have no answer yet. */
  get underWay() {
    return this.#kept.unanswered;
  }

  /**
   * Send a frame in the stream's codec; resolves to its id, when it is on its way or next in line. Waits while more than
   * a window is under way.
   *
   * @param {Uint8Array | ArrayBuffer} picture is kept, not copied: leave it as it is
   * @param {{pts?: number, cut?: boolean, key?: boolean}} [about] `cut`: a new scene begins with it; `key`: (h264) it
   *   can be decoded without those before it
   * @returns {Promise<number>}
   * @throws {Refusal} the stream has ended, or the picture is too large
   */
  async send(picture, about = {}) {
    const payload = picture instanceof Uint8Array ? picture : new Uint8Array(picture);
    const largest = this.welcome.max_message_bytes ?? Infinity;
    if (payload.length + HEADER_BYTES > largest) {
      throw new FrameTooLarge(`A frame's message has ${payload.length + HEADER_BYTES} bytes.`, {
        code: "frame-too-large",
        limit: `${largest} bytes`,
        remedy: "Compress it more, or open the stream with a larger size.",
      });
    }
    await this.#until(() => this.#over || this.#closing || this.#kept.backlog < this.welcome.granted);
    this.#requireOpen();
    const id = this.#nextId++;
    const flags = (about.cut || this.#cut ? Flag.CUT : 0) | (about.key ? Flag.KEY : 0);
    this.#cut = false;
    this.#kept.add(id, { payload, pts: about.pts ?? id, flags, ...this.#size, sentAt: 0, answered: null });
    this.#pump();
    return id;
  }

  /** The next frame is restored without memory of those before it: a cut. */
  reset() {
    this.#cut = true; // on the frame, not as a message of its own: so it survives a new connection
  }

  /**
   * Frames sent from now on have this size. Needed only for raw frames; other codecs say it themselves.
   *
   * @param {number} width
   * @param {number} height
   */
  resize(width, height) {
    this.#size = { width, height };
  }

  /** Ask for the session's figures; a `stats` event tells when they are in `stats`. */
  askStats() {
    this.#say({ type: "stats" });
  }

  /**
   * Say that no more frames come; the iteration ends after the last answer.
   *
   * @returns {Promise<void>} resolves when the service has closed the stream, or the stream has failed
   */
  async close() {
    this.#closing = true;
    this.#set("closing");
    this.#notify();
    this.#pump();
    await this.#until(() => this.#over);
  }

  /** End at once; what is under way is lost. */
  abort() {
    if (!this.#over) this.#finish("closed");
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  /**
   * Return the next answer, and acknowledge it.
   *
   * @returns {Promise<IteratorResult<Answer, undefined>>}
   * @throws {Refusal} the service refused
   */
  async next() {
    await this.#until(() => this.#answers.length > 0 || this.#over);
    const answer = this.#answers.shift();
    if (answer === undefined) {
      if (this.#error) throw this.#error;
      return { done: true, value: undefined };
    }
    if (answer.connection === this.#connection) this.#taken(answer.header);
    return { done: false, value: answer };
  }

  /** Ends a `for await` loop that is left early. */
  async return() {
    this.abort();
    return { done: true, value: undefined };
  }

  // Connections

  /** @param {boolean} resume */
  async #open(resume) {
    const deadline = Date.now() + this.#giveUpMs;
    let pauseMs = FIRST_PAUSE_MS;
    while (!this.#over) {
      let refusal;
      try {
        await this.#greet(resume);
        return;
      } catch (error) {
        if (error instanceof StateLost && resume) {
          this.#beginAnew(error);
          resume = false;
          continue;
        }
        const again = error instanceof ServiceFailure || (error instanceof AdmissionRefused && error.retryAfterS !== null);
        if (!again) throw error;
        refusal = error;
      }
      pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
      const waitMs = Math.max(jitter(pauseMs), 1000 * (refusal.retryAfterS ?? 0) * (1 + Math.random() / 4));
      if (Date.now() + waitMs > deadline) throw refusal;
      this.#set("waiting", { refusal, retryMs: waitMs });
      await this.#pause(waitMs);
    }
    throw ended();
  }

  /** @param {boolean} resume */
  async #greet(resume) {
    this.#set(resume || this.#connection ? "resuming" : "connecting");
    const hello = { ...this.#hello };
    if (resume) {
      const { session, resume_token: token } = this.welcome;
      Object.assign(hello, { resume: { session, token, received: this.#received } });
    }
    const { socket, welcome } = await greet(this.#url, hello, (socket) => (this.#socket = socket));
    if (this.#over) {
      socket.close(1000);
      throw ended();
    }
    if (resume && welcome.resume_at < this.#kept.givenUpBelow) {
      socket.close(1000);
      throw new StateLost(`Frame ${welcome.resume_at} is needed again and was given up for want of room.`, {
        code: "frames-given-up",
      });
    }
    this.welcome = welcome;
    this.#connection += 1;
    this.#sent = 0;
    this.#granted = welcome.granted;
    this.#acknowledged = { below: 0, receipt: 0 };
    this.#told = 0;
    this.#closeSent = false;
    this.#wireSize = sizeName(hello);
    this.#kept.unsentFrom = resume ? this.#kept.decodableFrom(welcome.resume_at) : (this.#kept.first ?? this.#nextId);
    socket.onmessage = (event) => this.#hear(event.data);
    socket.onclose = (event) => this.#lost(event.code);
    this.#live = true;
    this.#set(this.#closing ? "closing" : "open");
    this.#notify();
    this.#pump();
  }

  /** Go on elsewhere. */
  async #reconnect() {
    this.#live = false;
    clearTimeout(this.#tellTimer);
    if (this.#socket) {
      this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.close();
    }
    this.#set("resuming");
    const restarts = this.restarts;
    try {
      if (this.#barren++ > 0) await this.#pause(jitter(Math.min(FIRST_PAUSE_MS * 2 ** this.#barren, LONGEST_PAUSE_MS)));
      await this.#open(true);
    } catch (error) {
      this.#fail(/** @type {Error} */ (error));
      return;
    }
    if (this.#over || restarts !== this.restarts) return;
    this.handOvers += 1;
    this.dispatchEvent(new CustomEvent("handover"));
  }

  /** @param {number} code of the WebSocket's end, or 0 */
  #lost(code) {
    if (this.#over) return;
    if (code === 1009) {
      // Said by a proxy, which knows no refusals.
      this.#fail(new FrameTooLarge("A frame is larger than the connection carries.", {
        code: "frame-too-large",
        remedy: "Send smaller frames, or compress them more.",
      }));
      return;
    }
    void this.#reconnect();
  }

  /** @param {Refusal} refusal */
  #beginAnew(refusal) {
    if (++this.#barrenRestarts > MOST_RESTARTS) throw this.#lastRefusal ?? refusal;
    this.restarts += 1;
    this.#kept.beginAnew(this.#nextId);
    this.dispatchEvent(new CustomEvent("restart", { detail: { refusal } }));
  }

  // What the service says

  /** @param {string | ArrayBuffer} data */
  #hear(data) {
    if (this.#over) return;
    try {
      if (typeof data === "string") this.#hearText(parse(data));
      else this.#hearFrame(data);
    } catch (error) {
      this.#fail(/** @type {Error} */ (error));
    }
  }

  /** @param {Record<string, any>} message */
  #hearText(message) {
    switch (message.type) {
      case "granted":
        this.#granted = Math.max(this.#granted, message.frames);
        this.#notify();
        this.#pump();
        break;
      case "durable":
        this.#kept.durable(message.below);
        break;
      case "stats":
        this.stats = message;
        this.dispatchEvent(new CustomEvent("stats", { detail: message }));
        break;
      case "drain": // the state is saved by now; the service closes after it
        void this.#reconnect();
        break;
      case "closed":
        this.totals = { frames_in: message.frames_in, frames_out: message.frames_out };
        this.#finish("closed");
        break;
      case "refused": {
        const refusal = refusalFrom(message);
        // After these two the service closes, and the stream goes on elsewhere, or begins anew.
        if (!(refusal instanceof StateLost || refusal instanceof ServiceFailure)) throw refusal;
        this.#lastRefusal = refusal;
        break;
      }
      default: // a newer service may say more
    }
  }

  /** @param {ArrayBuffer} data */
  #hearFrame(data) {
    const { header, payload } = unpackFrame(data);
    const { id } = header;
    this.#granted = Math.max(this.#granted, header.granted);
    this.#barren = this.#barrenRestarts = 0;
    this.#kept.durable(header.acknowledged);
    const stray = STRAY.has(header.reason);
    if (id < this.#received && !stray) {
      this.#taken(header); // of a frame that was only sent again to give a decoder its beginning
      return;
    }
    const kept = this.#kept.get(id);
    if (!stray) {
      this.#received = id + 1;
      if (kept) kept.answered = header;
      if (header.reason && this.#hello.codec_in !== "h264") this.#kept.forget(id);
    }
    const latencyMs = kept ? performance.now() - kept.sentAt : 0;
    const dropped = header.flags & Flag.DROPPED ? DROP_REASONS[header.reason] ?? "unknown" : null;
    this.#answers.push({ id, pts: header.pts, dropped, payload, header, latencyMs, connection: this.#connection });
    this.#notify();
    this.#pump();
  }

  // What the service is told

  /** Send frames as credit allows, and what has to be said when there are none. */
  #pump() {
    const socket = this.#socket;
    if (!socket || !this.#live || this.#closeSent) return;
    while (this.#sent < this.#granted) {
      const next = this.#kept.takeUnsent();
      if (!next) break;
      this.#sendFrame(socket, ...next);
    }
    if (this.#told >= Math.max(1, Math.floor(this.welcome.granted / 2))) this.#tell();
    clearTimeout(this.#tellTimer);
    if (this.#told) this.#tellTimer = setTimeout(() => this.#tell(), TELL_MS);
    if (this.#closing && this.#kept.backlog === 0) {
      this.#closeSent = true;
      this.#say({ type: "close" });
    }
  }

  /**
   * @param {WebSocket} socket
   * @param {number} id
   * @param {import("./kept_frames.js").Kept} kept
   */
  #sendFrame(socket, id, kept) {
    if (sizeName(kept) !== this.#wireSize) {
      this.#wireSize = sizeName(kept);
      this.#say({ type: "size", width: kept.width, height: kept.height });
    }
    this.#sent += 1;
    this.#told = 0;
    kept.sentAt ||= performance.now();
    const { below: acknowledged, receipt } = this.#acknowledged;
    const { level, reason } = kept.answered ?? { level: 0, reason: 0 };
    socket.send(packFrame({ id, pts: kept.pts, flags: kept.flags, level, reason, acknowledged, receipt }, kept.payload));
  }

  #tell() {
    if (!this.#told) return;
    this.#told = 0;
    this.#say({ type: "delivered", ...this.#acknowledged });
  }

  /** @param {Required<import("./protocol.js").FrameHeader>} header of an answer that has been read */
  #taken(header) {
    this.#acknowledged = { below: header.id + 1, receipt: header.receipt };
    this.#told += 1;
    this.#pump();
  }

  /** @param {Record<string, unknown>} message */
  #say(message) {
    if (this.#live) this.#socket?.send(JSON.stringify(message)); // lost if the socket closes meanwhile
  }

  // The end, and waiting for it

  #requireOpen() {
    if (this.#error) throw this.#error;
    if (this.#over || this.#closing) {
      throw ended();
    }
  }

  /** @param {Error} error */
  #fail(error) {
    if (this.#over) return;
    this.#error = error;
    this.#finish("failed");
  }

  /** @param {"closed" | "failed"} state */
  #finish(state) {
    this.#over = true;
    this.#live = false;
    clearTimeout(this.#tellTimer);
    this.#socket?.close();
    this.#kept.clear();
    this.#set(state, this.#error instanceof Refusal ? { refusal: this.#error } : {});
    this.#notify();
  }

  /**
   * @param {StreamState} state
   * @param {{refusal?: Refusal, retryMs?: number}} [about]
   */
  #set(state, about = {}) {
    if (this.state === state && state !== "waiting") return;
    if (this.#over && state !== "closed" && state !== "failed") return;
    this.state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: { state, ...about } }));
  }

  #notify() {
    const { resolve } = this.#change;
    this.#change = withResolvers();
    resolve();
    if (this.credit > 0) this.dispatchEvent(new CustomEvent("credit"));
  }

  /** @param {() => unknown} isSo */
  async #until(isSo) {
    while (!isSo()) await this.#change.promise;
  }

  /** @param {number} ms */
  async #pause(ms) {
    const end = Date.now() + ms;
    const timer = setTimeout(() => this.#notify(), ms);
    await this.#until(() => this.#over || Date.now() >= end);
    clearTimeout(timer);
  }
}

function ended() {
  return new ServiceFailure("The stream is closed.", { code: "stream-closed", remedy: "Open another one." });
}

/** @param {{width: number, height: number}} size */
function sizeName({ width, height }) {
  return `${width}x${height}`;
}

/** @param {number} ms */
function jitter(ms) {
  return ms * (0.5 + Math.random() / 2);
}

/** @returns {PromiseWithResolvers<any>} */
function withResolvers() {
  /** @type {any} */
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}
