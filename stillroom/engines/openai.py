"""Any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenAI itself.

    POST {url}/chat/completions      an answer
    POST {url}/...                   `request`, for what else the server offers

Nothing but the configured URL is contacted: redirects are not followed and proxy variables of the
environment are honoured only as httpx does. The key is read from the environment, sent, and struck
out of every message. An answer longer than `max_response_bytes` is refused while it arrives.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from stillroom.engines.base import Engine
from stillroom.engines.budget import BYTES_PER_TOKEN
from stillroom.engines.config import ModelConfig
from stillroom.engines.loops import LoopThread
from stillroom.engines.names import SafeNames
from stillroom.engines.openai_wire import (
    error_text,
    read_answer,
    schema_of_calls,
    shown,
    with_calls_of_schema,
    write_messages,
)
from stillroom.engines.prompts import JSON_PROMPT, PYTHON_PROMPT, with_json_tools, with_python_tools
from stillroom.errors import ModelError, ModelRefused, ModelUnavailable
from stillroom.schema import Completion, GenerateParams, Message, ToolSpec, canonical_json, to_dict

RETRIABLE = frozenset({408, 409, 425, 429})


class OpenAIModel(Engine):
    """One model behind one base URL.

    Raises:
        ModelError: the URL is none, or an environment variable that the config names is not set.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._secrets: list[str] = []
        headers = {name: self._expanded(value) for name, value in config.headers.items()}
        if config.api_key_env is not None:
            headers["Authorization"] = f"Bearer {self._environment(config.api_key_env)}"
        base = str(config.url).rstrip("/")
        if not re.match(r"https?://[^/\s]+", base):
            raise ModelError(
                f"{config.url!r} is no http(s) URL.\nhelp: give the base URL, as http://localhost:8000/v1."
            )
        self._url = base
        self.tool_format = "native" if config.tool_format == "auto" else config.tool_format
        shown_as = {"native": "native", "python": PYTHON_PROMPT}[self.tool_format]
        constraint = [feature for feature in ("grammar", "strict_tools", "json_schema") if feature in config.supports]
        parts = {"url": base, "model": config.model, "tools": shown_as, "extra": config.extra_body}
        super().__init__(config, str(config.model), {**parts, "constraint": [*constraint[:1], JSON_PROMPT]})
        self._constraint = constraint[0] if constraint else None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        self._client: httpx.AsyncClient | None = None
        self._loop: LoopThread | None = None

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """Answer one conversation. Calls in `tool_calls` of the response come back as `Message.tool_calls`.

        Raises:
            ModelRefused: 4xx other than those below, or constrained calls that the server does not support.
            ModelUnavailable: 408, 409, 425, 429, 5xx, no connection, no answer within `timeout_s`, no JSON.
            ModelError: it answered with something else than a chat completion.
        """
        names = SafeNames(tools)
        body = self.request_body(messages, tools, params, names)
        started = time.perf_counter()
        response = await self.request("chat/completions", body)
        latency_s = time.perf_counter() - started
        answer = read_answer(response, names)
        if "response_format" in body:
            answer = with_calls_of_schema(answer)
        # Servers that count nothing must not make a budget believe that nothing was spent.
        given = answer.input_tokens if answer.input_tokens is not None else _guess(body)
        written = answer.output_tokens if answer.output_tokens is not None else _guess(to_dict(answer.message))
        return self._completion(answer.message, answer.finish_reason, given, written, latency_s)

    async def request(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers to `body` at `path` below its base URL.

        Raises:
            ModelRefused, ModelUnavailable, ModelError: as `generate`.
        """
        if self._loop is None:
            self._loop = LoopThread(f"{self.name} client")
        return await self._loop.run(self._post(path, body))

    def request_body(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], params: GenerateParams, names: SafeNames
    ) -> dict[str, Any]:
        """What `generate` posts: the conversation, how to answer, and tools under names that the API allows."""
        limit = "max_completion_tokens" if "max_completion_tokens" in self.config.supports else "max_tokens"
        body: dict[str, Any] = {
            "model": self.config.model,
            "temperature": params.temperature,
            limit: params.max_tokens,
            **({"seed": params.seed} if "seed" in self.config.supports else {}),
            **({"stop": list(params.stop)} if params.stop else {}),
        }
        if tools and params.constrain:
            messages, further = self._constrained(messages, tools, names)
            body |= further
        elif tools and self.tool_format == "native":
            body["tools"] = [_tool(tool) for tool in names.tools(tools)]
        else:
            messages = with_python_tools(messages, tools)
        return {**body, "messages": write_messages(messages, names), **self.config.extra_body}

    def close(self) -> None:
        client, loop, self._client, self._loop = self._client, self._loop, None, None
        if loop is not None:
            loop.close(client.aclose() if client is not None else None)

    def _constrained(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], names: SafeNames
    ) -> tuple[Sequence[Message], dict[str, Any]]:
        if self._constraint == "grammar":
            from stillroom.toolcalls import grammar

            return with_python_tools(messages, tools), {"grammar": grammar(tools, "python")}
        if self._constraint == "strict_tools":
            strict = [_tool(tool, strict=True) for tool in names.tools(tools)]
            return messages, {"tools": strict, "tool_choice": "required"}
        if self._constraint == "json_schema":
            schema = {"name": "calls", "schema": schema_of_calls(tools), "strict": True}
            wanted = {"response_format": {"type": "json_schema", "json_schema": schema}}
            return with_json_tools(messages, tools), wanted
        raise ModelRefused(
            f"{self.name} is asked for constrained calls, and its config does not say how its server constrains.\n"
            "help: set `supports: [grammar]`, `[strict_tools]` or `[json_schema]` to what the server honours."
        )

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The response body as JSON; runs on the engine's own loop."""
        url = f"{self._url}/{path}"
        if self._client is None:
            limits = httpx.Limits(max_connections=max(100, self.concurrency))
            self._client = httpx.AsyncClient(headers=self._headers, timeout=self.config.timeout_s, limits=limits)
        try:
            async with asyncio.timeout(self.config.timeout_s):  # httpx's own bounds each read, not the whole
                data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
                async with self._client.stream("POST", url, content=data) as response:
                    text = await self._read(response)
        except TimeoutError as error:
            raise self._unavailable(f"gave no whole answer within {self.config.timeout_s:g} s") from error
        except httpx.DecodingError as error:
            raise ModelError(f"{self.name} at {self._url} sent a damaged body: {self._clean(str(error))}") from error
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as error:
            raise ModelRefused(f"{url} cannot be requested: {self._clean(str(error))}.") from error
        except httpx.TransportError as error:
            reason = self._clean(str(error)) or type(error).__name__
            raise self._unavailable(f"cannot be reached: {reason}") from error
        if not response.is_success:
            raise self._failure(response, text)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            # A gateway's page or a cut body: the next try is often answered, and a prompt lost is paid for in accuracy.
            raise self._unavailable(f"did not answer in JSON: {self._clean(shown(text))}") from error

    async def _read(self, response: httpx.Response) -> str:
        parts, size = [], 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > self.config.max_response_bytes:
                raise ModelError(
                    f"{self.name} at {self._url} answered with more than {self.config.max_response_bytes:,} bytes; "
                    "the rest was not read.\nhelp: raise `max_response_bytes` if such answers are meant."
                )
            parts.append(part)
        return b"".join(parts).decode("utf-8", "replace")

    def _failure(self, response: httpx.Response, text: str) -> ModelError:
        status, said = response.status_code, self._clean(error_text(text))
        what = f"{self.name} at {self._url} answered {status} {response.reason_phrase}: {said}"
        # An exhausted quota comes as 429 as well, but no pause mends it.
        if status >= 500 or (status in RETRIABLE and "insufficient_quota" not in text):
            return ModelUnavailable(what, retry_after_s=retry_after(response.headers.get("Retry-After")))
        helps = {
            401: f"check the key in `{self.config.api_key_env or 'api_key_env'}`",
            403: f"check what the key in `{self.config.api_key_env or 'api_key_env'}` may use",
            404: "check `url` (it usually ends in /v1) and `model`",
            429: "the account's quota is used up",
        }
        hint = helps.get(status, "see the server's own words above" if status < 400 or said else "check the request")
        return ModelRefused(f"{what}\nhelp: {hint}.")

    def _unavailable(self, what: str) -> ModelUnavailable:
        return ModelUnavailable(f"{self.name} at {self._url} {what}.\nhelp: check that the server runs, and `url`.")

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text

    def _expanded(self, value: str) -> str:
        return re.sub(r"\$([A-Za-z_][A-Za-z0-9_]*)", lambda found: self._environment(found[1]), value)

    def _environment(self, name: str) -> str:
        value = os.environ.get(name, "").strip()
        if not value:
            raise ModelError(f"the environment variable {name} is not set.\nhelp: export {name}=..., then run again.")
        self._secrets.append(value)
        return value


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or an HTTP date); None where it says nothing readable."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.timestamp() - (time.time() if now is None else now))
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _tool(tool: ToolSpec, *, strict: bool = False) -> dict[str, Any]:
    from stillroom.toolcalls import write_tools

    written = write_tools([tool], "openai")[0]
    if strict:
        written["function"]["strict"] = True
    return written


def _guess(value: Any) -> int:
    return int(len(canonical_json(value).encode("utf-8", "replace")) / BYTES_PER_TOKEN) + 1
