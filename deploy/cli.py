"""The console script `baton`: parses, resolves settings, and hands over to one file in commands/.

Heavy modules (torch, fastapi) are imported by the commands that run them, never by this one: `--help`
and `version` answer at once.
"""

import errno
import os
import sys
from collections.abc import Sequence

import typer

from deploy.bench.load.options import BenchLayoutsSettings, BenchPdSettings, BenchServeSettings
from deploy.commands import (
    bench_engine,
    bench_layouts,
    bench_pd,
    bench_serve,
    keys,
    memory,
    plan,
    router,
    scale,
    serve,
    trace,
    transfer,
    version,
    worker,
)
from deploy.errors import UserError
from deploy.launcher.streams import open_standard_streams
from deploy.settings.options import (
    BenchEngineSettings,
    KeysSettings,
    MemorySettings,
    PlanSettings,
    RouterSettings,
    ScaleSettings,
    ServeSettings,
    TraceSettings,
    TransferSettings,
    VersionSettings,
    WorkerSettings,
)
from deploy.settings.schema import register

USAGE_ERROR = 2
INTERRUPTED = 130
_UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EIO)

app = typer.Typer(
    name="baton",
    help="Serves large language models with prefill and decode on separate worker processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
register(app, "serve", ServeSettings, serve.run)
register(app, "scale", ScaleSettings, scale.run)
register(app, "plan", PlanSettings, plan.run)
register(app, "memory", MemorySettings, memory.run)
register(app, "trace", TraceSettings, trace.run)
register(app, "router", RouterSettings, router.run)
register(app, "worker", WorkerSettings, worker.run)
register(app, "transfer", TransferSettings, transfer.run)
register(app, "keys", KeysSettings, keys.run)
register(app, "version", VersionSettings, version.run)

bench = typer.Typer(help="Measure this machine, and what is served.", no_args_is_help=True)
register(bench, "engine", BenchEngineSettings, bench_engine.run)
register(bench, "serve", BenchServeSettings, bench_serve.run)
register(bench, "pd", BenchPdSettings, bench_pd.run)
register(bench, "layouts", BenchLayoutsSettings, bench_layouts.run)
app.add_typer(bench, name="bench")

_USAGE_EXCEPTION = typer.BadParameter.__mro__[2]
"""The parser's base of all usage errors; where it lives depends on typer's version."""


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line. Whatever the user can put right is one line on stderr and code 2."""
    try:
        parsed = app(list(arguments), prog_name="baton", standalone_mode=False)
        if callable(parsed):
            parsed()
    except UserError as error:
        return _refuse(str(error))
    except typer.Exit as ending:
        return ending.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, _USAGE_EXCEPTION):
            raise
        message = getattr(error, "format_message", error.__str__)()
        return _refuse(" ".join(message.split())) if message else USAGE_ERROR
    return parsed if isinstance(parsed, int) else 0


def main() -> None:
    open_standard_streams()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Whoever read our output has seen enough (`| head`).
        is_seen = isinstance(error, BrokenPipeError)
        code = 0 if is_seen else _refuse(f"what was to be printed cannot be written: {error.strerror}")
    sys.exit(code)


def _refuse(message: str) -> int:
    print(f"baton: error: {message}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    main()
