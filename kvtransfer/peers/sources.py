"""The peers that send to this process: it connects to them, greets, and watches them until they are lost.

    GREETING → fits → READY → silent or refused → GREETING again, while quarantined slots hang on it
    any      → its incarnation has ended → SETTLING → its slots are free → forgotten

This process greets a lost source again for as long as slots are in quarantine because of it: one that was
only stopped will then send `Closed`; one that was restarted answers in another incarnation, and a dead one's
endpoint refuses connections. In the last two cases what was on the way gets a moment to land. Each connection
has a number of its own, and what arrives on it under another number was sent before.
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.errors import MoverError, TransferConfigError
from kvtransfer.messages import TransferAddress
from kvtransfer.movers.base import TwoSidedMover
from kvtransfer.net.channel import ChannelKeys, Codec, Link
from kvtransfer.peers.handshake import mismatch
from kvtransfer.peers.probe import IncarnationProbe
from kvtransfer.protocol.deferred import DeferredMessages
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.peer_messages import (
    MoverNote,
    PeerConnection,
    PeerHello,
    PeerMessage,
    PeerPing,
    PeerRefused,
)

log = logging.getLogger(__name__)

SETTLE_S = 0.25

PeerLink = Link[PeerMessage, PeerMessage]


class SourceState(Enum):
    GREETING = "greeting"
    READY = "ready"
    SETTLING = "settling"


@dataclass(slots=True)
class _Source:
    address: TransferAddress
    link: PeerLink
    connection: PeerConnection
    probe: IncarnationProbe
    state: SourceState
    since_s: float
    received_at_s: float
    sent_at_s: float
    probe_at_s: float
    agent: str = ""
    """Its mover's name, once it has greeted."""
    deferred: DeferredMessages = field(default_factory=DeferredMessages)


