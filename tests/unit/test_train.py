import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import made, rows
from torch.utils.data import DataLoader, TensorDataset

from offramp.checkpoints import FILE
from offramp.data import Examples
from offramp.errors import DataError, FormatError, ShapeError, ValueRangeError
from offramp.objectives import (
    Alternating,
    DepthWeighted,
    Distill,
    EENetLoss,
    FinalOnly,
    SelfDistill,
    TwoStage,
    Uniform,
    Weighted,
)
from offramp.recipe import Recipe
from offramp.record import predict, record
from offramp.train import train

FAST = Recipe(epochs=2, batch_size=16, lr=0.02)
STEPS = Recipe(epochs=2, batch_size=16, lr=0.02, checkpoint_every_steps=5)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


class Stopping:
    """Rows that stop a training with an error at the given row."""

    def __init__(self, x, y, at):
        self.x, self.y, self.left = x, y, at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.x[row], self.y[row]


@pytest.mark.parametrize(
    "objective",
    [
        DepthWeighted(),
        Uniform(),
        Weighted((2.0, 1.0, 1.0)),
        EENetLoss(),
        SelfDistill(),
        FinalOnly(),
        Alternating(),
        TwoStage(),
        TwoStage(then=Distill(), freeze=False),
    ],
    ids=repr,
)
def test_every_objective_learns(objective):
    model, data = made(), rows()
    before = predict(model, data)[0].argmax(-1) == data[1]
    recipe = Recipe(epochs=8, batch_size=16, lr=0.02)
    report = train(model, data, objective=objective, recipe=recipe, validation=data, progress=False)
    assert len(report.epochs) == 8
    assert report.steps == 8 * 8
    assert report.resumed_from is None
    assert report.samples_per_s > 0
    assert report.accuracy[-1] > max(0.8, float(before[-1].float().mean()))
    if not isinstance(objective, FinalOnly):
        assert min(report.accuracy) > 0.7
    assert report.to_dict()["epochs"][0]["rows"] == 120


def test_the_seed_decides_everything_and_the_callers_generator_is_left_alone():
    def run(noise, seed=0):
        torch.manual_seed(noise)
        model = made()
        train(model, rows(), recipe=Recipe(epochs=2, batch_size=16, lr=0.02, seed=seed), progress=False)
        after = torch.rand(1).item()
        torch.manual_seed(noise)
        assert torch.rand(1).item() == after
        return state(model)

    assert same(run(1), run(2))
    assert not same(run(1), run(1, seed=1))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=2, batch_size=16, lr=0.05, optimizer="sgd", schedule="step", weight_decay=5e-4, clip_norm=None),
        Recipe(epochs=2, batch_size=16, lr=0.02, schedule="cosine", precision="bf16", label_smoothing=0.1),
        Recipe(epochs=2, batch_size=16, lr=0.01, schedule="constant", head_lr=0.05, warmup=0.0, channels_last=True),
        Recipe(epochs=2, batch_size=16, lr=0.02, augment=lambda x, g: x + 0.01 * torch.randn(x.shape, generator=g)),
    ],
    ids=["sgd", "bf16", "head_lr", "augment"],
)
def test_recipes_run_one_after_the_other(recipe):
    report = train(made(), rows(), recipe=recipe, progress=False)
    assert report.epochs[1].loss < report.epochs[0].loss


def test_a_frozen_backbone_does_not_move_not_even_its_batch_statistics():
    model = made().eval()
    before = state(model)
    train(model, rows(), recipe=Recipe(epochs=1, batch_size=16, lr=0.05, frozen="backbone"), progress=False)
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"heads.0.1.weight", "heads.0.1.bias", "heads.1.0.weight", "heads.1.0.bias"}
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_final_only_leaves_the_heads_and_two_stage_then_leaves_the_backbone():
    one, two = made(), made()
    data = rows()
    train(one, data, objective=FinalOnly(), recipe=Recipe(epochs=1, batch_size=16, schedule="constant"), progress=False)
    assert torch.equal(one.heads[1][0].weight, made().heads[1][0].weight)
    recipe = Recipe(epochs=2, batch_size=16, schedule="constant")
    train(two, data, objective=TwoStage(), recipe=recipe, progress=False)
    assert same(state(one.backbone), state(two.backbone))
    assert not torch.equal(two.heads[1][0].weight, made().heads[1][0].weight)


