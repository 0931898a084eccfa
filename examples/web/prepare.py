"""Writes what the page needs: the ONNX file of a run or bundle, its tokenizer, samples to pick, and an index of these.

    python examples/web/prepare.py runs/digits runs/sst2

A run without calibrated policies gets max-prob at half of the plain model's cost. Models that are in the index already
stay, unless one of the same name is written.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import torch

import offramp
from offramp.artefacts import write_atomically
from offramp.cli.opening import Opened, fit_trace, open_target
from offramp.errors import OfframpError
from offramp.preprocess import ImagePreprocess, TextPreprocess

HERE = Path(__file__).parent
TITLES = {"digits": "Handwritten digits", "sst2": "Film reviews"}
SENTENCES = {
    "sst2": (
        "A warm, funny and wonderful film.",
        "A dull and lifeless mess from start to finish.",
        "The actors do what they can with a script that gives them little.",
        "Not the disaster that I had feared, and at times quite moving.",
        "It is hard to say whether the joke is on the film or on us.",
        "Two hours of my life that I want back.",
    )
}
SAMPLES = 12


def write_model(path: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The entry of the index for a run or a bundle, after its files were written to `out`."""
    opened = open_target(path, options.data, "cpu")
    bundle, policy = opened.bundle, chosen(opened, path, options)
    name = (options.name or bundle.title or path.stem).replace("/", "-")
    out.mkdir(parents=True, exist_ok=True)
    file = offramp.export(bundle, out / f"{name}.onnx", policy=policy)
    run = offramp.OnnxFile(file, threads=1)
    fields = run.about["policy"]["fields"]
    entry = {
        "name": name,
        "title": options.title or TITLES.get(name, bundle.title or name),
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "labels": list(run.labels),
        "exits": run.exits,
        "visited": run.about["visited"],
        "costs": run.about.get("costs"),
        "policy": run.about["policy"]["kind"],
        "thresholds": fields["thresholds"],
        "range": list(range_of(run)),
    }
    if isinstance(bundle.preprocess, TextPreprocess):
        return entry | texts(bundle.preprocess, name, out, options.example)
    return entry | images(opened, run, name, out, options.images)


def chosen(opened: Opened, path: Path, options: argparse.Namespace) -> Any:
    """The policy to export: the one named, the default of a bundle or a run, or max-prob at half the cost."""
    bundle = opened.bundle
    if options.policy is not None or bundle.policies or opened.work is None:
        return bundle.choose(options.policy)[0]
    trace = fit_trace(path, bundle.model.exits)
    if trace is None or bundle.costs is None:
        raise SystemExit(f"error: {path} has no policy. Calibrate one: offramp calibrate {path} --policy max-prob")
    found = offramp.calibrate(offramp.MaxProb, trace, bundle.costs, offramp.Budget(fraction=options.fraction))
    print(f"  {found.message}")
    return found.policy


def range_of(run: offramp.OnnxFile) -> tuple[float, float]:
    """The least and the greatest score that the page's slider goes to."""
    policy = run.about["policy"]
    if policy["kind"] == "MaxProb":
        return 1 / len(run.labels), 1.0
    given = policy["fields"]["thresholds"]
    return 0.0, max(1.0, *(2 * value for value in (given if isinstance(given, list) else [given])))


def texts(preprocess: TextPreprocess, name: str, out: Path, examples: list[str] | None) -> dict[str, Any]:
    """The fields of a model of texts, after its tokenizer was written."""
    if len(preprocess.columns) != 1:
        raise SystemExit(f"error: {name} takes {' and '.join(preprocess.columns)}; the page has room for one text.")
    from tokenizers import Tokenizer

    file = out / f"{name}.tokenizer.json"
    write_atomically(file, lambda partial: write(partial, preprocess.tokenizer_json))
    tokenizer = Tokenizer.from_str(preprocess.tokenizer_json)
    tokenizer.no_padding()
    one = tokenizer.encode("a")
    inside = [place for place, special in enumerate(one.special_tokens_mask) if not special]
    return {
        "kind": "text",
        "tokenizer": file.name,
        "tokens": {
            "max_length": preprocess.max_length,
            "names": list(preprocess.names),
            "pad_id": preprocess.pad_id,
            "prefix": one.ids[: inside[0]],
            "suffix": one.ids[inside[-1] + 1 :],
        },
        "samples": list(examples or SENTENCES.get(name, ())),
    }


