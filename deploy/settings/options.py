"""The settings of every command, in the spelling of the field. Defaults marked "auto" depend on the device
and are filled in by planning.py."""

from dataclasses import dataclass
from pathlib import Path

from deploy.settings.schema import required, setting
from deploy.settings.values import (
    above_zero,
    choice,
    endpoint,
    flag,
    fraction,
    integer,
    number,
    origins,
    parse_api_key,
    path,
    power_of_two,
    seconds,
    slot_bytes,
    text,
    worker_endpoint,
)
from kvtransfer.movers.registry import mover_choices
from services.memory.sizes import parse_bytes

_port = integer(0, 65535)
_count = integer(0, 64)
_movers = mover_choices()
_SLO_ITL = (
    "Most ms between two tokens, for which prompts are cut to smaller chunks where others decode; "
    "0: no limit. (default: 25 on cuda, 0 on cpu)"
)
BENCH_GROUPS = ("ready", "decode", "prefill", "offline", "trace")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a worker's engine and its ledger depend on."""

    model_dir: Path = required(path, "Model directory: config.json, tokenizer, safetensors.", positional=True)
    device: str = setting("auto", choice("auto", "cpu", "cuda"), "auto takes a GPU where there is one.")
    dtype: str = setting(
        "auto", choice("auto", "float32", "bfloat16", "float16"), "auto: bfloat16 on cuda, float32 on cpu."
    )
    kv_dtype: str = setting(
        "auto",
        choice("auto", "fp8"),
        "What the KV cache is kept in. auto: --dtype; fp8: e4m3, half of bfloat16.",
        "--kv-cache-dtype",
    )
    quantization: str = setting(
        "none", choice("none", "fp8"), "fp8: linear layers with e4m3 weights and activations."
    )
    load_format: str = setting("auto", choice("auto", "dummy"), "dummy: random weights of the real shape.")
    mem_fraction: float | None = setting(
        None, fraction, "Share of the device for weights and KV pool. (default: 0.85 on cuda, 0.6 on cpu)"
    )
    device_memory: int | None = setting(
        None,
        parse_bytes,
        "Size of the device, like 2GiB. (default: the GPU's own; 2GiB for each worker on cpu)",
    )
    max_model_len: int = setting(
        0, integer(0, 1 << 24), "Longest sequence in tokens; 0 takes the model's own limit."
    )
    page_size: int | None = setting(
        None, power_of_two(1, 1024), "Tokens in one KV page. (default: 64 on cuda, 16 on cpu)"
    )
    max_batch: int | None = setting(
        None, integer(1, 4096), "Sequences in one decode step. (default: 256 on cuda, 64 on cpu)"
    )
    max_chunk_tokens: int | None = setting(
        None, integer(16, 1 << 17), "Tokens in one forward pass. (default: 2048 on cuda, 512 on cpu)"
    )
    tail_chunk_tokens: int = setting(
        512, integer(0, 1 << 17), "A long prompt's last chunk on a prefill worker; 0 leaves it as it comes."
    )
    tp: int = setting(1, integer(1, 64), "Ranks of one worker, each with a device.", "--tensor-parallel-size")


@dataclass(frozen=True, kw_only=True)
class StagingSettings:
    """The staging buffer, which lies outside the memory fraction."""

    staging_slots: int = setting(32, integer(2, 4096), "Slots of the staging buffer.")
    staging_slot_bytes: int | None = setting(
        None, slot_bytes, "Size of one slot, a multiple of 256. (default: 8MiB on cuda, 1MiB on cpu)"
    )


@dataclass(frozen=True, kw_only=True)
class MoverSettings:
    mover: str = setting("auto", choice(*_movers), f"What moves KV between processes: {', '.join(_movers)}.")
    checksum: bool = setting(False, flag, "Checksum every segment of moved KV.", switch=True)
    transfer_timeout: float = setting(
        60.0, seconds(1, 86400), "Seconds that an offered transfer, or one write of it, may take."
    )
    peer_timeout: float = setting(
        5.0, seconds(1, 3600), "Seconds of silence after which another transfer process is lost."
    )


