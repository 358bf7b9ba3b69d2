"""Context parallelism: ring and Ulysses attention equal one process in fp64; streams are cut without loss."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatune import ops, parallel
from megatune.config.schema import ParallelConfig
from megatune.errors import ParallelError
from megatune.ops import Segments, Targets
from megatune.parallel import context
from megatune.parallel.ring_plan import plan_of
from megatune.parallel.world import Axis
from tests.helpers.dist import run_ranks

TOKENS = 64  # chunks of 16 with two processes, of 8 with four
DOCUMENTS = {
    "one": [64],
    "short": [3, 5, 1, 7, 2, 9, 4, 1, 6, 3, 5, 8, 2, 8],
    "borders": [16, 8, 8, 32],
    "mixed": [5, 40, 19],
    "padded": [30, 9, 25],
}
HEADS = [(4, 2), (4, 1), (4, 4)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 3},
    {"window": 13},
    {"window": 20},
    {"window": 45},
    {"softcap": 0.7},
    {"sinks": True},
    {"sinks": True, "window": 9, "softcap": 2.0},
    {"dims": (6, 4)},
    {"dims": (4, 6), "window": 17, "sinks": True},
]


def documents(name: str) -> Segments:
    segments = Segments.from_lengths(DOCUMENTS[name])
    return replace(segments, padding=25) if name == "padded" else segments


def attend(leaves: list[torch.Tensor], segments: Segments, cp: Axis, **options: Any) -> list[torch.Tensor]:
    """[output, gradients of q, k, v and the sinks if any] for a gradient that depends on the row in the stream."""
    q, k, v, *sinks = leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = context.attention(q, k, v, segments, cp, sinks=sinks[0] if sinks else None, scale=0.4, **options)
    rows = torch.arange(TOKENS) if segments.rows is None else segments.rows
    weights = torch.randn(
        TOKENS, *out.shape[1:], generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, weights[rows].to(out.dtype))]


def check_case(cp: Axis, name: str, heads: tuple[int, int], method: str, chosen: dict[str, Any]) -> None:
    torch.manual_seed(1)
    options = dict(chosen)
    dim, value_dim = options.pop("dims", (5, 5))
    whole = [
        torch.randn(TOKENS, count, width, dtype=torch.float64)
        for count, width in ((heads[0], dim), (heads[1], dim), (heads[1], value_dim))
    ]
    sinks = [torch.randn(heads[0], dtype=torch.float64)] if options.pop("sinks", False) else []
    segments = documents(name)
    expected = attend([*whole, *sinks], segments, Axis("cp"), **options)
    tokens, targets = torch.arange(TOKENS), Targets(torch.empty(0).long(), torch.empty(0).long())
    here = context.shard_stream(tokens, segments, targets, cp).segments
    actual = attend([*(x[here.rows] for x in whole), *sinks], here, cp, method=method, **options)
    if sinks:
        dist.all_reduce(actual[4], group=cp.group)
    for number, (value, truth) in enumerate(zip(actual, expected, strict=True)):
        truth = truth if number == 4 else truth[here.rows]
        what = ("output", "q", "k", "v", "sinks")[number]
        torch.testing.assert_close(
            value,
            truth,
            rtol=1e-10,
            atol=1e-12,
            msg=lambda m, w=what: f"{name} {heads} {method} {chosen} {w}: {m}",
        )


def equal_to_one_process(rank: int, size: int) -> int:
    ops.configure({"attention": "reference"}, "cpu")
    cp = parallel.init(ParallelConfig(context=size), device="cpu").cp
    cases = 0
    # Each set of documents with each option (of four processes every other one); the heads take turns.
    for number, (name, chosen) in enumerate(itertools.product(DOCUMENTS, OPTIONS)):
        if size == 4 and (number + number // len(OPTIONS)) % 2:
            continue
        for method in ("ring", "ulysses"):
            check_case(cp, name, HEADS[number % len(HEADS)], method, chosen)
            cases += 1
    check_low_precision(cp)
    return cases


def check_low_precision(cp: Axis) -> None:
    """bf16 inputs: the sums over the keys are in fp32 whatever comes over the wire."""
    torch.manual_seed(2)
    segments = documents("mixed")
    whole = [torch.randn(TOKENS, heads, 8).bfloat16() for heads in (4, 2, 2)]
    truth = attend([x.double() for x in whole], segments, Axis("cp"))
    tokens, targets = torch.arange(TOKENS), Targets(torch.empty(0).long(), torch.empty(0).long())
    here = context.shard_stream(tokens, segments, targets, cp).segments
    for method in ("ring", "ulysses"):
        for value, expected in zip(
            attend([x[here.rows] for x in whole], here, cp, method=method), truth, strict=True
        ):
            assert value.dtype == torch.bfloat16
            assert (value.double() - expected[here.rows]).norm() / expected.norm() < 8e-3, method


@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_equal_one_process(size: int) -> None:
    cases = 2 * len(DOCUMENTS) * len(OPTIONS) // (2 if size == 4 else 1)
    assert run_ranks(equal_to_one_process, size) == [cases] * size


def visible(segments: Segments, window: int | None) -> torch.Tensor:
    """int [T, T], 1 where the query (row) sees the key."""
    lengths = torch.tensor(segments.lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    distance = torch.arange(len(document))[:, None] - torch.arange(len(document))
    seen = (distance >= 0) & (document[:, None] == document)
    return (seen if window is None else seen & (distance < window)).int()


def chunk_rows(rank: int, size: int, chunk: int) -> torch.Tensor:
    steps = torch.arange(chunk)
    return torch.cat((steps + rank * chunk, steps + (2 * size - 1 - rank) * chunk))


def met_by(segments: Segments, rank: int, size: int, window: int | None) -> torch.Tensor:
    """int [T, T]: how often a process computes each score, read from its plan as FlashAttention reads it."""
    total = segments.total
    rows = [chunk_rows(other, size, total // (2 * size)) for other in range(size)]
    plan, count = plan_of(segments, rank, size, window), torch.zeros(total, total, dtype=torch.int)
    for step in range(size):
        source = (rank - step) % size
        if step:
            # What comes in is what the other's plan sends.
            sends = plan_of(segments, source, size, window).rounds[step - 1].sends
            held = torch.cat([rows[source][part] for part in sends] or [torch.empty(0).long()])
            assert len(held) == plan.rounds[step - 1].receives
        else:
            held = rows[rank]
        for meeting in plan.rounds[step - 1].meetings if step else plan.own:
            block = meeting.block
            assert block.cu_queries.tolist() == [0, *itertools.accumulate(block.queries)]
            assert block.cu_keys.tolist() == [0, *itertools.accumulate(block.keys)]
            for a, b, queries, keys in zip(
                rows[rank][meeting.queries].split(block.queries),
                held[meeting.keys].split(block.keys),
                block.queries,
                block.keys,
                strict=True,
            ):
                # FlashAttention 2: one limit alone makes the other one the number of keys.
                left = keys if block.left is None and block.right is not None else block.left
                right = keys if block.right is None and block.left is not None else block.right
                at = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
                seen = torch.ones(queries, keys, dtype=torch.int)
                if left is not None:
                    assert left >= 0 and right >= 0
                    seen = ((at <= right) & (at >= -left)).int()
                assert seen.any(1).all(), "a query that sees nothing"
                count[a[:, None], b] += seen
    return count


def test_plans_compute_every_score_once() -> None:
    generator = torch.Generator().manual_seed(3)
    cases = [[48], [24, 24], [1] * 48, [12, 12, 12, 12]]
    for _ in range(12):
        cuts = torch.randperm(47, generator=generator)[:5].sort().values + 1
        cases.append(torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([48])).tolist())
    for lengths, size, window in itertools.product(cases, (2, 3, 4), (None, 1, 2, 5, 8, 13, 30)):
        segments = Segments.from_lengths(lengths)
        count = sum(met_by(segments, rank, size, window) for rank in range(size))
        assert torch.equal(count, visible(segments, window)), (lengths, size, window)


def test_zigzag_balances_and_only_what_is_seen_is_sent() -> None:
    one = Segments.from_lengths([64])
    work = [met_by(one, rank, 4, None).sum().item() for rank in range(4)]
    assert len(set(work)) == 1
    sent = [sum(step.sent for step in plan_of(one, rank, 4, None).rounds) for rank in range(4)]
    assert sum(sent) == 0.75 * 4 * 3 * 16  # of four processes' 16 tokens to three others
    borders = Segments.from_lengths([8] * 8)
    assert all(step.sent == 0 for rank in range(4) for step in plan_of(borders, rank, 4, None).rounds)
    # Each of the 7 borders lies in a document; at 32 both sides are process 3's. The window shows one key before it.
    crossing = Segments.from_lengths([5, 4, 30, 10, 15])
    assert sum(step.sent for rank in range(4) for step in plan_of(crossing, rank, 4, 2).rounds) == 6


def stream() -> tuple[torch.Tensor, Segments, Targets]:
    segments = documents("mixed")
    tokens = torch.randint(1000, (TOKENS,), generator=torch.Generator().manual_seed(4))
    last = segments.cu_seqlens[1:].long() - 1
    scored = torch.ones(TOKENS, dtype=torch.bool)
    scored[last], scored[7:12] = False, False  # ends of documents, and a prompt
    index = scored.nonzero().flatten()
    return tokens, replace(segments, key=9, padding=19), Targets(index, tokens[index + 1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_cut_stream_has_every_target_once(size: int) -> None:
    tokens, segments, targets = stream()
    found = []
    for rank in range(size):
        part = context.shard_stream(tokens, segments, targets, Axis("cp", size, rank))
        rows = torch.arange(TOKENS) if size == 1 else part.segments.rows
        assert torch.equal(rows, chunk_rows(rank, size, TOKENS // (2 * size)) if size > 1 else rows)
        assert torch.equal(part.tokens, tokens[rows])
        assert torch.equal(part.segments.positions, segments.positions[rows])
        assert part.segments.lengths == segments.lengths
        assert (part.segments.key, part.segments.padding, part.segments.total) == (9, 19, TOKENS)
        assert part.segments.tokens == TOKENS // size
        found += zip(rows[part.targets.index].tolist(), part.targets.labels.tolist(), strict=True)
    assert sorted(found) == list(zip(targets.index.tolist(), targets.labels.tolist(), strict=True))


def test_a_stream_that_is_not_cut_needs_nobody() -> None:
    """Generation: every process has the whole prompt, and a cache."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, heads, 4) for heads in (4, 2, 2))
    whole, last = Segments.from_lengths([9]), Segments.from_lengths([1])
    out = context.attention(q[8:], k, v, last, Axis("cp", 2, 1), scale=0.3, key_segments=whole)
    torch.testing.assert_close(out, ops.attention(q, k, v, whole, scale=0.3)[8:])


