"""What is known of each worker that can take work now, as values to choose from."""

from collections.abc import Iterable, Sequence

from router.api.parameters import RequestLimits
from router.config import RouterConfig
from router.routing.load import LoadTracker
from router.routing.policy import Candidate
from router.routing.prefix_index import PrefixIndex
from services.protocol.client import ClientState, WorkerClient


def candidates(
    clients: Iterable[WorkerClient], worker_loads: LoadTracker, prefixes: PrefixIndex, blocks: Sequence[int]
) -> list[Candidate]:
    """Workers that are connected and ready, by their last report and the router's own account; for a prompt
    of these `blocks`."""
    found: list[Candidate] = []
    for client in clients:
        endpoint, hello, status = client.endpoint, client.hello, client.status
        if client.state is not ClientState.READY or hello is None or status is None:
            continue
        if status.state != "ready":
            continue
        worker_load = worker_loads.of[endpoint]
        found.append(
            Candidate(
                name=endpoint,
                role=status.role,
                model_digest=hello.model_digest,
                transfer=hello.transfer,
                page_size_tokens=hello.page_size_tokens,
                pages=hello.pages,
                reported_queued=status.queued,
                reported_running=status.running,
                reported_used_pages=status.pages.used,
                queued_tokens=worker_load.queued_tokens,
                live_tokens=worker_load.live_tokens,
                uncached_tokens=worker_load.uncached_tokens,
                cached_tokens=prefixes.cached_tokens(endpoint, blocks),
                last_assigned=worker_load.last_assigned,
            )
        )
    return found


def common_limits(clients: Iterable[WorkerClient], config: RouterConfig) -> RequestLimits | None:
    """What every connected worker can take; None while there is none."""
    hellos = [client.hello for client in clients if client.hello is not None]
    if not hellos:
        return None
    return RequestLimits(
        vocab_size=min(hello.vocab_size for hello in hellos),
        max_model_len=min(hello.max_model_len for hello in hellos),
        max_sequence_tokens=min(hello.max_sequence_tokens for hello in hellos),
        max_choices=config.max_choices,
        max_prompts=config.max_prompts,
        max_total_choices=config.max_total_choices,
    )
