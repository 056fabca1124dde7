"""`baton keys DIRECTORY`: a CURVE pair for tcp:// endpoints, its public half in the allow-list."""

from deploy.errors import UserError
from deploy.settings.options import KeysSettings


def run(settings: KeysSettings) -> None:
    from kvtransfer.errors import TransferConfigError
    from kvtransfer.net.channel import write_new_keys

    try:
        public = write_new_keys(settings.directory, settings.name)
    except TransferConfigError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"DIRECTORY: {settings.directory} cannot be written: {error.strerror}") from None
    print(f"wrote a secret key to {settings.directory} and its public key to {public}")
    print("copy the directory to every host, or each host's *.key into the others' allowed/")
