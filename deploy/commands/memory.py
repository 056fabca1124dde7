"""`baton memory`: the ledgers of a running system, planned and measured side by side."""

import shutil
import sys

from deploy.errors import UserError
from deploy.ledgers import LedgersUnavailable, fetch_ledgers
from deploy.options import MemorySettings
from services.memory.render import picture, table


def run(settings: MemorySettings) -> None:
    try:
        ledgers = fetch_ledgers(settings.url, settings.api_key[0] if settings.api_key else None)
    except LedgersUnavailable as error:
        raise UserError(f"--url: {error}") from None
    if not ledgers:
        raise UserError(f"--url: {settings.url} knows no worker")
    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    for worker in ledgers:
        print(f"{worker.name}")
        print(table(worker.ledger))
        print()
        print(picture(worker.ledger, width, colour=sys.stdout.isatty()))
        print()
