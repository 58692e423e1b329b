"""The global plan, compared with what torch's own planner and pickle make of the same pieces."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stillroom.checkpoint.layouts import Item, file_name, places
from stillroom.checkpoint.planning import described, plan_for_all
from stillroom.checkpoint.unpickling import load_metadata


def items_of(rank: int) -> list[Item]:
    far = 70_000 * 2**32
    return [
        Item("w", "float32", (9, 4), (3 * rank, 0), (3, 4), 0),
        Item("far", "bfloat16", (far,), (rank * 300, ), (300,), 0),
        Item("cube", "float8_e4m3fn", (2, 3, 300), (0, rank, 0), (2, 1, 300), 0),
        Item("shared", "int64", (5,), (0,), (5,), 0),
        Item("scalar", "bool", (), (), (), 0),
        Item("välue", "", (), (), (), 768),
        *([Item("only here", "", (), (), (), 1024)] if rank == 2 else []),
    ]  # fmt: skip


SHAPE = {"dict": [["w", "w"], ["list", {"list": ["shared", "scalar"]}], [3, "välue"]]}


def reference(items, chosen) -> Metadata:
    """The same in DCP's classes, built one by one."""
    state, storage = {}, {}
    for rank, held in enumerate(items):
        for place in places(held, chosen[rank]):
            item, where = place.item, _StorageInfo(file_name(rank), place.offset, place.size_bytes)
            if not item.dtype:
                state[item.key] = BytesStorageMetadata()
                storage[MetadataIndex(item.key)] = where
                continue
            properties = TensorProperties(dtype=getattr(torch, item.dtype))
            empty = TensorStorageMetadata(properties, torch.Size(item.shape), [])
            tensor = state.setdefault(item.key, empty)
            storage[MetadataIndex(item.key, item.offsets, len(tensor.chunks))] = where
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)))
    paths = {"w": ("w",), "shared": ("list", 0), "scalar": ("list", 1), "välue": ("3",)}
    return Metadata(state, paths, storage, StorageMeta(), CURRENT_DCP_VERSION)


def test_metadata_is_what_dcp_would_have_pickled():
    items = [items_of(rank) for rank in range(3)]
    parts, raw, shape = plan_for_all([described(held, SHAPE) for held in items])
    chosen = [range(len(held)) if part is None else part for held, (_, part, _) in zip(items, parts, strict=True)]
    wanted = reference(items, chosen)
    for found in (pickle.loads(raw), load_metadata(raw)):
        assert found.state_dict_metadata.keys() == wanted.state_dict_metadata.keys()
        for key, entry in wanted.state_dict_metadata.items():
            assert type(found.state_dict_metadata[key]) is type(entry)
            if isinstance(entry, TensorStorageMetadata):
                assert found.state_dict_metadata[key] == entry
        assert found.storage_data == wanted.storage_data
        hints = {(index.fqn, index.offset): index.index for index in found.storage_data}
        assert hints == {(index.fqn, index.offset): index.index for index in wanted.storage_data}
        assert type(next(iter(found.storage_data)).offset) is torch.Size
        assert (found.planner_data, found.version) == (wanted.planner_data, wanted.version)
        assert found.storage_meta == wanted.storage_meta
    assert shape == SHAPE


def test_each_piece_is_written_once_and_ranks_share_the_work():
    items = [[Item(f"k{n}", "float32", (1000,), (0,), (1000,), 0) for n in range(9)] for _ in range(3)]
    parts, _, _ = plan_for_all([described(held, SHAPE) for held in items])
    written = [part for _, part, _ in parts]
    assert sorted(number for part in written for number in part) == list(range(9))
    assert [len(part) for part in written] == [3, 3, 3]


@pytest.mark.parametrize("field", [("dtype", "int32"), ("shape", (8,))])
def test_ranks_that_disagree_are_told(field):
    one = Item("w", "float32", (4,), (0,), (4,), 0)
    parts, raw, _ = plan_for_all([described([one], SHAPE), described([one._replace(**dict([field]))], SHAPE)])
    assert ["on another" in why for _, _, why in parts] == [True, True]
    assert raw == b""
