"""Whatever happens in whatever order: all comes to rest, no slot is lost, every byte that counts is right."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.messages import Abort
from tests.unit.kvtransfer.cluster import Cluster

SEEDS = st.integers(min_value=0, max_value=2**32)


def begin_some(cluster: Cluster, rng: random.Random, count: int) -> list[tuple[int, int, int]]:
    begun = []
    for _ in range(count):
        source, target = rng.sample(range(len(cluster.nodes)), 2)
        start = rng.randint(0, 10)
        end = start + rng.choice((0, 1, 3, 4, 17, 40))
        begun.append((cluster.begin(source, target, start, end), source, target))
    return begun


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 4), st.integers(2, 6))
def test_without_faults_every_transfer_completes(seed: int, nodes: int, slots: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(nodes, slots, rng)
    cluster.stall = 0.3
    begun = begin_some(cluster, rng, 8)
    for _ in range(400):
        cluster.run(50)
        if cluster.at_rest() and not cluster.busy():
            break
    for transfer_id, source, target in begun:
        assert transfer_id in cluster.nodes[target].received
        assert transfer_id in cluster.nodes[source].committed
    assert cluster.at_rest()
    assert all(not node.aborted for node in cluster.nodes)
    assert all(not node.machine.outbox.drops for node in cluster.nodes)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from((0.0, 0.05, 0.3)), st.sampled_from((0.0, 0.2)), st.sampled_from((0.0, 0.1)))
def test_with_faults_everything_comes_to_rest(
    seed: int, loss: float, duplication: float, write_failure: float
) -> None:
    rng = random.Random(seed)
    cluster = Cluster(rng.randint(2, 3), rng.randint(2, 6), rng)
    cluster.loss, cluster.duplication, cluster.write_failure = loss, duplication, write_failure
    cluster.stall = 0.4
    begun = begin_some(cluster, rng, 6)
    for _ in range(8):
        cluster.run(60)
        if rng.random() < 0.3:
            transfer_id, source, target = rng.choice(begun)
            cluster.nodes[rng.choice((source, target))].give_up(transfer_id)
        if rng.random() < 0.3 and cluster.wires:
            cluster.cut(*rng.choice(list(cluster.wires)))
        if rng.random() < 0.3:
            cluster.advance(rng.choice((0.5, 5.0, 60.0)))
    cluster.finish()
    for transfer_id, source, target in begun:
        # The source lets its KV go only if the destination has it all.
        if transfer_id in cluster.nodes[source].committed:
            assert transfer_id in cluster.nodes[target].received


def test_a_full_pool_shared_by_two_receivers_does_not_deadlock() -> None:
    rng = random.Random(7)
    cluster = Cluster(3, 2, rng)
    begun = [cluster.begin(0, 1 + i % 2, 0, 60, deadline_s=1e6) for i in range(6)]
    for _ in range(2000):
        cluster.run(50)
        if cluster.nodes[0].committed >= set(begun):
            break
    assert cluster.nodes[0].committed == set(begun)
    cluster.finish()


def test_two_processes_that_receive_from_each_other_do_not_deadlock() -> None:
    rng = random.Random(11)
    cluster = Cluster(2, 2, rng)
    there = {cluster.begin(0, 1, 0, 60, deadline_s=1e6) for _ in range(3)}
    back = {cluster.begin(1, 0, 0, 60, deadline_s=1e6) for _ in range(3)}
    for _ in range(2000):
        cluster.run(50)
        if cluster.nodes[0].committed == there and cluster.nodes[1].committed == back:
            break
    assert (cluster.nodes[0].committed, cluster.nodes[1].committed) == (there, back)


def test_a_worker_that_dies_leaves_nothing_behind() -> None:
    rng = random.Random(3)
    for victim in (0, 1):
        cluster = Cluster(2, 4, rng)
        begin_some(cluster, rng, 6)
        cluster.run(400)
        node = cluster.nodes[victim]
        node.commands.clear()
        node.events.clear()
        node.unread.clear()
        node.outgoing.clear()
        node.incoming.clear()
        node.machine.worker_gone("dead", cluster.now_s)
        cluster.finish()


def test_abort_is_idempotent_and_counted_when_unknown() -> None:
    cluster = Cluster(2, 4, random.Random(1))
    transfer_id = cluster.begin(0, 1, 0, 40)
    cluster.run(300)
    machine = cluster.nodes[1].machine
    for _ in range(3):
        machine.on_command(Abort(transfer_id, "again"), cluster.now_s)
    machine.on_command(Abort(999, "never seen"), cluster.now_s)
    assert machine.outbox.drops["abort_unknown"] >= 1
    cluster.nodes[1].incoming.pop(transfer_id, None)
    cluster.finish()
