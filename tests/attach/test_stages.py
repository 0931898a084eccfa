"""When stages are cut again, what cannot be cut, and what a carry holds."""

import pytest
import torch
from attach_models import CASES, Dense, Grid, UShape, sequential
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.attach import attach
from offramp.errors import NotStageable, ShapeError
from offramp.model import MultiExitModel
from offramp.stages import Carry

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def through(model: MultiExitModel, inputs: Tensor) -> Tensor:
    stages = model.stages()
    carry, k = stages.start(inputs), 0
    while carry is not None:
        out, carry = stages.run(k, carry)
        k += 1
    return out


def close(got: Tensor, expected: Tensor, tol: float = 1e-5) -> bool:
    return got.dtype == expected.dtype and torch.allclose(got, expected, rtol=tol, atol=tol)


@pytest.fixture
def model() -> MultiExitModel:
    torch.manual_seed(0)
    return attach(sequential().eval(), at=("0", "3"), example=X[:1]).eval()


@torch.no_grad()
def test_weights_updated_in_place_are_seen_without_a_new_cut(model: MultiExitModel) -> None:
    stages, before = model.stages(), model.plain(X)
    for tensor in [*model.backbone.parameters(), *model.backbone.buffers()]:
        tensor.add_(1)
    assert model.stages() is stages
    assert not close(model.plain(X), before)
    assert close(through(model, X), model.plain(X))
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    assert model.stages() is stages
    assert close(through(model, X), model.plain(X))


@torch.no_grad()
def test_a_training_step_is_seen_too(model: MultiExitModel) -> None:
    stages = model.stages()
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(X).square().sum().backward()
        optimizer.step()
    model.eval()
    assert model.stages() is stages
    assert close(through(model, X), model.plain(X))


def _new_weight(net: nn.Sequential) -> None:
    net[8].weight = nn.Parameter(net[8].weight.detach() * 2)


def _new_buffer(net: nn.Sequential) -> None:
    net[1].running_mean = net[1].running_mean + 1


def _new_module(net: nn.Sequential) -> None:
    net[8] = nn.Linear(16, 4)


@torch.no_grad()
@pytest.mark.parametrize("change", [_new_weight, _new_buffer, _new_module])
def test_what_is_replaced_is_cut_again(model: MultiExitModel, change) -> None:
    stages, before = model.stages(), through(model, X)
    change(model.backbone)
    assert model.stages() is not stages
    assert not close(through(model, X), before)
    assert close(through(model, X), model.plain(X))
    assert model.stages() is model.stages()


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.bfloat16, 5e-2)])
def test_a_cast_model_is_cut_again(model: MultiExitModel, dtype: torch.dtype, tol: float) -> None:
    stages = model.stages()
    model.to(dtype)
    assert model.stages() is not stages
    x = X.to(dtype)
    assert close(through(model, x), model.plain(x), tol)
    assert model(x).dtype == dtype
    model.backbone.to(torch.float32)
    assert close(through(model, X), model.plain(X))


@torch.no_grad()
def test_a_cast_text_model_is_cut_again() -> None:
    case = CASES["bert"]
    model = attach(case.build(), at=case.at, example=case.inputs(1)).eval()
    first = model.stages()
    model.double()
    assert model.stages() is not first
    assert close(through(model, case.inputs(4)), model.plain(case.inputs(4)), 1e-9)


@torch.no_grad()
def test_stages_compute_in_eval_mode_whatever_the_flag(model: MultiExitModel) -> None:
    expected = model.plain(X)
    model.train()
    assert close(through(model, X), expected)
    assert model.training
    assert all(m.training for m in model.backbone.modules())


@torch.no_grad()
def test_batchnorm_in_a_head_uses_its_running_numbers() -> None:
    model = attach(UShape().eval(), at=("down1",), head="conv", example=X).eval()
    stages = model.stages()
    tap, _ = stages.run(0, stages.start(X))
    alone, _ = stages.run(0, stages.start(X[:1]))
    assert close(model.head_logits(0, alone), model.head_logits(0, tap)[:1])


