"""The same work by other tools, each as its own documentation would have a user write it.

    python peers.py lm-deluge INPUT.csv http://127.0.0.1:8000/v1 256 OUTPUT.parquet

Run in an environment of its own, which has the peer in it and nothing of batchrun.
"""

from __future__ import annotations

import asyncio
import csv
import os
import sys
from typing import Any

SYSTEM = "You label film reviews."
MOST_TOKENS = 128


def prompt_of(row: dict[str, str]) -> str:
    return f"Review: {row['review']}\nIs it positive or negative?"


def save(rows: list[dict[str, Any]], output: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), output, compression="zstd")


def lm_deluge(rows: list[dict[str, str]], base_url: str, concurrency: int) -> list[dict[str, Any]]:
    from lm_deluge import Conversation, LLMClient
    from lm_deluge.models import register_model

    register_model(id="stub", name="stub-model", api_base=base_url, api_key_env_var="STUB_KEY")
    client = LLMClient(
        "stub",
        max_requests_per_minute=100_000_000,
        max_tokens_per_minute=100_000_000_000,
        max_concurrent_requests=concurrency,
        max_new_tokens=MOST_TOKENS,
        max_attempts=6,
        progress="tqdm",
    )
    prompts = [Conversation().system(SYSTEM).user(prompt_of(row)) for row in rows]
    answers = client.process_prompts_sync(prompts, show_progress=True)
    return [
        {**row, "response": answer.completion, "prompt_tokens": answer.input_tokens, "usd_spent": answer.cost}
        for row, answer in zip(rows, answers, strict=True)
    ]


def openai(rows: list[dict[str, str]], base_url: str, concurrency: int) -> list[dict[str, Any]]:
    from openai import AsyncOpenAI, DefaultAioHttpClient
    from tqdm.asyncio import tqdm_asyncio

    async def ask(client: AsyncOpenAI, places: asyncio.Semaphore, row: dict[str, str]) -> dict[str, Any]:
        messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt_of(row)}]
        async with places:
            answer = await client.chat.completions.create(
                model="stub-model", messages=messages, max_tokens=MOST_TOKENS, temperature=0
            )
        assert answer.usage is not None
        return {**row, "response": answer.choices[0].message.content, "prompt_tokens": answer.usage.prompt_tokens}

    async def work() -> list[dict[str, Any]]:
        places = asyncio.Semaphore(concurrency)
        async with DefaultAioHttpClient() as http:
            client = AsyncOpenAI(base_url=base_url, api_key="sk-stub", http_client=http, max_retries=5)
            found: list[dict[str, Any]] = await tqdm_asyncio.gather(*(ask(client, places, row) for row in rows))
        return found

    return asyncio.run(work())


def litellm(rows: list[dict[str, str]], base_url: str, concurrency: int) -> list[dict[str, Any]]:
    import litellm as library
    from tqdm.asyncio import tqdm_asyncio

    async def ask(places: asyncio.Semaphore, row: dict[str, str]) -> dict[str, Any]:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt_of(row)}]
        async with places:
            answer = await library.acompletion(
                model="openai/stub-model",
                messages=messages,
                api_base=base_url,
                api_key="sk-stub",
                max_tokens=MOST_TOKENS,
                num_retries=5,
            )
        return {**row, "response": answer.choices[0].message.content, "prompt_tokens": answer.usage.prompt_tokens}

    async def work() -> list[dict[str, Any]]:
        places = asyncio.Semaphore(concurrency)
        found: list[dict[str, Any]] = await tqdm_asyncio.gather(*(ask(places, row) for row in rows))
        return found

    return asyncio.run(work())


def main() -> None:
    name, path, base_url, concurrency, output = sys.argv[1:]
    os.environ["STUB_KEY"] = "sk-stub"
    with open(path, newline="") as fp:
        rows = list(csv.DictReader(fp))
    work = {"lm-deluge": lm_deluge, "openai": openai, "litellm": litellm}[name]
    save(work(rows, base_url, int(concurrency)), output)


if __name__ == "__main__":
    main()
