/**
 * Pictures to bytes and back, by what the browser has: WebCodecs for H.264, its picture encoders for the rest.
 * Results come in order, through callbacks, because a video codec may answer later than it was asked.
 */

const TYPES = /** @type {const} */ ({ jpeg: "image/jpeg", webp: "image/webp", png: "image/png" });
const DECODED_PROFILE = "avc1.640033"; // High, level 5.1: what the service's encoder may send
const KEY_FRAME_MS = 2000; // what has to be sent again after a hand-over begins with a key frame
const MOST_DECODING = 3;
const SMALLEST_SIDE = 16;

/** @typedef {"jpeg" | "webp" | "png" | "h264"} PageCodec */

/**
 * @param {number} width
 * @param {number} height
 * @param {number} quality
 * @returns {VideoEncoderConfig}
 */
function encoderConfig(width, height, quality) {
  const bitsPerPixel = 0.03 * 2 ** (quality / 20); // 0.68 at 90: hardly any loss in small pictures
  return {
    codec: width * height <= 1280 * 720 ? "avc1.42E01F" : "avc1.4D0033",
    width,
    height,
    bitrate: Math.round(Math.max(200_000, width * height * 30 * bitsPerPixel)),
    framerate: 30,
    latencyMode: "realtime",
    avc: { format: "annexb" },
  };
}

/**
 * Return the codecs that this browser can both write and read.
 *
 * @returns {Promise<PageCodec[]>}
 */
export async function availableCodecs() {
  /** @type {PageCodec[]} */
  const found = ["jpeg"];
  const sample = new OffscreenCanvas(SMALLEST_SIDE, SMALLEST_SIDE);
  sample.getContext("2d");
  const webp = await sample.convertToBlob({ type: TYPES.webp });
  if (webp.type === TYPES.webp) found.push("webp");
  found.push("png");
  try {
    const [encoder, decoder] = await Promise.all([
      VideoEncoder.isConfigSupported(encoderConfig(640, 360, 90)),
      VideoDecoder.isConfigSupported({ codec: DECODED_PROFILE, optimizeForLatency: true }),
    ]);
    if (encoder.supported && decoder.supported) found.push("h264");
  } catch {
    // no WebCodecs here, or not on a page without HTTPS
  }
  return found;
}

/**
 * Pictures of one stream to bytes.
 *
 * @template About
 * @typedef {object} Encoder
 * @property {number} pending pictures whose bytes have not come
 * @property {(canvas: OffscreenCanvas, about: About, cut: boolean) => void} encode
 * @property {() => void} close
 */

/**
 * Return the encoder of a stream.
 *
 * @template About
 * @param {PageCodec} codec
 * @param {number} quality 1 to 100
 * @param {object} then
 * @param {(payload: Uint8Array<ArrayBuffer>, about: About, key: boolean) => void} then.done
 * @param {(about: About) => void} then.lost the encoder made nothing of it
 * @param {(error: Error) => void} then.failed
 * @returns {Encoder<About>}
 */
export function openEncoder(codec, quality, then) {
  return codec === "h264" ? new VideoWriter(quality, then) : new PictureWriter(codec, quality, then);
}

/**
 * Return the decoder of a stream.
 *
 * @template About
 * @param {PageCodec} codec
 * @param {object} then
 * @param {(picture: ImageBitmap | VideoFrame, about: About) => void} then.done the picture is the receiver's to close
 * @param {() => void} then.lost something could not be decoded; with H.264 nothing can before the next key frame
 */
export function openDecoder(codec, then) {
  return codec === "h264" ? new VideoReader(then) : new PictureReader(codec, then);
}

/** @template About */
class PictureWriter {
  /**
   * @param {"jpeg" | "webp" | "png"} codec
   * @param {number} quality
   * @param {any} then
   */
  constructor(codec, quality, then) {
    this.pending = 0;
    this.then = then;
    this.options = { type: TYPES[codec], quality: quality / 100 };
    this.last = Promise.resolve();
    this.closed = false;
  }

  /**
   * @param {OffscreenCanvas} canvas
   * @param {About} about
   */
  encode(canvas, about) {
    this.pending += 1;
    const blob = canvas.convertToBlob(this.options);
    this.last = this.last.then(async () => {
      try {
        const payload = new Uint8Array(await (await blob).arrayBuffer());
        if (!this.closed) this.then.done(payload, about, true);
        else this.then.lost(about);
      } catch (error) {
        this.then.lost(about);
        this.then.failed(error);
      } finally {
        this.pending -= 1;
      }
    });
  }

  close() {
    this.closed = true;
  }
}