@torch.no_grad()
def test_a_cut_under_autocast_is_no_other_cut(model: MultiExitModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stages = model.stages()
        assert through(model, X).dtype == torch.bfloat16
    assert close(through(model, X), model.plain(X))
    assert model.stages() is stages


@pytest.mark.parametrize("kind", ["no_grad", "autocast"])
def test_regions_in_the_forward_are_kept_whole(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            with torch.no_grad() if kind == "no_grad" else torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.b(y).tanh()
            return self.c(z.float() + y)

    model = attach(Net().eval(), at="a", example=torch.randn(2, 4))
    x = torch.randn(4, 4)
    with torch.no_grad():
        assert close(through(model, x), model.plain(x))
    if kind == "autocast":
        with pytest.raises(NotStageable, match="region of its own"):
            attach(Net().eval(), at="b", example=torch.randn(2, 4)).stages()


# --- the carry --------------------------------------------------------------------------------------------------------


def test_a_stale_batch_size_fails_and_select_computes_it_again() -> None:
    model = attach(Grid().eval(), at=("a", "b"), example=torch.randn(1, 8, 6)).eval()
    x = torch.randn(5, 8, 6)
    index = torch.tensor([4, 0])
    with torch.no_grad():
        stages = model.stages()
        _, carry = stages.run(0, stages.start(x))
        left = carry.select(index)
        assert left.batch == 2
        assert close(stages.run(2, stages.run(1, left)[1])[0], model.plain(x[index]))
        stale = Carry(left._plan, left._values, 5, left._symbols)
        with pytest.raises((RuntimeError, IndexError)):
            stages.run(2, stages.run(1, stale)[1])


def test_a_mask_that_stays_behind_gives_other_answers() -> None:
    case = CASES["bert_mean"]
    torch.manual_seed(0)
    model = attach(case.build(), at=case.at, head="mean", example=case.inputs(1)).eval()
    inputs = case.inputs(6)
    index = torch.tensor([5, 2])
    with torch.no_grad():
        stages = model.stages()
        carry = stages.start(inputs)
        expected = model(inputs)[0]
        left = carry.select(index)
        tap, _ = stages.run(0, left)
        assert close(model.head_logits(0, tap, left.mask), expected[index])
        assert not close(model.head_logits(0, tap, carry.mask[:2]), expected[index])


def test_inputs_of_another_shape_are_refused(model: MultiExitModel) -> None:
    stages = model.stages()
    with pytest.raises(ShapeError, match=r"\[batch, 3, 16, 16\]"):
        stages.start(torch.randn(2, 3, 8, 8))
    with pytest.raises(ShapeError, match="expected \\['input'\\]"):
        stages.start({"x": X})
    case = CASES["bert"]
    text = attach(case.build(), at=case.at, example=case.inputs(1)).stages()
    good = case.inputs(2)
    with pytest.raises(ShapeError, match="input_ids"):
        text.start({name: good[name] for name in ("input_ids", "attention_mask")})
    with pytest.raises(ShapeError, match="same lengths"):
        text.start({**good, "attention_mask": good["attention_mask"][:1]})
    with pytest.raises(ShapeError, match="65 long"):
        text.start(case.inputs(2, tokens=65))
    # the order of names does not matter
    assert text.start(dict(reversed(good.items()))).batch == 2


def test_other_lengths_by_dynamic() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)).mean(1))

    fixed = attach(Net().eval(), at="a", example=torch.randn(1, 5, 4))
    free = attach(Net().eval(), at="a", example=torch.randn(1, 5, 4), dynamic=(1,))
    x = torch.randn(2, 9, 4)
    with torch.no_grad():
        assert close(through(free, x), free.plain(x))
        with pytest.raises(ShapeError, match="dynamic="):
            fixed.stages().start(x)


# --- what cannot be cut -----------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.between, self.norm = nn.Linear(4, 4), nn.Linear(4, 3), between, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def _by_sign(y: Tensor) -> Tensor:
    return y * 2 if y.sum() > 0 else y


