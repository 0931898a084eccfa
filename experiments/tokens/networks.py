"""The decoders of the experiments with tokens, their tokenizers, and the rows they learn from and are judged on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experiments.tokens.scenes import NAMES, scenes
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.artefacts import write_atomically
from offramp.captions import Captioned, load_captions
from offramp.generation import TokenExits, attach_tokens, resnet_encoder
from offramp.preprocess import ImagePreprocess
from offramp.tokenrows import TokenRows

TASKS = ("scenes", "flickr8k", "coco")
PICTURED = ("scenes", "flickr8k")
WIDTH, LAYERS, HEADS, ROOM = 256, 12, 4, 64
BEGIN, END = "<s>", "</s>"
WORDS = (BEGIN, END, "a", "an", "above", "below", "left", "right", "of", "and", ",", "there", "is", "you", "can", "see")
PIECES = {"coco": 4000, "flickr8k": 2000}  # of the tokenizers
NORMAL: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "name": "pixel_values"}
IMAGES = {"scenes": ImagePreprocess((64, 64), fit="stretch", **NORMAL),
          "flickr8k": ImagePreprocess((128, 128), fit="stretch", **NORMAL)}  # fmt: skip
GRID = {"scenes": 4, "flickr8k": 8}  # cells of the encoder's map, a side
#: layers from 0 with exits where all learn from the start: heads are small beside a layer for scenes alone
JOINT_AT = {"scenes": (0, 1, 2, 3, 5, 7), "coco": (3, 5), "flickr8k": (3, 5)}
COCO_SHARES = (("train", 0.9), ("calibrate", 0.03), ("certify", 0.035), ("test", 0.035))


@dataclass(frozen=True)
class Rows:
    """One split.

    Args:
        rows: a text each: for training the first two captions of every scene and all of every photograph, elsewhere
            the first.
        references: all captions of each image, for scores; of COCO, the text itself.
        images: uint8.
    """

    rows: TokenRows
    references: list[list[str]]
    images: Tensor | None = None


def tokenizer_of(task: str, data: Path, cache: Path) -> Any:
    """A fast tokenizer of transformers: whole words for scenes, else pieces learned from the training captions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    path = cache / f"{task}-tokenizer.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if task == "scenes":
            # the sign marks a word with a space before it
            vocabulary = [word if i < 2 else f"\u2581{word}" for i, word in enumerate((*WORDS, *NAMES))]
            made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=END))
            made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        else:
            made = Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            made.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(vocab_size=PIECES[task], special_tokens=[BEGIN, END], show_progress=False)
            said = coco(data, "train") if task == "coco" else flickr8k(data, "train").captions
            made.train_from_iterator([text for group in said for text in group], trainer)
        write_atomically(path, lambda partial: made.save(str(partial)))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=BEGIN, eos_token=END)


