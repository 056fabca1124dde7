"""A simulated process that sleeps in the middle of an action: what it may do, and what becomes of it."""

from tests.sim.kernel import Process, World


class Sleeper(Process):
    """Sleeps for a second when it is told to; a turn is due every tenth of one."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "sleeper")
        self.turns_s: list[float] = []
        self.woke_s: list[float] = []

    def work(self) -> float:
        self.turns_s.append(self.world.now_s)
        return self.world.now_s + 0.1

    def sleep(self) -> None:
        def action() -> None:
            self.world.sleep(1.0)
            self.woke_s.append(self.world.now_s)

        self._run(action)
        self.wake()


def started() -> tuple[World, Sleeper, float]:
    world = World(1)
    sleeper = Sleeper(world)
    sleeper.start()
    return world, sleeper, world.now_s


def test_it_takes_no_turn_while_it_sleeps() -> None:
    world, sleeper, began_s = started()
    world.after(0.55, sleeper.sleep)
    world.run_until(began_s + 3.0)
    asleep = [at for at in sleeper.turns_s if began_s + 0.55 < at < began_s + 1.55]
    assert not asleep
    assert len(sleeper.turns_s) > 15
    assert sleeper.woke_s == [began_s + 0.55 + 1.0]


def test_one_that_hangs_sleeps_on() -> None:
    world, sleeper, began_s = started()
    world.after(0.5, sleeper.sleep)
    world.after(1.0, lambda: sleeper.hang(2.0))
    world.run_until(began_s + 5.0)
    assert sleeper.woke_s == [began_s + 3.0]


def test_one_that_died_does_not_wake_in_its_next_life() -> None:
    world, sleeper, began_s = started()
    world.after(0.5, sleeper.sleep)
    world.after(0.7, sleeper.crash)
    world.after(0.9, sleeper.start)
    world.run_until(began_s + 3.0)
    assert sleeper.woke_s == []
    assert sleeper.alive and sleeper.incarnation == 2
    assert max(sleeper.turns_s) > began_s + 2.0