def test_mistakes_are_named() -> None:
    tokens, segments, targets = stream()
    with pytest.raises(ValueError, match="64 tokens .* multiple of 6, .* of the 3"):
        context.shard_stream(tokens, segments, targets, Axis("cp", 3, 0))
    cp = Axis("cp", 2, 0)
    here = context.shard_stream(tokens, segments, targets, cp).segments
    q = torch.zeros(32, 3, 4)
    with pytest.raises(ValueError, match="has no cache"):
        context.attention(q, q, q, here, cp, scale=1.0, key_segments=segments)
    with pytest.raises(ValueError, match="q has 16 and k 32 tokens"):
        context.attention(q[:16], q, q, here, cp, scale=1.0)
    with pytest.raises(ParallelError, match=r"parallel\.context: 2 .* 3 query and 3 key/value heads"):
        context.attention(q, q, q, here, cp, scale=1.0, method="ulysses")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "cp", "fits"),
    [
        (32, 8, 1, 8, True),
        (32, 8, 4, 8, True),  # 8 and 2: repeated
        (32, 8, 4, 16, False),
        (32, 8, 16, 2, True),  # less than one key/value head a process: it counts as one
        (12, 6, 1, 4, False),
        (6, 3, 1, 6, True),
    ],
)
def test_heads_for_ulysses(heads: int, kv_heads: int, tp: int, cp: int, fits: bool) -> None:
    context.check_context(heads, kv_heads, tp, cp, "ring")
    if fits:
        context.check_context(heads, kv_heads, tp, cp, "ulysses")
    else:
        with pytest.raises(
            ParallelError, match=rf"parallel\.context: {cp} .*use context 1 or .*, or context_method"
        ):
            context.check_context(heads, kv_heads, tp, cp, "ulysses")
