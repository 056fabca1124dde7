"""The router's workers, which come and go while requests run: a client and a load record for each.

1. Workers that the command line names are there from the start and stay.
2. `update` takes what a list names now (discovery.py): a new worker gets a client, which connects, and work
   as soon as it is ready. A worker that is named no more is leaving: `candidates` leaves it out, and what it
   has goes on.
3. `release` closes the client of a leaving worker once nothing runs there.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

from router.config import RouterConfig
from router.routing.attempt import Attempt
from router.routing.limits import RequestLimits
from router.routing.load import LoadTracker
from router.routing.membership import Membership
from router.routing.policy import Candidate, Pairing, place, place_decode, spare
from router.routing.prefix_index import PrefixIndex, prefix_blocks
from services.protocol.client import ClientConfigError, ClientState, WorkerClient, load_keys
from services.protocol.messages import Request, RequestReport, SequenceRequest

logger = logging.getLogger(__name__)

OnReports = Callable[[WorkerClient, list[RequestReport]], None]
OnState = Callable[[WorkerClient, ClientState, ClientState], None]


class WorkerPool:
    """`on_reports` and `on_state` are the clients' (services/protocol/client.py)."""

    def __init__(
        self, config: RouterConfig, router_epoch: int, on_reports: OnReports, on_state: OnState
    ) -> None:
        """Raises ClientConfigError for keys that cannot be read."""
        self._config, self._epoch = config, router_epoch
        self._on_reports, self._on_state = on_reports, on_state
        self._keys = load_keys(config.key_dir)
        self._prefixes = PrefixIndex()
        self._membership = Membership(config.workers)
        self._complained: set[str] = set()
        self.worker_loads = LoadTracker(config.workers)
        self.clients = {endpoint: self._client(endpoint) for endpoint in config.workers}

    def _client(self, endpoint: str) -> WorkerClient:
        return WorkerClient(
            endpoint,
            router_epoch=self._epoch,
            on_reports=self._on_reports,
            on_state=self._on_client_state,
            keys=self._keys,
            heartbeat_s=self._config.heartbeat_s,
            timeout_s=self._config.worker_timeout_s,
        )

    def _on_client_state(self, client: WorkerClient, old: ClientState, new: ClientState) -> None:
        if old is ClientState.READY:
            self._prefixes.forget(client.endpoint)
        self._on_state(client, old, new)

    def start(self) -> None:
        """Connects to every worker, in the running loop. Raises ClientConfigError."""
        for client in self.clients.values():
            client.start()

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    # ------------------------------------------------------------ which workers there are

    def update(self, listed: Iterable[str]) -> None:
        """Takes what lists name now, beside the workers of the command line."""
        endpoints = dict.fromkeys([*self._config.workers, *listed])
        self._complained &= endpoints.keys()
        before = self._membership.leaving
        for endpoint in self._membership.update(endpoints.keys()):
            self._join(endpoint)
        for endpoint in self._membership.leaving - before:
            logger.info("worker %s: leaving", endpoint)
        for endpoint in before - self._membership.leaving:
            logger.info("worker %s: stays", endpoint)

    def _join(self, endpoint: str) -> None:
        client = self._client(endpoint)
        try:
            client.start()
        except ClientConfigError as error:
            self._membership.forget(endpoint)  # as long as it is listed it is tried again
            if endpoint not in self._complained:
                self._complained.add(endpoint)
                logger.warning("a listed worker is left out: %s", error)
            return
        logger.info("worker %s: joins", endpoint)
        self.clients[endpoint] = client
        self.worker_loads.add(endpoint)

    @property
    def leaving(self) -> frozenset[str]:
        return self._membership.leaving

    def release(self, busy: Iterable[str]) -> None:
        """Parts with the leaving workers that have no work and are not `busy`."""
        loaded = {endpoint for endpoint in self.leaving if not self.worker_loads.of[endpoint].empty}
        for endpoint in self._membership.release(loaded.union(busy)):
            client = self.clients.pop(endpoint)
            client.close()
            self.worker_loads.remove(endpoint)
            logger.info("worker %s: has left", endpoint)

    def name_of(self, endpoint: str) -> str:
        """What the worker calls itself; its endpoint where it has not said so."""
        client = self.clients.get(endpoint)
        return endpoint if client is None or client.hello is None else client.hello.name

    def send(self, endpoint: str, messages: list[Request]) -> bool:
        """False: the worker cannot be written to, or has left."""
        client = self.clients.get(endpoint)
        return client is not None and client.send(messages)

    def limits(self) -> RequestLimits | None:
        """What every connected worker can take; None while there is none."""
        hellos = [client.hello for client in self.clients.values() if client.hello is not None]
        if not hellos:
            return None
        return RequestLimits(
            vocab_size=min(hello.vocab_size for hello in hellos),
            max_model_len=min(hello.max_model_len for hello in hellos),
            max_sequence_tokens=min(hello.max_sequence_tokens for hello in hellos),
            max_choices=self._config.max_choices,
            max_prompts=self._config.max_prompts,
            max_total_choices=self._config.max_total_choices,
        )

    # ------------------------------------------------------------ which workers get work

    def blocks(self, work: SequenceRequest) -> Sequence[int]:
        """The prompt's prefixes, as `candidates` and `assign` know them; none where there is no choice."""
        roles = [client.status.role for client in self.clients.values() if client.status is not None]
        # Log probabilities of a prompt are computed, whatever is cached.
        if len(set(roles)) == len(roles) or work.sampling.prompt_logprobs is not None:
            return ()
        return prefix_blocks(work.prompt, work.salt)

    def candidates(self, blocks: Sequence[int] = ()) -> list[Candidate]:
        """Workers that are connected, ready and not leaving, by their last report and the router's own
        account; for a prompt of these `blocks`."""
        leaving = self._membership.leaving
        found: list[Candidate] = []
        for endpoint, client in self.clients.items():
            hello, status = client.hello, client.status
            if client.state is not ClientState.READY or hello is None or status is None:
                continue
            if status.state != "ready" or endpoint in leaving:
                continue
            worker_load = self.worker_loads.of[endpoint]
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
                    cached_tokens=self._prefixes.cached_tokens(endpoint, blocks),
                    last_assigned=worker_load.last_assigned,
                )
            )
        return found

    def pairing(self, attempt: Attempt, prompt_tokens: int, blocks: Sequence[int]) -> Pairing | None:
        """Workers for an attempt that waits for them, if there are any now."""
        strict = attempt.wait is not None and attempt.wait.strict
        candidates = spare(self.candidates(blocks), attempt.avoid, strict)
        if attempt.prefill is None:
            placement = place(candidates, prompt_tokens)
            return None if placement is None else placement.pairing
        hello = self.clients[attempt.prefill].hello
        if hello is None or hello.transfer is None:
            return None
        decode = place_decode(candidates, hello.model_digest, prompt_tokens)
        return None if decode is None else Pairing(attempt.prefill, decode.name, hello.transfer)

    def assign(self, attempt: Attempt, blocks: Sequence[int], paired_anew: bool) -> None:
        """Accounts for an attempt that starts, or that goes on with another decode worker."""
        if paired_anew:
            self.worker_loads.assign_decode(attempt)
        else:
            first = attempt.prefill or attempt.decode
            self.worker_loads.assign(attempt, self._prefixes.cached_tokens(first, blocks))
            self._note(first, blocks)
        if attempt.prefill is not None:
            self._note(attempt.decode, blocks)

    def _note(self, endpoint: str, blocks: Sequence[int]) -> None:
        hello = self.clients[endpoint].hello
        if blocks and hello is not None:
            self._prefixes.note(endpoint, blocks, hello.pages * hello.page_size_tokens)
