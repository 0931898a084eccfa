"""Every engine leaves at the simulator's exits, and says clearly what it cannot do."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from many_policies import COSTS, EXITS, NAMES, ROWS, near_rounding, policies
from torch import nn

import offramp
from offramp.cost import TimedCosts
from offramp.errors import MissingExtra, NotStageable, ShapeError, ValueRangeError

INSTALLED = ("eager", "onnx", "onnx-file")


@pytest.fixture(scope="module")
def engines(model):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return {name: offramp.engine(model, name) for name in INSTALLED}


def small(seed=0):
    """A network that compiles in seconds, and rows that leave at different exits."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model = offramp.attach(network, at=("1", "3"), example=torch.randn(3, 4))
    model.eval()
    x = torch.randn(50, 4)
    with torch.no_grad():
        surest = torch.softmax(model(x), -1).amax(-1)
    return model, x, offramp.MaxProb(tuple(surest.quantile(0.6, dim=1).add(1e-4).tolist()))


@pytest.mark.parametrize("name", NAMES)
def test_sessions_leave_where_the_simulator_does(engines, model, rows, trace, name):
    policy = policies(trace)[name]
    outcome = offramp.simulate(policy, trace, COSTS)
    near, run = near_rounding(policy, trace, outcome), offramp.Runtime(model, policy, engines["onnx"])
    for size in (1, 7, ROWS):
        parts = [run(rows[i : i + size]) for i in range(0, ROWS, size)]
        exits = torch.cat([p.exit for p in parts])
        assert torch.equal(exits[~near], outcome.exit[~near])
        same = exits == outcome.exit
        probabilities = torch.cat([p.probabilities for p in parts])
        torch.testing.assert_close(probabilities[same], torch.softmax(outcome.answer, -1)[same], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([p.score for p in parts])[same], outcome.score[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INSTALLED)
def test_what_an_engine_says_is_what_the_model_says(engines, model, rows, trace, name):
    logits, signals = engines[name].says(rows)
    torch.testing.assert_close(logits, trace.logits, rtol=1e-4, atol=1e-4)
    assert signals is None
    torch.testing.assert_close(engines[name].whole(rows), trace.logits[-1], rtol=1e-4, atol=1e-4)
    recorded = offramp.record(model, (rows, torch.zeros(ROWS, dtype=torch.int64)), engine=engines[name], progress=False)
    torch.testing.assert_close(recorded.logits, trace.logits, rtol=1e-4, atol=1e-4)
    assert recorded.precision == "fp32"


@pytest.mark.parametrize("name", INSTALLED)
def test_every_engine_is_measured(engines, model, rows, name):
    costs = offramp.measure(model, rows, batch_sizes=(1, 4), rounds=3, seconds=0.1, engine=engines[name])
    assert costs.measured_with(name, "fp32")
    for row in costs.timed:
        assert min(row.stage_s) > 0
        assert min(row.head_s[:-1]) > 0
        assert row.step_s > 0
        assert row.head_s[-1] == 0.0
    assert costs.timed[0].regroup_s == (0.0,) * EXITS  # one row is never regrouped
    assert min(costs.timed[1].regroup_s[:-1]) > 0


@pytest.mark.parametrize("name", INSTALLED)
def test_stages_alone_run_on_the_rows_that_get_there(engines, model, rows, trace, name):
    exits = torch.arange(len(rows)) % EXITS
    told = engines[name].stages_alone(rows, exits)()
    assert len(told) == EXITS
    logits = torch.as_tensor(told[-1][0])
    torch.testing.assert_close(logits, trace.logits[-1][exits == EXITS - 1], rtol=1e-4, atol=1e-4)
    assert len(engines[name].stages_alone(rows, exits.clamp(max=1))()) == 2


def test_compiled_stages_take_every_batch_size():
    model, x, policy = small()
    try:
        run = offramp.Runtime(model, policy, "compiled")
    except NotStageable as error:
        pytest.skip(f"no C++ compiler: {error}")
    live = offramp.Runtime(model, policy)
    seen = set()
    for size in (1, 2, 3, 50):
        ours, theirs = run(x[:size]), live(x[:size])
        assert torch.equal(ours.exit, theirs.exit)
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-4, atol=1e-5)
        seen |= set(ours.exit.tolist())
    assert seen == {0, 1, 2}
    torch.testing.assert_close(run.engine.whole(x), model.plain(x), rtol=1e-4, atol=1e-5)
    again = offramp.engine(model, "compiled")  # from the cache
    torch.testing.assert_close(again.says(x)[0], live.engine.says(x)[0], rtol=1e-4, atol=1e-5)


def test_bf16_is_near_and_warns_about_thresholds_of_fp32():
    model, x, policy = small()
    low = offramp.engine(model, "eager", precision="bf16")
    logits, _ = low.says(x)
    torch.testing.assert_close(logits, model(x).detach(), rtol=0.05, atol=0.05)
    assert not torch.equal(logits, model(x).detach())
    with pytest.warns(UserWarning, match="calibrated on logits in fp32 and runs in bf16"):
        run = offramp.Runtime(model, policy, "eager", precision="bf16")
    assert run(x).probabilities.dtype is torch.float32
    labels = torch.arange(50) % 3
    trace = offramp.record(model, (x, labels), engine=low, progress=False)
    assert trace.precision == "bf16"
    found = offramp.calibrate(
        offramp.MaxProb, trace, offramp.measure(model, x, batch_sizes=()), offramp.Budget(fraction=0.8)
    )
    assert found.precision == "bf16"
    offramp.Runtime(model, found.policy, low, calibrated=found.precision)(x)  # no warning, or pytest would show it


