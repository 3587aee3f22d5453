"""What the runner makes of providers with limits: throughput, waste, rows; on a virtual clock."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .limits import (
    QUICK,
    Both,
    Bucket,
    Chance,
    Changing,
    Closed,
    Concurrent,
    Course,
    Doors,
    Free,
    Latency,
    Limit,
    Provider,
    Windows,
    constant,
    course,
    exponential,
    lognormal,
)

LATENCIES = {"constant": constant, "exponential": exponential, "lognormal": lognormal}
MINUTES_10 = 600.0


def holds(found: Course, limit: float, *, throughput: float = 0.8, wasted: float = 0.05) -> None:
    """No row is lost, and the limit is used without many 429s. `limit` in answers a second."""
    assert found.stop is None
    assert found.lost == 0
    assert found.rate() >= throughput * limit
    assert found.wasted() < wasted


@pytest.mark.parametrize("tells", [False, True])
def test_a_bucket_is_used_without_many_429s(quick_path: Path, tells: bool) -> None:
    provider = Provider(Bucket(8, 16), lognormal(1.0), tells=tells)
    holds(course(quick_path, provider, concurrency=32, seconds=MINUTES_10), 8)


def test_so_is_a_limit_on_requests_at_a_time(quick_path: Path) -> None:
    provider = Provider(Concurrent(8), exponential(1.0))
    holds(course(quick_path, provider, concurrency=32, seconds=MINUTES_10), 8)


def test_and_one_on_tokens_with_prompts_of_any_length(quick_path: Path) -> None:
    def size(chance: random.Random) -> int:
        return min(20_000, int(chance.lognormvariate(6.4, 1.0)))

    chance = random.Random(5)
    mean = sum(size(chance) for _ in range(5000)) / 5000
    provider = Provider(Bucket(8 * mean, 480 * mean, sized=True), lognormal(1.0))
    # What is full at the start lasts for some minutes: it is used up before the limit is felt.
    found = course(quick_path, provider, concurrency=32, seconds=MINUTES_10, sizes=size)
    holds(found, 8, wasted=0.10)


@pytest.mark.parametrize("tells", [False, True])
def test_windows_of_a_minute_lose_no_row(quick_path: Path, tells: bool) -> None:
    provider = Provider(Windows(480), lognormal(1.0), tells=tells)
    holds(course(quick_path, provider, concurrency=32, seconds=MINUTES_10), 8, wasted=0.10)


@pytest.mark.parametrize("refusal", [QUICK, None])
@pytest.mark.parametrize("share", [0.05, 0.18])
@pytest.mark.parametrize("concurrency", [4, 256])
def test_429s_by_chance_cut_nothing(quick_path: Path, concurrency: int, share: float, refusal: float | None) -> None:
    provider = Provider(Chance(share), lognormal(1.0), refusal, tells=concurrency == 4)
    found = course(quick_path, provider, concurrency=concurrency, seconds=600 if concurrency == 4 else 30)
    assert set(found.allowed) == {concurrency}
    assert found.lost == 0
    assert found.most == concurrency


def test_where_nothing_is_taken_one_request_at_a_time_asks_ever_more_rarely(quick_path: Path) -> None:
    provider = Provider(Changing(Closed(), Free(), at=200.0), lognormal(1.0))
    found = course(quick_path, provider, concurrency=32, seconds=360)
    asked = [at for at, _ in found.events if at < 200]
    assert sum(at > 40 for at in asked) <= 160 / 16 + 2
    assert found.rate(since=330) > 0.9 * 32
    assert (found.lost, found.stop) == (0, None)


def test_a_server_in_trouble_is_sent_no_less(quick_path: Path) -> None:
    found = course(quick_path, Provider(Free(), lognormal(1.0), errors=0.3), concurrency=16, seconds=120)
    assert set(found.allowed) == {16}


@pytest.mark.parametrize("share", [0.22, 0.3])
def test_more_429s_by_chance_than_a_fifth_starve_nothing(quick_path: Path, share: float) -> None:
    found = course(quick_path, Provider(Chance(share), lognormal(1.0)), concurrency=8, seconds=1800, rows=1000)
    assert (found.lost, found.stop) == (0, None)
    assert len([how for _, how in found.events if how == "ok"]) == 1000


@pytest.mark.parametrize(("opened", "period"), [(50.0, 60.0), (60.0, 600.0)])
@pytest.mark.parametrize("tells", [False, True])
def test_a_provider_that_is_closed_at_times_is_used_while_it_is_open(
    quick_path: Path, opened: float, period: float, tells: bool
) -> None:
    provider = Provider(Doors(opened, period), lognormal(1.0), tells=tells)
    found = course(quick_path, provider, concurrency=8, seconds=3600)
    assert (found.lost, found.stop) == (0, None)
    assert found.rate(since=1800) > 0.6 * 8 * opened / period


def test_it_recovers_when_a_limit_is_lifted(quick_path: Path) -> None:
    provider = Provider(Changing(Bucket(3, 3), Free(), at=120.0), lognormal(1.0))
    found = course(quick_path, provider, concurrency=16, seconds=360)
    assert found.allowed[115] <= 8
    assert found.allowed[-1] == 16
    assert found.rate(since=270) > 0.9 * 16
    assert found.lost == 0


def test_it_follows_a_limit_that_drops_by_half(quick_path: Path) -> None:
    provider = Provider(Changing(Bucket(16, 16), Bucket(8, 8), at=180.0), lognormal(1.0))
    found = course(quick_path, provider, concurrency=32, seconds=480)
    assert found.lost == 0
    assert found.rate(until=180) > 0.8 * 16
    assert found.rate(since=240) > 0.8 * 8
    assert found.wasted() < 0.05


# --- the sweep ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("refusal", [QUICK, None])
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("kind", ["bucket", "concurrent"])
@pytest.mark.parametrize(("concurrency", "seconds"), [(32, 1.0), (256, 4.0)])
def test_any_limit_is_used(
    quick_path: Path, kind: str, share: float, latency: str, refusal: float | None, concurrency: int, seconds: float
) -> None:
    rate = concurrency * share / seconds
    limit: Limit = Bucket(rate, 2 * rate) if kind == "bucket" else Concurrent(round(concurrency * share))
    made: Latency = LATENCIES[latency](seconds)
    found = course(quick_path, Provider(limit, made, refusal), concurrency=concurrency, seconds=MINUTES_10)
    # A provider that refuses as slowly as it answers has a whole level's worth refused before the first is known.
    holds(found, rate, wasted=0.05 if refusal else 0.06)


@pytest.mark.slow
@pytest.mark.parametrize("latency", LATENCIES)
def test_nearly_all_of_a_limit_on_requests_at_a_time_is_used(quick_path: Path, latency: str) -> None:
    provider = Provider(Concurrent(30), LATENCIES[latency](1.0))
    holds(course(quick_path, provider, concurrency=32, seconds=MINUTES_10), 30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_429s_by_chance_cut_nothing_in_an_hour(quick_path: Path, seed: int) -> None:
    provider = Provider(Chance(0.18, random.Random(seed)), exponential(1.0), (QUICK, None)[seed % 2])
    found = course(quick_path, provider, concurrency=16, seconds=3600, seed=seed)
    assert set(found.allowed) == {16}
    assert found.lost == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "throughput"),
    [(0.05, 0.8), pytest.param(0.15, 0.8, marks=pytest.mark.xfail(reason="steps down for what no step makes fewer"))],
)
def test_chance_besides_a_limit_starves_nothing(quick_path: Path, share: float, throughput: float) -> None:
    provider = Provider(Both(Chance(share), Bucket(13, 13)), lognormal(1.0))
    found = course(quick_path, provider, concurrency=32, seconds=MINUTES_10)
    assert found.lost == 0
    assert found.rate() > throughput * 13
