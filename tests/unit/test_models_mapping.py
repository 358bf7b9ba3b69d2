"""Any part of one of our tensors from the Hugging Face tensors it is made of, and these from ours."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatune.checkpoint.mapping import Mapped, strip_prefix
from megatune.models.families.base import Piece
from megatune.parallel.shard import Box, Fused

E, N, H = 3, 4, 5
GATE_UP = Fused((("gate", 1), ("up", 1)), N)
QKV = Fused((("q", 4), ("k", 2), ("v", 2)), 3)


class Source:
    """Tensors in memory that notes how many numbers were read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.read = tensors, 0

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= len(self.tensors[name])
        self.read += self.tensors[name][start:stop].numel()
        return self.tensors[name][start:stop].clone()


def per_expert(part: str, kind: str = "weight") -> tuple[Piece, ...]:
    return tuple(Piece(f"m.{e}.{part}.{kind}", part if part != "down" else None, expert=e) for e in range(E))


def stack(parts: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """gate and up of each expert, row by row."""
    experts = [torch.stack([parts[f"m.{e}.{n}"] for n in names], 1).flatten(0, 1) for e in range(E)]
    return torch.stack(experts)


def cases() -> dict[str, tuple[Mapped, dict[str, Tensor], Tensor]]:
    """name -> (the map, the file's tensors, our tensor made of them by hand)"""
    files = {f"m.{e}.{part}.weight": torch.randn(N, H) for e in range(E) for part in ("gate", "up")}
    biases = {f"m.{e}.{part}.bias": torch.randn(N) for e in range(E) for part in ("gate", "up")}
    down = {f"m.{e}.down.weight": torch.randn(H, N) for e in range(E)}
    turned, plain, halves = torch.randn(E, H, 2 * N), torch.randn(E, 2 * N), torch.randn(E, 2 * N, H)
    q, k, v = torch.randn(12, H), torch.randn(6, H), torch.randn(6, H)
    groups = (torch.cat([q[4 * g : 4 * g + 4], k[2 * g : 2 * g + 2], v[2 * g : 2 * g + 2]]) for g in range(3))
    joined = torch.cat(list(groups))
    both = per_expert("gate") + per_expert("up")
    both_biases = per_expert("gate", "bias") + per_expert("up", "bias")
    qkv = tuple(Piece(name, name) for name in "qkv")
    one = (Piece("qkv", "q", 0, True), Piece("qkv", "k", 12, True), Piece("qkv", "v", 18, True))
    parts = (Piece("x", "gate"), Piece("x", "up", N))
    return {
        "experts": (Mapped((E, 2 * N, H), both, GATE_UP), files, stack(files, ("gate.weight", "up.weight"))),
        "experts-biases": (
            Mapped((E, 2 * N), both_biases, GATE_UP),
            biases,
            stack(biases, ("gate.bias", "up.bias")),
        ),
        "experts-down": (Mapped((E, H, N), per_expert("down")), down, torch.stack(list(down.values()))),
        "stacked-transposed": (
            Mapped((E, 2 * N, H), (Piece("x", transpose=True),), GATE_UP),
            {"x": turned},
            turned.transpose(1, 2),
        ),
        "stacked-biases": (Mapped((E, 2 * N), (Piece("x"),), GATE_UP), {"x": plain}, plain),
        "stacked-halves": (
            Mapped((E, 2 * N, H), parts, GATE_UP),
            {"x": halves},
            torch.stack([halves[:, :N], halves[:, N:]], 2).flatten(1, 2),
        ),
        "dense": (Mapped((24, H), qkv, QKV), {"q": q, "k": k, "v": v}, joined),
        "dense-transposed": (Mapped((24, H), one, QKV), {"qkv": torch.cat([q, k, v]).T.contiguous()}, joined),
        "dense-whole": (Mapped((12, H), (Piece("q"),)), {"q": q}, q),
    }


@pytest.mark.parametrize("name", cases())
def test_every_box_is_read(name: str) -> None:
    mapped, tensors, ours = cases()[name]
    source = Source(tensors)
    assert mapped.hf_shapes() == {key: tuple(value.shape) for key, value in tensors.items()}
    spans = [[(a, b - a) for a, b in itertools.combinations(range(n + 1), 2)][::3] for n in ours.shape]
    for place in itertools.product(*spans):
        box = Box(tuple(start for start, _ in place), tuple(length for _, length in place))
        assert torch.equal(mapped.read_box(source, box), box.of(ours)), box
    assert torch.equal(mapped.read(source, 1, 3), ours[1:3])


@pytest.mark.parametrize("name", cases())
def test_split_gives_the_file_back_whole_and_by_boxes(name: str) -> None:
    mapped, tensors, ours = cases()[name]
    found = dict(mapped.split(ours))
    by_boxes = {key: value for box in mapped.boxes() for key, value in mapped.split(box.of(ours), box)}
    assert found.keys() == by_boxes.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(found[key], value) and found[key].is_contiguous()
        assert torch.equal(by_boxes[key], value)


def test_only_what_is_needed_is_read() -> None:
    mapped, tensors, _ = cases()["experts"]
    source = Source(tensors)
    mapped.read_box(source, Box((1, 2, 0), (1, 2, H)))  # row 1 of gate and of up of one expert
    assert source.read == 2 * H
    mapped, tensors, _ = cases()["stacked-transposed"]
    source = Source(tensors)
    mapped.read_box(source, Box((1, 2, 0), (1, 2, H)))  # one expert
    assert source.read == 2 * N * H
    mapped, tensors, _ = cases()["dense-transposed"]
    source = Source(tensors)
    mapped.read_box(source, Box((0, 1), (24, 2)))  # two of our columns
    assert source.read == 3 * 2 * 24  # for q, for k and for v


def test_prefix_is_taken_off_every_piece() -> None:
    mapped, _, _ = cases()["experts"]
    bare = strip_prefix({"x": mapped}, "m.")["x"]
    assert next(iter(bare.hf_shapes())) == "0.gate.weight" and bare.pieces[1].expert == 1


def test_an_empty_box_is_an_error() -> None:
    mapped, tensors, _ = cases()["experts"]
    with pytest.raises(ValueError, match="empty"):
        mapped.read_box(Source(tensors), Box((0, 0, 0), (0, 2, H)))
