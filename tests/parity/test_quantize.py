"""Stages in 8-bit whole numbers: rows stay on their own, the joined file and the chain of stages agree."""

import math
import sys

import numpy as np
import pytest
import torch

import offramp
from offramp.errors import MissingExtra, ValueRangeError
from offramp.onnx import OnnxFile, cascade_of, export_stages
from offramp.onnx.quantize import PRECISIONS, quantized, quantized_proto
from offramp.onnx.session import session_options

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

EXITS, LENGTH, WORDS = 3, 9, 100


class Chain:
    """All stages, one session each: inputs -> logits of every exit [exit row cls]."""

    def __init__(self, stages):
        self.signals = [stage.signals for stage in stages]
        self.sessions = [
            ort.InferenceSession(s.proto.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
            for s in stages
        ]

    def __call__(self, x):
        carry, logits = [np.asarray(value) for value in x.values()], []
        for session, signals in zip(self.sessions, self.signals, strict=True):
            names = [value.name for value in session.get_inputs()]
            first, *carry = session.run(None, dict(zip(names, carry, strict=True)))
            logits.append(first)
            carry = carry[signals:]
        return np.stack(logits)


def some(batch, seed=0):
    """Rows of words, some shorter than others."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, LENGTH, dtype=torch.int64)
    mask[batch // 2 :, LENGTH // 2 + 1 :] = 0
    return {"input_ids": torch.randint(WORDS, (batch, LENGTH), generator=generator), "attention_mask": mask}


def part(x, rows):
    return {name: value[rows] for name, value in x.items()}


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=EXITS, num_attention_heads=2, intermediate_size=128,
        num_labels=4, max_position_embeddings=80, initializer_range=0.15,
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config).eval()
    taps = tuple(f"bert.encoder.layer.{k}" for k in range(EXITS - 1))
    made = offramp.attach(network, at=taps, example=some(3)).eval()
    for head in made.heads:  # so that rows differ
        torch.nn.init.normal_(head.linear.weight, std=0.3)
    return made


@pytest.fixture(scope="module")
def stages(model):
    plain = export_stages(model)
    return {precision: quantized(plain, precision) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def chains(stages):
    return {precision: Chain(found) for precision, found in stages.items()}


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


def test_what_is_quantised(stages):
    for plain, made in zip(stages["fp32"], stages["int8"], strict=True):
        assert "MatMulInteger" not in kinds(plain.proto)  # the given stages stay as they were
        found = kinds(made.proto)
        last = made.k == EXITS - 1
        assert found.count("MatMulInteger") == 6 + last  # Q, K, V, two dense layers, one out; the pooler
        assert found.count("QuantizeLinear") == 4 + last  # Q, K and V share theirs
        assert found.count("Gemm") == 1  # the head or the classifier
        onnx.checker.check_model(made.proto, full_check=True)
        assert (made.k, made.enters, made.leaves, made.signals) == (plain.k, plain.enters, plain.leaves, plain.signals)
    weights = onnx.numpy_helper.to_array
    whole = [weights(t) for s in stages["int8"] for t in s.proto.graph.initializer if t.data_type == 3]
    assert {w.dtype for w in whole} == {np.dtype(np.int8)}
    assert not any(t.data_type == 1 and math.prod(t.dims) >= 64 * 64 for t in stages["int8"][1].proto.graph.initializer)


def test_int8_is_row_by_row(chains):
    x = some(13)
    together = chains["int8"](x)
    for row in range(13):
        alone = chains["int8"](part(x, [row]))
        np.testing.assert_allclose(alone[:, 0], together[:, row], rtol=0, atol=2e-6)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(chains["int8"](part(x, order)), together[:, order.numpy()], rtol=0, atol=2e-6)


def test_int8_batch_is_not(chains):
    x = some(13)
    together = chains["int8-batch"](x)
    apart = [np.abs(chains["int8-batch"](part(x, [row]))[:, 0] - together[:, row]).max() for row in range(13)]
    assert max(apart) > 1e-4


@pytest.mark.parametrize("precision", ["int8", "int8-batch"])
def test_logits_stay_near(chains, precision):
    x = some(64, seed=2)
    plain, made = chains["fp32"](x), chains[precision](x)
    assert not np.array_equal(plain, made)
    spread = plain.std()
    assert np.abs(plain - made).mean() < (0.05 if precision == "int8" else 0.1) * spread
    assert (plain.argmax(-1) == made.argmax(-1)).mean() > (0.98 if precision == "int8" else 0.9)


@pytest.mark.parametrize("policy", ["max-prob", "patience"])
def test_a_joined_file_leaves_where_the_stages_do(model, stages, chains, policy):
    x = some(60, seed=3)
    logits = torch.from_numpy(chains["int8"](x))
    surest = torch.softmax(logits, -1).amax(-1)
    if policy == "max-prob":
        chosen = offramp.MaxProb(tuple((surest.median(dim=1).values + 1e-4).tolist()))
        near = ((surest - torch.tensor(chosen.thresholds)[:, None]).abs() < 1e-5).any(dim=0)
    else:
        chosen, near = offramp.Patience(1), torch.zeros(60, dtype=torch.bool)
    outcome = offramp.simulate(chosen, offramp.ExitTrace(logits=logits), offramp.CostModel.from_costs((1.0, 2.0, 3.0)))
    file = cascade_of(model, chosen, stages=stages["int8"]).SerializeToString()
    assert len(file) < 0.5 * sum(s.proto.ByteSize() for s in stages["fp32"])
    run = OnnxFile(file, threads=1)
    for size in (1, 7, 60):
        found = [run(part(x, slice(i, i + size))) for i in range(0, 60, size)]
        exits = torch.cat([p.exit for p in found])
        assert torch.equal(exits[~near], outcome.exit[~near])
        same = exits == outcome.exit
        probabilities = torch.cat([p.probabilities for p in found])
        torch.testing.assert_close(probabilities[same], torch.softmax(outcome.answer, -1)[same], rtol=1e-4, atol=1e-5)
    assert len(set(outcome.exit.tolist())) > 1


def test_graphs_shrink(stages):
    sizes = {precision: sum(s.proto.ByteSize() for s in found) for precision, found in stages.items()}
    numbers = [t for s in stages["fp32"] for t in s.proto.graph.initializer if math.prod(t.dims) >= 64 * 64]
    large = sum(math.prod(t.dims) for t in numbers)
    assert sizes["int8"] < sizes["fp32"] - 2.5 * large  # a byte instead of four, and scales
    assert sizes["int8-batch"] < sizes["fp32"] - 2 * large


def small(bias=True):
    """Rows of 80 features through two products of two dimensions, which are exported as `Gemm`."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(80, 96, bias=bias), torch.nn.ReLU(), torch.nn.Linear(96, 64), torch.nn.Linear(64, 3)
    )
    made = offramp.attach(network.eval(), at=("1",), example=torch.randn(3, 80)).eval()
    return made, export_stages(made)


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_rows(bias):
    _, plain = small(bias)
    x = {"input": 10 ** torch.linspace(-3, 3, 7)[:, None] * torch.randn(7, 80)}  # rows of very different size
    expected = Chain(plain)(x)
    made = quantized(plain, "int8")
    assert [kinds(s.proto).count("MatMulInteger") for s in made] == [1, 1]
    found = Chain(made)(x)
    rows = np.abs(expected).max(axis=(0, 2))
    assert (np.abs(found - expected).max(axis=(0, 2)) < 0.05 * rows).all()
    for row in range(7):
        np.testing.assert_allclose(Chain(made)(part(x, [row]))[:, 0], found[:, row], rtol=1e-5, atol=1e-6)
    batch = Chain(quantized(plain, "int8-batch"))(x)
    nothing = Chain(plain)({"input": torch.zeros(1, 80)})[:, 0]
    told = np.abs(expected[:, 0] - nothing).max()  # by the least row; the largest one's scale leaves nothing
    assert np.abs(batch - expected)[:, 0].max() > 0.5 * told


