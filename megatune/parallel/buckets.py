"""Contiguous buckets of trainable parameters: what ZeRO 0, 1 and 2 reduces, updates and gathers in one piece.

A bucket is laid out as [shards, width]: each parameter's flattened local tensor is padded and cut into `shards` equal
chunks, and row i, process i's shard, holds chunk i of every parameter, one after the other. So where a parameter is cut
depends on nothing but its own size, and shards can be added between processes whose buckets differ (tensor parallel
partial sums, tied embeddings of two pipeline stages).

| tensor | shape, dtype | lives |
| --- | --- | --- |
| `master` | [width] fp32, or the compute dtype | always; on the host where it is offloaded |
| `weight` | [shards * width] compute dtype, parameter by parameter | always; if whole and of its dtype the master |
| `grad` | [width] fp32, summed gradients of the shard | always |
| whole gradient | [shards, width] fp32 | always (0, 1); from first gradient to reduction in each micro-batch (2) |
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatune.ops.comm import all_gather, reduce_scatter
from megatune.parallel.shard import ShardSpec
from megatune.parallel.world import Axis

# Chunks are padded to multiples of this many elements, so that each starts at 64 bytes even in bf16; large ones, so
# that the blocks of 8-bit states (`ops.optim`) are never cut.
_ALIGN, _ALIGN_LARGE, _LARGE = 32, 256, 4096
# fp32 gradients of 128 MiB: a reduction this large reaches the network's full speed, and few are in flight at once.
BUCKET_ELEMENTS = 2**25


def is_matrix(spec: ShardSpec) -> bool:
    """Whether a parameter is a matrix (of each expert), not a vector: a norm's weight, a bias, a bias per expert."""
    return len(spec.shape) - spec.expert >= 2


@dataclass(frozen=True)
class Member:
    """A trainable parameter that goes into a bucket with others of the same `key`. `shape`: of its local tensor."""

    name: str
    spec: ShardSpec
    shape: tuple[int, ...]
    key: tuple[Hashable, ...]


def fill(members: Sequence[Member]) -> list[list[Member]]:
    """Deal parameters, given in the order of forward, into buckets; both come in the order in which backward finishes
    with them. Within a bucket those that an optimizer treats alike stand together."""
    full: list[tuple[int, list[Member]]] = []
    filling: dict[tuple[Hashable, ...], list[Member]] = {}
    for position, member in reversed(list(enumerate(members))):
        group = filling.setdefault(member.key, [])
        if group and sum(math.prod(one.shape) for one in (*group, member)) > BUCKET_ELEMENTS:
            full.append((position + 1, group))
            filling[member.key] = group = []
        group.append(member)
    places = {member.name: position for position, member in enumerate(members)}
    full += [(places[group[-1].name], group) for group in filling.values()]
    full.sort(key=lambda entry: -entry[0])
    alike = lambda one: (not is_matrix(one.spec), one.spec.tensor_dim is None)  # noqa: E731
    return [sorted(group, key=alike) for _, group in full]


