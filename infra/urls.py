"""URLs that can be shown: in messages, logs and pages. What may be a secret in them is replaced by ***.

Of query values only numbers of a few harmless names are shown: lists of secret names are never complete. Knows nothing
of what may be fetched.
"""

from __future__ import annotations

import re
from typing import Any, Final

MAX_URL_CHARACTERS: Final = 8192
HIDDEN: Final = "***"
_SHOWN_CHARACTERS: Final = 300
_HARMLESS_NAMES: Final = frozenset(
    ("channel", "end", "fps", "height", "partnumber", "quality", "rate", "start", "subtype", "width")
)
_HARMLESS_VALUE: Final = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,3})?")
_AUTHORITY: Final = re.compile(r"(\[[^\[\]@]*\]|[^:@\[\]]*)(:\d*)?")
_IN_TEXT: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")


def redact_url(url: str) -> str:
    """Return a URL without user info, fragment, and all values in it that may be secret. Never raises.

    Removed are query values except for numbers of harmless names, parameters in the path (`;session=...`,
    `token=...`), and the stream key of RTMP, which is all of its path but the first part. Long URLs are cut.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "", url
    rest = rest.partition("#")[0]
    rest, question, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    host = authority.rpartition("@")[2]
    # A password with a slash, a question mark or a hash in it ends the authority too early: then nothing is certain.
    is_torn = "@" in url and "@" not in authority and ":" in authority
    if is_torn or not _AUTHORITY.fullmatch(host):
        return _printable(f"{scheme}{mark}{HIDDEN}")
    shown = f"{scheme}{mark}{host}{slash}{_redacted_path(scheme.lower(), path)}"
    if question:
        shown += "?" + "&".join(_redacted_item(item) for item in query.split("&"))
    return _printable(shown)


def redact_text(text: str) -> str:
    """Return a text, such as a library's message, with every URL in it redacted."""
    return _IN_TEXT.sub(lambda match: redact_url(match.group()), text)


class SafeUrl:
    """A URL that shows itself redacted wherever it is printed; as it is only by `reveal`. Can be a pydantic field."""

    __slots__ = ("_url",)

    def __init__(self, url: str) -> None:
        self._url = url

    def reveal(self) -> str:
        """Return the URL with everything that is secret in it: for the one who fetches it."""
        return self._url

    def __str__(self) -> str:
        return redact_url(self._url)

    def __repr__(self) -> str:
        return f"SafeUrl({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SafeUrl) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    @classmethod
    def _validated(cls, value: Any) -> SafeUrl:
        if isinstance(value, SafeUrl):
            return value
        if not isinstance(value, str) or not 0 < len(value) <= MAX_URL_CHARACTERS:
            raise ValueError(f"a URL is a text of 1 to {MAX_URL_CHARACTERS} characters")
        return cls(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "format": "uri", "minLength": 1, "maxLength": MAX_URL_CHARACTERS}


def _redacted_path(scheme: str, path: str) -> str:
    if scheme in ("rtmp", "rtmps"):
        application, slash, key = path.partition("/")
        path = f"{application}{slash}{HIDDEN}" if key else path
    return "/".join(re.sub(r"([=;]).*", rf"\1{HIDDEN}", part) for part in path.split("/"))


def _redacted_item(item: str) -> str:
    name, equals, value = item.partition("=")
    if not equals:
        return HIDDEN if name else ""
    if name.lower() in _HARMLESS_NAMES and _HARMLESS_VALUE.fullmatch(value):
        return item
    return f"{name}={HIDDEN}"


def _printable(text: str) -> str:
    """On one line, so that a URL cannot write lines of its own into a log."""
    text = "".join(one if one.isprintable() else "?" for one in text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