class Sources:
    """The table of sources, by address. `hello(epoch)` gives the hello to the source in that incarnation,
    or None while no worker is attached. `watch` and `unwatch` are called with every socket that comes and
    goes."""

    def __init__(
        self,
        machine: TransferMachine,
        codec: Codec[PeerMessage],
        keys: ChannelKeys | None,
        epoch: int,
        hello: Callable[[int | None], PeerHello | None],
        peer_timeout_s: float,
        heartbeat_s: float,
        watch: Callable[[PeerLink], None],
        unwatch: Callable[[PeerLink], None],
        two_sided: TwoSidedMover | None = None,
    ) -> None:
        self._machine, self._codec, self._keys, self._hello = machine, codec, keys, hello
        self._epoch = epoch
        self._peer_timeout_s, self._heartbeat_s = peer_timeout_s, heartbeat_s
        self._watch, self._unwatch = watch, unwatch
        self._two_sided = two_sided
        self._sources: dict[TransferAddress, _Source] = {}

    def __len__(self) -> int:
        return sum(source.state is SourceState.READY for source in self._sources.values())

    def connect(self, address: TransferAddress, now_s: float) -> None:
        """Connects and greets, unless that is under way. A bad endpoint ends the transfers at once."""
        if address in self._sources:
            return
        try:
            link = self._new_link(address)
        except TransferConfigError as error:
            log.warning("source %s: %s", address.endpoint, error)
            self._machine.receiver.source_gone(address, f"source unreachable: {error}"[:1000], now_s)
            return
        source = _Source(
            address,
            link,
            _new_connection(),
            IncarnationProbe(address.endpoint),
            SourceState.GREETING,
            now_s,
            now_s,
            now_s,
            now_s,
        )
        self._sources[address] = source
        self._greet(source, now_s)

    def receive(self, now_s: float) -> None:
        for source in list(self._sources.values()):
            link, ours = source.link, False
            for message in link.receive():
                if source.link is not link or self._sources.get(source.address) is not source:
                    break  # What is left was sent on a connection that an earlier message has ended.
                if isinstance(message, PeerConnection):
                    ours = message == source.connection
                    if not ours:
                        self._machine.outbox.drops["other_connection"] += 1
                    continue
                if not ours:
                    continue
                source.received_at_s = now_s
                if isinstance(message, PeerHello):
                    self._on_hello(source, message, now_s)
                elif isinstance(message, PeerRefused):
                    if source.state is not SourceState.SETTLING:
                        self._lose(source, f"refused: {message.reason}", now_s)
                elif source.state is not SourceState.READY:
                    self._machine.outbox.drops["peer_before_hello"] += 1
                elif isinstance(message, MoverNote):
                    self._on_note(source, message, now_s)
                elif not isinstance(message, PeerPing) and not self._defer(source, message):
                    self._machine.on_source(source.address, message, now_s)

    def send(self, address: TransferAddress, messages: list[PeerMessage], now_s: float) -> None:
        source = self._sources.get(address)
        if source is None or source.state is not SourceState.READY:
            self._machine.outbox.drops["to_lost_peer"] += len(messages)
        elif source.link.send([source.connection, *messages]):
            source.sent_at_s = now_s
        else:
            self._lose(source, "its queue is full", now_s)

    def tick(self, now_s: float) -> None:
        self._follow_mover(now_s)
        for source in list(self._sources.values()):
            if source.state is SourceState.SETTLING:
                if now_s >= source.since_s + SETTLE_S and self._at_rest(source):
                    self._machine.receiver.source_gone(source.address, "source is gone", now_s)
                    self._forget(source)
                continue
            quiet_s = now_s - source.received_at_s
            if quiet_s >= 2 * self._heartbeat_s and now_s >= source.probe_at_s:
                source.probe_at_s = now_s + self._heartbeat_s
                if source.probe.proves_death():
                    self._over(source, "nobody listens at its endpoint", now_s)
                    continue
            if quiet_s >= self._peer_timeout_s and now_s - source.since_s >= self._peer_timeout_s:
                self._lose(source, f"silent for {self._peer_timeout_s} s", now_s)
            elif now_s - source.sent_at_s >= self._heartbeat_s:
                source.sent_at_s = now_s
                if source.state is SourceState.READY:
                    source.link.send([source.connection, PeerPing(self._epoch)])

    def next_deadline_s(self) -> float | None:
        return min(
            (
                s.since_s + SETTLE_S
                if s.state is SourceState.SETTLING
                else min(
                    s.sent_at_s + self._heartbeat_s,
                    max(s.probe_at_s, s.received_at_s + 2 * self._heartbeat_s),
                )
                for s in self._sources.values()
            ),
            default=None,
        )

    def lose_all(self, reason: str, now_s: float) -> None:
        for source in list(self._sources.values()):
            if source.state is not SourceState.SETTLING:
                self._lose(source, reason, now_s)

    def close(self) -> None:
        for source in list(self._sources.values()):
            self._forget(source)

    def _new_link(self, address: TransferAddress) -> PeerLink:
        def on_drop(reason: str) -> None:
            self._machine.outbox.drops[f"peer_{reason}"] += 1

        link: PeerLink = Link(address.endpoint, self._codec, self._codec, keys=self._keys, on_drop=on_drop)
        self._watch(link)
        return link

    def _greet(self, source: _Source, now_s: float) -> None:
        hello = self._hello(source.address.epoch)
        if hello is None:
            self._machine.receiver.source_lost(source.address, "no worker is attached here", now_s)
            return
        source.link.send([source.connection, hello])

    def _on_hello(self, source: _Source, theirs: PeerHello, now_s: float) -> None:
        if source.state is not SourceState.GREETING:
            self._machine.outbox.drops["hello_twice"] += 1
            return
        if theirs.epoch != source.address.epoch:
            self._over(source, "it was restarted", now_s)
            return
        ours = self._hello(source.address.epoch)
        reason = "no worker is attached here" if ours is None else mismatch(ours, theirs)
        if reason is not None:
            self._lose(source, reason, now_s)
            return
        source.state, source.since_s, source.agent = SourceState.READY, now_s, theirs.agent_name
        if self._two_sided is not None:
            self._two_sided.accept_source(source.agent)
        log.info("source %s connected, epoch %d", theirs.agent_name, theirs.epoch)
        self._machine.receiver.source_ready(source.address, now_s)

    def _lose(self, source: _Source, reason: str, now_s: float) -> None:
        """Not reachable, but perhaps alive. A new connection asks for what is in quarantine."""
        log.warning("source %s lost: %s", source.address.endpoint, reason)
        self._leave(source)
        receiver = self._machine.receiver
        receiver.source_lost(source.address, f"source lost: {reason}", now_s)
        if not receiver.uses(source.address):
            self._forget(source)
            return
        self._unwatch(source.link)
        source.link.close()
        source.link, source.connection = self._new_link(source.address), _new_connection()
        source.state, source.since_s, source.sent_at_s = SourceState.GREETING, now_s, now_s
        self._greet(source, now_s)

    def _over(self, source: _Source, reason: str, now_s: float) -> None:
        """That incarnation has ended. What it had already sent may still be landing."""
        log.warning("source %s is over: %s", source.address.endpoint, reason)
        self._leave(source)
        self._machine.receiver.source_lost(source.address, f"source lost: {reason}", now_s)
        source.state, source.since_s = SourceState.SETTLING, now_s

    # ------------------------------------------------------------ a mover that takes part

    def _on_note(self, source: _Source, message: MoverNote, now_s: float) -> None:
        if self._two_sided is None:
            self._machine.outbox.drops["note_unexpected"] += 1
            return
        try:
            self._two_sided.on_note(source.agent, message.note)
        except MoverError as error:
            self._lose(source, f"mover: {error}"[:1000], now_s)

    def _defer(self, source: _Source, message: PeerMessage) -> bool:
        if self._two_sided is None:
            return False
        announced, landed = self._two_sided.announced(source.agent), self._two_sided.landed(source.agent)
        return source.deferred.defer(message, announced, landed)

    def _at_rest(self, source: _Source) -> bool:
        """Whether nothing that the source has announced is on its way into this process's memory."""
        return self._two_sided is None or (
            self._two_sided.announced(source.agent) == self._two_sided.landed(source.agent)
        )

    def _follow_mover(self, now_s: float) -> None:
        if self._two_sided is None:
            return
        faults = dict(self._two_sided.faults())
        for source in list(self._sources.values()):
            if source.state is SourceState.READY and source.agent in faults:
                self._lose(source, f"mover: {faults[source.agent]}"[:1000], now_s)
                continue
            for message in source.deferred.take_due(self._two_sided.landed(source.agent)):
                self._machine.on_source(source.address, message, now_s)

    def _leave(self, source: _Source) -> None:
        """Ends a source's connection. Messages that are still deferred end with it."""
        source.deferred.clear()
        if self._two_sided is not None:
            self._two_sided.leave_source(source.agent)

    def _forget(self, source: _Source) -> None:
        self._leave(source)
        del self._sources[source.address]
        self._unwatch(source.link)
        source.link.close()
        source.probe.close()


def _new_connection() -> PeerConnection:
    return PeerConnection(secrets.randbelow(2**63 - 1) + 1)
