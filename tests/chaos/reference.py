"""The right answers: each plan once, by one unified worker that nobody disturbs."""

import asyncio
from pathlib import Path

import httpx

from tests.chaos.client import Answer, ask
from tests.chaos.requests import MODEL, Plan
from tests.e2e.cluster import Cluster
from tests.patience import patient

AT_ONCE = 8
DEADLINE_S = patient(240.0)


Tokens = dict[int, list[int]]
"""Token ids by choice."""


def compute_reference(
    model_dir: Path, log_dir: Path, plans: list[Plan]
) -> tuple[dict[int, Answer], dict[int, Tokens]]:
    """By the plan's number; cancelled requests as if nobody had cancelled them, invalid ones not at all."""
    log_dir.mkdir()
    with Cluster(model_dir, log_dir, "--served-model-name", MODEL, "--unified", "1") as cluster:
        whole = [Plan(plan.number, plan.body) for plan in plans if plan.expect_status == 200]
        answers = asyncio.run(_ask_all(cluster.url, whole))
        with_ids = asyncio.run(_ask_all(cluster.url, [_with_ids(plan) for plan in whole]))
    tokens = {
        number: {index: [int(token) for token in one.tokens] for index, one in answer.choices.items()}
        for number, answer in with_ids.items()
    }
    return answers, tokens


def _with_ids(plan: Plan) -> Plan:
    """The same, not streamed: only so the API gives ids."""
    kept = {name: value for name, value in plan.body.items() if not name.startswith(("stream", "logprobs"))}
    return Plan(plan.number, kept | {"return_token_ids": True})


async def _ask_all(url: str, plans: list[Plan]) -> dict[int, Answer]:
    gate = asyncio.Semaphore(AT_ONCE)
    answers = {plan.number: Answer(0) for plan in plans}

    async def whole(plan: Plan) -> None:
        async with gate:
            await ask(http, plan, answers[plan.number])

    async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
        await asyncio.gather(*map(whole, plans))
    return answers


def difference(plan: Plan, answer: Answer, right: Answer | None) -> str | None:
    """What is wrong with an answer that came to its end; None if nothing is."""
    if answer.status != plan.expect_status:
        return f"status {answer.status}, not {plan.expect_status}"
    if right is None:
        return None
    if answer.cut:
        ahead = (index for index, one in answer.choices.items() if not one.begins(right.choices[index]))
        return next((f"choice {index} does not begin like the reference" for index in ahead), None)
    if sorted(answer.choices) != list(range(plan.choices)):
        return f"choices {sorted(answer.choices)} of {plan.choices}"
    for index, choice in answer.choices.items():
        if choice != right.choices[index]:
            return f"choice {index}: {_first_difference(choice.tokens, right.choices[index].tokens)}"
    return None if answer.usage == right.usage else f"usage {answer.usage}, not {right.usage}"


def _first_difference(found: list[int | str], right: list[int | str]) -> str:
    for position, (one, other) in enumerate(zip(found, right, strict=False)):
        if one != other:
            return f"token {position} is {one!r}, not {other!r}"
    return f"{len(found)} tokens, not {len(right)}, or another text or end"
