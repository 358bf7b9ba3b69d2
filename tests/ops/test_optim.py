"""Updates of optimizers, each body against the reference on the same numbers: odd sizes, odd addresses, gradients and
weights of either dtype, many tensors, empty ones; codes of 8 bits; random rounding.

AdamW and Lion: bodies differ from the reference by fp32 rounding (it fuses some multiplications and additions). A code
of 8 bits may differ by one where the number lies within fp32 rounding of the border between two: where a bf16 gradient
is many times the first one that happens more often than by chance.
"""

from __future__ import annotations

import pytest
import torch

from megatune import ops
from megatune.ops import optim_bf16
from tests.helpers.ops import need_body
from tests.ops.bodies import bodies, repeats_bitwise

SIZES = (1, 255, 3 * 256, 70_001, 0, 4096)
REST = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


def tensors(fill, device: str, lead: int = 0, sizes=SIZES) -> list[torch.Tensor]:
    """fill(size) for each size, `lead` elements into its memory."""
    found = []
    for size in sizes:
        values = fill(size)
        memory = torch.empty(size + lead, dtype=values.dtype, device=device)
        memory[lead:] = values.to(device)
        found.append(memory[lead:])
    return found


class Case:
    """Masters, gradients of `steps` steps, weights full of NaN: the same for all who ask with these arguments."""

    def __init__(self, device: str, dtype: torch.dtype, lead: int = 0, steps: int = 3, sizes=SIZES) -> None:
        torch.manual_seed(7)
        self.sizes = sizes
        self.masters = tensors(torch.randn, device, lead, sizes)
        # Of all sizes, as gradients are.
        fill = lambda size: (torch.randn(size) * torch.rand(size) ** 4).to(dtype)  # noqa: E731
        self.grads = [tensors(fill, device, lead, sizes) for _ in range(steps)]
        nan = lambda size: torch.full((size,), float("nan"), dtype=dtype)  # noqa: E731
        self.weights = tensors(nan, device, lead, sizes)
        self.zeros = lambda: tensors(torch.zeros, device, lead, sizes)
        self.rest = {
            "scale": torch.tensor(0.5, device=device),
            "decays": [0.1 * (i % 2) for i in range(len(sizes))],
        }


def adamw_step(case: Case, states: list, step: int, grads: list[torch.Tensor]) -> None:
    ops.adamw_(case.masters, *states, grads, weights=case.weights, step=step, **case.rest, **REST)


def lion_step(case: Case, states: list, step: int, grads: list[torch.Tensor]) -> None:
    lists = case.masters, *states, grads
    ops.lion_(*lists, weights=case.weights, lr=1e-3, betas=(0.9, 0.99), **case.rest)


