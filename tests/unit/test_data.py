import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from offramp.augment import CropFlip, Normalise
from offramp.data import Examples, Ragged, batches, seed_for
from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.loaders import as_data, as_loader
from offramp.splits import stratified_split


def tokens(rows=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    ids = [torch.full((n,), 100 + row) for row, n in enumerate(lengths)]
    return Examples(
        {"input_ids": ids, "attention_mask": [torch.ones_like(i) for i in ids]}, torch.arange(rows) % 3, pad_id=7
    )


def images(rows=10):
    return Examples(torch.arange(rows * 3 * 8 * 8).reshape(rows, 3, 8, 8).to(torch.uint8), torch.arange(rows) % 2)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 9),
    shuffle=st.booleans(),
    bucket=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_row_once(rows, size, shuffle, bucket, epoch):
    data = tokens(rows)
    made = batches(data, size, shuffle=shuffle, bucket=bucket, epoch=epoch)
    seen = [batch.rows for batch in made]
    assert len(made) == len(seen) == -(-rows // size)
    assert torch.cat(seen).sort().values.tolist() == list(range(rows))
    for batch in made:
        assert batch.inputs["input_ids"][:, 0].tolist() == (100 + batch.rows).tolist()
        assert batch.labels.tolist() == (batch.rows % 3).tolist()


def test_padding_is_on_the_right_up_to_the_longest_of_the_batch():
    data = tokens()
    for batch in batches(data, 4, bucket=True):
        lengths = data.lengths[batch.rows]
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.shape == mask.shape == (len(batch.rows), int(lengths.max()))
        assert mask.sum(1).tolist() == lengths.tolist()
        assert (ids[mask == 0] == 7).all()


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(**kwargs):
        return [b.rows.tolist() for b in batches(tokens(), 4, shuffle=True, bucket=True, **kwargs)]

    torch.manual_seed(1)
    first = order(seed=3, epoch=1)
    torch.manual_seed(2)
    assert order(seed=3, epoch=1) == first
    assert order(seed=3, epoch=2) != first
    assert order(seed=4, epoch=1) != first


@pytest.mark.parametrize("start", [0, 1, 3])
def test_starting_in_the_middle_gives_the_rest_of_the_same_epoch(start):
    def run(start):
        made = batches(images(), 3, shuffle=True, seed=5, augment=CropFlip(2), start=start)
        return [(b.rows.tolist(), b.inputs.sum().item()) for b in made]

    assert run(start) == run(0)[start:]


def test_bucketing_pads_less():
    data = tokens(200)
    cost = {
        b: sum(x.inputs["input_ids"].numel() for x in batches(data, 8, shuffle=True, bucket=b)) for b in (False, True)
    }
    assert cost[1] < 0.8 * cost[0]


def test_padded_tensors_are_trimmed_by_their_mask():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    data = Examples({"input_ids": mask * 5, "attention_mask": mask, "extra": torch.zeros(3, 2, 2)}, torch.arange(3))
    assert data.lengths.tolist() == [2, 1, 4]
    assert data.batch(torch.tensor([0, 1])).inputs["input_ids"].shape == (2, 2)
    assert data.batch(torch.tensor([0, 1])).inputs["extra"].shape == (2, 2, 2)
    left = Examples({"input_ids": mask, "attention_mask": mask.flip(1)}, torch.arange(3))
    assert left.lengths is None
    assert left.batch(torch.tensor([1])).inputs["input_ids"].shape == (1, 4)


def test_rows_and_selections():
    data = tokens()
    one, label = data[5]
    assert one["input_ids"].tolist() == [105] * int(data.lengths[5])
    assert int(label) == 2
    assert torch.equal(data[-1][0]["input_ids"], data[22][0]["input_ids"])
    with pytest.raises(IndexError):
        data[23]
    part = data.select([4, 2, 2])
    assert part.ids.tolist() == [4, 2, 2]
    assert [int(part[i][0]["input_ids"][0]) for i in range(3)] == [104, 102, 102]
    assert part.lengths.tolist() == data.lengths[[4, 2, 2]].tolist()
    assert images().select(torch.tensor([3]))[0][1] == 1
    with pytest.raises(DataError, match="no row"):
        data.select([])


def test_an_empty_text_still_has_a_row():
    data = Examples({"input_ids": [torch.tensor([], dtype=torch.int64), torch.tensor([1, 2])]}, torch.arange(2))
    assert data.batch(torch.tensor([0])).inputs["input_ids"].shape == (1, 0)
    assert data.batch(torch.tensor([0, 1])).inputs["input_ids"].tolist() == [[0, 0], [1, 2]]
    assert Ragged.of([]).lengths.tolist() == []


def test_fingerprint_changes_with_content():
    assert tokens().fingerprint() == tokens().fingerprint()
    assert tokens().fingerprint() != tokens(seed=1).fingerprint()
    assert tokens().fingerprint() != tokens().select(range(22)).fingerprint()


def test_bytes_are_normalised_per_batch():
    data = Examples(
        torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), prepare=Normalise((0.5, 0.5, 0.0), (0.5, 1.0, 2.0))
    )
    batch = data.batch(torch.tensor([1]))
    assert batch.labels is None
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs[0, :, 0, 0].tolist() == [1.0, 0.5, 0.5]


