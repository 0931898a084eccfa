"""A bundle of a trained decoder with the policy whose promise was kept, for `offramp caption` and `offramp generate`.

    python -m experiments.tokens.bundle scenes joint-exits --data DIR    # runs/tokens/scenes-joint-exits-0.offramp
    python -m experiments.tokens.scenes --data DIR --out runs/tokens/pictures
    offramp caption runs/tokens/pictures/*.png --bundle runs/tokens/scenes-joint-exits-0.offramp --html captions.html

What was promised, and measured, is read from results/tokens/speed-TASK-VARIANT.json.
"""

import torch
from experiments.tokens.networks import IMAGES, tokenizer_of
from experiments.tokens.speed import CERTIFIED
from experiments.tokens.train import WITH_EXITS, folder_of, model_of, parser_of
from tokenizers.processors import TemplateProcessing

from offramp.artefacts import read_json
from offramp.generation import Draft, TokenBundle, TokenPolicy
from offramp.policies import from_dict


def main() -> None:
    parser = parser_of(__doc__, variants=WITH_EXITS)
    parser.add_argument("--policy", choices=CERTIFIED, default="stopping")
    options = parser.parse_args()
    task, variant = options.task, options.variant
    path = options.out / f"speed-{task}-{variant}.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: python -m experiments.tokens.speed {task} {variant} --data DIR")
    found = read_json(path)
    if found["seed"] != options.seed:
        raise SystemExit(f"{path} is of seed {found['seed']}, whose policies promise nothing for seed {options.seed}")
    torch.set_num_threads(options.threads)
    (row,) = (each for each in found["policies"] if each["family"] == options.policy)
    if row["policy"] is None:
        raise SystemExit(f"no {options.policy} policy kept its promise on {task}; choose another of {CERTIFIED}")
    model = model_of(task, variant, options.seed, options.data, options.runs)
    tokenizer = tokenizer_of(task, options.data, options.runs / "cache")
    if task not in IMAGES:  # texts were learned behind a begin token
        begin = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin[0]} $A", pair=None, special_tokens=[begin]
        )
    draft = found["lossless"]["draft"] if found["lossless"]["pays"] else None
    bundle = TokenBundle(
        model, tokenizer, TokenPolicy(from_dict(row["policy"])),
        IMAGES.get(task), None if draft is None else Draft(*draft),
        {name: row[name] for name in ("family", "worth", "drop", "low", "high", "cost")}
        | {name: found[name] for name in ("share", "rise", "delta", "certify", "test", "machine")},
    )  # fmt: skip
    folder = folder_of(task, variant, options.seed, options.runs)
    print(f"wrote {bundle.save(folder.with_name(f'{folder.name}.offramp'))}")


if __name__ == "__main__":
    main()
