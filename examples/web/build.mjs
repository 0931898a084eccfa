// Copies the page and what it needs of node_modules into build/, which can be put on any static host.

import { copyFile, mkdir, stat } from "node:fs/promises";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const ours = ["index.html", "style.css", "page.mjs", "client.mjs", "worker.mjs", "offramp.mjs", "file.mjs"];
const theirs = [
  "@huggingface/tokenizers/dist/tokenizers.min.mjs",
  "@huggingface/tokenizers/LICENSE",
  "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
];

await mkdir(join(here, "build", "vendor"), { recursive: true });
let bytes = 0;
const copy = async (from, to) => {
  await copyFile(from, to);
  bytes += (await stat(to)).size;
};
for (const file of ours) await copy(join(here, file), join(here, "build", file));
for (const file of theirs) {
  const name = basename(file) === "LICENSE" ? "tokenizers.LICENSE" : basename(file);
  await copy(join(here, "node_modules", file), join(here, "build", "vendor", name));
}
console.log(`wrote ${join(here, "build")}: ${(bytes / 1e6).toFixed(1)} MB without models`);
