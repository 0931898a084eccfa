"""A table of texts: train MiniLM with exits on it, calibrate, bundle, and answer rows.

python examples/text_table.py reviews.csv            (without a file, a small one is made up)
"""

import csv
import random
import sys
from pathlib import Path

import offramp
from offramp import Bundle, Choice
from offramp.own import Own, prepare

WORDS = {"good": ["wonderful", "great", "lovely", "superb"], "bad": ["awful", "dreadful", "boring", "poor"]}


def small_table(path: Path, rows: int = 160) -> Path:
    """The path, after made-up reviews were written to it."""
    dice = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["review", "verdict"])
        for _ in range(rows):
            verdict = dice.choice(["good", "bad"])
            words = [
                *dice.choices(["the", "film", "has", "a", "plot", "and", "some", "music"], k=6),
                *dice.choices(WORDS[verdict], k=2),
            ]
            table.writerow([" ".join(dice.sample(words, len(words))), verdict])
    return path


def main(table: Path, folder: Path) -> None:
    """Nothing; a bundle is in the folder."""
    made = prepare(Own(data=str(table), model="minilm", epochs=2, every=2))
    for why in made.columns.why:
        print(why)
    train, calibrate, test = (made.job.load(split, None) for split in made.job.splits)
    print(offramp.train(made.model, train, recipe=made.job.recipe, validation=calibrate, progress=False).accuracy)
    costs = offramp.measure(made.model, made.model.example, batch_sizes=(1, 8), rounds=5)
    trace = offramp.record(made.model, calibrate, progress=False)
    found = offramp.calibrate(offramp.MaxProb, trace, costs, offramp.MaxDrop(0.02, "macro-f1"))
    print(found.message)
    unseen = offramp.simulate(found.policy, offramp.record(made.model, test, progress=False), costs)
    print(f"on rows never seen: {unseen.accuracy:.3f} right at {unseen.cost:.2f} of the cost (counted)")
    bundle = Bundle(
        made.model, labels=made.own.classes, policies={"careful": Choice(found.policy, found)}, costs=costs,
        preprocess=made.preprocess, title=table.name,
    )  # fmt: skip
    path = bundle.save(folder / "reviews.offramp")
    for answer in Bundle.load(path).predict([{"review": "a superb plot"}, {"review": "dreadful music"}]):
        print(answer)


if __name__ == "__main__":
    here = Path.cwd()
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else small_table(here / "reviews.csv"), here)
