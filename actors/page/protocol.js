/**
 * The wire format of Upriver's live streams, version 1: the header of a frame, and refusals as errors.
 * docs/reference/protocol.md describes every field; infra/protocol.py is the other side's copy of this file.
 * Needs nothing of a page: it also runs in a worker and in Node.
 */

export const VERSION = 1;
export const SUBPROTOCOL = "upriver.live.v1";
export const HEADER_BYTES = 64;

const KIND_FRAME = 1;
const [MAGIC_0, MAGIC_1] = [0x55, 0x52]; // "UR"

/** Bits of `FrameHeader.flags`. */
export const Flag = Object.freeze({
  KEY: 1, // h264: can be decoded without the access units before it
  CUT: 2, // to the service: a new scene begins with this frame
  RESET: 4, // from the service: the stream's memory was empty at this frame
  DROPPED: 8, // no picture follows; `reason` says why
  GAP: 16, // ids were missing before this frame
  RESUMED: 32, // the first frame that another replica answered
});

/** Why a frame was not restored; the place in this list is the number on the wire. */
export const DROP_REASONS = Object.freeze([
  "none",
  "newer",
  "late",
  "repeated",
  "out_of_order",
  "rate",
  "undecodable",
  "received",
]);

/**
 * The 64 bytes in front of every picture. Numbers above 2^53 lose their last digits; the service makes none.
 *
 * @typedef {object} FrameHeader
 * @property {number} id number of the frame, growing by one from frame to frame
 * @property {number} [pts] time in units of the sender's own; comes back as it was sent
 * @property {number} [flags] bits of `Flag`
 * @property {number} [level] denoising steps that the frame got; 0 is a plain resize
 * @property {number} [reason] place in `DROP_REASONS`
 * @property {number} [index] number of the frame in the restored stream, which counts no dropped frames
 * @property {number} [receipt] proves that the answer was read, see docs/reference/protocol.md
 * @property {number} [acknowledged] to the service: all answers with a smaller id are here; from it: durable below
 * @property {number} [granted] frames that may have been sent since the connection was opened
 * @property {number} [decodeUs] microseconds at the service's stations
 * @property {number} [queueUs]
 * @property {number} [stepUs]
 * @property {number} [encodeUs]
 */

/**
 * Return the message of a frame: header and picture.
 *
 * @param {FrameHeader} header
 * @param {Uint8Array} [payload] the picture in the stream's codec
 * @returns {Uint8Array<ArrayBuffer>}
 */
export function packFrame(header, payload = new Uint8Array(0)) {
  const message = new Uint8Array(HEADER_BYTES + payload.length);
  const view = new DataView(message.buffer);
  message.set([MAGIC_0, MAGIC_1, VERSION, KIND_FRAME]);
  view.setUint16(4, header.flags ?? 0);
  view.setUint8(6, header.level ?? 0);
  view.setUint8(7, header.reason ?? 0);
  view.setBigUint64(8, BigInt(header.id));
  view.setBigInt64(16, BigInt(header.pts ?? 0));
  view.setUint32(24, header.index ?? 0);
  view.setUint32(28, header.receipt ?? 0);
  view.setBigUint64(32, BigInt(header.acknowledged ?? 0));
  view.setBigUint64(40, BigInt(header.granted ?? 0));
  view.setUint32(48, header.decodeUs ?? 0);
  view.setUint32(52, header.queueUs ?? 0);
  view.setUint32(56, header.stepUs ?? 0);
  view.setUint32(60, header.encodeUs ?? 0);
  message.set(payload, HEADER_BYTES);
  return message;
}

/**
 * Return header and picture of a binary message. The picture is a view of it, not a copy.
 *
 * @param {ArrayBuffer} message
 * @returns {{header: Required<FrameHeader>, payload: Uint8Array<ArrayBuffer>}}
 * @throws {BadMessage} it is not a frame of this version
 */
