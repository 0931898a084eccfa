// An exported file under onnxruntime, in Node and in a page alike: rows in, decisions out. The caller gives the
// onnxruntime module and the class of the tokenizer, since the two places find them differently.

import { aboutOf, requireThresholds } from "./file.mjs";

/** A threshold that no score reaches, and one that every score does. */
export const NEVER = 1e6;
export const ALWAYS = -1e6;

export class Tokens {
  /**
   * @param Tokenizer of @huggingface/tokenizers
   * @param json what is in tokenizer.json
   * @param how {max_length, names, pad_id, prefix, suffix} of index.json
   */
  constructor(Tokenizer, json, how) {
    this.tokenizer = new Tokenizer(json, {});
    this.how = how;
    this.bert = json.normalizer?.type === "BertNormalizer";
  }

  /** {ids, cut} of one text; it is cut where it has more tokens than the network was exported for. */
  ids(text) {
    const { max_length, prefix, suffix } = this.how;
    const { ids } = this.tokenizer.encode(this.bert ? asPython(text) : text, { add_special_tokens: false });
    const room = max_length - prefix.length - suffix.length;
    return { ids: [...prefix, ...ids.slice(0, room), ...suffix], cut: ids.length > room };
  }

  /** Tensors int64 [batch tok] by name, as long as the longest text. */
  feeds(ort, texts) {
    const rows = texts.map((text) => this.ids(text).ids);
    const longest = Math.max(2, ...rows.map((row) => row.length));
    const values = {
      input_ids: (row, i) => (i < row.length ? row[i] : this.how.pad_id),
      attention_mask: (row, i) => (i < row.length ? 1 : 0),
      token_type_ids: () => 0,
    };
    return Object.fromEntries(
      this.how.names.map((name) => {
        const flat = new BigInt64Array(rows.length * longest);
        rows.forEach((row, r) => {
          for (let i = 0; i < longest; i++) flat[r * longest + i] = BigInt(values[name](row, i));
        });
        return [name, new ort.Tensor("int64", flat, [rows.length, longest])];
      }),
    );
  }
}

/** Two things that Python's tokenizers do and the package does not: rare Chinese signs stand alone, and a capital sigma
 * becomes the same small one at the end of a word, too. */
function asPython(text) {
  return text.replace(/[\u{20000}-\u{2a6df}\u{2a700}-\u{2ceaf}\u{2f800}-\u{2fa1f}]/gu, " $& ").replaceAll("Σ", "σ");
}

export class Exits {
  /**
   * The file in `bytes`. `entry` is the model's in index.json.
   * @param asIs whether the bytes stay as they are; then the calibrated thresholds are the only ones
   */
  static async open(ort, bytes, entry, tokens = null, asIs = false) {
    const about = aboutOf(bytes);
    if (!asIs) requireThresholds(bytes);
    const runner = await ort.InferenceSession.create(bytes, {
      executionProviders: [ort.env.versions?.node ? "cpu" : "wasm"],
      intraOpNumThreads: 1,
      interOpNumThreads: 1,
      logSeverityLevel: 3,
    });
    return new Exits(ort, runner, about, entry, tokens, asIs);
  }

  constructor(ort, runner, about, entry, tokens, asIs) {
    Object.assign(this, { ort, runner, about, entry, tokens, asIs });
    this.exits = about.exits;
    this.own = perExit(about.policy.fields.thresholds, about.exits);
  }

  /** Tensors of some rows: texts, or arrays of numbers as the network takes them. */
  feeds(rows) {
    if (this.tokens) return this.tokens.feeds(this.ort, rows);
    const shape = this.entry.shape;
    const size = shape.reduce((a, b) => a * b, 1);
    const flat = new Float32Array(rows.length * size);
    rows.forEach((row, r) => {
      if (row.length !== size) throw new Error(`row ${r} has ${row.length} numbers; expected ${size}`);
      flat.set(row, r * size);
    });
    return { [this.entry.input]: new this.ort.Tensor("float32", flat, [rows.length, ...shape]) };
  }

  /** What onnxruntime answers. `thresholds`: one number, one for each exit, or null for the calibrated ones. */
  run(feeds, thresholds = null) {
    if (this.asIs && thresholds !== null) throw new Error("the file is taken as it is, with its own thresholds");
    if (this.asIs) return this.runner.run(feeds);
    const values = thresholds === null ? this.own : perExit(thresholds, this.exits);
    return this.runner.run({ ...feeds, thresholds: new this.ort.Tensor("float32", values, [this.exits]) });
  }

  /** One {label, name, probability, exit, score} for each row, `batch` rows at a time. */
  async answer(rows, { thresholds = null, batch = rows.length } = {}) {
    const answers = [];
    for (let begin = 0; begin < rows.length; begin += batch) {
      answers.push(...this.read(await this.run(this.feeds(rows.slice(begin, begin + batch)), thresholds)));
    }
    return answers;
  }

  read({ label, probabilities, exit, score }) {
    const classes = probabilities.dims[1];
    return Array.from(label.data, (found, row) => ({
      label: Number(found),
      name: this.about.labels[Number(found)] ?? String(found),
      probability: probabilities.data[row * classes + Number(found)],
      exit: Number(exit.data[row]),
      score: score.data[row],
    }));
  }

  /** What every exit says that one row passes, the one it leaves at last. */
  async passed(row, { thresholds = null } = {}) {
    const feeds = this.feeds([row]);
    const [left] = this.read(await this.run(feeds, thresholds));
    const said = [];
    for (const k of this.about.visited.filter((exit) => exit < left.exit)) {
      said.push(...this.read(await this.run(feeds, this.only(k))));
    }
    return [...said, left];
  }

  /** Thresholds with which every row leaves at exit k. */
  only(k) {
    return Array.from({ length: this.exits }, (_, exit) => (exit === k ? ALWAYS : NEVER));
  }

  /**
   * Milliseconds of some ways to run the same rows: medians over rounds in which they take turns.
   * @param ways thresholds by name
   * @param go called between rounds; false ends the whole, and null is returned
   */
  async time(rows, ways, { rounds = 15, least = 4, go = async () => true } = {}) {
    const feeds = this.feeds(rows);
    const names = Object.keys(ways);
    const once = async (name, times) => {
      const began = performance.now();
      for (let i = 0; i < times; i++) await this.run(feeds, ways[name]);
      return (performance.now() - began) / times;
    };
    for (const name of names) await once(name, 2); // the first calls are slower
    // several calls in a row where one takes less than a browser's clock can tell
    const times = {};
    for (const name of names) times[name] = Math.max(1, Math.ceil(least / Math.max(0.05, await once(name, 1))));
    const found = Object.fromEntries(names.map((name) => [name, []]));
    for (let round = 0; round < rounds; round++) {
      if (!(await go(round))) return null;
      const order = round % 2 ? [...names].reverse() : names;
      for (const name of order) found[name].push(await once(name, times[name]));
    }
    return Object.fromEntries(names.map((name) => [name, median(found[name])]));
  }
}

/** float32 [exit] of one number or one for each exit. */
function perExit(thresholds, exits) {
  const values = typeof thresholds === "number" ? Array(exits).fill(thresholds) : thresholds;
  if (values.length !== exits || values.some(Number.isNaN)) {
    throw new Error(`thresholds are ${values}; expected one number, or one for each of ${exits} exits`);
  }
  return Float32Array.from(values);
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
