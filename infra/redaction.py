"""Text without secrets: for logs, where a library's message may quote what it was given.

Removed are API keys, JSON web tokens, credentials in headers, all that `infra.urls` does not show of URLs, and values
that are named like a secret. What is removed is replaced by ***. It is a last line of defence: whoever writes a message
leaves secrets out.
"""

from __future__ import annotations

import re
from typing import Final

from infra.urls import HIDDEN, redact_text

LONGEST: Final = 32 * 1024  # characters of a message; what is longer is cut before it is searched

_NAMES: Final = (
    r"(?:[\w-]{0,40}[_-])?"
    r"(?:api[_-]?key|apikey|access[_-]?key|secret|password|passwd|pwd|token|credential|signature|sig|cookie|jwt|auth)"
    r"(?:[_-](?:id|key))?"
)
_RULES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE | re.ASCII), replacement)
    for pattern, replacement in (
        # An API key of this service: its public part stays, so that an operator sees which one it was.
        (r"\b(upr_[0-9a-f]{16}_)[\w-]+", rf"\1{HIDDEN}"),
        (r"\bupr_(?![0-9a-f]{16}_\*)[\w-]{6,}", f"upr_{HIDDEN}"),
        # JSON web tokens (RFC 7519): a header that begins with {" in base64url, then one to four more parts.
        (r"\beyJ[\w-]{4,}(?:\.[\w-]*){1,4}", HIDDEN),
        # Authorization and cookies (RFC 9110, section 11.6.2), as a header, a dict or JSON: to the end of the value.
        (
            r"((?:proxy-)?authorization|(?:set-)?cookie)((?:[\"']?\s*[:=]|[\"']\s*,)\s*(?:b?[\"'])?)[^\r\n\"']+",
            rf"\1\2{HIDDEN}",
        ),
        # The same without their header, where the word behind the scheme looks like no word.
        (
            r"\b(bearer|basic|digest|negotiate)\s+(?=[\w+/=.~-]{0,200}(?:[\d=+/]|(?-i:[a-z][A-Z])))[\w+/=.~-]{6,}",
            rf"\1 {HIDDEN}",
        ),
        # name=value, "name": "value", name: value.
        (rf"(\b{_NAMES}[\"']?\s*[:=]\s*)(?!\*\*\*)(?:\"[^\"]*\"|'[^']*'|[^\s,;&\"'}})\]]+)", rf"\1{HIDDEN}"),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", HIDDEN),
    )
)


def redact(text: str) -> str:
    """Return the text without what looks like a secret. Takes time in proportion to its length, at most `LONGEST`."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ... ({len(text)} characters)"
    text = redact_text(text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
