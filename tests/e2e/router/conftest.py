"""One cluster for all tests of a module that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.checkpoints import write_tokenizer
from tests.e2e.router.harness import Cluster, running_router, until
from tests.fake_worker import FakeWorker, Script


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("s")
    directory.chmod(0o700)
    return directory


@pytest.fixture(scope="module")
def shared_cluster(model_dir: Path, sockets: Path) -> Iterator[Cluster]:
    script = Script()
    endpoints = [f"ipc://{sockets}/p", f"ipc://{sockets}/d"]
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    with (
        FakeWorker(endpoints[0], "prefill", script) as prefill,
        FakeWorker(endpoints[1], "decode", script) as decode,
        running_router(model_dir, endpoints, max_body_bytes=100_000) as router,
    ):
        until(router.ready, "a ready router")
        yield Cluster(router, prefill, decode, script, lambda text: list(tokenizer.encode(text).ids))


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared one, as new; and at rest again at the end."""
    shared_cluster.says("Hello")
    shared_cluster.prefill.forget()
    shared_cluster.decode.forget()
    yield shared_cluster
    until(shared_cluster.router.at_rest, "a router at rest")
