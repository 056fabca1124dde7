"""A transfer client and a rank's copier that only note what they are asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.messages import Segment, SlotUse, TransferAddress
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun


@dataclass
class FakeClient:
    opened: list[int] = field(default_factory=list)
    asked: list[tuple[int, str, int]] = field(default_factory=list)
    """Transfer, source's endpoint and number of heads."""
    committed: list[int] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    given_back: list[SlotUse] = field(default_factory=list)
    ready: bool = True
    checksum: bool = False

    def open_send(self, transfer_id: int, deadline_s: float) -> None:
        self.opened.append(transfer_id)

    def send_ready(self, transfer_id: int) -> None: ...

    def open_receive(
        self, transfer_id: int, source: TransferAddress, start: int, end: int, deadline_s: float, heads: int
    ) -> None:
        self.asked.append((transfer_id, source.endpoint, heads))

    def filled(self, transfer_id: int, segments: list[Segment]) -> None: ...

    def freed(self, slots: list[SlotUse]) -> None:
        self.given_back += slots

    def commit(self, transfer_id: int) -> None:
        self.committed.append(transfer_id)

    def abort(self, transfer_id: int, reason: str) -> None:
        self.aborted.append(transfer_id)


@dataclass(frozen=True)
class Made:
    start_token: int
    token_count: int
    slot: int
    heads: range


@dataclass
class FakeCopier:
    made: list[Made] = field(default_factory=list)

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        self.made += [Made(run.start_token, run.token_count, run.slot, run.heads) for run in runs]
        return Copy([64] * len(runs))

    unpack = pack

    def passed_step(self) -> int:
        return 0

    def fence(self, copy: Copy) -> None: ...
