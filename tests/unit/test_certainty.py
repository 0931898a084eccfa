"""A learned certainty: from the heads to the trace, the simulator, the live run, the bundle and the run folder."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import offramp
from offramp.bundle import Bundle, Choice
from offramp.certainty import WideLinear, learn_certainty, widen
from offramp.cost import CostModel
from offramp.errors import DataError, FormatError, NoSuchModule, ShapeError, ValueRangeError
from offramp.metrics import near_decision
from offramp.policies.berxit import BERxiT
from offramp.policies.confidence import MaxProb
from offramp.quality import auroc
from offramp.record import predict
from offramp.runtime import Runtime
from offramp.simulate import simulate, walk
from offramp.timing import never, with_step_times
from offramp.trace import ExitTrace

COSTS = CostModel.from_costs((0.4, 0.7, 1.0))


def rows(count: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes by the largest of three numbers. A fourth says whether the label is by chance instead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    hard = torch.rand(count, generator=generator) < 0.5
    x[:, 3] = hard.float() * 2 - 1
    chance = torch.randint(3, (count,), generator=generator)
    return x, torch.where(hard, chance, x[:, :3].argmax(1))


def attached(seed: int = 0, head: object = "auto", at: tuple[str, ...] = ("0", "1")) -> offramp.MultiExitModel:
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(8, 16), nn.ReLU())]
    blocks += [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)]
    return offramp.attach(nn.Sequential(*blocks, nn.Linear(16, 3)), at=at, head=head, example=torch.randn(3, 8))


@pytest.fixture(scope="module")
def taught() -> offramp.MultiExitModel:
    """A trained model that has learned a certainty."""
    model = attached()
    x, y = rows()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = sum(nn.functional.cross_entropy(logits, y) for logits in model(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    learn_certainty(model.eval(), rows(seed=1), epochs=10, progress=False)
    return model


@pytest.fixture(scope="module")
def trace(taught: offramp.MultiExitModel) -> ExitTrace:
    return offramp.record(taught, rows(seed=2), progress=False)


def test_logits_stay_bit_for_bit() -> None:
    for head in ("auto", lambda shape, classes: nn.Linear(shape[1], classes)):
        model = attached(head=head)
        model.heads[1].requires_grad_(False)
        x, y = rows()
        with torch.no_grad():
            before = [model(x[:count]) for count in (1, 2, 7, 64, 600)]
        kept = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        model.train()
        report = learn_certainty(model, (x, y), progress=False)
        assert model.training
        assert model.signals == ("certainty",)
        with torch.no_grad():
            after = [model(x[:count]) for count in (1, 2, 7, 64, 600)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(id(p) == kept[n][0] and p.requires_grad == kept[n][1]
                   for n, p in model.named_parameters() if n in kept)  # fmt: skip
        assert set(kept) < {name for name, _ in model.named_parameters()}
        assert all(p.grad is None for p in model.parameters())
        assert report.rows == 600
        assert report.error_before == pytest.approx((0.25, 0.25))
        assert report.auroc_before == (0.5, 0.5)
        assert max(report.error) < 0.25
        json.dumps(report.to_dict(), allow_nan=False)


def test_heads_give_evidence_and_logits(taught: offramp.MultiExitModel) -> None:
    tap = torch.rand(5, 16)
    logits, signals = taught.evidence(0, tap)
    assert logits.shape == (5, 3)
    assert signals.shape == (5, 1)
    assert torch.equal(logits, taught.head_logits(0, tap))
    assert torch.equal(signals, torch.sigmoid(taught.heads[0](tap)[:, 3:]))
    plain = attached()
    assert plain.signals == ()
    assert plain.evidence(0, tap)[1] is None
    assert plain.forward_with_signals(torch.randn(2, 8))[1] is None


def test_signals_are_recorded_by_name(taught: offramp.MultiExitModel, trace: ExitTrace) -> None:
    assert trace.signal_names == ("certainty",)
    assert trace.signals.shape == (3, 600, 1)
    assert (trace.signals[-1] == 0).all()
    assert (trace.signals[:-1] > 0).all()
    assert (trace.signals[:-1] < 1).all()
    x, _ = rows(seed=2)
    with torch.no_grad():
        logits, signals = taught.forward_with_signals(x)
        assert torch.equal(logits, taught(x))
    torch.testing.assert_close(trace.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trace.signals, signals, rtol=1e-5, atol=1e-5)
    assert torch.equal(predict(taught, rows(seed=2))[0], trace.logits)
    bare = offramp.record(attached(), rows(20), progress=False)
    assert (bare.signals, bare.signal_names) == (None, ())
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows(50)), batch_size=7)
    assert offramp.record(taught, shuffled, progress=False).signals.shape == (3, 50, 1)


def test_it_beats_chance_on_rows_never_seen(trace: ExitTrace) -> None:
    right = trace.logits.argmax(-1) == trace.labels
    for k in range(2):
        assert auroc(trace.signals[k, :, 0], right[k]) > 0.6


def test_the_same_seed_learns_the_same_and_anew() -> None:
    made = [attached() for _ in range(3)]
    for model, seed in zip(made, (0, 0, 1), strict=True):
        learn_certainty(model, rows(), seed=seed, progress=False)
    first, second, other = ([head.linear.signal_weight.clone() for head in model.heads] for model in made)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    layer = made[0].heads[0].linear
    again = learn_certainty(made[0], rows(), progress=False)
    assert made[0].heads[0].linear is layer
    assert torch.equal(layer.signal_weight, first[0])
    assert again.error_before == pytest.approx(again.error)


@pytest.mark.parametrize("enabled", [None, (False, True, True)])
def test_simulated_live_and_bundled_exits_are_the_same(
    taught: offramp.MultiExitModel, trace: ExitTrace, tmp_path: Path, enabled: tuple[bool, ...] | None
) -> None:
    policy = BERxiT((*trace.signals[:2, :, 0].median(dim=1).values.add(1e-4).tolist(), 1.0), enabled=enabled)
    outcome = simulate(policy, trace, COSTS)
    sure = ~near_decision(policy, trace, outcome)
    x, _ = rows(seed=2)
    assert len(outcome.exit.unique()) == (3 if enabled is None else 2)
    run = Runtime(taught, policy)
    for size in (1, 7, 600):
        live = torch.cat([run(part).exit for part in x.split(size)])
        assert torch.equal(live[sure], outcome.exit[sure])
    bundle = Bundle(taught, labels=("a", "b", "c"), policies={"certain": Choice(policy)}, costs=COSTS)
    found = Bundle.load(bundle.save(tmp_path / "small.offramp"))
    assert found.model.signals == ("certainty",)
    assert found.policies["certain"].policy == policy
    theirs, ours = found.runtime("certain")(x), run(x)
    assert torch.equal(theirs.exit, ours.exit)
    torch.testing.assert_close(theirs.score, ours.score, rtol=1e-5, atol=1e-6)
    again = offramp.record(found.model, rows(seed=2), progress=False)
    assert again.signal_names == ("certainty",)
    torch.testing.assert_close(again.signals, trace.signals, rtol=1e-4, atol=1e-5)
    # a bundle of a bundle, and policies that want logits only
    second = Bundle.load(found.save(tmp_path / "again.offramp"))
    assert torch.equal(second.runtime("certain")(x).exit, ours.exit)
    assert torch.equal(second.runtime("plain")(x).probabilities, bundle.runtime("plain")(x).probabilities)


def test_a_model_with_signals_runs_other_policies_as_before(taught: offramp.MultiExitModel, trace: ExitTrace) -> None:
    policy = MaxProb((0.5, 0.6, 0.0))
    outcome = simulate(policy, trace, COSTS)
    exits = Runtime(taught, policy)(rows(seed=2)[0]).exit
    sure = ~near_decision(policy, trace, outcome)
    assert torch.equal(exits[sure], outcome.exit[sure])


def test_a_policy_gets_its_signals_in_its_order() -> None:
    class Two(MaxProb):
        needs = ("b", "a")

        def step(self, k, seen, state):
            told.append(seen.signals)
            return super().step(k, seen, state)

    told: list[torch.Tensor] = []
    signals = torch.rand(3, 4, 3)
    made = ExitTrace(torch.zeros(3, 4, 2), signals=signals, signal_names=("a", "x", "b"))
    walk(Two(0.9), made)
    assert torch.equal(torch.stack(told), signals[..., [2, 0]])
    told.clear()
    model = attached()
    widen(model, ("a", "x", "b"))
    for k, head in enumerate(model.heads):
        head.linear.signal_bias.copy_(torch.tensor([0.0, 1.0, 2.0 + k]))
    Runtime(model, Two(2.0))(torch.randn(4, 8))
    assert [part.shape for part in told] == [(4, 2)] * 3
    torch.testing.assert_close(told[1], torch.sigmoid(torch.tensor([3.0, 0.0])).expand(4, 2))
    assert (told[2] == 0).all()


def test_a_trace_keeps_the_names(tmp_path: Path) -> None:
    signals = torch.rand(2, 5, 2)
    made = ExitTrace(torch.zeros(2, 5, 3), torch.arange(5) % 3, signals=signals, signal_names=("one", "zwei ä"))
    again = ExitTrace.load(made.save(tmp_path / "t.safetensors"))
    assert again.signal_names == ("one", "zwei ä")
    assert torch.equal(again.signals, signals)
    assert made.select(torch.tensor([1, 3])).signal_names == made.signal_names
    assert all(part.signal_names == made.signal_names for part in made.split((0.6, 0.4)))
    assert torch.equal(made.signals_for(("zwei ä",)), signals[..., 1:])
    assert torch.equal(made.signals_for(("zwei ä", "one")), signals.flip(-1))
    assert made.signals_for(()) is None
    with pytest.raises(ShapeError, match=r"lacks the signals certainty .* has one, zwei ä"):
        made.signals_for(("certainty",))
    with pytest.raises(ShapeError, match=r"it has none\. Record it from a model that has them"):
        ExitTrace(torch.zeros(2, 5, 3)).signals_for(("certainty",))
    for names in (("one",), ("one", "one"), ("one", ""), ("a", "b", "c")):
        with pytest.raises(ShapeError, match="signal_names"):
            ExitTrace(torch.zeros(2, 5, 3), signals=signals, signal_names=names)
    with pytest.raises(ShapeError, match="each of 0 signals"):
        ExitTrace(torch.zeros(2, 5, 3), signal_names=("one",))
    about = {"kind": "offramp.trace", "version": "1"}
    save_file({"logits": torch.zeros(2, 5, 3)}, tmp_path / "old.safetensors", metadata=about)
    assert ExitTrace.load(tmp_path / "old.safetensors").signal_names == ()
    bad = {**about, "signal_names": '["a", 3]'}
    save_file({"logits": torch.zeros(2, 5, 3), "signals": signals}, tmp_path / "bad.safetensors", metadata=bad)
    with pytest.raises(FormatError, match="damaged"):
        ExitTrace.load(tmp_path / "bad.safetensors")


def test_decisions_are_timed_with_signals(trace: ExitTrace) -> None:
    timed = offramp.measure(attached(), torch.randn(4, 8), batch_sizes=(2,), seconds=0.05)
    found = with_step_times(timed, never(BERxiT((0.5, 0.5, 0.0))), trace, seconds=0.05)
    assert found.timed[0].step_s > 0


class Ends(nn.Module):
    """A head that does something after its last linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, tap: torch.Tensor) -> torch.Tensor:
        return self.linear(tap).tanh()