def test_what_was_not_trainable_stays_so():
    model = made()
    model.backbone[0].requires_grad_(False)
    before = model.backbone[0].weight.clone()
    train(model, rows(), recipe=FAST, progress=False)
    assert torch.equal(model.backbone[0].weight, before)
    assert not model.backbone[0].weight.requires_grad


def test_decay_spares_biases_and_norms_with_adamw():
    model = made()
    model.backbone[0].bias.data.fill_(1.0)
    # a rate of nearly nothing with a decay of nearly everything shows where decay goes
    recipe = Recipe(epochs=1, batch_size=16, lr=1e-6, weight_decay=1e4, schedule="constant", warmup=0.0)
    train(model, rows(), recipe=recipe, progress=False)
    assert model.backbone[0].bias.min() > 0.99
    assert model.backbone[1].weight.min() > 0.99
    assert model.heads[1][0].weight.norm() < 0.95 * made().heads[1][0].weight.norm()


def test_a_teacher_is_a_model_or_its_logits():
    data = Examples(*rows())
    teacher = made(seed=1).eval()
    logits = teacher.plain(data.inputs).detach()
    runs = []
    for given in (teacher, teacher.backbone, logits):
        model = made()
        train(model, data, objective=Distill(), recipe=FAST, teacher=given, progress=False)
        runs.append(model.backbone[0].weight.detach())
    torch.testing.assert_close(runs[0], runs[1])
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="each row of Examples"):
        train(made(), data, objective=Distill(), teacher=logits[:5], progress=False)
    model = made()
    with pytest.raises(ValueRangeError, match="deepcopy"):
        train(model, data, objective=Distill(), teacher=model.backbone, progress=False)


@pytest.mark.parametrize("stop", [16 * 3 + 1, 16 * 7 + 3, 16 * 12])
@pytest.mark.parametrize(
    "objective",
    [DepthWeighted(), TwoStage(), Alternating(), TwoStage(then=Distill(), freeze=False)],
    ids=["joint", "stages", "turns", "own teacher"],
)
def test_a_stopped_run_ends_where_it_would_have_ended(tmp_path, stop, objective):
    x, y = rows()
    whole = made()
    expected = train(whole, Stopping(x, y, 10**9), objective=objective, recipe=STEPS, validation=(x, y), progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(
            made(), Stopping(x, y, stop), objective=objective, recipe=STEPS, validation=(x, y), progress=False,
            checkpoint=tmp_path,
        )  # fmt: skip
    again = made(seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        report = train(
            again, Stopping(x, y, 10**9), objective=objective, recipe=STEPS, validation=(x, y), progress=False,
            checkpoint=tmp_path,
        )  # fmt: skip
    started = 5 * (stop // 16 // 5) or None if stop < 16 * 8 else max(8, 5 * (stop // 16 // 5))
    assert report.resumed_from == started
    if started is not None:
        assert same(state(again), state(whole))
        assert [e.loss for e in report.epochs] == pytest.approx([e.loss for e in expected.epochs], rel=1e-6)
        assert [e.accuracy for e in report.epochs] == [e.accuracy for e in expected.epochs]
        assert report.steps == expected.steps


def test_a_loader_of_the_user_can_be_stopped_too(tmp_path):
    x, y = rows()

    def loader():
        return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)

    whole = made()
    train(whole, loader(), recipe=STEPS, progress=False)

    def stop_at_step_12(inputs, generator):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt
        return inputs

    calls = -100
    recipe = Recipe(epochs=2, batch_size=16, lr=0.02, checkpoint_every_steps=5, augment=stop_at_step_12)
    model, calls = made(), 0
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(), recipe=recipe, checkpoint=tmp_path, progress=False)
    calls = -100
    again = made(seed=3)
    assert train(again, loader(), recipe=recipe, checkpoint=tmp_path, progress=False).resumed_from == 10
    assert same(state(again), state(whole))


def test_a_finished_run_is_not_trained_again(tmp_path):
    model, data = made(), rows()
    first = train(model, data, recipe=FAST, checkpoint=tmp_path, progress=False)
    again = made(seed=4)
    report = train(again, data, recipe=FAST, checkpoint=tmp_path, progress=False)
    assert report.resumed_from == first.steps
    assert report.epochs == first.epochs
    assert same(state(model), state(again))
    fresh = train(made(), data, recipe=FAST, checkpoint=tmp_path, resume=False, progress=False)
    assert fresh.resumed_from is None
    assert os.listdir(tmp_path) == [FILE]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / f".{FILE}.123.partial").write_bytes(b"half")
    left = tmp_path / f".{FILE}.1.{os.getpid()}.partial"  # a restarted container gives the same numbers again
    left.mkdir()
    (left / FILE).write_bytes(b"half")
    train(made(), rows(), recipe=FAST, checkpoint=tmp_path, progress=False)
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": Recipe(epochs=2, batch_size=16, lr=0.03)}, "recipe.lr was 0.02, now 0.03"),
        ({"objective": Uniform()}, "objective.kind"),
        ({"model": made(width=24)}, "model was"),
        ({"data": rows(seed=1)}, "data was"),
    ],
    ids=["recipe", "objective", "model", "data"],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, change, words):
    train(made(), rows(), recipe=FAST, checkpoint=tmp_path, progress=False)
    other = {"model": made(), "data": rows(), "recipe": FAST, **change}
    with pytest.raises(FormatError, match=words) as caught:
        train(**other, checkpoint=tmp_path, progress=False)
    assert "resume=False" in str(caught.value)
    harmless = Recipe(epochs=2, batch_size=16, lr=0.02, checkpoint_every_s=1.0)
    assert train(made(), rows(), recipe=harmless, checkpoint=tmp_path, progress=False).resumed_from


