"""Runs a model of prepare.py with onnxruntime, numpy and tokenizers alone, and prints JSON; neither torch nor Offramp.

python python_only.py build/models sst2 --text "A film that stays with you."
python python_only.py build/models digits --sample 3 --thresholds 1e6
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime

NEVER, ALWAYS = 1e6, -1e6


class Exits:
    """A file with exits inside, and how its rows become tensors."""

    def __init__(self, folder: Path, name: str) -> None:
        models = json.loads((folder / "index.json").read_text(encoding="utf-8"))["models"]
        named = {model["name"]: model for model in models}
        if name not in named:
            raise SystemExit(f"error: {folder} has no model {name}; there are {', '.join(named)}")
        self.entry = named[name]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = str(folder / self.entry["file"])
        self.runner = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.about = json.loads(self.runner.get_modelmeta().custom_metadata_map["offramp"])
        self.tokens = self.entry.get("tokens")
        if self.tokens:
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(str(folder / self.entry["tokenizer"]))
            self.tokenizer.no_padding()
            self.tokenizer.enable_truncation(self.tokens["max_length"])

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text."""
        return [found.ids for found in self.tokenizer.encode_batch(texts)]

    def feeds(self, rows: list[Any]) -> dict[str, np.ndarray]:
        """Tensors of some rows: texts, or lists of numbers as the network takes them."""
        if not self.tokens:
            values = np.asarray(rows, dtype=np.float32).reshape(len(rows), *self.entry["shape"])
            return {self.entry["input"]: values}
        lists = self.ids(rows)
        shape = (len(rows), max(2, *map(len, lists)) if lists else 2)
        made = {name: np.zeros(shape, dtype=np.int64) for name in self.tokens["names"]}
        made["input_ids"] += self.tokens["pad_id"]
        for place, ids in enumerate(lists):
            made["input_ids"][place, : len(ids)] = ids
            if "attention_mask" in made:
                made["attention_mask"][place, : len(ids)] = 1
        return made

    def run(self, feeds: dict[str, np.ndarray], thresholds: Any = None) -> list[np.ndarray]:
        """What onnxruntime answers; thresholds that are None stay those in the file."""
        given = {}
        if thresholds is not None:
            exits = self.about["exits"]
            given["thresholds"] = np.broadcast_to(np.asarray(thresholds, np.float32), (exits,)).copy()
        return self.runner.run(None, {**feeds, **given})

    def answer(self, rows: list[Any], thresholds: Any = None, batch: int | None = None) -> list[dict[str, Any]]:
        """One decision for each row, `batch` rows at a time."""
        answers, batch = [], batch or max(1, len(rows))
        for begin in range(0, len(rows), batch):
            found = self.run(self.feeds(rows[begin : begin + batch]), thresholds)
            for label, probabilities, exit_, score in zip(*found, strict=True):
                answers.append(
                    {
                        "label": int(label),
                        "name": self.about["labels"][label],
                        "probability": float(probabilities[label]),
                        "exit": int(exit_),
                        "score": float(score),
                    }
                )
        return answers

    def time(self, row: Any, rounds: int) -> dict[str, float]:
        """Milliseconds of one row to every exit and as calibrated: medians over rounds in which they take turns."""
        exits, feeds = self.about["exits"], self.feeds([row])
        ways: dict[str, Any] = {
            f"exit {k}": [ALWAYS if exit_ == k else NEVER for exit_ in range(exits)] for k in self.about["visited"]
        }
        ways["calibrated"] = None
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 2):
            for name in reversed(ways) if turn % 2 else ways:
                began = time.perf_counter()
                self.run(feeds, ways[name])
                if turn >= 2:
                    found[name].append((time.perf_counter() - began) * 1000)
        return {name: median(values) for name, values in found.items()}


def rows_of(folder: Path, entry: dict[str, Any], options: argparse.Namespace) -> list[Any]:
    """Rows as they are: a JSON list in a file, the texts given, or sample images by number."""
    if options.rows:
        return json.loads(options.rows.read_text(encoding="utf-8"))
    if options.text:
        return options.text
    if entry.get("tokens"):
        return entry["samples"]
    samples = json.loads((folder / entry["samples"]).read_text(encoding="utf-8"))
    return [row["values"] for row in ([samples[number] for number in options.sample] if options.sample else samples)]


def main() -> None:
    """Nothing; answers are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that prepare.py wrote")
    parser.add_argument("name", help="of a model in it")
    parser.add_argument("--text", action="append", help="a text; may be given several times")
    parser.add_argument("--sample", action="append", type=int, help="the number of a sample image")
    parser.add_argument("--rows", type=Path, help="a JSON list of texts, or of lists of numbers")
    parser.add_argument("--batch", type=int, help="rows at a time; all unless given")
    parser.add_argument("--thresholds", help="one number, or one for each exit with commas between")
    parser.add_argument("--ids", action="store_true", help="print token ids, too")
    parser.add_argument("--time", type=int, metavar="ROUNDS", help="print the time to every exit for each row, too")
    options = parser.parse_args()
    model = Exits(options.folder, options.name)
    rows = rows_of(options.folder, model.entry, options)
    thresholds = [float(word) for word in options.thresholds.split(",")] if options.thresholds else None
    found: dict[str, Any] = {"engine": f"onnxruntime {onnxruntime.__version__}", "model": options.name}
    if options.ids:
        found["ids"] = model.ids(rows)
    found["rows"] = model.answer(rows, thresholds, options.batch)
    if options.time:
        found["ms"] = [model.time(row, options.time) for row in rows]
    found["torch"] = "torch" in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()
