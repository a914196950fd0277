/**
 * What a stream has been given to send and may have to send again: frames by id, until they are durable.
 * Knows no connection.
 */

import { Flag } from "./protocol.js";

/**
 * @typedef {object} Kept
 * @property {Uint8Array} payload
 * @property {number} pts
 * @property {number} flags
 * @property {number} width
 * @property {number} height
 * @property {number} sentAt when it was sent first, 0 before
 * @property {Required<import("./protocol.js").FrameHeader> | null} answered the header of its answer
 */

export class KeptFrames {
  /** Ids from here on were not sent on this connection. */
  unsentFrom = 0;
  /** Ids below this one were given up for want of room: they cannot be sent again. */
  givenUpBelow = 0;

  /** @type {Map<number, Kept>} in the order of their ids */
  #frames = new Map();
  #bytes = 0;
  #mostBytes;
  #needsKey;

  /**
   * @param {number} mostBytes beyond it the oldest answered frames are given up
   * @param {boolean} needsKey sending again must begin with a key frame (h264)
   */
  constructor(mostBytes, needsKey) {
    this.#mostBytes = mostBytes;
    this.#needsKey = needsKey;
  }

  /**
   * @param {number} id
   * @param {Kept} frame
   */
  add(id, frame) {
    this.#frames.set(id, frame);
    this.#bytes += frame.payload.length;
  }

  /** @param {number} id */
  get(id) {
    return this.#frames.get(id);
  }

  /** Id of the oldest frame, undefined if there is none. @returns {number | undefined} */
  get first() {
    return this.#frames.keys().next().value;
  }

  /** Frames that wait to be sent on this connection. */
  get backlog() {
    let count = 0;
    for (const id of this.#frames.keys()) count += id >= this.unsentFrom ? 1 : 0;
    return count;
  }

  /** Frames without an answer. */
  get unanswered() {
    let count = 0;
    for (const kept of this.#frames.values()) count += kept.answered === null ? 1 : 0;
    return count;
  }

  /**
   * Return the next frame to be sent on this connection, and take it as sent.
   *
   * @returns {[number, Kept] | null}
   */
  takeUnsent() {
    for (const entry of this.#frames) {
      if (entry[0] < this.unsentFrom) continue;
      this.unsentFrom = entry[0] + 1;
      return entry;
    }
    return null;
  }

  /**
   * Return the id with which sending must begin, so that the service's decoder can follow until `id`.
   *
   * @param {number} id
   */
  decodableFrom(id) {
    if (!this.#needsKey) return id;
    let from = id;
    for (const [known, kept] of this.#frames) if (known <= id && kept.flags & Flag.KEY) from = known;
    return from;
  }

  /** Forget all that is durable below this id. @param {number} id */
  durable(id) {
    const below = this.decodableFrom(id);
    for (const known of this.#frames.keys()) if (known < below) this.forget(known);
    for (const [known, kept] of this.#frames) {
      if (this.#bytes <= this.#mostBytes || kept.answered === null) break;
      this.forget(known);
      this.givenUpBelow = known + 1;
    }
  }

  /** The stream begins anew: keep what a new one needs. @param {number} nextId */
  beginAnew(nextId) {
    let from = nextId;
    for (const [id, kept] of this.#frames) if (kept.answered === null) from = Math.min(from, id);
    this.durable(from);
    this.givenUpBelow = 0;
  }

  /** @param {number} id */
  forget(id) {
    this.#bytes -= this.#frames.get(id)?.payload.length ?? 0;
    this.#frames.delete(id);
  }

  clear() {
    this.#frames.clear();
    this.#bytes = 0;
  }
}
