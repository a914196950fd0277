/**
 * How a connection to the live service is opened: address, WebSocket, hello and welcome.
 * Knows nothing of frames.
 */

import { BadMessage, ServiceFailure, SUBPROTOCOL, refusalFrom } from "./protocol.js";

const OPEN_TIMEOUT_MS = 10_000;

/**
 * Connect and exchange hellos.
 *
 * @param {string} url
 * @param {object} hello
 * @param {(socket: WebSocket) => void} made is told the socket at once
 * @returns {Promise<{socket: WebSocket, welcome: Record<string, any>}>}
 */
export function greet(url, hello, made) {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(url, [SUBPROTOCOL]);
    socket.binaryType = "arraybuffer";
    made(socket);
    /** @param {Error} error */
    const giveUp = (error) => {
      clearTimeout(timer);
      socket.onmessage = socket.onclose = null;
      socket.close();
      reject(error);
    };
    const timer = setTimeout(() => giveUp(unreachable("it does not answer")), OPEN_TIMEOUT_MS);
    socket.onopen = () => socket.send(JSON.stringify(hello));
    socket.onclose = () => giveUp(unreachable("the connection is refused or was cut"));
    socket.onmessage = ({ data }) => {
      try {
        const message = parse(data);
        if (message.type === "refused") throw refusalFrom(message);
        if (message.type !== "welcome") throw new BadMessage("The service's first message is no welcome.");
        clearTimeout(timer);
        socket.onmessage = socket.onclose = null;
        resolve({ socket, welcome: message });
      } catch (error) {
        giveUp(/** @type {Error} */ (error));
      }
    };
  });
}

/**
 * @param {unknown} data
 * @returns {Record<string, any>}
 */
export function parse(data) {
  let message;
  try {
    message = JSON.parse(/** @type {string} */ (data));
  } catch {
    message = null;
  }
  if (typeof message?.type !== "string") {
    throw new BadMessage("The service's message is not a JSON object with a `type`.", {
      code: "bad-message",
      remedy: "Check that the address is that of an Upriver service.",
    });
  }
  return message;
}

/** @param {string} why */
function unreachable(why) {
  return new ServiceFailure(`The service cannot be reached: ${why}.`, {
    code: "unreachable",
    remedy: "Check the address, the network, and that the service runs.",
  });
}

/**
 * Return the address of a service's streams.
 *
 * @param {string | URL} given ws, wss, http or https, with or without `/v1/streams`
 */
export function streamUrl(given) {
  const url = new URL(given, globalThis.location?.href);
  url.protocol = url.protocol.replace("http", "ws");
  if (!url.pathname.endsWith("/v1/streams")) url.pathname = `${url.pathname.replace(/\/$/, "")}/v1/streams`;
  return url.href;
}
