"""Images with captions: train a captioner, give it exits, calibrate them, bundle it, and caption images.

python examples/captions.py flickr8k/            (without a folder, small pictures of shapes are made up)

The folder has captions.txt (image,caption) and Images/, or is in another layout that `load_captions` knows.
"""

import csv
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, VisionEncoderDecoderModel

import offramp
from offramp.captions import load_captions
from offramp.generation import TokenBundle, TokenPolicy, attach_tokens, measure_tokens, record_tokens, resnet_encoder
from offramp.preprocess import ImagePreprocess

COLOURS = ("red", "green", "blue", "yellow")


def small_folder(folder: Path, images: int = 600) -> Path:
    """The folder, after pictures of two shapes were drawn into it."""
    dice = random.Random(0)
    (folder / "Images").mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.txt", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i in range(images):
            (left, right), picture = dice.sample(COLOURS, 2), Image.new("RGB", (32, 32), "black")
            draw, circle = ImageDraw.Draw(picture), dice.random() < 0.5
            (draw.ellipse if circle else draw.rectangle)((2, 8, 14, 24), fill=left)
            draw.rectangle((18, 8, 30, 24), fill=right)
            picture.save(folder / "Images" / f"{i}.png")
            table.writerow([f"{i}.png", f"a {left} {'circle' if circle else 'square'} left of a {right} square"])
    return folder


def tokenizer_of(captions: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer learned from the captions; in earnest, take the decoder's own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    learn = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<s>", "</s>"], show_progress=False)
    made.train_from_iterator(captions, learn)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def main(source: Path, folder: Path) -> None:
    """Nothing; a bundle is in the folder."""
    torch.manual_seed(0)
    train, held = load_captions(source, "train"), load_captions(source, "validation")
    tokenizer = tokenizer_of([caption for said in train.captions for caption in said])
    images = ImagePreprocess((32, 32), fit="stretch", name="pixel_values")
    config_class, encoder_class = resnet_encoder()  # in earnest: a ViT or Swin of transformers
    decoder = GPT2Config(
        n_positions=64, n_embd=64, n_layer=6, n_head=4, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1,
        add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    network = VisionEncoderDecoderModel(
        encoder=encoder_class(config_class(blocks=1, grid=4)), decoder=GPT2LMHeadModel(decoder)
    )
    model = attach_tokens(network, at=(1, 3), head="factorised", rank=16)

    def rows(captioned):
        return captioned.rows(lambda text: tokenizer(text)["input_ids"], begin=0, end=1, preprocess=images)

    # the network first, then its exits, taught by the last one
    goal = offramp.TwoStage(offramp.FinalOnly(), offramp.SelfDistill(), freeze=False)
    recipe = offramp.Recipe(epochs=10, batch_size=16, lr=2e-3)
    offramp.train(model, rows(train), objective=goal, recipe=recipe, progress=False)
    trace = record_tokens(model, rows(held), progress=False)
    print("the next token right, by exit:", " ".join(f"{right:.3f}" for right in trace.accuracy()))
    costs = measure_tokens(model, [[0]], batch_sizes=())
    found = offramp.calibrate(offramp.BEEM, trace, costs, offramp.Budget(fraction=0.6))
    print(found.message)
    bundle = TokenBundle(model, tokenizer, TokenPolicy(found.policy), images)
    path = bundle.save(folder / "captioner.offramp")
    opened = TokenBundle.load(path)
    for image, said in zip(held.images[:4], held.captions, strict=False):
        (ours,) = opened.caption([image])
        pieces = " ".join(f"{piece.strip()}[{k + 1}]" for piece, k in zip(ours.pieces, ours.exits, strict=True))
        print(f"{Path(image).name}: {pieces}   (people: {said[0]})")
    print(f"now: offramp caption {held.images[0]} --bundle {path} --exits")


if __name__ == "__main__":
    here = Path.cwd()
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else small_folder(here / "shapes"), here)
