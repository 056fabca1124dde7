"""`baton memory`: the ledgers of a running system, planned and measured side by side, and each GPU's sums."""

import shutil
import sys

from deploy.errors import UserError
from deploy.observe.ledgers import LedgersUnavailable, fetch_ledgers
from deploy.settings.options import MemorySettings
from services.memory.devices import shared_devices
from services.memory.render import device_table, picture, table


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
    for device in shared_devices([(worker.name, worker.ledger) for worker in ledgers]):
        print(device_table(device))
        print()
