// What an ONNX file of `offramp export` says of itself, read from its bytes: the JavaScript API of onnxruntime shows no
// metadata. And `thresholds` as an input that can be given: that API knows required inputs only.

/** The fields of one protobuf message: {number, start, end} of its bytes, or {number, value} of a whole number. */
function* fields(bytes, start, end) {
  let at = start;
  const whole = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= end) throw new Error("the file ends too early");
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < end) {
    const tag = whole();
    const [number, wire] = [Math.floor(tag / 8), tag % 8];
    if (wire === 0) {
      yield { number, value: whole() };
      continue;
    }
    const length = wire === 2 ? whole() : { 1: 8, 5: 4 }[wire];
    if (length === undefined || at + length > end) throw new Error("this is no ONNX file, or it is damaged");
    yield { number, start: at, end: at + length };
    at += length;
  }
}

const only = (bytes, part, number) => [...fields(bytes, part.start, part.end)].find((field) => field.number === number);
const text = (bytes, part) => new TextDecoder().decode(bytes.subarray(part?.start ?? 0, part?.end ?? 0));

// Numbers of fields in onnx.proto.
const MODEL = { graph: 7, metadata: 14 };
const GRAPH = { initializer: 5 };
const TENSOR = { name: 8 };
const ENTRY = { key: 1, value: 2 };

/** What the file says of itself: labels, exits, policy, costs. */
export function aboutOf(bytes) {
  for (const field of fields(bytes, 0, bytes.length)) {
    if (field.number !== MODEL.metadata || text(bytes, only(bytes, field, ENTRY.key)) !== "offramp") continue;
    return JSON.parse(text(bytes, only(bytes, field, ENTRY.value)));
  }
  throw new Error("the file was not written by `offramp export`");
}

/** Nothing; in `bytes`, but not on disk, the default of `thresholds` has another name, so that `thresholds` must be
 * given, and can be. */
export function requireThresholds(bytes) {
  const graph = only(bytes, { start: 0, end: bytes.length }, MODEL.graph);
  for (const field of fields(bytes, graph.start, graph.end)) {
    if (field.number !== GRAPH.initializer) continue;
    const name = only(bytes, field, TENSOR.name);
    if (text(bytes, name) === "thresholds") bytes[name.end - 1] = "_".charCodeAt(0);
  }
}
