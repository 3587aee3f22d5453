"""The exact dollars of many rows, some of which nobody knows."""

from __future__ import annotations

from decimal import Decimal

from batchrun.money import from_pico, to_pico, usd_text


class Bill:
    """Takes what rows cost, one by one."""

    def __init__(self) -> None:
        self.unknown = 0
        """Rows whose cost is not known: it is not in the sum."""
        self._pico = 0

    def take(self, usd: Decimal | None) -> None:
        """The next row's dollars; None: not known."""
        if usd is None:
            self.unknown += 1
        else:
            self._pico += to_pico(usd)

    @property
    def usd(self) -> Decimal:
        """The sum of the known ones, exact."""
        return from_pico(self._pico)

    def per(self, number: int) -> Decimal | None:
        """The dollars for each of a number of things, to 1e-12; None for nothing, or with a cost unknown."""
        return from_pico(to_pico(self.usd / number)) if number and not self.unknown else None


def per_text(usd: Decimal | None) -> str:
    """An average for people, to three digits.

    >>> per_text(Decimal("0.000123456")), per_text(None)
    ('$0.000123', 'not known')
    """
    return "not known" if usd is None else f"${usd_text(Decimal(f'{usd:.3g}'))}"
