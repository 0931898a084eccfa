"""One ONNX file leaves at the simulator's exits, for every policy, batch size and kind of network."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from many_policies import COSTS, EXITS, NAMES, ROWS, near_rounding, policies

import offramp
from offramp.errors import FormatError, NotStageable, ShapeError, ValueRangeError
from offramp.onnx import OnnxFile, cascade_of, export, export_stages, export_stages_to, read_about
from offramp.policies import BERxiT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def stages(model):
    return export_stages(model)


@pytest.fixture(scope="module")
def files(model, trace, stages):
    """The file of a policy by its name, made once."""
    made: dict[str, OnnxFile] = {}

    def file(name):
        if name not in made:
            made[name] = OnnxFile(cascade_of(model, policies(trace)[name], stages=stages).SerializeToString())
        return made[name]

    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_file_leaves_where_the_simulator_does(files, rows, trace, name):
    policy = policies(trace)[name]
    outcome = offramp.simulate(policy, trace, COSTS)
    near, run = near_rounding(policy, trace, outcome), files(name)
    for size in (1, 7, ROWS):
        parts = [run(rows[i : i + size]) for i in range(0, ROWS, size)]
        exits = torch.cat([p.exit for p in parts])
        assert torch.equal(exits[~near], outcome.exit[~near])
        same = exits == outcome.exit
        probabilities = torch.cat([p.probabilities for p in parts])
        torch.testing.assert_close(probabilities[same], torch.softmax(outcome.answer, -1)[same], rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.cat([p.label for p in parts]), probabilities.argmax(-1))
        torch.testing.assert_close(torch.cat([p.score for p in parts])[same], outcome.score[same], rtol=1e-4, atol=1e-4)


def test_thresholds_are_an_input(files, rows, trace):
    run = files("max-prob")
    assert set(run(rows, thresholds=2.0).exit.tolist()) == {EXITS - 1}
    assert set(run(rows, thresholds=0.0).exit.tolist()) == {0}
    other = policies(trace)["max-prob"]
    other = replace(other, thresholds=tuple(t + 0.05 for t in other.thresholds))
    outcome = offramp.simulate(other, trace, COSTS)
    near = near_rounding(other, trace, outcome)
    assert torch.equal(run(rows, thresholds=other.thresholds).exit[~near], outcome.exit[~near])
    for bad in ((0.5,), "high", float("nan")):
        with pytest.raises((ShapeError, ValueError)):
            run(rows, thresholds=bad)


def test_what_a_file_refuses(files, rows):
    run = files("max-prob")
    assert len(run(rows[:0]).label) == 0
    with pytest.raises(ShapeError, match=r"shape \[2, 1, 8, 16\]; the file was exported for"):
        run(torch.randn(2, 1, 8, 16))
    with pytest.raises(ShapeError, match="expected \\['input'\\]"):
        run({"pixels": rows})
    with pytest.raises(ValueRangeError, match=r"rows \[1\] are NaN or infinite"):
        run(torch.stack([rows[0], torch.full_like(rows[0], float("nan"))]))


def test_a_file_is_small_and_says_what_it_is(model, trace, stages):
    proto = cascade_of(model, policies(trace)["beem"], stages=stages)
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert proto.ByteSize() < 1.5 * weights + 200_000
    assert b".py" not in proto.SerializeToString()
    assert [o.version for o in proto.opset_import] == [20]
    onnx.checker.check_model(proto, full_check=True)
    about = json.loads({p.key: p.value for p in proto.metadata_props}["offramp"])
    assert offramp.loads(json.dumps(about["policy"])) == policies(trace)["beem"]


def test_a_policy_that_skips_an_exit_leaves_its_head_out(model, trace, stages):
    with_head = cascade_of(model, policies(trace)["max-prob"], stages=stages)
    without = cascade_of(model, policies(trace)["only the last"], stages=stages)
    assert without.ByteSize() < with_head.ByteSize()
    assert not any(node.op_type == "If" for node in without.graph.node)


def test_foreign_and_damaged_files(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        OnnxFile(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(FormatError, match="cannot read"):
        OnnxFile(tmp_path / "bad.onnx")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [info("x", 1, [1])], [info("y", 1, [1])]
    )
    foreign = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for read in (OnnxFile, read_about):
        with pytest.raises(FormatError, match="was not written by Offramp"):
            read(tmp_path / "foreign.onnx")


def test_policies_that_do_not_fit(model):
    with pytest.raises(ShapeError, match="3 entries, but there are 4 exits"):
        cascade_of(model, offramp.MaxProb((0.5, 0.5, 0.5)))
    with pytest.raises(ShapeError, match="needs the signals certainty"):
        cascade_of(model, BERxiT(0.5))


def test_stages_given_by_hand_have_no_graph():
    parts = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)]
    whole = torch.nn.Sequential(*parts)
    made = offramp.attach(whole, at=("0",), example=torch.randn(3, 4), stages=parts)
    with pytest.raises(NotStageable, match="given by hand"):
        cascade_of(made, offramp.MaxProb(0.5))


def bert(wide=16):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=wide, num_hidden_layers=3, num_attention_heads=2, intermediate_size=2 * wide,
        num_labels=3,
    )  # fmt: skip
    x = {"input_ids": torch.randint(50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    x["attention_mask"][1, 4:] = 0
    return transformers.BertForSequenceClassification(config), ("bert.encoder.layer.0", "bert.encoder.layer.1"), x


def vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config)
    blocks = [
        name for name, _ in network.named_modules() if name.endswith(("layer.0", "layer.1", "layers.0", "layers.1"))
    ]
    return network, tuple(blocks), {"pixel_values": torch.randn(3, 3, 16, 16)}


def some(like, batch, length):
    """Random rows; the later half of texts is shorter."""
    if "input_ids" not in like:
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[batch // 2 :, length // 2 + 1 :] = 0
    return {"input_ids": torch.randint(50, (batch, length)), "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, vit])
def test_transformers_with_other_batches_and_lengths(make):
    torch.manual_seed(0)
    network, taps, x = make()
    model = offramp.attach(network.eval(), at=taps, example=x)
    model.eval()
    with torch.no_grad():
        surest = torch.softmax(model(some(x, 40, 9)), -1).amax(-1)
    policy = offramp.MaxProb(tuple(surest.median(dim=1).values.add(1e-4).tolist()))
    run, live = OnnxFile(cascade_of(model, policy).SerializeToString()), offramp.Runtime(model, policy)
    used = set()
    for batch, length in ((1, 7), (2, 3), (19, 12)):
        rows = some(x, batch, length)
        ours, theirs = run(rows), live(rows)
        assert torch.equal(ours.exit, theirs.exit)
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-4, atol=1e-5)
        used |= set(ours.exit.tolist())
    assert len(used) > 1
    if "input_ids" in x:
        with pytest.raises(ShapeError, match="512 at most"):
            run({name: torch.ones(1, 600, dtype=torch.int64) for name in x})


def test_a_file_runs_without_torch(model, rows, trace, stages, tmp_path):
    """onnxruntime and numpy alone."""
    policy = policies(trace)["beem"]
    (tmp_path / "m.onnx").write_bytes(cascade_of(model, policy, stages=stages).SerializeToString())
    (tmp_path / "x.f32").write_bytes(rows[:5].numpy().tobytes())
    script = """
