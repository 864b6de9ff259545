"""Logs in to Jupyter, runs one cell of a notebook through its API and prints what the cell printed.

Runs inside the container, with its Python: cell.py PORT password|token SECRET, the code on standard
input. Exits 3 when the log-in is refused.
"""

import asyncio
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from http.cookiejar import CookieJar

from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

port, kind, secret = sys.argv[1:]
address = f"http://127.0.0.1:{port}"
jar = CookieJar()
browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))


def cookies():
    return {cookie.name: cookie.value or "" for cookie in jar}


def ask(method, path, body):
    headers = {"Content-Type": "application/json", "X-XSRFToken": cookies().get("_xsrf", "")}
    if kind == "token":
        headers["Authorization"] = f"token {secret}"
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), headers, method=method
    )
    with browser.open(request) as answer:
        return json.load(answer)


def log_in():
    browser.open(address + "/login").close()
    form = {"password": secret, "_xsrf": cookies()["_xsrf"]}
    browser.open(address + "/login", urllib.parse.urlencode(form).encode()).close()


async def execute(kernel, code):
    pairs = "; ".join(f"{name}={value}" for name, value in cookies().items())
    headers = {"Cookie": pairs}
    if kind == "token":
        headers["Authorization"] = f"token {secret}"
    url = f"ws://127.0.0.1:{port}/api/kernels/{kernel}/channels"
    socket = await websocket_connect(HTTPRequest(url, headers=headers))
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "username": "",
              "session": uuid.uuid4().hex, "version": "5.3"}  # fmt: skip
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {},
               "allow_stdin": False}  # fmt: skip
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content,
               "channel": "shell", "buffers": []}  # fmt: skip
    await socket.write_message(json.dumps(message))
    while True:
        told = json.loads(await asyncio.wait_for(socket.read_message(), 60))
        if told["parent_header"].get("msg_id") != header["msg_id"]:
            continue
        if told["msg_type"] == "stream":
            print(told["content"]["text"], end="")
        if told["msg_type"] == "error":
            print("\n".join(told["content"]["traceback"]))
        if told["msg_type"] == "status" and told["content"]["execution_state"] == "idle":
            return


code = sys.stdin.read()
try:
    if kind == "password":
        log_in()
    cell = {"cell_type": "code", "id": "one", "source": code, "metadata": {}, "outputs": [],
            "execution_count": None}  # fmt: skip
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    ask("PUT", "/api/contents/work/one.ipynb", {"type": "notebook", "content": notebook})
    session = {"path": "work/one.ipynb", "type": "notebook", "name": "one",
               "kernel": {"name": "python3"}}  # fmt: skip
    made = ask("POST", "/api/sessions", session)
except urllib.error.HTTPError as error:
    print(f"refused with {error.code}", file=sys.stderr)
    sys.exit(3 if error.code in (401, 403) else 1)
asyncio.run(execute(made["kernel"]["id"], code))
