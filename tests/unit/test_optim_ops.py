"""The optimizers' updates: AdamW against torch in fp64, the same bits whatever the threads, 8 bits, Lion, Muon, and bad
input. Longer: MEGATUNE_OPTIM_ELEMENTS (elements of the largest tensor, by default 40,000)."""

from __future__ import annotations

import os

import pytest
import torch

from megatune import ops
from megatune.ops import optim as reference
from megatune.optim import muon
from megatune.optim.muon import orthogonalise, pieces
from megatune.parallel import ShardSpec
from megatune.parallel.shard import Fused
from tests.helpers.ops import relative_error

SIZES = (int(os.environ.get("MEGATUNE_OPTIM_ELEMENTS", "40000")) + 3, 7, 513)
DECAYS = [0.1, 0.0, 0.1]


@pytest.fixture(autouse=True)
def _bodies_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    ops.configure({}, "cpu")


def state(fill: float = 0.0) -> list[torch.Tensor]:
    return [torch.full((size,), fill) for size in SIZES]


def adamw(steps: int, grad_dtype: torch.dtype, lead: int = 0):
    """(masters, moments, moments of squares, weights, gradients of each step). `lead`: where weights begin in their
    memory, in elements."""
    masters = [torch.randn(size) for size in SIZES]
    first = [p.clone() for p in masters]
    m, v = state(), state()
    memory = [torch.full((size + lead,), float("nan"), dtype=torch.bfloat16) for size in SIZES]
    weights = [one[lead:] for one in memory]
    weights[1] = torch.empty(0)
    all_grads = []
    for step in range(1, steps + 1):
        grads = [torch.randn(size).to(grad_dtype) for size in SIZES]
        all_grads.append(grads)
        ops.adamw_(
            masters, m, v, grads, weights=weights, scale=torch.tensor(0.25), decays=DECAYS, lr=1e-2,
            betas=(0.9, 0.999), eps=1e-8, step=step,
        )  # fmt: skip
    return first, masters, m, v, weights, all_grads


@pytest.mark.parametrize("body", ops.BODIES["adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_equals_torch_in_fp64(body: str, dtype: torch.dtype) -> None:
    reason = ops.OPS["adamw"].bodies[body].unfit("cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    ops.configure({"adamw": body}, "cpu", torch.float32)
    first, masters, _, _, weights, grads = adamw(5, dtype, lead=5)
    errors = []
    for precision in (torch.float64, torch.float32):
        theirs = [p.to(precision) for p in first]
        groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, DECAYS, strict=True)]
        oracle = torch.optim.AdamW(groups, lr=1e-2)
        for step in grads:
            for p, grad in zip(theirs, step, strict=True):
                p.grad = grad.to(precision) * 0.25
            oracle.step()
        errors.append(theirs)
    for ours, exact, single in zip(masters, *errors, strict=True):
        assert (ours - exact).abs().max() <= 1.1 * (single - exact).abs().max()
    assert torch.equal(weights[0], masters[0].bfloat16()) and torch.equal(weights[2], masters[2].bfloat16())


def test_adamw_is_the_same_bits_whatever_the_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        found.append(adamw(2, torch.bfloat16))
    for other in found[1:]:
        for mine, theirs in zip(found[0][1:5], other[1:5], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_codes_are_a_map_of_256_values_and_the_nearest_is_taken() -> None:
    for signed in (True, False):
        values, _ = reference.code_values(signed, torch.device("cpu"))
        assert values.unique().numel() == 256 and values.max() == 1 and (values == 0).sum() == 1
        assert values.min() == (-0.99296875 if signed else 0)
        x = (torch.rand(1000) * 2 - 1 if signed else torch.rand(1000)) * 3
        codes, scales = torch.empty(1000, dtype=torch.uint8), torch.empty(4)
        reference.quantise(x, codes, scales, signed)
        assert torch.equal(scales, torch.nn.functional.pad(x, (0, 24)).view(4, 256).abs().amax(1))
        share = x / scales.repeat_interleave(256)[:1000]
        nearest = (share.unsqueeze(1) - values).abs().amin(1)
        assert torch.allclose((share - values[codes.long()]).abs(), nearest, atol=1e-6)
        assert (reference.dequantise(codes, scales, signed) - x).abs().max() < 0.03 * 3


def test_8_bit_moments_follow_those_in_fp32() -> None:
    size = 3 * 256 + 17
    start = torch.randn(size)
    low, full = start.clone(), start.clone()
    blocks = -(-size // 256)
    codes = [torch.full((size,), 127, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)]
    scales = [torch.zeros(blocks), torch.zeros(blocks)]
    m, v = torch.zeros(size), torch.zeros(size)
    rest = {"scale": torch.tensor(1.0), "decays": [0.0], "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
    for step in range(1, 31):
        grad = [torch.randn(size) + 0.5]
        ops.adamw_8bit_([low], [codes[0]], [scales[0]], [codes[1]], [scales[1]], grad, step=step, **rest)
        ops.adamw_([full], [m], [v], grad, step=step, **rest)
    moved = (full - start).norm()
    assert 1e-4 < (low - full).norm() / moved < 0.05


def test_lion_takes_the_sign_of_its_interpolation() -> None:
    p, m, grad = (
        torch.tensor([1.0, -2.0, 3.0]),
        torch.tensor([0.5, -0.5, 0.0]),
        torch.tensor([-2.0, -4.0, 0.0]),
    )
    rest = {"scale": torch.tensor(0.5), "decays": [0.5], "lr": 0.1, "betas": (0.5, 0.75)}
    ops.lion_([p], [m], [grad], **rest)
    assert p.tolist() == pytest.approx([0.95 + 0.1, -1.9 + 0.1, 2.85])
    assert m.tolist() == pytest.approx([0.125, -0.875, 0.0])


def _step(y: torch.Tensor) -> torch.Tensor:
    a, b, c = muon.COEFFICIENTS
    gram = y @ y.mT
    return a * y + (b * gram + c * (gram @ gram)) @ y


@pytest.mark.parametrize("least_cut", [1, 100])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (3, 16, 16), (2, 2, 9, 13)])
def test_newton_schulz_is_near_the_orthogonal_factor(
    shape: tuple[int, ...], least_cut: int, monkeypatch
) -> None:
    monkeypatch.setattr(muon, "LEAST_CUT", least_cut)
    x = torch.randn(shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalise(x)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3
    # The iteration is an odd polynomial: singular vectors stay.
    assert torch.allclose(found, u @ torch.diag_embed((u.mT @ found @ vh.mT).diagonal(dim1=-2, dim2=-1)) @ vh)
    assert torch.allclose(orthogonalise(x.float(), 3.0), 3 * found.float(), atol=1e-3)
    # Step by step, and from memory that held NaN.
    y = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(muon.STEPS):
        y = _step(y)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.allclose(orthogonalise(x), y, atol=1e-11)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 3584), (1500, 1500), (4, 2048, 768)])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_newton_schulz_on_a_gpu_is_more_exact_than_plain_bf16(
    shape: tuple[int, ...], power: float, monkeypatch
) -> None:
    monkeypatch.setattr(muon, "LEAST_CUT", 1024)
    rank = min(shape[-2:])
    falling = torch.arange(1.0, rank + 1, device="cuda") ** -power  # about as the singular values do
    x = torch.randn(*shape[:-1], rank, device="cuda") * falling
    x = x @ torch.randn(*shape[:-2], rank, shape[-1], device="cuda")
    truth, plain = x.double(), x.bfloat16()
    truth, plain = (y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) for y in (truth, plain))
    for _ in range(muon.STEPS):
        truth, plain = _step(truth), _step(plain)
    found = orthogonalise(x)
    assert found.dtype == torch.float16
    assert relative_error(found, truth) < min(0.05, relative_error(plain, truth))