def test_what_cannot_be_learned_is_said() -> None:
    x, y = rows(20)
    model = attached()
    with pytest.raises(DataError, match="no labels"):
        learn_certainty(model, [x[i] for i in range(20)], progress=False)
    with pytest.raises(DataError, match="data are str"):
        learn_certainty(model, "rows", progress=False)
    with pytest.raises(ValueRangeError, match="range from 0 to 3"):
        learn_certainty(model, (x, torch.arange(20) % 4), progress=False)
    with pytest.raises(ValueRangeError, match="epochs=0"):
        learn_certainty(model, (x, y), epochs=0, progress=False)
    with pytest.raises(ShapeError, match="expected what attach"):
        getattr(learn_certainty, "__wrapped__", learn_certainty)(nn.Linear(8, 3), (x, y), progress=False)
    assert model.signals == ()
    assert not any(isinstance(module, WideLinear) for module in model.modules())
    for head in (lambda shape, classes: Ends(shape[1], classes),
                 lambda shape, classes: nn.Sequential(nn.Linear(shape[1], classes), nn.LogSoftmax(-1))):  # fmt: skip
        with pytest.raises(NoSuchModule, match=r"head at '0' .* does not end in an nn.Linear with 3 outputs"):
            learn_certainty(attached(head=head), (x, y), progress=False)
    one = nn.Sequential(nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(NoSuchModule, match="share the module"):
        learn_certainty(attached(head=[nn.Sequential(one), nn.Sequential(one, nn.Identity())]), (x, y), progress=False)
    with pytest.raises(NoSuchModule, match="two exits have the same head"):
        learn_certainty(attached(head=[one, one]), (x, y), progress=False)


def test_a_layer_that_exits_share_with_the_model_stays_the_models() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    network.append(nn.Linear(16, 3))
    model = offramp.attach(
        network, at=("0", "1"), head=[network[2], nn.Sequential(network[2])], example=torch.randn(3, 8)
    )
    x, y = rows(100)
    with torch.no_grad():
        before = model(x)
        learn_certainty(model, (x, y), progress=False)
        assert torch.equal(model(x), before)
    assert type(network[2]) is nn.Linear
    assert model.heads[0].weight is network[2].weight
    assert not torch.equal(model.heads[0].signal_weight, model.heads[1][0].signal_weight)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied.forward_with_signals(x)[1], model.forward_with_signals(x)[1])


