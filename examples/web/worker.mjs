// Fetches models and runs them, away from the page, so that it stays smooth.

import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import * as ort from "./vendor/ort.wasm.bundle.min.mjs";
import { Exits, Tokens } from "./offramp.mjs";

ort.env.wasm.numThreads = 1; // more need a host that sends the headers of cross-origin isolation
ort.env.wasm.wasmPaths = { wasm: new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url).href };

const models = new Map();
let newest = 0;

async function fetched(url, what) {
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new Error(`${what} could not be fetched: the connection failed. Reload the page to try again.`);
  }
  if (!response.ok) throw new Error(`${what} could not be fetched: the server says ${response.status}.`);
  return response;
}

/** The bytes at a URL; `tell` is called with how many are there. */
async function bytesOf(url, what, size, tell) {
  const response = await fetched(url, what);
  const bytes = new Uint8Array(size);
  let at = 0;
  const wrong = () => new Error(`${what} is not the file that index.json describes. Run prepare.py again.`);
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      if (at + value.length > size) throw wrong();
      bytes.set(value, at);
      tell((at += value.length));
    }
  } catch (error) {
    throw error instanceof TypeError ? new Error(`${what} stopped half way. Reload the page to try again.`) : error;
  }
  if (at !== size) throw wrong();
  return bytes;
}

function explain(error) {
  if (!/no available backend/.test(error.message)) throw error;
  throw new Error("The engine could not be started: vendor/ort-wasm-simd-threaded.wasm is missing, or the browser is too old.");
}

const does = {
  async open({ base, entry, asIs = false }, tell) {
    if (models.has(entry.name)) return;
    const url = (file) => new URL(`${file}?v=${entry.sha256.slice(0, 12)}`, base).href;
    const json = entry.tokens && (await (await fetched(url(entry.tokenizer), "The tokenizer")).json());
    const bytes = await bytesOf(url(entry.file), "The model", entry.bytes, tell);
    const tokens = json && new Tokens(Tokenizer, json, entry.tokens);
    models.set(entry.name, await Exits.open(ort, bytes, entry, tokens, asIs).catch(explain));
  },
  ids: ({ name, rows }) => rows.map((row) => models.get(name).tokens.ids(row)),
  answer: ({ name, rows, ...how }) => models.get(name).answer(rows, how),
  async passed({ name, row, ...how }) {
    const model = models.get(name);
    return { said: await model.passed(row, how), tokens: model.tokens?.ids(row) };
  },
  /** Medians of milliseconds of every way, thresholds by name; null when a newer row came meanwhile. */
  time({ name, row, ways, rounds }, tell, number) {
    const go = async (round) => {
      tell(round);
      await new Promise((next) => setTimeout(next)); // lets messages in
      return number === newest;
    };
    return models.get(name).time([row], ways, { rounds, go });
  },
};

addEventListener("message", async ({ data: { number, what, given } }) => {
  newest = number;
  try {
    const value = await does[what](given, (progress) => postMessage({ number, progress }), number);
    postMessage({ number, value });
  } catch (error) {
    postMessage({ number, error: error?.message ?? String(error) });
  }
});
