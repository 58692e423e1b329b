"""A teacher's log-probabilities on disk: what is read is what was written, whatever happens to process or file."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import ArtifactError
from stillroom.models.packing import TokenSequence
from stillroom.teacher.signal_cache import SignalCache, SignalIdentity
from stillroom.teacher.top_k import LOWEST, Layout, SequenceTopK


def identity(**changes) -> SignalIdentity:
    given = {
        "teacher": "a", "precision": "fp32", "tokenizer": "b", "template": "c", "vocabulary": 500, "top_k": 8,
        "value_bytes": 4, **changes,
    }  # fmt: skip
    return SignalIdentity(**given)


def sequence(index: int, targets: int = 5) -> TokenSequence:
    prompt = (index % 97, index // 97, 3)
    return TokenSequence((*prompt, *range(targets)), len(prompt), f"question-{index}")


def top_k(seed: int, positions: int = 5, k: int = 8, vocabulary: int = 500) -> SequenceTopK:
    """The k most likely of random logits."""
    logits = np.random.default_rng(seed).normal(0, 4, (positions, vocabulary))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1)
    sorted_logprobs = np.take_along_axis(logprobs, ids, 1)
    tail = np.logaddexp.reduce(sorted_logprobs[:, k:], axis=1, initial=-np.inf)
    return SequenceTopK(ids[:, :k], sorted_logprobs[:, :k].astype(np.float32), tail.astype(np.float32))


def filled(root, count: int, **changes) -> list[TokenSequence]:
    sequences = [sequence(index) for index in range(count)]
    with SignalCache(root, identity(**changes)) as cache:
        for index, one in enumerate(sequences):
            cache.put([one], [top_k(index)])
    return sequences


def file_of(root):
    (path,) = root.glob("*/signals.bin")
    return path


def assert_equal(found: SequenceTopK, wanted: SequenceTopK) -> None:
    assert np.array_equal(found.ids_NK, wanted.ids_NK)
    assert np.array_equal(found.logprobs_NK, wanted.logprobs_NK)
    assert np.array_equal(found.tail_N, wanted.tail_N)


def test_what_was_put_is_read_in_this_process_and_in_another(tmp_path):
    with SignalCache(tmp_path, identity()) as cache:
        cache.put([sequence(0), sequence(1)], [top_k(0), top_k(1)])
        assert_equal(cache.read(sequence(1)), top_k(1))
        with SignalCache(tmp_path, identity()) as other:
            assert_equal(other.read(sequence(0)), top_k(0))
            cache.put([sequence(2)], [top_k(2)])
            assert_equal(other.read(sequence(2)), top_k(2))
            assert other.missing([sequence(3), sequence(2), sequence(3)]) == [sequence(3)]


@settings(max_examples=60, deadline=None)
@given(
    positions=st.integers(0, 6),
    k=st.integers(1, 20),
    vocabulary=st.sampled_from([20, 500, 65_536, 65_537, 152_064]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_signal_comes_back_within_the_stated_bounds(positions, k, vocabulary, seed):
    dice = np.random.default_rng(seed)
    ids_NK = np.array([dice.choice(vocabulary, k, replace=False) for _ in range(positions)], int).reshape(positions, k)
    spread = dice.choice([0.01, 1, 30])
    values_NK = np.sort(dice.exponential(spread, (positions, k + 1)), axis=1)
    values_NK = -values_NK - np.logaddexp.reduce(-values_NK, axis=1, keepdims=True)
    wanted = SequenceTopK(ids_NK, values_NK[:, :k].astype(np.float32), values_NK[:, k].astype(np.float32))

    exact, compact = Layout(vocabulary, 4), Layout(vocabulary, 2)
    body = exact.encode(wanted)
    assert len(body) == exact.body_bytes(positions, k)
    assert_equal(exact.decode(memoryview(body), positions, k), wanted)

    found = compact.decode(memoryview(compact.encode(wanted)), positions, k)
    assert np.array_equal(found.ids_NK, wanted.ids_NK)
    x_NK = -np.maximum(wanted.logprobs_NK.astype(np.float64), -LOWEST)
    bound_NK = 2**-13 * np.sqrt(x_NK)
    shift_N1 = (np.exp(-x_NK) * bound_NK).sum(axis=1, keepdims=True)  # summing to one again moves all by at most this
    assert (np.abs(-found.logprobs_NK - x_NK) <= bound_NK + 1.01 * shift_N1 + 1e-5).all()
    total_N = np.exp(found.logprobs_NK.astype(np.float64)).sum(1) + np.exp(found.tail_N.astype(np.float64))
    assert np.allclose(total_N, 1, atol=1e-6)


@pytest.mark.parametrize(("vocabulary", "most"), [(49_152, 262), (151_936, 326)])
def test_a_token_takes_at_most_400_bytes_at_k_64(tmp_path, vocabulary, most):
    with SignalCache(tmp_path, identity(vocabulary=vocabulary, top_k=64, value_bytes=2)) as cache:
        cache.put([sequence(0, targets=60)], [top_k(0, 60, 64, 5000)])
        assert cache.path.stat().st_size == cache.bytes_per_token * 60
        assert cache.bytes_per_token - 128 / 60 <= most <= 400


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "other"}, {"precision": "bf16"}, {"tokenizer": "other"}, {"template": "other"},
        {"vocabulary": 501}, {"top_k": 9}, {"value_bytes": 2},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_signal_is_not_taken_for_one_of_another_identity(tmp_path, change):
    filled(tmp_path, 1)
    with SignalCache(tmp_path, identity(**change)) as cache:
        assert cache.missing([sequence(0)]) == [sequence(0)]


def test_a_signal_belongs_to_its_token_ids_and_not_to_a_name(tmp_path):
    (one,) = filled(tmp_path, 1)
    renamed = TokenSequence(one.ids, one.first_target, "other")
    longer_answer = TokenSequence(one.ids, one.first_target - 1, one.name)
    other_word = TokenSequence((*one.ids[:-1], 9), one.first_target, one.name)
    with SignalCache(tmp_path, identity()) as cache:
        assert_equal(cache.read(renamed), top_k(0))
        assert cache.missing([longer_answer, other_word]) == [longer_answer, other_word]
        with pytest.raises(ArtifactError, match="'question-0'"):
            cache.read(other_word)


def test_a_file_cut_anywhere_gives_the_records_before_the_cut_and_goes_on_after_it(tmp_path):
    sequences = filled(tmp_path, 3)
    path = file_of(tmp_path)
    whole = path.read_bytes()
    record = (len(whole) - 64) // 3
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        kept = max(0, (size - 64) // record)
        with SignalCache(tmp_path, identity()) as cache:
            assert cache.missing(sequences) == sequences[kept:]
            for index in range(kept, 3):
                cache.put([sequences[index]], [top_k(index)])
        assert path.read_bytes() == whole


def test_a_flipped_bit_anywhere_is_found_and_its_sequence_alone_is_computed_anew(tmp_path, capsys):
    sequences = filled(tmp_path, 4)
    path = file_of(tmp_path)
    whole = path.read_bytes()
    record = (len(whole) - 64) // 4
    dice = random.Random(0)
    for _ in range(120):
        at = dice.randrange(64, len(whole))
        broken = bytearray(whole)
        broken[at] ^= 1 << dice.randrange(8)
        path.write_bytes(broken)
        index = (at - 64) // record
        # The last bytes of a record only fill it up to a multiple of 8.
        padding = (at - 64) % record >= 64 + Layout(500, 4).body_bytes(5, 8)
        with SignalCache(tmp_path, identity()) as cache:
            lacking = cache.missing(sequences)
            assert lacking == ([] if padding else [sequences[index]])
            for one in lacking:
                cache.put([one], [top_k(index)])
            for place, one in enumerate(sequences):
                assert_equal(cache.read(one), top_k(place))
        with SignalCache(tmp_path, identity()) as cache:
            assert cache.missing(sequences) == []
    assert "'question-2' is damaged" in capsys.readouterr().err


def test_a_record_that_is_damaged_while_it_is_used_names_its_sequence(tmp_path):
    sequences = filled(tmp_path, 2)
    with SignalCache(tmp_path, identity()) as cache:
        cache.read(sequences[1])
        with file_of(tmp_path).open("r+b") as file:
            file.seek(-20, os.SEEK_END)
            file.write(b"\x55")
        with pytest.raises(ArtifactError, match=r"'question-1' is damaged: it has CRC32(.|\n)*help: run again"):
            cache.read(sequences[1])


def test_a_damaged_file_header_is_refused(tmp_path):
    filled(tmp_path, 1)
    with file_of(tmp_path).open("r+b") as file:
        file.write(b"NOTOURS!")
    with pytest.raises(ArtifactError, match="delete"):
        SignalCache(tmp_path, identity())


def crafted(body: bytes, *, positions: int, k: int, size: int | None = None, key: bytes = bytes(32)) -> bytes:
    """A record whose checksums are right, by whoever wrote it; written here without our own writer."""
    rest = struct.pack("<IIHxxQ32s", zlib.crc32(body), positions, k, len(body) if size is None else size, key)
    return b"\x93TOPKREC" + struct.pack("<I", zlib.crc32(rest)) + rest + body + bytes(-len(body) % 8)


class _Trap:
    def __reduce__(self):
        return os.abort, ()


HOSTILE = {
    "a size that no memory has": crafted(b"", positions=2**32 - 1, k=8, size=2**63),
    "more positions than bytes": crafted(bytes(40), positions=2**31, k=8),
    "k above the cache's": crafted(bytes(4 + 60_000 * 6), positions=1, k=60_000),
    "k of zero": crafted(bytes(20), positions=5, k=0),
    "no bytes": b"",
    "noise": bytes(range(256)) * 40,
    "a pickle": pickle.dumps(_Trap()) * 3,
    "headers without end": b"\x93TOPKREC" * 5000,
}


@pytest.mark.parametrize("junk", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_passed_over(tmp_path, junk):
    sequences = filled(tmp_path, 2)
    path = file_of(tmp_path)
    whole = path.read_bytes()
    record = (len(whole) - 64) // 2
    path.write_bytes(whole[: 64 + record] + junk + whole[64 + record :])
    with SignalCache(tmp_path, identity()) as cache:
        lacking = cache.missing(sequences)
        assert lacking in ([], [sequences[1]])
        cache.put(lacking, [top_k(1) for _ in lacking])
        assert_equal(cache.read(sequences[0]), top_k(0))
        assert_equal(cache.read(sequences[1]), top_k(1))


@pytest.mark.parametrize(
    ("ids", "values"),
    [(np.full((5, 8), 500), np.full((5, 8), -3.0)), (None, np.full((5, 8), np.nan)), (None, np.full((5, 8), 2.0))],
    ids=["id outside the vocabulary", "nan", "probability above one"],
)
def test_values_that_no_writer_writes_are_refused_though_their_checksum_is_right(tmp_path, ids, values):
    (one,) = filled(tmp_path, 1)
    key = file_of(tmp_path).read_bytes()[64 + 32 : 64 + 64]
    ids = top_k(0).ids_NK if ids is None else ids
    body = ids.astype("<u2").tobytes() + values.astype("<f4").tobytes() + np.full(5, -9, "<f4").tobytes()
    with file_of(tmp_path).open("ab") as file:
        file.write(crafted(body, positions=5, k=8, key=key))
    with SignalCache(tmp_path, identity()) as cache, pytest.raises(ArtifactError, match="'question-0' is damaged"):
        cache.read(one)


def test_a_signal_of_another_length_than_its_answer_is_a_bug_of_the_caller(tmp_path):
    with SignalCache(tmp_path, identity()) as cache:
        with pytest.raises(ValueError, match="4 x 8 for 5 x 8"):
            cache.put([sequence(0)], [top_k(0, positions=4)])
        with pytest.raises(ValueError, match="outside"):
            cache.put([sequence(0)], [top_k(0, vocabulary=900)])
        assert len(cache) == 0


WRITE = """
import sys
from tests.teacher.test_signal_cache import SignalCache, identity, sequence, top_k

root, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with SignalCache(root, identity()) as cache:
    for index in range(first, last):
        if cache.missing([sequence(index)]):
            cache.put([sequence(index)], [top_k(index)])
"""


def write(root, first: int, last: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITE, str(root), str(first), str(last)])


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_while_writing_leaves_whole_records_and_the_end_is_the_same(tmp_path, kills):
    count, dice = 300, random.Random(kills)
    filled(tmp_path / "undisturbed", count)
    sequences = [sequence(index) for index in range(count)]
    stored = 0
    for _ in range(kills):
        process = write(tmp_path / "killed", 0, count)
        wanted = file_size(tmp_path / "killed") + dice.randrange(2000, 20_000)
        while process.poll() is None and file_size(tmp_path / "killed") < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with SignalCache(tmp_path / "killed", identity()) as cache:
            assert cache.missing(sequences) == sequences[len(cache) :]
            assert len(cache) >= stored
            stored = len(cache)
            for index in range(stored):
                assert_equal(cache.read(sequences[index]), top_k(index))
    assert write(tmp_path / "killed", 0, count).wait() == 0
    assert file_of(tmp_path / "killed").read_bytes() == file_of(tmp_path / "undisturbed").read_bytes()


def file_size(root) -> int:
    return sum(path.stat().st_size for path in root.glob("*/signals.bin"))


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    writers = [write(tmp_path, 0, 120), write(tmp_path, 80, 200)]
    assert [writer.wait() for writer in writers] == [0, 0]
    with SignalCache(tmp_path, identity()) as cache:
        assert cache.missing([sequence(index) for index in range(200)]) == []
        for index in range(200):
            assert_equal(cache.read(sequence(index)), top_k(index))


MANY = """
import json, resource, sys
from tests.teacher.test_signal_cache import SignalCache, identity, sequence, top_k

sequences = [sequence(index) for index in range(15_000)]
signals = [top_k(seed, 5, 64, 2000) for seed in range(16)]
with SignalCache(sys.argv[1], identity(vocabulary=2000, top_k=64, value_bytes=2)) as cache:
    cache.put(sequences[:16], signals)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for at in range(16, len(sequences), 16):
        cache.put(sequences[at:at + 16], signals[:len(sequences[at:at + 16])])
    written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"grown_kib": written - before, "bytes": cache.path.stat().st_size, "records": len(cache)}))
"""


def test_writing_15_000_sequences_takes_little_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["records"] == 15_000
    assert found["bytes"] > 20e6
    assert found["grown_kib"] * 1024 < 10e6