def test_damaged_checkpoints_are_refused(tmp_path):
    train(made(), rows(), recipe=FAST, checkpoint=tmp_path, progress=False)
    path = tmp_path / FILE
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    for bad in (good[:-50], good[:10], b"", bytes(flipped), b"\xff" * 400):
        path.write_bytes(bad)
        with pytest.raises(FormatError, match="damaged"):
            train(made(), rows(), recipe=FAST, checkpoint=tmp_path, progress=False)
    path.write_bytes(good)
    save_file(load_file(path), path)
    with pytest.raises(FormatError, match="damaged"):
        train(made(), rows(), recipe=FAST, checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_runs_away_names_its_step_and_keeps_the_checkpoint(tmp_path, clip):
    x, y = rows()
    recipe = Recipe(epochs=2, batch_size=16, lr=1e30, clip_norm=clip, optimizer="sgd", checkpoint_every_steps=1)
    with pytest.raises(ValueRangeError, match=r"step \d+ \(epoch 1\).*Lower Recipe.lr"):
        train(made(), (x, y), recipe=recipe, checkpoint=tmp_path, progress=False)
    if (tmp_path / FILE).exists():
        assert all(torch.isfinite(t).all() for t in load_file(tmp_path / FILE).values())


def test_bad_inputs_from_a_loader_are_named():
    x, y = rows()
    x[3, 3] = float("nan")
    with pytest.raises(ValueRangeError, match="inputs of step"):
        train(made(), TensorDataset(x, y), recipe=FAST, progress=False)
    with pytest.raises(ValueRangeError, match="inputs has 1 values"):
        train(made(), (x, y), recipe=FAST, progress=False)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (Examples(torch.zeros(4, 8)), DataError, "no labels"),
        (Examples(torch.zeros(4, 8), torch.full((4,), 1)), DataError, "all 4 training rows have label 1"),
        (Examples(torch.zeros(4, 8), torch.arange(4)), ValueRangeError, "expected 0 to 2 for 3 classes"),
        (TensorDataset(torch.zeros(4, 8), torch.arange(4)), ValueRangeError, "expected 0 to 2"),
        (TensorDataset(torch.zeros(4, 8), torch.zeros(4)), ShapeError, "float32"),
        (TensorDataset(torch.zeros(4, 8)), DataError, "no labels"),
        (torch.zeros(4, 8), DataError, "expected"),
    ],
)
def test_data_that_cannot_be_trained_on(data, error, words):
    with pytest.raises(error, match=words):
        train(made(), data, recipe=FAST, progress=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("inf")}, {"head_lr": -1.0}, {"momentum": 1.0},
        {"weight_decay": -0.1}, {"warmup": 1.0}, {"clip_norm": 0.0}, {"label_smoothing": 1.0}, {"seed": -1},
        {"optimizer": "lion"}, {"schedule": "cos"}, {"precision": "fp16"}, {"frozen": "heads"},
        {"checkpoint_every_s": 0.0}, {"checkpoint_every_steps": 0},
    ],
    ids=lambda f: next(iter(f)),
)  # fmt: skip
def test_recipes_check_every_value(fields):
    with pytest.raises(ValueRangeError, match=f"Recipe.{next(iter(fields))} is .*expected"):
        Recipe(**fields)


