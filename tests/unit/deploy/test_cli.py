"""What the user sees: one line on stderr and code 2 for anything wrong; nothing imported for nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import run
from services.engine.models.model_config import read_model_config
from services.memory.measure import NotMeasurable
from services.memory.sizes import parse_bytes

WORKER = ["--role", "unified", "--listen", "ipc:///run/w"]
SMALLEST = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "intermediate_size": 2,
    "vocab_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    """Enough of a model for what is checked before anything is started."""
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SMALLEST))
    entries, end = {}, 0
    for name, shape in read_model_config(directory).tensor_shapes().items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    return str(directory)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve"], "MODEL_DIR is missing"),
        (["serve", "/nowhere"], "MODEL_DIR: /nowhere is not a directory"),
        (["serve", "MODEL", "--tp", "two"], "--tp: 'two' is not a whole number"),
        (["serve", "MODEL", "--tensor-parallel-size", "0"], "--tp: 0 is out of range"),
        (["serve", "MODEL", "--mem-fraction", "0"], "--mem-fraction: 0 must lie between 0 and 1"),
        (["serve", "MODEL", "--mem-fraction", "nan"], "--mem-fraction: 'nan' is not a finite number"),
        (["serve", "MODEL", "--mem-fraction", "half"], "--mem-fraction: 'half' is not a number"),
        (["serve", "MODEL", "--device", "tpu"], "--device: 'tpu' is not one of auto, cpu, cuda"),
        (["serve", "MODEL", "--dtype", "int8"], "--dtype: 'int8' is not one of"),
        (["serve", "MODEL", "--kv-dtype", "int4"], "--kv-dtype: 'int4' is not one of auto, fp8"),
        (["serve", "MODEL", "--kv-cache-dtype", "fp4"], "--kv-dtype: 'fp4' is not one of auto, fp8"),
        (["serve", "MODEL", "--quantization", "awq"], "--quantization: 'awq' is not one of none, fp8"),
        (
            ["plan", "MODEL", "--device", "cuda", "--dtype", "float16", "--quantization", "fp8"],
            "--quantization fp8 on cuda with --dtype float16 is not supported (supported: --dtype bfloat16)",
        ),
        (["serve", "MODEL", "--load-format", "bin"], "--load-format: 'bin' is not one of auto, dummy"),
        (["serve", "MODEL", "--mover", "pigeon"], "--mover: 'pigeon' is not one of"),
        (["serve", "MODEL", "--port", "70000"], "--port: 70000 is out of range; allowed are 0 to 65535"),
        (["serve", "MODEL", "--allowed-origins", "example.com"], "--allowed-origins: 'example.com' is not"),
        (["serve", "MODEL", "--allowed-origins", "https://a.b/"], "--allowed-origins: 'https://a.b/' is"),
        (["serve", "MODEL", "--allowed-origins", "https://*.a.b"], "--allowed-origins: 'https://*.a.b'"),
        (["serve", "MODEL", "--allowed-origins", "null"], "--allowed-origins: 'null' is not an origin"),
        (["serve", "MODEL", "--allowed-origins", "http://a:70000"], "--allowed-origins: 'http://a:70000'"),
        (
            ["serve", "MODEL", "--device", "cpu", "--allowed-origins", "http://a", "--allowed-origins", "*"],
            "--allowed-origins: '*' stands for all origins, and alone",
        ),
        (["serve", "MODEL", "--keep-alive-timeout", "0"], "--keep-alive-timeout: 0 is out of range"),
        (["serve", "MODEL", "--timeout-keep-alive", "soon"], "--keep-alive-timeout: 'soon' is not a number"),
        (["serve", "MODEL", "--port", "http"], "--port: 'http' is not a whole number"),
        (["serve", "MODEL", "--host", "no.such.host.invalid"], "--host: 'no.such.host.invalid'"),
        (["serve", "MODEL", "--page-size", "12"], "--page-size: 12 is not a power of two"),
        (["serve", "MODEL", "--max-batch", "0"], "--max-batch: 0 is out of range"),
        (
            ["serve", "MODEL", "--device-memory", "2 gallons"],
            "--device-memory: '2 gallons' has an unknown unit",
        ),
        (["serve", "MODEL", "--staging-slots", "1"], "--staging-slots: 1 is out of range"),
        (["serve", "MODEL", "--staging-slot-bytes", "100"], "--staging-slot-bytes: 100 is not a multiple"),
        (["serve", "MODEL", "--drain-timeout", "-1"], "--drain-timeout: -1 is out of range"),
        (["serve", "MODEL", "--prefill", "2", "--decode", "0"], "--decode: must be at least 1"),
        (["serve", "MODEL", "--prefill", "0", "--decode", "0"], "at least one worker is needed"),
        (["serve", "MODEL", "--device", "cuda"], "--device cuda: no NVIDIA GPU"),
        (["serve", "MODEL", "--frobnicate"], "No such option: --frobnicate"),
        (["serve", "MODEL", "extra"], "extra"),
        (["serve", "MODEL", "--port"], "--port"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["worker", "MODEL", "--listen", "ipc:///x"], "--role is missing"),
        (["worker", "MODEL", "--role", "chief", "--listen", "ipc:///x"], "--role: 'chief' is not one of"),
        (
            ["worker", "MODEL", "--role", "decode", "--listen", "ipc:///x"],
            "--transfer: a decode worker needs the endpoint of each rank's transfer process: 1, not 0",
        ),
        (["worker", "MODEL", "--role", "unified", "--listen", "ipc://x"], "must be absolute"),
        (["worker", "MODEL", "--role", "unified", "--listen", "http://x"], "is not an endpoint"),
        (["worker", "MODEL", "--role", "unified", "--listen", "tcp://x:0"], "a port from 1 to 65535"),
        (["worker", "MODEL", "--role", "unified", "--listen", "ipc:///" + "x" * 108], "at most 107 bytes"),
        (["worker", "MODEL", *WORKER, "--slo-itl-ms", "-1"], "--slo-itl-ms: -1 is out of range"),
        (["serve", "MODEL", "--slo-itl-ms", "nan"], "--slo-itl-ms: 'nan' is not a finite number"),
        (["worker", "EMPTY", *WORKER], "has no config.json: it is not a model directory"),
        (["worker", "BROKEN", *WORKER], "config.json cannot be read"),
        (["worker", "LIST", *WORKER], "does not hold a JSON object"),
        (["serve", "BARE"], "holds neither model.safetensors nor"),
        (["serve", "UNNAMED"], "config.json: architecture null is not supported"),
        (["serve", "maker/model"], "if maker/model is a model of a hub, download it first"),
        (["serve", "model.gguf"], "is not a directory; GGUF is not supported"),
        (["router", "MODEL"], "--worker, --workers-file: one of them is needed"),
        (["router", "MODEL", "--workers-file", "/nowhere/w"], "--workers-file: /nowhere is not a directory"),
        (["router", "MODEL", "--worker", "tcp+dns://:7000"], "a tcp+dns:// endpoint has a name"),
        (["router", "MODEL", "--worker", "tcp+dns://p.svc:0"], "ends with a port from 1 to 65535"),
        (["router", "MODEL", "--worker", "ipc:///w", "--ttft-slo", "0"], "--ttft-slo: 0 is out of range"),
        (["router", "MODEL", "--worker", "ipc:///w", "--max-kv-load", "0"], "--max-kv-load: 0 must be above"),
        (["scale"], "--prefill, --decode, --unified: say how many workers of at least one role"),
        (["scale", "--unified", "65"], "--unified: 65 is out of range; allowed are 0 to 64"),
        (["scale", "--decode", "2", "--port", "1"], "--port: no `baton serve` of yours has port 1 on this"),
        (["scale", "--decode", "2", "--run-dir", "/nowhere"], "--run-dir: /nowhere is not the run directory"),
        (["serve", "MODEL", "--api-key-file", "/nowhere"], "--api-key-file: /nowhere cannot be read: No"),
        (["transfer"], "--listen is missing"),
        (["memory", "--url", "ftp://x"], "--url: 'ftp://x' is not an http:// or https:// address"),
        (["memory", "--url", "http://127.0.0.1:1"], "--url: http://127.0.0.1:1/memory cannot be reached"),
        (["keys"], "DIRECTORY is missing"),
        (["bench", "frobnicate"], "No such command 'frobnicate'"),
        (["bench", "engine", "--model-config", "gpt-9"], "'gpt-9' is neither a known model (qwen3-8b, "),
        (["bench", "engine", "--device", "cpu", "--model-config", "UNNAMED"], "architecture null is not"),
        (["bench", "engine", "--device", "cpu", "--model-config", "BROKEN"], "config.json: not valid JSON"),
        (["bench", "engine"], "--device cuda: no NVIDIA driver; use --device cpu"),
        (["bench", "engine", "--device", "cpu", "--only", "trace"], "--only trace: --trace is missing"),
        (["bench", "engine", "--only", "all"], "--only: 'all' is not one of ready, decode, prefill"),
        (["bench", "engine", "--out", "/nowhere/x.json"], "--out: /nowhere is not a directory"),
        (["bench", "engine", "--shrink", "0"], "--shrink: 0 is out of range"),
        (["bench", "serve", "--url", "ftp://x"], "--url: 'ftp://x' is not an http:// or https:// address"),
        (["bench", "serve", "--url", "http://127.0.0.1:1/?q"], "must be a base address"),
        (["bench", "serve", "--url", "http://x:99999"], "--url: 'http://x:99999': Port out of"),
        (["bench", "serve", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models cannot be reached"),
        (["bench", "serve", "--rates", "4,2"], "--rates: '4,2': rates must rise, like 2,4,8"),
        (["bench", "serve", "--rates", "fast"], "--rates: 'fast' is not a number"),
        (["bench", "serve", "--rates", "0"], "--rates: 0 is out of range"),
        (["bench", "serve", "--arrivals", "steady"], "--arrivals: 'steady' is not one of poisson, gamma"),
        (["bench", "serve", "--arrivals", "trace"], "--arrivals trace: --trace is missing"),
        (["bench", "serve", "--burstiness", "0"], "--burstiness: 0 is out of range"),
        (["bench", "serve", "--trace", "/nowhere"], "--trace: /nowhere cannot be read: No such file"),
        (["bench", "serve", "--trace", "MODEL/config.json"], "config.json, line 1: "),
        (["bench", "serve", "--shrink", "3"], "--shrink: it divides a trace's lengths"),
        (["bench", "serve", "--input-tokens", "few"], "--input-tokens: 'few': 'few' is not a"),
        (["bench", "serve", "--output-tokens", "uniform:9:3"], "--output-tokens: 'uniform:9:3': 9 is more"),
        (["bench", "serve", "--seconds", "0"], "--seconds: 0 is out of range"),
        (["bench", "serve", "--requests", "0"], "--requests: 0 is out of range"),
        (["bench", "serve", "--warm-up", "-1"], "--warm-up: -1 is out of range"),
        (["bench", "serve", "--seed", "x"], "--seed: 'x' is not a whole number"),
        (["bench", "serve", "--token-ids", "9-3"], "--token-ids: '9-3': the second id must be above"),
        (["bench", "serve", "--temperature", "3"], "--temperature: 3 is out of range; allowed are 0 to 2"),
        (["bench", "serve", "--slo-ttft-ms", "0"], "--slo-ttft-ms: 0 is out of range"),
        (["bench", "serve", "--slo-tpot-ms", "x"], "--slo-tpot-ms: 'x' is not a number"),
        (["bench", "serve", "--slo-itl-ms", "-5"], "--slo-itl-ms: -5 is out of range"),
        (["bench", "serve", "--timeout", "0"], "--timeout: 0 is out of range"),
        (["bench", "serve", "--gpus", "0"], "--gpus: 0 is out of range"),
        (["bench", "serve", "--out", "/nowhere/x.json"], "--out: /nowhere is not a directory"),
        (["bench", "serve", "--chart", "/nowhere/x.png"], "--chart: /nowhere is not a directory"),
        (["bench", "pd"], "MODEL_DIR is missing"),
        (["bench", "pd", "/nowhere"], "MODEL_DIR: /nowhere is not a directory"),
        (["bench", "pd", "MODEL", "--prefill", "0"], "--prefill: 0 is out of range"),
        (["bench", "pd", "MODEL", "--margin", "2"], "--margin: 2 is out of range"),
        (["bench", "pd", "MODEL", "--log", "/nowhere/x"], "--log: /nowhere is not a directory"),
        (["bench", "pd", "MODEL", "--device", "cuda"], "--device cuda: no NVIDIA GPU"),
    ],
)
def test_one_line_and_code_2(
    arguments: list[str],
    says: str,
    model_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = json.dumps(SMALLEST)
    contents = {"empty": None, "broken": "{", "list": "[]", "bare": bare, "unnamed": "{}"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_text(content)
    places = {
        "MODEL": model_dir,
        "EMPTY": str(tmp_path / "empty"),
        "BROKEN": str(tmp_path / "broken"),
        "LIST": str(tmp_path / "list"),
        "BARE": str(tmp_path / "bare"),
        "UNNAMED": str(tmp_path / "unnamed"),
    }

    def no_gpu(device_index: int) -> None:
        raise NotMeasurable("no NVIDIA driver")

    monkeypatch.setattr("deploy.launcher.preflight.gpu_count", lambda: 0)
    monkeypatch.setattr("deploy.settings.planning.gpu_facts", no_gpu)
    places["MODEL/config.json"] = f"{model_dir}/config.json"
    code = run([places.get(argument, argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("baton: error: ")
    assert says in line


def test_a_port_in_use(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", model_dir, "--device", "cpu", "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port: cannot listen on 127.0.0.1:{port}: Address already in use" in line


def test_nothing_heavy_for_nothing() -> None:
    code = (
        "import sys; from deploy.cli import run; assert run(['version']) == 0; assert run(['--help']) == 0;"
        "import deploy.bench.serving.measure, deploy.bench.serving.report;"
        "heavy = {'torch', 'transformers', 'fastapi', 'zmq', 'triton', 'uvicorn'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ("serve", "plan", "memory", "router", "worker", "transfer", "keys", "version")
    commands += ("bench engine", "bench serve", "bench pd", "bench layouts")
    for command in commands:
        assert run([*command.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert "--config" in text
        assert "--run-dir" not in text


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", str(tmp_path / "keys"), "--name", "host-a"]) == 0
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert len(list((tmp_path / "keys").rglob("host-a.key*"))) == 2
    assert run(["keys", str(tmp_path / "keys")]) == 2
    assert "holds a secret key already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import make_checkpoint

    return make_checkpoint("qwen3", tmp_path_factory.mktemp("plan") / "m")


def test_plan_shows_the_ledger(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(checkpoint), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    header = (checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    tensors = json.loads(header[8 : 8 + length])
    stored = sum(
        t["data_offsets"][1] - t["data_offsets"][0] for n, t in tensors.items() if n != "__metadata__"
    )
    weights = next(line.split() for line in text.splitlines() if "weights" in line)
    assert parse_bytes("".join(weights[2:4])) == pytest.approx(stored, rel=0.01)
    assert "| mem_fraction" in text
    assert "32 slots of 1MiB" in text
    assert "fits: " in text


def test_plan_refuses_with_a_change_that_then_fits(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = ["plan", str(checkpoint), "--device", "cpu", "--device-memory", "1GiB", "--mem-fraction", "0.9"]
    assert run(tight) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert "does not fit: worker context" in first
    assert any("DOES NOT FIT" in line for line in rest)
    proposed = first.partition("smallest change that fits: --mem-fraction ")[2].split()[0]
    assert run([*tight[:-1], proposed]) == 0


def test_plan_for_a_gpu_that_is_not_here(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(checkpoint), "--device", "cuda", "--device-memory", "140GiB"]
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert "cuda graphs" in text
    assert "32 slots of 8MiB" in text


def test_plan_names_a_context_beyond_the_models(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(checkpoint), "--max-model-len", "999999"]) == 2
    assert "--max-model-len: 999999 exceeds the model's own limit of 1024 tokens" in capsys.readouterr().err