export function unpackFrame(message) {
  if (message.byteLength < HEADER_BYTES) {
    throw bad(`A binary message has ${message.byteLength} bytes; a frame's header alone has ${HEADER_BYTES}.`);
  }
  const view = new DataView(message);
  if (view.getUint8(0) !== MAGIC_0 || view.getUint8(1) !== MAGIC_1 || view.getUint8(3) !== KIND_FRAME) {
    throw bad("A binary message does not begin with a frame's header.");
  }
  if (view.getUint8(2) !== VERSION) {
    throw bad(`A frame's header has version ${view.getUint8(2)}; this side speaks version ${VERSION}.`);
  }
  const header = {
    flags: view.getUint16(4),
    level: view.getUint8(6),
    reason: view.getUint8(7),
    id: Number(view.getBigUint64(8)),
    pts: Number(view.getBigInt64(16)),
    index: view.getUint32(24),
    receipt: view.getUint32(28),
    acknowledged: Number(view.getBigUint64(32)),
    granted: Number(view.getBigUint64(40)),
    decodeUs: view.getUint32(48),
    queueUs: view.getUint32(52),
    stepUs: view.getUint32(56),
    encodeUs: view.getUint32(60),
  };
  return { header, payload: new Uint8Array(message, HEADER_BYTES) };
}

/**
 * Something that the service does not do, or not now. `message` says what, and by which value.
 *
 * @property {string} code what a program can compare
 * @property {string} limit the limit alone; empty where there is none
 * @property {string} remedy what to do about it
 * @property {number | null} retryAfterS when another attempt may succeed; null where it would not
 */
export class Refusal extends Error {
  /**
   * @param {string} message
   * @param {{code?: string, limit?: string, remedy?: string, retryAfterS?: number | null}} [about]
   */
  constructor(message, about = {}) {
    super(message);
    this.name = new.target.name;
    this.code = about.code ?? "refused";
    this.limit = about.limit ?? "";
    this.remedy = about.remedy ?? "";
    this.retryAfterS = about.retryAfterS ?? null;
  }
}

/** No capacity: for another stream, or for this one's size and rate. */
export class AdmissionRefused extends Refusal {}
/** The stream cannot be resumed. */
export class StateLost extends Refusal {}
/** A message or a picture is larger than agreed. */
export class FrameTooLarge extends Refusal {}
/** Frames of a lossless stream came repeated or in another order. */
export class OutOfOrder extends Refusal {}
/** More was sent than was granted, or than the tenant may send. */
export class RateExceeded extends Refusal {}
/** No credentials, or wrong ones. */
export class Unauthorized extends Refusal {}
/** Known credentials that are not good for this, or a page of another origin. */
export class Forbidden extends Refusal {}
/** A message that is not of the protocol. */
export class BadMessage extends Refusal {}
/** Nothing came for too long, the stream is as old as it may get, or its client does not read. */
export class TimedOut extends Refusal {}
/** The service failed, or cannot be reached. */
export class ServiceFailure extends Refusal {}

const KINDS = {
  AdmissionRefused,
  StateLost,
  FrameTooLarge,
  OutOfOrder,
  RateExceeded,
  Unauthorized,
  Forbidden,
  BadMessage,
  TimedOut,
  ServiceFailure,
};

/**
 * Return the refusal that a message of type `refused`, or the JSON body of a refused request, tells of.
 *
 * @param {Record<string, any>} message
 * @returns {Refusal}
 */
export function refusalFrom(message) {
  const Kind = Object.hasOwn(KINDS, message.kind) ? KINDS[/** @type {keyof typeof KINDS} */ (message.kind)] : Refusal;
  return new Kind(String(message.message ?? "The service refused."), {
    code: String(message.code ?? "refused"),
    limit: String(message.limit ?? ""),
    remedy: String(message.remedy ?? ""),
    retryAfterS: typeof message.retry_after_s === "number" ? message.retry_after_s : null,
  });
}

/** @param {string} message */
function bad(message) {
  return new BadMessage(message, { code: "bad-message", remedy: "See docs/reference/protocol.md." });
}
