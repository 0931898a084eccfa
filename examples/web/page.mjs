// The page: a row in, and what every exit says of it, where it left, and what that took.

import { Client } from "./client.mjs";

const ROUNDS = 15;
const BASE = new URL("models/", location.href).href;
const the = (id) => document.getElementById(id);
const client = new Client();

let index = [];
let current = null; // the entry of the model that is shown
let row = null; // what was asked last: a text, or numbers
let own = true; // thresholds as calibrated, not the slider's
let asked = 0; // counts questions, so that a late answer to an old one is not shown

const percent = (value) => (value > 0.9995 ? "> 99.9 %" : `${(100 * value).toFixed(value > 0.985 ? 1 : 0)} %`);
const work = (k) => (current.costs ? `${Math.round(100 * current.costs[k])} %` : "");
const sure = (value) => value.toFixed(value > 0.98 ? 4 : 2);
const ms = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} ms`;
const size = (bytes) => (bytes < 1e7 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.round(bytes / 1e6)} MB`);
const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });

function say(text, bad = false) {
  the("status").replaceChildren(text);
  the("status").classList.toggle("bad", bad);
}

async function start() {
  say("Loading ...");
  try {
    const response = await fetch(new URL("index.json", BASE), { cache: "no-cache" });
    if (!response.ok) throw new Error(String(response.status));
    index = (await response.json()).models;
    if (!index.length) throw new Error("empty");
  } catch {
    say("There are no models here. Write them: python examples/web/prepare.py runs/digits, then reload the page.", true);
    return;
  }
  for (const entry of index) {
    const tab = make("button", entry.title);
    tab.append(make("small", size(entry.bytes)));
    tab.type = "button";
    tab.role = "tab";
    tab.dataset.model = entry.name;
    tab.addEventListener("click", () => show(entry));
    the("models").append(tab);
  }
  await show(index.find((entry) => entry.name === location.hash.slice(1)) ?? index[0]);
}

/** Nothing; the model is fetched, where it is not there yet, and shown with its first sample. */
async function show(entry) {
  current = entry;
  const question = ++asked;
  history.replaceState(null, "", `#${entry.name}`);
  for (const tab of the("models").children) tab.ariaSelected = String(tab.dataset.model === entry.name);
  the("main").hidden = true;
  const bar = Object.assign(make("progress"), { max: entry.bytes, value: 0 });
  say("");
  the("status").append(`Loading ${size(entry.bytes)} ...`, bar);
  let samples;
  try {
    await client.ask("open", { base: BASE, entry }, (bytes) => (bar.value = bytes));
    samples = await samplesOf(entry);
  } catch (error) {
    if (question === asked) say(error.message, true);
    return;
  }
  if (question !== asked) return;
  say("");
  own = true;
  the("text").hidden = entry.kind !== "text";
  the("pictures").hidden = entry.kind !== "image";
  the("answer").hidden = true;
  the("main").hidden = false;
  setSlider();
  if (entry.kind === "text") showSentences(samples);
  else showImages(samples);
}

async function samplesOf(entry) {
  if (entry.kind === "text") return entry.samples;
  const response = await fetch(new URL(entry.samples, BASE)).catch(() => null);
  if (!response?.ok) throw new Error("The pictures could not be fetched. Run prepare.py again, then reload the page.");
  return response.json();
}

function showSentences(samples) {
  the("or").hidden = !samples.length;
  the("sentence").value = samples[0] ?? "";
  the("sentences").replaceChildren(
    ...samples.map((sentence) => {
      const [item, button] = [make("li"), make("button", sentence)];
      button.type = "button";
      button.addEventListener("click", () => {
        the("sentence").value = sentence;
        ask(sentence);
      });
      item.append(button);
      return item;
    }),
  );
  if (samples.length) ask(samples[0]);
}

function showImages(samples) {
  const buttons = samples.map(({ truth, values }, number) => {
    const button = make("button");
    button.type = "button";
    button.ariaLabel = truth === null ? `picture ${number}` : `picture ${number}, of ${truth}`;
    button.append(drawn(values, current.shape));
    button.addEventListener("click", () => {
      for (const other of buttons) other.ariaPressed = String(other === button);
      ask(values);
    });
    return button;
  });
  the("images").replaceChildren(...buttons);
  buttons[0]?.click();
}

/** A canvas of numbers as the network takes them, from the least to the greatest. */
function drawn(values, [channels, height, width]) {
  const canvas = Object.assign(make("canvas"), { width, height });
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let colour = 0; colour < 3; colour++) {
      const value = values[(channels === 1 ? 0 : colour) * width * height + i];
      pixels.data[4 * i + colour] = (255 * (value - low)) / (high - low || 1);
    }
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

const calibrated = () => [current.thresholds].flat();
// slider and bars have more room where scores are high
const placeOf = (value) => {
  const [low, high] = current.range;
  return 1 - Math.sqrt(1 - Math.min(1, Math.max(0, (value - low) / (high - low))));
};
const valueAt = (place) => current.range[1] - (current.range[1] - current.range[0]) * (1 - place) ** 2;
const thresholds = () => (own ? null : valueAt(Number(the("slider").value)));
const thresholdAt = (k) => thresholds() ?? calibrated()[calibrated().length === 1 ? 0 : k];