def test_a_trace_and_a_calibration_keep_their_precision(tmp_path):
    logits = torch.randn(2, 20, 3)
    trace = offramp.ExitTrace(logits, torch.randint(3, (20,)), precision="int8")
    assert offramp.ExitTrace.load(trace.save(tmp_path / "t.safetensors")).precision == "int8"
    assert trace.select(torch.arange(5)).precision == "int8"
    found = offramp.calibrate(
        offramp.MaxProb, trace, offramp.CostModel.from_costs((0.5, 1.0)), offramp.Budget(fraction=0.7)
    )
    assert offramp.Calibration.load(found.save(tmp_path / "c.json")).precision == "int8"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["eager", "onnx"])
def test_rows_that_stay_in_the_batch_change_no_answer(engines, model, rows, trace, name, engine):
    """Costs at which regrouping never pays, and at which it pays behind the first exit alone."""
    policy = policies(trace)[name]
    free = offramp.Runtime(model, policy, engines[engine])(rows)
    for dear in ((9.0,) * EXITS, (0.0, *(9.0,) * (EXITS - 1))):
        timed = tuple(
            TimedCosts(
                size, 1.0 * size, (0.2 * size,) * EXITS, (0.01,) * EXITS, regroup_s=tuple(d * size for d in dear)
            )
            for size in (1, 64)
        )
        costs = replace(COSTS, timed=timed, engine=engine)
        kept = offramp.Runtime(model, policy, engines[engine], costs=costs)(rows)
        assert torch.equal(kept.exit, free.exit)
        torch.testing.assert_close(kept.probabilities, free.probabilities, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept.score, free.score, rtol=1e-4, atol=1e-4)


def test_rows_stay_in_the_batch_where_regrouping_does_not_pay(model, rows, trace):
    policy, sizes = policies(trace)["max-prob"], []
    timed = tuple(TimedCosts(n, 1.0, (0.2,) * EXITS, (0.01,) * EXITS, regroup_s=(0.3,) * EXITS) for n in (1, 64))
    run = offramp.Runtime(model, policy, costs=replace(COSTS, timed=timed))
    handle = model.heads[-1].register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    try:
        run(rows)
        offramp.Runtime(model, policy)(rows)
    finally:
        handle.remove()
    assert sizes[0] == ROWS
    assert sizes[1] < ROWS


def test_costs_of_another_engine_are_not_used(model):
    timed = (TimedCosts(1, 1.0, (0.2,) * EXITS, (0.01,) * EXITS),)
    with pytest.warns(UserWarning, match="measured with onnx fp32 and this is eager fp32"):
        offramp.Runtime(model, offramp.MaxProb(0.5), costs=replace(COSTS, timed=timed, engine="onnx"))


@pytest.mark.parametrize("name", INSTALLED)
def test_two_threads_share_a_runtime(engines, model, rows, trace, name):
    run = offramp.Runtime(model, policies(trace)["beem"], engines[name])
    alone = [run(rows[i : i + 9]) for i in range(0, 54, 9)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            together = list(pool.map(lambda i: run(rows[i : i + 9]), range(0, 54, 9)))
            for ours, theirs in zip(together, alone, strict=True):
                assert torch.equal(ours.exit, theirs.exit)
                assert torch.equal(ours.label, theirs.label)


@pytest.mark.parametrize("name", INSTALLED)
def test_bad_inputs(engines, model, rows, name):
    run = offramp.Runtime(model, offramp.MaxProb(0.5), engines[name])
    assert run(rows[:0]).probabilities.shape == (0, model.classes)
    with pytest.raises(ShapeError, match=r"shape \[2, 1, 8, 16\]"):
        run(torch.randn(2, 1, 8, 16))
    with pytest.raises(ValueRangeError, match=r"rows \[1\] are NaN or infinite"):
        run(torch.stack([rows[0], torch.full_like(rows[0], float("nan"))]))


def test_what_engines_refuse(model, engines, monkeypatch):
    with pytest.raises(ValueRangeError, match="engine is 'tensorrt'; expected one of eager, compiled, onnx, onnx-file"):
        offramp.Runtime(model, offramp.MaxProb(0.5), "tensorrt")
    with pytest.raises(ValueRangeError, match="precision is 'int8'; the engine eager has fp32, bf16"):
        offramp.engine(model, precision="int8")
    with pytest.raises(ValueRangeError, match="the engine onnx has fp32, int8, int8-batch"):
        offramp.engine(model, "onnx", precision="bf16")
    with pytest.raises(ValueRangeError, match="threads is 0"):
        offramp.engine(model, threads=0)
    with pytest.raises(ValueRangeError, match="made for another model"):
        offramp.Runtime(small()[0], offramp.MaxProb(0.5), engines["onnx"])
    with pytest.raises(ShapeError, match="3 entries, but there are 4 exits"):
        offramp.Runtime(model, offramp.MaxProb((0.5,) * 3), engines["onnx"])
    double = offramp.attach(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double(), at=("0",), example=torch.randn(3, 4).double()
    )
    with pytest.raises(ValueRangeError, match="takes models in fp32; this one is in fp64"):
        offramp.engine(double, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"offramp\[onnx\]"):
        offramp.engine(model, "onnx")


def test_stages_given_by_hand_run_in_eager_mode_alone():
    parts = [nn.Linear(4, 4), nn.Linear(4, 3)]
    made = offramp.attach(nn.Sequential(*parts), at=("0",), example=torch.randn(3, 4), stages=parts)
    offramp.Runtime(made, offramp.MaxProb(0.5))(torch.randn(2, 4))
    for name in ("compiled", "onnx", "onnx-file"):
        with pytest.raises(NotStageable, match="given by hand"):
            offramp.engine(made, name)
