"""CURVE keys for `tcp://` edges: one secret key of this process, and a directory of allowed public keys.

    key_dir/            mode 0700
      NAME.key_secret   the own pair; exactly one such file
      allowed/*.key     public keys of those that may connect here, and that are connected to

A server's endpoint names its key as a fragment (`tcp://10.0.0.2:7001#NAME`), which the connecting side looks
up in its own allow-list: an address can thus choose among trusted keys, never bring one along. Without a
fragment the connecting side's own name is taken, so one pair copied to every host is enough to begin with.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq.auth

from kvtransfer.errors import TransferConfigError


def require_private_directory(directory: Path, what: str) -> None:
    """Raises TransferConfigError unless `directory` is ours and closed to everybody else (mode 0700)."""
    try:
        status = directory.stat()
    except OSError as error:
        raise TransferConfigError(f"{what}: the directory {directory} cannot be used: {error}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise TransferConfigError(f"{what}: {directory} is not a directory")
    if status.st_uid != os.getuid():
        raise TransferConfigError(f"{what}: the directory {directory} belongs to another user")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise TransferConfigError(f"{what}: the directory {directory} has mode {mode:o}, must have 700")


@dataclass(frozen=True, slots=True)
class ChannelKeys:
    """The own key pair (Z85) and the allow-list by name."""

    name: str
    public: bytes
    secret: bytes
    allowed_dir: Path
    allowed: tuple[tuple[str, bytes], ...]

    @classmethod
    def load(cls, key_dir: Path) -> "ChannelKeys":
        """Raises TransferConfigError where a file is missing, unreadable or open to other users."""
        require_private_directory(key_dir, "key_dir")
        secrets = sorted(key_dir.glob("*.key_secret"))
        if len(secrets) != 1:
            raise TransferConfigError(
                f"key_dir: {key_dir} must hold exactly one *.key_secret file, it holds {len(secrets)}"
            )
        allowed_dir = key_dir / "allowed"
        try:
            public, secret = zmq.auth.load_certificate(secrets[0])
            allowed = tuple(
                (path.stem, zmq.auth.load_certificate(path)[0]) for path in sorted(allowed_dir.glob("*.key"))
            )
        except (OSError, ValueError) as error:
            raise TransferConfigError(f"key_dir: a key in {key_dir} cannot be read: {error}") from error
        if secret is None:
            raise TransferConfigError(f"key_dir: {secrets[0]} holds no secret key")
        if not allowed:
            raise TransferConfigError(f"key_dir: {allowed_dir} holds no *.key file, so nobody could connect")
        return cls(secrets[0].stem, public, secret, allowed_dir, allowed)

    def server_key(self, name: str) -> bytes:
        """The public key a server called `name` must prove. Raises TransferConfigError if not allowed."""
        for allowed_name, public in self.allowed:
            if allowed_name == name:
                return public
        raise TransferConfigError(f"no key named {name!r} in {self.allowed_dir}")


def write_new_keys(key_dir: Path, name: str = "baton") -> Path:
    """Makes `key_dir` with a new pair, its public half allowed. Returns the public key's path.

    Raises TransferConfigError if a secret key is there already: replacing one silently would cut off
    every process that still uses it.
    """
    if not name.isascii() or not all(character.isalnum() or character in "-_." for character in name):
        raise TransferConfigError(f"key name: {name!r} may hold only letters, digits, '-', '_' and '.'")
    key_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private_directory(key_dir, "key_dir")
    if any(key_dir.glob("*.key_secret")):
        raise TransferConfigError(f"key_dir: {key_dir} holds a secret key already")
    allowed_dir = key_dir / "allowed"
    allowed_dir.mkdir(mode=0o700, exist_ok=True)
    public_file, secret_file = zmq.auth.create_certificates(key_dir, name)
    Path(secret_file).chmod(0o600)
    return Path(public_file).rename(allowed_dir / f"{name}.key")