@dataclass(frozen=True, kw_only=True)
class ChildSettings:
    """What the launcher gives to every child."""

    run_dir: Path | None = setting(None, path, "Directory to leave empty behind us.", internal=True)
    parent_pid: int | None = setting(None, integer(1, 1 << 31), "Launcher to end with.", internal=True)


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    host: str = setting("127.0.0.1", text, "Address that HTTP listens on; 0.0.0.0 for all.")
    port: int = setting(8000, _port, "Port that HTTP listens on; 0 takes a free one.")
    served_model_name: str | None = setting(
        None, text, "Name of the model in the API. (default: the directory's name)"
    )
    api_key: tuple[str, ...] = setting(
        (), parse_api_key, "Bearer key that clients must send; repeatable.", many=True
    )
    api_key_file: Path | None = setting(None, path, "File with more such keys, one a line.")
    generation_config: str = setting(
        "auto", text, "Sampling defaults: auto (the model's generation_config.json), none, or a path."
    )
    keyless_probes: bool = setting(
        False, flag, "/ready and /metrics need no key, as /health never does.", switch=True
    )
    allowed_origins: tuple[str, ...] = setting(
        (), origins, "Origin of web pages that may use the API, like https://host:port, or *; repeatable.",
        many=True,
    )  # fmt: skip
    request_timeout: float = setting(600.0, seconds(1, 86400), "Seconds that one request may take.")
    max_body_bytes: int = setting(8 << 20, parse_bytes, "Largest request body, like 8MiB.")
    max_choices: int = setting(16, integer(1, 128), "Most choices (`n`) of one prompt.")
    max_prompts: int = setting(64, integer(1, 1 << 16), "Most prompts in one completions request.")
    max_total_choices: int = setting(128, integer(1, 1 << 16), "Most prompts times `n` in one request.")
    max_running: int = setting(4096, integer(1, 1 << 20), "Prompts in flight; more are refused with 429.")
    worker_timeout: float = setting(
        5.0, seconds(0.1, 3600), "Seconds of silence that lose a worker; what it ran goes on elsewhere."
    )
    max_retries: int = setting(
        3, integer(0, 100), "How often one prompt may lose its workers and be run again; 0: never."
    )
    ttft_slo: float | None = setting(
        None, seconds(0.001, 86400), "Predicted seconds to a first token above which prompts get 429."
    )
    max_kv_load: float | None = setting(
        None, above_zero, "Prompt tokens in flight per token of a decode worker's KV pool; more get 429."
    )
    stall_timeout: float = setting(
        60.0, seconds(1, 86400), "Seconds that a client may read nothing before it is cut off."
    )
    upload_timeout: float = setting(
        60.0, seconds(1, 86400), "Seconds that a request's head, and then its body, may take to arrive."
    )
    keep_alive_timeout: float = setting(
        75.0,
        seconds(1, 86400),
        "Seconds that a connection may be idle before it is closed.",
        "--timeout-keep-alive",
    )


@dataclass(frozen=True, kw_only=True)
class ServeSettings(HttpSettings, StagingSettings, MoverSettings, EngineSettings):
    """Serve a model on this host: a router, workers and their transfer processes."""

    prefill: int | None = setting(None, _count, "Prefill workers. (default: 1, or 0 with --unified)")
    decode: int | None = setting(None, _count, "Decode workers. (default: 1, or 0 with --unified)")
    unified: int = setting(0, _count, "Workers that do both.")
    prefill_tp: int | None = setting(None, integer(1, 64), "Ranks of a prefill worker. (default: --tp)")
    decode_tp: int | None = setting(None, integer(1, 64), "Ranks of a decode worker. (default: --tp)")
    prefix_cache: bool = setting(True, flag, "Reuse the KV of common prefixes.", switch=True)
    drain_timeout: float = setting(30.0, seconds(0, 3600), "Seconds that running requests get at the end.")
    slo_itl_ms: float | None = setting(None, number(0, 1e9), _SLO_ITL)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(StagingSettings, EngineSettings):
    """Print the memory ledger of one worker before anything starts."""

    role: str = setting("prefill", choice("prefill", "decode", "unified"), "unified has no staging buffer.")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(ChildSettings, StagingSettings, EngineSettings):
    """Run one worker."""

    role: str = required(
        choice("prefill", "decode", "unified"), "What the worker does: prefill, decode or unified."
    )
    listen: str = required(endpoint, "Endpoint for routers: ipc:///path or tcp://host:port.")
    transfer: tuple[str, ...] = setting(
        (), endpoint, "Endpoint of a rank's transfer process; once for each rank, in order.", many=True
    )
    name: str | None = setting(None, text, "Name in logs and metrics. (default: the role)")
    device_index: int = setting(0, integer(0, 1023), "Which GPU; with --tp, the first of them.")
    max_queue: int = setting(1024, integer(1, 1 << 20), "Requests waiting; more are refused.")
    slo_itl_ms: float | None = setting(None, number(0, 1e9), _SLO_ITL)
    prefix_cache: bool = setting(True, flag, "Reuse the KV of common prefixes.", switch=True)
    key_dir: Path | None = setting(None, path, "CURVE keys for tcp:// endpoints.")
    drain_timeout: float = setting(30.0, seconds(0, 3600), "Seconds that running requests get at the end.")


@dataclass(frozen=True, kw_only=True)
class TransferSettings(ChildSettings, StagingSettings, MoverSettings):
    """Run the transfer process of one worker."""

    listen: str = required(endpoint, "Endpoint for the worker: ipc:///path.")
    peer_listen: str = required(endpoint, "Endpoint for other transfer processes.")
    staging_socket: Path = required(path, "UNIX socket that hands the staging buffer to the worker.")
    advertise: str | None = setting(
        None, endpoint, "Endpoint that others reach us by. (default: what --peer-listen says)"
    )
    name: str = setting("transfer", text, "Name in logs.")
    device: str = setting("auto", choice("auto", "cpu", "cuda"), "Where the staging buffer lies.")
    device_index: int = setting(0, integer(0, 1023), "Which GPU.")
    key_dir: Path | None = setting(None, path, "CURVE keys for tcp:// endpoints.")


