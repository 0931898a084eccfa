"""What attach accepts and refuses, and that the original stays as it was."""

import copy

import pytest
import torch
from attach_models import CASES, Dense, ResNet, Twice, sequential
from torch import Tensor, nn

from offramp.attach import attach
from offramp.errors import NoSuchModule, ShapeError, ValueRangeError
from offramp.heads import MapHead, TokenHead, VectorHead

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
AT = ("0", "3", "6")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_forward_gives_every_exit_and_the_last_is_the_original() -> None:
    net = sequential().eval()
    model = attach(net, at=AT, example=X)
    logits = model(X)
    assert logits.shape == (4, 2, 4)
    assert (model.exits, model.classes, model.taps) == (4, 4, AT)
    assert torch.equal(logits[-1], net(X))
    assert torch.equal(model.plain(X), net(X))


def test_the_original_is_kept_shared_and_not_changed() -> None:
    net = sequential()
    net[1].eval()
    flags = [m.training for m in net.modules()]
    state = copy.deepcopy(net.state_dict())
    names = list(net.state_dict())
    random = torch.get_rng_state()
    model = attach(net, at=AT, head=["map", "map", "vector"], example=X)
    model.stages()
    with torch.inference_mode():
        model.stages().whole(X)
    assert model.backbone is net
    assert all(a is b for a, b in zip(model.backbone.parameters(), net.parameters(), strict=True))
    assert [m.training for m in net.modules()] == flags
    assert hooks(net) == 0
    assert list(net.state_dict()) == names
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not any(name.startswith("_offramp") for name in vars(net))
    # heads draw random weights; cutting draws none
    torch.set_rng_state(random)
    attach(
        net, at=("0",), head=lambda shape, classes: nn.Identity() if False else VectorLike(classes), example=X
    ).stages()
    assert torch.equal(torch.get_rng_state(), random)


