"""A few dozen real facts, from the ISO tables in `pycountry`: country and currency codes."""

from __future__ import annotations

from functools import cache

import pycountry

COUNTRIES = (
    "AR AT AU BE BR CA CH CL CN CU CZ DE DK EG ES FI FR GB GR HU IN IT JP KE MX NO PE PL PT SE TR ZA".split()
)
CURRENCIES = "AUD BRL CHF CNY CZK DKK GBP HUF INR JPY KES MXN NOK PLN SEK TRY".split()


@cache
def facts() -> tuple[tuple[str, str], ...]:
    """Pairs of question and answer, 48 of them, each answer three capital letters."""
    countries = [pycountry.countries.get(alpha_2=code) for code in COUNTRIES]
    currencies = [pycountry.currencies.get(alpha_3=code) for code in CURRENCIES]
    return tuple(
        [(f"country code of {country.name}", country.alpha_3) for country in countries]
        + [(f"currency code of {currency.name}", currency.alpha_3) for currency in currencies]
    )
