"""`baton trace`: when a request's KV was computed, packed, sent, unpacked."""

import shutil

import msgspec

from deploy.errors import UserError
from deploy.observe.trace_view import chrome_trace, text
from deploy.observe.traces import TraceUnavailable, fetch_trace
from deploy.settings.options import TraceSettings


def run(settings: TraceSettings) -> None:
    try:
        found = fetch_trace(
            settings.url, settings.request_id, settings.api_key[0] if settings.api_key else None
        )
    except TraceUnavailable as error:
        raise UserError(str(error)) from None
    print(text(found, min(shutil.get_terminal_size((100, 24)).columns, 160)))
    if settings.out is not None:
        try:
            settings.out.write_bytes(msgspec.json.encode(chrome_trace(found)))
        except OSError as error:
            raise UserError(f"--out: {settings.out} cannot be written: {error.strerror}") from None
        print(f"\n{settings.out}: for ui.perfetto.dev or chrome://tracing")
