"""Every exception this package raises on purpose, as one tree below `BatonTransferError`.

What a peer or a worker sends can never raise out of the process: it is dropped and counted. These are
for callers (bad configuration, a process that cannot be reached) and for broken invariants.
"""


class BatonTransferError(Exception):
    """Base of everything below."""


class TransferConfigError(BatonTransferError):
    """A setting cannot work; the message names it and says what is allowed."""


class ProtocolError(BatonTransferError):
    """A frame that is not what this version of the protocol allows."""


class VersionMismatch(ProtocolError):
    """The other side speaks another version of the framing."""


class AttachError(BatonTransferError):
    """A worker could not be attached to its transfer process (refused, or out of time)."""


class SlotError(BatonTransferError):
    """The staging buffer's bookkeeping was asked for something that cannot be."""


class IllegalTransition(SlotError):
    """A state was left in a way that its table of legal moves does not have."""


class MoverError(BatonTransferError):
    """A mover could not register, prepare, post or finish something."""


class MoverUnavailable(MoverError, TransferConfigError):
    """The mover that was asked for cannot work here."""


class PeerLostError(MoverError):
    """The mover's connection to a peer is gone for good; nothing more will be moved to it."""


class MoverBroken(BatonTransferError):
    """The device has failed, or does not finish what was started, and only the end of this process surely
    stops it. Not a MoverError: the process must end; whoever supervises it starts the next."""
