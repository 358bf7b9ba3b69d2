"""Tensors from pipeline rank to pipeline rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from megatune.parallel.pipeline.plan import Channel, Message
from megatune.parallel.world import World


class Lines:
    """The ways between this process and its neighbours in the pipeline.

    With NCCL what a process sends and receives in one group runs in the order in which it was asked for: a receive that
    was posted early would hold up a send that the neighbour waits for. So a rank uses a group for one channel only.
    Channels without a common rank share one. All processes of the run make the same `Lines` at the same time.
    """

    def __init__(self, world: World, channels: Sequence[Channel]) -> None:
        self.device = world.device
        self.ranks = world.pp.ranks
        lanes = colour(channels)
        groups = _groups(world, 1 + max(lanes.values(), default=-1))
        mine = [channel for channel in channels if world.pp.rank in (channel.source, channel.target)]
        self._groups = {channel: groups[lanes[channel]] for channel in mine}
        # Some backends connect two processes when they first talk and wait for each other then: one channel after the
        # other, in the same order on all ranks.
        for channel in mine:
            if channel.source == world.pp.rank:
                self.send(torch.zeros(1, device=self.device), channel).wait()
            else:
                self.receive(torch.zeros(1, device=self.device), channel).wait()

    def send(self, tensor: Tensor, channel: Channel) -> dist.Work:
        """Start to send a contiguous tensor, to be left alone until the work is done."""
        return dist.isend(tensor, self.ranks[channel.target], self._groups[channel])

    def receive(self, buffer: Tensor, channel: Channel) -> dist.Work:
        """Start to receive into a contiguous buffer."""
        return dist.irecv(buffer, self.ranks[channel.source], self._groups[channel])


class Inbox:
    """What comes to this rank in one step, asked for when it is needed.

    Not before: over NCCL a receive is a kernel that runs until the message is there. One whose sender waits for what
    this rank has yet to send would never end if the host waited for the device meanwhile (when the allocator gives
    memory back, say).

    `incoming`: as in `Plan`. `empty(message)`: a buffer for it.
    """

    def __init__(
        self,
        lines: Lines,
        incoming: Mapping[Channel, Sequence[Message]],
        empty: Callable[[Message], Tensor],
    ) -> None:
        self._lines, self._empty = lines, empty
        self._to_come = {channel: list(reversed(messages)) for channel, messages in incoming.items()}
        self._posted: dict[Message, tuple[dist.Work, Tensor]] = {}

    def take(self, message: Message, channel: Channel) -> Tensor:
        """The message, when it is here."""
        while message not in self._posted:
            self._post(channel)
        work, tensor = self._posted.pop(message)
        work.wait()
        return tensor

    def _post(self, channel: Channel) -> None:
        """Ask for the next message of a channel, in the order in which the sender sends."""
        to_come = self._to_come[channel]
        if to_come:
            message = to_come.pop()
            buffer = self._empty(message)
            self._posted[message] = self._lines.receive(buffer, channel), buffer


def colour(channels: Sequence[Channel]) -> dict[Channel, int]:
    """A number for each channel such that channels with the same number have no rank in common."""
    found: dict[Channel, int] = {}
    for channel in channels:
        ends = {channel.source, channel.target}
        taken = {number for other, number in found.items() if ends & {other.source, other.target}}
        found[channel] = next(number for number in range(len(taken) + 1) if number not in taken)
    return found


# Groups are kept as long as the default group: whoever builds several pipelines in one process shares them.
_kept: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, int], list[dist.ProcessGroup]]] = (
    WeakKeyDictionary()
)


def _groups(world: World, count: int) -> list[dist.ProcessGroup]:
    """`count` process groups, each of the ranks of this process's pipeline."""
    found = _kept.setdefault(dist.group.WORLD, {}).setdefault((world.world_size, world.pp.size), [])
    apart = world.world_size // world.pp.size
    every = [list(range(first, world.world_size, apart)) for first in range(apart)]
    while len(found) < count:
        found.append(_line_group(every, world))
    return found[:count]


def _line_group(every: list[list[int]], world: World) -> dist.ProcessGroup:
    if world.device.type == "cuda" and dist.group.WORLD.bound_device_id is not None:
        # One call for all pipelines; the other way takes as many as there are.
        return dist.split_group(split_ranks=every, group_desc="pipeline")
    groups = [dist.new_group(ranks, group_desc="pipeline") for ranks in every]
    return groups[every.index(list(world.pp.ranks))]
