"""Amazon Bedrock, or a service that speaks its runtime API, through boto3's Converse.

Credentials and region come from where boto3 finds them. boto3 is not asynchronous, so calls run on as
many threads as `concurrency`; its own retries are switched off, since `ask` retries and keeps count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
)

from stillroom.engines.base import Engine
from stillroom.engines.bedrock_wire import read_response, write_request
from stillroom.engines.config import ModelConfig
from stillroom.engines.names import SafeNames
from stillroom.engines.openai import retry_after
from stillroom.engines.prompts import PYTHON_PROMPT, with_python_tools
from stillroom.errors import ModelError, ModelRefused, ModelUnavailable
from stillroom.schema import Completion, GenerateParams, Message, ToolSpec

RETRIABLE = frozenset({408, 424, 429, 500, 502, 503, 504})


class BedrockModel(Engine):
    """One model id of Bedrock.

    Raises:
        ModelError: no region is configured.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.tool_format = "native" if config.tool_format == "auto" else config.tool_format
        shown_as = {"native": "native", "python": PYTHON_PROMPT}[self.tool_format]
        parts = {"model": config.model, "url": config.url, "tools": shown_as, "extra": config.extra_body}
        super().__init__(config, str(config.model), parts)
        options = Config(
            connect_timeout=min(10.0, config.timeout_s),
            read_timeout=config.timeout_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=self.concurrency,
        )
        try:
            self._client: Any = boto3.Session().client(
                "bedrock-runtime", region_name=config.region, endpoint_url=config.url, config=options
            )
        except NoRegionError as error:
            raise ModelError(
                "no AWS region is set.\nhelp: set `region` in the config, or AWS_DEFAULT_REGION."
            ) from error
        except (BotoCoreError, ValueError) as error:
            raise ModelError(f"boto3 cannot make a client for {self.name}: {error}.") from error
        self._pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="bedrock")

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """Answer one conversation. `constrain` asks for some tool (`toolChoice: any`); schemas are the service's care.

        Raises:
            ModelRefused: bad request, no access, no credentials, unknown model.
            ModelUnavailable: throttled, not ready, timed out, internal errors, no connection.
            ModelError: the answer is none.
        """
        names = SafeNames(tools)
        if self.tool_format == "python":
            if params.constrain and tools:
                raise ModelRefused(
                    f"{self.name}: Converse constrains calls only where it knows the tools.\n"
                    "help: use `tool_format: native` for constrained calls."
                )
            messages, tools = with_python_tools(messages, tools), ()
        request = {"modelId": self.config.model, **write_request(messages, tools, params, names)}
        if self.config.extra_body:
            request["additionalModelRequestFields"] = self.config.extra_body
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._converse, request, names)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._client.close()

    def _converse(self, request: dict[str, Any], names: SafeNames) -> Completion:
        started = time.perf_counter()
        try:
            response = self._client.converse(**request)
        except ClientError as error:
            raise self._client_error(error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise ModelRefused(
                f"{self.name}: {error}.\nhelp: set up AWS credentials where boto3 finds them."
            ) from error
        except (HTTPClientError, EndpointConnectionError, ConnectionClosedError) as error:
            raise ModelUnavailable(f"{self.name} cannot be reached: {error}.") from error
        except BotoCoreError as error:  # what boto3 refuses to send, or cannot read
            raise ModelRefused(f"{self.name}: boto3 refuses the request: {error}.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # botocore's parsers on a broken body
            raise ModelError(f"{self.name} answered with something that boto3 cannot read: {error!r}.") from error
        latency_s = time.perf_counter() - started
        response.pop("ResponseMetadata", None)
        answer = read_response(response, names)
        return self._completion(
            answer.message, answer.finish_reason, answer.input_tokens or 0, answer.output_tokens or 0, latency_s
        )

    def _client_error(self, error: ClientError) -> ModelError:
        meta = error.response.get("ResponseMetadata", {})
        said = error.response.get("Error", {})
        what = f"{self.name} answered {said.get('Code', '?')}: {said.get('Message', error)}"
        status = meta.get("HTTPStatusCode", 0)
        if status in RETRIABLE or status >= 500:
            return ModelUnavailable(what, retry_after_s=retry_after(meta.get("HTTPHeaders", {}).get("retry-after")))
        return ModelRefused(f"{what}\nhelp: see the service's own words above.")