def eight(case: Case, device: str, lead: int = 0) -> list[list[torch.Tensor]]:
    blocks = [-(-size // 256) for size in case.sizes]
    code = lambda value: lambda size: torch.full((size,), value, dtype=torch.uint8)  # noqa: E731
    made = []
    for value in (127, 0):
        made += [tensors(code(value), device, lead, case.sizes), tensors(torch.zeros, device, 0, blocks)]
    return made


def run(op: str, body: str, device: str, dtype: torch.dtype, lead: int) -> list[torch.Tensor]:
    ops.configure({op: body}, device)
    case = Case(device, dtype, lead)
    states = [case.zeros() for _ in range(2 if op == "adamw" else 1)]
    for number, grads in enumerate(case.grads, 1):
        (adamw_step if op == "adamw" else lion_step)(case, states, number, grads)
    for master, weight in zip(case.masters, case.weights, strict=True):
        assert torch.equal(weight, master.to(dtype))
    return [*case.masters, *(one for state in states for one in state)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "body", "device"),
    [pytest.param("adamw", *p.values, id=f"adamw-{p.id}", marks=p.marks) for p in bodies("adamw")]
    + [pytest.param("lion", *p.values, id=f"lion-{p.id}", marks=p.marks) for p in bodies("lion")],
)
def test_equals_the_reference(op: str, body: str, device: str, dtype: torch.dtype) -> None:
    need_body(op, body, torch.float32, device)
    for lead in (0, 3):
        expected = run(op, "reference", "cpu", dtype, lead)
        for mine, theirs in zip(run(op, body, device, dtype, lead), expected, strict=True):
            # Lion's sign turns where the interpolation is within rounding of zero.
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("body", "device"), bodies("adamw_8bit"))
def test_codes_of_8_bits_are_the_references(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("adamw_8bit", body, torch.float32, device)
    for lead in (0, 1):
        case = Case(device, dtype, lead)
        states = eight(case, device, lead)
        for number, grads in enumerate(case.grads, 1):
            # Each step from the same states: a code that differs is not carried on.
            theirs = [[one.cpu().clone() for one in state] for state in (case.masters, *states)]
            rest = {**case.rest, **REST, "step": number}
            ops.configure({"adamw_8bit": "reference"}, "cpu")
            cpu = rest | {"scale": case.rest["scale"].cpu()}
            ops.adamw_8bit_(*theirs, [one.cpu() for one in grads], **cpu)
            ops.configure({"adamw_8bit": body}, device)
            ops.adamw_8bit_(case.masters, *states, grads, weights=case.weights, **rest)
            for mine, other in zip([case.masters, *states], theirs, strict=True):
                for a, b in zip(mine, other, strict=True):
                    if a.dtype == torch.uint8:
                        apart = (a.cpu().int() - b.int()).abs()
                        assert not apart.numel() or apart.max() <= 1
                        assert (apart > 0).sum() <= 2e-3 * apart.numel() + 1
                    else:
                        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
        for master, weight in zip(case.masters, case.weights, strict=True):
            assert torch.equal(weight, master.to(dtype))


@pytest.mark.parametrize(("body", "device"), bodies("adamw_8bit"))
def test_every_code_stays_what_it_is(body: str, device: str) -> None:
    """With betas of 1 (nearly) and no gradient, moments come out as they went in: all 512 codes, tiny scales too."""
    need_body("adamw_8bit", body, torch.float32, device)
    ops.configure({"adamw_8bit": body}, device)
    for scale in (1.0, 3e-4, 1e-38, 0.0):
        every = torch.arange(256, dtype=torch.uint8, device=device)
        m, v = [every.clone()], [every.clone()]
        scales = [[torch.full((1,), scale, device=device)] for _ in range(2)]
        master, grad = torch.zeros(256, device=device), torch.zeros(256, device=device)
        ops.adamw_8bit_(
            [master], m, scales[0], v, scales[1], [grad], scale=torch.ones((), device=device), decays=[0.0],
            lr=0.0, betas=(1 - 1e-9, 1 - 1e-9), eps=1e-8, step=1,
        )  # fmt: skip
        kept = scale > 0
        if scale != 1e-38:  # there fp32 has too few digits for the small values
            assert torch.equal(m[0], every if kept else torch.full_like(every, 127))
            assert torch.equal(v[0], every if kept else torch.zeros_like(every))
        assert m[0][127] == 127 and v[0][0] == 0 and m[0][255] == (255 if kept else 127)
        assert scales[0][0] == scale and scales[1][0] == scale


def low_step(case: Case, masters: list[torch.Tensor], states: list, step: int, **more) -> None:
    ops.adamw_bf16_(masters, *states, case.grads[step - 1], step=step, **case.rest, **REST, **more)


def test_philox_is_that_of_the_paper() -> None:
    """Known answers of Random123."""
    ones = 2**64 - 1
    for counter, step, key, expected in (
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, ones, ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x85A308D3243F6A88 - 2**64, 0x0370734413198A2E, 0x299F31D0A4093822,
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):  # fmt: skip
        words = optim_bf16.philox(torch.tensor([counter]), step, key)
        assert words.tolist() == [list(expected)]


@pytest.mark.parametrize(("body", "device"), bodies("adamw_bf16"))
def test_random_rounding_is_bit_for_bit_the_references(body: str, device: str) -> None:
    """No gradient and a decay that fp32 computes exactly: what is rounded is the same everywhere, so the result is."""
    need_body("adamw_bf16", body, torch.bfloat16, device)
    rest = {"decays": [2.0**-6, 2.0**-9], "lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "step": 5}
    # In one run, and in rows of which the tensors hold a part.
    places = ((0, 0, None), (1, 3, None), (0, 2**35 + 12, None), (0, 16, (40, 64)), (1, 3, (7, 2**34 + 1)))
    for lead, first, row in places:
        apart = {} if row is None else {"widths": row[:1] * 2, "strides": row[1:] * 2}
        found = []
        for name, place in (("reference", "cpu"), (body, device)):
            ops.configure({"adamw_bf16": name}, place)
            torch.manual_seed(1)
            masters = tensors(lambda n: torch.randn(n).bfloat16(), place, lead, (5003, 264))
            zeros = [tensors(torch.zeros, place, lead, (5003, 264)) for _ in range(3)]
            scale = torch.ones((), device=place)
            ops.adamw_bf16_(
                masters, *zeros, scale=scale, keys=[3, 2**63 - 5], firsts=[first, 8], **apart, **rest
            )
            found.append([one.cpu() for one in masters])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("body", "device"), bodies("adamw_bf16"))
def test_bf16_masters_follow_the_reference_and_no_sharding_changes_them(body: str, device: str) -> None:
    need_body("adamw_bf16", body, torch.bfloat16, device)
    sizes, key = (4099, 300), [optim_bf16.parameter_key(1, name) for name in "ab"]
    case = Case(device, torch.bfloat16, steps=2, sizes=sizes)
    start = [one.bfloat16() for one in case.masters]
    ops.configure({"adamw_bf16": body}, device)
    whole, cut = [[one.clone() for one in start] for _ in range(2)]
    states, others = [case.zeros(), case.zeros()], [case.zeros(), case.zeros()]
    for step in (1, 2):
        low_step(case, whole, states, step, keys=key)
        # The first tensor in three parts, the second in one.
        borders = [(0, 0, 1001), (0, 1001, 1004), (0, 1004, 4099), (1, 0, 300)]
        part = lambda list_: [list_[i][a:b] for i, a, b in borders]  # noqa: B023, E731
        ops.adamw_bf16_(
            part(cut), part(others[0]), part(others[1]), part(case.grads[step - 1]), step=step,
            keys=[key[i] for i, _, _ in borders], firsts=[a for _, a, _ in borders],
            scale=case.rest["scale"], decays=[case.rest["decays"][i] for i, _, _ in borders], **REST,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    ops.configure({"adamw_bf16": "reference"}, device)
    theirs, states = [one.clone() for one in start], [case.zeros(), case.zeros()]
    for step in (1, 2):
        low_step(case, theirs, states, step, keys=key)
    for mine, other in zip(whole, theirs, strict=True):
        # One fp32 rounding apart, a number may be rounded to the other side.
        assert (mine != other).sum() <= 2e-3 * mine.numel() + 1
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=0)


def test_steps_below_bf16s_spacing_count_on_average() -> None:
    """A thousand steps of a sixty-fourth of the spacing beside 1: to nearest nothing would move."""
    masters = [torch.ones(4000, dtype=torch.bfloat16)]
    states = [[torch.zeros(4000)] for _ in range(2)]
    rest = {"decays": [0.0], "lr": 2.0**-14, "betas": (0.0, 0.0), "eps": 0.0, "scale": torch.tensor(1.0)}
    for step in range(1, 65):
        ops.adamw_bf16_(masters, *states, [torch.ones(4000)], step=step, keys=[11], **rest)
    # 64 * 2^-14 = 2^-8 of distance; its standard deviation over 4000 elements is below 1e-4.
    assert masters[0].double().mean().item() == pytest.approx(1 - 2.0**-8, abs=3e-4)
    assert masters[0].unique().numel() > 1


def test_random_rounding_keeps_what_fits_and_what_is_not_finite() -> None:
    x = torch.tensor([1.0, -2.5, 0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1 + 2**-9])
    for bits in (0, 0x7FFF, 0xFFFF):
        y = optim_bf16.round_by(x, torch.full((8,), bits))
        assert torch.equal(y[:6], x[:6].bfloat16()) and y[6].isnan() and torch.signbit(y[3])
        assert y[7] == (1 + 2**-7 if bits == 0xFFFF else 1.0)


def test_what_bf16_masters_refuse() -> None:
    p, m, g = torch.zeros(8).bfloat16(), torch.zeros(8), torch.zeros(8)
    rest = {"scale": torch.tensor(1.0), "decays": [0.0], "step": 1, **REST}
    for masters, keys, firsts, message in (
        ([m], [1], None, r"adamw_bf16: masters\[0\] is float32, must be bfloat16"),
        ([p], [1, 2], None, "adamw_bf16: 1 masters, but 2 keys"),
        ([p], [1], [-1], "adamw_bf16: firsts must be at least 0, but one is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.adamw_bf16_(masters, [m], [m], [g], keys=keys, firsts=firsts, **rest)
    with pytest.raises(ValueError, match="adamw_bf16: widths must be at least 1, but one is 0"):
        ops.adamw_bf16_([p], [m], [m], [g], keys=[1], widths=[0], strides=[8], **rest)
    with pytest.raises(ValueError, match=r"adamw: masters\[0\] is bfloat16, must be float32 or float64"):
        ops.adamw_([p], [m], [m], [g], **rest)


@pytest.mark.gpu
def test_bodies_on_a_gpu_give_the_bits_of_those_on_a_cpu_and_the_same_ones_each_time() -> None:
    for op in ("adamw", "lion", "adamw_8bit", "adamw_bf16", "square_sum"):
        need_body(op, "cuda", torch.float32, "cuda")

    def all_of(device: str, body: str) -> list[torch.Tensor]:
        ops.configure(dict.fromkeys(("adamw", "lion", "adamw_8bit", "adamw_bf16"), body), device)
        found = run("adamw", body, device, torch.bfloat16, 1) + run("lion", body, device, torch.bfloat16, 0)
        ops.configure({"adamw_8bit": body, "adamw_bf16": body}, device)
        case = Case(device, torch.bfloat16)
        states = eight(case, device)
        for number, grads in enumerate(case.grads, 1):
            rest = {**case.rest, **REST, "step": number}
            ops.adamw_8bit_(case.masters, *states, grads, weights=case.weights, **rest)
        low, moments = [one.bfloat16() for one in case.masters], [case.zeros(), case.zeros()]
        for step in (1, 2, 3):
            low_step(case, low, moments, step, keys=list(range(len(SIZES))))
        return found + [one for state in (case.masters, *states, low, *moments) for one in state]

    on_gpu = all_of("cuda", "cuda")
    for mine, theirs in zip(on_gpu, all_of("cpu", "cpu"), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    repeats_bitwise(lambda: all_of("cuda", "cuda"), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("body", ["torch", "cuda"])
def test_sum_of_squares_on_a_gpu(body: str) -> None:
    need_body("square_sum", body, torch.float32, "cuda")
    ops.configure({"square_sum": body}, "cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for lead in (0, 1):
            sizes = (1, 7, 16384, 3 * 16384 + 5, 200_000)
            some = tensors(lambda n: torch.randn(n).to(dtype), "cuda", lead, sizes)  # noqa: B023
            exact = sum(one.double().square().sum().item() for one in some)
            assert ops.square_sum(some).tolist() == pytest.approx([exact, 0.0], rel=1e-6)
            for place in (0, 16385, -1):
                some[3][place] = float("inf")
                assert ops.square_sum(some)[1] == 1
                some[3][place] = 0.0
