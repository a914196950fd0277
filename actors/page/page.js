/** The page: settings, buttons, words. What it runs is in restoration.js. */

import { Refusal, refusalFrom, Unauthorized } from "./client.js";
import { availableCodecs } from "./codecs.js";
import { Comparison } from "./comparison.js";
import { Figures } from "./figures.js";
import { LatencyGraph } from "./latency_graph.js";
import { Restoration } from "./restoration.js";
import { Source, SourceError } from "./sources.js";

const KEY_NAME = "upriver.key";
const SHOW_MS = 250;
const DEFAULT_BUDGET_MS = 400;
const CODEC_WORDS = { jpeg: "JPEG", webp: "WebP", png: "PNG, exact", h264: "H.264" };
const POLICY_NOTES = /** @type {Record<string, string>} */ ({
  newest: "What waits is dropped when a newer frame comes: for cameras and calls.",
  drop: "A frame that would come back later than the budget is dropped.",
  resize: "A frame that would come back later than the budget comes back as its plain resize.",
  lossless: "Every frame that is sent is restored. A file is held while the service is busy.",
});

const FOOT = "Pictures go to this service and come back; the page stores none.";

const find = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const form = /** @type {HTMLFormElement} */ (find("controls"));
const video = /** @type {HTMLVideoElement} */ (find("video"));
const startButton = /** @type {HTMLButtonElement} */ (find("start"));
const snapshotButton = /** @type {HTMLButtonElement} */ (find("snapshot"));
const field = (/** @type {string} */ name) => /** @type {any} */ (form.elements.namedItem(name));

const comparison = new Comparison(document);
const figures = new Figures(document, new LatencyGraph(/** @type {HTMLCanvasElement} */ (find("graph"))));
/** @type {Restoration | null} */
let running = null;
let isWanted = false; // from Start to Stop
let resumesWhenSeen = false;
let wantsKey = false;

// Words

/**
 * @param {string} what
 * @param {string} remedy
 * @param {boolean} [calm] news, not an error
 */
function notify(what, remedy, calm = false) {
  find("notice-what").textContent = what;
  find("notice-remedy").textContent = remedy;
  find("notice").classList.toggle("calm", calm);
  find("notice").hidden = false;
}

/** @param {unknown} error */
function explain(error) {
  if (error instanceof Refusal) {
    if (error instanceof Unauthorized) {
      notify("The service does not accept these credentials.", "Type an API key or a token that it knows, then press Start.");
      wantsKey = true;
      return;
    }
    if (error.code === "session-idle" && document.hidden && field("source").value === "camera") resumesWhenSeen = true;
    const limit = error.limit && !error.message.includes(error.limit) ? ` Limit: ${error.limit}.` : "";
    notify(error.message, `${error.remedy}${limit}`);
  } else if (error instanceof SourceError) {
    notify(error.message, error.remedy);
  } else {
    console.error(error);
    notify("The page has met an error.", `${error}. Reload it; if it happens again, please report it.`);
  }
}

/** @param {CustomEvent} event */
function showState({ target, detail: { state, refusal, retryMs } }) {
  const { model } = /** @type {import("./client.js").UpriverStream} */ (target).welcome;
  const words = /** @type {Record<string, string>} */ ({
    connecting: "Connecting …",
    waiting: `Trying again in ${Math.max(1, Math.round(retryMs / 1000))} s`,
    open: `Connected · ${model}`,
    resuming: "Handing over …",
    closing: "Stopping …",
    closed: "Not connected",
    failed: "Stopped",
  });
  pill(state, words[state]);
  const held = { waiting: refusal?.message, resuming: "Going on with another replica …" }[/** @type {string} */ (state)];
  find("held").textContent = held ?? "";
  find("held").hidden = !held;
  if (comparison.stage.dataset.phase === "starting") find("empty-words").textContent = held ?? words[state];
}

/**
 * @param {string} state
 * @param {string} words
 */
function pill(state, words) {
  find("connection").dataset.state = state;
  if (find("connection").textContent !== words) find("connection").textContent = words;
}

// Settings

/** @returns {import("./restoration.js").Settings} */
function readSettings() {
  const key = field("key").value.trim();
  const isToken = /^eyJ[\w-]+\.[\w-]+\.[\w-]*$/.test(key); // how a JSON web token begins, whatever it says
  const isDeadline = ["drop", "resize"].includes(field("policy").value);
  const budgetMs = Math.min(60_000, Math.max(0, Number(field("budget").value))) || (isDeadline ? DEFAULT_BUDGET_MS : 0);
  const policy = /** @type {Record<string, any>} */ ({
    newest: { kind: "newest" },
    lossless: { kind: "lossless" },
    drop: { kind: "deadline", ms: budgetMs, late: "drop" },
    resize: { kind: "deadline", ms: budgetMs, late: "resize" },
  })[field("policy").value];
  return {
    service: new URL("v1/streams", document.baseURI),
    apiKey: isToken ? "" : key,
    token: isToken ? key : "",
    model: field("model").value,
    side: Number(field("side").value),
    scale: /** @type {2 | 3 | 4} */ (Number(field("scale").value)),
    fps: Number(field("fps").value),
    policy,
    budgetMs,
    codec: field("codec").value,
    quality: Number(field("quality").value),
  };
}

