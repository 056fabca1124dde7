"""What the router is told at start, and nothing else: one frozen value, built by the command line."""

from dataclasses import dataclass
from pathlib import Path


class RouterConfigError(ValueError):
    """A setting or a file cannot work; the message names it and says what is allowed."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Sizes are in the unit their name ends with; `workers` are ZMQ endpoints (`ipc://` or `tcp://`) that
    stay, `worker_names` are `tcp+dns://` ones, which stand for as many as the name has addresses."""

    workers: tuple[str, ...]
    model_dir: Path
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one; the "ready" line says which."""
    api_keys: tuple[str, ...] = ()
    """Empty: no key is asked for."""
    keyless_probes: bool = False
    """`/ready` and `/metrics` need no key, as `/health` never does."""
    allowed_origins: tuple[str, ...] = ()
    """Of web pages that may use the server, as browsers write them; `*` alone: of any."""
    key_dir: Path | None = None
    """CURVE keys and the allow-list for `tcp://` workers."""
    workers_file: Path | None = None
    """More of them, one a line; they come and go with their lines."""
    worker_names: tuple[str, ...] = ()
    generation_config: str = "auto"
    """Where sampling defaults come from: `auto` (the model directory), `none`, or a directory or file."""
    max_body_bytes: int = 8 << 20
    max_choices: int = 16
    """`n` of one prompt."""
    max_prompts: int = 64
    """Prompts in one completions request."""
    max_total_choices: int = 128
    """`n` times prompts."""
    request_timeout_s: float = 600.0
    heartbeat_s: float = 0.5
    worker_timeout_s: float = 5.0
    """A worker that is silent for so long is lost: what runs on it goes on elsewhere."""
    drain_timeout_s: float = 30.0
    max_running: int = 4096
    """Prompts in flight; more are refused as overloaded."""
    retry_after_s: int = 1
    ttft_slo_s: float | None = None
    """Prompts whose first token is predicted to take longer are refused as overloaded."""
    max_kv_load: float | None = None
    """Prompt tokens in flight on a decode worker, in multiples of its KV pool; more are refused."""
    stall_timeout_s: float = 60.0
    """How long a client may read nothing of what is waiting for it before its connection is closed."""
    upload_timeout_s: float = 60.0
    """How long a request's head may take to arrive, and then its body."""
    keep_alive_timeout_s: float = 75.0
    """How long a connection may be idle, before its first request and after each answer."""
    max_retries: int = 3
    """How often one prompt (or one choice of it) is run again after a failure; 0: never."""
    retry_share: float = 0.2
    """Retries that every new prompt adds to what all prompts together may have ..."""
    retry_burst: int = 1024
    """... and how many of them can be saved up."""
    max_waiting: int = 1024
    """Prompts, or choices of them, that wait for a worker to come back."""

    def __post_init__(self) -> None:
        if not self.workers and not self.worker_names and self.workers_file is None:
            raise RouterConfigError("workers: at least one worker endpoint, or a workers_file, is needed")
        if self.workers_file is not None and not self.workers_file.parent.is_dir():
            raise RouterConfigError(f"workers_file: {self.workers_file.parent} is not a directory")
        if len(set(self.workers)) != len(self.workers):
            raise RouterConfigError("workers: an endpoint is given twice")
        if not 0 <= self.port <= 65535:
            raise RouterConfigError(f"port: {self.port} must be between 0 and 65535")
        if not self.served_model_name:
            raise RouterConfigError("served_model_name: must not be empty")
        if any(not key or not key.isascii() for key in self.api_keys):
            raise RouterConfigError("api_keys: a key must be non-empty ASCII")
        if not 1 <= self.max_choices <= 128:
            raise RouterConfigError(f"max_choices: {self.max_choices} must be between 1 and 128")
        counts = ("max_body_bytes", "max_prompts", "max_total_choices", "max_running", "retry_after_s")
        for name in (*counts, "max_waiting"):
            if getattr(self, name) < 1:
                raise RouterConfigError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("max_retries", "retry_share", "retry_burst"):
            if getattr(self, name) < 0:
                raise RouterConfigError(f"{name}: {getattr(self, name)} must not be negative")
        for name in ("request_timeout_s", "heartbeat_s", "worker_timeout_s"):
            if not 0 < getattr(self, name) <= 86400:
                raise RouterConfigError(f"{name}: {getattr(self, name)} must be above 0, at most 86400")
        for name in ("ttft_slo_s", "max_kv_load"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RouterConfigError(f"{name}: {value} must be above 0")
        if "*" in self.allowed_origins and len(self.allowed_origins) > 1:
            raise RouterConfigError("allowed_origins: '*' stands for all origins, and alone")
        for name in ("stall_timeout_s", "upload_timeout_s", "keep_alive_timeout_s"):
            if not 0.001 <= getattr(self, name) <= 86400:
                raise RouterConfigError(f"{name}: {getattr(self, name)} must be 0.001 to 86400")
        if self.drain_timeout_s < 0:
            raise RouterConfigError(f"drain_timeout_s: {self.drain_timeout_s} must not be negative")
