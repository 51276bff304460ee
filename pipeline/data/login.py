"""Logins of web sites that give their files to registered users only."""

from __future__ import annotations

import http.client
import http.cookiejar
import netrc
import os
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urlsplit

TIMEOUT_S = 60.0
"""Silence after which a connection counts as dropped."""

HEADERS = {"User-Agent": "mask2former-pipeline", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Login:
    """A site's login form: fields `username`, `password` and `submit`, answered by a redirect if they are right."""

    url: str
    register: str
    """Where an account is to be had."""
    username: str
    """Environment variable of the user name."""
    password: str
    """Environment variable of the password."""

    @property
    def machine(self) -> str:
        """The entry in netrc."""
        return urlsplit(self.url).hostname or ""


LOGINS = {
    # As cityscapesScripts logs in (mcordts/cityscapesScripts, cityscapesscripts/download/downloader.py).
    "cityscapes": Login(
        url="https://www.cityscapes-dataset.com/login/",
        register="https://www.cityscapes-dataset.com/register/",
        username="CITYSCAPES_USERNAME",
        password="CITYSCAPES_PASSWORD",
    )
}


def is_page(headers: Any) -> bool:
    return headers.get_content_type() in ("text/html", "application/xhtml+xml")


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: what was typed into a form goes to its own address and nowhere else."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def log_in(name: str) -> urllib.request.OpenerDirector:
    """An opener that holds the session's cookies, in memory only, and sends them to the site that set them.

    ValueError when there are no credentials or the site refuses them; OSError when it cannot be reached.
    """
    site = LOGINS[name]
    username, password, origin = _credentials(site)
    cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    form = urllib.request.build_opener(cookies, _Stay)
    fields = urlencode({"username": username, "password": password, "submit": "Login"}).encode()
    for data in (None, fields):  # the page first: it may set a cookie that the form needs
        try:
            form.open(urllib.request.Request(site.url, data, headers=HEADERS), timeout=TIMEOUT_S).close()
            redirected = False
        except urllib.error.HTTPError as error:
            error.close()
            if error.code >= 500 or error.code in (408, 425, 429):
                raise OSError(f"{site.url} answers {error.code} {error.reason}") from None
            redirected = error.code in (301, 302, 303)
    if not redirected:  # right credentials are answered by a redirect, wrong ones by the form again
        raise ValueError(f"{site.machine} refuses the user name and password from {origin}; correct them there")
    return urllib.request.build_opener(cookies)


def has_login(name: str) -> bool:
    """Whether there are credentials for a site; nobody is asked whether they are right."""
    try:
        _credentials(LOGINS[name])
    except ValueError:
        return False
    return True


def _credentials(site: Login) -> tuple[str, str, str]:
    """User name, password, and where they are from. Neither is ever part of a message."""
    username, password = os.environ.get(site.username), os.environ.get(site.password)
    if username and password:
        return username, password, f"{site.username} and {site.password}"
    if username or password:
        there, missing = (site.username, site.password) if username else (site.password, site.username)
        raise ValueError(f"{there} is set, but {missing} is not; set both")
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if path.is_file():
        try:
            entry = netrc.netrc(path).hosts.get(site.machine)
        except netrc.NetrcParseError as error:  # its message may quote a password
            raise ValueError(f"{path} cannot be read: line {error.lineno} is not in netrc's format") from None
        if entry and entry[2]:
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise ValueError(f"{path} holds passwords, but others may read it; run: chmod 600 {path}")
            return entry[0] or "", entry[2], str(path)
    raise ValueError(
        f"{site.machine} wants a login: register at {site.register}, then set {site.username} and {site.password} in "
        f"the environment, or write into {path}: machine {site.machine} login <user name> password <password>"
    )
