"""Which mover a host gets, and with which warning."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.errors import MoverUnavailable
from kvtransfer.movers.choice import MoverChoice, choose_mover
from kvtransfer.movers.facts import on_this_host, rdma_cards
from kvtransfer.movers.registry import registered_movers
from kvtransfer.movers.spec import HostFacts

CPU = HostFacts("cpu", same_host=True)
GPU = HostFacts("cuda", same_host=True)
FAR = HostFacts("cuda", same_host=False, rdma_cards=("mlx5_0",))


def choose(wanted: str, facts: HostFacts) -> MoverChoice:
    return choose_mover(wanted, facts, registered_movers())


def lacking(facts: HostFacts, **missing: str) -> HostFacts:
    return replace(facts, missing=missing)


@pytest.mark.parametrize(
    ("facts", "mover", "warning"),
    [
        (CPU, "nixl", None),
        (replace(CPU, same_host=False), "nixl", None),
        (GPU, "cuda_ipc", None),
        (FAR, "nixl", None),
        (replace(FAR, rdma_cards=()), "nixl", "no RDMA card"),
        (lacking(GPU, cuda_ipc="not permitted"), "nixl", "not cuda_ipc: not permitted"),
        (replace(GPU, unreachable_gpus=(2,)), "nixl", "not cuda_ipc: no peer access from this GPU to GPU 2"),
        (lacking(FAR, nixl="no package"), "nccl", "not nixl: no package"),
        (lacking(GPU, cuda_ipc="x", nixl="y"), "nccl", "not cuda_ipc: x; not nixl: y; nccl runs"),
    ],
)
def test_auto(facts: HostFacts, mover: str, warning: str | None) -> None:
    choice = choose("auto", facts)
    assert choice.mover.name == mover
    assert (choice.warning is None) == (warning is None)
    assert warning is None or (choice.warning or "").startswith(warning)


@pytest.mark.parametrize(
    "facts", [lacking(CPU, nixl="no package"), lacking(FAR, nixl="no package", nccl="no library")]
)
def test_auto_where_nothing_works(facts: HostFacts) -> None:
    with pytest.raises(MoverUnavailable, match=r"--mover auto: nothing here.*no package.*not nccl"):
        choose("auto", facts)


@pytest.mark.parametrize(
    ("wanted", "facts", "words"),
    [
        ("cuda_ipc", CPU, ["--mover cuda_ipc", "--device cuda", "here would work: --mover nixl"]),
        ("nccl", CPU, ["--mover nccl", "--device cuda", "here would work: --mover nixl"]),
        ("cuda_ipc", lacking(GPU, cuda_ipc="closed"), ["closed", "--mover nixl, --mover nccl"]),
        ("nixl", lacking(GPU, nixl="no package"), ["no package", "--mover cuda_ipc, --mover nccl"]),
        ("nixl", lacking(CPU, nixl="no package"), ["no other mover works here"]),
        ("nccl", lacking(GPU, nccl="no library"), ["no library", "--mover cuda_ipc, --mover nixl"]),
    ],
)
def test_what_is_forced_is_refused_and_never_replaced(
    wanted: str, facts: HostFacts, words: list[str]
) -> None:
    with pytest.raises(MoverUnavailable) as caught:
        choose(wanted, facts)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("wanted", ["nixl", "cuda_ipc", "nccl"])
def test_what_is_forced_and_works_is_taken(wanted: str) -> None:
    assert choose(wanted, GPU).mover.name == wanted
    assert choose(wanted, FAR).mover.name == wanted


def test_a_name_that_no_mover_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(MoverUnavailable, match=r"--mover pigeon: not known.* auto, cuda_ipc, nixl, nccl"):
        choose("pigeon", GPU)


def test_a_forced_one_that_reaches_not_every_gpu_says_so() -> None:
    choice = choose("cuda_ipc", replace(GPU, unreachable_gpus=(1,)))
    assert choice.warning is not None and "no peer access from this GPU to GPU 1" in choice.warning


@pytest.mark.parametrize(
    ("endpoint", "here"),
    [
        ("ipc:///run/p", True),
        ("tcp://127.0.0.1:7000", True),
        ("tcp://10.0.0.2:7001#gpu2", False),
        ("tcp://*:7001", False),
    ],
)
def test_who_can_reach_an_endpoint(endpoint: str, here: bool) -> None:
    assert on_this_host(endpoint) is here


def test_rdma_cards(tmp_path: Path) -> None:
    assert rdma_cards(tmp_path / "none") == ()
    (tmp_path / "mlx5_1").mkdir()
    (tmp_path / "mlx5_0").mkdir()
    assert rdma_cards(tmp_path) == ("mlx5_0", "mlx5_1")