def test_crops_and_flips_are_windows_of_the_padded_image():
    picture = torch.arange(1, 37, dtype=torch.uint8).reshape(1, 1, 6, 6).repeat(50, 1, 1, 1)
    made = CropFlip(2)(picture, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(picture[:1], (2, 2, 2, 2))[0, 0]
    windows = [padded[y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    windows += [w.flip(1) for w in windows]
    hits = [next(i for i, w in enumerate(windows) if torch.equal(w, one[0])) for one in made]
    assert len(set(hits)) > 20
    assert any(h >= 25 for h in hits)
    assert torch.equal(CropFlip(2)(picture, torch.Generator().manual_seed(0)), made)
    with pytest.raises(ValueRangeError):
        CropFlip(-1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Examples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), DataError, "empty"),
        (lambda: Examples(torch.zeros(2, 3), torch.zeros(2)), ShapeError, "float32"),
        (lambda: Examples(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), ShapeError, r"expected \[2\]"),
        (lambda: Examples(torch.zeros(2, 3), torch.tensor([0, -1])), ValueRangeError, "row 1"),
        (lambda: Examples(torch.tensor([[0.0], [float("nan")]])), ValueRangeError, "NaN"),
        (lambda: Examples({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}), DataError, "different numbers"),
        (lambda: Examples({"a": [[1.5, 2.5]]}), ShapeError, "integers"),
        (lambda: Examples(torch.zeros(2, 3), ids=torch.arange(3)), ShapeError, "one per row"),
        (lambda: batches(images(), 0), ValueRangeError, "batch_size"),
        (lambda: as_data(5), DataError, "expected offramp.data.Examples"),
        (lambda: as_data(TensorDataset(torch.zeros(0, 2))), DataError, "empty"),
        (lambda: next(iter(as_loader([("a", "b")], 1))), DataError, "a batch is|expected"),
    ],
)
def test_errors_say_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


class Dicts(torch.utils.data.Dataset):
    def __init__(self, key):
        self.key = key

    def __len__(self):
        return 7

    def __getitem__(self, row):
        return {"pixel_values": torch.full((2,), float(row)), self.key: row % 2, "name": "text"}


@pytest.mark.parametrize("key", ["labels", "label"])
def test_datasets_and_loaders_are_the_same_rows(key):
    x, y = torch.arange(7).float().unsqueeze(1), torch.arange(7) % 2
    for data in ((x, y), TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=3)):
        got = list(as_loader(data, 3))
        assert torch.cat([b.inputs for b in got]).flatten().tolist() == list(range(7))
        assert torch.cat([b.rows for b in got]).tolist() == list(range(7))
        assert torch.cat([b.labels for b in got]).tolist() == y.tolist()
    for data in (Dicts(key), DataLoader(Dicts(key), batch_size=4)):
        got = list(as_loader(data, 4))
        assert [list(b.inputs) for b in got] == [["pixel_values"]] * 2
        assert torch.cat([b.labels for b in got]).tolist() == y.tolist()


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffling_loader_is_replayed_from_the_middle(own):
    x = torch.arange(20).float().unsqueeze(1)
    generator = torch.Generator() if own else None
    loader = DataLoader(TensorDataset(x, torch.zeros(20)), batch_size=3, shuffle=True, generator=generator)

    def run(start, epoch):
        made = as_loader(loader, 3, shuffle=True, seed=1, epoch=epoch, start=start)
        return [b.inputs.flatten().tolist() for b in made], len(made)

    whole, length = run(0, 0)
    assert length == 7
    torch.manual_seed(99)
    assert run(4, 0) == (whole[4:], 3)
    assert run(0, 1)[0] != whole


def test_seeds_differ():
    assert len({seed_for(s, a, b) for s in range(5) for a in range(20) for b in range(20)}) == 2000
    assert 0 <= seed_for(2**63, 2**40) < 2**63


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 4), max_size=120), cut=st.floats(0.05, 0.9), seed=st.integers(0, 5))
def test_stratified_splits_share_out_every_class(labels, cut, seed):
    y = torch.tensor(labels, dtype=torch.int64)
    first, second = stratified_split(y, [cut, 1 - cut], seed)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(y)))
    for label in y.unique():
        count = int((y == label).sum())
        assert abs(int((y[first] == label).sum()) - cut * count) <= 1
    again = stratified_split(y, [cut, 1 - cut], seed)
    assert torch.equal(first, again[0])


def test_stratified_split_may_leave_rows_and_refuses_nonsense():
    y = torch.arange(100) % 2
    parts = stratified_split(y, [0.2, 0.3], 1)
    assert abs(len(parts[0]) - 20) <= 2
    assert abs(len(parts[1]) - 30) <= 2
    assert not set(parts[0].tolist()) & set(parts[1].tolist())
    for shares in ([], [0.0, 1.0], [0.7, 0.7]):
        with pytest.raises(ValueRangeError):
            stratified_split(y, shares)
