"""Fakes that we ship and use ourselves: a scripted model, and a real HTTP teacher that counts its calls.

    with LocalTeacher(lambda body: "[f(a=1)]", log="calls.jsonl") as teacher:
        ...ModelConfig(engine="openai", url=teacher.url, model="any")...
        assert max(teacher.calls().values()) == 1

Both answer deterministically. Out of scope: streaming, and everything else of OpenAI's API.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stillroom.errors import ModelError
from stillroom.schema import Completion, GenerateParams, Message, ToolCall, ToolSpec, digest, prompt_digest

Answer = str | Message | Completion | ModelError
MAX_REQUEST_BYTES = 64 * 2**20


class ScriptedModel:
    """A ChatModel that says what it was told to.

    Args:
        answers: a function of (messages, tools); or a mapping from the last message's text; or a list that is
            read once, one entry a call. An answer is text, a Message, a Completion, or an error to raise.
        name: the model's name; its identity too.

    Attributes:
        asked: every conversation it was given, in order.
    """

    def __init__(
        self,
        answers: Callable[[Sequence[Message], Sequence[ToolSpec]], Answer] | Mapping[str, Answer] | Sequence[Answer],
        name: str = "scripted",
    ) -> None:
        self._answers, self._name = answers, name
        self.identity = digest({"scripted": name})
        self.asked: list[tuple[Message, ...]] = []

    @property
    def name(self) -> str:
        return self._name

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """The scripted answer; its tokens are words. Raises ModelError where the script has none."""
        self.asked.append(tuple(messages))
        answer = self._answer(messages, tools)
        if isinstance(answer, ModelError):
            raise answer
        if isinstance(answer, Completion):
            return answer
        message = Message("assistant", answer) if isinstance(answer, str) else answer
        read = sum(len(turn.content.split()) for turn in messages)
        finish = "tool_calls" if message.tool_calls else "stop"
        return Completion(message, self.name, finish, read, len(message.content.split()) or 1, latency_s=0.0)

    def close(self) -> None:
        """Nothing to close."""

    def _answer(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Answer:
        if callable(self._answers):
            return self._answers(messages, tools)
        if isinstance(self._answers, Mapping):
            text = messages[-1].content
            return self._answers.get(text, ModelError(f"the script has no answer to {text!r}"))
        index = len(self.asked) - 1
        if index >= len(self._answers):
            raise ModelError(f"the script has {len(self._answers)} answers, and was asked {index + 1} times")
        return self._answers[index]


class LocalTeacher:
    """A chat-completions server on the loopback interface, at `url`, from `start` (or `with`) to `close`.

    Args:
        answer: a function of the request body (a dict), or a mapping from the last message's text, to the answer:
            text, a Message (with calls), or a whole response body as a dict.
        log: a file to which each request is appended, before it is answered, as `{"prompt", "status"}`; `calls`
            counts from it, and it outlives client and server. `prompt` is `schema.prompt_digest` of what came.
        delay_s: pause before each answer, in seconds.
        fail_first: so many requests, counted over the server's life, are answered by `fail_status`.
        retry_after: the Retry-After header of those, if any.
        api_key: if given, requests without it get 401.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Any] | Mapping[str, Any],
        *,
        log: str | Path | None = None,
        delay_s: float = 0.0,
        fail_first: int = 0,
        fail_status: int = 429,
        retry_after: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.answer, self.log, self.delay_s = answer, Path(log) if log else None, delay_s
        self.fail_first, self.fail_status, self.retry_after = fail_first, fail_status, retry_after
        self.api_key = api_key
        self.requests: list[dict[str, Any]] = []
        self._entries: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The base URL, as `ModelConfig.url` takes it; known once it is started."""
        if self._server is None:
            raise RuntimeError("the teacher is not started; use it in a `with` block")
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def start(self) -> LocalTeacher:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.teacher = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def __enter__(self) -> LocalTeacher:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def calls(self, status: int = 200) -> Counter[str]:
        """How often each prompt was answered with `status`, by its digest; from the log where there is one."""
        if self.log is None:
            with self._lock:
                return Counter(prompt for prompt, given in self._entries if given == status)
        if not self.log.exists():
            return Counter()
        lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return Counter(line["prompt"] for line in lines if line["status"] == status)

    def respond(self, body: dict[str, Any], authorization: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body for one request; counts it first."""
        status, headers = 200, {}
        with self._lock:
            if self.api_key is not None and authorization != f"Bearer {self.api_key}":
                status = 401
            elif self.fail_first > 0:
                self.fail_first -= 1
                status = self.fail_status
                headers = {"Retry-After": self.retry_after} if self.retry_after is not None else {}
            self.requests.append(body)
            self._count(body, status)
        time.sleep(self.delay_s)
        if status != 200:
            return status, headers, {"error": {"message": f"scripted failure {status}", "type": "scripted"}}
        given = self.answer(body) if callable(self.answer) else self.answer[body["messages"][-1]["content"]]
        return 200, {}, given if isinstance(given, dict) else _completion_body(body, given)

    def _count(self, body: dict[str, Any], status: int) -> None:
        prompt = wire_digest(body)
        self._entries.append((prompt, status))
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": prompt, "status": status}) + "\n")


def wire_digest(body: Mapping[str, Any]) -> str:
    """`schema.prompt_digest` of a chat-completions request: equals the sender's where tool names needed no change."""
    from stillroom.toolcalls import read_tools

    messages = []
    for turn in body["messages"]:
        functions = [call["function"] for call in turn.get("tool_calls", ())]
        calls = tuple(ToolCall(function["name"], json.loads(function["arguments"])) for function in functions)
        messages.append(Message(turn["role"], turn.get("content") or "", calls))
    return prompt_digest(messages, read_tools(body["tools"]) if body.get("tools") else ())


def _completion_body(request: Mapping[str, Any], answer: str | Message) -> dict[str, Any]:
    message = Message("assistant", answer) if isinstance(answer, str) else answer
    wire: dict[str, Any] = {"role": "assistant", "content": message.content or None}
    if message.tool_calls:
        wire["tool_calls"] = [
            {
                "id": f"call_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for index, call in enumerate(message.tool_calls)
        ]
    read = sum(len(str(turn.get("content")).split()) for turn in request["messages"])
    written = max(1, len(message.content.split()) + 4 * len(message.tool_calls))
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model", ""),
        "choices": [{"index": 0, "message": wire, "finish_reason": "tool_calls" if message.tool_calls else "stop"}],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    teacher: LocalTeacher

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is what this server is for: no traceback on stderr."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= MAX_REQUEST_BYTES or self.path != "/v1/chat/completions":
            self._send(404, {}, {"error": {"message": f"there is nothing at {self.path}"}})
            self.close_connection = True
            return
        try:
            body = json.loads(self.rfile.read(length))
            status, headers, answer = self.server.teacher.respond(body, self.headers.get("Authorization", ""))
        except (ValueError, KeyError, TypeError) as error:
            status, headers, answer = 400, {}, {"error": {"message": f"{type(error).__name__}: {error}"}}
        self._send(status, headers, answer)

    def _send(self, status: int, headers: Mapping[str, str], answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: `log` has what happened."""