def test_stages_that_cannot_be():
    with pytest.raises(ValueRangeError, match="2 or more"):
        train(made(), rows(), objective=TwoStage(), recipe=Recipe(epochs=1), progress=False)
    with pytest.raises(ValueRangeError, match=r"Recipe\.frozen"):
        train(made(), rows(), objective=TwoStage(), recipe=Recipe(frozen="backbone"), progress=False)
    with pytest.raises(ValueRangeError, match="trains nothing"):
        train(made(), rows(), objective=FinalOnly(), recipe=Recipe(frozen="backbone"), progress=False)


def test_rates_by_hand():
    linear = Recipe(warmup=0.2, schedule="linear")
    assert [round(linear.rate(i, 10), 3) for i in range(10)] == [
        0.5,
        1.0,
        1.0,
        0.875,
        0.75,
        0.625,
        0.5,
        0.375,
        0.25,
        0.125,
    ]
    step = Recipe(warmup=0.0, schedule="step")
    assert [round(step.rate(i, 9), 3) for i in range(9)] == [1.0] * 3 + [0.1] * 3 + [0.01] * 3
    cosine = Recipe(warmup=0.0, schedule="cosine")
    assert cosine.rate(0, 10) == 1.0
    assert cosine.rate(5, 10) == pytest.approx(0.5)
    assert Recipe(warmup=0.0, schedule="constant").rate(9, 10) == 1.0


def test_progress_is_silent_or_on_standard_error(capsys):
    train(made(), rows(), recipe=FAST, validation=rows(), progress=False)
    assert capsys.readouterr() == ("", "")
    train(made(), rows(), recipe=FAST, validation=rows(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 2/2: loss" in err
    assert "exits" in err


def test_record_gives_a_trace_in_the_datas_order():
    model, (x, y) = made().train(), rows(50)
    trace = record(model, (x, y), batch_size=7, progress=False)
    assert all(module.training for module in model.modules())
    expected = copy.deepcopy(model).eval()(x).detach()
    torch.testing.assert_close(trace.logits, expected)
    assert torch.equal(trace.labels, y)
    assert trace.ids == tuple(str(i) for i in range(50))
    assert not trace.logits.is_inference()
    picked = record(model, Examples(x, y).select([9, 4, 30]), progress=False)
    assert picked.ids == ("9", "4", "30")
    torch.testing.assert_close(picked.logits, expected[:, [9, 4, 30]])
    named = record(
        model, DataLoader(TensorDataset(x, y), batch_size=8), ids=[f"r{i}" for i in range(50)], progress=False
    )
    assert named.ids[49] == "r49"
    torch.testing.assert_close(named.logits, expected)
    assert record(model, Examples(x), precision="bf16", progress=False).labels is None
    with pytest.raises(ValueRangeError, match="precision"):
        record(model, (x, y), precision="fp16", progress=False)
    with pytest.raises(ShapeError, match="attach"):
        record(model.backbone, (x, y), progress=False)
