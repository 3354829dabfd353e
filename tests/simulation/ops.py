"""What may happen to a fleet, as a list that can be typed by hand, and as Hypothesis generates and shrinks it.

Example::

    [StartRound(), DeliverAll(), DeviceTrains(1), Deliver(3), CrashGateway(1), Restart("g-1"), DeliverAll()]

Where an operation names somebody who is in no state for it (a crashed device trains, say), nothing happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hypothesis import strategies as st

from tests.simulation.setting import PLAIN, SITES, Setting

GATEWAYS = len(SITES)


class After(Enum):
    """Where in its work a process dies."""

    NOTHING = "now"
    """With its unsent messages, and with what it was about to write."""
    WRITE = "write"
    """After the next write that waits is on disk, before anything that follows from it."""


@dataclass(frozen=True)
class AdvanceTime:
    """Time passes; timers fire, messages stay on their way."""

    milliseconds: int


@dataclass(frozen=True)
class StartRound:
    """The operator wants ``rounds`` more versions."""

    rounds: int = 1


@dataclass(frozen=True)
class AbortRound:
    """The operator ends the open round."""


@dataclass(frozen=True)
class DeviceTrains:
    """A device ends the training that it began."""

    device: int


@dataclass(frozen=True)
class Deliver:
    """``count`` things happen of those that wait: a message, a connection, a write; ``seed`` chooses which."""

    count: int
    seed: int = 0


@dataclass(frozen=True)
class DeliverAll:
    """All that waits happens, and what follows from it, in an order that ``seed`` chooses."""

    seed: int = 0


@dataclass(frozen=True)
class DropConnection:
    """A member's connections break; what it had not confirmed comes again, what it had not sent is lost."""

    member: str


@dataclass(frozen=True)
class CrashDevice:
    """A device dies, at once or at a later step of its disk; ``lossy`` loses names that were not synced."""

    device: int
    step: int = 0
    lossy: bool = False


@dataclass(frozen=True)
class CrashGateway:
    """A gateway dies."""

    gateway: int
    after: After = After.NOTHING


@dataclass(frozen=True)
class CrashCoordinator:
    """The coordinator dies."""

    after: After = After.NOTHING


@dataclass(frozen=True)
class CrashHelper:
    """The helper dies, where there is one."""

    after: After = After.NOTHING


@dataclass(frozen=True)
class Restart:
    """Whoever is dead or asleep starts on the disk as it is."""

    member: str


@dataclass(frozen=True)
class BrokerCrash:
    """A broker dies and is back at once; ``lose``: without what it kept."""

    broker: int
    lose: bool = False


@dataclass(frozen=True)
class Duplicate:
    """A member gets the last message of one of its topics once more."""

    member: str
    which: int = 0


@dataclass(frozen=True)
class ReplayOld:
    """A message from the past arrives again at everybody who listens on its topic."""

    which: int


@dataclass(frozen=True)
class Corrupt:
    """A message from the past arrives again with one byte changed."""

    which: int
    byte: int
    flip: int = 1


@dataclass(frozen=True)
class SleepDevice:
    """A device stops in good order."""

    device: int


@dataclass(frozen=True)
class WakeDevice:
    """A device that sleeps starts again."""

    device: int


@dataclass(frozen=True)
class PartitionSite:
    """A gateway cannot reach the tier above."""

    gateway: int


@dataclass(frozen=True)
class Heal:
    """Every link works again."""


@dataclass(frozen=True)
class RevokeDevice:
    """The authority revokes a device; the coordinator is told."""

    device: int


Op = (
    AdvanceTime
    | StartRound
    | AbortRound
    | DeviceTrains
    | Deliver
    | DeliverAll
    | DropConnection
    | CrashDevice
    | CrashGateway
    | CrashCoordinator
    | CrashHelper
    | Restart
    | BrokerCrash
    | Duplicate
    | ReplayOld
    | Corrupt
    | SleepDevice
    | WakeDevice
    | PartitionSite
    | Heal
    | RevokeDevice
)


def operations(setting: Setting = PLAIN) -> st.SearchStrategy[list[Op]]:
    """What may happen to such a fleet.

    Half of what happens is the fleet's own work, and half of the runs begin where updates are on their way: else hardly
    a round would come far enough for a fault to matter.
    """
    devices = st.integers(1, setting.size)
    gateways = st.integers(1, GATEWAYS)
    helper = ["h-main"] if setting.helper else []
    members = st.sampled_from(["c-main", *SITES, *setting.devices, *helper])
    seeds = st.integers(0, 1000)
    messages = st.integers(0, 10_000)
    crashes = [
        st.builds(CrashGateway, gateways, st.sampled_from(After)),
        st.builds(CrashCoordinator, st.sampled_from(After)),
        *([st.builds(CrashHelper, st.sampled_from(After))] if helper else []),
    ]
    progress = st.one_of(
        st.builds(Deliver, st.integers(1, 12), seeds),
        st.builds(DeliverAll, seeds),
        st.builds(DeviceTrains, devices),
    )
    faults = st.one_of(
        st.builds(AdvanceTime, st.sampled_from([10, 1_000, 5_000, 30_000, 61_000, 121_000])),
        st.builds(AbortRound),
        st.builds(StartRound, st.integers(1, 2)),
        st.builds(DropConnection, members),
        st.builds(CrashDevice, devices, st.integers(0, 40), st.booleans()),
        *crashes,
        st.builds(Restart, members),
        st.builds(BrokerCrash, st.integers(0, 1), st.booleans()),
        st.builds(Duplicate, members, st.integers(0, 20)),
        st.builds(ReplayOld, messages),
        st.builds(Corrupt, messages, st.integers(0, 2000), st.integers(1, 255)),
        st.builds(SleepDevice, devices),
        st.builds(WakeDevice, devices),
        st.builds(PartitionSite, gateways),
        st.builds(Heal),
        st.builds(RevokeDevice, devices),
    )
    deaths = st.one_of(
        *crashes,
        st.builds(CrashDevice, devices, st.integers(0, 10), st.booleans()),
        st.builds(DropConnection, members),
        st.builds(RevokeDevice, devices),
        st.builds(Restart, members),
    )
    small_steps = st.one_of(
        st.builds(Deliver, st.integers(1, 15), seeds),
        st.builds(DeviceTrains, devices),
        st.builds(Deliver, st.integers(1, 5), seeds),
        deaths,
    )
    on_their_way = [DeliverAll(), *all_train(setting)]
    return st.one_of(
        st.lists(st.one_of(progress, faults), max_size=40),
        st.lists(small_steps, min_size=3, max_size=25).map(lambda steps: [*on_their_way, *steps]),
    )


def all_train(setting: Setting = PLAIN) -> tuple[Op, ...]:
    """Every device ends its training."""
    return tuple(DeviceTrains(number) for number in range(1, setting.size + 1))
