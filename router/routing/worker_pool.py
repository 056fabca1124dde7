"""The router's workers, which come and go while requests run: a client and a load record for each.

1. Those that the command line names are there from the start and stay.
2. `look` takes what a list names now (discovery.py): a new worker gets a client, which connects, and work as
   soon as it is ready. One that is named no more is leaving: `candidates` leaves it out, what it has goes on.
3. `release` closes the client of a leaving one once nothing runs there.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

from router.config import RouterConfig
from router.routing.attempt import Attempt
from router.routing.candidates import candidates
from router.routing.load import LoadTracker
from router.routing.membership import Membership
from router.routing.policy import Candidate, Pairing, place, place_decode, spare
from router.routing.prefix_index import PrefixIndex, prefix_blocks
from router.routing.routed_request import Branch
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

    # -- who is there

    def look(self, listed: Iterable[str]) -> None:
        """Takes what lists name now, beside the workers of the command line."""
        endpoints = dict.fromkeys([*self._config.workers, *listed])
        self._complained &= endpoints.keys()
        before = self._membership.leaving
        for endpoint in self._membership.look(endpoints.keys()):
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
        """Parts with the leaving workers that are not `busy`."""
        seated = {endpoint for endpoint in self.leaving if not self.worker_loads.of[endpoint].empty}
        for endpoint in self._membership.release(seated.union(busy)):
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

    # -- who gets work

    def blocks(self, work: SequenceRequest) -> Sequence[int]:
        """What `candidates` and `take` know the prompt's prefixes by; nothing where there is no choice."""
        roles = [client.status.role for client in self.clients.values() if client.status is not None]
        # Log probabilities of a prompt are computed, whatever is cached.
        if len(set(roles)) == len(roles) or work.sampling.prompt_logprobs is not None:
            return ()
        return prefix_blocks(work.prompt, work.salt)

    def candidates(self, blocks: Sequence[int] = ()) -> list[Candidate]:
        leaving = self._membership.leaving
        clients: Iterable[WorkerClient] = self.clients.values()
        if leaving:
            clients = [client for client in clients if client.endpoint not in leaving]
        return candidates(clients, self.worker_loads, self._prefixes, blocks)

    def pairing(self, branch: Branch, blocks: Sequence[int]) -> Pairing | None:
        """Workers for a branch that waits for them, if there are any now."""
        candidates = spare(self.candidates(blocks), branch.avoid, branch.strict)
        attempt = branch.attempt
        tokens = len(branch.routed.work.prompt)
        if attempt is None or attempt.prefill is None:
            placement = place(candidates, tokens)
            return None if placement is None else placement.pairing
        hello = self.clients[attempt.prefill].hello
        if hello is None or hello.transfer is None:
            return None
        decode = place_decode(candidates, hello.model_digest, tokens)
        return None if decode is None else Pairing(attempt.prefill, decode.name, hello.transfer)

    def take(self, attempt: Attempt, blocks: Sequence[int], paired_anew: bool) -> None:
        """The attempt departs, or departs again with another decode worker."""
        if paired_anew:
            self.worker_loads.take_decode(attempt)
        else:
            first = attempt.prefill or attempt.decode
            self.worker_loads.take(attempt, self._prefixes.cached_tokens(first, blocks))
            self._note(first, blocks)
        if attempt.prefill is not None:
            self._note(attempt.decode, blocks)

    def _note(self, endpoint: str, blocks: Sequence[int]) -> None:
        hello = self.clients[endpoint].hello
        if blocks and hello is not None:
            self._prefixes.note(endpoint, blocks, hello.pages * hello.page_size_tokens)
