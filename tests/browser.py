"""A real browser for tests of pages: headless Chromium, spoken to over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_S = 60
# The browser reads from file descriptor 3 and writes to 4. Copies above them first: the given ones may be 3 or 4.
_START = """
import fcntl, os, sys
given = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for copy, wanted in zip(given, (3, 4)):
    os.dup2(copy, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    """The browser's path, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. `problems` collects errors of its scripts and everything that its security policy refused."""

    def __init__(self, commands: int, answers: Any) -> None:
        self.problems: list[str] = []
        self._commands, self._answers = commands, answers
        self._number = 0
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def open(self, place: Path | str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a local file or an address in a window of this size and wait until it is loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.send("Page.navigate", url=place if isinstance(place, str) else place.resolve().as_uri())
        self._wait_for("Page.loadEventFired")

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page and return its value, of a promise what it resolves to."""
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, expression: str, patience_s: float = 20) -> Any:
        """Return the value of an expression as soon as it is true."""
        look = """new Promise((resolve, reject) => {{
            const end = Date.now() + {ms};
            const look = () => {{
                let value = null;
                try {{ value = ({expression}); }} catch (error) {{ value = null; }}
                if (value) resolve(value);
                else if (Date.now() > end) reject(new Error("not so: " + {name} + " | " + document.body.innerText));
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        return self.run(look.format(expression=expression, name=json.dumps(expression), ms=round(1000 * patience_s)))

    def press(self, *keys: str) -> None:
        """Press keys, by their names in `KeyboardEvent.key`, as a person does."""
        codes = {"Enter": 13, "Tab": 9, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        for key in keys:
            text = {"Enter": "\r", " ": " "}.get(key, "")
            about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def drag(self, *places: tuple[float, float]) -> None:
        """Press the mouse at the first place, move it over the others, let it go at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(places) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*places, places[-1]], strict=True):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self) -> bytes:
        """Return what the window shows, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _wait_for(self, event: str) -> None:
        while self._next().get("method") != event:
            pass

    def _next(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            data += byte
        message: dict[str, Any] = json.loads(data)
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded":
            self.problems.append(message["params"]["entry"]["text"])
        if message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] in ("error", "warning"):
            words = [str(word.get("description", word.get("value"))) for word in message["params"]["args"]]
            self.problems.append(" ".join(words))
        if message.get("method") == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {message['params']['message']}")
        return message


@contextmanager
def browser(program: str, profile: Path, *switches: str) -> Iterator[Page]:
    """Start the browser, with more command line switches if given, and give a tab; it is ended at the end."""
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    arguments += ["--remote-debugging-pipe", f"--user-data-dir={profile}", *switches]
    process = subprocess.Popen(
        [sys.executable, "-c", _START, str(to_browser), str(from_browser), program, *arguments],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        with os.fdopen(answers, "rb") as reader:
            yield Page(commands, reader)
    finally:
        os.close(commands)
        process.terminate()
        process.wait(PATIENCE_S)