def _rows_that_fire(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    rows = (y.sum(1) > 0).nonzero().flatten()
    return out.index_copy(0, rows, y[rows])


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (lambda y: y - y.mean(0), r"mean .*mixes rows.* \[4\]"),
        (lambda y: y - y.mean(0, keepdim=True), "mixes rows"),
        (lambda y: (y @ y.T).softmax(1) @ y, "compares rows with rows"),
        (lambda y: y.softmax(0), "neighbours"),
        (lambda y: y.cumsum(0), "neighbours"),
        (lambda y: F.batch_norm(y[:, :, None].expand(-1, -1, 2), None, None, training=True)[..., 0], "neighbours"),
        (_by_sign, "torch.export fails"),
        (lambda y: y * y.max().item(), "rows"),
    ],
)
def test_rows_that_mix_or_decide_are_not_stageable_but_train(between, words: str) -> None:
    torch.manual_seed(0)
    net = Between(between)
    model = attach(net, at="a", example=torch.randn(1, 4))
    with pytest.raises(NotStageable, match=words):
        model.stages()
    model.train()(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(not m._forward_hooks for m in net.modules())
    assert net.training


def test_an_original_that_depends_on_more_than_its_inputs_is_caught_on_the_example() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(self.a(x)) + self.calls

    with pytest.raises(NotStageable, match="differ"):
        attach(Counts(), at="a", example=torch.randn(1, 4)).stages()


def test_a_buffer_that_is_written_in_eval_mode_is_not_stageable() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return self.b(self.a(x)) * self.seen

    with pytest.raises(NotStageable, match="buffer"):
        attach(Writes(), at="a", example=torch.randn(1, 4)).stages()


@pytest.mark.parametrize("name", ["write_slice", "views", "constants"])
def test_writes_in_place_and_shared_memory(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if name == "write_slice":
                y = y * 1
                y[:, 1] = 0.0
            elif name == "views":
                y = y + 0.5
                half = y[:, :2]
                y.relu_()
                return self.b(y) + half.sum(1, keepdim=True)
            else:
                y = y + torch.tensor([1.0, 2.0, 3.0, 4.0])
            return self.b(y)

    torch.manual_seed(0)
    model = attach(Net().eval(), at="a", example=torch.randn(2, 4))
    x = torch.randn(4, 4)
    with torch.no_grad():
        assert close(through(model, x), model.plain(x))


def test_tied_weights_and_shared_modules() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.again = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.again(self.b(self.a(x).tanh()).tanh()))

    model = attach(Tied().eval(), at=("b",), example=torch.randn(1, 4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        stages = model.stages()
        model.backbone.a.weight.mul_(3)
        assert model.stages() is stages
        assert close(through(model, x), model.plain(x))


# --- stages by hand ---------------------------------------------------------------------------------------------------


def test_stages_by_hand_take_the_place_of_the_cut() -> None:
    net = sequential().eval()
    model = attach(net, at=("0", "3"), example=X, stages=[net[:1], net[1:4], net[4:]])
    x = X * 2
    with torch.no_grad():
        assert close(through(model, x), model.plain(x))
        stages = model.stages()
        _, carry = stages.run(0, stages.start(x))
        rows = torch.tensor([2, 0])
        assert close(stages.run(2, stages.run(1, carry.select(rows))[1])[0], model.plain(x[rows]))
        assert close(stages.whole(x), model.plain(x))
    assert [info.tap for info in stages.describe()] == ["0", "3", "logits"]


def test_stages_by_hand_are_checked() -> None:
    net = sequential().eval()
    with pytest.raises(NotStageable, match="2 entries for 2 taps"):
        attach(net, at=("0", "3"), example=X, stages=[net[:1], net[1:]]).stages()
    with pytest.raises(NotStageable, match="stage 0 at tap '0' differ"):
        attach(net, at=("0",), example=X, stages=[net[:3], net[3:]]).stages()
    with pytest.raises(NotStageable, match="mixes rows"):
        attach(Between(_by_sign), at="a", example=torch.randn(2, 4), stages=[nn.Linear(4, 4), nn.Linear(4, 3)]).stages()


def test_the_example_shows_mixing_even_when_its_rows_are_equal() -> None:
    with pytest.raises(NotStageable):
        attach(Between(lambda y: y.softmax(0)), at="a", example=torch.zeros(3, 4)).stages()


def test_dense_connections_carry_all_that_goes_on() -> None:
    model = attach(Dense().eval(), at=("blocks.0", "blocks.1"), example=X)
    rows = [item for item in model.stages().describe()[1].carry if item.kind == "rows"]
    assert len(rows) >= 1
    assert all(item.shape[0] == "batch" for item in rows)
