"""`baton plan MODEL_DIR`: the ledger of one worker, as a table and a picture, before anything starts."""

import shutil
import sys
from typing import cast

from deploy.settings.options import PlanSettings
from deploy.settings.planning import checked_plan, worker_config
from services.memory.render import picture, table
from services.protocol.messages import Role


def run(settings: PlanSettings) -> None:
    role = cast(Role, settings.role)
    config = worker_config(
        settings,
        name=role,
        role=role,
        listen="ipc:///plan",
        transfers=() if role == "unified" else ("ipc:///plan-transfer",) * settings.tp,
        staging_slots=settings.staging_slots,
        staging_slot_bytes=settings.staging_slot_bytes,
    )
    plan = checked_plan(config, settings.device_memory)
    ledger = plan.ledger()
    if config.tp > 1:
        print(f"each of {config.tp} ranks, on a device of its own:")
    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    print(table(ledger))
    print()
    print(picture(ledger, width, colour=sys.stdout.isatty()))
    print()
    sequences = plan.pages // plan.inputs.sequence_pages
    print(
        f"fits: {plan.pool_tokens} tokens of KV, {sequences} sequence{'s' if sequences != 1 else ''} "
        f"of {plan.inputs.max_model_len} tokens at once"
    )
