"""Every model of the table: stages and exits agree with the original, and rows may leave."""

from functools import cache

import pytest
import torch
from attach_models import CASES, built

from offramp.attach import attach
from offramp.inputs import mask_of, select_rows
from offramp.model import MultiExitModel

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def attached(name: str) -> MultiExitModel:
    case = CASES[name]
    torch.manual_seed(1)
    return attach(built(name), at=case.at, head=case.head, example=case.inputs(1)).eval()


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = expected.abs().max().clamp(min=1e-6)
    return got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-5 * scale)


def finish(stages, k, carry):
    """The logits from the carry into stage k."""
    while carry is not None:
        out, carry = stages.run(k, carry)
        k += 1
    return out


SIZES = [(1, 9), (2, 9), (7, 9), (1, 13), (7, 5)]


@pytest.mark.parametrize("name", CASES)
def test_stages_and_heads_equal_the_original(name: str) -> None:
    case, model = CASES[name], attached(name)
    with torch.inference_mode():
        for batch, tokens in SIZES if case.text else SIZES[:3]:
            inputs = case.inputs(batch, tokens)
            expected = model(inputs)
            stages, seen = model.stages(), []
            carry = stages.start(inputs)
            for k in range(model.exits - 1):
                mask = carry.mask
                tap, carry = stages.run(k, carry)
                seen.append(model.head_logits(k, tap, mask))
            out, carry = stages.run(model.exits - 1, carry)
            assert carry is None
            assert close(torch.stack([*seen, out]), expected)
            assert close(out, model.plain(inputs))
            assert close(stages.whole(inputs), model.plain(inputs))


@pytest.mark.parametrize("name", CASES)
def test_later_stages_on_a_subset_equal_the_original_on_it(name: str) -> None:
    case, model = CASES[name], attached(name)
    draw = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        inputs = case.inputs(7, 9, seed=1)
        stages = model.stages()
        carry = stages.start(inputs)
        for k in range(model.exits - 1):
            _, carry = stages.run(k, carry)
            for count in (1, 2, 5):
                index = torch.randperm(7, generator=draw)[:count]
                assert close(finish(stages, k + 1, carry.select(index)), model.plain(select_rows(inputs, index)))


@pytest.mark.parametrize("name", CASES)
def test_rows_leave_at_every_exit_in_turn(name: str) -> None:
    """What the runtime does: some rows leave at each exit, and every head's logits are those of its own rows."""
    case, model = CASES[name], attached(name)
    with torch.inference_mode():
        inputs = case.inputs(7, 9, seed=2)
        expected = model(inputs)
        rows = torch.arange(7)
        stages = model.stages()
        carry = stages.start(inputs)
        for k in range(model.exits - 1):
            mask = carry.mask
            tap, carry = stages.run(k, carry)
            assert close(model.head_logits(k, tap, mask), expected[k, rows])
            if len(rows) > 1:
                keep = torch.randperm(len(rows), generator=torch.Generator().manual_seed(k))[: len(rows) - 1]
                rows, carry = rows[keep], carry.select(keep)
                assert carry.batch == len(rows)
        out, _ = stages.run(model.exits - 1, carry)
        assert close(out, expected[-1, rows])


@pytest.mark.parametrize("name", ["bert", "resnet20", "grid"])
def test_describe_says_what_goes_on(name: str) -> None:
    model = attached(name)
    infos = model.stages().describe()
    assert [info.k for info in infos] == list(range(model.exits))
    assert [info.tap for info in infos] == [*model.taps, "logits"]
    assert all(info.nodes > 0 and info.carry for info in infos[:-1])
    assert infos[-1].carry == ()
    assert {item.kind for item in infos[0].carry} <= {"rows", "constant", "size"}
    total = sum(p.numel() for p in model.backbone.parameters())
    assert sum(info.parameters for info in infos) == total


def test_a_hand_over_mask_is_selected_and_the_sizes_are_too() -> None:
    case, model = CASES["bert_mean"], attached("bert_mean")
    inputs = case.inputs(5)
    carry = model.stages().start(inputs).select(torch.tensor([4, 1]))
    assert carry.batch == 2
    assert carry.mask is not None
    assert torch.equal(carry.mask, mask_of(inputs)[[4, 1]])
    assert torch.equal(carry.select(torch.tensor([False, True])).mask, mask_of(inputs)[[1]])