def test_a_policy_that_lacks_its_signals_is_refused(taught: offramp.MultiExitModel) -> None:
    plain, policy = attached(), BERxiT(0.5)
    with pytest.raises(ShapeError, match=r"BERxiT needs the signals certainty; the model has logits only\. .*learn_"):
        Runtime(plain, policy)
    with pytest.raises(ShapeError, match="the model has logits only"):
        Bundle(plain, labels=("a", "b", "c"), policies={"certain": Choice(policy)})
    with pytest.raises(ShapeError, match="lacks the signals certainty"):
        walk(policy, offramp.record(plain, rows(10), progress=False))

    class More(MaxProb):
        needs = ("certainty", "novelty")

    with pytest.raises(ShapeError, match=r"needs the signals novelty; the model has only the signals certainty"):
        Runtime(taught, More(0.5))


def test_half_precision_and_bfloat16(taught: offramp.MultiExitModel) -> None:
    model = copy.deepcopy(taught).bfloat16()
    x = rows(30)[0].bfloat16()
    with torch.no_grad():
        logits, signals = model.forward_with_signals(x)
    assert (logits.dtype, signals.dtype) == (torch.bfloat16, torch.float32)
    learn_certainty(model, (x, rows(30)[1]), progress=False)
    assert Runtime(model, BERxiT(0.5))(x).score.dtype == torch.float32
    trace = offramp.record(taught, rows(30), progress=False, precision="bf16")
    assert trace.signals.dtype == torch.float32


