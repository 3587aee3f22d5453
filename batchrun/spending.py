"""What an invocation may spend: the price it reckons with, its budget, and the words for a cap that is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

from batchrun import accounts
from batchrun.budget import Budget, Cap, needed_factor
from batchrun.catalog import model_entry, price_list
from batchrun.errors import BrokenPromiseError, JobError, LimitError, Promise
from batchrun.job import Job
from batchrun.ledger import Ledger
from batchrun.ledger_view import LedgerView, Run
from batchrun.money import from_pico, to_pico, usd_text
from batchrun.plan import Plan
from batchrun.price_sources import choose_pricing
from batchrun.prices import Pricing
from batchrun.providers import Endpoint
from batchrun.records import now_us, utc
from batchrun.summary import Summary

_PERIODS = {"run": "this run", "day": "today (UTC)", "month": "this month (UTC)"}


def pricings_of(
    job: Job,
    endpoint: Endpoint,
    models: Iterable[str],
    ledger: LedgerView | None,
    *,
    is_offline: bool = False,
    say: Callable[[str], None],
) -> dict[str, Pricing]:
    """The price that each model has now. The provider's list is asked for again only if it has changed.

    Args:
        ledger: keeps the list; None if there is none yet. It is written to only if it is a `Ledger`.
        is_offline: take the list as it came last.
        say: told if a list has to be taken that may have changed since.
    """
    url = endpoint.url("models")

    @cache
    def published() -> bytes | None:
        kept = ledger.price_list(url) if ledger is not None else None
        etag, fetched_at, body = kept if kept is not None else (None, 0, None)
        fetched = price_list(endpoint, etag) if not is_offline else None
        if fetched is not None and not fetched.is_unchanged:
            body = fetched.body
            if isinstance(ledger, Ledger):
                ledger.keep_price_list(url, fetched.etag, body)
        elif fetched is None and body is not None:
            day = utc(fetched_at).date()
            say(f"the price list of {endpoint.name} {'was not asked for' if is_offline else 'cannot be had'}: "
                f"prices are those of {day}")  # fmt: skip
        return body

    def entry(model: str) -> Mapping[str, Any] | None:
        body = published()
        return model_entry(body, model) if body is not None else None

    return {model: choose_pricing(job.prices, endpoint, model, entry) for model in models}


def open_budget(plan: Plan, ledger: Ledger, run: Run, pricings: Mapping[str, Pricing]) -> Budget:
    """The budget of an invocation.

    Raises:
        JobError: the job has a cap that cannot hold: no price, no bound on the answers, or costs of unknown size.
        LimitError: an answer has cost more than was reserved, and neither factor nor prices were changed since.
    """
    setting = plan.job.budget
    now = now_us()
    if setting is None:
        budget = Budget(pricings)
        _keep_prices(ledger, pricings, budget, now)
        return budget
    refuse_boundless(plan, pricings, now)
    cap = Cap(to_pico(setting.usd), setting.per)
    of_run, since = run if setting.per == "run" else None, cap.began(now)
    taken = accounts.held(ledger, of_run, since)
    if taken.unbounded:
        raise JobError(
            f"budget: {taken.unbounded} earlier attempts of {_PERIODS[setting.per]} have an unknown cost and no "
            f"reservation (no price was known then, or they were lost), so no cap can be kept: {_reconcile(plan)}"
            f"`batchrun export {plan.job.path.name} --reprice` prices what was answered; else "
            f"{'finish this run without budget:' if setting.per == 'run' else f'wait for the next {setting.per}'}, "
            "or begin anew with another name:"
        )
    budget = Budget(pricings, cap=cap, factor=setting.factor, held=taken.pico)
    for model in pricings:
        for usage, sent_at, usd in accounts.reported(ledger, run, model):
            budget.worst[model].learn(usage, sent_at, usd)
    excess = accounts.overcharge(ledger, of_run, since)
    _keep_prices(ledger, pricings, budget, now)
    if excess is not None and _is_as_then(plan.job, excess[2]):
        usd, reserved, _ = excess
        factor = needed_factor(to_pico(usd), to_pico(reserved), setting.factor or Decimal(1))
        raise LimitError(
            f"an answer cost ${usd_text(usd)} where at most ${usd_text(reserved)} was to be expected: no cap holds at "
            f"such prices; set {f'budget: {{factor: {factor}}} or ' if factor else ''}the right prices: to go on"
        )
    return budget


def _keep_prices(ledger: Ledger, pricings: Mapping[str, Pricing], budget: Budget, now: int) -> None:
    kept = {
        model: snapshot | {"factor": str(budget.worst[model].factor)}
        for model, pricing in pricings.items()
        if (snapshot := pricing.snapshot(now)) is not None
    }
    if kept:
        ledger.keep_prices(kept)


def _is_as_then(job: Job, then: Mapping[str, Any]) -> bool:
    """True if neither the factor was raised nor the prices were set anew since an answer cost more than expected."""
    now = job.snapshot()
    factors = [Decimal(snapshot.get("budget", {}).get("factor") or 1) for snapshot in (then, now)]
    return factors[1] <= factors[0] and then.get("prices") == now.get("prices")


def refuse_boundless(plan: Plan, pricings: Mapping[str, Pricing], now: int) -> None:
    """Refuse a capped job whose worst case has no end; after its rows were read.

    Raises:
        JobError: it says what to add.
    """
    for model, pricing in pricings.items():
        _refuse_boundless(plan, plan.requested[model], pricing, now)


def _refuse_boundless(plan: Plan, model: str, pricing: Pricing, now: int) -> None:
    price = pricing.price_at(now)
    name = plan.endpoint.name
    if price is None:
        raise JobError(
            f"budget: no price is known for the model {model!r} at {name}, and without one no cap can hold: add "
            "prices: {input_mtok: …, output_mtok: …} (dollars per million tokens)"
        )
    if price.is_free:
        return
    if plan.unbounded_row is not None and pricing.limits.completion_tokens is None:
        raise JobError(
            f"budget: nothing bounds the answer to row {plan.unbounded_row + 1}, and {name} publishes no limit for "
            f"{model!r}: add parameters: {{max_tokens: …}}"
        )
    if plan.outside_row is not None and pricing.limits.context_tokens is None:
        raise JobError(
            f"budget: the request of row {plan.outside_row + 1} has the model read something elsewhere (an image or "
            f"file by its address, a search), and {name} publishes no context length for {model!r}: send it in "
            "the message (data:…), or take budget: out"
        )


def _reconcile(plan: Plan) -> str:
    return f"`batchrun reconcile {plan.job.path.name}` asks the provider; " if plan.endpoint.has_logs else ""


def cap_reached(plan: Plan, ledger: LedgerView, run: Run, next_pico: int | None) -> str:
    """What to say when the next row does not fit into the budget. `next_pico`: the most that it can cost."""
    setting = plan.job.budget
    assert setting is not None
    taken = _taken(plan, ledger, run)
    needs = f"can cost up to ${usd_text(from_pico(next_pico))}" if next_pico is not None else "has no bound"
    parts = [f"${usd_text(from_pico(taken.settled))} is spent"]
    if taken.margin:
        parts.append(f"what of it is derived counts for ${usd_text(from_pico(taken.margin))} more, to be safe")
    if taken.unknown_attempts:
        settles = f" (`batchrun reconcile {plan.job.path.name}` settles them)" if plan.endpoint.has_logs else ""
        parts.append(
            f"{taken.unknown_attempts} attempts of unknown cost hold up to "
            f"${usd_text(from_pico(taken.unknown))}{settles}"
        )
    return (
        f"budget: the cap of ${usd_text(setting.usd)} for {_PERIODS[setting.per]} leaves no room for the next row, "
        f"which {needs}: {', '.join(parts)}"
    )


def rows_left(summary: Summary, per: str) -> str:
    """What a budget has left undone, and what that would cost."""
    settled = summary.totals.ok + summary.totals.failed
    rate = summary.totals.usd / settled if settled else None
    cost = f"; at the rate so far they would cost ${usd_text(round(rate * summary.pending, 4))}" if rate else ""
    later = f", or wait for the next {per}," if per != "run" else ""
    return f"{summary.pending} rows are left{cost}; raise budget: {{usd: …}}{later} and run again to go on"


def _taken(plan: Plan, ledger: LedgerView, run: Run) -> accounts.Held:
    """What of a job's cap is taken now."""
    setting = plan.job.budget
    assert setting is not None
    since = Cap(to_pico(setting.usd), setting.per).began(now_us())
    return accounts.held(ledger, run if setting.per == "run" else None, since)


def check_cap(plan: Plan, ledger: LedgerView, run: Run, budget: Budget) -> None:
    """What was kept within the cap in memory must be so on disk.

    Raises:
        BrokenPromiseError: more is taken than the cap allows, and nothing that the provider charged excuses it.
    """
    setting = plan.job.budget
    if setting is None or budget.checked_from is None:
        return
    taken = accounts.held(ledger, run if setting.per == "run" else None, budget.checked_from).pico
    if taken > budget.most_held:
        raise BrokenPromiseError(
            Promise.CAP,
            f"${usd_text(from_pico(taken))} are taken of ${usd_text(from_pico(budget.most_held))}",
            ledger.path,
        )


def over_cap(plan: Plan, ledger: LedgerView, run: Run) -> Decimal | None:
    """Dollars by which a job's cap is exceeded; None without a cap."""
    setting = plan.job.budget
    if setting is None:
        return None
    return from_pico(max(0, _taken(plan, ledger, run).pico - to_pico(setting.usd)))