/** @template About */
class VideoWriter {
  /**
   * @param {number} quality
   * @param {any} then
   */
  constructor(quality, then) {
    this.quality = quality;
    this.then = then;
    this.size = "";
    this.stamp = 0;
    this.keyAt = -Infinity;
    /** @type {Map<number, About>} */
    this.waiting = new Map();
    this.encoder = new VideoEncoder({
      output: (chunk) => this.written(chunk),
      error: (error) => then.failed(error),
    });
  }

  get pending() {
    return this.waiting.size;
  }

  /**
   * @param {OffscreenCanvas} canvas
   * @param {About} about
   * @param {boolean} cut
   */
  encode(canvas, about, cut) {
    const size = `${canvas.width}x${canvas.height}`;
    const now = performance.now();
    const keyFrame = cut || size !== this.size || now - this.keyAt > KEY_FRAME_MS;
    if (size !== this.size) this.encoder.configure(encoderConfig(canvas.width, canvas.height, this.quality));
    this.size = size;
    if (keyFrame) this.keyAt = now;
    const timestamp = (this.stamp += 33_333); // only their order counts
    this.waiting.set(timestamp, about);
    const frame = new VideoFrame(canvas, { timestamp });
    this.encoder.encode(frame, { keyFrame });
    frame.close();
  }

  /** @param {EncodedVideoChunk} chunk */
  written(chunk) {
    for (const [timestamp, about] of this.waiting) {
      if (timestamp > chunk.timestamp) break;
      this.waiting.delete(timestamp);
      if (timestamp === chunk.timestamp) {
        const payload = new Uint8Array(chunk.byteLength);
        chunk.copyTo(payload);
        this.then.done(payload, about, chunk.type === "key");
      } else {
        this.then.lost(about); // an encoder in real time may leave one out
      }
    }
  }

  close() {
    if (this.encoder.state !== "closed") this.encoder.close();
    for (const about of this.waiting.values()) this.then.lost(about);
    this.waiting.clear();
  }
}

/** @template About */
class PictureReader {
  /**
   * @param {"jpeg" | "webp" | "png"} codec
   * @param {any} then
   */
  constructor(codec, then) {
    this.type = TYPES[codec];
    this.then = then;
    this.closed = false;
    /** @type {Promise<void>[]} */
    this.decoding = [];
  }

  /**
   * Resolves when the next picture may be given.
   *
   * @param {Uint8Array<ArrayBuffer>} payload
   * @param {About} about
   */
  async decode(payload, about) {
    const picture = createImageBitmap(new Blob([payload], { type: this.type }));
    const before = this.decoding.at(-1);
    const shown = (async () => {
      const [one] = await Promise.allSettled([picture, before]);
      if (one.status === "rejected") this.then.lost();
      else if (this.closed) one.value.close();
      else this.then.done(one.value, about);
    })();
    this.decoding.push(shown);
    if (this.decoding.length >= MOST_DECODING) await this.decoding.shift();
  }

  close() {
    this.closed = true;
  }
}

/** @template About */
class VideoReader {
  /** @param {any} then */
  constructor(then) {
    this.then = then;
    /** @type {Map<number, About>} */
    this.waiting = new Map();
    this.stamp = 0;
    this.needsKey = true;
    /** @type {() => void} */
    this.goOn = () => {};
    this.decoder = this.open();
  }

  open() {
    const decoder = new VideoDecoder({
      output: (frame) => {
        const about = this.waiting.get(frame.timestamp);
        for (const stamp of this.waiting.keys()) if (stamp <= frame.timestamp) this.waiting.delete(stamp);
        if (about === undefined) frame.close();
        else this.then.done(frame, about);
        this.goOn();
      },
      error: () => {
        this.waiting.clear();
        this.needsKey = true;
        this.decoder = this.open();
        this.then.lost();
        this.goOn();
      },
    });
    decoder.configure({ codec: DECODED_PROFILE, optimizeForLatency: true });
    return decoder;
  }

  /**
   * Resolves when the next picture may be given.
   *
   * @param {Uint8Array<ArrayBuffer>} payload
   * @param {About} about
   * @param {boolean} key
   */
  async decode(payload, about, key) {
    if (this.needsKey && !key) return;
    this.needsKey = false;
    const timestamp = (this.stamp += 33_333);
    this.waiting.set(timestamp, about);
    this.decoder.decode(new EncodedVideoChunk({ type: key ? "key" : "delta", timestamp, data: payload }));
    if (this.waiting.size >= MOST_DECODING) {
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, 100); // a decoder that wants more input before it gives anything
        this.goOn = () => {
          clearTimeout(timer);
          resolve(undefined);
        };
      });
    }
  }

  close() {
    this.waiting.clear();
    if (this.decoder.state !== "closed") this.decoder.close();
  }
}
