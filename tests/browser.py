"""A Chromium without a window, spoken to through two pipes in its DevTools protocol: no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-extensions"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE = 60  # seconds until an answer must be there


class Tab:
    """One open tab; `requests` and `complaints` are those since the last `open`."""

    def __init__(self, send, receive):
        self._send, self._receive, self._count = send, receive, 0
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Ask for something and wait for the answer; what happens meanwhile is noted."""
        self._count += 1
        wanted = {"id": self._count, "method": method, "params": params}
        self._send(wanted | ({"sessionId": self._session} if self._session else {}))
        while (message := self._receive()).get("id") != self._count:
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def _note(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.responseReceived" and params["response"]["status"] >= 400:
            self.complaints.append(f"{params['response']['status']} {params['response']['url']}")
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            self.complaints.append(f"{params['errorText']} {params.get('type')}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([arg.get("value", arg.get("description")) for arg in params["args"]]))
        elif method == "Page.loadEventFired":
            self.loaded = True

    def open(self, url, width=1280, height=900, scheme="light"):
        """Show a page at a size, once all of it is loaded."""
        self._go("about:blank")  # the page before must not hear of the new scheme, and store it
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Storage.clearDataForOrigin", origin=url, storageTypes="local_storage")
        self._go(url)

    def _go(self, url):
        self.requests, self.complaints, self.loaded = [], [], False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self._note(self._receive())

    def evaluate(self, script):
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def picture(self, path, height=None):
        """Save a PNG of the page, from its top down to `height` or to its end."""
        whole = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": whole["width"], "height": height or whole["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(profile):
    """A tab of a Chromium of its own, which keeps its files in the folder `profile`."""
    to_child, commands = os.pipe()
    answers, from_child = os.pipe()
    line = f'exec "$@" 3<&{to_child} 4>&{from_child}'
    flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    with open(os.devnull, "w") as nowhere:
        child = subprocess.Popen(
            ["bash", "-c", line, "bash", CHROMIUM, *flags], pass_fds=(to_child, from_child), stderr=nowhere
        )
    os.close(to_child)
    os.close(from_child)
    os.set_blocking(answers, False)
    buffer = bytearray()

    def send(message):
        os.write(commands, json.dumps(message).encode() + b"\0")

    def receive():
        end = time.monotonic() + PATIENCE
        while b"\0" not in buffer:
            try:
                part = os.read(answers, 1 << 20)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError("the browser does not answer") from None
                time.sleep(0.005)
                continue
            if not part:
                raise RuntimeError("the browser is gone")
            buffer.extend(part)
        message, _, rest = bytes(buffer).partition(b"\0")
        buffer[:] = rest
        return json.loads(message)

    try:
        tab = Tab(send, receive)
        yield tab
        send({"id": 0, "method": "Browser.close"})
    finally:
        os.close(commands)
        os.close(answers)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
