"""The simulated pair of `python -m deploy.bench.transfer.slots` moves every prompt, in times that can be."""

import pytest

from deploy.bench.transfer.slots import (
    GEOMETRY,
    LINK_BYTES_PER_S,
    LOADS,
    SLOT_BYTES,
    STAGING_BYTES,
    SlotLoad,
    SlotPair,
)


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_every_prompt_arrives_no_faster_than_the_link(load: SlotLoad) -> None:
    slot_bytes = SLOT_BYTES[1]
    done_s = SlotPair(STAGING_BYTES // slot_bytes, slot_bytes, load).run()
    assert len(done_s) == load.prompts
    assert done_s[-1] > load.prompts * load.tokens * GEOMETRY.token_bytes / LINK_BYTES_PER_S
