"""The codecs of this package's two boundaries, with the largest frame each accepts."""

from kvtransfer.codec import Codec
from kvtransfer.messages import Command, Event
from kvtransfer.peer_messages import PeerMessage

WORKER_COMMANDS: Codec[Command] = Codec(Command, 64 << 20)
WORKER_EVENTS: Codec[Event] = Codec(Event, 64 << 20)
PEER_MESSAGES: Codec[PeerMessage] = Codec(PeerMessage, 8 << 20, sealed=True)
"""Sealed, since a grant with another number in it is leave to write where something else lies."""
