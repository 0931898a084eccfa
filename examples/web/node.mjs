// Runs a model of prepare.py under onnxruntime-node, and prints JSON.
//   node node.mjs build/models sst2 --text "A film that stays with you."
//   node node.mjs build/models digits --sample 3 --thresholds 1e6
// python_only.py takes the same words.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";
import { Exits, Tokens } from "./offramp.mjs";

const json = async (...path) => JSON.parse(await readFile(join(...path), "utf8"));

/** The model called `name` in the folder that prepare.py wrote. */
async function open(folder, name, asIs) {
  const { models } = await json(folder, "index.json");
  const entry = models.find((model) => model.name === name);
  if (!entry) throw new Error(`${folder} has no model ${name}; there are ${models.map((m) => m.name).join(", ")}`);
  const tokens = entry.tokens && new Tokens(Tokenizer, await json(folder, entry.tokenizer), entry.tokens);
  return Exits.open(ort, new Uint8Array(await readFile(join(folder, entry.file))), entry, tokens, asIs);
}

/** Rows as they are: the texts given, a sample image by number, or a JSON list in a file. */
async function rowsOf(folder, entry, { text, sample, rows }) {
  if (rows) return json(rows);
  if (text) return text;
  if (entry.tokens) return entry.samples;
  const samples = await json(folder, entry.samples);
  return (sample ? sample.map((number) => samples[Number(number)]) : samples).map((row) => row.values);
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      text: { type: "string", multiple: true },
      sample: { type: "string", multiple: true },
      rows: { type: "string" },
      batch: { type: "string" },
      thresholds: { type: "string" },
      "as-is": { type: "boolean", default: false },
      ids: { type: "boolean", default: false },
      time: { type: "string" },
    },
  });
  const [folder, name] = positionals;
  if (!name) throw new Error("give the folder of models and a name: node node.mjs build/models digits");
  const model = await open(folder, name, values["as-is"]);
  const rows = await rowsOf(folder, model.entry, values);
  const numbers = values.thresholds?.split(",").map(Number) ?? null;
  const thresholds = numbers?.length === 1 ? numbers[0] : numbers;
  const found = { engine: `onnxruntime-node ${ort.env.versions.node}`, model: name };
  if (values.ids) found.ids = rows.map((row) => model.tokens.ids(row).ids);
  found.rows = await model.answer(rows, { thresholds, batch: Number(values.batch ?? rows.length) });
  if (values.time) found.ms = await times(model, rows, Number(values.time));
  console.log(JSON.stringify(found));
}

/** For each row, milliseconds to every exit and as calibrated. */
async function times(model, rows, rounds) {
  const ways = Object.fromEntries(model.about.visited.map((k) => [`exit ${k}`, model.only(k)]));
  const found = [];
  for (const row of rows) found.push(await model.time([row], { ...ways, calibrated: null }, { rounds }));
  return found;
}

main().catch((error) => {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
});
