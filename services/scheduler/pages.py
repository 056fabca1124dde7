"""The page pool: which page of the KV pool is free, in use, or a reusable prefix. Pure bookkeeping.

A page is *used* while at least one sequence holds it, *cached* when nobody does but its content is a
known prefix, *free* otherwise. Cached pages are evicted, least recently used first, when free ones run
out. `free + cached + used == total` after every call.

Prefixes are found by a chain of SHA-256 digests, one for each full page: digest(page i) =
SHA-256(digest(page i - 1) || tokens of page i), rooted in the tenant's salt, so that neither a collision
nor a guess lets one tenant see another's prefixes. The idea of hashing page by page is vLLM's automatic
prefix caching; the salt answers CVE-2025-46570.

Steps read and write pages on the device after the host has gone on. The pool knows them by number, in the
order in which the device runs them: it remembers the newest step that may still use a page which nobody holds
any more (`free_after`), and the step that computes a page which is found as a prefix (`computed_by`).
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import sha256

from services.scheduler.errors import OutOfPages, PageAccountingError


@dataclass(frozen=True, slots=True)
class PageCounts:
    total: int
    free: int
    cached: int
    used: int


def chain_root(salt: bytes) -> bytes:
    return sha256(b"baton prefix chain\0" + salt).digest()


def chain_digest(parent: bytes, tokens: Seq[int]) -> bytes:
    """The digest of one full page of `tokens` that follows the prefix known by `parent`."""
    return sha256(parent + array("q", tokens).tobytes()).digest()


class PagePool:
    """Hands out page numbers `0 .. total - 1`. Every page returned by `allocate`, `share` or
    `match_prefix` is owed one `release`."""

    def __init__(self, total: int, page_size_tokens: int, prefix_cache: bool = True) -> None:
        self.total = total
        self.page_size_tokens = page_size_tokens
        self.prefix_cache = prefix_cache
        self.step = 0
        """The number of the newest step, or copy of pages, that was queued on the device."""
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._used_by = [0] * total
        """The newest step that was queued when the page's last holder let go of it."""
        self._computed_by = [0] * total
        """Of a published page."""
        self._digest: list[bytes | None] = [None] * total
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._idle)

    def counts(self) -> PageCounts:
        free, cached = len(self._free), len(self._idle)
        return PageCounts(self.total, free, cached, self.total - free - cached)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size_tokens)

    def can_allocate(self, pages: int) -> bool:
        return pages <= self.available

    def allocate(self, pages: int) -> list[int]:
        if not self.can_allocate(pages):
            raise OutOfPages(f"{pages} pages asked, {self.available} available of {self.total}")
        return [self._take() for _ in range(pages)]

    def share(self, pages: Seq[int]) -> None:
        """One more holder for each of these pages, which must be in use."""
        for page in pages:
            if self._holders[page] == 0:
                raise PageAccountingError(f"page {page} shared while nobody holds it")
            self._holders[page] += 1

    def release(self, pages: Seq[int]) -> None:
        """One holder less. The tail goes first, so that eviction shortens prefixes from their end."""
        for page in reversed(pages):
            if self._holders[page] == 0:
                raise PageAccountingError(f"page {page} released while nobody holds it")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._used_by[page] = self.step
                if self._digest[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def match_prefix(self, salt: bytes, tokens: Seq[int], limit_tokens: int) -> list[int]:
        """The longest known run of full pages at the head of `tokens`, at most `limit_tokens` long."""
        if not self.prefix_cache:
            return []
        size = self.page_size_tokens
        self.prefix_queries_tokens += len(tokens)
        found: list[int] = []
        digest = chain_root(salt)
        for start in range(0, min(limit_tokens, len(tokens)) // size * size, size):
            digest = chain_digest(digest, tokens[start : start + size])
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        for page in found:
            self._idle.pop(page, None)
            self._holders[page] += 1
        self.prefix_hits_tokens += len(found) * size
        return found

    def free_after(self, pages: Seq[int]) -> int:
        """The number of the newest step that may still use one of these pages, just allocated, for those who
        held them before; 0: none. Whoever writes them beside the steps waits for it."""
        return max((self._used_by[page] for page in pages), default=0)

    def computed_by(self, page: int) -> int:
        """The number of the step that computes a page which was found as a prefix."""
        return self._computed_by[page]

    def publish(self, page: int, digest: bytes, step: int) -> None:
        """The held `page` holds the KV that `digest` names once `step` is done. The first page with a content
        keeps it."""
        if self._holders[page] == 0:
            raise PageAccountingError(f"page {page} published while nobody holds it")
        if self.prefix_cache and self._digest[page] is None and digest not in self._page_of:
            self._digest[page] = digest
            self._page_of[digest] = page
            self._computed_by[page] = step

    def forget(self, digests: Seq[bytes]) -> list[int]:
        """Pages are not found by these contents any more. Returns the pages that were, held or not."""
        pages = [self._page_of.pop(digest) for digest in digests if digest in self._page_of]
        for page in pages:
            self._digest[page] = None
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)
        return pages

    def forget_prefixes(self) -> None:
        """No page is found by its content any more: what was published may not be what is in the pages."""
        self._page_of.clear()
        self._digest = [None] * self.total
        self._free += self._idle
        self._idle.clear()

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            digest = self._digest[page]
            if digest is not None:
                del self._page_of[digest]
                self._digest[page] = None
        self._holders[page] = 1
        return page
