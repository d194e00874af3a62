"""The page: it needs nothing else, nothing in it can break it, and it works in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardflax.partitioning import Explanation, explain
from tests.explain.browser import NAMES, VARIABLE, Browser, find_browser
from tests.explain.states import RULES, SPEC, many, state

BROWSER = find_browser()
NONE = f"no browser is installed: none of {', '.join(NAMES)} is found; {VARIABLE} can name one"


@pytest.fixture(scope="module")
def found() -> Explanation:
    return explain(many(14) | {"mu": moments()}, SPEC, RULES, title="</title><b>&")


def test_the_page_needs_nothing_else(found: Explanation) -> None:
    page = re.sub(r'(<script id="data"[^>]*>).*?(?=</script>)', r"\1", found.to_html())
    assert not re.search(r"""(src|href|action)\s*=|@import|url\(|fetch\(|XMLHttp|import\(""", page)
    assert "http:" not in page and "https:" not in page
    assert page.count("</script>") == 2 and "{{" not in page.partition("<style>")[0]


def test_values_are_embedded_whole_and_cannot_end_their_element(found: Explanation) -> None:
    page = found.to_html()
    values = re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert values and json.loads(values[1]) == found.to_dict()
    assert not set("<>&") & set(values[1])
    assert "<title>&lt;/title&gt;&lt;b&gt;&amp;</title>" in page


def moments() -> Any:
    """Of a state with its parameters, and of the one that is misspelt."""
    wrong = {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)}
    return {**state()["mu"], "layers_7x": wrong}


# --- in a browser, one start for all


def paths(browser: Browser) -> list[str]:
    return browser("[...document.querySelectorAll('#table td.path')].map((e) => e.textContent)")


def text(browser: Browser, selector: str) -> str:
    return browser(f"document.querySelector({json.dumps(selector)}).innerText")


def search(browser: Browser, words: str, count: int) -> None:
    browser("document.getElementById('search').value = ''")
    browser("document.getElementById('search').focus()")
    browser.type(words)
    shown = "document.querySelectorAll('#table tbody tr').length"
    browser.wait_for(f"{shown} === {count}")


def check_what_is_shown(browser: Browser, values: dict[str, Any]) -> None:
    assert text(browser, "h1") == "a state"
    assert "16 devices in 2 slices" in text(browser, "#subtitle")
    assert browser("document.querySelectorAll('#mesh .slice').length") == 2
    assert browser("document.querySelectorAll('#mesh .cell').length") == 16
    titles = browser("[...document.querySelectorAll('#mesh .cell')].map((e) => e.title)")
    assert titles[9] == "device 9: data 1, fsdp 0, tensor 1"
    assert browser("document.querySelectorAll('#memory .device').length") == 16
    assert "mu" in text(browser, "#memory .legend")
    assert text(browser, "#count") == f"{len(values['leaves'])} leaves"
    assert paths(browser) == [leaf["path"] for leaf in values["leaves"]]


def check_problems(browser: Browser) -> None:
    assert "did you mean 'embed'?" in text(browser, "#problems")
    assert text(browser, "#problems h2") == "1 problem"  # of a parameter, and of its moment
    assert text(browser, "#problems li").endswith("(and 1 leaf as it)")
    assert text(browser, "#facts .wrong dd") == "1"
    browser.click("#problems li button")
    assert "emebd" in text(browser, "#panel .problem")
    browser.press("Escape", 27)
    assert browser("document.getElementById('panel').hidden")


def check_search(browser: Browser, values: dict[str, Any]) -> None:
    search(browser, "LAYERS_1 kernel", 3)
    assert paths(browser) == [f"params/layers_{i}/kernel" for i in (1, 10, 11)]
    assert text(browser, "#count").startswith("3 of ")
    search(browser, "taken by dim 0", 12)
    search(browser, "no such leaf", 0)
    assert not browser("document.getElementById('empty').hidden")
    search(browser, "onerror", 1)
    assert not browser("Boolean(document.querySelector('img'))")
    search(browser, "", 0) if not values["leaves"] else None
    browser("document.getElementById('search').value = 'x'")
    browser("document.getElementById('search').select()")
    browser.press("Backspace", 8)
    browser.wait_for(
        f"document.querySelectorAll('#table tbody tr').length === {len(values['leaves'])}"
    )


def check_sort(browser: Browser, values: dict[str, Any]) -> None:
    sizes = {leaf["path"]: leaf["bytes_per_device"] for leaf in values["leaves"]}
    browser.click("#table th.bytes button")
    assert text(browser, "#table th[aria-sort=descending]").startswith("Bytes")
    assert [sizes[p] for p in paths(browser)] == sorted(sizes.values(), reverse=True)
    browser.click("#table th.bytes button")
    assert [sizes[p] for p in paths(browser)] == sorted(sizes.values())
    browser.click("#table th.path button")
    numbered = [p for p in paths(browser) if re.fullmatch(r"params/layers_\d+/kernel", p)]
    assert numbered == [f"params/layers_{i}/kernel" for i in range(12)]
    browser.click("#filters button[data-key='bad']")
    assert paths(browser) == [f"{part}/layers_7x/kernel" for part in ("mu", "params")]
    browser.click("#filters button[data-key='all']")


def check_panel(browser: Browser) -> None:
    browser("rowOf(leaves.findIndex((l) => l.path === 'params/layers_2/kernel')).id = 'wanted'")
    browser.click("#wanted")
    panel = text(browser, "#panel")
    assert "params/layers_2/kernel" in panel and "P('fsdp', 'tensor')" in panel
    assert "8 parts, each on 2 devices" in panel and "96 → 48 a device" in panel
    assert "gives up fsdp: taken by dim 0 'embed'" in panel and "takes tensor, 2 parts" in panel
    lost = browser("[...document.querySelectorAll('#panel .lost')].map((e) => e.textContent)")
    assert lost == ["fsdp?"]
    held = browser("[...document.querySelectorAll('#panel .cell')].map((e) => e.title)")
    assert held[3] == "device 3 (data 0, fsdp 1, tensor 1): part 3, [16:32, 48:96]"
    assert held[11].endswith("part 3, [16:32, 48:96]")  # its copy in the other slice
    assert browser("location.hash") == "#params%2Flayers_2%2Fkernel"


def check_keys(browser: Browser) -> None:
    """From the panel back to the table, down a row, and to the search, without a mouse."""
    browser.press("Escape", 27)
    assert browser("document.activeElement.id") == "wanted"
    browser.press("ArrowDown", 40)
    browser.press("Enter", 13, "\r")
    assert "params/layers_3/kernel" in text(browser, "#panel h2")
    assert browser("document.activeElement.id") == "panel"
    browser.press("Escape", 27)
    browser.press("/", 191, "/")
    assert browser("document.activeElement.id") == "search"
    assert browser("document.getElementById('search').value") == ""


def check_themes(browser: Browser) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser(paper)
    browser.prefer("dark")
    browser.wait_for("document.getElementById('theme').ariaPressed === 'true'")
    dark = browser(paper)
    assert light != dark
    browser.click("#theme")
    assert browser(paper) == light
    browser.click("#theme")
    assert browser(paper) == dark


def check_narrow(browser: Browser) -> None:
    browser.resize(400, 800)
    browser.wait_for("document.documentElement.scrollWidth <= 400")


def check_two_thousand(browser: Browser) -> None:
    """Only what is looked at is made; the last row can be reached, and any be found."""
    made = "document.querySelectorAll('#table tbody tr').length"
    assert text(browser, "#count") == "2,000 leaves"
    assert browser(made) < 400
    browser("focusPlace(0)")
    browser.press("End", 35)
    assert browser(made) == 2000 and "layers_999" in browser("document.activeElement.innerText")
    search(browser, "layers_1234/", 1)
    assert paths(browser) == ["params/layers_1234/kernel"]


@pytest.mark.multiprocess
@pytest.mark.skipif(BROWSER is None, reason=NONE)
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    small = explain(many(14) | {"mu": moments()}, SPEC, RULES, title="a state")
    values = small.to_dict()
    pages = small.save(tmp_path / "small.html"), tmp_path / "large.html"
    explain(many(2000), "fsdp=64,tensor=8", RULES).save(pages[1])
    with Browser(BROWSER or "") as browser:
        browser.open(pages[0])
        check_what_is_shown(browser, values)
        check_problems(browser)
        check_search(browser, values)
        check_sort(browser, values)
        check_panel(browser)
        check_keys(browser)
        check_themes(browser)
        check_narrow(browser)
        browser.open(pages[1])
        check_two_thousand(browser)
        assert browser.faults == []
