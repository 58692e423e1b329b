"""States that the tests save, and how they are compared."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = [
    dtype
    for name in sorted(dir(torch))
    if isinstance(dtype := getattr(torch, name), torch.dtype)
    and not name.startswith(("q", "bits", "complex32", "chalf"))
]

STOCK_DTYPES = [
    dtype for dtype in DTYPES if str(dtype) not in {f"torch.{sign}int{n}" for n in range(1, 8) for sign in ("", "u")}
    and "float4" not in str(dtype)
]  # fmt: skip
"""Those that stock DCP can load: torch cannot copy the others."""


def any_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of arbitrary bits, NaNs among them; bools stay bools."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def tiny_state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    whole = torch.randn(6, 8)
    return {
        "weights": {"a": torch.randn(5, 7), "b": {"c": torch.randn(3).bfloat16(), "scalar": torch.randn(())}},
        "many": {str(dtype).removeprefix("torch."): any_tensor(dtype, (2, 3), seed) for dtype in DTYPES},
        "odd": {
            "empty": torch.empty(0, 4),
            "strided": torch.randn(4, 6).T,
            "view": whole[2:4],
            "same storage": whole[:, 1],
            "expanded": torch.randn(1, 5).expand(4, 5),
        },
        "blocks": torch.randn(50_000),
        "layers": [{"w": torch.randn(2)}, {"w": torch.randn(3)}],
        "run": {"step": seed, "losses": [1.5, float(seed)], "note": None, "by_number": {3: "three"}, "done": False},
        "nothing": {},
    }


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's content, NaNs and all."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert bits(found) == bits(wanted)
    elif isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert isinstance(found, list)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert type(found) is type(wanted)
        assert found == wanted
