"""A transformers model: exits behind every layer, found in its module tree; the same answers when none is taken."""

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import offramp
from offramp.placement import place


def main() -> None:
    """Nothing; what was found is printed."""
    torch.manual_seed(0)
    # in earnest: AutoModelForSequenceClassification.from_pretrained("path/to/folder")
    network = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=200, dim=32, n_layers=4, n_heads=4, hidden_dim=64)
    )
    rows = {"input_ids": torch.randint(5, 200, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.int64)}
    rows["attention_mask"][::2, 9:] = 0
    at = place(network.eval(), rows)
    print("exits behind", ", ".join(at))
    model = offramp.attach(network, at=at, head="mean", example=rows).eval()
    for stage in model.stages().describe():
        print(f"stage {stage.k} ends at {stage.tap}: {stage.nodes} operators, {stage.parameters} parameters")
    plain = network(**rows).logits.softmax(-1).detach()
    never, some = (offramp.Runtime(model, offramp.MaxProb(threshold))(rows) for threshold in (2.0, 0.52))
    print(
        "largest difference from the plain model when nobody leaves:", float((never.probabilities - plain).abs().max())
    )
    print("exits of 8 rows at a threshold of 0.52:", some.exit.tolist())


if __name__ == "__main__":
    main()
