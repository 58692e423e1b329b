"""Signals of a teacher in memory, through the cache and back: the same divergences as from the teacher itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stillroom.errors import ArtifactError, ConfigError
from stillroom.models import load
from stillroom.models.distilling import Blend, distil
from stillroom.models.divergences import adaptive_kl, forward_kl, reverse_kl
from stillroom.models.packing import TokenSequence, pack
from stillroom.models.precision import Precision
from stillroom.models.products import Products
from stillroom.teacher.cached import CachedTeacher, fill
from stillroom.teacher.live import LiveTeacher
from stillroom.teacher.signal_cache import SignalCache

PRODUCTS = Products(Precision("fp32", True, "a test"))
KLS = {"forward": forward_kl, "reverse": reverse_kl, "adaptive": adaptive_kl}
ROUNDING = 2e-3
"""Nats a token: what log-probabilities in 2 bytes may move a KL by."""

GRADIENT_ROUNDING = {"forward": 2e-3, "reverse": 5e-3, "adaptive": 2e-3}
"""By norm. In the reverse KL the log of the tail counts where the student still is, and of a sure teacher
log(1 - sum p) has few digits left: 2.8e-3 measured."""


def questions(count: int, seed: int = 0) -> list[TokenSequence]:
    """Prompts with a common beginning, and answers."""
    dice = random.Random(seed)
    shared = [dice.randrange(259) for _ in range(20)]
    made = []
    for index in range(count):
        prompt = [*shared, *(dice.randrange(259) for _ in range(dice.randrange(1, 30)))]
        answer = [dice.randrange(259) for _ in range(dice.randrange(1, 9))]
        made.append(TokenSequence((*prompt, *answer), len(prompt), f"question-{index}"))
    return made


def sharp_teacher(folder: Path, scale: float = 25.0) -> LiveTeacher:
    """The tiny model, surer of its answers than random weights make it."""
    loaded = load(folder)
    loaded.model.lm_head.weight = torch.nn.Parameter(loaded.model.lm_head.weight * scale)
    loaded.digest = f"sharpened {loaded.digest}"
    return LiveTeacher(loaded, precision="fp32")


class Student:
    """Random hidden states and a head for the scored rows of a packed row."""

    def __init__(self, rows: int, vocabulary: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden_SD = torch.randn(rows, 16, generator=generator)
        self.head_VD = torch.nn.Parameter(0.5 * torch.randn(vocabulary, 16, generator=generator))

    def distil(self, teacher, packed, divergence):
        self.head_VD.grad = None
        blend = Blend(((1.0, divergence),))
        loss, gradient_SD = distil(self.hidden_SD, self.head_VD, packed.labels_S, teacher, blend, PRODUCTS)
        return float(loss), torch.cat([gradient_SD.flatten(), self.head_VD.grad.flatten()]).double()

    def reference(self, teacher_SV, name, k=None):
        """The same in fp64 by autograd on whole distributions; with `k`, the teacher's rest as one token."""
        hidden_SD = self.hidden_SD.double().requires_grad_(True)
        head_VD = self.head_VD.detach().double().requires_grad_(True)
        p, q = teacher_SV.double().log_softmax(-1), (hidden_SD @ head_VD.T).log_softmax(-1)
        if k is not None:
            ids = p.topk(k).indices
            p, q = (bucketed(one, ids) for one in (p, q))
        loss = reference_kl(name, p, q).sum()
        loss.backward()
        return float(loss.detach()), torch.cat([hidden_SD.grad.flatten(), head_VD.grad.flatten()])


def bucketed(logprobs, ids):
    rest = logprobs.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(1, ids), rest], 1)


def reference_kl(name, p, q):
    forward = (p.exp() * (p - q)).sum(-1)
    reverse = (q.exp() * (q - p)).sum(-1)
    if name != "adaptive":
        return {"forward": forward, "reverse": reverse}[name]
    sure, order = p.exp().sort(dim=-1, descending=True)
    head = sure.cumsum(-1) <= 0.5
    head[:, 0] = True
    gap = (p.exp() - q.exp()).detach().abs().gather(1, order)
    share = (gap * head).sum(-1) / gap.sum(-1)
    return share * forward + (1 - share) * reverse