@dataclass(frozen=True)
class Slot:
    """A parameter's place in its bucket: columns [start, start + chunk). `shape`: of its local tensor."""

    name: str
    spec: ShardSpec
    shape: tuple[int, ...]
    start: int
    chunk: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Pool:
    """Whole gradients that live for one micro-batch only (stage 2). There are at least two of them, so that one fills
    while another is sent; a third is made only where two are not enough to hold what is open at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numel = self._made = 0
        self._free: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def reserve(self, numel: int) -> None:
        self._numel = max(self._numel, numel)

    def take(self) -> Tensor:
        """As many fp32 elements as the largest bucket needs, filled with anything."""
        if self._free and self._made >= 2:
            buffer, sent = self._free.popleft()
            if sent is not None:
                torch.cuda.current_stream(self._device).wait_event(sent)
        else:
            buffer = torch.empty(self._numel, dtype=torch.float32, device=self._device)
            self._made += 1
        return buffer

    def give(self, buffer: Tensor, sent: torch.cuda.Event | None) -> None:
        """Take back what `take` gave; `sent`: the event after which it may be overwritten."""
        self._free.append((buffer, sent))


class Bucket:
    """Parameters of one dtype that are reduced over the same processes and belong to the same pipeline stage.
    `master_dtype`: fp32, or that dtype.

    `axis`: over it they are sharded and their gradients summed; `replicas`: the axis of further copies (hybrid
    sharding). `zero`: stage 0 (all shards on each process), 1 or 2. `is_late`: gradients come from several pipeline
    stages; it is reduced at the end of the step. `puts_off`: weight gradients may come after backward (`deferred`).
    `offloads`: masters lie in host memory.
    """

    def __init__(
        self,
        members: Sequence[Member],
        dtype: torch.dtype,
        master_dtype: torch.dtype,
        axis: Axis,
        replicas: Axis,
        zero: int,
        *,
        is_late: bool = False,
        puts_off: bool = False,
        offloads: bool = False,
    ) -> None:
        self.dtype, self.axis, self.replicas, self.is_late = dtype, axis, replicas, is_late
        self.master_dtype = master_dtype
        self.shards = axis.size if zero else 1
        self.reduces_each = zero == 2 and self.shards > 1 and not is_late
        self.offloads = offloads
        is_single = self.shards == 1 and dtype == torch.float32
        self.is_whole = self.shards == 1 and dtype == master_dtype and not offloads
        self.slots: list[Slot] = []
        self.width = 0
        for one in members:
            align = _ALIGN_LARGE if math.prod(one.spec.shape) >= _LARGE else _ALIGN
            chunk = -(-math.prod(one.shape) // (self.shards * align)) * align
            self.slots.append(Slot(one.name, one.spec, one.shape, self.width, chunk))
            self.width += chunk
        # Gradients of whole fp32 parameters are accumulated by autograd itself, in their place in the bucket; but its
        # hook, that counts them for the reduction, is also called for those put off, and they look the same then.
        self.is_direct = is_single and not (puts_off and self.sends)
        self.master: Tensor
        self.weight: Tensor
        self.grad: Tensor
        self._whole: Tensor | None = None
        # Stage 2: where whole gradients come from, the one that fills and the one that is being sent.
        self._pool: Pool | None = None
        self._filling: Tensor | None = None
        self._sent: Tensor | None = None
        self._work: dist.Work | None = None
        self._received: Tensor | None = None
        self._gathered: tuple[Tensor, dist.Work | None] | None = None
        self._rounded: Tensor | None = None
        self._rounded_elements = 0

    @property
    def sends(self) -> bool:
        """Whether reducing it takes communication."""
        return self.width > 0 and (self.axis.size > 1 or self.replicas.size > 1)

    def allocate(self, device: torch.device, pool: Pool) -> None:
        """Memory for weights, masters and gradients. Zeros: the padding stays zero for good."""
        self.grad = torch.zeros(self.width, dtype=torch.float32, device=device)
        place = "cpu" if self.offloads else device
        self.master = torch.zeros(self.width, dtype=self.master_dtype, device=place)
        if self.is_whole:
            self.weight = self.master
        else:
            self.weight = torch.zeros(self.shards * self.width, dtype=self.dtype, device=device)
        if self.reduces_each:
            self._pool = pool
            pool.reserve(self.shards * self.width)
        elif self.shards == 1:
            self._whole = self.grad.view(1, -1)
        else:
            self._whole = torch.zeros(self.shards, self.width, dtype=torch.float32, device=device)
        self.clear()

    def weight_of(self, slot: Slot) -> Tensor:
        """The weight used in compute: a view of the bucket, in the parameter's local shape."""
        start = slot.start * self.shards
        return self.weight[start : start + slot.numel].view(slot.shape)

    def shard_of(self, tensor: Tensor, slot: Slot) -> Tensor:
        """The parameter's columns, padding included, of a [width] tensor such as `master` and `grad`."""
        return tensor[slot.start : slot.start + slot.chunk]

    # Gradients, in the order of a step: clear, (begin, add .., launch, collect) for each micro-batch.

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        if self.is_direct:
            self.grad.zero_()
        if self._filling is not None:
            self._pool.give(self._filling, None)
            self._filling = self._whole = None
        self._written = [False] * len(self.slots)
        self._is_fresh = True
        self.is_closed = False
        self.begun = 0
        self._arrived = [0] * len(self.slots)
        self.complete = 0
        self._lacking = len(self.slots)

    def add(self, index: int, grad: Tensor) -> None:
        """Add a parameter's gradient (local shape, any float dtype) to the whole gradient."""
        slot = self.slots[index]
        if self.is_closed:
            raise RuntimeError(
                f"a gradient of {slot.name} came after the gradients of this step were reduced"
            )
        if self._whole is None:
            self._open()
        columns = self._whole[:, slot.start : slot.start + slot.chunk]
        flat = grad.reshape(-1)
        rows, rest = divmod(slot.numel, slot.chunk) if slot.chunk else (0, 0)
        put = torch.Tensor.add_ if self._written[index] else torch.Tensor.copy_
        put(columns[:rows], flat[: rows * slot.chunk].view(rows, slot.chunk))
        if rest:
            put(columns[rows, :rest], flat[rows * slot.chunk :])
        if rows < self.shards and self._pool is not None and not self._written[index]:
            columns[rows, rest:].zero_()
            columns[rows + 1 :].zero_()
        self._written[index] = True

    def arrive(self, index: int) -> bool:
        """Count a parameter's gradient of one more micro-batch; True where that made a micro-batch `complete`."""
        self._arrived[index] += 1
        if self._arrived[index] != self.complete + 1:
            return False
        self._lacking -= 1
        if self._lacking:
            return False
        while not self._lacking:
            self.complete += 1
            self._lacking = sum(count <= self.complete for count in self._arrived)
        return True

    def settle(self) -> None:
        """No gradient of the micro-batches begun so far is to come: those that did not were zero."""
        self.complete = self.begun
        self._arrived = [self.begun] * len(self.slots)
        self._lacking = len(self.slots)

    def launch(self, is_last: bool) -> None:
        """Start reducing what has been added, after `collect` of the launch before. `is_last`: nothing more comes in
        this step."""
        self.is_closed = is_last
        self._fill_gaps()
        if not self.sends:
            return
        if self.shards > 1:
            self._received = self.grad if self._is_fresh else torch.empty_like(self.grad)
            self._is_fresh = False
            self._work = reduce_scatter(
                self._received, self._whole.view(-1), group=self.axis.group, async_op=True
            )
        elif self.axis.size > 1:
            self._work = dist.all_reduce(self.grad, group=self.axis.group, async_op=True)
        if self._filling is not None:
            self._sent, self._filling, self._whole = self._filling, None, None
            self._written = [False] * len(self.slots)

    def collect(self) -> None:
        """Wait for `launch` where there was one; after the last, sum over the replicas."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._received is not None and self._received is not self.grad:
            self.grad.add_(self._received)
        self._received = None
        if self._sent is not None:
            event = None
            if self.grad.is_cuda and torch.cuda.is_available():
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.grad.device))
            self._pool.give(self._sent, event)
            self._sent = None
        if self.is_closed and self.replicas.size > 1 and self.sends:
            dist.all_reduce(self.grad, group=self.replicas.group)

    def _open(self) -> None:
        self._filling = self._pool.take()
        self._whole = self._filling[: self.shards * self.width].view(self.shards, self.width)

    def _fill_gaps(self) -> None:
        """A parameter without a gradient counts as zero."""
        if self.is_direct:
            return
        if self._whole is None:
            self._open()
        for index, slot in enumerate(self.slots):
            if not self._written[index]:
                self._whole[:, slot.start : slot.start + slot.chunk].zero_()
                self._written[index] = True

    # Weights.

    def rounded(self, start: int, numel: int) -> Tensor | None:
        """Where an update may put masters [start, start + numel) in the compute dtype as it makes them, which spares
        `gather` a pass over them; it must fill all of it. None where masters are neither cast nor on the host."""
        if (self.dtype == self.master_dtype and not self.offloads) or not numel:
            return None
        if self._rounded is None:
            # A whole bucket's weights lie as its masters do.
            whole = self.shards == 1
            self._rounded = self.weight if whole else torch.empty_like(self.grad, dtype=self.dtype)
        self._rounded_elements += numel
        return self._rounded[start : start + numel]

    def gather(self) -> None:
        """Start bringing the masters to the weights: cast this process's shard (unless the update has filled all of
        `rounded`), gather the others'."""
        if self.is_whole or not self.width:
            return
        shard = self._rounded if self._rounded_elements == self.width else None
        self._rounded, self._rounded_elements = None, 0
        if self.shards == 1:
            if shard is None:
                self.weight.copy_(self.master)
            return
        if shard is None:
            shard = self.master.to(self.weight.device, self.dtype)
        out = torch.empty_like(self.weight)
        work = all_gather(out, shard, group=self.axis.group, async_op=True)
        self._gathered = out, work

    def scatter(self) -> None:
        """Wait for `gather` and put each parameter's chunks together."""
        if self._gathered is None:
            return
        gathered, work = self._gathered
        self._gathered = None
        if work is not None:
            work.wait()
        starts = [slot.start * self.shards for slot in self.slots]
        out = [
            self.weight[start : start + slot.chunk * self.shards].view(self.shards, slot.chunk)
            for start, slot in zip(starts, self.slots, strict=True)
        ]
        sizes = [slot.chunk for slot in self.slots]
        torch.split_with_sizes_copy(gathered.view(self.shards, self.width), sizes, dim=1, out=out)
