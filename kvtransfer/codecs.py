"""The codecs of this package's two boundaries, with the largest frame each accepts."""

from kvtransfer.errors import ProtocolError
from kvtransfer.messages import Command, Event
from kvtransfer.net.codec import Codec
from kvtransfer.protocol.peer_messages import PeerConnection, PeerMessage


class PeerCodec(Codec[PeerMessage]):
    """The codec between peers. Its frames are sealed, since a grant with another number in it permits a write
    where something else lies."""

    def __init__(self) -> None:
        super().__init__(PeerMessage, 8 << 20, sealed=True)

    def decode(self, frame: bytes | memoryview) -> list[PeerMessage]:
        """As `Codec.decode`. Raises ProtocolError too unless the first message, and no other, is a
        `PeerConnection`."""
        messages = super().decode(frame)
        if [at for at, message in enumerate(messages) if isinstance(message, PeerConnection)] != [0]:
            raise ProtocolError("a frame does not begin with its connection")
        return messages


WORKER_COMMANDS: Codec[Command] = Codec(Command, 64 << 20)
WORKER_EVENTS: Codec[Event] = Codec(Event, 64 << 20)
PEER_MESSAGES = PeerCodec()