@pytest.fixture
def teacher(tiny_student):
    return sharp_teacher(tiny_student)


def dense(teacher, packed, sequences):
    return teacher.signal(packed, sequences).rows(slice(0, len(packed.labels_S))).clone()


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("seed", range(3))
def test_a_full_cache_gives_the_dense_kl_and_gradient(tmp_path, teacher, name, seed):
    sequences = questions(6, seed)
    packed = pack(sequences)
    student = Student(len(packed.labels_S), teacher.vocabulary, seed)
    with SignalCache(tmp_path, teacher.identity(teacher.vocabulary, value_bytes=4)) as cache:
        fill(cache, teacher, sequences)
        loss, gradient = student.distil(CachedTeacher(cache).signal(packed, sequences), packed, KLS[name])
    wanted, wanted_gradient = student.reference(dense(teacher, packed, sequences), name)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert (gradient - wanted_gradient).norm() <= 1e-5 * wanted_gradient.norm() + 1e-7


@pytest.mark.parametrize("name", KLS)
def test_64_cached_tokens_give_the_kl_with_the_rest_as_one_within_the_stated_bound(tmp_path, teacher, name):
    sequences = questions(12)
    packed = pack(sequences)
    student = Student(len(packed.labels_S), teacher.vocabulary)
    with SignalCache(tmp_path, teacher.identity(64)) as cache:
        fill(cache, teacher, sequences)
        loss, gradient = student.distil(CachedTeacher(cache).signal(packed, sequences), packed, KLS[name])
    teacher_SV = dense(teacher, packed, sequences)
    wanted, wanted_gradient = student.reference(teacher_SV, name, k=64)
    rows = len(packed.labels_S)
    assert abs(loss - wanted) / rows <= ROUNDING
    assert (gradient - wanted_gradient).norm() <= GRADIENT_ROUNDING[name] * wanted_gradient.norm()
    if name != "adaptive":  # merging tokens only hides differences
        whole, _ = student.reference(teacher_SV, name)
        assert wanted <= whole


def test_what_packing_a_sequence_is_in_makes_no_difference_but_rounding(teacher):
    sequences = questions(8)
    together = teacher.top_k(sequences, sequences, 20)
    for sequence, found in zip(sequences, together, strict=True):
        (alone,) = teacher.top_k([sequence], [sequence], 20)
        assert torch.allclose(torch.tensor(found.logprobs_NK), torch.tensor(alone.logprobs_NK), atol=1e-4)
        assert torch.allclose(torch.tensor(found.tail_N), torch.tensor(alone.tail_N), atol=1e-4)


def test_a_row_gets_the_signals_of_its_own_sequences_in_any_order(tmp_path, teacher):
    sequences = questions(10)
    with SignalCache(tmp_path, teacher.identity(30, value_bytes=4)) as cache:
        fill(cache, teacher, sequences)
        for order in (sequences[::-1], [sequences[3]], [sequences[5], sequences[5], sequences[2]]):
            packed = pack(order)
            top = CachedTeacher(cache).signal(packed, order).rows(slice(0, len(packed.labels_S)))
            teacher_SV = dense(teacher, packed, order).log_softmax(-1)
            assert torch.allclose(teacher_SV.gather(1, top.ids_SK), top.logprobs_SK, atol=1e-4)
            assert torch.allclose(teacher_SV.topk(30).values, top.logprobs_SK, atol=1e-4)


def test_a_damaged_signal_is_named_and_computed_anew_and_no_other(tmp_path, teacher, capsys):
    sequences = questions(6)
    with SignalCache(tmp_path, teacher.identity(16)) as cache:
        fill(cache, teacher, sequences, row_tokens=60)
        before = [cache.read(sequence).logprobs_NK for sequence in sequences]
        content = bytearray(cache.path.read_bytes())
        content[200] ^= 4
        cache.path.write_bytes(content)
        report = fill(cache, teacher, sequences, row_tokens=60)
        assert report.asked == 1
        assert [one.tolist() for one in before] == [cache.read(sequence).logprobs_NK.tolist() for sequence in sequences]
    assert "of sequence 'question-" in capsys.readouterr().err


def test_training_fills_the_cache_as_it_goes_and_reads_what_it_wrote(tmp_path, teacher):
    sequences = questions(4)
    packed = pack(sequences)
    with SignalCache(tmp_path, teacher.identity(16)) as cache:
        with pytest.raises(ArtifactError, match=r"'question-\d'(.|\n)*fill the cache"):
            CachedTeacher(cache).signal(packed, sequences)
        first = CachedTeacher(cache, teacher).signal(packed, sequences).rows(slice(0, 99))
        again = CachedTeacher(cache).signal(packed, sequences).rows(slice(0, 99))
    assert torch.equal(first.ids_SK, again.ids_SK)
    assert torch.equal(first.logprobs_SK, again.logprobs_SK)


def test_bf16_weights_take_half_the_memory_and_say_nearly_the_same(tiny_student):
    whole = LiveTeacher(load(tiny_student), precision="fp32")
    half = LiveTeacher(load(tiny_student, dtype="bfloat16"))
    assert (half.precision.name, half.model.dtype) == ("bf16", torch.bfloat16)
    assert half.identity(8) != whole.identity(8)
    assert half.digest != whole.digest
    sequences = questions(3)
    packed = pack(sequences)
    p, q = (dense(teacher, packed, sequences).log_softmax(-1) for teacher in (whole, half))
    assert float((p.exp() * (p - q)).sum(-1).max()) < 1e-3


def test_a_model_with_quantised_layers_is_a_teacher(tiny_student):
    whole = LiveTeacher(load(tiny_student), precision="fp32")
    loaded = load(tiny_student)
    for layer in loaded.model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, EightBits(getattr(layer.mlp, name)))
        layer.self_attn.o_proj = EightBits(layer.self_attn.o_proj)
    quantised = LiveTeacher(loaded, precision="fp32")
    assert quantised.identity(8) != whole.identity(8)
    sequences = questions(3)
    packed = pack(sequences)
    p, q = (dense(teacher, packed, sequences).log_softmax(-1) for teacher in (whole, quantised))
    assert 0 < float((p.exp() * (p - q)).sum(-1).max()) < 1e-2


class EightBits(torch.nn.Module):
    """A linear layer over int8 weights with a scale for each row, as quantisers put in a linear layer's place."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T


def test_weights_in_another_format_are_refused(tiny_student):
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        LiveTeacher(load(tiny_student, dtype="float16"))


def test_ids_beyond_a_shorter_head_take_no_part(teacher, tiny_student):
    short = LiveTeacher(teacher.loaded, precision="fp32", vocabulary=200)
    sequences = questions(3)
    packed = pack(sequences)
    whole = dense(teacher, packed, sequences)
    assert torch.equal(dense(short, packed, sequences), whole[:, :200])
    (top, *_) = short.top_k(sequences, sequences, 200)
    assert sorted(top.ids_NK[0].tolist()) == list(range(200))
    assert top.tail_N[0] == -torch.inf


FILL = """
import sys
from pathlib import Path
import torch
from stillroom.teacher.cached import fill
from stillroom.teacher.signal_cache import SignalCache
from tests.teacher.test_cached import questions, sharp_teacher

torch.set_num_threads(1)
teacher = sharp_teacher(Path(sys.argv[1]))
with SignalCache(sys.argv[2], teacher.identity(64)) as cache:
    fill(cache, teacher, questions(300), row_tokens=200)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_of_filling_ends_in_the_bytes_of_an_undisturbed_run(tmp_path, tiny_student, kills):
    def start(folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FILL, str(tiny_student), str(tmp_path / folder)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)

    def size(folder):
        return sum(path.stat().st_size for path in (tmp_path / folder).glob("*/signals.bin"))

    assert start("undisturbed").wait() == 0
    dice = random.Random(kills)
    for _ in range(kills):
        process = start("killed")
        wanted = size("killed") + dice.randrange(1, size("undisturbed") // (kills + 1))
        while process.poll() is None and size("killed") < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < size("killed") < size("undisturbed")
    assert start("killed").wait() == 0
    (undisturbed,), (killed,) = ((tmp_path / folder).glob("*/signals.bin") for folder in ("undisturbed", "killed"))
    assert killed.read_bytes() == undisturbed.read_bytes()
