"""What a stranger might bring: small files of texts, numbers and images, small networks, transformers folders."""

import csv
import json
import random
from pathlib import Path

import torch

WORDS = [
    "the",
    "film",
    "was",
    "a",
    "story",
    "of",
    "people",
    "and",
    "time",
    "in",
    "town",
    "lovely",
    "great",
    "fine",
    "warm",
    "awful",
    "dull",
    "poor",
    "weak",
]
GOOD, BAD = WORDS[11:15], WORDS[15:]

MODULE = """
import sys
from torch import nn

print("a word on standard output")

def mlp(classes):
    return nn.Sequential(
        nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes)
    )

def conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2),
    )

class Words(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.table = nn.Embedding(100, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)])
        self.out = nn.Linear(16, classes)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.out((x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True))

def number():
    return 3

def fails():
    raise KeyError("weights.pt")

def leaves():
    sys.exit(4)
"""


def reviews(path: Path, rows: int = 200, seed: int = 0) -> Path:
    """A CSV with id, review and sentiment: a text is positive when it has a good word."""
    draw = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["id", "review", "sentiment"])
        for row in range(rows):
            good = draw.random() < 0.6
            words = [draw.choice(WORDS[:11]) for _ in range(draw.randint(2, 8))] + [draw.choice(GOOD if good else BAD)]
            write.writerow([row, " ".join(words) + f" {row}", "positive" if good else "negative"])
    return path


def numbers(path: Path, rows: int = 200) -> Path:
    """A CSV with a, b, c and class: yes when a + b is above 0."""
    draw = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["a", "b", "c", "class"])
        for _ in range(rows):
            values = [draw.gauss(0, 1) for _ in range(3)]
            write.writerow([*values, "yes" if values[0] + values[1] > 0 else "no"])
    return path


def pictures(folder: Path, each: int = 20) -> Path:
    """Folders red and blue of small images of different sizes."""
    from PIL import Image

    draw = random.Random(0)
    for name, colour in {"red": (200, 30, 30), "blue": (30, 30, 200)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixel = tuple(max(0, min(255, value + draw.randint(-30, 30))) for value in colour)
            Image.new("RGB", (20 + draw.randint(0, 9), 24), pixel).save(folder / name / f"{number:02d}.png")
    return folder


def tokenizer():
    """A fast tokenizer that knows the words of `reviews`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names)


def bert(folder: Path, *, labels: tuple[str, ...] = (), kind: str = "bert") -> Path:
    """A transformers folder with a random small BERT or DistilBERT classifier and its tokenizer."""
    import transformers

    named = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=24, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, **named,
        )  # fmt: skip
    else:
        config = transformers.DistilBertConfig(
            vocab_size=24, dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=64, **named
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """A transformers folder with a random small ViT classifier and its image processor's values."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    values = {"do_resize": True, "size": {"height": 16, "width": 16}, "do_rescale": True, "rescale_factor": 1 / 255,
              "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder
