"""The smallest change of a flag that makes a ledger fit: computed from the rules, then checked by them."""

from services.memory.inputs import Change, PlanInput, shortfall

_GRAIN_BYTES = 1 << 20
"""Device sizes are proposed in whole MiB."""
_LEAST_SLOTS = 2
"""What a transfer process needs to send and receive."""


def smallest_changes(inputs: PlanInput) -> tuple[Change, ...]:
    """Every single-flag change that fits, each the nearest to what is set now, the cheapest first.

    Cheapest: moving the border between inside and outside costs neither a feature nor hardware; fewer
    staging slots cost bandwidth; a shorter context costs requests. A shorter context together with a
    moved border comes before a larger device, which is the last resort.
    """
    singles = [_fraction(inputs), _slots(inputs), _context(inputs)]
    changes = [change for change in singles if change is not None]
    if not changes:
        both = _fraction_and_context(inputs)
        changes += [both] if both else []
    device = _device(inputs)
    changes += [device] if device else []
    return tuple(changes)


def _fits(inputs: PlanInput, change: Change) -> bool:
    return shortfall(change.applied(inputs)) is None


def _fraction(inputs: PlanInput) -> Change | None:
    """The nearest mem_fraction of as few decimals as will do, at most four."""
    low = inputs.inside_need_bytes
    high = inputs.device_bytes - inputs.outside_bytes
    if low > high or high <= 0:
        return None
    for decimals in (2, 3, 4):
        scale = 10**decimals
        raise_it = inputs.budget_bytes < low
        edge = -(-low * scale // inputs.device_bytes) if raise_it else high * scale // inputs.device_bytes
        # The product with a float may round across the edge: look one step either way, nearest first.
        steps = (edge - 1, edge, edge + 1) if raise_it else (edge + 1, edge, edge - 1)
        for step in steps:
            if 0 < step < scale:
                change = Change(mem_fraction=round(step / scale, decimals))
                if _fits(inputs, change):
                    return change
    return None


def _slots(inputs: PlanInput) -> Change | None:
    """The most staging slots that fit; never none, which would mean no transfer process."""
    if inputs.staging_slots <= _LEAST_SLOTS or inputs.staging_slot_bytes == 0:
        return None
    rest = inputs.device_bytes - inputs.budget_bytes - (inputs.outside_bytes - inputs.staging_bytes)
    slots = min(rest // inputs.staging_slot_bytes, inputs.staging_slots - 1)
    change = Change(staging_slots=slots)
    return change if slots >= _LEAST_SLOTS and _fits(inputs, change) else None


def _context(inputs: PlanInput) -> Change | None:
    """The longest context that the pool holds."""
    tokens = min(inputs.pages * inputs.page_size_tokens, inputs.max_model_len - 1)
    change = Change(max_model_len=tokens)
    return change if tokens >= 1 and _fits(inputs, change) else None


def _fraction_and_context(inputs: PlanInput) -> Change | None:
    """The largest mem_fraction that leaves room outside, and the longest context it then allows."""
    high = inputs.device_bytes - inputs.outside_bytes
    step = high * 100 // inputs.device_bytes
    if not 0 < step < 100:
        return None
    moved = Change(mem_fraction=round(step / 100, 2))
    shorter = _context(moved.applied(inputs))
    if shorter is None:
        return None
    change = Change(mem_fraction=moved.mem_fraction, max_model_len=shorter.max_model_len)
    return change if _fits(inputs, change) else None


def _device(inputs: PlanInput) -> Change | None:
    """The smallest device, in whole MiB, on which this fits as it is."""
    low = max(
        inputs.inside_need_bytes / inputs.mem_fraction,
        inputs.outside_bytes / (1 - inputs.mem_fraction),
        inputs.device_bytes + 1,
    )
    grains = max(1, int(low) // _GRAIN_BYTES - 1)
    for candidate in range(grains, grains + 5):
        change = Change(device_bytes=candidate * _GRAIN_BYTES)
        if candidate * _GRAIN_BYTES > inputs.device_bytes and _fits(inputs, change):
            return change
    return None