def images(opened: Opened, run: offramp.OnnxFile, name: str, out: Path, given: list[Path] | None) -> dict[str, Any]:
    """The fields of a model of images, after some of them were written as the network takes them."""
    rows, labels = given_images(opened, given) if given else held_out(opened, name)
    if not isinstance(rows, torch.Tensor) or rows.ndim != 4:
        raise SystemExit(f"error: {name} takes neither one text nor one image, so the page cannot show it.")
    found = run(rows)
    picked = list(range(len(rows))) if given else pick(found.exit, labels)
    samples = [
        {"truth": None if labels is None else run.labels[int(labels[row])], "values": rows[row].flatten().tolist()}
        for row in picked
    ]
    file = out / f"{name}.samples.json"
    write_atomically(file, lambda partial: write(partial, json.dumps(samples)))
    shape = list(rows.shape[1:])
    return {"kind": "image", "input": input_of(out / f"{name}.onnx"), "shape": shape, "samples": file.name}


def input_of(file: Path) -> str:
    """The name of the only input that must be given."""
    return onnx.load(file, load_external_data=False).graph.input[0].name


def given_images(opened: Opened, paths: list[Path]) -> tuple[Any, None]:
    """(rows, no labels) of image files."""
    preprocess = opened.bundle.preprocess
    if not isinstance(preprocess, ImagePreprocess):
        raise SystemExit("error: --images is given, but the model does not say how images are read.")
    made = preprocess.batch([{preprocess.column: str(path)} for path in paths])
    return (made if isinstance(made, torch.Tensor) else next(iter(made.values()))), None


def held_out(opened: Opened, name: str) -> tuple[Any, torch.Tensor | None]:
    """(rows, labels) of images that were not learnt from."""
    if opened.work is not None:
        examples = opened.work.load(opened.work.splits[2], None)
    elif opened.bundle.title == "digits":
        from offramp.demo import digits

        examples = digits()[2]
    else:
        raise SystemExit(f"error: the bundle {name} has no images with it; give some: --images FILE ...")
    batch = examples.batch(torch.arange(min(len(examples), 400)))
    rows = batch.inputs if isinstance(batch.inputs, torch.Tensor) else next(iter(batch.inputs.values()))
    return rows, batch.labels


def pick(exits: torch.Tensor, labels: torch.Tensor | None) -> list[int]:
    """Rows of every exit in turn, of labels that are not there yet where that can be."""
    queues = {int(k): (exits == k).nonzero()[:, 0].tolist() for k in exits.unique()}
    picked: list[int] = []
    while len(picked) < SAMPLES and any(queues.values()):
        for queue in queues.values():
            if not queue or len(picked) == SAMPLES:
                continue
            seen = set() if labels is None else {int(labels[row]) for row in picked}
            new = [row for row in queue if labels is not None and int(labels[row]) not in seen]
            picked.append((new or queue)[0])
            queue.remove(picked[-1])
    return sorted(picked, key=lambda row: (0 if labels is None else int(labels[row]), row))


def write(path: Path, text: str) -> None:
    """Nothing; the text is in the file."""
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Nothing; the files are written, and their sizes printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="+", type=Path, help="a folder of `offramp train` or `offramp bundle create`")
    parser.add_argument("--out", type=Path, default=HERE / "build" / "models", help="where files are written")
    parser.add_argument("--policy", help="the name of a policy of the run or bundle; its default unless given")
    parser.add_argument(
        "--fraction", type=float, default=0.5, help="of the plain model's cost, where none is calibrated"
    )
    parser.add_argument("--name", help="of the model in the index, when one target is given")
    parser.add_argument("--title", help="for the page, when one target is given")
    parser.add_argument("--example", action="append", help="a sentence to pick; may be given several times")
    parser.add_argument("--images", nargs="+", type=Path, help="image files to pick, for a bundle")
    parser.add_argument("--data", type=Path, help="the folder of data sets, for runs of named tasks")
    options = parser.parse_args()
    if len(options.target) > 1 and (options.name or options.title):
        parser.error("--name and --title are for one target")
    torch.set_num_threads(1)
    index = options.out / "index.json"
    models = json.loads(index.read_text(encoding="utf-8"))["models"] if index.is_file() else []
    for path in options.target:
        print(f"{path}: exporting, seconds to a minute ...", flush=True)
        try:
            entry = write_model(path, options.out, options)
        except OfframpError as error:
            sys.exit(f"error: {error}")
        models = sorted([m for m in models if m["name"] != entry["name"]] + [entry], key=lambda m: m["bytes"])
        write_atomically(index, lambda partial, found=models: write(partial, json.dumps({"models": found}, indent=1)))
        for key in ("file", "tokenizer", "samples"):
            if isinstance(entry.get(key), str):
                size = (options.out / entry[key]).stat().st_size
                print(f"  {options.out / entry[key]}: {size / 1e6:.2f} MB")
    print(f"wrote {index}: {', '.join(m['name'] for m in models)}")


if __name__ == "__main__":
    main()