/** Nothing; the slider stands at the mean of the calibrated thresholds. */
function setSlider() {
  // the last exit has no use for its threshold
  const used = calibrated().length === 1 ? calibrated() : calibrated().slice(0, -1);
  the("slider").value = placeOf(used.reduce((a, b) => a + b, 0) / used.length);
  showThreshold();
}

function showThreshold() {
  const value = sure(valueAt(Number(the("slider").value)));
  the("threshold").value = own ? `${value}, calibrated` : value;
  the("reset").hidden = own;
}

async function ask(given) {
  row = given;
  const [question, entry] = [++asked, current];
  if (entry.kind === "text" && !row.trim()) {
    the("answer").hidden = true;
    the("tokens").textContent = "";
    return say("Type a sentence first: there is nothing to answer yet.", true);
  }
  say("");
  try {
    const how = { name: entry.name, row, thresholds: thresholds() };
    const { said, tokens } = await client.ask("passed", how);
    if (question !== asked) return;
    showTokens(tokens);
    showAnswer(said);
    showTimes(null);
    const ways = { exits: thresholds(), full: 1e6 };
    const tell = (round) => question === asked && (the("how").textContent = `timing, round ${round + 1} of ${ROUNDS} ...`);
    const times = await client.ask("time", { name: entry.name, row, ways, rounds: ROUNDS }, tell);
    if (question === asked && times) showTimes(times);
  } catch (error) {
    if (question === asked) say(`This could not be answered: ${error.message}`, true);
  }
}

function showTokens(tokens) {
  if (!tokens) return;
  const cut = tokens.cut ? ", cut to what the network takes" : "";
  the("tokens").textContent = `${tokens.ids.length} tokens${cut}`;
}

function showAnswer(said) {
  const left = said.at(-1);
  const last = current.exits - 1;
  the("answer").hidden = false;
  the("label").textContent = left.name;
  the("probability").textContent = percent(left.probability);
  the("left").textContent = `exit ${left.exit}`;
  const share = current.costs ? ` and ${work(left.exit)} of the work` : "";
  the("sentence-of-it").textContent =
    left.exit === last
      ? `It went all the way: ${current.exits} of ${current.exits} stages.`
      : `${left.exit + 1} of ${current.exits} stages ran${share}; the rest never did.`;
  the("answer").dataset.exit = left.exit;
  the("road").replaceChildren(
    ...Array.from({ length: current.exits }, (_, k) => exitAt(k, said.find((one) => one.exit === k), left.exit)),
  );
}

/** One exit of the road: what it said, how sure it was, and what it costs to come this far. */
function exitAt(k, found, left) {
  const item = make("li", "", k === left ? "left" : k > left ? "never" : found ? "passed" : "skipped");
  const middle = make("div", "", "said");
  if (found) {
    const last = k === current.exits - 1;
    const why = k < left ? "not sure enough" : last ? "the end of the road" : "sure enough, leaves";
    middle.append(make("span", `${found.name} ${percent(found.probability)}`), make("span", why, "faint"));
    middle.append(scoreBar(found.score, last ? null : thresholdAt(k)));
  } else {
    middle.append(make("span", k > left ? "not run" : "has no say in this policy", "faint"));
  }
  item.append(make("span", `exit ${k}`), middle, make("span", work(k), "work faint"));
  if (k === left && k < current.exits - 1) item.append(make("span", "", "on"));
  return item;
}

function scoreBar(score, threshold) {
  const at = (value) => `${(100 * placeOf(value)).toFixed(2)}%`;
  const [bar, fill] = [make("div", "", "score"), make("i")];
  fill.style.width = at(score);
  bar.append(fill);
  bar.title = `score ${score.toFixed(4)}`;
  if (threshold !== null) {
    const tick = make("em");
    tick.style.left = at(threshold);
    bar.title += `, threshold ${threshold.toFixed(4)}`;
    bar.append(tick);
  }
  return bar;
}

function showTimes(times) {
  const longest = times ? Math.max(times.exits, times.full) : 1;
  the("bar-exits").style.width = times ? `${(100 * times.exits) / longest}%` : "0";
  the("bar-full").style.width = times ? `${(100 * times.full) / longest}%` : "0";
  the("ms-exits").textContent = times ? ms(times.exits) : "";
  the("ms-full").textContent = times ? ms(times.full) : "";
  the("times").dataset.done = String(times !== null);
  if (!times) {
    the("faster").textContent = "Time";
    return;
  }
  const ratio = times.full / times.exits;
  the("faster").textContent = ratio > 1.03 ? `${ratio.toFixed(ratio < 10 ? 1 : 0)} times as fast` : "No time saved";
  the("how").textContent =
    `Medians of ${ROUNDS} rounds, taking turns, one thread. Full depth is the same file with thresholds that no score ` +
    "reaches.";
}

the("text").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(the("sentence").value);
});
the("sentence").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask(the("sentence").value);
  }
});
let soon;
the("slider").addEventListener("input", () => {
  own = false;
  showThreshold();
  clearTimeout(soon);
  soon = setTimeout(() => row !== null && ask(row), 60);
});
the("reset").addEventListener("click", () => {
  own = true;
  setSlider();
  if (row !== null) ask(row);
});

start();
