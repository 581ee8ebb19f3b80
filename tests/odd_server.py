"""An OpenAI-style chat server whose answers are odd in turn: `python odd_server.py` prints its URL, ends in a minute.

The answer to the request with X-Request-Id n has the shape `SHAPES[n % len(SHAPES)]`. The first token comes after
`FIRST` s, the others `GAP` s apart. It refuses every key of a request that OpenAI's own documentation does not have.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from typing import Any

from aiohttp import web

TOKENS = 20
FIRST, GAP = 0.06, 0.005
HANG = 20.0  # s that a connection outlives its `[DONE]`
KNOWN = {"messages", "model", "max_tokens", "temperature", "stream", "stream_options"}
# whole answers: TOKENS tokens each
WHOLE = (
    *("plain", "bundled", "counted", "reasoning", "reasoning_content", "refusal", "tools", "function", "empty", "held"),
    *("roles", "choices", "null_usage", "hang", "silent_end", "json", "gzip", "deflate", "bare", "crlf", "cr", "bom"),
    *("lines", "comments", "split"),
)
SHORT = ("cut", "stop", "filter")  # half of them
LONG = ("over",)  # twice as many
FAILED = ("error_event", "error_text", "detail", "page", "json_error")
SHAPES = (*WHOLE, *SHORT, *LONG, *FAILED)
BUNDLES = (1, 5, 2, 4, 3, 5)  # tokens of each event, where the server counts them in every event


def event(data: Any, shape: str = "") -> bytes:
    """One event, in the way of a shape."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    if shape == "lines" and not isinstance(data, str):
        text = json.dumps(data, indent=1)
    raw = "".join(f"data:{'' if shape == 'bare' else ' '}{line}\n" for line in text.split("\n")) + "\n"
    if shape == "comments":
        raw = ": still here\n\nretry: 5\n" + raw
    if shape in ("crlf", "cr"):
        raw = raw.replace("\n", "\r\n" if shape == "crlf" else "\r")
    return raw.encode()


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of a chat's answer."""
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more


def delta_of(shape: str, token: int) -> dict[str, Any]:
    """What a shape's delta of one token is."""
    if shape in ("reasoning", "reasoning_content") and token < TOKENS // 2:
        return {shape: f" w{token}", "content": None}
    if shape == "refusal":
        return {"refusal": " no"}
    if shape == "tools":
        return {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}
    if shape == "function":
        return {"function_call": {"arguments": "{"}}
    if (shape == "empty" and token % 3 == 0) or (shape == "held" and token in (0, TOKENS - 1)):
        return {"content": ""}
    if shape == "roles":
        return {"role": "assistant", "content": " w" if token % 4 else ""}
    return {"content": " ü" if shape == "split" else " w"}


class Answer:
    """One answer on its way."""

    def __init__(self, request: web.Request, shape: str):
        self.request, self.shape = request, shape
        packed = shape in ("gzip", "deflate")
        self.out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if packed:
            self.out.headers["Content-Encoding"] = shape
        self.pack = zlib.compressobj(wbits=31 if shape == "gzip" else 15) if packed else None

    async def send(self, raw: bytes) -> None:
        if self.pack is not None:
            raw = self.pack.compress(raw) + self.pack.flush(zlib.Z_SYNC_FLUSH)
        pieces = [raw[i : i + 7] for i in range(0, len(raw), 7)] if self.shape == "split" else [raw]
        for piece in pieces:
            await self.out.write(piece)

    async def stream(self) -> web.StreamResponse:
        shape = self.shape
        await self.out.prepare(self.request)
        if shape == "bom":
            await self.send(b"\xef\xbb\xbf")
        await self.send(event(chunk({"role": "assistant", "content": ""}), shape))
        await asyncio.sleep(FIRST)
        length = TOKENS // 2 if shape in SHORT else 2 * TOKENS if shape in LONG else TOKENS
        bundles = BUNDLES if shape == "counted" else (4,) * (length // 4) if shape == "bundled" else (1,) * length
        done = 0
        for n in bundles:
            if done:
                await asyncio.sleep(GAP * n)
            said = chunk(delta_of(shape, done))
            done += n
            if shape == "counted":
                said["usage"] = {"prompt_tokens": 9, "completion_tokens": done}
            if shape == "choices":
                said["choices"].append({"index": 1, "delta": {}, "finish_reason": None})
            await self.send(event(said, shape))
            if shape in FAILED and done > length // 2:
                return await self.fail()
        if shape == "null_usage":
            await self.send(event(chunk({}, "length", usage=None), shape))
        else:
            reason = {"stop": "stop", "filter": "content_filter"}.get(shape, "length")
            await self.send(event(chunk({"content": ""}, reason), shape))
            usage = {"prompt_tokens": 9, "completion_tokens": length, "total_tokens": 9 + length}
            usage |= {"completion_tokens_details": {"reasoning_tokens": length // 2}}
            await self.send(event({"id": "x", "choices": [], "usage": usage}, shape))
        if shape != "silent_end":
            await self.send(event("[DONE]", shape))
        if shape in ("hang", "silent_end"):
            await asyncio.sleep(HANG)
        return self.out

    async def fail(self) -> web.StreamResponse:
        if self.shape == "error_event":
            await self.out.write(b"event: error\n")
            await self.send(event({"object": "error", "message": "engine died", "type": "InternalServerError"}))
        elif self.shape == "error_text":
            await self.send(event({"error": "engine died"}))
        else:
            await self.send(event({"detail": "engine died"}))
        return self.out


async def answer(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    prompt = len(body["messages"][0]["content"].split())
    if unknown := sorted(set(body) - KNOWN | set(body.get("stream_options", {})) - {"include_usage"} - KNOWN):
        return web.json_response({"error": {"message": f"unknown: {unknown[0]}", "code": None}}, status=400)
    number = int(request.headers.get("X-Request-Id", "-1"))
    shape = SHAPES[number % len(SHAPES)] if number >= 0 else "plain"
    if shape == "page":
        return web.Response(text="<!doctype html><title>Log in</title>", content_type="text/html")
    if shape == "json_error":
        return web.json_response({"object": "error", "message": "engine died", "code": 503})
    if shape == "json" or not body.get("stream"):
        n = body["max_tokens"]
        await asyncio.sleep(FIRST + GAP * n)
        choice = {"index": 0, "message": {"role": "assistant", "content": "w " * n}, "finish_reason": "length"}
        usage = {"prompt_tokens": prompt, "completion_tokens": n}
        return web.json_response({"choices": [choice], "usage": usage}, dumps=lambda x: json.dumps(x, indent=1))
    return await Answer(request, shape).stream()


async def models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "odd"}]})


async def main() -> None:
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main())
