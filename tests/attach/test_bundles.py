"""Every model of the table as a bundle: written as data, read back, and the same."""

import json

import pytest
import torch
from attach_models import CASES
from test_table import SIZES, attached, close

from offramp.bundle.model import decode_model, encode_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CASES)
def test_a_model_read_from_data_is_the_same(name: str) -> None:
    case, model = CASES[name], attached(name)
    value, weights = encode_model(model)
    copies = {key: tensor.detach().clone() for key, tensor in weights.items()}
    read = decode_model(json.loads(json.dumps(value)), copies, case.inputs(3), torch.device("cpu"))
    assert sum(tensor.numel() for tensor in weights.values()) <= 1.05 * sum(
        tensor.numel() for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )
    with torch.inference_mode():
        for batch, tokens in SIZES if case.text else SIZES[:3]:
            inputs = case.inputs(batch, tokens)
            assert close(read(inputs), model(inputs))
            assert close(read.plain(inputs), model.plain(inputs))
    again, same = encode_model(read)
    assert again == value
    assert set(same) == set(weights)