def coco(data: Path, split: str) -> list[list[str]]:
    """COCO's captions of a split, by image: an image is in one split, by a checksum of its number."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(data / "coco_captions_val2017.parquet").to_pydict()
    found: dict[int, list[str]] = {}
    for image, text in zip(table["image_id"], table["caption"], strict=True):
        place, low = int(hashlib.sha256(str(image).encode()).hexdigest()[:8], 16) / 16**8, 0.0
        for name, share in COCO_SHARES:
            if low <= place < low + share and name == split:
                found.setdefault(image, []).append(" ".join(text.split()))
            low += share
    return [found[image] for image in sorted(found)]


def flickr8k(data: Path, split: str) -> Captioned:
    """Photographs of a split with their captions in lower case; of the official validation split, the first half is for
    calibration."""
    if split in ("train", "test"):
        found = load_captions(data / "flickr8k_1k", split)
    else:
        whole = load_captions(data / "flickr8k_1k", "validation")
        half = len(whole) // 2
        part = slice(half) if split == "calibrate" else slice(half, None)
        found = Captioned(whole.images[part], whole.captions[part])
    return Captioned(found.images, tuple(tuple(text.lower().strip(" .") for text in each) for each in found.captions))


def rows_of(task: str, split: str, data: Path, cache: Path, *, limit: int | None = None) -> Rows:
    """The rows of a split, with an encoder's states computed once and kept in `cache`."""
    tokenizer = tokenizer_of(task, data, cache)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return [begin, *tokenizer(text.replace(",", " ,") if task == "scenes" else text)["input_ids"][: ROOM - 2], end]

    if task == "coco":
        groups = coco(data, split)[:limit]
        texts = [text for group in groups for text in group]
        return Rows(TokenRows([ids(text) for text in texts], pad=end), [[text] for text in texts])
    images, captions = _pictured(task, split, data, limit)
    encoded = _encoded(task, images, data, cache / f"{task}-{split}-{len(images)}.safetensors")
    most = {("scenes", "train"): 2, ("flickr8k", "train"): None}.get((task, split), 1)
    texts = [(text, i) for i, said in enumerate(captions) for text in said[:most]]
    rows = TokenRows(
        [ids(text) for text, _ in texts], pad=end, encoded=encoded, image=torch.tensor([i for _, i in texts])
    )
    return Rows(rows, captions, images)


def _pictured(task: str, split: str, data: Path, limit: int | None) -> tuple[Tensor, list[list[str]]]:
    """(uint8 images, captions of each)."""
    if task == "scenes":
        made = scenes(split, data, limit)
        return made.images, made.captions
    found = flickr8k(data, split)
    part = Captioned(found.images[:limit], found.captions[:limit])
    return part.pixels(IMAGES[task]), [list(each) for each in part.captions]


def encoder_of(task: str, data: Path) -> Any:
    """ResNet-20 with the public CIFAR-10 weights, which stay as they are."""
    config, model = resnet_encoder()
    made = model(config(blocks=3, grid=GRID[task])).eval()
    saved = torch.load(data / "checkpoints" / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    state = saved.get("state_dict", saved)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    made.network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("linear")})
    return made


def _encoded(task: str, images: Tensor, data: Path, path: Path) -> Tensor:
    if path.exists():
        return load_file(path)["encoded"]
    encoder, found = encoder_of(task, data), []
    with torch.inference_mode():
        for part in images.split(64):
            pixels = IMAGES[task].normalise(part)["pixel_values"]
            found.append(encoder(pixels).last_hidden_state)
    encoded = torch.cat(found).clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: save_file({"encoded": encoded}, partial))
    return encoded


def network_of(task: str, layers: int, data: Path, vocabulary: int, seed: int) -> Any:
    """A GPT-2 of this depth with random weights, behind the encoder for images."""
    from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drop = {"scenes": 0.0, "flickr8k": 0.2}.get(task, 0.1)
        config = GPT2Config(
            n_positions=ROOM, n_embd=WIDTH, n_layer=layers, n_head=HEADS, vocab_size=vocabulary, bos_token_id=0,
            eos_token_id=1, pad_token_id=1, resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=drop,
            add_cross_attention=task in PICTURED, is_decoder=True,
        )  # fmt: skip
        decoder = GPT2LMHeadModel(config)
        if task == "coco":
            return decoder
        return VisionEncoderDecoderModel(encoder=encoder_of(task, data), decoder=decoder)


def exits_of(network: Any, task: str, head: str | None = None, *, joint: bool = False) -> TokenExits:
    """Exits of twelve layers behind every second one, five and the last; where all learn from the start, at the layers
    of JOINT_AT, with whole heads."""
    layers = len(getattr(network, "decoder", network).transformer.h)
    at = () if layers != LAYERS else JOINT_AT[task] if joint else tuple(range(1, layers - 1, 2))
    kind = head or ("full" if joint or task == "scenes" else "factorised")
    return attach_tokens(network, at, head=kind, rank=64 if kind == "factorised" else None)
