from __future__ import annotations

from dataclasses import replace

import pytest

from fxquant.backends import backend
from fxquant.core.errors import OptionError
from fxquant.core.facts import LatencyRow
from fxquant.core.ir import Sites
from fxquant.passes.cost import latency_from_rows, site_bytes
from tests.scoring import calibrated

REFERENCE = backend("reference").target
PROGRAM = calibrated("plain")


def test_the_first_row_that_matches_counts() -> None:
    rows = (
        LatencyRow("type:conv", "W4A*", ms=1.0, ms_per_million_macs=2.0, ms_per_megabyte=3.0),
        LatencyRow("type:conv", "*", ms=5.0),
        LatencyRow("*", "*", ms=7.0),
    )
    target = replace(REFERENCE, latency=rows)
    table, sites = latency_from_rows(PROGRAM, target), PROGRAM[Sites]
    for candidate, value in zip(table.candidates, table.values, strict=True):
        site = sites.by_name(candidate.site)
        if site.kind != "conv":
            assert value == 7.0
        elif candidate.choice.weight_bits == 4:
            megabytes = site_bytes(site, candidate.choice, target) / 1e6
            assert value == pytest.approx(1.0 + 2.0 * site.macs / 1e6 + 3.0 * megabytes)
        else:
            assert value == 5.0
    assert {site.kind for site in sites.sites} == {"conv", "linear"}
    assert table.float_cost == sum(5.0 if site.kind == "conv" else 7.0 for site in sites.sites)


def test_a_layer_without_a_row_is_named() -> None:
    rows = (LatencyRow("*", "W?A8", ms=1.0),)
    with pytest.raises(OptionError, match=r"no latency row for layer '.*' \(conv\) at float; add one"):
        latency_from_rows(PROGRAM, replace(REFERENCE, latency=rows))
