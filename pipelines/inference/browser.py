"""Which requests a web page may make of a server that asks for no login: none, but for pages that are named.

A page of anybody's, open in a browser on the same machine, reaches loopback: a form or a `fetch` costs the server its
work, and a page whose name is bound anew to 127.0.0.1 could read the answers. Browsers say with `Origin` (and cannot be
kept by a page from saying) where a POST comes from; programs send none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

ORIGIN, SITE = "origin", "sec-fetch-site"


def is_foreign_page(headers: Mapping[str, str], origins: Collection[str]) -> bool:
    """Whether a request comes from a web page that is not named.

    Args:
        headers: of the request, by lower-case name.
        origins: of the pages that may ask: scheme://host[:port], as browsers write it.
    """
    if (origin := headers.get(ORIGIN)) is not None:
        return origin not in origins
    return headers.get(SITE, "none") not in ("none", "same-origin")