def test_a_constant_feature_does_no_harm() -> None:
    model = attached()
    for block in model.backbone[:2]:
        block[0].weight.data[:4] = 0
        block[0].bias.data[:4] = 5
    report = learn_certainty(model, rows(), progress=False)
    assert max(report.error) <= 0.25
    everyone = rows(40)[0], attached(seed=3).eval()(rows(40)[0])[0].argmax(-1)
    assert learn_certainty(attached(seed=3), everyone, progress=False).auroc[0] is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from offramp.cli import app

    folder = tmp_path_factory.mktemp("certainty") / "digits"
    done = CliRunner().invoke(app, ["train", "digits", "--epochs", "1", "--limit", "200", "--out", str(folder)])
    assert done.exit_code == 0, done.stderr
    return folder


def test_a_run_folder_keeps_it(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from offramp.cli import app
    from offramp.runs import load_run, read_run, save_signals

    def command(*words: object, code: int = 0):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == code, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
        return done

    before = json.loads((run / "run.json").read_text())
    assert "signals" not in before["fields"]
    assert read_run(run)["signals"] == []
    plain = load_run(run)[1]
    command("record", run, "--split", "calibrate")
    said = command("certainty", run, "--epochs", 2, "--device", "cpu", "--json")
    assert "calibrate.safetensors" in said.stderr
    assert f"offramp record {run}" in said.stderr
    value = json.loads(said.stdout)
    assert len(value["report"]["auroc"]) == plain.exits - 1
    about = json.loads((run / "run.json").read_text())
    assert about["fields"]["signals"] == ["certainty"]
    assert {k: v for k, v in about["fields"].items() if k not in ("signals", "weights_sha256")} == {
        k: v for k, v in before["fields"].items() if k != "weights_sha256"
    }
    work, model, tokenizer = load_run(run)
    assert model.signals == ("certainty",)
    inputs = torch.stack([work.load("test", tokenizer)[row][0] for row in range(5)])
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
        expected = model.forward_with_signals(inputs)[1]
    command("record", run, "--split", "calibrate")
    assert ExitTrace.load(run / "calibrate.safetensors").signal_names == ("certainty",)
    save_signals(run, model)
    with torch.no_grad():
        assert torch.equal(load_run(run)[1].forward_with_signals(inputs)[1], expected)
    assert "learned" in command("certainty", run, "--epochs", 1).stdout
    assert any("signal_weight" in name for name in load_file(run / "model.safetensors"))
    for signals in (["other"], "certainty", None):
        (tmp_path / "run.json").write_text(json.dumps({**about, "fields": {**about["fields"], "signals": signals}}))
        with pytest.raises(FormatError, match="has the signals"):
            read_run(tmp_path)
