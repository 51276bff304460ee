"""A headless Chromium that opens pages, waits for what they say, and takes pictures of them."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.waiting import LIMIT_S, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Chromium, driven over its DevTools protocol; a profile and a window of its own, ended with the block."""

    def __init__(self, folder: Path, *, width: int = 1600, height: int = 1000) -> None:
        self.folder, self.size = folder, f"{width},{height}"

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
        command += [f"--window-size={self.size}", f"--user-data-dir={self.folder / 'profile'}"]
        with open(self.folder / "chromium.log", "w") as log:
            command += ["--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            chosen = self.folder / "profile" / "DevToolsActivePort"
            until(
                lambda: chosen.exists() and chosen.read_text().strip(),
                ended=lambda: self.process.poll() is not None,
                said=lambda: "chromium does not start",
            )
            self.port = int(chosen.read_text().split()[0])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def look(
        self,
        url: str,
        path: Path,
        *,
        words: list[str],
        script: str = "",
        before: str = "",
        settle_s: float = 3.0,
    ) -> str:
        """Open a page, run `script` in it every half second until it shows all `words`, and store a PNG; what it says.

        `before` is run before the page's own code.

        AssertionError with the words that do not come and what the page says instead.
        """
        return asyncio.run(self._look(url, path, words, script, before, settle_s))

    async def _look(self, url: str, path: Path, words: list[str], script: str, before: str, settle_s: float) -> str:
        import aiohttp

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/json/list", timeout=LIMIT_S) as answer:
            (page, *_) = [target for target in json.load(answer) if target["type"] == "page"]
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            number = 0

            async def ask(method: str, **params: Any) -> Any:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": params})
                while True:
                    message = await socket.receive_json(timeout=LIMIT_S)
                    if message.get("id") == number:
                        return message.get("result", {})

            async def evaluate(expression: str) -> Any:
                found = await ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
                return found.get("result", {}).get("value")

            await ask("Page.enable")
            await ask("Page.addScriptToEvaluateOnNewDocument", source=before)
            await ask("Page.navigate", url="about:blank")
            await ask("Page.navigate", url=url)
            end = time.monotonic() + LIMIT_S
            while True:
                await evaluate(script)
                said = str(await evaluate("document.body ? document.body.innerText : ''"))
                missing = [word for word in words if word not in said]
                if not missing:
                    break
                if time.monotonic() > end:
                    shot = await ask("Page.captureScreenshot", format="png")
                    path.write_bytes(base64.b64decode(shot["data"]))
                    raise AssertionError(f"{url} does not show {missing} but:\n{said[:3000]}")
                await asyncio.sleep(0.5)
            await asyncio.sleep(settle_s)
            shot = await ask("Page.captureScreenshot", format="png")
            path.write_bytes(base64.b64decode(shot["data"]))
            return str(await evaluate("document.body.innerText"))
