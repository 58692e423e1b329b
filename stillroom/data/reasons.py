"""Why a record is rejected or warned about, and what to change: one code, one help text each.

The codes are part of the public interface: they stand in reports and in the rejections file, and
do not change. `Reason.help` is written for the person who has to repair the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stillroom.errors import DataError

EXCERPT_CHARS = 160


class Reason(StrEnum):
    """A reason code. `help` says what to change; `is_warning` is true where the record is accepted all the same."""

    help: str

    def __new__(cls, code: str, help: str = "") -> Reason:
        member = str.__new__(cls, code)
        member._value_ = code
        member.help = help
        return member

    @property
    def is_warning(self) -> bool:
        """Whether records with this finding are accepted."""
        return self in WARNINGS

    # The file as a whole.
    EMPTY_FILE = "empty_file", "Put one JSON object on each line, or leave the file out."
    WRONG_EXTENSION = "wrong_extension", "Rename the file to what its format uses: .jsonl (logs: .json.gz)."
    NOT_A_FILE = "not_a_file", "Give a regular file or a folder; pipes, devices and broken links are not read."
    UNREADABLE = "unreadable_file", "Check that the file is still there and that you may read it."
    NOT_JSON_LINES = "not_json_lines", "Write one object per line and no list around them: `jq -c '.[]' in > out`."
    OTHER_ENCODING = (
        "other_encoding",
        "Convert the file from the encoding that the message names: `iconv -f UTF-16 -t UTF-8 in > out`.",
    )
    OTHER_COMPRESSION = "other_compression", "Expand the file first; of compressed files only gzip is read."
    NOT_TEXT = "not_text", "Leave the file out, or export its records as JSON, one object on each line."
    TRUNCATED_GZIP = "truncated_gzip", "The file ends in the middle; copy it again. What stood before the cut was read."
    CORRUPT_GZIP = "corrupt_gzip", "The compressed data is damaged; copy it again and test it with `gzip -t`."
    GZIP_BOMB = "gzip_bomb", "The file expands beyond any real log; leave it out, or split it if it is genuine."
    TOO_MUCH_DATA = "too_much_data", "Split the data set, or raise the limit on total bytes."
    UNKNOWN_FORMAT = "unknown_format", "Name the format, or add the members that it requires."

    # The line as text.
    LINE_TOO_LONG = "line_too_long", "Shorten the record, or raise the limit on the bytes of a line."
    INVALID_UTF8 = "invalid_utf8", "Save the file as UTF-8: `iconv -f latin1 -t utf-8 in > out`, if it is Latin-1."
    INVALID_JSON = "invalid_json", "Write the record with a JSON library; look for single quotes and cut lines."
    DUPLICATE_KEYS = "duplicate_keys", "Keep one of the equal keys: JSON readers disagree about which of them counts."
    TOO_DEEP = "too_deep", "Flatten the record; no prompt or tool needs this many levels."
    NOT_A_NUMBER = "not_a_number", "Replace NaN, Infinity and numbers beyond a double by null or text."
    LONE_SURROGATE = "lone_surrogate", "A character was cut in half; write the text again from its source."
    NOT_AN_OBJECT = "not_an_object", "Each line must be one JSON object, {...}."

    # The record's form.
    WRONG_SCHEMA_VERSION = "wrong_schema_version", 'Set "schemaVersion": "bedrock-conversation-2024".'
    MISSING_FIELD = "missing_field", "Add the field that the message names."
    UNKNOWN_FIELD = "unknown_field", "Remove the field, or correct its spelling; the format allows no others."
    WRONG_TYPE = "wrong_type", "Change the value to the type that the message names."
    NO_MESSAGES = "no_messages", "Add at least one message with the role user."
    BAD_ROLE = "bad_role", "Use the roles that the format knows; the message names them."
    ROLES_NOT_ALTERNATING = "roles_not_alternating", "Start with the user, then alternate user and assistant."
    MULTI_TURN = (
        "multi_turn_not_supported",
        "Keep one user message and at most one answer, or choose a student that takes several turns.",
    )
    SYSTEM_BLOCKS = "several_system_blocks", "Join the system texts into one block."
    CONTENT_BLOCKS = "not_one_content_block", "Write exactly one text block per message."
    NON_TEXT = "non_text_content", "Remove images, documents, audio and video; distillation is text to text."
    BLANK_TEXT = "blank_text", "Write some text, or leave the record out."
    NO_PROMPT = "no_prompt", "Add the question that the answer belongs to."
    BAD_TOOLS = "bad_tools", "Describe each tool with a name and a JSON Schema of its parameters."
    BAD_TOOL_CALL = "bad_tool_call", "Write each call with a name and its arguments as a JSON object."
    NO_ANSWER = "no_answer", "Add the answer with the same id to the answers file."
    BAD_ANSWER = "bad_answer", "Write the answer as a list of {function: {parameter: [acceptable values]}}."

    # Invocation logs.
    NOT_A_LOG_RECORD = "not_a_log_record", "An invocation log record has modelId, operation, input and output."
    UNKNOWN_OPERATION = "unknown_operation", "Only Converse, InvokeModel and their streaming forms are read."
    UNKNOWN_BODY = (
        "unknown_body_format",
        "This model's native body is not known; call it through Converse, which is logged in one form.",
    )
    MISSING_BODY = "missing_body", "Turn on text delivery in the logging configuration, so that bodies are logged."
    BODY_NOT_FOUND = "body_not_found", "Copy the data/ folder of the log as well, with its structure."
    BODY_OUTSIDE = "body_outside_log", "The S3 path of the body leads out of the log's folder; it is not followed."
    CALL_FAILED = "call_failed", "The call failed (errorCode) or the model refused; leave it out."
    RESPONSE_TRUNCATED = "response_truncated", "The answer stopped at max_tokens; ask again with a higher limit."
    NOT_THE_TEACHER = (
        "not_the_teacher",
        "The record is another model's; leave it out, or name that model as the teacher.",
    )
    FILTERED_OUT = "filtered_out", "The record does not match the metadata filter; change the filter if it should."

    # The data set as a whole.
    DUPLICATE_PROMPT = "duplicate_prompt", "The same prompt came before; keep one of them."
    TOO_MANY_TOKENS = "too_many_tokens", "Shorten the prompt or its tools, or raise max_prompt_tokens."

    # Accepted, with a warning.
    UNDECLARED_REQUIRED = (
        "undeclared_required_parameter",
        "The tool requires a parameter that it does not declare; add it to `properties` or take it out of `required`.",
    )
    UNGROUNDED_ARGUMENT = (
        "ungrounded_argument",
        "The answer uses a value that the prompt never names: a student would learn to invent it. "
        "Add it to the prompt, or correct the answer.",
    )
    INVALID_ANSWER = "answer_not_a_valid_call", "The answer does not fit the tools; correct the call or the tool."
    NOT_QUITE_JSON = (
        "tools_not_valid_json",
        "The tools in the text are not valid JSON (single quotes?); write them with a JSON library.",
    )


WARNINGS = frozenset(
    {Reason.UNDECLARED_REQUIRED, Reason.UNGROUNDED_ARGUMENT, Reason.INVALID_ANSWER, Reason.NOT_QUITE_JSON}
)


@dataclass(frozen=True, slots=True)
class Rejection:
    """One record, or one file (line 0), that cannot be used.

    Attributes:
        file: the file it stands in. line: counted from 1; 0 where the file as a whole is meant.
        reason: the code. message: what is wrong with this one, where in it. help: what to change.
    """

    file: str
    line: int
    reason: Reason
    message: str

    @property
    def help(self) -> str:
        return self.reason.help

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the rejections file."""
        place = {"file": self.file, "line": self.line}
        return {**place, "reason": self.reason.value, "message": self.message, "help": self.help}


@dataclass(frozen=True, slots=True)
class DataWarning:
    """A fault of an accepted record; the fields are those of `Rejection`."""

    file: str
    line: int
    reason: Reason
    message: str

    @property
    def help(self) -> str:
        return self.reason.help

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the rejections file, marked as a warning."""
        place = {"file": self.file, "line": self.line}
        return {**place, "warning": self.reason.value, "message": self.message, "help": self.help}


class Reject(DataError):
    """Raised inside the readers where a record turns out to be unusable; `read` turns it into a `Rejection`."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def at(self, file: str, line: int) -> Rejection:
        """The finding with its place."""
        return Rejection(file, line, self.reason, self.message)


def excerpt(value: Any) -> str:
    """A value as it may stand in a message: short, on one line, and printable."""
    text = value if isinstance(value, str) else repr(value)
    text = text[: EXCERPT_CHARS + 1]
    shown = "".join(c if c.isprintable() else " " for c in text).encode("utf-8", "replace").decode()
    return shown[:EXCERPT_CHARS] + "..." if len(text) > EXCERPT_CHARS else shown