@dataclass(frozen=True, kw_only=True)
class RouterSettings(ChildSettings, HttpSettings):
    """Run the router: the HTTP API in front of workers."""

    model_dir: Path = required(path, "Model directory: tokenizer and config.json.", positional=True)
    worker: tuple[str, ...] = setting(
        (), worker_endpoint, "Endpoint of a worker, or tcp+dns://name:port for many; repeatable.", many=True
    )
    workers_file: Path | None = setting(
        None, path, "File with more, one a line; looked at twice a second, so that workers come and go."
    )
    key_dir: Path | None = setting(None, path, "CURVE keys for tcp:// endpoints.")
    drain_timeout: float = setting(30.0, seconds(0, 3600), "Seconds that running requests get at the end.")


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """Start or drain workers of a running `baton serve` on this host."""

    prefill: int | None = setting(None, _count, "Prefill workers there are to be. (default: as many as now)")
    decode: int | None = setting(None, _count, "Decode workers there are to be. (default: as many as now)")
    unified: int | None = setting(None, _count, "Unified workers there are to be. (default: as many as now)")
    port: int = setting(8000, integer(1, 65535), "Port of its router, to find it by.")
    run_dir: Path | None = setting(None, path, "Its run directory, in place of the port.")


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Print the memory ledgers of a running system: planned, measured and their difference."""

    url: str = setting("http://127.0.0.1:8000", text, "Where the router listens.")
    api_key: tuple[str, ...] = setting((), parse_api_key, "Bearer key, if the router wants one.", many=True)


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """Print when a request's KV was computed, packed, sent and unpacked."""

    request_id: str = required(text, "The request's x-request-id.", positional=True)
    url: str = setting("http://127.0.0.1:8000", text, "Where the router listens.")
    api_key: tuple[str, ...] = setting((), parse_api_key, "Bearer key that the request came with.", many=True)
    out: Path | None = setting(None, path, "Also write a Chrome trace, for ui.perfetto.dev, to this file.")


@dataclass(frozen=True, kw_only=True)
class KeysSettings:
    """Make a directory of CURVE keys for workers on several hosts."""

    directory: Path = required(path, "Directory for the new keys; it gets mode 0700.", positional=True)
    name: str = setting("baton", text, "Name of the key.")


@dataclass(frozen=True, kw_only=True)
class BenchEngineSettings:
    """Measure the engine on this machine, beside what its read bandwidth and matmul rate would allow."""

    model_config: str = setting(
        "qwen3-8b", text, "The model's shape: qwen3-8b, llama-3.1-8b, a config.json or a directory with one."
    )
    device: str = setting("cuda", choice("cuda", "cpu"), "What is measured.")
    dtype: str = setting(
        "auto", choice("auto", "float32", "bfloat16", "float16"), "auto: bfloat16 on cuda, float32 on cpu."
    )
    kv_dtype: str = setting(
        "auto", choice("auto", "fp8"), "What the KV cache is kept in.", "--kv-cache-dtype"
    )
    quantization: str = setting("none", choice("none", "fp8"), "fp8: linear layers in e4m3.")
    mem_fraction: float | None = setting(
        None, fraction, "Share of the device for weights and KV pool. (default: 0.85 on cuda, 0.6 on cpu)"
    )
    device_memory: int | None = setting(
        None, parse_bytes, "Size of the device, like 2GiB. (default: the GPU's own; 2GiB on cpu)"
    )
    page_size: int = setting(64, power_of_two(1, 1024), "Tokens in one KV page.")
    max_batch: int = setting(256, integer(1, 4096), "Sequences in one decode step.")
    max_chunk_tokens: int = setting(2048, integer(16, 1 << 17), "Tokens in one forward pass.")
    only: tuple[str, ...] = setting(
        (),
        choice(*BENCH_GROUPS),
        f"Measure only this: {', '.join(BENCH_GROUPS)}; repeatable. (default: all)",
        many=True,
    )
    shrink: int | None = setting(
        None,
        integer(1, 1024),
        "Divide counts and lengths by this, for a small model or device. (default: 1 on cuda, 64 on cpu)",
    )
    quick: bool = setting(False, flag, "Fewer repetitions, a quarter of the offline load.", switch=True)
    trace: Path | None = setting(
        None, path, "Profile decode steps and a prefill, into FILE-decode.json.gz and FILE-prefill.json.gz."
    )
    out: Path | None = setting(None, path, "File for everything that was measured, as JSON.")


@dataclass(frozen=True, kw_only=True)
class VersionSettings:
    """Print the version."""
