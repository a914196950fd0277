/**
 * Where pictures come from: a camera, a video on this device, or one at an address. All end in one `<video>` element.
 * Knows no stream and no service.
 */

/** A source cannot be used. `message` says why, `remedy` what to do. */
export class SourceError extends Error {
  /**
   * @param {string} message
   * @param {string} remedy
   */
  constructor(message, remedy) {
    super(message);
    this.name = "SourceError";
    this.remedy = remedy;
  }
}

const CAMERA_ERRORS = {
  NotAllowedError: ["The browser was not allowed to use the camera.", "Allow it beside the address bar, then press Start again."],
  NotFoundError: ["There is no camera.", "Connect one, or choose a file."],
  NotReadableError: ["The camera is in use by another program.", "Close that program, then press Start again."],
  OverconstrainedError: ["This camera is no longer there.", "Choose another one."],
};

/** One source, playing in `video` until `close`. */
export class Source {
  /**
   * @param {HTMLVideoElement} video
   * @param {boolean} isLive a camera does not wait; a file can be held
   */
  constructor(video, isLive) {
    this.video = video;
    this.isLive = isLive;
    /** Called at the end of a video that is not repeated, and when a camera is unplugged. @type {() => void} */
    this.onend = () => {};
    this.#signal = new AbortController();
    this.#waitedFor = undefined;
  }

  #signal;
  /** @type {number | undefined} */
  #waitedFor;
  #held = false;

  /**
   * @param {HTMLVideoElement} video
   * @param {string} [deviceId] of one camera among several
   * @returns {Promise<Source>}
   * @throws {SourceError}
   */
  static async camera(video, deviceId) {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new SourceError(
        "The browser gives no camera to this page.",
        "Browsers do so only over HTTPS, or on the machine itself (http://localhost).",
      );
    }
    let stream;
    try {
      const wanted = { width: { ideal: 1280 }, height: { ideal: 720 }, ...(deviceId && { deviceId: { exact: deviceId } }) };
      stream = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    } catch (error) {
      const { name, message } = /** @type {DOMException} */ (error);
      const known = /** @type {Record<string, string[]>} */ (CAMERA_ERRORS)[name];
      throw new SourceError(known?.[0] ?? `The camera cannot be opened: ${message}`, known?.[1] ?? "Try another one.");
    }
    const source = new Source(video, true);
    video.srcObject = stream;
    stream.getVideoTracks()[0]?.addEventListener("ended", () => source.onend(), { signal: source.#signal.signal });
    await source.#play("The camera gives no picture.", "Try another one.");
    return source;
  }

  /** The cameras that the browser tells of; their names only after one was allowed. */
  static async cameras() {
    const devices = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
    return devices.filter((device) => device.kind === "videoinput" && device.deviceId);
  }

  /**
   * @param {HTMLVideoElement} video
   * @param {File | undefined} file
   * @param {boolean} repeat
   * @throws {SourceError}
   */
  static async file(video, file, repeat) {
    if (!file) throw new SourceError("No file is chosen.", "Choose a video on this device.");
    const address = URL.createObjectURL(file);
    const source = new Source(video, false);
    source.#signal.signal.addEventListener("abort", () => URL.revokeObjectURL(address));
    await source.#load(address, repeat, `The browser cannot play ${file.name}.`, "Choose a video that it plays: MP4 with H.264, or WebM.");
    return source;
  }

  /**
   * @param {HTMLVideoElement} video
   * @param {string} address
   * @param {boolean} repeat
   * @throws {SourceError}
   */
  static async address(video, address, repeat) {
    const url = URL.canParse(address, document.baseURI) ? new URL(address, document.baseURI) : null;
    if (!address.trim() || !url || !/^https?:$/.test(url.protocol)) {
      throw new SourceError("This is no address of a video.", "Give one that begins with https:// or http://.");
    }
    const source = new Source(video, false);
    video.crossOrigin = "anonymous"; // without the other server's permission its pictures could not be read
    const what = `The video at ${url.host} cannot be played.`;
    await source.#load(url.href, repeat, what, "Check the address. Its server must permit this page (CORS), and the browser must know the format.");
    return source;
  }

  /** Width and height of the pictures. */
  get size() {
    return { width: this.video.videoWidth, height: this.video.videoHeight };
  }

  /**
   * Call `take` with the time of each picture that is shown, in milliseconds of the video, until `close`.
   *
   * @param {(time: number) => void} take
   */
  watch(take) {
    const { video } = this;
    if (video.requestVideoFrameCallback) {
      /** @type {VideoFrameRequestCallback} */
      const each = (_, about) => {
        this.#waitedFor = video.requestVideoFrameCallback(each);
        take(1000 * about.mediaTime);
      };
      this.#waitedFor = video.requestVideoFrameCallback(each);
      return;
    }
    let last = -1;
    const look = () => {
      this.#waitedFor = requestAnimationFrame(look);
      if (video.currentTime !== last) take(1000 * (last = video.currentTime));
    };
    this.#waitedFor = requestAnimationFrame(look);
  }

  /** Stop a file where it is, until `release`. */
  hold() {
    if (this.isLive || this.#held) return;
    this.#held = true;
    this.video.pause();
  }

  release() {
    if (!this.#held) return;
    this.#held = false;
    if (!this.video.ended) this.video.play().catch(() => {}); // closed meanwhile
  }

  /** Let go of camera and file. */
  close() {
    const { video } = this;
    this.#signal.abort();
    this.onend = () => {};
    if (this.#waitedFor !== undefined) {
      if (video.cancelVideoFrameCallback) video.cancelVideoFrameCallback(this.#waitedFor);
      else cancelAnimationFrame(this.#waitedFor);
    }
    video.pause();
    if (video.srcObject instanceof MediaStream) for (const track of video.srcObject.getTracks()) track.stop();
    video.srcObject = null;
    video.removeAttribute("src");
    video.removeAttribute("crossorigin");
    video.load();
  }

  /**
   * @param {string} address
   * @param {boolean} repeat
   * @param {string} what
   * @param {string} remedy
   */
  async #load(address, repeat, what, remedy) {
    this.video.loop = repeat;
    this.video.addEventListener("ended", () => this.onend(), { signal: this.#signal.signal });
    this.video.src = address;
    await this.#play(what, remedy);
  }

  /**
   * @param {string} what
   * @param {string} remedy
   */
  async #play(what, remedy) {
    try {
      await this.video.play();
      if (!this.video.videoWidth) throw new Error("no picture");
    } catch {
      this.close();
      throw new SourceError(what, remedy);
    }
  }
}