function fitFields() {
  const chosen = field("source").value;
  for (const row of /** @type {NodeListOf<HTMLElement>} */ (form.querySelectorAll("[data-source]"))) {
    row.hidden = !row.dataset.source?.split(" ").includes(chosen);
  }
  find("camera-row").hidden ||= field("camera").options.length < 2;
  find("model-note").textContent = field("model").selectedOptions[0]?.dataset.note ?? "";
  find("model-note").hidden = !find("model-note").textContent;
  const policy = field("policy").value;
  find("policy-note").textContent = POLICY_NOTES[policy];
  field("budget").placeholder = policy === "drop" || policy === "resize" ? String(DEFAULT_BUDGET_MS) : "none";
  find("quality-value").textContent = field("quality").value;
  field("quality").disabled = field("codec").value === "png";
}

function keepKey() {
  if (field("remember").checked) sessionStorage.setItem(KEY_NAME, field("key").value);
  else sessionStorage.removeItem(KEY_NAME);
}

async function listModels() {
  const key = field("key").value.trim();
  try {
    const answer = await fetch("v1/models", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    const told = await answer.json();
    if (!answer.ok) throw refusalFrom(told);
    const options = told.models.map((/** @type {any} */ { name, default: isDefault, step_ms }) => {
      const option = new Option(name, name, isDefault, isDefault);
      const cost = step_ms?.["4"];
      option.dataset.note = cost ? `About ${cost < 1000 ? `${Math.round(cost)} ms` : `${(cost / 1000).toFixed(1)} s`} for 320×180 at 4 steps.` : "";
      return option;
    });
    field("model").replaceChildren(...options);
    fitFields();
  } catch {
    field("model").replaceChildren(new Option("Service's default", ""));
  }
}

async function listCodecs() {
  const options = (await availableCodecs()).map((codec) => new Option(CODEC_WORDS[codec], codec));
  field("codec").replaceChildren(...options);
}

async function listCameras() {
  const cameras = await Source.cameras();
  if (cameras.length === field("camera").options.length) return;
  const chosen = field("camera").value;
  field("camera").replaceChildren(...cameras.map((one, n) => new Option(one.label || `Camera ${n + 1}`, one.deviceId)));
  if (chosen) field("camera").value = chosen;
  fitFields();
}

// Running

function openSource() {
  const repeat = field("repeat").checked;
  switch (field("source").value) {
    case "file":
      return Source.file(video, field("file").files[0], repeat);
    case "address":
      return Source.address(video, field("address").value, repeat);
    default:
      return Source.camera(video, field("camera").value);
  }
}

/** @param {boolean} isRunning */
function fitButtons(isRunning) {
  startButton.textContent = isRunning ? "Stop" : "Start";
  startButton.classList.toggle("stop", isRunning);
  find("foot").textContent = isRunning ? "Press Stop to change the settings." : FOOT;
  for (const set of /** @type {NodeListOf<HTMLFieldSetElement>} */ (form.querySelectorAll("fieldset"))) set.disabled = isRunning;
}

async function start() {
  const settings = readSettings(); // before its fields are locked: locked ones have no value
  const opening = openSource();
  isWanted = true;
  find("notice").hidden = true;
  comparison.clear("starting");
  find("empty-words").textContent = "Opening the source …";
  snapshotButton.disabled = true;
  fitButtons(true);
  figures.reset(settings.budgetMs);
  let timer = 0;
  let failed = true;
  try {
    const source = await opening;
    if (!isWanted) {
      source.close();
      failed = false;
      return;
    }
    if (source.isLive) void listCameras();
    timer = setInterval(() => {
      figures.show();
      snapshotButton.disabled = comparison.id < 0;
    }, SHOW_MS);
    running = new Restoration(source, settings, comparison, figures);
    await running.run(showState);
    failed = false;
  } catch (error) {
    explain(error);
  } finally {
    clearInterval(timer);
    const wasWanted = isWanted;
    running = null;
    isWanted = false;
    figures.show();
    find("held").hidden = true;
    fitButtons(false);
    if (wantsKey) field("key").focus(); // only now: a locked field takes no focus
    wantsKey = false;
    if (comparison.id < 0) comparison.clear("idle");
    find("empty-words").textContent = "Choose a source and press Start.";
    pill(failed ? "failed" : "closed", failed ? "Stopped" : "Not connected");
    if (!failed && wasWanted) notify("The video has ended.", "Its last frame stays on the stage.", true);
  }
}

function stop() {
  isWanted = false;
  void running?.stop();
}

async function saveSnapshot() {
  const link = document.createElement("a");
  const number = String(comparison.id).padStart(6, "0");
  link.href = URL.createObjectURL(await comparison.snapshot());
  link.download = `upriver-frame-${number}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  find("spoken").textContent = `Frame ${comparison.id} was saved: original and restored beside each other.`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (isWanted || running) stop();
  else void start();
});
form.addEventListener("input", fitFields);
field("key").addEventListener("change", () => (keepKey(), void listModels()));
field("remember").addEventListener("change", keepKey);
snapshotButton.addEventListener("click", () => void saveSnapshot());
find("notice-close").addEventListener("click", () => (find("notice").hidden = true));
find("full-screen").addEventListener("click", () => {
  if (document.fullscreenElement) void document.exitFullscreen();
  else comparison.stage.requestFullscreen?.().catch(() => notify("The browser does not show this in full screen.", "Allow it for this page.", true));
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden || !resumesWhenSeen) return;
  resumesWhenSeen = false;
  if (!running && !isWanted) void start();
});
addEventListener("pagehide", () => running?.abort.abort());

const stored = sessionStorage.getItem(KEY_NAME);
if (stored) Object.assign(field("key"), { value: stored }) && (field("remember").checked = true);
fitFields();
figures.show();
void Promise.all([listModels(), listCodecs()]).then(() => (document.documentElement.dataset.ready = "true"));