import sys, numpy as np, onnxruntime as ort
x = np.fromfile(sys.argv[2], np.float32).reshape(5, 1, 16, 16)
label, probabilities, exit, score = ort.InferenceSession(sys.argv[1]).run(None, {"input": x})
assert "torch" not in sys.modules
print(exit.tolist(), label.tolist())
"""
    words = [sys.executable, "-c", script, str(tmp_path / "m.onnx"), str(tmp_path / "x.f32")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    ours = offramp.Runtime(model, policy)(rows[:5])
    assert done.stdout.strip() == f"{ours.exit.tolist()} {ours.label.tolist()}"


def scheduled(folder, rows):
    """A scheduler of one's own: onnxruntime, numpy and stages.json; rows leave one by one."""
    import numpy as np
    import onnxruntime

    about = json.loads((folder / "stages.json").read_text())
    exits = np.full(len(rows), -1)
    place, values, state = np.arange(len(rows)), {"input": rows.numpy()}, []
    for number, visit in enumerate(about["visits"]):
        session = onnxruntime.InferenceSession(folder / visit["file"])
        names = visit["inputs"]
        feeds = dict(zip(names, [*(values[item["name"]] for item in visit["carry"]), *state], strict=True))
        out = dict(zip(visit["outputs"], session.run(visit["outputs"], feeds), strict=True))
        last = number == len(about["visits"]) - 1
        stop = np.ones(len(place), bool) if last else out["stop"]
        exits[place[stop]] = visit["exit"]
        if last or stop.all():
            break
        on = np.flatnonzero(~stop)
        place = place[on]
        state = [out[f"state {i} after"][on] for i in range(visit["states"])]
        whole = {**feeds, **out}
        following = {item["name"]: item for item in about["visits"][number + 1]["carry"]}
        values = {}
        for item in visit["goes_on"]:
            axis, value = following[item["name"]]["axis"], whole[item["from"]]
            values[item["name"]] = value if axis is None else np.take(value, on, axis)
    return exits


def test_files_for_a_scheduler(model, rows, trace, tmp_path):
    bundle = offramp.Bundle(model, labels=tuple(map(str, range(model.classes))))
    for name in ("beem", "max-prob", "only the last"):
        policy = policies(trace)[name]
        folder = export_stages_to(bundle, tmp_path / name, policy=policy)
        assert scheduled(folder, rows).tolist() == offramp.Runtime(model, policy)(rows).exit.tolist()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FormatError, match="holds something else"):
        export_stages_to(bundle, tmp_path / "mine")


@pytest.mark.slow
def test_a_file_in_int8(tmp_path):
    torch.manual_seed(0)
    network, taps, x = bert(wide=64)
    model = offramp.attach(network.eval(), at=taps, example=x)
    model.eval()
    bundle = offramp.Bundle(model, labels=("a", "b", "c"))
    policy = offramp.MaxProb(0.36)
    with pytest.warns(UserWarning, match="calibrated on logits in fp32 and runs in int8"):
        small = export(bundle, tmp_path / "int8.onnx", policy=policy, precision="int8")
    large = export(bundle, tmp_path / "fp32.onnx", policy=policy)
    assert small.stat().st_size < 0.6 * large.stat().st_size
    assert read_about(small)["precision"] == "int8"
    ours, theirs = OnnxFile(small)(x), OnnxFile(large)(x)
    torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=0.1, atol=0.05)
    with pytest.raises(ValueRangeError, match="precision is 'int4'"):
        export(bundle, tmp_path / "no.onnx", policy=policy, precision="int4")
    assert not (tmp_path / "no.onnx").exists()