def test_zeros_and_nan_stay_what_they_are():
    model, plain = small()
    x = {"input": torch.randn(4, 80)}
    x["input"][1] = 0
    x["input"][2, 17] = float("nan")
    expected, found = Chain(plain)(x), Chain(quantized(plain, "int8"))(x)
    np.testing.assert_allclose(found[0, 1], expected[0, 1], rtol=1e-5, atol=1e-6)  # zeros give the bias alone
    assert np.isnan(found).all(axis=(0, 2)).tolist() == [False, False, True, False]
    run = OnnxFile(cascade_of(model, offramp.MaxProb(0.5), stages=quantized(plain, "int8")).SerializeToString())
    with pytest.raises(ValueRangeError, match=r"rows \[2\] are NaN or infinite"):
        run(x["input"])


def test_one_plain_graph():
    """The network without exits, and products that are kept: too small, of no constant, of other numbers."""
    helper, info = onnx.helper, onnx.helper.make_tensor_value_info
    shapes = {"a": (64, 64), "b": (64, 63), "c": (2, 64, 64)}
    tensors = [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]

    def graph(*nodes):
        made = helper.make_graph(
            [helper.make_node(kind, list(ins), list(outs)) for kind, ins, outs in nodes], "g",
            [info("x", 1, ["batch", 64])], [info("y", 1, None)], tensors,
        )  # fmt: skip
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)

    left = graph(("MatMul", "xb", "z"), ("MatMul", "xc", "u"), ("MatMul", "xx", "v"), ("Identity", "z", "y"))
    for precision in PRECISIONS:
        assert quantized_proto(left, precision) is left
    both = graph(("MatMul", "xa", "z"), ("MatMul", "zb", "y"))
    for precision in ("int8", "int8-batch"):
        made = quantized_proto(both, precision)
        assert kinds(made).count("MatMulInteger") == 1
        assert kinds(made).count("MatMul") == 1
        assert kinds(both) == ["MatMul", "MatMul"]


def test_convolutions_are_left():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 64, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )
    made = offramp.attach(network.eval(), at=("1",), example=torch.randn(3, 1, 3, 3)).eval()
    plain = export_stages(made)
    for precision in ("int8", "int8-batch"):
        assert [kinds(s.proto) for s in quantized(plain, precision)] == [kinds(s.proto) for s in plain]


def test_errors(stages, monkeypatch):
    for wrong in ("int4", ""):
        with pytest.raises(ValueRangeError, match="expected one of fp32, int8, int8-batch"):
            quantized(stages["fp32"], wrong)
    assert quantized(stages["fp32"], "fp32")[0].proto is stages["fp32"][0].proto
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="offramp\\[onnx\\]"):
        quantized(stages["fp32"], "int8-batch")
