"""The exceptions of this package, as one tree below `BatonTransferError`.

They are for callers (bad configuration, a process that cannot be reached) and for broken invariants. Nothing
that a peer or a worker sends raises out of the transfer process: it is dropped and counted.
"""


class BatonTransferError(Exception):
    """Base of everything below."""


class TransferConfigError(BatonTransferError):
    """A setting that cannot work. The message names the setting and what is allowed."""


class ProtocolError(BatonTransferError):
    """A frame that is not what this version of the protocol allows."""


class VersionMismatch(ProtocolError):
    """The other side speaks another version of the framing."""


class AttachError(BatonTransferError):
    """A worker that could not attach to its transfer process: refused, or out of time."""


class SlotError(BatonTransferError):
    """A call that the slot pool's bookkeeping does not allow."""


class IllegalTransition(SlotError):
    """A change of state that the state machine's `TRANSITIONS` do not have."""


class MoverError(BatonTransferError):
    """A mover could not register, prepare, post or finish something."""


class MoverUnavailable(MoverError, TransferConfigError):
    """The mover that was asked for cannot work here."""


class PeerLostError(MoverError):
    """The mover's connection to a peer is gone for good; nothing more will be moved to it."""


class MoverBroken(BatonTransferError):
    """The device has failed, or does not finish what was started. Only the end of this process surely stops
    that, so this is no MoverError: the process must end, and its supervisor starts the next."""
