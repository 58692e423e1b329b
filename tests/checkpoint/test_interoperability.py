"""Stock PyTorch DCP reads what we write, and we read what it writes: bit for bit."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as stock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.checkpoint import Checkpointer
from stillroom.checkpoint.framing import slot_bytes, tensor_frame, value_archive, value_records
from tests.checkpoint.states import DTYPES, STOCK_DTYPES, any_tensor, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*single process")

names = st.text("abcXYZ_-0 ", min_size=1, max_size=5)
tensors = st.builds(
    any_tensor, st.sampled_from(STOCK_DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple), st.integers(0, 99)
)
values = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.text(max_size=20), st.booleans(), st.none(), st.lists(st.integers()),
    st.tuples(st.integers(), st.text(max_size=3)), st.binary(max_size=9),
)  # fmt: skip
trees = st.recursive(
    st.one_of(tensors, values),
    lambda below: st.dictionaries(names, below, min_size=1, max_size=4) | st.lists(below, min_size=1, max_size=3),
    max_leaves=8,
)
states = st.dictionaries(names, trees, min_size=1, max_size=5)
generated = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def emptied(node):
    """The same tree with other contents, for loading into."""
    if isinstance(node, torch.Tensor):
        return torch.zeros_like(node)
    if isinstance(node, dict):
        return {key: emptied(value) for key, value in node.items()}
    if isinstance(node, list) and any(isinstance(value, torch.Tensor | dict | list) for value in node):
        return [emptied(value) for value in node]
    return None


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with Checkpointer(tmp_path_factory.mktemp("ours")) as checkpointer:
        yield checkpointer


def stock_reads_ours(ours, state):
    path = ours.save(1, state).result().path
    into = emptied(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.load(into, checkpoint_id=path)
    assert_same(into, state)


def we_read_stock(root, state):
    path = root / "step-00000001"
    shutil.rmtree(path, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.save(state, checkpoint_id=path)
    with Checkpointer(root) as checkpointer:
        into = emptied(state)
        checkpointer.load(into=into)
        assert_same(into, state)
        assert checkpointer.verify(1) == []


@given(state=states)
@generated
def test_stock_dcp_reads_ours(ours, state):
    stock_reads_ours(ours, state)


@given(state=states)
@generated
def test_we_read_what_stock_dcp_wrote(tmp_path, state):
    we_read_stock(tmp_path, state)


@pytest.mark.slow
@given(state=states)
@settings(generated, max_examples=500)
def test_stock_dcp_reads_many_of_ours(ours, state):
    stock_reads_ours(ours, state)


@pytest.mark.slow
@given(state=states)
@settings(generated, max_examples=500)
def test_we_read_many_that_stock_dcp_wrote(tmp_path, state):
    we_read_stock(tmp_path, state)


def test_a_flipped_bit_in_a_checkpoint_of_stock_dcp_is_found(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.save({"w": torch.ones(1000)}, checkpoint_id=tmp_path / "step-00000001")
    file = tmp_path / "step-00000001" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with Checkpointer(tmp_path) as checkpointer:
        assert ["'w'" in line for line in checkpointer.verify(1)] == [True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5), (257, 300)])
def test_a_framed_tensor_is_what_torch_load_reads(dtype, shape):
    import io
    import zipfile
    import zlib

    tensor = any_tensor(dtype, shape)
    frame = tensor_frame(dtype, shape)
    payload = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    tail = bytearray(frame.tail)
    for at in frame.crc_at:
        tail[at : at + 4] = zlib.crc32(payload).to_bytes(4, "little")
    whole = frame.head + payload + bytes(tail)
    assert len(frame.head) % 64 == 0
    assert zipfile.ZipFile(io.BytesIO(whole)).testzip() is None
    assert_same(torch.load(io.BytesIO(whole), weights_only=True), tensor)


def test_a_tensor_beyond_four_gibibytes_is_framed_in_zip64(tmp_path):
    frame = tensor_frame(torch.uint8, (5 * 2**30,))
    path = tmp_path / "large"
    with path.open("wb") as file:  # a hole where the payload would be
        file.write(frame.head)
        file.seek(frame.payload_bytes, 1)
        file.write(frame.tail)
    tensor = torch.load(path, mmap=True, weights_only=True)
    assert tensor.shape == (5 * 2**30,)
    assert tensor[-1] == 0


@given(value=values, growth=st.integers(0, 100_000))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_value_fills_its_slot_whatever_its_size(value, growth):
    import io

    records = value_records([value, "x" * growth])
    slot = slot_bytes(records)
    archive = value_archive(records, slot)
    assert len(archive) == slot
    assert torch.load(io.BytesIO(archive), weights_only=False) == [value, "x" * growth]
    with pytest.raises(ValueError, match="slot"):
        value_archive(records, len(value_archive(records)) - 1)
