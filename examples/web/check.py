"""Whether Python, Node and the page in a headless Chromium decide alike, and whether the page works; `make test-web`.

    python examples/web/check.py                       # needs runs/digits, npm packages and Chromium
    python examples/web/check.py --data DATA           # sentences of DATA/sst2/validation.parquet, too
    python examples/web/check.py --data DATA --time    # measure instead

Rows that come within 1e-4 of a threshold are counted apart: rounding may decide them.
"""

import argparse
import functools
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from python_only import ALWAYS, NEVER, Exits

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = HERE / "build"
MODELS = BUILD / "models"
NEAR = 1e-4
BATCHES = (1, 7, 32)
WORDS = re.findall(
    r"\S+", "a film that stays with you dull slow warm funny not very quite never moving plot, actors' and but ."
)
#: Texts that tokenizers stumble over.
ODD = [
    "",
    " ",
    "\t\n\r",
    "[SEP] brackets [MASK] of their [CLS] own [PAD] [UNK]",
    "ΟΔΥΣΣΕΥΣ και Σίσυφος",
    "İstanbul ẞ ß ﬁ ½ ① Ⅷ",
    "漢字と仮名, 𠀀𠀁 한국어",
    "e\u0301te\u0301 naïve café façade",
    "😀👨‍👩‍👧 🇩🇪 ❤️",
    "zero\u200bwidth soft\u00adhyphen \ufeffmark",
    "x" * 100,
    "x" * 101 + " y",
    "don't — “quoted” … l’été",
    "नमस्ते ไทย ภาษา السَّلامُ עִברִית",
    "$^`~+<=>|a_b-c/d\\e {}[]()*&%#@!",
    "\u2028line\u2029paragraph\x85next\x0bvertical\x0cfeed\x00null\x07bell",
    "𝕏𝟙 ＦＵＬＬ　ｗｉｄｔｈ ｶﾞ",
    "word " * 126,
    "word " * 127,
    "a very long one " * 300,
    "unaffable-ness, " * 100,
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def chromium() -> str:
    """The path of a Chromium that is installed."""
    named = os.environ.get("CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise SystemExit("error: Chromium is not here. Install it (apt-get install chromium), or set CHROMIUM=PATH.")
    return found


def browse(what: str, given: Any, base: str) -> Any:
    """What browser.mjs prints."""
    words = ["node", str(HERE / "browser.mjs"), what, base, chromium()]
    done = subprocess.run(words, input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"browser.mjs: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def command(words: list[str], **options: Any) -> dict[str, Any]:
    """What node.mjs or python_only.py prints; an option that is True takes no value."""
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def in_node(name: str, **options: Any) -> dict[str, Any]:
    """What node.mjs says."""
    return command(["node", str(HERE / "node.mjs"), str(MODELS), name], **options)


def in_python(name: str, **options: Any) -> dict[str, Any]:
    """What python_only.py says."""
    return command([sys.executable, str(HERE / "python_only.py"), str(MODELS), name], **options)


def sentences(data: Path | None, count: int | None = None) -> list[str]:
    """Sentences of SST-2 where they are there, otherwise random ones."""
    path = None if data is None else data / "sst2" / "validation.parquet"
    if path is not None and path.is_file():
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path)["sentence"].to_pylist()[:count]
    dice = random.Random(0)
    return [" ".join(dice.choices(WORDS, k=dice.randint(2, 40))) for _ in range(count or 400)]


def small_text(folder: Path) -> Path:
    """A bundle of a small BERT with random weights and MiniLM's tokenizer, whose rows leave at different exits."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    import offramp
    from offramp.preprocess import TextPreprocess
    from offramp.tasks import minilm_folder

    torch.manual_seed(0)
    preprocess = TextPreprocess.of(AutoTokenizer.from_pretrained(minilm_folder()), ("sentence",), 128)
    config = BertConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
    network = BertForSequenceClassification(config).eval()
    rows = preprocess.batch([{"sentence": text} for text in sentences(None, 200)])
    at = tuple(f"bert.encoder.layer.{k}" for k in range(3))
    model = offramp.attach(network, at=at, head="mean", example={name: x[:3] for name, x in rows.items()}).eval()
    ends = [x for x in model.modules() if isinstance(x, torch.nn.Linear) and x.out_features == 2]
    with torch.no_grad():
        for end in ends:  # logits of random networks are all alike, so that rounding would decide
            seen: list[torch.Tensor] = []
            hook = end.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            model(rows)
            hook.remove()
            apart = seen[0][:, 1] - seen[0][:, 0]
            end.bias[1] -= apart.mean()
            end.weight.mul_(1.5 / apart.std())
            end.bias.mul_(1.5 / apart.std())
        surest = torch.softmax(model(rows), -1).amax(-1)
    policy = offramp.MaxProb(tuple(surest.quantile(0.7, dim=1).tolist()))
    bundle = offramp.Bundle(
        model,
        labels=("negative", "positive"),
        policies={"max-prob": offramp.Choice(policy)},
        preprocess=preprocess,
        title="small-text",
    )
    return bundle.save(folder / "small-text.offramp")


def prepare(*words: str) -> None:
    """Nothing; prepare.py has run."""
    subprocess.run([sys.executable, str(HERE / "prepare.py"), *words], check=True)


def prepared(scratch: Path, runs: Path, data: Path | None) -> tuple[str, str]:
    """(the name of the text model, of the image model), after those that are not there were made."""
    subprocess.run(["node", str(HERE / "build.mjs")], check=True)
    index = MODELS / "index.json"
    there = {m["name"] for m in json.loads(index.read_text())["models"]} if index.is_file() else set()
    if not (runs / "digits" / "run.json").is_file() and "digits" not in there:
        offramp = Path(sys.executable).parent / "offramp"
        subprocess.run([offramp, "quickstart", "--out", str(runs / "digits")], check=True)
    if "digits" not in there:
        prepare(str(runs / "digits"))
    text = "sst2" if (runs / "sst2" / "run.json").is_file() else "small-text"
    if text not in there:
        target = runs / "sst2" if text == "sst2" else small_text(scratch)
        samples = [word for sentence in sentences(None, 4) for word in ("--example", sentence)]
        samples += ["--title", "Random weights"]
        prepare(str(target), *(samples if text != "sst2" else []), *(["--data", str(data)] if data else []))
    return text, "digits"


def scores_of(model: Exits, rows: list[Any]) -> np.ndarray:
    """What every exit but the last would say: scores [exit row], NaN where the policy does not visit one."""
    exits = model.about["exits"]
    found = np.full((exits - 1, len(rows)), np.nan)
    for k in [k for k in model.about["visited"] if k < exits - 1]:
        only = [ALWAYS if exit_ == k else NEVER for exit_ in range(exits)]
        found[k] = [answer["score"] for answer in model.answer(rows, only, 32)]
    return found


def near(scores: np.ndarray, thresholds: Any, left: list[int]) -> np.ndarray:
    """Which rows come within `NEAR` of a threshold at an exit that they reach."""
    exits = np.arange(len(scores))[:, None]
    limits = np.broadcast_to(np.float32(thresholds), (len(scores) + 1,))[:-1, None]
    return ((np.abs(scores - limits) < NEAR) & (exits <= np.array(left)[None])).any(axis=0)


def decisions(name: str, rows: list[Any], base: str, file: Path) -> list[str]:
    """What is wrong; counts are printed. Python is what the others are compared with."""
    file.write_text(json.dumps(rows))
    model = Exits(MODELS, name)
    calibrated = np.broadcast_to(np.float32(model.about["policy"]["fields"]["thresholds"]), (model.about["exits"],))
    other = [round(float(value) * 0.97, 6) for value in calibrated]
    cases: list[dict[str, Any]] = [{"batch": batch, "thresholds": None, "as_is": False} for batch in BATCHES]
    cases += [{"batch": batch, "thresholds": other, "as_is": False} for batch in (1, 32)]
    cases += [{"batch": 32, "thresholds": NEVER, "as_is": False}, {"batch": 7, "thresholds": None, "as_is": True}]
    jobs = [
        {
            "what": "answer",
            "name": name,
            "asIs": case["as_is"],
            "rows": rows,
            **{k: case[k] for k in case if k != "as_is"},
        }
        for case in cases
    ]
    browser = browse("rows", jobs, base)
    scores = scores_of(model, rows)
    wrong, said = [], {}
    for case, in_browser in zip(cases, browser["found"], strict=True):
        thresholds = case["thresholds"]
        written = ",".join(map(str, thresholds)) if isinstance(thresholds, list) else thresholds
        ours = in_python(name, rows=file, batch=case["batch"], thresholds=written)
        if ours["torch"]:
            wrong.append("python_only.py loaded torch")
        limits = calibrated if thresholds is None else thresholds
        close = near(scores, limits, [answer["exit"] for answer in ours["rows"]])
        node = in_node(name, rows=file, batch=case["batch"], thresholds=written, as_is=case["as_is"])
        if close.mean() > 0.05:
            wrong.append(f"{name} {case}: {int(close.sum())} rows are near a threshold, so that little is compared")
        counts = []
        for engine, theirs in ((node["engine"], node["rows"]), (browser["engine"], in_browser)):
            apart = np.array(
                [(a["label"], a["exit"]) != (b["label"], b["exit"]) for a, b in zip(ours["rows"], theirs, strict=True)]
            )
            same = [(a, b) for a, b, off in zip(ours["rows"], theirs, apart, strict=True) if not off]
            furthest = max(abs(a["probability"] - b["probability"]) for a, b in same)
            said[engine] = max(said.get(engine, 0.0), furthest)
            counts.append(f"{engine}: {int((apart & ~close).sum())} differ (near: {int((apart & close).sum())})")
            if (apart & ~close).any() or furthest > 1e-3:
                wrong.append(f"{name} {case}: {engine} decides otherwise, or probabilities are {furthest:.2g} apart")
        used = np.bincount([answer["exit"] for answer in ours["rows"]], minlength=model.about["exits"])
        kind = (
            "never" if thresholds == NEVER else "given" if thresholds else "as it is" if case["as_is"] else "calibrated"
        )
        print(f"  {name}, batch {case['batch']}, thresholds {kind}: {len(rows)} rows, {int(close.sum())} near; "
              f"{'; '.join(counts)}; left at {used.tolist()}", flush=True)  # fmt: skip
    print(f"  {name}: probabilities differ by {', '.join(f'{v:.1g} in {e}' for e, v in said.items())} at most")
    return wrong


def tokens(name: str, rows: list[str], base: str, file: Path) -> list[str]:
    """What is wrong with token ids."""
    file.write_text(json.dumps(rows))
    ours = Exits(MODELS, name).ids(rows)
    node = in_node(name, rows=file, ids=True, batch=32)["ids"]
    page = [found["ids"] for found in browse("rows", [{"what": "ids", "name": name, "rows": rows}], base)["found"][0]]
    wrong = [text for text, *ids in zip(rows, ours, node, page, strict=True) if any(other != ids[0] for other in ids)]
    print(f"  {name}: {len(rows)} texts tokenised, {len(wrong)} otherwise than in Python")
    return [f"{name}: other tokens for {text[:60]!r}" for text in wrong]


def visit(text: str, image: str, base: str, data: Path | None) -> list[str]:
    """What is wrong with the page."""
    shots = BUILD / "shots"
    shots.mkdir(exist_ok=True)
    sentence = "Not the disaster that I had feared, and at times quite moving."
    plan = {"text": text, "image": image, "sentence": sentence, "picture": 3, "shots": str(shots)}
    seen = browse("page", plan, base)
    shutil.move(shots / "text-wide-light.png", BUILD / "screenshot.png")
    shutil.copy(BUILD / "screenshot.png", shots / "text-wide-light.png")
    wrong = [f"the page: {fault}" for fault in seen["faults"]]
    wrong += [f"the page asks elsewhere: {url}" for url in seen["away"]]
    expected = {
        "text": in_python(text, text=sentence)["rows"][0],
        "long": in_python(text, text="long " * 900)["rows"][0],
        "image": in_python(image, sample=3)["rows"][0],
        "to_the_end": in_python(text, text=sentence, thresholds="1.0")["rows"][0],
    }
    for what, answer in expected.items():
        if (seen[what]["label"], seen[what]["exit"]) != (answer["name"], answer["exit"]):
            wrong.append(f"the page shows {seen[what]} for {what}; expected {answer}")
    print(f"  sentence: {seen['text']}\n  digit: {seen['image']}\n  long: {seen['tokens']}")
    for what, wide in seen.items():
        if what.startswith(("text ", "image ")) and wide:
            wrong.append(f"the page is {wide} pixels too wide: {what}")
    if "cut" not in seen["tokens"] or "Type a sentence" not in seen["empty"]:
        wrong.append(f"the page says {seen['tokens']!r} and {seen['empty']!r}")
    for what, line in seen["errors"].items():
        print(f"  {what}: {line}")
        if line == "nothing" or "\n" in line:
            wrong.append(f"no clear line for: {what}")
    print(f"  pictures of the page: {BUILD / 'screenshot.png'}, {shots}")
    return wrong


def timed(name: str, rows: list[Any], base: str, file: Path, rounds: int) -> None:
    """Nothing; the milliseconds to every exit are printed, and of a file without exits where there is one."""
    file.write_text(json.dumps(rows))
    there = {model["name"] for model in json.loads((MODELS / "index.json").read_text())["models"]}
    names = [each for each in (name, f"{name}-plain") if each in there]
    engines: dict[str, dict[str, list[list[float]]]] = {}
    for turn in range(3):
        for each in names if turn % 2 else reversed(names):
            browser = browse("rows", [{"what": "time", "name": each, "rows": rows, "rounds": rounds}], base)
            found = [(browser["engine"], browser["found"][0])]
            for run in (in_node, in_python):
                told = run(each, rows=file, batch=1, time=rounds)
                found.append((told["engine"], told["ms"]))
            for engine, times in found:
                for way in times[0] if each == name else ("calibrated",):
                    key = way if each == name else "plain"
                    engines.setdefault(engine, {}).setdefault(key, []).append([row[way] for row in times])
    last = f"exit {Exits(MODELS, name).about['exits'] - 1}"
    for engine, ways in engines.items():
        print(f"{name} in {engine}, {len(rows)} rows at batch 1, one thread; full depth is {last}")
        rowwise = {way: [median(values) for values in zip(*turns, strict=True)] for way, turns in ways.items()}
        for way, values in rowwise.items():
            against = median(full / one for full, one in zip(rowwise[last], values, strict=True))
            print(
                f"  {way}: median {median(values):.2f} ms, mean {fmean(values):.2f} ms; full depth takes "
                f"{against:.2f} times as long by row, {fmean(rowwise[last]) / fmean(values):.2f} over all"
            )


def main() -> None:
    """Nothing; what was compared is printed, and what is wrong ends with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="the folder of runs")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("OFFRAMP_DATA") or None, help="the folder of data sets"
    )
    parser.add_argument("--time", action="store_true", help="measure instead of comparing")
    options = parser.parse_args()
    chromium()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        text, image = prepared(Path(folder), options.runs, options.data)
        from offramp.demo import digits

        images = digits()[2].inputs.flatten(1).tolist()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(BUILD)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base, file = f"http://127.0.0.1:{server.server_port}/", Path(folder) / "rows.json"
        if options.time:
            timed(image, images[:24], base, file, 9)
            timed(text, sentences(options.data)[:24], base, file, 9)
            return
        print("tokens:")
        wrong += tokens(text, [*sentences(options.data), *ODD], base, file)
        print("decisions:")
        wrong += decisions(image, images[:400], base, file)
        wrong += decisions(text, [*sentences(options.data, 400), *ODD], base, file)
        print("the page:")
        wrong += visit(text, image, base, options.data)
    if wrong:
        sys.exit("error: " + "\nerror: ".join(wrong[:20]))
    print("Python, Node and the page decide alike")


if __name__ == "__main__":
    main()