def test_a_fused_weight_is_its_matrices() -> None:
    fused = Fused((("q", 4), ("k", 2), ("v", 2)), 3)
    x = torch.arange(24.0).unsqueeze(1).expand(24, 5)
    q, k, v = pieces(ShardSpec("w", (24, 5), 0, fused), x)
    assert q[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert k[:, 0].tolist() == [4, 5, 12, 13, 20, 21] and v.shape == (6, 5)


def test_sum_of_squares_tells_what_is_not_finite() -> None:
    tensors = [torch.randn(1000), torch.randn(7).bfloat16()]
    exact = sum(one.double().square().sum() for one in tensors)
    assert ops.square_sum(tensors).tolist() == pytest.approx([exact.item(), 0.0], rel=1e-6)
    for bad in (float("inf"), float("nan")):
        tensors[0][3] = bad
        assert ops.square_sum(tensors)[1] == 1
    with pytest.raises(ValueError, match="square_sum: there must be a tensor"):
        ops.square_sum([])


@pytest.mark.parametrize("body", ["reference", "cpu"])
def test_sum_of_squares_does_not_depend_on_how_numbers_are_cut(body: str) -> None:
    """Sums in fp32 do: torch's norm on a CPU is off by 0.1 % here."""
    if reason := ops.OPS["square_sum"].bodies[body].unfit("cpu"):
        pytest.skip(reason)
    ops.configure({"square_sum": body}, "cpu")
    x = torch.randn(10_000_000)
    exact = x.double().square().sum().item()
    whole, cut = (ops.square_sum(tensors)[0].item() for tensors in ([x], list(x.split(777_777))))
    assert whole == pytest.approx(exact, rel=1e-11) and cut == pytest.approx(whole, rel=1e-12)
    low = x[:100_003].bfloat16()
    assert ops.square_sum([low[3:].clone(), low[:3].clone()])[0].item() == pytest.approx(
        low.double().square().sum().item(), rel=1e-12
    )


def test_bad_input_names_op_argument_and_expectation() -> None:
    p, m, v, grad = (torch.zeros(8) for _ in range(4))
    rest = {
        "scale": torch.tensor(1.0),
        "decays": [0.0],
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "step": 1,
    }
    for lists, message in (
        (([p], [m], [], [grad]), "adamw: 1 masters, but 0 exp_avg_sqs"),
        (([p], [m], [v], [grad.half()]), r"adamw: grads\[0\] is float16, must be bfloat16 or float32"),
        (([p], [m.bfloat16()], [v], [grad]), r"adamw: exp_avgs\[0\] is bfloat16, must be float32"),
        (([p], [m], [v], [grad[:4]]), r"adamw: grads\[0\] has 4 elements, must have 8"),
        (
            ([p], [m], [v], [torch.zeros(16)[::2]]),
            r"adamw: grads\[0\] must be contiguous and on the masters'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ops.adamw_(*lists, **rest)
    with pytest.raises(ValueError, match="scale must be one float32"):
        ops.adamw_([p], [m], [v], [grad], **rest | {"scale": torch.ones(2)})