class VectorLike(nn.Module):
    """A head without random weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(classes))

    def forward(self, tap: Tensor) -> Tensor:
        return tap.flatten(1).mean(1, keepdim=True) * self.scale


def test_hooks_live_for_one_forward_even_when_it_fails() -> None:
    net = sequential()
    model = attach(net, at=AT, example=X)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 16, 16))
    assert hooks(net) == 0
    model(X)
    assert hooks(net) == 0


def test_training_reaches_the_original_and_the_heads_through_taps_that_are_overwritten() -> None:
    model = attach(sequential().train(), at=AT, example=X)
    assert model.training
    model(X).sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in [*model.heads.parameters(), *model.backbone[0].parameters()]
    )


def test_a_head_sees_the_tap_as_it_was_before_relu_wrote_into_it() -> None:
    net = sequential().eval()
    model = attach(net, at=("6",), example=X)
    with torch.no_grad():
        before = net[:7](X)
        assert (before < 0).any()
        assert torch.equal(model(X)[0], model.head_logits(0, before))


def test_the_state_dict_is_the_same_before_and_after_cutting_and_goes_round() -> None:
    case = CASES["bert_pooler"]
    net = case.build()
    model = attach(net, at=case.at, head="pooler", example=case.inputs(1)).eval()
    names = set(model.state_dict())
    model.stages()
    assert set(model.state_dict()) == names
    assert {n for n in names if n.startswith("heads.")} == {"heads.0.linear.weight", "heads.0.linear.bias"}
    assert {n.removeprefix("backbone.") for n in names if n.startswith("backbone.")} == set(net.state_dict())
    other = attach(case.build(), at=case.at, head="pooler", example=case.inputs(1)).eval()
    other.load_state_dict(model.state_dict())
    inputs = case.inputs(3)
    assert torch.equal(other(inputs), model(inputs))


def test_a_copy_is_its_own_model() -> None:
    model = attach(sequential().eval(), at=("3",), example=X).eval()
    model.stages()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone[8].bias.add_(1.0)
        assert torch.allclose(twin.stages().whole(X), model.stages().whole(X) + 1.0, atol=1e-5)


def test_taps_come_in_the_order_of_execution_with_their_heads() -> None:
    model = attach(sequential(), at=("6", "0"), head=[VectorHead(), MapHead()], example=X)
    assert model.taps == ("0", "6")
    assert [type(head).__name__ for head in model.heads] == ["_MapHead", "_VectorHead"]


def test_several_inputs_are_given_by_name_and_one_tap_as_a_string() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"logits": self.b(self.a(left) + self.a(right) * 0 + right.mean(1, keepdim=True))}

    inputs = {"left": torch.randn(3, 4), "right": torch.randn(3, 4)}
    model = attach(Sum(), at="a@1", example=inputs)
    assert model(inputs).shape == (2, 3, 3)
    with torch.inference_mode():
        stages = model.stages()
        tap, carry = stages.run(0, stages.start(inputs))
        assert torch.allclose(stages.run(1, carry)[0], model.plain(inputs), atol=1e-6)
        assert tap.shape == (3, 6)


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        ((), ValueRangeError, "empty"),
        (("layer9",), NoSuchModule, "'layer1'"),
        (("layer1", "layer1"), ValueRangeError, "twice"),
        (("layer1", "layer1@0"), ValueRangeError, "twice"),
        (("layer1@x",), ValueRangeError, "number from 0"),
        (("layer1@1",), ValueRangeError, "called 1 times"),
        (("linear",), ValueRangeError, "own output"),
        (("",), ValueRangeError, "whole model"),
        (("layer1", "layer1.2"), ValueRangeError, "same tensor"),
    ],
)
def test_taps_that_are_not_there(at: tuple[str, ...], error: type[Exception], words: str) -> None:
    net = ResNet(20)
    with pytest.raises(error, match=words):
        attach(net, at=at, example=torch.randn(1, 3, 32, 32))
    assert hooks(net) == 0


def test_a_name_that_stands_for_several_calls_must_be_numbered() -> None:
    with pytest.raises(ValueRangeError, match=r"called 3 times.*'inner@0' to 'inner@2'"):
        attach(Twice(), at=("inner",), example=torch.randn(1, 6))


def test_a_module_that_is_never_called() -> None:
    net = Dense()
    net.spare = nn.Linear(1, 1)
    with pytest.raises(ValueRangeError, match="never called"):
        attach(net, at=("spare",), example=X)


class Gives(nn.Module):
    """Gives what the test wants."""

    def __init__(self, make) -> None:
        super().__init__()
        self.a, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor):
        return self.make(self.a(x), x)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda y, x: (y, y), ValueRangeError, "without logits"),
        (lambda y, x: {"scores": y}, ValueRangeError, "without logits"),
        (lambda y, x: y.sum(1), ShapeError, "batch cls"),
        (lambda y, x: y.repeat(2, 1), ShapeError, "batch cls"),
        (lambda y, x: (y * 2).argmax(1, keepdim=True), ShapeError, "floating point"),
    ],
)
def test_outputs_that_are_not_logits(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attach(Gives(make), at=("a",), example=torch.randn(2, 4))


def test_arguments_that_do_not_fit() -> None:
    net = sequential()
    with pytest.raises(ShapeError, match="classes=7"):
        attach(net, at=("0",), example=X, classes=7)
    with pytest.raises(ShapeError, match="batch tok dim"):
        attach(net, at=("0",), head=TokenHead(), example=X)
    with pytest.raises(ValueRangeError, match="2 entries for 3 taps"):
        attach(net, at=AT, head=["auto", "auto"], example=X)
    with pytest.raises(ShapeError, match="gives 7 classes"):
        attach(net, at=("6",), head=nn.Linear(16, 7), example=X)
    with pytest.raises(ValueRangeError, match="does not fit the inputs"):
        attach(net, at=("0",), example=X, dynamic={"input": (4,)})
    with pytest.raises(ShapeError, match="rows"):
        attach(net, at=("0",), example={"a": torch.ones(2, 1), "b": torch.ones(3, 1)})
    attach(net, at=("0",), example=X, classes=4)


def test_a_tap_without_rows_is_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.transpose(0, 1)).transpose(0, 1).mean(1))

    with pytest.raises(ShapeError, match="rows first"):
        attach(Turned(), at=("a",), example=torch.randn(2, 5, 4))


def test_heads_stand_in_the_models_dtype() -> None:
    model = attach(sequential().double(), at=("3",), example=X.double())
    assert {p.dtype for p in model.heads.parameters()} == {torch.float64}
    assert model(X.double()).dtype == torch.float64
